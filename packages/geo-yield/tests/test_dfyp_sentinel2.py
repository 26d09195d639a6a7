"""DFYP on chips: sizes, chunks, order and number of chips, luminance operator, the published model's own outputs."""

from dataclasses import replace

import pytest
import torch

from geo_yield.dfyp_sentinel2 import (
    PUBLISHED_OPERATORS,
    DFYPSentinel2,
    DFYPSentinel2Config,
    normalise,
    simclr_augmentation,
    unit_images,
)
from geo_yield.errors import InputProblem

TINY = DFYPSentinel2Config(
    size=32, patch=16, cnn_widths=(4, 5, 6, 8), vit_dim=12, vit_depth=2, vit_heads=2, vit_head_dim=5, vit_mlp=9, chunk=4
)  # fmt: skip


def chips(dates, places, *, seed=0, size=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (dates, places, size, size, 3), dtype=torch.uint8, generator=generator)


def model(config=TINY, seed=0):
    torch.manual_seed(seed)
    return DFYPSentinel2(config).eval()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def fill(module):
    """Weights that depend on names and shapes only, so that another program can be given the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in sorted(module.state_dict().items()):
            drawn = torch.randn(tensor.shape, generator=generator)
            if name.endswith("weight") and tensor.ndim > 1:
                tensor.copy_(drawn * (1.5 / tensor[0].numel()) ** 0.5)
            elif tensor.ndim == 2:
                tensor.copy_(drawn * (1.5 / tensor.shape[1]) ** 0.5)
            else:
                tensor.copy_(0.5 + 0.2 * drawn if tensor.ndim < 2 else drawn)


def test_parameter_counts_are_the_published_ones():
    built = DFYPSentinel2(DFYPSentinel2Config())
    assert [count(part) for part in (built.cnn, built.vit, built.rca)] == [265_731, 1_115_266, 6]
    assert count(built) == 265_731 + 1_115_266 + 6 + 4 == 1_381_007


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("sobel", [-3.3290436267852783, 0.4551687240600586]),
        ("scharr", [-4.38611364364624, -0.3076009750366211]),
    ],
)
def test_same_outputs_as_the_published_model(operator, expected):
    """Recorded from the authors' model (onef1shy/DFYP at 21588aa) with these weights: two chips of one date."""
    built = DFYPSentinel2(DFYPSentinel2Config(operator=operator)).eval()
    fill(built)
    with torch.no_grad():
        found = built(chips(1, 2, seed=1, size=224)[None])
    torch.testing.assert_close(found, torch.tensor([expected]), atol=2e-5, rtol=0)


def test_chunks_order_and_number_of_chips():
    county = chips(2, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        whole = model()([county])
        for chunk in (1, 8):
            torch.testing.assert_close(model(replace(TINY, chunk=chunk))([county]), whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(model()([county[:, order]]), whole, atol=1e-5, rtol=0)
        other = chips(3, 2, seed=1)
        both = model()([county, other])  # ragged: other numbers of dates and of chips, no padding
        torch.testing.assert_close(both, torch.cat([whole, model()([other])]))
        torch.testing.assert_close(model()(torch.stack([county, county])), torch.cat([whole, whole]))
        assert float((both[0] - both[1]).abs().min()) > 1e-4


def test_one_edge_map_of_the_luminance_is_blended_into_every_channel():
    built = model()
    seen = []
    built.cnn.convolutions[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        built.cnn.weight.fill_(1.0)
        built.cnn.features(x)
        grey = (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]
        kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])[None, None]
        horizontal, vertical = (torch.conv2d(grey, k, padding=1) for k in (kernel, kernel.mT))
    expected = (horizontal**2 + vertical**2 + 1e-8).sqrt().expand(-1, 3, -1, -1)
    torch.testing.assert_close(seen[0], expected)


def test_scaling_divides_by_255_before_normalising():
    white = torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)
    assert torch.equal(unit_images(white), torch.ones(1, 3, 4, 4))
    torch.testing.assert_close(normalise(unit_images(white))[0, :, 0, 0], torch.tensor([2.73846, 2.72680, 3.22917]))


def test_augmentation_keeps_the_range_and_is_drawn_anew():
    images = unit_images(chips(1, 3)[0])
    augment = simclr_augmentation(32)
    torch.manual_seed(0)
    first, second = augment(images), augment(images)
    assert first.shape == images.shape
    assert 0 <= float(first.min()) < float(first.max()) <= 1
    assert float(first.std()) > 0.01  # raw bytes would be clamped to nearly constant images
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(augment(images), first)


def test_recomputing_chunks_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        built = model(replace(TINY, recompute=recompute)).train()
        torch.manual_seed(1)  # dropout
        built([chips(2, 3)]).sum().backward()
        gradients.append({name: p.grad for name, p in built.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    assert float(gradients[0]["vit.embed.1.weight"].abs().sum()) > 0


def test_fusion_weighs_each_target():
    built = model()
    county = [chips(1, 2)]
    with torch.no_grad():
        both = built(county)
        built.weight_cnn.copy_(torch.tensor([1.0, 0.0]))
        built.weight_vit.copy_(torch.tensor([0.0, 1.0]))
        features = built._chunk_features(normalise(unit_images(county[0].flatten(0, 1))))
        cnn, vit = (feature.mean(0, keepdim=True) for feature in features)
        expected = torch.stack([built.cnn.head(cnn)[:, 0], built.vit.head(vit)[:, 1]], dim=1)
        torch.testing.assert_close(built(county), expected)
        assert not torch.allclose(both, expected)


def test_crops_have_the_published_operators():
    assert [PUBLISHED_OPERATORS[crop] for crop in ("corn", "cotton", "soybean", "winter wheat")] == [
        "sobel", "scharr", "sobel", "scharr",
    ]  # fmt: skip


def test_bad_configs_and_chips_are_refused():
    with pytest.raises(InputProblem, match="must be sobel or scharr for Sentinel-2 chips, got 'learnable'"):
        DFYPSentinel2Config(operator="learnable")
    with pytest.raises(InputProblem, match="multiple of patch=16"):
        DFYPSentinel2Config(size=40)
    for bad in (chips(1, 2).float(), chips(1, 2, size=16), chips(1, 2)[:0], chips(1, 2)[0]):
        with pytest.raises(ValueError, match=r"must be uint8 \(dates, chips, 32, 32, 3\), at least one, got"):
            model()([bad])
