"""The base criteria: each through everything a method must stand, and its own formula against one written out."""

import pytest
import torch
from torch import nn

import vlm_prune as vp
from vlm_prune.criteria.sparsevlm import cluster_centres, raters
from vlm_prune.criteria.visionzip import merge_into_targets
from vlm_prune.criteria.vispruner import thin_out
from vlm_prune.stages import scaled_layers, shares_for
from vlm_prune.testing import MethodTests, shared_model
from vlm_prune.tiny_models import IMAGE, LONG, SHORT, prompt, tiny_model


class TestFastV(MethodTests):
    def config(self, keep):
        return vp.FastVConfig(keep=keep)


class TestPyramidDrop(MethodTests):
    families = ("qwen3_vl",)

    def config(self, keep):
        return vp.PyramidDropConfig(keep=keep)


class TestSparseVLM(MethodTests):
    families = ("llava_next",)

    def config(self, keep):
        return vp.SparseVLMConfig(keep=keep)


class TestSparseVLMRecycling(MethodTests):
    merges = True
    families = ("llava",)

    def config(self, keep):
        return vp.SparseVLMConfig(keep=keep, recycle=True)


class TestHiMAP(MethodTests):
    families = ("llava",)

    def config(self, keep):
        return vp.HiMAPConfig(keep=keep)


class TestFasterVLM(MethodTests):
    def config(self, keep):
        return vp.FasterVLMConfig(keep=keep)


class TestVisionZip(MethodTests):
    families = ("llava_next",)
    merges = True

    def config(self, keep):
        return vp.VisionZipConfig(keep=keep)


class TestVisPruner(MethodTests):
    families = ("qwen2_5_vl",)

    def config(self, keep):
        return vp.VisPrunerConfig(keep=keep)


class TestDivPrune(MethodTests):
    families = ("llava",)

    def config(self, keep):
        return vp.DivPruneConfig(keep=keep)


class TestRandom(MethodTests):
    families = ("llava",)

    def config(self, keep):
        return vp.RandomConfig(keep=keep)


class TestUniform(MethodTests):
    families = ("llava",)

    def config(self, keep):
        return vp.UniformConfig(keep=keep)


# ---- what is kept in a model, against attention maps that the host itself gives out


@pytest.fixture(scope="module")
def eager():
    """A prompt, its attention maps in all layers, and where its visual tokens and its text are."""
    model, inputs = tiny_model("llava"), prompt("llava", LONG)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0].double().mean(1)
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    text = torch.arange(int(visual[-1]) + 1, maps.shape[-1])
    return inputs, maps, visual, text


def kept_by(config, inputs):
    with vp.prune(shared_model("llava"), config) as handle, torch.no_grad():
        shared_model("llava")(**inputs)
        return handle.report.kept


def best(scores, among, k):
    return among[scores[among].topk(k).indices.sort().values]


def test_fastv_keeps_what_the_last_token_looks_at(eager):
    inputs, maps, visual, _ = eager
    for layer in (1, 3):
        kept = kept_by(vp.FastVConfig(keep=6, layer=layer), inputs)[layer - 1][0]
        assert torch.equal(kept, best(maps[layer - 1, -1], visual, 6))


def test_pyramiddrop_looks_ahead(eager):
    """The first stage before layer 1 scores by layer 1, which has not run yet."""
    inputs, maps, visual, _ = eager
    config = vp.PyramidDropConfig(ratios=(0.5, 0.25, 0.125), layers=(1, 2, 4))
    found = kept_by(config, inputs)
    assert torch.equal(found[0][0], best(maps[1, -1], visual, 8))
    assert [len(found[i][0]) for i in (0, 1, 3)] == [8, 4, 2]


def test_himap_sums_over_the_text_then_over_the_image(eager):
    inputs, maps, visual, text = eager
    found = kept_by(vp.HiMAPConfig(counts=(16, 7), layers=(1, 3)), inputs)
    assert 0 not in found  # all 16 stay at first, so the second stage sees what the host sees
    assert torch.equal(found[2][0], best(maps[2, visual].sum(0), visual, 7))
    first = kept_by(vp.HiMAPConfig(counts=(9, 4), layers=(2, 4)), inputs)[1][0]
    assert torch.equal(first, best(maps[1, text].sum(0), visual, 9))


