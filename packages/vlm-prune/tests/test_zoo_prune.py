"""ZOO-Prune: estimators of sensitivity against each other and against definitions, SADS against a loop, budgets."""

import copy

import pytest
import torch
from torch import nn

import vlm_prune as vp
from vlm_prune.families import FAMILIES
from vlm_prune.testing import MethodTests, shared_model
from vlm_prune.tiny_models import LONG, SHORT, Asked, prompt, tiny_model
from vlm_prune.zoo_prune import (
    TwoLayers,
    normalised_sensitivity,
    sensitivity_exact,
    sensitivity_jvp,
    sensitivity_sampled,
    two_layers,
    unit_directions,
)


class TestZooPrune(MethodTests):
    def config(self, keep):
        return vp.ZooPruneConfig(keep=keep)


class TestZooPruneAsPublished(MethodTests):
    families = ("llava_next",)
    supported = ("llava", "llava_next", "llava_onevision")  # the projector must be linear - activation - linear

    def config(self, keep):
        return vp.ZooPruneConfig(keep=keep, estimator="fd", directions=8, rank=16)


def projector(d=24, h=40, width=32, seed=0, dtype=torch.float64, bias=True):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(d, h, bias=bias), nn.GELU(), nn.Linear(h, width, bias=bias)).to(dtype)
    return module.requires_grad_(False)


def tokens(n, d=24, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive(module, x, directions, step):
    """The published estimator, token by token and direction by direction."""
    found = torch.zeros(len(x), dtype=x.dtype)
    for i, token in enumerate(x):
        for u in directions:
            found[i] += ((module(token + step * u) - module(token - step * u)) / (2 * step)).norm()
    return found / len(directions)


def spearman(a, b):
    a, b = (t.argsort().argsort().double() for t in (a, b))
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def test_sampled_is_the_naive_formula():
    module, x = projector(), tokens(30)
    u = unit_directions(7, 24, seed=0, dtype=torch.float64)
    wanted = naive(module, x, u, 1e-2)
    assert (sensitivity_sampled(two_layers(module), x, u) - wanted).abs().max() < 1e-12
    single = copy.deepcopy(module).float()
    found = sensitivity_sampled(two_layers(single), x.float(), u.float())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=0)
    assert torch.allclose(u.norm(dim=1), torch.ones(7, dtype=torch.float64))


def test_differences_tend_to_the_derivative():
    module, x = projector(), tokens(20)
    u = unit_directions(5, 24, seed=0, dtype=torch.float64)
    limit = sensitivity_jvp(module, x[None], u)[0]
    error = {
        h: (sensitivity_sampled(two_layers(module), x, u, step=h) - limit).abs().max().item() for h in (0.1, 0.05, 0.01)
    }
    assert error[0.01] / limit.min().item() < 1e-5
    assert error[0.1] / error[0.05] == pytest.approx(4, abs=0.5)


def test_exact_is_the_norm_of_the_jacobian():
    module, x = projector(), tokens(12)
    wanted = torch.stack([torch.func.jacrev(module)(token).norm() for token in x]) / 24**0.5
    torch.testing.assert_close(sensitivity_exact(two_layers(module), x), wanted, rtol=1e-12, atol=0)


def test_exact_ranks_as_the_sampled_estimate():
    module = projector(256, 512, 512, dtype=torch.float32)
    x = tokens(192, 256, dtype=torch.float32) * torch.linspace(0.3, 2, 192)[:, None]
    layers = two_layers(module)
    exact = sensitivity_exact(layers, x)
    sampled = sensitivity_sampled(layers, x, unit_directions(64, 256, seed=0), rank=None)
    assert spearman(exact, sampled) > 0.98
    assert (sampled / exact).mean().item() == pytest.approx(1, abs=0.02)
    other = sensitivity_sampled(layers, x[:100], unit_directions(64, 256, seed=1))
    assert spearman(sampled[:100], other) > 0.98


def test_rank_of_the_second_layer():
    module, x = projector(), tokens(15)
    layers, u = two_layers(module), unit_directions(4, 24, seed=0, dtype=torch.float64)
    full = sensitivity_sampled(layers, x, u)
    torch.testing.assert_close(sensitivity_sampled(layers, x, u, rank=32), full, rtol=1e-5, atol=0)
    left, values, right = torch.linalg.svd(layers.second, full_matrices=False)
    cut = layers._replace(second=left[:, :5] @ torch.diag(values[:5]) @ right[:5])
    wanted = sensitivity_sampled(TwoLayers(*cut), x, u)
    torch.testing.assert_close(sensitivity_sampled(layers, x, u, rank=5), wanted, rtol=1e-9, atol=0)
    assert (wanted < full).all()


