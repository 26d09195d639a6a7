"""AgilePruner: effective rank and entropy by their laws, the scan against a loop, the adaptive ratio, batches."""

import pytest
import torch
from torch import nn

import vlm_prune as vp
from vlm_prune.agile_pruner import adaptive_count, adaptive_ratio, mean_erank
from vlm_prune.testing import MethodTests, shared_model
from vlm_prune.tiny_models import LONG, SHORT, prompt


class TestAgilePruner(MethodTests):
    def config(self, keep):
        return vp.AgilePrunerConfig(keep=keep, erank_avg=5.0)


class TestAgilePrunerAutomatic(MethodTests):
    families = ("llava",)

    def config(self, keep):
        return vp.AgilePrunerConfig(keep=keep, erank_avg=5.0, tau_max="auto", backfill="max_min")


class TestAdaptiveVisPruner(MethodTests):
    families = ("llava",)

    def config(self, keep):
        return vp.AdaptiveVisPrunerConfig(keep=keep, erank_avg=10.0)


def loop(x, alpha, k, *, erank_avg=95.0, tau_max=0.25, step=0.01):
    """Section by section as published: walk by attention, suppress neighbours, fill up by attention."""
    r = vp.effective_rank(x).item() / erank_avg * step
    order = alpha.argsort(descending=True, stable=True).tolist()
    unit = nn.functional.normalize(x, dim=1)
    alive, kept = [True] * len(x), []
    for rank, j in enumerate(order, 1):
        if not alive[j]:
            continue
        kept.append(j)
        alive[j] = False
        if len(kept) == k:
            break
        near = (1 - unit @ unit[j]) < min(rank * r, tau_max)
        alive = [a and not n for a, n in zip(alive, near.tolist(), strict=False)]
    passed = len(kept)
    for j in order:
        if len(kept) == k:
            break
        if j not in kept:
            kept.append(j)
    return sorted(kept), passed


def clustered(seed, clusters=60, number=576):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, 64, generator=generator, dtype=torch.float64)
    group = torch.randint(clusters, (number,), generator=generator)
    x = centres[group] + 0.3 * torch.randn(number, 64, generator=generator, dtype=torch.float64)
    level = 3 * torch.rand(clusters, generator=generator, dtype=torch.float64) ** 3
    noise = 0.3 * torch.randn(number, generator=generator, dtype=torch.float64)
    return x, (level[group] + noise).softmax(0)


