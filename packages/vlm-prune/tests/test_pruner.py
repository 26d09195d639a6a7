"""The engine: alignment of the vision side, prompts of every kind, what generate() can do, and every refusal."""

import functools
import operator

import pytest
import torch

import vlm_prune as vp
from vlm_prune import masks
from vlm_prune.families import FAMILIES as KNOWN
from vlm_prune.layer_attention import LayerAttention, attach_probe, look_ahead
from vlm_prune.testing import FAST_FAMILIES, fixed_choice, generate, logits, nothing_dropped, shared_model
from vlm_prune.tiny_models import FAMILIES, IMAGE, LONG, RAGGED, SHORT, VIDEO, Asked, prompt, tiny_model
from vlm_prune.vision import VisionCall, recording

EVERY = [f if f in (*FAST_FAMILIES, "llava") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
NEEDS = frozenset({"tower_attention", "projector_input"})


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def stages(*pairs, **options):
    """Stages at (after_layer, tokens) that keep the first tokens, or what a function says."""
    return vp.StagesConfig(
        chosen=tuple(
            vp.Stage(
                after_layer=a,
                keep=k,
                criterion=fixed_choice(lambda c: c.visual_rank() < c.num_kept[:, None], **options),
            )
            for a, k in pairs
        )
    )


def every_second(context):
    return context.visual_rank() % 2 == 0


# ---- schedules, in every family, against the host with keys hidden


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("where", [(-1,), (0,), (-1, 2), (0, 1, 3)], ids=str)
def test_dropping_is_hiding_at_every_stage(family, where):
    ratio = [0.6, 0.4, 0.2]
    chosen = tuple(
        vp.Stage(after_layer=a, keep=r, criterion=fixed_choice(_hashed)) for a, r in zip(where, ratio, strict=False)
    )
    inputs = prompt(family, LONG, SHORT)
    with vp.apply_stages(shared_model(family), vp.StagesConfig(chosen=chosen)) as handle:
        given = logits(handle.model, inputs)
        with nothing_dropped(handle) as model:
            wanted = logits(model, inputs)
    torch.testing.assert_close(given, wanted, atol=2e-5 * wanted.abs().max().item(), rtol=0)


def _hashed(context):
    """As many tokens as asked for, not side by side."""
    noise = torch.rand(997, generator=torch.Generator().manual_seed(5))[context.visual_rank().clamp(min=0)]
    order = noise.masked_fill(~context.visual, -1).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1]).expand_as(order))
    return rank < context.num_kept[:, None]


# ---- the vision side reaches the right tokens


@pytest.mark.parametrize("family", EVERY)
def test_values_of_patches_reach_the_tokens_that_carry_them(family):
    """One patch is changed behind the tower's last attention: the tokens that change are those its value reaches."""
    model, inputs = shared_model(family), prompt(family, LONG, SHORT)
    base, rules = model.base_model, KNOWN[family]
    given = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
    attention = rules.tower_attention(base)
    for number in (0, 5, 17):
        call, before = run_tower(base, rules, given)
        patches = rules.patches(call)
        flat = number % (patches.shape[0] * patches.shape[1])
        view, patch = divmod(flat, patches.shape[1])

        def change(_, args, out, view=view, patch=patch):
            first = out[0] if isinstance(out, tuple) else out
            first = first.clone()
            where = (patch,) if first.ndim == 2 else (view, patch + rules.prefix(base))
            first[where] += torch.linspace(-20, 20, first.shape[-1])  # no norm removes that
            return (first, *out[1:]) if isinstance(out, tuple) else first

        hook = attention.register_forward_hook(change)
        _, after = run_tower(base, rules, given)
        hook.remove()
        mark = torch.zeros(patches.shape[:2])
        mark[view, patch] = 1.0
        reached = call.to_tokens(mark).nan_to_num(0) > 0
        changed = (before - after).abs().amax(1) > 1e-3
        assert changed.any()
        assert torch.equal(reached, changed)


