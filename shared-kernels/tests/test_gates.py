"""channel_gate against its formula, its laws (DFYP, arXiv:2507.05849: gates in (0, 1), blind to place), refusals."""

import pytest
import torch

from shared_kernels import channel_gate


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def weights(channels, hidden, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(hidden, channels, generator=generator, dtype=dtype),
        torch.randn(channels, hidden, generator=generator, dtype=dtype),
    )


def test_the_formula_by_hand():
    """Two channels, one hidden unit: g = sigmoid(w2 relu(w1 m))."""
    x = torch.tensor([[[[1.0, 5.0]], [[2.0, 4.0]]]])
    w1, w2 = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5], [-2.0]])
    # means 3 and 3: hidden relu(0); maxima 5 and 4: hidden relu(1)
    assert torch.equal(channel_gate(x, w1, w2, pool="avg"), x / 2)
    gated, gate = channel_gate(x, w1, w2, pool="max", return_gate=True)
    assert torch.allclose(gate, torch.sigmoid(torch.tensor([[0.5, -2.0]])))
    assert torch.allclose(gated[0, 1, 0], torch.tensor([2.0, 4.0]) / (1 + torch.e**2))


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("spatial", [(7,), (5, 6), (2, 3, 4)])
def test_any_number_of_spatial_dimensions(pool, spatial):
    x = torch.randn(3, 9, *spatial)
    flat, flat_gate = channel_gate(x.flatten(2), *weights(9, 2), pool=pool, return_gate=True)
    gated, gate = channel_gate(x, *weights(9, 2), pool=pool, return_gate=True)
    assert torch.equal(gate, flat_gate)
    assert torch.equal(gated, flat.reshape(x.shape))


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_gates_lie_inside_and_ignore_where_values_stand(pool):
    x, order = torch.randn(4, 9, 11, 13, dtype=torch.float64), torch.randperm(11 * 13)
    shuffled = x.flatten(2)[:, :, order].reshape(x.shape)
    _, gate = channel_gate(x, *weights(9, 2, x.dtype), pool=pool, return_gate=True)
    _, other = channel_gate(shuffled, *weights(9, 2, x.dtype), pool=pool, return_gate=True)
    assert gate.min() > 0
    assert gate.max() < 1
    assert gate.std() > 0.01
    assert torch.allclose(gate, other, atol=1e-12)


def test_samples_gate_only_themselves():
    x = torch.randn(5, 6, 4, 3)
    together = channel_gate(x, *weights(6, 2), pool="max")
    assert torch.allclose(together[3:4], channel_gate(x[3:4], *weights(6, 2), pool="max"))


def test_pools_agree_on_constant_channels_and_zero_weights_halve():
    constant = torch.randn(3, 9, 1, 1).expand(3, 9, 8, 5)
    w1, w2 = weights(9, 2)
    assert torch.allclose(channel_gate(constant, w1, w2, pool="avg"), channel_gate(constant, w1, w2, pool="max"))
    x = torch.randn(3, 9, 8, 5)
    assert torch.equal(channel_gate(x, w1, torch.zeros_like(w2), pool="max"), x / 2)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_gradients(pool):
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    w1, w2 = (w.requires_grad_() for w in weights(5, 3, torch.float64))
    assert torch.autograd.gradcheck(lambda *a: channel_gate(*a, pool=pool, return_gate=True), (x, w1, w2))


def test_bfloat16_stays_bfloat16():
    x = torch.randn(2, 9, 40, 30)
    truth = channel_gate(x.bfloat16().float(), *(w.bfloat16().float() for w in weights(9, 2)))
    gated = channel_gate(x.bfloat16(), *(w.bfloat16() for w in weights(9, 2)))
    assert gated.dtype == torch.bfloat16
    assert (gated.float() - truth).norm() < 0.01 * truth.norm()


def test_compiles_without_a_break():
    x, w = torch.randn(2, 9, 5, 6), weights(9, 2)
    compiled = torch.compile(channel_gate, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, *w, pool="max"), channel_gate(x, *w, pool="max"))


@pytest.mark.parametrize(
    ("x", "w1", "w2", "pool", "message"),
    [
        ((3, 9), (2, 9), (9, 2), "avg", r"at least one place to pool over, got \(3, 9\)"),
        ((3, 9, 0, 4), (2, 9), (9, 2), "max", r"at least one place to pool over, got \(3, 9, 0, 4\)"),
        ((3, 9, 4), (2, 8), (9, 2), "avg", r"C = 9, the channels of x, got \(2, 8\) and \(9, 2\)"),
        ((3, 9, 4), (2, 9), (9, 3), "avg", r"C = 9, the channels of x, got \(2, 9\) and \(9, 3\)"),
        ((3, 9, 4), (2, 9), (9, 2), "sum", "pool must be 'avg' or 'max', got 'sum'"),
    ],
)
def test_refused(x, w1, w2, pool, message):
    with pytest.raises(ValueError, match=message):
        channel_gate(torch.zeros(x), torch.zeros(w1), torch.zeros(w2), pool=pool)
