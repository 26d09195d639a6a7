"""HaloNet against loops over pixels, its published sizes, timm's halo attention, and through the suite of models."""

import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn
from timm.models import is_model_in_modules
from torch import nn

import vit_efficient  # noqa: F401 - registers the models
from vit_efficient.halonet import (
    HaloAttention,
    HaloAttentionConfig,
    HaloNet,
    HaloNetConfig,
    TimmHaloAttention,
    apply_halo_attention,
)
from vit_efficient.testing import ModelTests, images
from vit_efficient.ve_halonetx import family_config

SMALL = HaloNetConfig(block=4, halo=1, layers=(1, 1, 1, 1), width=16, value_ratio=1.5, head_width=24)
PUBLISHED = {  # millions, to three digits
    "h0": 5.502, "h1": 8.101, "h2": 9.406, "h3": 11.843, "h4": 19.103, "h5": 30.719, "h6": 43.458, "h7": 67.435,
}  # fmt: skip


class TestHaloNet(ModelTests):
    names = ("halonetx_h0",)
    arguments = {"config": SMALL, "num_classes": 7}  # noqa: RUF012
    sizes = ((64, 96), (75, 61), (224, 200))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        model = timm.create_model(f"halonetx_{name}")
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 3) == PUBLISHED[name]
    assert count == formula(family_config(name))


def formula(config, classes=1000):
    """Parameters of the layout in the paper, added up."""
    total, dim, window = 3 * 64 * 49 + 2 * 64, 64, config.block + 2 * config.halo
    for stage, depth in enumerate(config.layers):
        width = 64 * 2**stage
        value, out = int(width * config.value_ratio), int(width * config.expansion)
        for index in range(depth):
            total += dim * width + 2 * width
            total += width * (2 * width + value) + 2 * (2 * window - 1) * width // config.heads[stage] + 2 * value
            total += value * out + 2 * out
            if (stage and not index) or dim != out:
                total += dim * out + 2 * out
            dim = out
    if config.head_width:
        total += dim * config.head_width + 2 * config.head_width
        dim = config.head_width
    return total + dim * classes + classes


