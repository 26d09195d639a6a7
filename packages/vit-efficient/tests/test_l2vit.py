"""L2ViT against its formulas, its published parameter counts, and through the suite of models."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vit_efficient  # noqa: F401 - registers the models
from vit_efficient.l2vit import (
    DepthwiseConv,
    GlobalBlock,
    L2ViT,
    LocalConcentration,
    ReLULinearAttention,
    WindowAttention,
    WindowBlock,
    filter_checkpoint,
    relu_linear_attention,
)
from vit_efficient.testing import ModelTests, images

TINY = {"depths": (2, 1, 2, 1), "dims": (32, 64, 64, 96), "num_classes": 7}


class TestL2ViT(ModelTests):
    names = ("l2vit_tiny",)
    arguments = TINY
    sizes = ((64, 96), (75, 61), (125, 125))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("l2vit_tiny", 28_596_781),
        ("l2vit_small", 50_199_157),
        ("l2vit_base", 88_577_188),
        ("l2vit_base_384", 88_577_188),
    ],
)
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


def qkv(tokens, width=8, heads=3, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(3, 2, heads, tokens, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [1, 49, 50, 196])
def test_linear_attention_is_the_attention_map_written_out(tokens):
    query, key, value = qkv(tokens)
    factor = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    scores = query.relu() @ key.relu().mT
    divisor = scores.sum(-1, keepdim=True)
    wanted = factor[:, None, None] * (scores / divisor.clamp(min=100)) @ value
    given = relu_linear_attention(query, key, value, factor)
    torch.testing.assert_close(given, wanted, atol=1e-10, rtol=1e-10)
    if tokens == 196:
        assert divisor.min() < 100 < divisor.max(), "the clamp splits the rows"


def test_rows_sum_to_the_factor_or_less():
    query, key, _ = qkv(60)
    ones = torch.ones(2, 3, 60, 1, dtype=torch.float64)
    factor = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    divisor = (query.relu() @ key.relu().mT).sum(-1, keepdim=True)
    wanted = factor[:, None, None] * divisor.clamp(max=100) / 100
    torch.testing.assert_close(
        relu_linear_attention(query, key, ones, factor), wanted.where(divisor < 100, factor[:, None, None])
    )


def test_linear_attention_gradients():
    tensors = [t.requires_grad_() for t in qkv(9, width=3, heads=2, scale=3.0)]
    factor = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda q, k, v, f: relu_linear_attention(q, k, v, f, clamp=30.0), (*tensors, factor))


def test_many_tokens_in_half_precision():
    query, key, value = (t.float() for t in qkv(12_544, width=32, heads=1))
    factor = torch.ones(1)
    wanted = relu_linear_attention(query, key, value, factor)
    given = relu_linear_attention(query.half(), key.half(), value.half(), factor).float()
    assert ((given - wanted).norm() / wanted.norm()) < 0.01


def test_linear_attention_does_not_care_for_order_and_zero_rows_give_zero():
    layer, x = ReLULinearAttention(32, 1).double(), torch.randn(1, 1, 20, 32, dtype=torch.float64)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x[:, :, order]), layer(x)[:, :, order])
    zero = torch.zeros(1, 2, 5, 4)
    assert torch.equal(relu_linear_attention(zero, zero, zero + 1, torch.ones(2)), zero)


def test_a_window_as_large_as_the_map_is_softmax_attention():
    torch.manual_seed(0)
    layer, x = WindowAttention(32, 2, 6, mask_padding=False), torch.randn(2, 6, 6, 32)
    q, k, v = layer.qkv(x.flatten(1, 2)).view(2, 36, 3, 2, 16).permute(2, 0, 3, 1, 4)
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 6, 6, 32)
    torch.testing.assert_close(layer(x), layer.proj(out))


@pytest.mark.parametrize("mask", [False, True])
def test_windows_at_the_border(mask):
    """Published: zeros after the norm, whose keys are the biases and count; masked: the window ends with the map."""
    torch.manual_seed(0)
    layer, x = WindowAttention(32, 1, 4, mask_padding=mask), torch.randn(1, 6, 5, 32)
    nn.init.normal_(layer.qkv.bias)
    corner = x[:, 4:, 4:]
    if not mask:
        corner = nn.functional.pad(corner, (0, 0, 0, 3, 0, 2))
    q, k, v = layer.qkv(corner.flatten(1, 2)).chunk(3, -1)
    weights = (q @ k.mT * 32**-0.5).softmax(-1)
    wanted = layer.proj(weights @ v).view(corner.shape)[:, :2, :1]
    torch.testing.assert_close(layer(x)[:, 4:, 4:], wanted)


def reach(layer, size=21, channels=32):
    x = torch.zeros(1, size, size, channels, requires_grad=True)
    y = layer.eval()(x + torch.randn(1, size, size, channels, generator=torch.Generator().manual_seed(0)))
    y[0, size // 2, size // 2].sum().backward()
    rows, columns = x.grad.abs().sum(-1)[0].nonzero().T
    return rows.max() - rows.min() + 1, columns.max() - columns.min() + 1


def test_receptive_fields():
    torch.manual_seed(0)
    assert reach(LocalConcentration(32, "bn")) == (13, 13)
    assert reach(DepthwiseConv(32, 3)) == (3, 3)
    assert reach(GlobalBlock(32, 1, "bn", 0.0)) == (21, 21)
    assert reach(WindowAttention(32, 1, 7, mask_padding=False)) == (7, 7)


@pytest.mark.parametrize("norm", ["bn", "ln2d", "gn"])
def test_norms_of_the_local_module(norm):
    model = L2ViT(**TINY, lcm_norm=norm).train()
    assert bool(model(images(2, 64)).isfinite().all())
    single = model.eval()(images(1, 64))
    torch.testing.assert_close(model(images(1, 64)), single)


def test_cost_is_linear_in_pixels():
    model, macs = L2ViT(**TINY).eval(), []
    for size in (224, 448):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, size, size))
        macs.append(counter.get_total_flops() - 2 * model.head.fc.weight.numel())
    assert macs[1] / macs[0] == pytest.approx(4, abs=0.02)


def test_published_checkpoints_load():
    torch.manual_seed(0)
    model = L2ViT(**TINY).eval()
    published = {}
    for key, value in model.state_dict().items():
        key = key.replace("stem.proj.", "downsample_layers.0.proj.proj.").replace("stem.", "downsample_layers.0.")
        published[key.replace("downsamples.", "downsample_layers.").replace("head.fc.", "head.")] = value
    other = L2ViT(**TINY).eval()
    other.load_state_dict(filter_checkpoint({"model": published}, other))
    x = images(1, 64)
    assert torch.equal(other(x), model(x))
    assert filter_checkpoint(model.state_dict(), model).keys() == model.state_dict().keys()


def test_padding_left_out_makes_windows_independent_of_the_multiple():
    torch.manual_seed(0)
    x = torch.randn(1, 9, 9, 32)
    block = WindowBlock(32, 1, 7, True, 0.0)
    padded = WindowBlock(32, 1, 7, False, 0.0)
    padded.load_state_dict(block.state_dict())
    assert (block(x) - padded(x)).abs().max() > 1e-4


def accuracy_on_marked_maps(block):
    """Which of two marks lies somewhere on an 8 x 8 map, read off its first position."""
    torch.manual_seed(0)
    embed, head = nn.Linear(3, 32), nn.Linear(32, 2)
    optimizer = torch.optim.Adam([*embed.parameters(), *block.parameters(), *head.parameters()], lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def logits_and_labels():
        x = 0.3 * torch.randn(32, 64, 3, generator=generator)
        labels = torch.randint(2, (32,), generator=generator)
        x[torch.arange(32), torch.randint(1, 64, (32,), generator=generator), labels] += 6
        return head(block(embed(x).view(32, 8, 8, 32))[:, 0, 0]), labels

    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(*logits_and_labels()).backward()
        optimizer.step()
    block.eval()
    right = [logits.argmax(-1) == labels for logits, labels in (logits_and_labels() for _ in range(8))]
    return torch.cat(right).float().mean()


def test_only_global_blocks_carry_a_mark_across_the_map():
    assert accuracy_on_marked_maps(GlobalBlock(32, 1, "bn", 0.0)) > 0.95
    assert accuracy_on_marked_maps(WindowBlock(32, 1, 3, False, 0.0)) < 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dims": (32, 64, 64, 100)}, "multiples of 32"), ({"lcm_norm": "in"}, "lcm_norm must be")],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        L2ViT(**arguments)


def test_no_weights_are_promised():
    with pytest.raises(RuntimeError, match="pretrained"):
        timm.create_model("l2vit_tiny", pretrained=True)