def run_tower(base, rules, given):
    call = VisionCall(base, rules, "image", dict(given))
    with recording(call, attention=True):
        out = base.get_image_features(**given)
    features = list(out.pooler_output)
    call.counts = [len(image) for image in features]
    return call, torch.cat(features)


@pytest.mark.parametrize("family", EVERY)
def test_tower_attention_is_that_of_the_host(family):
    """Against the maps that the host's own eager attention returns; views by the number of their tokens."""
    model = tiny_model(family)
    inputs = prompt(family, LONG, SHORT)
    base, rules = model.base_model, KNOWN[family]
    given = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
    call, _ = run_tower(base, rules, given)
    received, first = call.received_attention(), call.class_attention()
    model.set_attn_implementation("eager")
    maps = []
    hook = rules.tower_attention(base).register_forward_hook(lambda *seen: maps.append(seen[2][1]))
    run_tower(base, rules, given)
    hook.remove()
    prefix = rules.prefix(base)
    assert (first is None) == (prefix == 0) == (family not in ("llava", "llava_next", "internvl"))
    if rules.one_sequence:  # the host keeps no maps there; what patches of a frame receive sums to 1
        assert received.sum().item() == pytest.approx(2, abs=1e-4)
    else:
        wanted = maps[0].mean(1)
        torch.testing.assert_close(received, wanted[:, prefix:, prefix:].mean(1), atol=1e-6, rtol=0)
        if prefix:
            torch.testing.assert_close(first, wanted[:, 0, prefix:], atol=1e-6, rtol=0)
    views = call.views()
    assert len(views) == sum(call.counts)
    assert len(views[views >= 0].unique()) == (patches_views(rules, call))


def patches_views(rules, call):
    return 2 if rules.one_sequence else rules.patches(call).shape[0]


# ---- attention of the language model