def test_sparsevlm_keeps_what_raters_look_at(eager):
    inputs, maps, visual, text = eager
    model = shared_model("llava")
    seen = {}

    def keep(_, args, kwargs):
        seen["embeds"] = kwargs["inputs_embeds"].double()

    hook = model.base_model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    x = seen["embeds"][0]
    share = (x[visual] @ x[text].T).softmax(-1).mean(0)  # literal: softmax over text, mean over visual tokens
    chosen = text[share > share.mean()]
    mask = torch.zeros(2, len(x), dtype=torch.bool)
    mask[0, visual], mask[1, text] = True, True
    assert torch.equal(raters(seen["embeds"], mask[:1], mask[1:])[0].nonzero()[:, 0], chosen)
    kept = kept_by(vp.SparseVLMConfig(counts=(9, 5, 2), layers=(1, 2, 3)), inputs)[1][0]
    assert torch.equal(kept, best(maps[1, chosen].mean(0), visual, 9))


# ---- pure functions against loops


def test_vispruner_thins_out_as_published():
    """The published loop, whose shapes need even numbers, on 40 tokens; odd numbers end at the count asked for."""
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = nn.functional.normalize(x, dim=1)
    left = list(range(40))
    while len(left) > 12:
        remove = min(8, len(left) - 12)
        a, b = left[::2], left[1::2]
        nearest = [max(float(unit[i] @ unit[j]) for j in b) for i in a]
        order = sorted(range(len(a)), key=lambda i: -nearest[i])
        left = [a[i] for i in order[remove:]] + b
    assert thin_out(x, 12).tolist() == left
    for number, wanted in ((41, 12), (7, 3), (1, 1), (5, 0), (9, 9)):
        found = thin_out(torch.randn(number, 4, generator=torch.Generator().manual_seed(1)), wanted)
        assert len(found) == wanted == len(set(found.tolist()))


def test_visionzip_merges_into_the_most_similar_target():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 6, generator=generator, dtype=torch.float64)
    keys = torch.randn(23, 9, generator=generator, dtype=torch.float64)
    targets, merged = merge_into_targets(x, keys, 5)
    assert targets.tolist() == [0, 4, 8, 12, 16]  # steps of 23 // 5
    joined = {t: [] for t in targets.tolist()}
    for i in set(range(23)) - set(joined):
        joined[max(joined, key=lambda t: float(nn.functional.cosine_similarity(keys[i], keys[t], dim=0)))].append(i)
    for row, (target, members) in zip(merged, joined.items(), strict=True):
        wanted = x[target] + (x[members].mean(0) if members else 0)
        torch.testing.assert_close(row, wanted)


def test_density_peaks_find_clusters():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(3).repeat_interleave(10)
    x = 5 * torch.randn(3, 8, generator=generator)[group] + 0.1 * torch.randn(30, 8, generator=generator)
    centres, assigned = cluster_centres(x, 3)
    assert sorted(group[centres].tolist()) == [0, 1, 2]
    assert torch.equal(group[centres][assigned], group)


def test_recycling_adds_means_of_the_best_that_were_dropped():
    inputs = prompt("llava", LONG)
    config = {"counts": (6, 4, 2), "layers": (1, 2, 3)}
    plain = kept_by(vp.SparseVLMConfig(**config), inputs)[1][0]
    more = kept_by(vp.SparseVLMConfig(**config, recycle=True), inputs)[1][0]
    # 10 dropped: int(3) + 1 = 4 go into int(0.4) + 1 = 1 cluster
    assert len(more) == 7
    assert set(plain.tolist()) < set(more.tolist())


def test_uniform_tokens_are_evenly_spaced():
    inputs = prompt("llava_next", LONG, SHORT)
    with vp.prune(shared_model("llava"), "uniform", keep=4) as handle:
        shared_model("llava")(**prompt("llava", LONG))
        assert (handle.report.kept[-1][0] - 3).tolist() == [1, 5, 9, 13]
    for keep in (1, 7, 31):
        with vp.prune(shared_model("llava_next"), "uniform", keep=keep) as handle:
            shared_model("llava_next")(**inputs)
            counts = [len(k) for k in handle.report.kept[-1]]
        assert counts == [keep, keep]


