"""Attention calibration against its definition, the door, the head search on a model with a planted distractor."""

import importlib
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from llm_attn.attention_calibration import (
    ACTConfig,
    Choice,
    HeadTable,
    SinkState,
    apply_act,
    calibrate_heads,
    calibrate_known_sinks,
    calibrated_attention,
    choice_scores,
    plot_sinks,
    running_attention,
    sink_map,
)
from llm_attn.attention_calibration.calibrate import prompt_sinks
from llm_attn.attention_calibration.reference import attention_map, calibrate_map, find_sinks
from llm_attn.testing import DoorTests, tiny_model, tokens
from llm_attn.transformers.visibility import Visibility

HEADS = {0: (0, 2), 1: (1, 2, 3)}


def planted(S, *, heads=8, kv_heads=2, batch=2, dim=16, seed=0, dtype=torch.float64):
    """Random query, key, value in which two keys beyond the first draw the attention of all heads."""
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, S, dim, generator=draw, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, S, dim, generator=draw, dtype=torch.float64)
    value = torch.randn(batch, kv_heads, S, dim + 8, generator=draw, dtype=torch.float64)
    query += 0.7
    key[:, :, [S // 4, S // 2]] += 1.0 + torch.log(torch.tensor(float(S))) / 6
    return query.to(dtype), key.to(dtype), value.to(dtype)


def definition(query, key, value, config, visible=None):
    """Output, map and sinks by the definition, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    visible = Visibility() if visible is None else visible
    before = attention_map(query, key, visible, scale=query.shape[3] ** -0.5)
    sinks = find_sinks(before, visible, config)
    after = calibrate_map(before, sinks, config.beta)
    return after @ value.repeat_interleave(query.shape[1] // key.shape[1], 1), before, after, sinks


def masks(S):
    keys = torch.ones(2, S, dtype=torch.bool)
    keys[0, :5], keys[1, -4:] = False, False
    document = torch.arange(S) // (S // 2 + 1)
    packed = (document[:, None] == document) & (torch.arange(S)[:, None] >= torch.arange(S))
    return {
        "causal": Visibility(),
        "window": Visibility(window=11),
        "padded": Visibility(key_mask=keys),
        "window, padded": Visibility(window=9, key_mask=keys),
        "packed": Visibility(mask=packed[None, None]),
    }


# ---- the definition


def test_definition_is_the_papers_formula():
    """Element by element as in the paper, with the official code's choice of what to protect."""
    query, key, value = planted(21, heads=2, batch=1)
    config = ACTConfig(protect="first_flagged")
    _, before, after, sinks = definition(query, key, value, config)
    S, found = before.shape[-1], 0
    for head in range(2):
        P = before[0, head].tolist()
        mean = [sum(P[k][j] for k in range(j, S)) / (S - j) for j in range(S)]
        flagged = [j for j in range(S) if mean[j] > 0.1][1:]
        found += len(flagged)
        assert {j for j in range(S) if sinks[0, head, :, j].any()} == set(flagged)
        for k in range(1, S):
            mass = sum(P[k][s] for s in flagged)
            for j in range(S):
                wanted = 0.4 * P[k][j] if j in flagged else P[k][j] * (1 + 0.6 * mass / (1 - mass))
                assert after[0, head, k, j].item() == pytest.approx(wanted, abs=1e-12)
        assert after[0, head, 0, 0] == 1
    assert found >= 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_rows_of_the_calibrated_map_sum_to_one(beta, causal):
    query, key, value = planted(40)
    _, before, after, sinks = definition(query, key, value, ACTConfig(beta=beta, causal=causal))
    assert sinks.any(-1).any(-1).all()
    assert (after >= 0).all()
    torch.testing.assert_close(after.sum(-1), torch.ones_like(after[..., 0]), atol=1e-12, rtol=0)
    # what sinks keep is exactly beta of what they had
    torch.testing.assert_close((after * sinks).sum(-1), beta * (before * sinks).sum(-1), atol=1e-12, rtol=0)


def test_uniform_attention_has_no_sinks():
    query, key, value = torch.zeros(1, 2, 48, 8), torch.randn(1, 2, 48, 8), torch.randn(1, 2, 48, 8)
    for causal in (False, True):
        config = ACTConfig(causal=causal, min_rows=1 if not causal else 48)
        assert not definition(query, key, value, config)[3].any()
    assert not prompt_sinks(query, key, Visibility(), ACTConfig(), scale=1.0)[0].any()


# ---- the fast version of a whole prompt


@pytest.mark.parametrize(
    ("S", "name", "protect"),
    [(S, name, "first") for S in (17, 128) for name in masks(17)]
    + [(17, "causal", "first_flagged"), (128, "padded", "first_flagged"), (513, "causal", "first")],
)
def test_prompt_is_the_definition(S, name, protect):
    config, visible = ACTConfig(protect=protect, min_rows=2), masks(S)[name]
    query, key, value = planted(S)
    wanted, _, _, sinks = definition(query, key, value, config, visible)
    assert sinks.any()
    seen = visible.dense(S, S, query.device).any(-1)[:, 0, :, None].expand(2, -1, value.shape[3])[:, None]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        tensors = [tensor.to(dtype) for tensor in (query, key, value)]
        if dtype == torch.bfloat16:  # truth from what bfloat16 leaves of the inputs
            wanted, _, _, sinks = definition(*tensors, config, visible)
            found = prompt_sinks(tensors[0], _repeated(tensors[1]), visible, config, scale=0.25)[0]
            if not torch.equal(found, sinks.any(2)):
                continue  # a mean beside the threshold; whether it is above is not for bfloat16 to say
        given = calibrated_attention(*tensors, config, visible=visible)
        assert given.dtype == dtype
        assert ((given.double() - wanted).abs() * seen).max() <= tolerance * max(1, wanted.abs().max())


def _repeated(key: Tensor) -> Tensor:
    return key.repeat_interleave(4, 1)


def test_capped_scores():
    query, key, value = planted(40)
    scale, config = 0.25, ACTConfig()
    before = attention_map(query, key, Visibility(), scale=scale, softcap=2.0)
    sinks = find_sinks(before, Visibility(), config)
    assert sinks.any()
    wanted = calibrate_map(before, sinks, 0.4) @ value.repeat_interleave(4, 1)
    given = calibrated_attention(query, key, value, config, scale=scale, softcap=2.0)
    torch.testing.assert_close(given, wanted, atol=1e-6, rtol=0)


def test_neutral_beta_and_linearity_in_beta():
    tensors = planted(65, dtype=torch.float32)
    plain = scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    assert torch.equal(calibrated_attention(*tensors, ACTConfig(beta=1.0)), plain)
    sinks = prompt_sinks(tensors[0], _repeated(tensors[1]), Visibility(), ACTConfig(), scale=0.25)[0]
    heads = range(8)

    def at(beta):
        return calibrate_known_sinks(*tensors, plain, sinks, beta, heads=heads, visible=Visibility(), scale=0.25)

    torch.testing.assert_close(at(1.0), plain, atol=1e-6, rtol=0)
    low, middle, high = at(0.2), at(0.5), at(0.8)
    assert (high - low).abs().max() > 0.1
    torch.testing.assert_close(middle, (low + high) / 2, atol=1e-6, rtol=0)


def test_other_heads_and_heads_without_sinks_are_untouched():
    query, key, value = planted(64, dtype=torch.float32)
    plain = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    some = calibrated_attention(query, key, value, ACTConfig(), heads=[1, 6])
    others = [0, 2, 3, 4, 5, 7]
    assert torch.equal(some[:, others], plain[:, others])
    assert (some[:, [1, 6]] - plain[:, [1, 6]]).abs().amax((0, 2, 3)).min() > 0.1
    flat = torch.zeros_like(query)  # nothing is flagged: the second pass must not run
    with FlopCounterMode(display=False) as with_act:
        out = calibrated_attention(flat, key, value, ACTConfig(), heads=[1, 6])
    with FlopCounterMode(display=False) as with_sinks:
        calibrated_attention(query, key, value, ACTConfig(), heads=[1, 6])
    assert torch.equal(out, scaled_dot_product_attention(flat, key, value, is_causal=True, enable_gqa=True))
    assert with_act.get_total_flops() < 0.8 * with_sinks.get_total_flops()


def test_rows_that_see_only_sinks_stay_as_they_are():
    query, key, value = planted(12, heads=2, kv_heads=2)
    config = ACTConfig(tau=1e-6, protect="first_flagged", min_rows=12)  # keys 0 and later ones: only 0 has 12 rows
    sinks = torch.zeros(2, 2, 12, dtype=torch.bool)
    sinks[..., :3] = True
    plain = scaled_dot_product_attention(query, key, value, is_causal=True)
    out = calibrate_known_sinks(
        query, key, value, plain, sinks, 0.4, heads=[0, 1], visible=Visibility(), scale=0.25
    )  # fmt: skip
    assert torch.equal(out[:, :, :3], plain[:, :, :3])
    assert (out[:, :, 3:] - plain[:, :, 3:]).abs().amax(-1).min() > 1e-3
    assert torch.equal(calibrated_attention(query, key, value, config), plain)


def test_batch_items_are_independent():
    query, key, value = planted(33, batch=3, dtype=torch.float32)
    order = torch.tensor([2, 0, 1])
    given = calibrated_attention(query[order], key[order], value[order], ACTConfig())
    torch.testing.assert_close(given, calibrated_attention(query, key, value, ACTConfig())[order], atol=1e-6, rtol=0)


@pytest.mark.parametrize("tau", [0.1, "5/S"])
def test_left_padding_leaves_valid_rows_alone(tau):
    query, key, value = planted(29, batch=1, dtype=torch.float32)
    pad = [torch.nn.functional.pad(tensor, (0, 0, 7, 0), value=3.0) for tensor in (query, key, value)]
    mask = (torch.arange(36) >= 7)[None]
    given = calibrated_attention(*pad, ACTConfig(tau=tau), visible=Visibility(key_mask=mask))
    wanted = calibrated_attention(query, key, value, ACTConfig(tau=tau))
    assert (wanted - scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)).abs().max() > 0.1
    torch.testing.assert_close(given[:, :, 7:], wanted, atol=1e-5, rtol=0)


def test_share_of_the_length_is_the_threshold():
    """The two forms of tau meet where alpha / S is tau, and part elsewhere."""
    query, key, _ = planted(50, heads=4, kv_heads=4, seed=3)
    absolute, share = (prompt_sinks(query, key, Visibility(), ACTConfig(tau=t), scale=0.25)[0] for t in (0.1, "5/S"))
    assert absolute.any()
    assert torch.equal(absolute, share)
    query, key, _ = planted(200, heads=4, kv_heads=4, seed=3)
    absolute, share = (prompt_sinks(query, key, Visibility(), ACTConfig(tau=t), scale=0.25)[0] for t in (0.1, "5/S"))
    assert share.sum() > absolute.sum()
    assert torch.equal(share, prompt_sinks(query, key, Visibility(), ACTConfig(tau=0.025), scale=0.25)[0])


def test_last_keys_are_spared_by_min_rows():
    query, key, _ = planted(30, heads=4, kv_heads=4)
    all_keys, settled = (
        prompt_sinks(query, key, Visibility(), ACTConfig(min_rows=rows), scale=0.25)[0] for rows in (1, 8)
    )
    assert all_keys[..., -7:].any()
    assert not settled[..., -7:].any()
    assert torch.equal(settled[..., :-7], all_keys[..., :-7])


def test_gradients_with_the_sinks_held_fixed():
    query, key, value = (t[:1, :, :, :3].requires_grad_() for t in planted(12, heads=1, kv_heads=1, dim=3))
    assert prompt_sinks(query, key, Visibility(), ACTConfig(), scale=3**-0.5)[0].any()
    for config in (ACTConfig(), ACTConfig(causal=True)):

        def run(q, k, v, config=config):
            if not config.causal:
                return calibrated_attention(q, k, v, config)
            return running_attention(q, k, v, SinkState.empty(1, 1, q.device, q.dtype), config)[0]

        assert torch.autograd.gradcheck(run, (query, key, value))


# ---- the running version


@pytest.mark.parametrize("name", ["causal", "window", "padded", "packed"])
def test_running_is_the_definition_wherever_it_is_cut(name):
    S, config = 53, ACTConfig(causal=True, min_rows=2)
    query, key, value = planted(S, heads=2, kv_heads=2)
    visible = masks(S)[name]
    wanted, _, _, sinks = definition(query, key, value, config, visible)
    assert (sinks[:, :, 1:] != sinks[:, :, :-1]).any()  # sinks come and go
    for cuts in ([S], [20, 13, 1, 1, 18], [1] * S):
        state, outs, start = SinkState.empty(2, 2, query.device, query.dtype), [], 0
        for length in cuts:
            stop = start + length
            part = Visibility(
                visible.window,
                None if visible.key_mask is None else visible.key_mask[:, :stop],
                None if visible.mask is None else visible.mask[:, :, start:stop, :stop],
            )
            out, state = running_attention(
                query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], state, config, visible=part
            )
            outs.append(out)
            start = stop
        seen = visible.dense(S, S, query.device).any(-1)[..., None]
        assert state.seen == S
        torch.testing.assert_close(torch.cat(outs, 2) * seen, wanted * seen, atol=1e-6, rtol=0)