@pytest.mark.parametrize("family", EVERY)
def test_rows_are_those_of_eager_attention(family):
    """Rows of any token, what a token receives, and the same for a layer looked at ahead of time."""
    model, inputs = tiny_model(family), prompt(family, LONG, SHORT)
    decoder = model.base_model.get_decoder()
    caught, layers = {}, (1, 2)
    undo = [attach_probe(decoder.layers[i].self_attn, lambda c, _, i=i: caught.update({i: c})) for i in layers]
    ahead = {}

    def look(layer, args, kwargs):
        ahead["found"] = look_ahead(layer, args[0], kwargs["position_embeddings"], kwargs["attention_mask"])

    hook = decoder.layers[2].register_forward_pre_hook(look, with_kwargs=True)
    model(**inputs)
    hook.remove()
    for back in undo:
        back()
    model.set_attn_implementation("eager")
    maps = model(**inputs, output_attentions=True).attentions
    valid = inputs["attention_mask"].bool()
    n = valid.shape[1]
    index = torch.tensor([[n - 1, n - 4, n // 2]] * 2)
    for i in layers:
        for source in [caught[i]] + ([ahead["found"]] if i == 2 else []):
            attention = LayerAttention(source, valid, KNOWN[family].plain_causal)
            wanted = maps[i].gather(2, index[:, None, :, None].expand(-1, 4, -1, n))
            torch.testing.assert_close(attention.rows(index), wanted, atol=5e-6, rtol=0)
            torch.testing.assert_close(attention.rows(index, slice(1, 3)), wanted[:, 1:3], atol=5e-6, rtol=0)
            rows = torch.zeros_like(valid)
            rows.scatter_(1, index, True)
            received = (maps[i] * rows[:, None, :, None]).sum(2).mean(1)
            torch.testing.assert_close(attention.received(rows), received, atol=5e-6, rtol=0)


def test_softcapped_scores():
    model, inputs = shared_model("llava"), prompt("llava", LONG)
    caught = []
    undo = attach_probe(model.base_model.get_decoder().layers[0].self_attn, lambda c, _: caught.append(c))
    model(**inputs)
    undo()
    capped = type(caught[0])(caught[0].query, caught[0].key, None, caught[0].scale, softcap=2.0)
    n = capped.query.shape[2]
    valid = torch.ones(1, n, dtype=torch.bool)
    key = capped.key.repeat_interleave(2, 1)
    scores = 2.0 * torch.tanh(capped.query @ key.transpose(-1, -2) * capped.scale / 2.0)
    wanted = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    attention = LayerAttention(capped, valid, plain=True)
    torch.testing.assert_close(attention.rows(torch.arange(n)[None]), wanted)
    torch.testing.assert_close(attention.received(valid), wanted.sum(2).mean(1))


# ---- prompts of every kind


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl", "idefics3", "gemma3"])
def test_several_images_of_different_sizes(family):
    """2 + 1 images in a batch, text between; padding images of Idefics are no images."""
    sizes = ((64, 64), (32, 64)) if family in RAGGED else ((32, 32), (32, 32))
    batch = (Asked(images=sizes, between=3), Asked(images=sizes[1:], behind=4, seed=4))
    inputs = prompt(family, *batch)
    for config in (vp.FasterVLMConfig(keep=0.3), vp.FastVConfig(keep=0.3), vp.ZooPruneConfig(keep=0.3)):
        with vp.prune(shared_model(family), config) as handle:
            given = logits(handle.model, inputs)
            kept = [len(k) for k in next(iter(handle.report.kept.values()))]
            with nothing_dropped(handle) as model:
                wanted = logits(model, inputs)
        torch.testing.assert_close(given, wanted, atol=2e-5 * wanted.abs().max().item(), rtol=0)
        assert kept[0] > kept[1] > 0


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_video(family):
    """A video of three frames beside an image: each frame is a view, and nothing is lost."""
    inputs = video_prompt(family)
    for config in (vp.FasterVLMConfig(keep=0.4), vp.AdaptInferConfig(keep=0.4), vp.ZooPruneConfig(keep=12)):
        with vp.prune(shared_model(family), config) as handle:
            given = logits(handle.model, inputs)
            report = handle.report
            with nothing_dropped(handle) as model:
                wanted = logits(model, inputs)
        torch.testing.assert_close(given, wanted, atol=2e-5 * wanted.abs().max().item(), rtol=0)
        assert report.num_visual.tolist() == [16 + 3 * 16]
    positions = report.kept[-1][0]
    frames = torch.where(inputs["input_ids"][0] == VIDEO)[0].split(16)
    assert [int(torch.isin(positions, f).sum()) for f in frames] == [3, 3, 3]  # four views share a budget of 12


def video_prompt(family):
    generator = torch.Generator().manual_seed(0)
    image, frames = [97, *[IMAGE] * 16, 96], [[97, *[VIDEO] * 16, 96]] * 3
    body = functools.reduce(operator.iadd, frames, []) if family == "qwen3_vl" else [97, *[VIDEO] * 48, 96]
    ids = torch.tensor([[5, 6, *image, 9, *body, 11, 12, 13]])
    types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    pixels = torch.randn(4 * 64, 96, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
        "pixel_values": pixels[:64],
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "pixel_values_videos": pixels[64:],
        "video_grid_thw": torch.tensor([[3, 8, 8]]),
    }


def test_pooled_video_frames():
    """LLaVA-OneVision pools frames and ends the video with one newline, which stays."""
    model = shared_model("llava_onevision")
    video = torch.randn(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6, *[VIDEO] * 9, 11, 12]])  # two frames of 2 by 2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": video}
    with vp.prune(model, vp.FasterVLMConfig(keep=2)) as handle:
        given = logits(model, inputs)
        assert handle.report.num_visual.tolist() == [8]
        assert handle.report.entering[0].tolist() == [4 + 1 + 2] * 5
        with nothing_dropped(handle):
            torch.testing.assert_close(given, logits(model, inputs), atol=1e-4, rtol=0)


def test_a_batch_with_and_without_images():
    """A sample without an image stays as it is beside one that is pruned."""
    inputs = prompt("llava", LONG, Asked(before=9, images=(), behind=4, seed=7))
    with vp.prune(shared_model("llava"), "fastervlm", keep=4) as handle:
        given = logits(handle.model, inputs)
        assert [len(k) for k in handle.report.kept[-1]] == [4, 0]
        assert handle.report.entering[1].tolist() == [13] * 5
        with nothing_dropped(handle) as model:
            torch.testing.assert_close(given, logits(model, inputs), atol=1e-4, rtol=0)


def test_forward_without_generate_and_without_a_cache():
    model, inputs = shared_model("llava"), prompt("llava", LONG, SHORT)
    with vp.apply_stages(model, stages((-1, 5), (1, 2))) as handle:
        with_cache = model(**inputs)
        without = model(**inputs, use_cache=False)
        assert with_cache.logits.shape[1] == 10 + 2 == without.logits.shape[1]
        assert without.past_key_values is None
        torch.testing.assert_close(with_cache.logits, without.logits, atol=1e-4, rtol=0)
        again = generate(model, inputs, use_cache=False)
        assert torch.equal(again.sequences, generate(model, inputs).sequences)
        assert handle.layers_changed == (0, 1, 2, 3, 4)


def test_hidden_states_are_differentiable():
    model = tiny_model("llava")
    with torch.enable_grad(), vp.prune(model, "fastv", keep=4):
        model(**prompt("llava", LONG), use_cache=False).logits.square().mean().backward()
    assert model.base_model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0


# ---- what generate() can do


def test_sampling_several_sequences_and_prompt_lookup():
    model, inputs = shared_model("llava"), prompt("llava", LONG)
    with vp.apply_stages(model, stages((-1, 6), (1, 3))):
        greedy = generate(model, inputs, max_new_tokens=8).sequences
        lookup = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3, eos_token_id=None
        )
        assert torch.equal(greedy, lookup)
        torch.manual_seed(0)
        several = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3, eos_token_id=None)
        assert several.shape == (3, 30)


