"""Attention Debiasing: the fit, the published vectors, padding geometry, and debiasing around every method."""

import pytest
import torch

import vlm_prune as vp
from vlm_prune.attention_debiasing import cubic_weight, exponential_weight, fit_debias, index_in_span
from vlm_prune.square_padding import padding_ratio
from vlm_prune.testing import MethodTests, logits, shared_model
from vlm_prune.tiny_models import LONG, SHORT, prompt

ATTENDING = ("fastv", "pyramiddrop", "sparsevlm", "himap")


class TestDebiasedFastV(MethodTests):
    families = ("llava", "qwen3_vl")

    def config(self, keep):
        return vp.AttentionDebiasingConfig(method=vp.FastVConfig(keep=keep), sigma=3.0)


class TestDebiasedHiMAPEverywhere(MethodTests):
    families = ("llava_next",)

    def config(self, keep):
        return vp.AttentionDebiasingConfig(method=vp.HiMAPConfig(keep=keep), stages_debiased="all", span="all")


@pytest.mark.parametrize("name", ATTENDING)
def test_no_bias_is_the_base_method(name):
    model, inputs = shared_model("llava_next"), prompt("llava_next", LONG, SHORT)
    with vp.prune(model, name, keep=0.3) as handle:
        base = logits(model, inputs)
        kept = handle.report.kept
    with vp.prune(model, name, keep=0.3, debias=0.0) as handle:
        assert torch.equal(logits(model, inputs), base)
        assert all(
            torch.equal(a, b) for layer in kept for a, b in zip(kept[layer], handle.report.kept[layer], strict=False)
        )
    with vp.prune(model, name, keep=0.3, debias=True) as handle:
        model(**inputs)
        first = min(kept)
        moved = [int((a != b).sum()) for a, b in zip(kept[first], handle.report.kept[first], strict=False)]
        means = [
            float(b.double().mean() - a.double().mean())
            for a, b in zip(kept[first], handle.report.kept[first], strict=False)
        ]
    assert sum(moved) > 0
    assert sum(means) < 0