def one_pixel_at_a_time(layer, x, stride_aware=True):
    """The formula in loops over queries and keys."""
    B, _, H, W = x.shape
    n, b, h, s = layer.num_heads, layer.block, layer.halo, layer.stride
    w = b + 2 * h
    q, kv = layer.q(x), layer.kv(x).unflatten(1, (n, -1))
    d = q.shape[1] // n
    q, k, v = q.unflatten(1, (n, -1)), kv[:, :, :d], kv[:, :, d:]
    out = x.new_zeros(B, n, v.shape[2], -(-H // s), -(-W // s))
    rows, columns = layer.pos_embed.height_rel, layer.pos_embed.width_rel
    for y in range(0, H, s):
        for z in range(0, W, s):
            top, left = y // b * b - h, z // b * b - h
            scores, values = [], []
            for a in range(w):
                for c in range(w):
                    row, column = top + a, left + c
                    filled_h, filled_w = -(-H // b) * b, -(-W // b) * b
                    inside = 0 <= row < H and 0 <= column < W
                    beyond = (row >= H and filled_h > H) or (column >= W and filled_w > W)
                    if not inside and (layer.border == "mask" or beyond):
                        continue
                    key = k[:, :, :, row, column] if inside else torch.zeros_like(k[..., 0, 0])
                    step = s if stride_aware else 1
                    position = rows[a - step * (y % b // s) + w - 1] + columns[c - step * (z % b // s) + w - 1]
                    query = q[:, :, :, y, z]
                    scores.append((query * (key * d**-0.5 + position)).sum(-1))
                    values.append(v[:, :, :, row, column] if inside else torch.zeros_like(v[..., 0, 0]))
            weights = torch.stack(scores, -1).softmax(-1)
            out[:, :, :, y // s, z // s] = torch.einsum("bnk,kbnd->bnd", weights, torch.stack(values))
    return out.flatten(1, 2)


@pytest.mark.parametrize(
    ("block", "halo", "stride", "size"),
    [(4, 1, 1, (8, 4)), (4, 2, 2, (8, 8)), (2, 0, 1, (4, 6)), (4, 1, 1, (6, 7)), (4, 1, 2, (7, 5))],
)
@pytest.mark.parametrize("border", ["zero", "mask"])
def test_attention_is_the_loop_over_pixels(block, halo, stride, size, border):
    torch.manual_seed(0)
    layer = HaloAttention(6, 8, 12, 2, block=block, halo=halo, stride=stride, border=border).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), one_pixel_at_a_time(layer, x), atol=1e-10, rtol=1e-10)


def test_one_block_without_halo_is_global_attention():
    torch.manual_seed(0)
    layer, x = HaloAttention(6, 8, 8, 2, block=5, halo=0), torch.randn(2, 6, 5, 5)
    for table in layer.pos_embed.parameters():
        nn.init.zeros_(table)
    q = layer.q(x).unflatten(1, (2, 4)).flatten(3).mT
    kv = layer.kv(x).unflatten(1, (2, 8)).flatten(3).mT
    wanted = nn.functional.scaled_dot_product_attention(q, kv[..., :4], kv[..., 4:])
    torch.testing.assert_close(layer(x), wanted.mT.reshape(2, 8, 5, 5))


def test_blocks_move_with_the_image_and_pixels_do_not():
    torch.manual_seed(0)
    layer, x = HaloAttention(4, 8, 8, 2, block=4, halo=1), torch.randn(1, 4, 24, 24)
    inner = (slice(None), slice(None), slice(8, 16), slice(8, 16))
    shifted = layer(x.roll(4, 2)).roll(-4, 2)
    torch.testing.assert_close(shifted[inner], layer(x)[inner])
    assert (layer(x.roll(1, 2)).roll(-1, 2)[inner] - layer(x)[inner]).abs().max() > 0.01


def test_a_block_sees_its_window_and_nothing_else():
    torch.manual_seed(0)
    layer, x = HaloAttention(4, 8, 8, 2, block=4, halo=1), torch.randn(1, 4, 16, 16, requires_grad=True)
    layer(x)[:, :, 4:8, 8:12].sum().backward()
    seen = x.grad.abs().sum(1)[0] > 0
    wanted = torch.zeros(16, 16, dtype=torch.bool)
    wanted[3:9, 7:13] = True
    assert torch.equal(seen, wanted)


def test_strided_queries_are_every_second_one():
    torch.manual_seed(0)
    layer, x = HaloAttention(4, 8, 8, 2, block=4, halo=1), torch.randn(1, 4, 9, 8)
    strided = HaloAttention(4, 8, 8, 2, block=4, halo=1, stride=2)
    strided.load_state_dict(layer.state_dict())
    torch.testing.assert_close(strided(x), layer(x)[:, :, ::2, ::2], atol=1e-6, rtol=1e-5)


def test_odd_blocks_are_averaged():
    torch.manual_seed(0)
    layer, x = HaloAttention(4, 8, 8, 2, block=5, halo=1), torch.randn(1, 4, 10, 10)
    strided = HaloAttention(4, 8, 8, 2, block=5, halo=1, stride=2)
    strided.load_state_dict(layer.state_dict())
    torch.testing.assert_close(strided(x), nn.functional.avg_pool2d(layer(x), 2))


def test_gradients():
    torch.manual_seed(0)
    layer = HaloAttention(3, 4, 4, 2, block=2, halo=1).double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, (x,))
    layer(x).sum().backward()
    unused = layer.pos_embed.height_rel.grad[: 4 - 2]
    assert torch.equal(unused, torch.zeros_like(unused)), "rows of the table that no query and key are apart"


def test_learns_to_look_aside():
    torch.manual_seed(0)
    layer = HaloAttention(9, 16, 8, 1, block=4, halo=2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        x = torch.randn(4, 8, 16, 16, generator=generator)
        given = layer(torch.cat([x, torch.ones(4, 1, 16, 16)], 1))[:, :, 4:12, 4:12]
        loss = (given - x.roll((1, -2), (2, 3))[:, :, 4:12, 4:12]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2e-3


# ---- timm's own models


@pytest.mark.parametrize("name", ["halonet26t", "halonet50ts", "haloregnetz_b"])
def test_timm_models_give_the_same_with_our_attention(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    size = 224 if name == "haloregnetz_b" else 256
    x, keys = images(1, size), set(model.state_dict())
    with torch.inference_mode():
        before = model(x)
        handle = apply_halo_attention(model)
        torch.testing.assert_close(model(x), before, atol=1e-4, rtol=1e-4)
        assert set(model.state_dict()) == keys
        assert len(handle.layers_changed) > 1
        if name == "halonet26t":
            assert bool(model(images(1, 200)).isfinite().all()), "sizes that timm refuses"
        handle.remove()
        assert torch.equal(model(x), before)
    assert not any(isinstance(m, TimmHaloAttention) for m in model.modules())


def test_scaled_positions_of_timm():
    torch.manual_seed(0)
    host, x = (
        HaloAttn(8, 16, num_heads=2, block_size=4, halo_size=1, stride=2, scale_pos_embed=True),
        torch.randn(2, 8, 8, 8),
    )
    model = nn.Sequential(host)
    wanted = model(x)
    apply_halo_attention(model)
    torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)


def test_masked_borders_change_the_border_only():
    torch.manual_seed(0)
    host, x = HaloAttn(8, 16, num_heads=2, block_size=4, halo_size=1), torch.randn(1, 8, 12, 12)
    model = nn.Sequential(host)
    before = model(x)
    apply_halo_attention(model, HaloAttentionConfig(border="mask"))
    difference = (model(x) - before).abs().amax((0, 1))
    assert difference[4:8, 4:8].max() < 1e-5
    assert difference[:4].max() > 0.01


def test_registry_of_timm_is_otherwise_as_it_was():
    assert timm.create_model("halonet_h1").__class__.__name__ == "ByobNet"
    ours = {name for name in timm.list_models() if name.startswith(("halonetx", "l2vit", "asvit"))}
    assert len(ours) == 9 + 4 + 3
    assert all(is_model_in_modules(name, ["ve_halonetx", "ve_l2vit", "ve_asvit"]) for name in ours)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HaloAttention(4, 8, 8, 2, block=4, halo=1, stride=3), "stride must be 1 or 2"),
        (lambda: HaloAttention(4, 8, 8, 2, block=4, halo=1, border="wrap"), "border must be"),
        (lambda: HaloAttentionConfig(border="wrap"), "border must be"),
        (lambda: HaloNetConfig(layers=(1, 1)), "needs its heads"),
        (lambda: HaloNetConfig(width=10), "multiples of its 4 heads"),
        (lambda: apply_halo_attention(nn.Linear(2, 2)), "no timm HaloAttn layers"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_convolutions_in_early_stages():
    model = HaloNet(HaloNetConfig(block=4, halo=1, layers=(1, 1, 1, 1), width=16, conv_stages=(0, 1))).eval()
    assert isinstance(model.stages[0][0].attn, nn.Conv2d)
    assert isinstance(model.stages[2][0].attn, HaloAttention)
    assert timm.create_model("halonetx_h0", conv_stages=(0, 1)).stages[1][0].attn.stride == (2, 2)