def test_two_conversations_alternate():
    """States belong to caches: decoding of one goes on rightly after another prompt was read."""
    model = shared_model("llava")
    first, second = prompt("llava", LONG), prompt("llava", SHORT)
    with vp.apply_stages(model, stages((-1, 6), (1, 3))):
        wanted = logits(model, first)
        opened = model(**first)
        model(**second)
        token = opened.logits[:, -1:].argmax(-1)
        following = model(input_ids=token, position_ids=torch.tensor([[26]]), past_key_values=opened.past_key_values)
    torch.testing.assert_close(following.logits[:, -1], wanted[:, 1], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if KNOWN[f].static_cache])
def test_static_cache_in_every_family(family):
    inputs = prompt(family, LONG, SHORT)
    for config in (vp.FasterVLMConfig(keep=0.4), vp.AdaptInferConfig(keep=0.4)):
        with vp.prune(shared_model(family), config) as handle:
            dynamic = logits(handle.model, inputs)
            torch.testing.assert_close(
                logits(handle.model, inputs, cache_implementation="static"), dynamic, atol=1e-4, rtol=0
            )


# ---- traps that give wrong numbers without an error, each shown without its remedy


def test_second_turn_needs_a_cache_that_counts_what_was_dropped(monkeypatch):
    from vlm_prune import pruner
    from vlm_prune.testing import _two_turns

    inputs = prompt("llava", LONG)
    with vp.apply_stages(shared_model("llava"), stages((-1, 5))) as handle:
        right = _two_turns(handle.model, inputs)
        monkeypatch.setattr(pruner, "count_dropped", lambda *_: None)
        wrong = None
        try:
            wrong = _two_turns(handle.model, inputs)
        except (RuntimeError, ValueError, IndexError):
            return
    assert wrong.shape != right.shape or (wrong - right).abs().max() > 0.1