def test_linear_projector_leaves_diversity_alone():
    linear = nn.Linear(24, 32).double().requires_grad_(False)
    x = tokens(40)
    score = sensitivity_jvp(linear, x[None], unit_directions(6, 24, seed=0, dtype=torch.float64))[0]
    torch.testing.assert_close(score, score[:1].expand(40), rtol=1e-12, atol=0)
    weight = normalised_sensitivity(score[None], torch.ones(1, 40, dtype=torch.bool))
    assert torch.equal(weight, torch.ones(1, 40, dtype=torch.float64))
    unit = nn.functional.normalize(linear(x), dim=1)
    chosen = [0]
    while len(chosen) < 9:
        chosen.append(int((1 - unit @ unit[chosen].T).min(1).values.argmax()))
    assert torch.equal(vp.sads_select(linear(x), score, 9), torch.tensor(sorted(chosen)))


def slow_sads(z, s, k):
    weight = (s - s.min()) / (s.max() - s.min() + 1e-8)
    unit = nn.functional.normalize(z, dim=1)
    chosen = [int(weight.argmax())]
    while len(chosen) < k:
        near = (1 - unit @ unit[chosen].T).min(1).values
        score = weight * near
        score[chosen] = -torch.inf
        chosen.append(int(score.argmax()))
    return torch.tensor(sorted(chosen))


def test_sads_is_the_loop():
    for seed in range(20):
        z, s = tokens(200, 16, seed), tokens(200, 1, seed + 100)[:, 0].abs()
        found = vp.sads_select(z, s, 40)
        assert torch.equal(found, slow_sads(z, s, 40))
        assert found.tolist() == sorted(set(found.tolist()))
        assert len(found) == 40
    assert torch.equal(vp.sads_select(z, s, 200), torch.arange(200))
    assert vp.sads_select(z, s, 1).item() == s.argmax().item()
    assert torch.equal(vp.sads_select(z, 7 * s, 40), vp.sads_select(z, s, 40))


def test_duplicates_are_taken_last():
    z, s = tokens(50, 16), tokens(50, 1, 5)[:, 0].abs() + 0.1
    z[10:20] = z[10]
    s[30] = 0.0  # the least sensitive has weight 0
    found = vp.sads_select(z, s, 40).tolist()
    assert len(set(found) & set(range(10, 20))) == 1
    assert 30 not in found


def test_groups_are_covered():
    """8 clusters of 40 tokens and 8 single ones, 16 kept: sensitivity alone finds few of them."""
    covered = {"sads": 0.0, "score": 0.0}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(16, 32, generator=generator, dtype=torch.float64)
        group = torch.cat([torch.arange(8).repeat_interleave(40), torch.arange(8, 16)])
        x = centres[group] + 0.1 * torch.randn(328, 32, generator=generator, dtype=torch.float64)
        module = projector(32, 64, 48, seed=seed, bias=False)
        s = sensitivity_exact(two_layers(module), x)
        covered["sads"] += len(group[vp.sads_select(module(x), s, 16)].unique()) / 20
        covered["score"] += len(group[s.topk(16).indices].unique()) / 20
    assert covered["sads"] > 14
    assert covered["score"] < 5


def test_equivariance():
    module, x = projector(), tokens(60)
    layers, u = two_layers(module), unit_directions(8, 24, seed=0, dtype=torch.float64)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    s = sensitivity_sampled(layers, x, u)
    torch.testing.assert_close(sensitivity_sampled(layers, x[order], u), s[order], rtol=1e-12, atol=0)
    chosen = order[vp.sads_select(module(x)[order], s[order], 12)].sort().values
    assert torch.equal(chosen, vp.sads_select(module(x), s, 12))
    scaled = layers._replace(second=3 * layers.second)
    torch.testing.assert_close(sensitivity_sampled(scaled, x, u), 3 * s)
    moved = copy.deepcopy(module)
    moved[2].bias += 1.5
    torch.testing.assert_close(sensitivity_sampled(two_layers(moved), x, u), s, rtol=1e-6, atol=0)


