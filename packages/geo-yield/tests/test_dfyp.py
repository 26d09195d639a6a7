"""DFYP on histograms: operators, gate, routing, fusion, sizes, and the published model's own outputs."""

import numpy as np
import pytest
import torch

import geo_yield.dfyp as dfyp
from geo_yield.dfyp import (
    DFYP,
    PUBLISHED_OPERATORS,
    RCA,
    SCHARR,
    SOBEL,
    DFYPConfig,
    OperatorLayer,
    learnable_stencil,
    pad_season,
    same_padding,
)
from geo_yield.errors import InputProblem

TINY = DFYPConfig(
    bands=3,
    steps=8,
    bins=12,
    cnn_width=5,
    cnn_dense=7,
    vit_dim=16,
    vit_depth=2,
    vit_heads=3,
    vit_head_dim=6,
    vit_mlp=20,
)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(operator, *, weight=1.0, alpha=0.5, scale=0.1, dtype=torch.float32, **changes):
    built = OperatorLayer(DFYPConfig(operator=operator, **changes)).to(dtype)
    with torch.no_grad():
        for parameter, value in ((built.weight, weight), (built.alpha, alpha), (built.scale, scale)):
            parameter.fill_(value)
    return built


def inside(x):
    return x[..., 1:-1, 1:-1]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def fill(module):
    """Weights that depend on names and shapes only, so that another program can be given the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in sorted(module.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + drawn.abs())
            elif name.endswith("weight") and tensor.ndim > 1:
                tensor.copy_(drawn * (1.5 / tensor[0].numel()) ** 0.5)
            elif tensor.ndim == 2:
                tensor.copy_(drawn * (1.5 / tensor.shape[1]) ** 0.5)
            else:
                tensor.copy_(0.5 + 0.2 * drawn if tensor.ndim < 2 else drawn)


@pytest.mark.parametrize(("operator", "slope"), [("sobel", 8.0), ("scharr", 32.0)])
@pytest.mark.parametrize("axis", [2, 3])
def test_fixed_operators_measure_the_slope_of_a_ramp_in_both_directions(operator, slope, axis):
    ramp = torch.arange(9.0).view(*[9 if i == axis else 1 for i in range(4)]).expand(1, 2, 9, 9)
    torch.testing.assert_close(inside(layer(operator)(ramp)), torch.full((1, 2, 7, 7), slope), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("alpha", "kernel"), [(20.0, SOBEL), (-20.0, SCHARR)])
def test_learnable_operator_ends_at_sobel_and_scharr_over_their_largest_entries(alpha, kernel):
    kernel, scale = torch.tensor(kernel), 0.7
    torch.testing.assert_close(
        learnable_stencil(torch.tensor(alpha), torch.tensor(SOBEL), torch.tensor(SCHARR)), kernel / kernel.max()
    )
    x = random(2, 3, 7, 11)
    fixed = layer("sobel" if alpha > 0 else "scharr")(x)
    expected = fixed / kernel.max() * torch.sigmoid(torch.tensor(scale))
    torch.testing.assert_close(layer("learnable", alpha=alpha, scale=scale)(x), expected, atol=1e-3, rtol=0)


def test_learnable_operator_starts_with_a_share_of_sobel_of_0_622():
    middle = learnable_stencil(torch.tensor(0.5), torch.tensor(SOBEL), torch.tensor(SCHARR))
    share = 0.6224593
    torch.testing.assert_close(middle[0, 2], torch.tensor((share + 3 * (1 - share)) / (2 * share + 10 * (1 - share))))
    fresh = OperatorLayer(DFYPConfig())
    assert [p.item() for p in (fresh.weight, fresh.alpha, fresh.scale)] == pytest.approx([0.5, 0.5, 0.1])


@pytest.mark.parametrize("operator", dfyp.OPERATORS)
def test_operators_see_nothing_in_a_constant_image(operator):
    edges = inside(layer(operator)(torch.full((1, 2, 6, 7), 3.7)))
    assert 0 < float(edges.max()) <= 1.1e-3


@pytest.mark.parametrize("operator", dfyp.OPERATORS)
def test_blend_weight_zero_is_the_input_and_its_gradient_is_operator_minus_input(operator):
    x = random(2, 3, 6, 5, dtype=torch.float64)
    assert torch.equal(layer(operator, weight=0.0, dtype=torch.float64)(x), x)
    built = layer(operator, weight=0.3, dtype=torch.float64)
    built(x).sum().backward()
    edges = layer(operator, weight=1.0, dtype=torch.float64)(x).detach()
    torch.testing.assert_close(built.weight.grad, (edges - x).sum())


@pytest.mark.parametrize("operator", dfyp.OPERATORS)
def test_gradients_of_the_operator_layer(operator):
    built = layer(operator, weight=0.3, dtype=torch.float64)
    names = ("weight", "alpha", "scale") if operator == "learnable" else ("weight",)
    given = {name: getattr(built, name).detach().clone().requires_grad_() for name in names}
    x = random(2, 2, 5, 4, dtype=torch.float64).requires_grad_()

    def run(x, *values):
        return torch.func.functional_call(built, dict(zip(given, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *given.values()))


def test_gradients_of_gate_and_fusion():
    gate = RCA(3, reduction=16, pool="max").double()
    x = random(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w1, w2: torch.func.functional_call(gate, {"w1": w1, "w2": w2}, (x,)), (
        x, gate.w1.detach().abs().requires_grad_(), gate.w2.detach().requires_grad_()
    ))  # fmt: skip
    model = DFYP(TINY).double().eval()
    image = random(2, 3, 8, 12, dtype=torch.float64)
    weights = {name: torch.tensor(0.3, dtype=torch.float64).requires_grad_() for name in ("weight_cnn", "weight_vit")}
    assert torch.autograd.gradcheck(
        lambda a, b: torch.func.functional_call(model, dict(zip(weights, (a, b), strict=True)), (image,)),
        tuple(weights.values()),
    )


def test_gate_ignores_where_pixels_lie_and_pools_coincide_on_constant_bands():
    for pool in ("max", "avg"):
        gate = RCA(4, reduction=2, pool=pool)
        x = random(2, 4, 5, 6).abs()
        order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
        shuffled = x.flatten(2)[..., order].view_as(x)
        ratio, other = gate(x) / x, gate(shuffled) / shuffled
        assert 0 < float(ratio.min()) <= float(ratio.max()) < 1
        torch.testing.assert_close(ratio.amax((2, 3)), other.amax((2, 3)), atol=1e-6, rtol=0)
        with torch.no_grad():
            gate.w2.zero_()
        torch.testing.assert_close(gate(x), 0.5 * x)
    constant = random(2, 4, 1, 1).expand(2, 4, 5, 6)
    pooled_by_max, pooled_by_mean = (RCA(4, reduction=2, pool=pool) for pool in ("max", "avg"))
    pooled_by_mean.load_state_dict(pooled_by_max.state_dict())
    torch.testing.assert_close(pooled_by_max(constant), pooled_by_mean(constant))


def test_mixed_years_equal_row_by_row_and_only_present_operators_are_computed(monkeypatch):
    calls = []
    real = dfyp.stencil_blend
    monkeypatch.setattr(
        dfyp, "stencil_blend", lambda x, *a, **k: calls.append((len(x), float(a[0][1, 2]))) or real(x, *a, **k)
    )
    config = DFYPConfig(**{**TINY.__dict__, "operator_by_year": PUBLISHED_OPERATORS})
    torch.manual_seed(0)
    model = DFYP(config).double().eval()
    image, year = random(7, 3, 8, 12, dtype=torch.float64), torch.tensor([2009, 2011, 2004, 2009, 2015, 2013, 2012])
    with torch.no_grad():
        mixed = model(image, year)
        assert sorted(calls) == [(2, 1.0), (2, 2.0), (3, 10.0)]  # learnable, sobel, scharr: 7 rows in all
        calls.clear()
        single = torch.cat([model(image[[i]], year[[i]]) for i in range(7)])
        torch.testing.assert_close(mixed, single, atol=1e-6, rtol=0)
        calls.clear()
        same_year = model(image, torch.full((7,), 2011))
        assert calls == [(7, 2.0)]
        torch.testing.assert_close(same_year[[1, 4]], mixed[[1, 4]], atol=1e-6, rtol=0)
        assert float((same_year - mixed).abs()[[0, 2, 3, 5, 6]].min()) > 1e-5
        assert model(image[:0], year[:0]).shape == (0,)


def test_years_after_the_map_take_the_operator_for_the_future():
    config = DFYPConfig(operator="learnable", operator_by_year={2015: "sobel", 2009: "scharr"}, operator_after="sobel")
    years = (2003, 2009, 2012, 2015, 2024)
    assert [config.operator_of(year) for year in years] == ["learnable", "scharr", "learnable", "sobel", "sobel"]
    assert DFYPConfig(operator_by_year=PUBLISHED_OPERATORS).operator_of(2024) == "learnable"
    assert config == DFYPConfig(operator_by_year=((2009, "scharr"), (2015, "sobel")), operator_after="sobel")


def test_fusion_weights_one_zero_give_a_branch_exactly():
    torch.manual_seed(0)
    model = DFYP(TINY).eval()
    image = random(4, 3, 8, 12)
    gated = model.rca(image)
    for cnn, vit, branch in ((1.0, 0.0, model.cnn(gated)), (0.0, 1.0, model.vit(gated))):
        with torch.no_grad():
            model.weight_cnn.fill_(cnn)
            model.weight_vit.fill_(vit)
        assert torch.equal(model(image), branch[:, 0])


def test_parameter_counts_are_the_published_ones():
    model = DFYP(DFYPConfig())
    assert (count(model), count(model.cnn), count(model.vit), count(model.rca)) == (
        26_790_713,
        23_581_188,
        3_209_505,
        18,
    )
    assert count(model) - count(model.cnn) - count(model.vit) - count(model.rca) == 2


def test_same_outputs_as_the_published_model():
    """Recorded from the authors' model (onef1shy/DFYP at 21588aa) with these weights, inputs and their routing."""
    model = DFYP(DFYPConfig(operator_by_year=PUBLISHED_OPERATORS)).eval()
    fill(model)
    image = random(4, 9, 32, 32, seed=1)
    with torch.no_grad():
        gated, year = model.rca(image), torch.tensor([2009, 2011, 2012, 2003])
        cnn, vit = model.cnn(gated, year)[:, 0], model.vit(gated)[:, 0]
        both = model(image, year)
    expected = {
        "cnn": [-1.3694448471069336, -1.4271571636199951, -1.4571127891540527, -1.4570013284683228],
        "vit": [0.9848120808601379, 1.0127592086791992, 0.9816645383834839, 0.9930058717727661],
        "both": [-0.5107807517051697, -0.5419141054153442, -0.5903933048248291, -0.5822567939758301],
    }
    for name, found in (("cnn", cnn), ("vit", vit), ("both", both)):
        torch.testing.assert_close(found, torch.tensor(expected[name]), atol=2e-5, rtol=0)