def test_eager_attention_needs_an_additive_mask(monkeypatch):
    model, inputs = tiny_model("llava"), prompt("llava", LONG, SHORT)
    model.set_attn_implementation("eager")
    ragged = vp.StagesConfig(
        chosen=(vp.Stage(after_layer=1, keep=lambda *_: torch.tensor([3, 9]), criterion=fixed_choice(_hashed)),)
    )
    with vp.apply_stages(model, ragged):
        right = logits(model, inputs)
        monkeypatch.setattr(masks, "for_host", lambda visible, *_: visible)
        wrong = logits(model, inputs)
    assert (right - wrong).abs().max() > 0.1


def test_positions_with_gaps_are_not_packed_sequences(monkeypatch):
    from vlm_prune.pruner import Pruner

    model, inputs = shared_model("llava"), prompt("llava", LONG)
    inputs.pop("attention_mask")
    spread = vp.StagesConfig(chosen=(vp.Stage(after_layer=-1, keep=8, criterion=fixed_choice(every_second)),))
    with vp.apply_stages(model, spread):
        right = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(right, model(**inputs).logits, atol=1e-4, rtol=0)
        gather = Pruner._gather_inputs
        monkeypatch.setattr(Pruner, "_gather_inputs", lambda *args: {**gather(*args), "attention_mask": None})
        wrong = model(**inputs, use_cache=False).logits
    assert (right - wrong).abs().max() > 0.1


# ---- refusals, each a sentence that helps


def test_one_pruner_at_a_time_and_errors_restore():
    model, inputs = shared_model("llava"), prompt("llava", LONG)
    before = logits(model, inputs)
    with vp.prune(model, "fastv", keep=0.5), pytest.raises(ValueError, match=r"fastv is at work .* call remove\(\)"):
        vp.prune(model, "uniform")
    assert torch.equal(logits(model, inputs), before)

    def broken(context):
        raise ZeroDivisionError

    criterion = fixed_choice(broken)
    config = vp.StagesConfig(chosen=(vp.Stage(after_layer=0, keep=3, criterion=criterion),))
    with pytest.raises(ZeroDivisionError), vp.apply_stages(model, config):
        model(**inputs)
    assert torch.equal(logits(model, inputs), before)
    outside = vp.Criterion(name="outside", score=every_second, select=lambda c, _: vp.Selection(c.valid))
    config = vp.StagesConfig(chosen=(vp.Stage(after_layer=0, keep=3, criterion=outside),))
    with pytest.raises(ValueError, match="outside keeps tokens that are not visual"), vp.apply_stages(model, config):
        model(**inputs)


def test_models_that_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    )
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .*supported are llava, llava_next.*register_family"):
        vp.prune(small, "fastv")
    with pytest.raises(TypeError, match="vision-language model of transformers, got Linear"):
        vp.prune(torch.nn.Linear(2, 2), "fastv")
    model = shared_model("llava")
    with pytest.raises(ValueError, match="unknown method 'fast'; there are"):
        vp.prune(model, "fast")
    with pytest.raises(TypeError, match="config must be a method's config, got int"):
        vp.prune(model, 3)
    flex = tiny_model("llava")
    flex.base_model.get_decoder().config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention' is not supported"):
        vp.prune(flex, "uniform")