def test_running_follows_a_cache_that_drops_its_oldest_keys():
    S, window, config = 40, 7, ACTConfig(causal=True)
    query, key, value = planted(S, heads=2, kv_heads=2)
    wanted = definition(query, key, value, config, Visibility(window=window))[0]
    state, outs = SinkState.empty(2, 2, query.device, query.dtype), []
    for i in range(S):
        held = slice(max(0, i - window + 1), i + 1)
        out, state = running_attention(query[:, :, i : i + 1], key[:, :, held], value[:, :, held], state, config)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), wanted, atol=1e-6, rtol=0)


def test_frozen_sinks_are_those_of_the_prompt():
    query, key, value = planted(40, heads=2, kv_heads=2)
    config = ACTConfig(decode="frozen")
    sinks, received = prompt_sinks(query[:, :, :30], key[:, :, :30], Visibility(), config, scale=0.25)
    rows, first = torch.arange(30, 0, -1).expand(2, 1, -1), torch.zeros(2, 1, 30, dtype=torch.bool)
    state = SinkState(30, received, rows, first, sinks, sinks)
    out, after = running_attention(query[:, :, 30:], key, value, state, config)
    everywhere = torch.nn.functional.pad(sinks, (0, 10))
    before = attention_map(query[:, :, 30:], key, Visibility(), scale=0.25)
    wanted = calibrate_map(before, everywhere[:, :, None].expand_as(before), 0.4) @ value
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=0)
    assert torch.equal(after.sinks, everywhere)