def test_effective_rank_laws():
    x = torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert vp.effective_rank(torch.eye(7)).item() == pytest.approx(7, abs=1e-9)
    assert vp.effective_rank(x[:, :1] @ x[:1]).item() == pytest.approx(1, abs=1e-6)
    three = torch.linalg.qr(x)[0][:, :3]
    assert vp.effective_rank(three @ torch.linalg.qr(x[:20])[0][:3]).item() == pytest.approx(3, abs=1e-6)
    wanted = torch.special.entr((s := torch.linalg.svdvals(x)) / s.sum()).sum().exp()
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    for same in (x, 5 * x, x.flip(0), x @ rotation, x.T):
        torch.testing.assert_close(vp.effective_rank(same), wanted, rtol=1e-6, atol=0)
    low = x[:, :5] @ torch.randn(5, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = torch.special.entr((s := torch.linalg.svdvals(low)[:5]) / s.sum()).sum().exp()
    assert vp.effective_rank(low).item() == pytest.approx(exact.item(), rel=1e-6)
    assert vp.effective_rank(low.float()).item() == pytest.approx(exact.item(), rel=0.02)
    padded = torch.cat([x, torch.full((4, 20), 9.0, dtype=torch.float64)])
    present = torch.arange(34) < 30
    torch.testing.assert_close(vp.effective_rank(padded[None], present[None]), wanted[None], rtol=1e-9, atol=0)
    assert vp.effective_rank(torch.zeros(3, 4)).item() == 0


def test_entropy():
    assert vp.attention_entropy(torch.full((50,), 0.3)).item() == pytest.approx(torch.log(torch.tensor(50.0)).item())
    peak = torch.zeros(50)
    peak[7] = 2.0
    assert vp.attention_entropy(peak).item() == 0
    mixed = [vp.attention_entropy((1 - a) * peak / 2 + a / 50).item() for a in (0.0, 0.2, 0.5, 1.0)]
    assert mixed == sorted(mixed)


def test_selection_is_the_loop():
    for seed in range(20):
        x, alpha = clustered(seed, clusters=12, number=90)
        for tau_max in (0.0, 0.1, 0.6):
            found, passed = vp.agile_select(x, alpha, 20, erank_avg=10.0, tau_max=tau_max)
            wanted, wanted_passed = loop(x, alpha, 20, erank_avg=10.0, tau_max=tau_max)
            assert found.tolist() == wanted
            assert passed == wanted_passed


def test_extremes():
    x, alpha = clustered(0, number=100)
    best = alpha.topk(15).indices.sort().values
    assert torch.equal(vp.agile_select(x, alpha, 15, tau_max=0.0)[0], best)
    same, passed = vp.agile_select(torch.ones_like(x), alpha, 15)
    assert passed == 1
    assert torch.equal(same, best)
    orthogonal = torch.eye(100, dtype=torch.float64)
    assert torch.equal(vp.agile_select(orthogonal, alpha, 15, tau_max=1.0, erank_avg=1.0)[0], best)


def test_passed_tokens_are_apart():
    for seed in range(100):
        x, alpha = clustered(seed, clusters=8, number=40)
        found, passed = vp.agile_select(x, alpha, 12, erank_avg=5.0, tau_max=0.5)
        if passed < 12:
            continue
        unit = nn.functional.normalize(x, dim=1)
        factor = vp.effective_rank(x).item() / 5.0 * 0.01
        rank = alpha.argsort(descending=True).argsort() + 1
        kept = sorted(found.tolist(), key=lambda i: int(rank[i]))
        for a, first in enumerate(kept):
            for second in kept[a + 1 :]:
                assert 1 - unit[first] @ unit[second] >= min(rank[first] * factor, 0.5) - 1e-9


def test_diversity_grows_with_the_threshold_and_attention_falls():
    ranks, masses, passes = {}, {}, {}
    for tau_max in (0.0, 0.1, 0.25):
        results = []
        for seed in range(10):
            x, alpha = clustered(seed)
            kept, passed = vp.agile_select(x, alpha, 64, tau_max=tau_max)
            results.append((vp.effective_rank(x[kept]).item(), alpha[kept].sum().item(), passed))
        ranks[tau_max], masses[tau_max], passes[tau_max] = torch.tensor(results).mean(0).tolist()
    assert ranks[0.25] > 1.3 * ranks[0.0]
    assert ranks[0.25] > ranks[0.1] > ranks[0.0]
    assert masses[0.0] > masses[0.1] > masses[0.25]
    assert passes[0.0] >= passes[0.1] >= passes[0.25]


def test_ratio_and_count_adapt():
    erank = torch.tensor([95.0, 47.5, 142.5, 300.0, 1.0])
    ratio = adaptive_ratio(erank, erank_avg=95.0)
    assert ratio.tolist() == pytest.approx([0.5, 0.75, 0.25, 0.1, 0.9])
    inverse = adaptive_ratio(erank, erank_avg=95.0, gain=-0.5)
    assert torch.allclose(ratio[:3] + inverse[:3], torch.ones(3))
    assert adaptive_count(erank, 88, erank_avg=95.0, bounds=(30, 120)).tolist() == [88, 44, 120, 120, 30]


def test_report_and_calibration():
    model, inputs = shared_model("llava_next"), prompt("llava_next", LONG, SHORT)
    with vp.prune(model, vp.AgilePrunerConfig(keep=0.3, erank_avg=5.0)) as handle:
        model(**inputs)
        notes = handle.report.notes[-1]
    assert notes["sample"].tolist() == [0] * 5 + [1] * 3  # base view and tiles
    assert (notes["erank"] > 1).all()
    assert (notes["erank"] < 16).all()
    assert (notes["num_passed"] >= 1).all()
    assert (notes["entropy"] <= 2.773).all()
    average = mean_erank(model, [inputs])
    assert average == pytest.approx(notes["erank"].double().mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="no image"):
        mean_erank(model, [])


def test_automatic_threshold_lets_the_budget_pass():
    model, inputs = shared_model("llava"), prompt("llava", LONG, SHORT)
    for tau_max, least in (("auto", 6), (2.0, 0)):
        with vp.prune(model, vp.AgilePrunerConfig(keep=6, erank_avg=0.1, tau_max=tau_max)) as handle:
            model(**inputs)
            passed = handle.report.notes[-1]["num_passed"]
            assert (passed >= least).all()
            assert [len(k) for k in handle.report.kept[-1]] == [6, 6]
    assert (passed < 6).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau_max": -0.1}, "tau_max must be"),
        ({"erank_avg": 0.0}, "erank_avg must be positive"),
        ({"step": 0.0}, "step must be positive"),
        ({"backfill": "none"}, "backfill must be"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        vp.AgilePrunerConfig(**settings)
