"""Generated clips: seeded, described rightly, and moving as they say."""

import pytest
import torch

from diffusion_attn.moving_shapes import CAPTION, COLORS, WORDS, ClipConfig, draw_clips, embed_captions


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_clips_come_from_their_seed():
    config = ClipConfig(frames=3, size=24)
    first, again, other = (draw_clips(2, config, generator=seeded(n)) for n in (0, 0, 1))
    assert torch.equal(first.pixels, again.pixels)
    assert first.captions == again.captions
    assert not torch.equal(first.pixels, other.pixels)
    assert first.pixels.shape == (2, 3, 3, 24, 24)
    assert first.pixels.abs().max() <= 1


def test_colours_and_places_are_those_of_the_captions():
    """At the centre of the shape in front, pixels have the caption's colour up to its stripes."""
    clips = draw_clips(24, ClipConfig(frames=4, size=32), generator=seeded(3))
    seen = 0
    for pixels, caption, centers in zip(*clips, strict=True):
        number = 1 if caption[3] != "nothing" else 0
        color, kind, _ = caption[3 * number : 3 * number + 3]
        if kind == "ring":
            continue
        x, y = centers[number, 2].int().tolist()
        found, pure = (pixels[:, 2, y, x] + 1) / 2, torch.tensor(COLORS[color])
        assert ((found / pure) - (found / pure).mean()).abs().max() < 0.02
        assert 0.55 < (found / pure).mean() < 1.05
        seen += 1
    assert seen > 10


def test_shapes_stay_inside_and_move_at_their_speed():
    config = ClipConfig(frames=20, size=40)
    clips = draw_clips(12, config, generator=seeded(5))
    low = config.radius[0]
    for caption, centers in zip(clips.captions, clips.centers, strict=True):
        for number in range(2):
            if caption[3 * number] == "nothing":
                assert centers[number].isnan().all()
                continue
            assert low - 0.01 <= centers[number].min()
            assert centers[number].max() <= config.size - low + 0.01
            steps = centers[number].diff(dim=0).norm(dim=1)
            expected = {"still": 0.0, "slow": 1.0, "fast": 2.2}[caption[3 * number + 2]]
            assert steps.max() == pytest.approx(expected, abs=1e-3)


def test_what_a_still_shape_does_not_touch_stands_still():
    clips = draw_clips(30, ClipConfig(frames=4, size=24, two_shapes=0), generator=seeded(8))
    still = [pixels for pixels, caption in zip(clips.pixels, clips.captions, strict=True) if caption[2] == "still"]
    moving = [pixels for pixels, caption in zip(clips.pixels, clips.captions, strict=True) if caption[2] == "fast"]
    assert still
    assert moving
    assert all(torch.equal(pixels[:, 0], pixels[:, 3]) for pixels in still)
    assert all((pixels[:, 0] - pixels[:, 3]).abs().max() > 0.2 for pixels in moving)


def test_captions_have_vectors_that_tell_them_apart():
    captions = draw_clips(16, ClipConfig(frames=1, size=24), generator=seeded(1)).captions
    vectors = embed_captions(captions)
    assert vectors.shape == (16, CAPTION, 32)
    different = list(dict.fromkeys(captions))
    distances = torch.cdist(*[embed_captions(different).flatten(1)] * 2) + 10 * torch.eye(len(different))
    assert distances.min() > 0.3
    with pytest.raises(ValueError, match="'pink' is not among the words"):
        embed_captions([("pink", *WORDS[:5])])


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"size": 10}, {"radius": (0.0, 4.0)}, {"two_shapes": 2.0}])
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"shapes fit into the canvas|two_shapes must"):
        ClipConfig(**wrong)


def test_no_clips():
    clips = draw_clips(0, ClipConfig(frames=2, size=24), generator=seeded(0))
    assert clips.pixels.shape == (0, 3, 2, 24, 24)
    assert clips.captions == []