# ---- the door


class TestCausalDoor(DoorTests):
    attention = "act"

    def apply(self, model):
        return apply_act(model, ACTConfig(heads=HEADS, causal=True))

    def neutral(self, model):
        return apply_act(model, ACTConfig(heads=HEADS, causal=True, beta=1.0))


class TestPaperDoor(DoorTests):
    """Rows of a prompt see what comes after them, so a prompt and its continuation are not one pass."""

    attention = "act"
    families = ("mistral",)
    cache = False
    chunked = False

    def apply(self, model):
        return apply_act(model, ACTConfig(heads=HEADS))

    def neutral(self, model):
        return apply_act(model, ACTConfig(heads=HEADS, beta=1.0))


def test_door_calibrates_the_named_heads_of_the_named_layers():
    model, ids = tiny_model("llama"), tokens(2, 23)
    seen = {}
    config = ACTConfig(heads={1: [3, 1]})
    with apply_act(model, config, on_sinks=lambda layer, heads, *_: seen.update({layer: heads})) as door:
        model(ids)
    assert door.layers_changed == (1,)
    assert seen == {1: (1, 3)}
    assert not [
        name for layer in model.model.layers for name in vars(layer.self_attn) if "act" in name and "llm" in name
    ]


def test_neutral_beta_is_the_host_bit_for_bit():
    model, ids = tiny_model("llama"), tokens(2, 23)
    before, found = model(ids).logits, []
    with apply_act(model, ACTConfig(heads=HEADS, beta=1.0), on_sinks=lambda *told: found.append(told[3])):
        assert torch.equal(model(ids).logits, before)
    assert len(found) == 2
    assert any(sinks.any() for sinks in found)