def test_fit_recovers_an_exponential():
    x = torch.arange(576, dtype=torch.float64) / 576
    mu, sigma = vp.fit_trend(0.3 * torch.exp(1.25 * x))
    assert abs(mu - 0.3) < 1e-6
    assert abs(sigma - 1.25) < 1e-6
    noise = 1 + 0.05 * torch.randn(576, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for space in ("linear", "log"):
        assert abs(vp.fit_trend(0.3 * torch.exp(1.25 * x) * noise, space=space)[1] - 1.25) < 0.03
    _, again = vp.fit_trend(0.3 * torch.exp(1.25 * x) * exponential_weight(x, sigma))
    assert abs(again) < 1e-6
    valid = torch.ones(576, dtype=torch.bool)
    valid[100:200] = False
    holed = 0.3 * torch.exp(1.25 * x)
    holed[~valid] = 0
    assert abs(vp.fit_trend(holed, valid)[1] - 1.25) < 1e-6
    assert abs(vp.fit_trend(holed)[1] - 1.25) > 1e-3  # counting padding would spoil it


def test_fit_in_linear_space_is_the_best_exponential():
    """No sigma near by has a smaller squared error, and the log fit's is larger where noise is not relative."""
    generator = torch.Generator().manual_seed(1)
    x = torch.arange(144, dtype=torch.float64) / 144
    y = (0.3 * torch.exp(1.25 * x) + 0.1 * torch.rand(144, generator=generator, dtype=torch.float64)).clamp(min=1e-3)

    def error(mu, sigma):
        return float((y - mu * torch.exp(sigma * x)).square().sum())

    best = vp.fit_trend(y)
    assert error(*best) < error(*vp.fit_trend(y, space="log"))
    assert all(error(best[0], best[1] + d) > error(*best) for d in (-1e-3, 1e-3))


def test_published_fastv_vector_and_its_exponential():
    x = torch.arange(576, dtype=torch.float64) / 576
    weight = cubic_weight(x)
    assert weight[0] == 1
    at = 1.73675 * 0.5 - 4.84324 * 0.25 + 4.90965 * 0.125
    assert weight[288].item() == pytest.approx(1 / (1 + at), abs=1e-12)
    _, sigma = vp.fit_trend(1 / weight, space="log")
    assert sigma == pytest.approx(0.815, abs=0.005)


def test_weights_depend_on_relative_place_alone():
    long = exponential_weight(torch.arange(576, dtype=torch.float64) / 576, 1.3)
    short = exponential_weight(torch.arange(144, dtype=torch.float64) / 144, 1.3)
    torch.testing.assert_close(long[::4], short, rtol=0, atol=1e-12)


def test_debiased_ranking_is_that_of_the_content():
    content = torch.rand(5, 144, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    biased = content * torch.exp(1.25 * torch.arange(144, dtype=torch.float64) / 144)
    wanted = content.topk(20).indices.sort().values
    for scale in (1.0, 7.3):
        found = vp.debias(scale * biased, sigma=1.25).topk(20).indices.sort().values
        assert torch.equal(found, wanted)
    padding = torch.zeros(5, 144, dtype=torch.bool)
    padding[:, :30] = True
    kept = vp.debias(biased, sigma=1.25, padding=padding).topk(100).indices
    assert not (kept < 30).any()


def test_signals_are_found_under_a_trend():
    """Logits with a trend of 2.5 and 8 signals raised by 2: recall in the top 16, raw and debiased."""
    generator = torch.Generator().manual_seed(3)
    x = torch.arange(144, dtype=torch.float64) / 144

    def draw(number):
        return 0.5 * torch.randn(number, 144, generator=generator, dtype=torch.float64) + 2.5 * x

    accumulator = vp.TrendAccumulator()
    for part in draw(500).softmax(-1).split(125):
        accumulator.update(part)
    _, sigma = vp.fit_trend(*accumulator.result())
    assert abs(sigma - 2.5) < 0.1
    noise = draw(400)
    signal = torch.rand(400, 144, generator=generator).topk(8).indices
    attention = noise.scatter_add(1, signal, torch.full(signal.shape, 2.0, dtype=torch.float64)).softmax(-1)
    recalls = []
    for scores in (attention, vp.debias(attention, sigma=sigma)):
        top = torch.zeros(400, 144).scatter(1, scores.topk(16).indices, 1.0)
        recalls.append(top.gather(1, signal).mean().item())
    assert recalls[0] < 0.85
    assert recalls[1] > 0.97


def test_accumulator_leaves_padding_out():
    accumulator = vp.TrendAccumulator()
    attention = torch.tensor([[1.0, 2.0, 3.0], [5.0, 9.0, 9.0]])
    accumulator.update(attention, torch.tensor([[False, False, True], [False, True, True]]))
    mean, valid = accumulator.result()
    assert mean.tolist() == [3.0, 2.0, 0.0]
    assert valid.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="images of 3 visual tokens were added, these have 4"):
        accumulator.update(torch.ones(1, 4))
    with pytest.raises(ValueError, match="no image"):
        vp.TrendAccumulator().result()


def test_geometry_of_square_padding():
    wide = padding_ratio((480, 640), 24)  # margins of 42 pixels of 336, exactly 3 patches
    for threshold in (0.01, 0.5, 0.99):
        rows = (wide > threshold).all(1)
        assert rows.nonzero()[:, 0].tolist() == [0, 1, 2, 21, 22, 23]
        assert (wide > threshold).sum() == 6 * 24
    flat = padding_ratio((300, 336), 24)  # margins of 18 pixels: 1 patch and 4 of 14 pixels
    assert flat[1, 5].item() == pytest.approx(4 / 14)
    assert (flat > 0.5).all(1).sum() == 2
    assert (flat > 0.01).all(1).sum() == 4
    assert torch.equal(padding_ratio((336, 300), 24), flat.T)
    assert not padding_ratio((50, 50), 24).any()


def test_padding_is_dropped_first():
    model, inputs = shared_model("llava"), prompt("llava", LONG)
    with vp.prune(model, "fastv", keep=12, debias=0.0) as handle:
        handle.set_image_sizes([(16, 32)])  # the upper and the lower quarter of a 4 by 4 grid are border
        model(**inputs)
        kept = (handle.report.kept[1][0] - 3).tolist()
        assert set(kept) == set(range(4, 12))  # the budget of 12 falls to the 8 patches with content
        handle.set_image_sizes([])
        model(**inputs)
        assert len(handle.report.kept[1][0]) == 12
        handle.set_image_sizes([(16, 32), (32, 32)])
        with pytest.raises(ValueError, match="2 image sizes for 1 views"):
            model(**inputs)
    config = vp.AttentionDebiasingConfig(method=vp.FastVConfig(keep=12), sigma=0, limit_to_content=False)
    with vp.prune(model, config) as handle:
        handle.set_image_sizes([(16, 32)])
        model(**inputs)
        assert len(handle.report.kept[1][0]) == 12
        assert set(range(7, 15)) < set(handle.report.kept[1][0].tolist())


def test_index_starts_anew_in_each_view():
    visual = torch.tensor([[False, True, True, True, False, True, True]])
    view = torch.tensor([[-1, 0, 0, 0, -1, 1, 1]])
    none = torch.zeros(1, 7, dtype=torch.bool)
    context = vp.Context(
        after_layer=0, hidden=torch.zeros(1, 7, 2), visual=visual, text=none, valid=~none, view=view,
        prompt_index=torch.arange(7)[None], num_visual=torch.tensor([5]), num_kept=torch.tensor([2]),
    )  # fmt: skip
    index, length = index_in_span(context, "view")
    assert index[visual].tolist() == [0, 1, 2, 0, 1]
    assert length[visual].tolist() == [3, 3, 3, 2, 2]
    index, length = index_in_span(context, "all")
    assert index[visual].tolist() == [0, 1, 2, 3, 4]
    assert length[visual].unique().tolist() == [5]


def test_fit_in_a_model():
    model = shared_model("llava")
    batches = [prompt("llava", LONG, SHORT), prompt("llava", LONG)]
    seen = []
    sigma = fit_debias(model, vp.FastVConfig(keep=0.5), batches, on_batch=seen.append)
    assert seen == [1, 2]
    config = vp.AttentionDebiasingConfig(method=vp.FastVConfig(keep=0.5), sigma=sigma)
    assert abs(fit_debias(model, config, batches)) < 0.35  # little of a trend is left of a few noisy images
    with pytest.raises(ValueError, match="images of one size"):
        fit_debias(shared_model("llava_next"), vp.FastVConfig(keep=0.5), [prompt("llava_next", LONG, SHORT)])


def test_refusals():
    model = shared_model("llava")
    with pytest.raises(ValueError, match="no sigma was published for adaptinfer; fit one"):
        vp.prune(model, "adaptinfer", debias=True)
    with pytest.raises(ValueError, match="score of divprune is not attention"):
        vp.prune(model, "divprune", debias=1.0)
    with pytest.raises(ValueError, match="cubic trend takes no sigma"):
        vp.AttentionDebiasingConfig(method=vp.FastVConfig(), trend="cubic", sigma=1.0)
    with pytest.raises(TypeError, match="method must be a method's config"):
        vp.AttentionDebiasingConfig(method="fastv")
    with pytest.raises(ValueError, match="at least 2 valid tokens"):
        vp.fit_trend(torch.ones(1))
    with vp.prune(model, "fastv", debias=True), pytest.raises(ValueError, match="fastv, debiased is at work"):
        vp.prune(model, "uniform")
