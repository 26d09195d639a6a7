"""Channel gates against their formulas and laws (DFYP, arXiv:2507.05849: gates in (0, 1), blind to place), refusals."""

import pytest
import torch

from shared_kernels import apply_channel_gate, channel_gate, channel_logits


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


def gated_by_hand(x, logits, gate, gain, spatial, weight):
    """Place by place, for x (N, C, P), logits (K, C), spatial (N, 1, P)."""
    out = torch.empty(max(x.shape[0], logits.shape[0]), *x.shape[1:], dtype=x.dtype)
    for n in range(out.shape[0]):
        sample, own = x[n % x.shape[0]], logits[n % logits.shape[0]]
        for p in range(x.shape[2]):
            z = own if spatial is None else own + weight * spatial[n % spatial.shape[0], 0, p]
            opened = {
                "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
                "softmax": lambda z: torch.exp(z) / torch.exp(z).sum(),
                "relu": lambda z: z.clamp(min=0),
                "given": lambda z: z,
            }[gate](z)
            out[n, :, p] = sample[:, p] * gain * opened
    return out


@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "relu", "given"])
@pytest.mark.parametrize("batches", [(3, 3), (1, 4), (3, 1)], ids=str)
@pytest.mark.parametrize("with_spatial", [False, True])
def test_applied_gates_by_hand_in_both_layouts(gate, batches, with_spatial):
    x, logits = torch.randn(batches[0], 5, 6, dtype=torch.float64), torch.randn(batches[1], 5, dtype=torch.float64)
    spatial = torch.randn(batches[0], 1, 6, dtype=torch.float64) if with_spatial else None
    weight = torch.randn(5, dtype=torch.float64) if with_spatial else None
    expected = gated_by_hand(x, logits, gate, 2.5, spatial, weight)
    options = {"gate": gate, "gain": 2.5, "spatial_weight": weight}
    assert torch.allclose(apply_channel_gate(x, logits, spatial=spatial, **options), expected)
    maps = x.reshape(-1, 5, 2, 3).permute(0, 2, 3, 1)
    places = spatial.reshape(-1, 1, 2, 3).permute(0, 2, 3, 1) if with_spatial else None
    residual = torch.randn(max(batches), 2, 3, 5, dtype=torch.float64)
    last = apply_channel_gate(maps, logits, spatial=places, residual=residual, channel_dim=-1, **options)
    assert torch.allclose(last, residual + expected.reshape(-1, 5, 2, 3).permute(0, 2, 3, 1))


def test_scaled_softmax_and_doubled_sigmoid_start_as_the_identity():
    x, zeros = torch.randn(2, 8, 5), torch.zeros(2, 8)
    assert torch.equal(apply_channel_gate(x, zeros, gate="softmax", gain=8.0), x)
    assert torch.equal(apply_channel_gate(x, zeros, gain=2.0, spatial=torch.zeros(2, 1, 5)), x)
    assert torch.equal(apply_channel_gate(x, zeros + 40 * torch.eye(8)[3], gate="softmax")[:, 3], x[:, 3])


def test_a_gate_of_a_vector_needs_no_place():
    x, mean = torch.randn(7, 5), torch.randn(1, 5)
    assert torch.equal(apply_channel_gate(x, mean, gate="given", channel_dim=-1), x * mean)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_channel_gate_is_its_two_steps_in_both_layouts(pool):
    x = torch.randn(3, 9, 5, 4, dtype=torch.float64)
    w1, w2 = weights(9, 2, x.dtype)
    gated = apply_channel_gate(x, channel_logits(x, w1, w2, pool=pool))
    assert torch.allclose(gated, channel_gate(x, w1, w2, pool=pool))
    last = x.permute(0, 2, 3, 1)
    again = apply_channel_gate(last, channel_logits(last, w1, w2, pool=pool, channel_dim=-1), channel_dim=-1)
    assert torch.allclose(again.permute(0, 3, 1, 2), gated)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "relu", "given"])
def test_gradients_of_applied_gates(gate):
    shapes = ((2, 4, 3), (2, 4), (2, 1, 3), (4,), (2, 4, 3))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    call = lambda x, z, s, w, r: apply_channel_gate(x, z, gate=gate, gain=3.0, spatial=s, spatial_weight=w, residual=r)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)


def test_bfloat16_logits_are_widened_before_the_softmax():
    x, logits = torch.randn(2, 512, 3).bfloat16(), torch.randn(2, 512).bfloat16()
    gated = apply_channel_gate(x, logits, gate="softmax", gain=512.0)
    truth = apply_channel_gate(x.double(), logits.double(), gate="softmax", gain=512.0)
    assert gated.dtype == torch.bfloat16
    assert (gated.double() - truth).norm() < 2**-8 * truth.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "tanh"}, "gate must be 'sigmoid', 'softmax', 'relu' or 'given', got 'tanh'"),
        ({"channel_dim": 2}, "channel_dim must be 1 or -1, got 2"),
        ({"logits": torch.zeros(3, 8)}, r"channels of x, got \(3, 8\) to \(3, 9, 4\)"),
        ({"logits": torch.zeros(2, 9)}, "for the 3 samples of x or for 1, got 2"),
        ({"spatial": torch.zeros(3, 9, 4)}, r"spatial must be \(3, 1, 4\), one channel of x, got \(3, 9, 4\)"),
        ({"spatial_weight": torch.zeros(9)}, "got \\(9,\\) and no spatial"),
        (
            {"spatial_weight": torch.zeros(3), "spatial": torch.zeros(3, 1, 4)},
            r"spatial_weight must be \(9,\), the channels of x, and comes with spatial, got \(3,\) and spatial",
        ),
    ],
)
def test_applying_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        apply_channel_gate(**{"x": torch.zeros(3, 9, 4), "logits": torch.zeros(3, 9)} | changes)