def test_padding_is_tensorflows_same():
    assert [same_padding(size, 1) for size in (5, 6)] == [(1, 1), (1, 1)]
    assert [same_padding(size, 2) for size in (8, 7)] == [(0, 1), (1, 1)]


@pytest.mark.parametrize(("steps", "bins", "patch"), [(12, 20, 4), (6, 9, 3), (28, 32, 4)])
def test_other_sizes_of_season_and_histogram(steps, bins, patch):
    model = DFYP(DFYPConfig(**{**TINY.__dict__, "steps": steps, "bins": bins, "patch": patch}))
    out = model(random(3, 3, steps, bins))
    out.sum().backward()
    assert out.shape == (3,)
    assert all(float(p.grad.abs().sum()) > 0 for p in model.vit.parameters())


def test_season_that_has_only_begun_is_padded_with_empty_composites():
    image = np.random.default_rng(0).random((2, 3, 5, 7), dtype=np.float32)
    padded = pad_season(image, 8)
    assert np.array_equal(padded[:, :, :5], image)
    assert padded.shape == (2, 3, 8, 7)
    assert not padded[:, :, 5:].any()
    with pytest.raises(InputProblem, match="5 composites, the model takes at most 4"):
        pad_season(image, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operator": "prewitt"}, "operator must be one of sobel, scharr, learnable, got 'prewitt'"),
        ({"operator_by_year": {2012: "edge"}}, "got 'edge'"),
        ({"operator_after": "edge"}, "got 'edge'"),
        ({"steps": 30}, "multiples of patch=4, got 30 and 32"),
        ({"cnn_width": 0}, "cnn_width must be at least 1, got 0"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(InputProblem, match=message):
        DFYPConfig(**changes)


def test_wrong_shapes_are_refused():
    model = DFYP(TINY).eval()
    with pytest.raises(ValueError, match=r"\(B, 3, 8, 12\), got \(2, 3, 12, 8\)"):
        model(torch.zeros(2, 3, 12, 8))
    with pytest.raises(ValueError, match=r"one entry for each of 2 images, got shape \(3,\)"):
        model(torch.zeros(2, 3, 8, 12), torch.tensor([2009, 2010, 2011]))