def test_budget_of_tiles():
    """LLaVA-NeXT: each view gets floor(T / V); newline tokens stay on top. 5 views of 16 tokens here."""
    model, inputs = shared_model("llava_next"), prompt("llava_next", LONG)
    with vp.prune(model, vp.ZooPruneConfig(keep=33)) as handle:
        model(**inputs)
        report = handle.report
    kept = report.kept[-1][0] - 3  # three text tokens in front
    assert report.num_visual.tolist() == [80]
    assert int((kept < 16).sum()) == 6
    assert len(kept) == 5 * 6
    assert report.entering[0].tolist() == [10 + 8 + 30] * 5
    tile = (kept[kept >= 16] - 16) % 9, (kept[kept >= 16] - 16) // 9  # column, row of the 8 by 8 grid and newline
    assert tile[0].max() < 8
    counts = [int(((tile[0] // 4 == x) & (tile[1] // 4 == y)).sum()) for x in (0, 1) for y in (0, 1)]
    assert counts == [6, 6, 6, 6]
    with vp.prune(model, vp.ZooPruneConfig(keep=4)) as handle:  # fewer than views: for the whole sample
        model(**inputs)
        assert len(handle.report.kept[-1][0]) == 4


def farthest(a, b):
    """The largest distance of a row of a to its nearest row of b."""
    return (a[:, None] - b[None]).abs().amax(-1).amin(1).max().item()


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "idefics3"])
def test_a_model_keeps_what_the_pure_functions_say(family):
    model, inputs = shared_model(family), prompt(family, LONG)
    base = model.base_model
    caught = {}
    projector_of = FAMILIES[family].projector(base)

    def keep(_, args, kwargs):
        caught["embeds"] = kwargs["inputs_embeds"]

    hooks = [
        projector_of.register_forward_hook(lambda _, a, out: caught.update(x=a[0], z=out)),
        base.get_decoder().register_forward_pre_hook(keep, with_kwargs=True),
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    config = vp.ZooPruneConfig(keep=6, by_view=False)
    x = caught["x"] if caught["x"].ndim == 3 else caught["x"][None]
    score = vp.zoo_sensitivity(projector_of, x, config).flatten()
    z = caught["z"].flatten(0, -2)
    with vp.prune(model, config) as handle:
        model(**inputs)
        kept = handle.report.kept[-1][0]
    wanted = z[vp.sads_select(z, score, 6)]
    if family != "llava_onevision":
        assert farthest(wanted, caught["embeds"][0, kept]) < 1e-5
        assert len(kept) == 6
    else:  # unpadding and newlines stand between; a newline is never kept
        assert farthest(caught["embeds"][0, kept], z) < 1e-5


def test_seeds_and_half_precision():
    model, inputs = shared_model("llava"), prompt("llava", LONG, SHORT)
    runs = []
    for seed in (0, 0, 1):
        with vp.prune(model, vp.ZooPruneConfig(keep=5, estimator="fd", directions=2, seed=seed)) as handle:
            model(**inputs)
            runs.append(torch.cat(handle.report.kept[-1]).tolist())
    assert runs[0] == runs[1]
    half = tiny_model("llava").to(torch.bfloat16)
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = vp.zoo_sensitivity(half.base_model.multi_modal_projector, x, vp.ZooPruneConfig(estimator="fd"))
    wanted = vp.zoo_sensitivity(
        half.float().base_model.multi_modal_projector, x.float(), vp.ZooPruneConfig(estimator="fd")
    )
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, rtol=1e-5)


def test_norm_control_and_multi_image():
    model = shared_model("llava")
    two = Asked(images=((32, 32), (32, 32)), between=2)
    for estimator in ("norm", "jvp", "fd", "exact"):
        with vp.prune(model, vp.ZooPruneConfig(keep=9, estimator=estimator)) as handle:
            model(**prompt("llava", two))
            kept = handle.report.kept[-1][0]
            assert [int((kept < 20).sum()), int((kept >= 20).sum())] == [4, 4]


def test_refusals():
    with pytest.raises(ValueError, match="estimator must be"):
        vp.ZooPruneConfig(estimator="guess")
    with pytest.raises(ValueError, match="directions must be at least 1"):
        vp.ZooPruneConfig(directions=0)
    with pytest.raises(ValueError, match="step must be positive"):
        vp.ZooPruneConfig(step=0.0)
    with pytest.raises(ValueError, match=r"needs a projector linear - activation - linear, got Linear; use 'jvp'"):
        vp.zoo_sensitivity(nn.Linear(4, 4), torch.ones(1, 3, 4), vp.ZooPruneConfig(estimator="exact"))