def test_calls_that_are_refused():
    model, inputs = shared_model("llava"), prompt("llava", LONG)
    with vp.prune(model, "fastervlm", keep=4) as handle:
        with pytest.raises(ValueError, match="without labels"):
            model(**inputs, labels=inputs["input_ids"])
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="input_ids are needed"):
            model(inputs_embeds=embeds)
        with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
            generate(model, inputs, prefill_chunk_size=10)
        handle.set_image_sizes([(3, 4), (5, 6)])
        with pytest.raises(ValueError, match="image sizes for"):
            model(**inputs)
        with pytest.raises(ValueError, match="at least 1"):
            handle.set_image_sizes([(0, 4)])
    with vp.prune(model, "fastervlm", keep=4):
        features = model.get_image_features(inputs["pixel_values"])
    plain = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with vp.prune(model, "fastervlm", keep=4), pytest.raises(RuntimeError, match="vision tower, which did not run"):
        model(**plain, mm_encoder_outputs={"image": features})
    with vp.prune(model, "fastv", keep=4) as handle:
        model(**plain, mm_encoder_outputs={"image": features})
        assert len(handle.report.kept[1][0]) == 4
    gemma = shared_model("gemma3")
    with vp.prune(gemma, "uniform", keep=4), pytest.raises(ValueError, match="static cache is not supported"):
        generate(gemma, prompt("gemma3", LONG), cache_implementation="static")


def test_images_that_come_late_are_said_to_be_left_alone(caplog):
    """The first chunk of the prompt is text, and the image comes with a cache that holds it."""
    model, inputs = shared_model("llava"), prompt("llava", Asked(before=12))
    before = logits(model, inputs, prefill_chunk_size=10)
    with vp.prune(model, "fastervlm", keep=4):
        given = logits(model, inputs, prefill_chunk_size=10)
    assert torch.equal(given, before)
    assert "not pruned" in caplog.text


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (((4, 3),), "behind layers -1"),
        (((1, 3), (1, 2)), "in the order of layers"),
        (((2, 3), (0, 2)), "in the order of layers"),
        (((-2, 3),), "behind layers -1"),
    ],
)
def test_stages_that_are_refused(where, message):
    with pytest.raises(ValueError, match=message):
        vp.apply_stages(shared_model("llava"), stages(*where))


def test_language_attention_before_the_first_layer_is_refused():
    with pytest.raises(ValueError, match="none of before layer 0"):
        vp.apply_stages(shared_model("llava"), stages((-1, 3), needs=frozenset({"attention"})))


# ---- one file makes a family or a criterion


def test_a_family_of_ones_own():
    model = tiny_model("llava")
    model.config.model_type = "my_llava"
    with pytest.raises(ValueError, match="is not supported"):
        vp.prune(model, "uniform")
    try:
        vp.register_family("my_llava", vp.Family())
        with vp.prune(model, "fastervlm", keep=5) as handle:
            logits(model, prompt("llava", LONG))
            assert len(handle.report.kept[-1][0]) == 5
        with pytest.raises(ValueError, match="known already"):
            vp.register_family("llava", vp.Family())
    finally:
        del KNOWN["my_llava"]


def test_masks_of_every_form_tell_padding():
    ids = torch.zeros(2, 5, dtype=torch.long)
    flat = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    square = (torch.ones(5, 5, dtype=torch.bool).tril() & flat.bool()[:, None, None]) | torch.zeros(
        2, 1, 5, 5, dtype=torch.bool
    )
    additive = torch.zeros(2, 1, 5, 5).masked_fill(~square, torch.finfo(torch.float32).min)
    reserve = torch.nn.functional.pad(square, (0, 4))
    for mask in (flat, square, additive, reserve, {"full_attention": square}, {"sliding_attention": additive}):
        assert torch.equal(masks.real_tokens(mask, ids), flat.bool())
    assert masks.real_tokens(None, ids).all()
    with pytest.raises(ValueError, match="attention_mask must be"):
        masks.real_tokens(torch.ones(2), ids)


def test_keep_counts():
    uniform = vp.UniformConfig(keep=0.3).stages(5)[0]
    n = torch.tensor([10, 576, 1, 0])
    assert uniform.count(n, n).tolist() == [3, 172, 1, 0]
    assert vp.UniformConfig(keep=64).stages(5)[0].count(n, n).tolist() == [10, 64, 1, 0]
    assert [
        int(vp.Stage(after_layer=-1, keep=r, criterion=uniform.criterion).count(n[1:2], n[1:2]))
        for r in (0.1112, 0.2223, 0.3334)
    ] == [64, 128, 192]