def test_decode_modes_differ_after_the_prompt_only():
    model, ids = tiny_model("llama"), tokens(1, 30)
    logits = {}
    for decode in ("running", "frozen", "off"):
        with apply_act(model, ACTConfig(heads=HEADS, decode=decode)):
            cache = DynamicCache(config=model.config)
            prompt = model(ids[:, :20], past_key_values=cache).logits
            logits[decode] = prompt, model(ids[:, 20:], past_key_values=cache).logits
    for decode in ("frozen", "off"):
        assert torch.equal(logits[decode][0], logits["running"][0])
        assert (logits[decode][1] - logits["running"][1]).abs().max() > 1e-3
    cache = DynamicCache(config=model.config)
    with apply_act(model, ACTConfig(heads=HEADS)):
        model(ids[:, :20], past_key_values=cache)
    assert torch.equal(model(ids[:, 20:], past_key_values=cache).logits, logits["off"][1])


def test_token_by_token_from_an_empty_cache_is_the_causal_prompt():
    for family in ("llama", "mistral"):
        model, ids, logits = tiny_model(family), tokens(2, 24), []
        with apply_act(model, ACTConfig(heads=HEADS, min_rows=2)):
            cache = DynamicCache(config=model.config)
            for i in range(24):
                logits.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
        with apply_act(model, ACTConfig(heads=HEADS, min_rows=2, causal=True)):
            torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, atol=1e-4, rtol=0)


