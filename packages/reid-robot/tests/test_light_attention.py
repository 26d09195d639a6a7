"""The light block: identity at first, gradients, its relation to SE, folding, costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reid_robot.light_attention import LightAttention
from reid_robot.rival_blocks import SqueezeExcitation

KINDS = ("c", "s", "cs")


def trained(kind, channels=32, dtype=torch.float64):
    """A block with weights and statistics that are not those it starts with."""
    torch.manual_seed(3)
    block = LightAttention(channels, kind=kind, reduction=8).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.4)
        for name, buffer in block.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return block


def by_hand(block, x):
    """Place by place and channel by channel, as the formula in the module reads (eval mode)."""
    out = torch.empty_like(x)
    B, C, H, W = x.shape
    for b in range(B):
        u = [x[b, c].sum() / (H * W) for c in range(C)]
        logits = torch.zeros(C, dtype=x.dtype)
        if "c" in block.kind:
            hidden = [max(sum(w * m for w, m in zip(row, u, strict=True)), 0 * u[0]) for row in block.w1]
            logits = torch.stack([sum(w * h for w, h in zip(row, hidden, strict=True)) for row in block.w2])
        for i in range(H):
            for j in range(W):
                gs = 0.0
                if "s" in block.kind:
                    norm, v = block.norm, block.project.weight[0, :, 0, 0]
                    q = (v * x[b, :, i, j]).sum()
                    scaled = (q - norm.running_mean[0]) / (norm.running_var[0] + norm.eps).sqrt()
                    gs = block.scale * (scaled * norm.weight[0] + norm.bias[0])
                out[b, :, i, j] = x[b, :, i, j] * 2 / (1 + torch.exp(-(logits + gs)))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_formula(kind):
    block, x = trained(kind).eval(), torch.randn(2, 32, 3, 2, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(block(x), by_hand(block, x), atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_identity(kind, training):
    block, x = LightAttention(48, kind=kind).train(training), torch.randn(3, 48, 5, 2)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_learns_from_the_first_step(kind):
    block, x = LightAttention(48, kind=kind), torch.randn(3, 48, 5, 2)
    (block(x) * torch.randn_like(x)).sum().backward()
    if "c" in kind:
        assert block.w2.grad.abs().max() > 0.01
    if "s" in kind:
        assert block.scale.grad.abs() > 0.01


def test_channel_gate_is_twice_squeeze_and_excitation():
    block, se = trained("c", dtype=torch.float32), SqueezeExcitation(32, reduction=8)
    se.load_state_dict(block.state_dict())
    x = torch.randn(2, 32, 7, 3)
    assert torch.allclose(block(x), 2 * se(x), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    block = trained(kind, channels=8).train()
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in block.named_parameters()]

    def run(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *block.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_folding_changes_nothing(kind):
    block, x = trained(kind).eval(), torch.randn(2, 32, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        before = block(x)
        block.fold()
        block.fold()  # a second time does nothing
        assert torch.allclose(block(x), before, atol=1e-12)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in block.modules())


@pytest.mark.parametrize("size", [(64, 32), (96, 32), (32, 16)])
def test_any_size(size):
    assert trained("cs", dtype=torch.float32)(torch.randn(2, 32, *size)).shape == (2, 32, *size)


@pytest.mark.parametrize("kind", KINDS)
def test_counted_work_is_the_formulas(kind):
    block = LightAttention(64, kind=kind).eval()
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(1, 64, 9, 5))
    assert counter.get_total_flops() == 2 * block.macs(9, 5)
    assert block.macs(9, 5) == (2 * 64 * 4 if "c" in kind else 0) + (64 * 45 if "s" in kind else 0)


def test_spatial_gate_of_a_channel_block():
    with pytest.raises(ValueError, match="no spatial gate"):
        LightAttention(32, kind="c").spatial_logits(torch.randn(1, 32, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kind": "x"}, "kind must be"), ({"reduction": 0}, "reduction must lie"), ({"reduction": 33}, "got 33 for 32")],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LightAttention(32, **arguments)
