"""AdaptInfer: the score against the literal formula, schedules against the published ones, and the shift analysis."""

import pytest
import torch

import vlm_prune as vp
from vlm_prune.adaptinfer import PRESETS, guided_scores, solve_budget, text_importance
from vlm_prune.attention_shift import change_points, find_shift, shift_histogram
from vlm_prune.testing import MethodTests, generate, shared_model
from vlm_prune.tiny_models import LONG, Asked, prompt


class TestAdaptInfer(MethodTests):
    def config(self, keep):
        return vp.AdaptInferConfig(keep=keep)


class TestAdaptInferMixedByView(MethodTests):
    families = ("llava_next",)

    def config(self, keep):
        return vp.AdaptInferConfig(keep=keep, lam=0.5, by_view=True)


def causal(batch, heads, n, seed=0, dtype=torch.float64):
    logits = torch.randn(batch, heads, n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("lam", [1.0, 0.3, 0.0])
def test_scores_are_the_literal_formula(lam):
    attention = causal(2, 3, 17)
    visual, text = slice(2, 9), slice(9, 17)
    m, c = attention[:, :, text, text], attention[:, :, text, visual]
    symmetric = m + m.transpose(-1, -2) - torch.diag_embed(m.diagonal(dim1=-2, dim2=-1))
    mixed = (1 - lam) * symmetric.mean(dim=(1, 2, 3), keepdim=True) + lam * symmetric
    weight = mixed.sum(2)
    wanted = torch.zeros(2, 7, dtype=torch.float64)
    for h in range(3):
        for j in range(8):
            wanted += weight[:, h, j, None] * c[:, h, j]
    torch.testing.assert_close(guided_scores(m, c, lam=lam), wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(guided_scores(m.float(), c.float(), lam=lam), wanted.float(), rtol=0, atol=1e-5)
    if lam == 0:
        assert torch.equal(guided_scores(m, c, lam=0).argsort(), c.sum((1, 2)).argsort())


def test_symmetries():
    attention = causal(2, 4, 14)
    m, c = attention[:, :, 8:, 8:], attention[:, :, 8:, :8]
    scores = guided_scores(m, c)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(guided_scores(m, c[..., order]), scores[:, order])
    heads = [2, 0, 3, 1]
    torch.testing.assert_close(guided_scores(m[:, heads], c[:, heads]), scores, rtol=0, atol=1e-6)
    one = guided_scores(m[:, :, :1, :1], c[:, :, :1])
    torch.testing.assert_close(one, (m[:, :, 0, :1] * c[:, :, 0]).sum(1))


def test_an_important_word_outweighs_many():
    """Text token 1 is looked at by all later ones and looks at the needle; every other row has a distractor."""
    m, c = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 3)
    m[0, 0] = 0.02 * torch.ones(8, 8).tril()
    m[0, 0, 2:, 1] = 0.6
    c[0, 0, :, 2] = 0.1
    c[0, 0, 1, 2], c[0, 0, 1, 1] = 0.0, 0.5
    plain = c.sum((0, 1, 2))
    assert plain[2] > plain[1]
    scores = guided_scores(m, c)[0]
    assert scores.argmax() == 1
    assert scores[0] == 0
    assert guided_scores(m, c, prior="none")[0].argmax() == 2
    assert text_importance(m)[0, 0].argmax() == 1


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_scores_in_a_model_are_those_of_the_eager_maps(family):
    """The tokens kept behind the first stage are the best by attention maps that the host itself gives out."""
    from vlm_prune.tiny_models import tiny_model

    model, inputs = tiny_model(family), prompt(family, LONG)
    with vp.prune(model, vp.AdaptInferConfig(counts=(5, 3, 2), layers=(1, 2, 3))) as handle, torch.no_grad():
        model(**inputs)
        kept = handle.report.kept[1][0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[1].double()
    visual = (inputs["input_ids"][0] == 99).nonzero()[:, 0]
    text = torch.arange(int(visual[-1]) + 1, maps.shape[-1])
    scores = guided_scores(maps[:, :, text][..., text], maps[:, :, text][..., visual])[0]
    assert torch.equal(kept, visual[scores.topk(5).indices.sort().values])


def test_published_budgets():
    """Counts behind layers 1, 10, 20 of 32 leave the published nominal averages, and the true ones."""
    nominal = {128: 128.81, 64: 64.97, 48: 48.75, 32: 33.0}
    true = {128: 146.3, 64: 82.9, 48: 66.7, 32: 51.0}
    for budget, config in PRESETS["llava-1.5-7b"].items():
        a, b, c = config.counts
        assert (576 + 9 * a + 10 * b + 12 * c) / 32 == pytest.approx(nominal[budget], abs=0.01)
        assert (2 * 576 + 9 * a + 10 * b + 11 * c) / 32 == pytest.approx(true[budget], abs=0.06)
    for budget, wanted in ((128, 128.75), (64, 64.65)):
        a, b, c = PRESETS["llava-1.5-13b"][budget].counts
        assert (576 + 10 * a + 11 * b + 18 * c) / 40 == pytest.approx(wanted, abs=0.01)
    for percent, wanted in ((10, 10.1), (30, 29.7), (50, 51.1)):
        a, b, c = PRESETS["qwen2-vl-2b"][percent].ratios
        share = (a * 9 + a * b * 10 + a * b * c * 9) / 28
        assert 100 * share == pytest.approx(wanted, abs=0.05)


def test_solver_gives_the_average_that_was_asked_for():
    for layers, depth, average in (((1, 10, 20), 32, 128), ((1, 10, 20), 32, 64), ((0, 9, 19), 28, 100)):
        first, second, third = layers
        a, b, c = solve_budget(average, 576, layers, depth)
        assert b == pytest.approx(a / 4)
        assert c == pytest.approx(a / 16)
        mean = (576 * first + a * (second - first) + b * (third - second) + c * (depth - third)) / depth
        assert mean == pytest.approx(average, rel=1e-9)
    assert solve_budget(128, 576, (1, 10, 20), 32)[0] == pytest.approx(290, rel=0.015)
    with pytest.raises(ValueError, match="out of reach"):
        solve_budget(17, 576, (1, 10, 20), 32)
    with pytest.raises(ValueError, match="nothing to drop"):
        solve_budget(400, 576, (1, 10, 20), 32)


def test_cache_lengths_and_averages():
    model, inputs = shared_model("llava"), prompt("llava", LONG)
    config = vp.AdaptInferConfig(counts=(9, 4, 2), layers=(0, 1, 3))
    with vp.prune(model, config) as handle:
        out = generate(model, inputs)
        report = handle.report
    text = 10
    assert report.entering[0].tolist() == [26, text + 9, text + 4, text + 4, text + 2]
    held = [layer.get_seq_length() for layer in out.past_key_values.layers]
    assert held == [n + 3 for n in report.entering[0].tolist()]  # three of the four new tokens were fed back
    assert report.average_true.item() == pytest.approx((16 + 9 + 4 + 4 + 2) / 5)
    assert report.average_nominal.item() == pytest.approx((9 + 4 + 4 + 2 + 2) / 5)
    assert report.kv_bytes == sum(report.entering[0].tolist()) * 2 * 2 * 16 * 4
    assert report.kv_bytes_unpruned == 26 * 5 * 2 * 2 * 16 * 4
    full, parts = 26 * 5, report.entering[0].tolist()
    macs = lambda n: n * 64 * (2 * 64 + 2 * 32) + 2 * n * n * 64 + 3 * n * 64 * 96  # noqa: E731
    assert report.flops_ratio == pytest.approx(sum(map(macs, parts)) / (5 * macs(26)))
    assert full == 130


def test_budget_none_and_views():
    model = shared_model("llava")
    with vp.prune(model, vp.AdaptInferConfig(budget=4, layers=(0, 1, 3))) as handle:
        model(**prompt("llava", LONG))
        # spans of 1, 2 and 2 layers at 1, 1/4, 1/16 of k: k = 20 / 1.625
        assert [len(k[0]) for k in handle.report.kept.values()] == [12, 3, 1]
    ratios = vp.AdaptInferConfig(ratios=(0.5, 0.5, 0.5), layers=(0, 1, 3))
    with vp.prune(model, ratios) as handle:
        model(**prompt("llava", LONG))
        assert [len(k[0]) for k in handle.report.kept.values()] == [8, 4, 2]
    none = vp.AdaptInferConfig(counts=(4, 2, 0), layers=(0, 1, 3), min_kept=0)
    with vp.prune(model, none) as handle:
        model(**prompt("llava", LONG))
        assert [len(k[0]) for k in handle.report.kept.values()] == [4, 2, 0]
    two = Asked(images=((32, 32), (32, 32)), between=2)
    with vp.prune(model, vp.AdaptInferConfig(counts=(7, 5, 1), layers=(0, 1, 3), by_view=True)) as handle:
        model(**prompt("llava", two))
        kept = handle.report.kept[0][0]
        assert [int((kept < 20).sum()), int((kept >= 20).sum())] == [4, 3]


def test_a_prompt_that_ends_with_its_image_keeps_all_of_it(caplog):
    """No text guides there; a prompt beside it is pruned as alone."""
    model = shared_model("llava")
    inputs = prompt("llava", Asked(before=10, behind=0), LONG)
    for by_view in (False, True):
        with vp.prune(model, vp.AdaptInferConfig(counts=(5, 4, 3), layers=(0, 1, 3), by_view=by_view)) as handle:
            model(**inputs)
            assert [[len(k) for k in found] for found in handle.report.kept.values()] == [[16, 5], [16, 4], [16, 3]]
        assert "no text guides" in caplog.text


def test_change_points():
    depth = 32
    for q in (2, 3, 10, 20, 30):
        step = (torch.arange(depth) >= q).double()[None]
        assert change_points(step).item() == q - 1
    assert change_points(torch.arange(depth, dtype=torch.float64)[None]).item() == 15
    curves = torch.rand(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1)
    for curve, found in zip(curves, change_points(curves).tolist(), strict=False):
        errors = {}
        for p in range(2, 11):
            parts = (curve[:p], curve[p:])
            errors[p - 1] = sum(float((part - part.mean()).square().sum()) for part in parts)
        assert errors[found] == pytest.approx(min(errors.values()), abs=1e-9)
    with pytest.raises(ValueError, match="at least 4 layers"):
        change_points(torch.ones(1, 3))


def test_histogram_and_layers():
    attention = torch.zeros(32, 100)
    for token, layer in enumerate([2] * 4 + [11] * 3 + [21] * 3):
        attention[layer, token] = 1.0
    histogram = shift_histogram(attention)
    assert histogram.nonzero()[:, 0].tolist() == [1, 10, 20]
    assert histogram.sum() == 10
    assert vp.shift_layers(histogram) == (1, 10, 20)
    with pytest.raises(ValueError, match="has 3 peaks far enough apart, 4 were asked"):
        vp.shift_layers(histogram, number=4)


def test_analysis_of_a_model(tmp_path):
    model, inputs = shared_model("llava"), prompt("llava", LONG, LONG)
    report = find_shift(model, [inputs, prompt("llava", LONG)])
    assert report.num_prompts == 3
    assert sum(report.histogram) == 3 * 2
    assert set(torch.tensor(report.histogram).nonzero()[:, 0].tolist()) <= {1, 2}  # the outermost of 5 layers
    report.save(tmp_path / "shift.json")
    assert vp.ShiftReport.load(tmp_path / "shift.json") == report
    assert not list(tmp_path.glob("*.tmp"))
    text = {"input_ids": torch.full((1, 5), 7), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    with pytest.raises(ValueError, match="no prompt with an image"):
        find_shift(model, [text])
    with vp.prune(model, "uniform"), pytest.raises(ValueError, match="unpruned model"):
        find_shift(model, [inputs])
    assert not any(hasattr(m, "vlm_prune_probe") for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 64, "counts": (3, 2, 1)}, "give one of budget, counts and ratios"),
        ({"counts": (3, 2)}, "counts must be one for each of 3 stages"),
        ({"ratios": (0.5, 0.0, 0.5)}, "keep must lie in"),
        ({"lam": 1.5}, "lam must lie in"),
        ({"prior": "flat"}, "prior must be"),
        ({"min_kept": -1}, "min_kept must not be negative"),
        ({"keep": True}, "keep must be a share"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        vp.AdaptInferConfig(**settings)