def test_random_order_is_seeded_and_the_same_for_all():
    inputs = prompt("llava", LONG, LONG)
    runs = []
    for seed in (0, 0, 1):
        kept = kept_by(vp.RandomConfig(keep=6, seed=seed), inputs)[-1]
        assert torch.equal(kept[0], kept[1])
        runs.append(kept[0].tolist())
    assert runs[0] == runs[1] != runs[2]


def test_divprune_starts_with_the_most_isolated():
    model, inputs = shared_model("llava"), prompt("llava", LONG)
    x = model.base_model.get_image_features(inputs["pixel_values"]).pooler_output[0].detach().double()
    unit = nn.functional.normalize(x, dim=1)
    distance = 1 - unit @ unit.T
    chosen = [int(distance.topk(2, largest=False).values[:, 1].argmax())]
    while len(chosen) < 6:
        chosen.append(int(distance[:, chosen].min(1).values.argmax()))
    kept = kept_by(vp.DivPruneConfig(keep=6), inputs)[-1][0] - 3
    assert kept.tolist() == sorted(chosen)


# ---- schedules


def test_published_schedules():
    """PyramidDrop: exactly 128 of 576 tokens on average over 32 layers. FastV: (K 576 + (32 - K) R) / 32."""
    layers = [s.after_layer for s in vp.PyramidDropConfig(ratios=(0.32, 0.16, 0.08)).stages(32)]
    n = torch.tensor([576])
    counts = [int(s.count(n, n)) for s in vp.PyramidDropConfig(ratios=(0.32, 0.16, 0.08)).stages(32)]
    assert layers == [1, 9, 19]
    entering = [576] * 2 + [counts[0]] * 8 + [counts[1]] * 10 + [counts[2]] * 12
    assert sum(entering) / 32 == 128
    stage = vp.FastVConfig(keep=128).stages(32)[0]
    assert stage.after_layer == 1
    assert [s.after_layer for s in vp.HiMAPConfig().stages(32)] == [1, 7]
    assert [s.after_layer for s in vp.SparseVLMConfig().stages(32)] == [2, 6, 15]


@pytest.mark.parametrize("name", ["pyramiddrop", "sparsevlm", "himap", "adaptinfer"])
@pytest.mark.parametrize("keep", [0.056, 0.25, 0.5, 0.9, 1.0])
def test_keep_is_the_mean_share_behind_the_first_stage(name, keep):
    for depth in (6, 32):
        stages = vp.METHODS[name](keep=keep).stages(depth)
        ends = [s.after_layer for s in stages[1:]] + [depth - 1]
        spans = [end - s.after_layer for s, end in zip(stages, ends, strict=True)]
        shares = [s.keep for s in stages]
        assert sum(a * b for a, b in zip(spans, shares, strict=True)) / sum(spans) == pytest.approx(keep)
        assert all(0 < share <= 1 for share in shares)
        assert shares == sorted(shares, reverse=True)
        number = vp.METHODS[name](keep=int(keep * 576)).stages(depth)
        n = torch.tensor([576])
        for stage, share in zip(number, shares, strict=True):
            assert int(stage.count(n, n)) == pytest.approx(576 * share, abs=2)


def test_layers_at_the_same_depth():
    assert scaled_layers((1, 10, 20), 32, 32) == (1, 10, 20)
    assert scaled_layers((1, 10, 20), 32, 16) == (0, 5, 10)
    assert scaled_layers((1, 10, 20), 32, 4) == (0, 1, 2)
    with pytest.raises(ValueError, match="3 stages need a language model of 4 layers, it has 3"):
        scaled_layers((1, 10, 20), 32, 3)
    assert shares_for(1.0, (1, 0.5), (0, 2), 6) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vp.FastVConfig(layer=0), "layer must be at least 1"),
        (lambda: vp.FastVConfig(keep=0), "at least 1"),
        (lambda: vp.PyramidDropConfig(ratios=(0.5,)), "one for each of 3 stages"),
        (lambda: vp.HiMAPConfig(counts=(3, 9)), "counts must fall"),
        (lambda: vp.SparseVLMConfig(counts=(3, 2)), "3 numbers of at least 1"),
        (lambda: vp.SparseVLMConfig(layers=(1, 2)), "give counts"),
        (lambda: vp.VisionZipConfig(contextual=1.0), "contextual must lie"),
        (lambda: vp.VisPrunerConfig(attention_ratio=1.5), "attention_ratio must lie"),
    ],
)
def test_refused_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