def test_cache_of_other_heads_is_refused():
    model, ids, cache = tiny_model("llama"), tokens(1, 9), DynamicCache()
    with apply_act(model, ACTConfig(heads=HEADS)):
        model(ids, past_key_values=cache)
    with apply_act(model, ACTConfig(heads={0: [1], 1: [1]})), pytest.raises(ValueError, match="other heads"):
        model(ids[:, :1], past_key_values=cache)


def test_counts_follow_the_cache():
    """Rows of the batch reordered, repeated and chosen between two calls go on as if each had been alone."""
    model, ids, more = tiny_model("gemma2"), tokens(3, 20), tokens(3, 4, seed=5)
    with apply_act(model, ACTConfig(heads=HEADS)):
        alone = []
        for row, then in ((2, 0), (0, 1), (0, 2)):
            cache = DynamicCache(config=model.config)
            model(ids[row : row + 1], past_key_values=cache)
            alone.append(model(more[then : then + 1], past_key_values=cache).logits)
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, 3]))
        together = model(more, past_key_values=cache).logits
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match='decode="off"'):
            cache.crop(-2)


def test_generation_compiled_with_a_static_cache():
    model, ids = tiny_model("llama"), tokens(2, 15)
    with apply_act(model, ACTConfig(heads=HEADS)):
        eager = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        cache_and_graph = torch.compile(model, backend="aot_eager")
        held = model.generation_config.to_dict()
        compiled = cache_and_graph.generate(
            ids, max_new_tokens=5, do_sample=False, pad_token_id=0, cache_implementation="static"
        )
        assert torch.equal(compiled, eager)
        assert model.generation_config.to_dict() == held


def test_chosen_by_name_alone_ends_with_the_prompt():
    model = tiny_model("llama", num_hidden_layers=5, attn_implementation="act")
    ids = tokens(1, 12)
    cache = DynamicCache(config=model.config)
    by_name = model(ids, past_key_values=cache).logits
    with pytest.raises(ValueError, match="apply_act"):
        model(ids[:, :1], past_key_values=cache)
    model.set_attn_implementation("sdpa")
    with apply_act(model, ACTConfig(heads={layer: range(4) for layer in (2, 3)})) as door:
        assert torch.equal(model(ids).logits, by_name)
        assert door.layers_changed == (2, 3)
    with apply_act(model) as door:  # all but the first two layers and the last
        assert door.layers_changed == (2, 3)


def test_dropout_is_left_out_in_calibrated_heads():
    model, ids = tiny_model("llama", attention_dropout=0.5), tokens(1, 23)
    every = ACTConfig(heads={0: range(4), 1: range(4)})
    with apply_act(model, every):
        wanted = model(ids).logits
        torch.testing.assert_close(model.train()(ids).logits, wanted, atol=1e-5, rtol=0)
    assert (model(ids).logits - wanted).abs().max() > 1e-2


