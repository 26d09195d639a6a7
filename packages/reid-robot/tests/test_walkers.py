"""Generated people and films: the same for the same seed, and what they say they are."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from reid_robot.clip import ClipConfig, film
from reid_robot.tracking import overlaps
from reid_robot.walkers import Pose, WalkerConfig, draw_appearance, draw_camera, draw_walkers, paint_person


def test_same_seed_same_pictures():
    config = WalkerConfig(images_per_camera=1)
    first, again, other = (
        draw_walkers(2, config, seed=1),
        draw_walkers(2, config, seed=1),
        draw_walkers(2, config, seed=2),
    )
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(draw_walkers(1, config, seed=1).images, first.images[:2]), "people do not depend on their number"


def test_labels_and_sizes():
    crops = draw_walkers(3, WalkerConfig(size=(48, 20), cameras=2, images_per_camera=4))
    assert crops.images.shape == (24, 3, 48, 20)
    assert crops.ids.tolist() == [i for i in range(3) for _ in range(8)]
    assert crops.cameras.tolist() == ([0] * 4 + [1] * 4) * 3


def test_parts_have_their_colours():
    """A person from the front: hair on top, torso in the middle, legs below, shoes at the end."""
    appearance = draw_appearance(np.random.default_rng(5))
    changed = type(appearance)(**{**vars(appearance), "texture": 0, "bag": None, "skirt": False, "long_hair": False})
    colours, cover = paint_person(changed, Pose(phase=0.0, height=0.9), (200, 100))
    places = {"hair": 0.06, "torso": 0.36, "legs": 0.7, "shoes": 0.965}
    for name, height in places.items():
        y = int(200 * (0.05 + 0.9 * height))
        x = 50 if name in ("hair", "torso") else 50 + int(200 * 0.9 * 0.06)
        assert cover[y, x] > 0.9, name
        assert np.allclose(colours[y, x], getattr(changed, name), atol=0.02), name
    assert cover[5, 5] == 0


def test_masks_show_the_person():
    crops = draw_walkers(4, WalkerConfig(occlusion=0.0))
    share = crops.masks.float().mean((1, 2))
    assert share.min() > 0.1
    assert share.max() < 0.7
    hidden = draw_walkers(4, WalkerConfig(occlusion=1.0)).masks.float().mean((1, 2))
    assert hidden.mean() < 0.9 * share.mean()


def test_cameras_differ_by_their_cast():
    neutral = draw_camera(np.random.default_rng(0), 0.0)
    assert neutral.gains.tolist() == [1, 1, 1]
    assert neutral.gamma == 1
    gains = np.array([draw_camera(np.random.default_rng(n), 0.3).gains for n in range(50)])
    assert 0.7 <= gains.min() < 0.75
    assert 1.25 < gains.max() <= 1.3


def test_film_boxes_are_where_people_are():
    frames = list(film(ClipConfig(people=5, frames=45, seed=1, miss=0.2)))
    again = next(iter(film(ClipConfig(people=5, frames=45, seed=1, miss=0.2))))
    assert np.array_equal(frames[0].image, again.image)
    true, found = sum(len(f.truth) for f in frames), sum(len(f.boxes) for f in frames)
    assert 0.6 * true < found < 0.95 * true
    assert min(overlaps(f.boxes, f.truth).max(1).min() for f in frames if len(f.boxes)) > 0.7
    assert len({person for f in frames for person in f.people}) >= 3
    assert any(a.people != b.people for a, b in pairwise(frames)), "people come and go"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WalkerConfig(size=(8, 8)), "at least 16 x 16"),
        (lambda: WalkerConfig(cameras=0), "must be positive"),
        (lambda: WalkerConfig(cast=2), "cast must lie"),
        (lambda: draw_walkers(0), "num_ids must be positive"),
        (lambda: ClipConfig(people=0), "must be positive"),
        (lambda: ClipConfig(size=(50, 500)), "at least 96 x 96"),
        (lambda: ClipConfig(miss=1), "miss must lie"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
