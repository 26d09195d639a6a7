"""Lightning Attention: the operator against its recurrence, what each query may see, the layer, and the door."""

import math
import sys
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from llm_attn.lightning_attention import (
    BLOCK,
    LightningAttention,
    LightningConfig,
    apply_lightning,
    continue_lightning_attention,
    decay_slopes,
    lightning_attention,
    lightning_attention_quadratic,
    visible_attention,
)
from llm_attn.testing import DoorTests, tiny_model, tokens
from llm_attn.transformers.visibility import Visibility

B, H, HKV, D, E = 2, 4, 2, 16, 24
SLOPES = decay_slopes(H)


def random_qkv(length, *, queries=None, dtype=torch.float64, seed=0, batch=B):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, H, queries or length, D), (batch, HKV, length, D), (batch, HKV, length, E))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def recurrence(query, key, value, slopes, state=None):
    """The definition, token after token."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    state = query.new_zeros(*query.shape[:2], query.shape[3], value.shape[3]) if state is None else state
    out = []
    for t in range(query.shape[2]):
        state = torch.exp(-slopes)[:, None, None] * state + key[:, :, t, :, None] * value[:, :, t, None, :]
        out.append(torch.einsum("bhd,bhde->bhe", query[:, :, t], state))
    return torch.stack(out, 2), state


def error(found, right):
    return (found - right).norm() / right.norm()


# ---- the operator


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_chunks_and_quadratic_form_are_the_recurrence(length):
    q, k, v = random_qkv(length)
    right, last = recurrence(q, k, v, SLOPES.double())
    out, state = lightning_attention(q, k, v, SLOPES, return_state=True)
    torch.testing.assert_close(out, right, atol=1e-11, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-11, rtol=0)
    torch.testing.assert_close(lightning_attention_quadratic(q, k, v, SLOPES), right, atol=1e-11, rtol=0)
    scaled = lightning_attention(q, k, v, SLOPES, scale=0.3)
    torch.testing.assert_close(scaled, 0.3 * right, atol=1e-11, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype, bound):
    q, k, v = random_qkv(150, dtype=dtype)
    right, _ = recurrence(q.double(), k.double(), v.double(), SLOPES.double())
    out, state = lightning_attention(q, k, v, SLOPES, return_state=True)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    assert error(out.double(), right) < bound


@pytest.mark.parametrize("cut", [1, 16, 32, 64, 128, 149])
def test_any_cut_gives_the_same(cut):
    q, k, v = random_qkv(150)
    whole, last = lightning_attention(q, k, v, SLOPES, return_state=True)
    first, state = lightning_attention(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], SLOPES, return_state=True)
    then, state = continue_lightning_attention(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], SLOPES, state)
    torch.testing.assert_close(torch.cat([first, then], 2), whole, atol=1e-11, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-11, rtol=0)


def test_steps_are_the_chunks():
    q, k, v = random_qkv(37)
    whole = lightning_attention(q, k, v, SLOPES)
    state, out = None, []
    with torch.no_grad():
        for t in range(37):
            one, state = continue_lightning_attention(
                q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], SLOPES, state
            )
            out.append(one)
    torch.testing.assert_close(torch.cat(out, 2), whole, atol=1e-11, rtol=0)


def test_a_step_overwrites_the_state_only_without_gradients():
    q, k, v = random_qkv(1)
    state = torch.randn(B, H, D, E, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    kept = state.clone()
    out, after = continue_lightning_attention(q, k, v, SLOPES, state)
    assert torch.equal(state, kept)
    with torch.no_grad():
        again, overwritten = continue_lightning_attention(q, k, v, SLOPES, state)
    assert overwritten is state
    torch.testing.assert_close(state, after, atol=1e-12, rtol=0)
    torch.testing.assert_close(again, out, atol=1e-12, rtol=0)


def test_gradients_with_both_states():
    q, k, v = (t.requires_grad_() for t in random_qkv(75))
    initial = torch.randn(B, H, D, E, dtype=torch.float64, requires_grad=True)
    weights, for_state = torch.randn(B, H, 75, E).double(), torch.randn(B, H, D, E).double()

    def gradients(out, state):
        return torch.autograd.grad((out * weights).sum() + (state * for_state).sum(), (q, k, v, initial))

    right = gradients(*recurrence(q, k, v, SLOPES.double(), initial))
    found = gradients(*lightning_attention(q, k, v, SLOPES, initial_state=initial, return_state=True))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_no_decay_and_total_decay():
    q, k, v = random_qkv(70)
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ keys.mT
    never = lightning_attention(q, k, v, torch.zeros(H))
    torch.testing.assert_close(never, scores.tril() @ values, atol=1e-11, rtol=0)
    at_once = lightning_attention(q, k, v, torch.full((H,), 50.0))
    torch.testing.assert_close(at_once, scores.diagonal(dim1=2, dim2=3)[..., None] * values, atol=1e-6, rtol=0)


def test_packed_sequences_are_separate():
    q, k, v = random_qkv(100, batch=1)
    ends = torch.tensor([0, 13, 13, 77, 100], dtype=torch.int32)
    out, states = lightning_attention(q, k, v, SLOPES, cu_seqlens=ends, return_state=True)
    for i, (start, end) in enumerate([(0, 13), (13, 13), (13, 77), (77, 100)]):
        part = [t[:, :, start:end] for t in (q, k, v)]
        alone, state = lightning_attention(*part, SLOPES, return_state=True)
        torch.testing.assert_close(out[:, :, start:end], alone, atol=1e-12, rtol=0)
        torch.testing.assert_close(states[i], state[0], atol=1e-12, rtol=0)
    k2 = k.clone()
    k2[:, :, 20] += 1
    changed = lightning_attention(q, k2, v, SLOPES, cu_seqlens=ends)
    same = (changed == out).all(-1).all(1)[0]
    assert same[:20].all()
    assert same[77:].all()
    assert not same[20:77].any()


def test_later_tokens_change_nothing_before_them():
    q, k, v = random_qkv(90, dtype=torch.float32)
    out = lightning_attention(q, k, v, SLOPES)
    for t in (0, 40, 89):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t] += 3
        assert torch.equal(lightning_attention(*changed, SLOPES)[:, :, :t], out[:, :, :t])


def test_work_is_proportional_to_the_tokens():
    def count(length):
        q, k, v = random_qkv(length, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            lightning_attention(q, k, v, SLOPES)
        return counter.get_total_flops()

    assert count(8192) == 4 * count(2048) > 0


def test_slopes():
    assert decay_slopes(4).tolist() == [0.25, 0.0625, 0.015625, 0.00390625]
    twelve = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.7071, 0.3536, 0.1768, 0.0884]
    torch.testing.assert_close(decay_slopes(12), torch.tensor(twelve), atol=5e-5, rtol=0)
    base = decay_slopes(8)
    for layer, factor in ((0, 1 + 1e-5), (3, 1 - 3 / 23 + 1e-5), (23, 1e-5)):
        scaled = decay_slopes(8, layer=layer, num_layers=24)
        torch.testing.assert_close(scaled, base * factor, atol=1e-9, rtol=1e-5)
    rates = [h * (1 - 2 / 5) for h in range(8)]
    torch.testing.assert_close(decay_slopes(8, layer=2, num_layers=5, decay="paper"), torch.tensor(rates))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "num_heads >= 1"),
        ({"num_heads": 2, "layer": 3, "num_layers": 3}, "layer < num_layers, got 2, 3 and 3"),
        ({"num_heads": 2, "decay": "learned"}, "decay must be 'alibi' or 'paper', got 'learned'"),
    ],
)
def test_slopes_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        decay_slopes(**arguments)


# ---- what each query may see

padded = torch.ones(B, 53, dtype=torch.bool)
padded[1, :9] = False
padded[0, 50:] = False
SEEN = {
    "all": Visibility(),
    "padding": Visibility(key_mask=padded),
    "window": Visibility(window=7),
    "window and padding": Visibility(window=30, key_mask=padded),
}


@pytest.mark.parametrize("queries", [1, 20, 53])
@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN.keys())
def test_every_way_of_seeing(seen, queries, monkeypatch):
    """Against the sum over the keys that are seen, decayed by their distance in tokens."""
    monkeypatch.setattr(sys.modules[visible_attention.__module__], "BLOCK", 11)
    q, k, v = random_qkv(53, queries=queries)
    mask = seen.dense(queries, 53, torch.device("cpu"))
    place = torch.arange(53)
    age = (place[-queries:, None] - place).clamp(min=0)
    if queries == 1 and seen.key_mask is not None:  # an unwritten slot of a static cache looks like right padding
        age = (mask * place).amax(-1, keepdim=True) - place
    weights = torch.exp(-SLOPES.double()[:, None, None] * age) * mask
    right = (q @ k.repeat_interleave(2, 1).mT * weights) @ v.repeat_interleave(2, 1)
    found = visible_attention(q, k, v, SLOPES, seen)
    torch.testing.assert_close(found, right, atol=1e-11, rtol=0)
    if seen.key_mask is None:
        masked = visible_attention(q, k, v, SLOPES, Visibility(mask=mask))
        torch.testing.assert_close(masked, right, atol=1e-11, rtol=0)


def test_a_window_never_makes_all_scores():
    q, k, v = random_qkv(4 * BLOCK, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        visible_attention(q, k, v, SLOPES, Visibility(window=5))
    assert counter.get_total_flops() <= 2 * B * H * 4 * BLOCK * (BLOCK + 5) * (D + E)


def test_rows_that_see_nothing_are_zero():
    q, k, v = random_qkv(20)
    none = torch.zeros(B, 20, dtype=torch.bool)
    for seen in (Visibility(key_mask=none), Visibility(key_mask=none, window=4), Visibility(mask=none[:, None, None])):
        assert not visible_attention(q, k, v, SLOPES, seen).any()
    assert not visible_attention(q[:, :, :1], k, v, SLOPES, Visibility(key_mask=none)).any()


def test_nan_in_padding_stays_there():
    q, k, v = random_qkv(53, dtype=torch.float32)
    right = visible_attention(q, k, v, SLOPES, Visibility(key_mask=padded))
    k[1, :, :9], v[0, :, 50:] = torch.nan, torch.inf
    assert torch.equal(visible_attention(q, k, v, SLOPES, Visibility(key_mask=padded)), right)


# ---- the layer


def tiny_layer():
    torch.manual_seed(0)
    return LightningAttention(24, 3, layer=1, num_layers=4).double()


def test_layer_is_its_formula():
    layer, x = tiny_layer(), torch.randn(2, 11, 24).double()
    heads = [
        F.silu(x @ p.weight.T).view(2, 11, 3, 8).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    ]
    factor = 1 - 1 / 3 + 1e-5
    slopes = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]).double() * factor
    mixed, last = recurrence(*heads, slopes.float().double())
    mixed = mixed.transpose(1, 2).reshape(2, 11, 24)
    centred = mixed - mixed.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    gate = 1 / (1 + torch.exp(-x @ layer.gate[0].weight.T @ layer.gate[1].weight.T))
    out, state = layer(x)
    torch.testing.assert_close(out, gate * normed @ layer.out_proj.weight.T, atol=1e-11, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-11, rtol=0)


def test_layer_continues_packs_and_pads():
    layer, x = tiny_layer(), torch.randn(1, 30, 24).double()
    whole, last = layer(x)
    with torch.no_grad():
        first, state = layer(x[:, :17])
        parts = [first]
        for part in (x[:, 17:29], x[:, 29:]):
            out, state = layer(part, state)
            parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-11, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-11, rtol=0)
    packed, states = layer(torch.cat([x, x[:, :5]], 1), cu_seqlens=torch.tensor([0, 30, 35], dtype=torch.int32))
    torch.testing.assert_close(packed[:, :30], whole, atol=1e-11, rtol=0)
    torch.testing.assert_close(packed[:, 30:], whole[:, :5], atol=1e-11, rtol=0)
    torch.testing.assert_close(states[:1], last, atol=1e-11, rtol=0)
    mask = torch.arange(34)[None] >= 4
    shifted, _ = layer(torch.cat([torch.full((1, 4, 24), torch.nan).double(), x], 1), mask=mask)
    torch.testing.assert_close(shifted[:, 4:], whole, atol=1e-11, rtol=0)
    with pytest.raises(ValueError, match="packed sequences begin anew"):
        layer(x, state, cu_seqlens=torch.tensor([0, 30], dtype=torch.int32))


def test_slopes_survive_casts_and_stay_out_of_checkpoints():
    layer = LightningAttention(24, 3, layer=1, num_layers=4)
    right = layer.decay().clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.decay(), right)
    assert layer.q_proj.weight.dtype == torch.bfloat16
    assert not [name for name in layer.state_dict() if "slopes" in name]
    with pytest.raises(ValueError, match="multiple of num_heads, got 24 and 5"):
        LightningAttention(24, 5)


# ---- the door


class TestLightningDoor(DoorTests):
    attention = "lightning"

    def apply(self, model):
        return apply_lightning(model)


def naive(module, query, key, value, attention_mask, scaling=None, **_):
    """What the door computes, by all scores of all heads, for a prompt without padding."""
    place = torch.arange(query.shape[2])
    rate = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]) * (1 - module.layer_idx + 1e-5)  # two layers
    weights = torch.exp(-rate[:, None, None] * (place[:, None] - place)).tril()
    scores = F.silu(query) @ F.silu(key).repeat_interleave(2, 1).mT * scaling * weights
    out = (scores @ value.repeat_interleave(2, 1)).transpose(1, 2)
    size = out.square().mean((2, 3), keepdim=True)
    return out / (size + 1e-6).sqrt(), None


def test_door_is_its_formula():
    AttentionInterface.register("naive_lightning_of_the_tests", naive)
    AttentionMaskInterface.register("naive_lightning_of_the_tests", eager_mask)
    x = tokens(2, 23)
    with torch.no_grad():
        model = tiny_model("llama")
        softmax = model(x).logits
        with apply_lightning(model) as handle:
            found = model(x).logits
        assert handle.layers_changed == (0, 1)
        model.set_attn_implementation("naive_lightning_of_the_tests")
        right = model(x).logits
    torch.testing.assert_close(found, right, atol=2e-5 * right.abs().max().item(), rtol=0)
    assert (softmax - right).abs().max() > 0.1 * right.abs().max()


def test_settings_reach_the_layers():
    x = tokens(1, 19)
    seen = []
    with torch.no_grad():
        for changes in ({}, {"decay": "paper"}, {"activation": "none"}, {"norm_eps": None}, {"norm_eps": 10.0}):
            model = tiny_model("llama")
            with apply_lightning(model, LightningConfig(**changes)):
                seen.append(model(x).logits)
        model = tiny_model("llama")
        with apply_lightning(model, layers=[1]) as handle:
            assert handle.layers_changed == (1,)
            seen.append(model(x).logits)
    for i, one in enumerate(seen):
        assert not [j for j in range(i) if torch.allclose(one, seen[j], atol=1e-3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": "learned"}, "decay must be one of alibi, paper, got 'learned'"),
        ({"activation": "relu"}, "activation must be silu or none, got 'relu'"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, or None for no norm, got 0.0"),
        ({"norm_eps": math.nan}, "norm_eps must be positive"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        LightningConfig(**changes)


def test_door_refuses():
    with pytest.raises(TypeError, match="config must be a LightningConfig, got dict"):
        apply_lightning(tiny_model("llama"), {"decay": "alibi"})
    model = tiny_model("llama", attention_dropout=0.1).train()
    with apply_lightning(model), pytest.raises(ValueError, match="set attention_dropout=0"):
        model(tokens(1, 5))


def test_warns_on_loaded_weights_unless_saved_with_it(tmp_path):
    from transformers import AutoModelForCausalLM

    softmax, trained = tmp_path / "softmax", tmp_path / "lightning"
    model = tiny_model("llama")
    model.save_pretrained(softmax)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lightning(model)
        model.save_pretrained(trained)
        AutoModelForCausalLM.from_pretrained(trained)(tokens(1, 5))
    with pytest.warns(UserWarning, match="trained with softmax attention give nonsense"):
        apply_lightning(AutoModelForCausalLM.from_pretrained(softmax))
    with pytest.warns(UserWarning, match="trained with softmax attention give nonsense"):
        AutoModelForCausalLM.from_pretrained(softmax, attn_implementation="lightning")(tokens(1, 5))