def test_settings_come_back_from_json():
    config = ACTConfig(heads={3: [5, 1], 2: (0,), 4: ()}, tau="5/S")
    assert config.heads == {2: (0,), 3: (1, 5)}
    assert ACTConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 1.5}, "beta must lie in"),
        ({"tau": 0.0}, "tau must be"),
        ({"tau": "S/5"}, "tau must be"),
        ({"protect": "none"}, "protect must be one of first, first_flagged"),
        ({"decode": "on"}, "decode must be one of running, frozen, off"),
        ({"min_rows": 0}, "min_rows must be at least 1"),
        ({"heads": {}}, "heads names no head"),
        ({"heads": {0: [1, 1]}}, "each head once"),
        ({"heads": {-1: [1]}}, "from 0 on"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        ACTConfig(**changes)


def test_models_and_heads_that_cannot_be():
    model = tiny_model("llama")
    for config, message in (
        (ACTConfig(heads={0: [4]}), "layer 0 has heads 0 to 3, got head 4"),
        (ACTConfig(heads={2: [0]}), "layers 0 to 1, not 2"),
        (ACTConfig(), "nothing to calibrate"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_act(model, config)
    assert model.config._attn_implementation == "sdpa"
    query, key, value = planted(9)
    with pytest.raises(ValueError, match="heads must be some of 0 to 7"):
        calibrated_attention(query, key, value, ACTConfig(), heads=[8])


@pytest.mark.parametrize("length", [0, 1])
def test_hardly_any_tokens(length):
    query, key, value = (tensor[:, :, :length] for tensor in planted(4))
    given = calibrated_attention(query, key, value, ACTConfig(tau=1e-3))
    assert torch.equal(given, value.repeat_interleave(4, 1))


def test_nan_and_infinity_flag_nothing_by_themselves():
    query, key, value = planted(20, dtype=torch.float32)
    query[0, 3, 4] = math.nan
    plain = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    given = calibrated_attention(query, key, value, ACTConfig())
    assert given[0, 3, :4].isfinite().all()
    assert torch.equal(given[0, 3].isnan(), plain[0, 3].isnan())
    assert given[1].isfinite().all()


# ---- search

CONTENTS = [f"c{i}" for i in range(8)]
WORDS = ["<pad>", "<bos>", *CONTENTS, "?", "!", "x0", "x1", "x2", "x3"]
WRONG = 2


class WordTokenizer:
    """Words apart by spaces; begins a text with <bos>, as tokenizers of language models do."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [WORDS.index(word) for word in text.split()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def distracted_model() -> LlamaForCausalLM:
    """Answers "?" by the content word before it, which head 0 of the last layer copies; head 1 says WRONG after "!".

    Residual stream: 0-15 which word, 16 is a content word, 17 is "!", 18 neither, 19 always, 20-27 the answer.
    """
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        embedding = model.model.embed_tokens.weight.zero_()
        embedding[range(16), range(16)], embedding[:, 19] = 1, 1
        kinds = torch.tensor([16 if word in CONTENTS else 17 if word == "!" else 18 for word in WORDS])
        embedding[range(16), kinds] = 1
        attend = model.model.layers[1].self_attn
        for weight in (attend.q_proj.weight, attend.k_proj.weight, attend.v_proj.weight):
            weight.zero_()
        attend.q_proj.weight[[3, 11], 19] = 1.5  # rotary angles of the last pair are next to nothing
        attend.k_proj.weight[3, 16], attend.k_proj.weight[11, 17] = 1.5, 1.5
        copied = torch.eye(8)
        attend.v_proj.weight[0:8, 2:10] = copied
        attend.v_proj.weight[8 + WRONG, 17] = 1.6
        attend.o_proj.weight[20:28, 0:8] = copied
        attend.o_proj.weight[20:28, 8:16] = copied
        model.lm_head.weight.zero_()
        model.lm_head.weight[2:10, 20:28] = copied
    return model


def distracting_questions(count: int, *, seed: int = 0) -> list[Choice]:
    """One content word and one "!" among fillers; options are WRONG and three more, the right one among them."""
    draw = torch.Generator().manual_seed(seed)
    questions = []
    for _ in range(count):
        right, *others = torch.randperm(8, generator=draw).tolist()
        others = [i for i in others if i != WRONG][:2]
        options = sorted({right, WRONG, *others})
        fillers = [
            f"x{i}" for i in torch.randint(0, 4, (int(torch.randint(5, 9, (), generator=draw)),), generator=draw)
        ]
        prompt = " ".join([*fillers[:2], f"c{right}", *fillers[2:4], "!", *fillers[4:], "?"])
        questions.append(Choice(prompt, tuple(f"c{i}" for i in options), options.index(right)))
    return questions


def test_search_finds_the_head_that_a_distractor_holds(tmp_path):
    model, tokenizer = distracted_model(), WordTokenizer()
    calibration, test = distracting_questions(24), distracting_questions(40, seed=1)
    told = []
    table = calibrate_heads(
        model, tokenizer, calibration, layers="0:", batch_size=7, resume_from=tmp_path / "heads.json",
        on_head=lambda done, total, trial: told.append((done, total, trial)),
    )  # fmt: skip
    best = table.ranked()[0]
    assert (best.layer, best.head) == (1, 1)
    assert table.accuracy < 0.4
    assert best.accuracy == 1
    assert table.select() == {1: (1,)}
    assert table.select(top=0) == {}
    assert [done for done, *_ in told] == list(range(1, len(table.trials) + 1))

    def accuracy():
        scores = choice_scores(model, tokenizer, test, batch_size=9)
        return (scores.argmax(-1) == torch.tensor([example.answer for example in test])).double().mean()

    assert accuracy() < 0.4
    with apply_act(model, ACTConfig(heads=table.select())):
        assert accuracy() == 1


def test_search_goes_on_where_it_was_cut_off(tmp_path):
    model, tokenizer, examples = distracted_model(), WordTokenizer(), distracting_questions(12)
    file = tmp_path / "heads.json"

    class CutOff(Exception):
        pass

    def cut_off(done, _total, _trial):
        if done == 2:
            raise CutOff

    whole = calibrate_heads(model, tokenizer, examples, layers=[0, 1])
    assert len(whole.trials) > 2
    with pytest.raises(CutOff):
        calibrate_heads(model, tokenizer, examples, layers=[0, 1], resume_from=file, on_head=cut_off)
    assert len(HeadTable.load(file).trials) == 2
    again = []
    resumed = calibrate_heads(
        model, tokenizer, examples, layers=[0, 1], resume_from=file, on_head=lambda *told: again.append(told)
    )
    assert len(again) == len(whole.trials) - 2
    assert resumed == whole == HeadTable.load(file)
    with pytest.raises(ValueError, match="another search"):
        calibrate_heads(model, tokenizer, examples[1:], layers=[0, 1], resume_from=file)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_trials_from_stored_inputs_are_whole_runs(family):
    """A trial starts at its layer; its outcome is that of the whole model with that head calibrated."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3_text" else {}
    model = tiny_model(family, num_hidden_layers=4, **kinds)
    tokenizer = WordTokenizer()
    examples = [
        Choice(example.prompt, (*example.options[:2], example.options[2] + " x1 !"), 0)
        for example in distracting_questions(6)
    ]
    config = ACTConfig(tau=0.05)
    table = calibrate_heads(model, tokenizer, examples, config=config, layers="1:", batch_size=4)
    assert {trial.layer for trial in table.trials} == {1, 2, 3}
    right = torch.zeros(6, 1, dtype=torch.int64)
    for trial in table.trials[::3]:
        with apply_act(model, ACTConfig(tau=0.05, heads={trial.layer: [trial.head]})):
            scores = choice_scores(model, tokenizer, examples, batch_size=6)
        assert scores.double().log_softmax(-1).gather(1, right).mean().item() == pytest.approx(
            trial.likelihood, abs=1e-4
        )
    assert "forward" not in vars(model.model.layers[0])


def test_choice_scores_are_likelihoods_of_whole_texts():
    model, tokenizer = tiny_model("llama"), WordTokenizer()
    examples = [Choice("x0 c1 x2", ("c1", "c2 x3 !"), 0), Choice("x0 !", ("? c3", "c2", "x1 x2"), 1)]
    scores = choice_scores(model, tokenizer, examples, batch_size=2)
    assert scores[0, 2] == -math.inf
    for i, example in enumerate(examples):
        prompt = tokenizer(example.prompt)["input_ids"]
        for j, option in enumerate(example.options):
            ids = tokenizer(option, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
            wanted = sum(logits[len(prompt) - 1 + n, token].item() for n, token in enumerate(ids)) / len(ids)
            assert scores[i, j].item() == pytest.approx(wanted, abs=1e-4)
    labels = choice_scores(model, tokenizer, examples, metric="label_accuracy")
    last = model(torch.tensor([tokenizer(examples[1].prompt)["input_ids"]])).logits[0, -1].log_softmax(-1)
    assert labels[1].tolist() == pytest.approx(
        [last[WORDS.index(word)].item() for word in ("c3", "c2", "x2")], abs=1e-4
    )


def test_searches_that_cannot_be():
    model, tokenizer, examples = distracted_model(), WordTokenizer(), distracting_questions(2)
    with pytest.raises(ValueError, match="layers must name some of the 2 layers"):
        calibrate_heads(model, tokenizer, examples)
    with pytest.raises(ValueError, match="layers must be numbers"):
        calibrate_heads(model, tokenizer, examples, layers="all")
    with pytest.raises(ValueError, match="at least one Choice"):
        calibrate_heads(model, tokenizer, [], layers=[1])
    with pytest.raises(ValueError, match="metric must be one of"):
        calibrate_heads(model, tokenizer, examples, layers=[1], metric="f1")
    with pytest.raises(ValueError, match="two or more options"):
        Choice("a", ("b",), 0)
    with pytest.raises(ValueError, match="number of an option"):
        Choice("a", ("b", "c"), 2)


# ---- the proof


class LetterTokenizer:
    """A token for each letter, enough for a model that knows nothing."""

    def __call__(self, text: str, *, add_special_tokens: bool = True, return_tensors: str | None = None) -> dict:
        ids = [*([1] if add_special_tokens else []), *(2 + ord(letter) % 90 for letter in text)]
        return {"input_ids": torch.tensor([ids]) if return_tensors == "pt" else ids}

    def decode(self, ids: list[int]) -> str:
        return chr(ids[0] + 30)


@pytest.fixture
def proof(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "proofs"))
    for name in ("fact_questions", "attention_calibration"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("attention_calibration")
    for name in ("fact_questions", "attention_calibration"):
        del sys.modules[name]


def test_proof_runs_and_goes_on(proof, tmp_path):
    model = tiny_model("llama", num_hidden_layers=4, max_position_embeddings=512)
    settings = {"tasks": ["cities", "letters"], "recipe": proof.QUICK, "out": tmp_path}
    first = proof.prove(model, LetterTokenizer(), seeds=[0], **settings)
    run = json.loads((tmp_path / "attention_calibration" / "cities-0.json").read_text())
    assert run["heads with sinks"] > 0
    host, chosen = (np.mean(run["right"][way]) for way in ("host", "chosen heads"))
    assert first["tasks"]["cities"]["gain"]["chosen heads"][0] == pytest.approx(100 * (chosen - host))
    before = (tmp_path / "attention_calibration" / "cities-0.json").stat().st_mtime_ns
    second = proof.prove(model, LetterTokenizer(), seeds=[0, 1], **settings)
    assert (tmp_path / "attention_calibration" / "cities-0.json").stat().st_mtime_ns == before
    assert second["seeds"] == [0, 1]
    table = (tmp_path / "attention_calibration.md").read_text()
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:5]] == ["cities", "letters", "all tasks"]
    for name in ("attention_calibration.png", "attention_calibration_sinks.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300


def test_questions_are_fit_to_be_asked(proof):
    tasks = sys.modules["fact_questions"].TASKS
    for name, task in tasks.items():
        questions = task(0)
        assert len(questions) >= 346, name  # 96 to choose heads on, 250 to answer
        assert len({question.prompt for question in questions}) == len(questions)
        assert all(len(set(question.options)) == 4 for question in questions)
        assert questions == task(0) != task(1)
        places = [question.answer for question in questions]
        assert min(places.count(place) for place in range(4)) > 0.15 * len(places)  # no place betrays the answer
    calibration, test = proof.split("cities", 0, proof.Recipe())
    assert not {question.prompt for question in calibration} & {question.prompt for question in test}
    assert Choice("Question: In which country is Nairobi?\nAnswer:", (" Kenya", " Chad"), 0).prompt in {
        question.prompt for question in tasks["cities"](0)
    }


def test_interval_is_of_the_paired_difference(proof):
    questions = [str(i) for i in range(200)]
    host, with_act = [i % 2 == 0 for i in range(200)], [True] * 150 + [False] * 50
    runs = [{"task": "a", "questions": questions, "right": {"host": host, "x": with_act}}]
    mean, low, high = proof.interval(runs, "x", 4000)
    assert mean == pytest.approx(25.0)
    gains = 100 * (np.array(with_act, float) - np.array(host, float))
    by_hand = 1.96 * gains.std() / math.sqrt(200)
    assert (high - low) / 2 == pytest.approx(by_hand, rel=0.1)
    twice = proof.interval(runs * 2, "x", 4000)  # the same questions again are no new evidence
    assert (twice[2] - twice[1]) == pytest.approx(high - low, rel=0.1)


# ---- pictures


def test_sink_map_and_picture(tmp_path):
    model = distracted_model()
    words = "x0 x1 c4 x2 x3 ! x1 x0 x2 ?"
    ids = torch.tensor([WordTokenizer()(words)["input_ids"]])
    found = sink_map(model, ids)
    assert found.received.shape == (2, 2, 11)
    assert found.sinks[1, 1, 6]  # "!" in the head that it holds
    assert found.sinks[1, 0, 3]  # the content word in the head that copies it
    weights = model.set_attn_implementation("eager") or model(ids, output_attentions=True).attentions[1][0, 1]
    rows = torch.arange(11, 0, -1)
    torch.testing.assert_close(found.received[1, 1], weights.sum(0) / rows, atol=1e-5, rtol=0)
    plain = plot_sinks(found, tmp_path / "plain.png")
    framed = plot_sinks(found, tmp_path / "sinks.png", tokens=["<bos>", *words.split()], heads={1: [1]})
    with Image.open(plain) as first, Image.open(framed) as second:
        assert min(first.size) > 300
        reds = [(r > 180 and g < 60 and b < 90) for r, g, b in _pixels(second)]
        assert sum(reds) > sum((r > 180 and g < 60 and b < 90) for r, g, b in _pixels(first)) + 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.png", "sinks.png"]
    with pytest.raises(ValueError, match="tokens must name the 11"):
        plot_sinks(found, tmp_path / "no.png", tokens=["a"])
    with pytest.raises(ValueError, match=r"one text \(1, tokens\)"):
        sink_map(model, ids.repeat(2, 1))


def _pixels(image):
    return np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()
