"""Softplus attention: its formulas, its fast path against them, and the door into transformers."""

import importlib
import math
import warnings

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import shared_kernels
from llm_attn.softplus_attention import (
    SoftplusConfig,
    apply_softplus,
    cosines,
    set_softplus_power,
    softmax_logn_attention,
    softplus_attention,
    softplus_weights,
)
from llm_attn.testing import DoorTests, tiny_model, tokens
from llm_attn.transformers.power_warm_up import PowerWarmUp
from llm_attn.transformers.visibility import Visibility

MODULE = importlib.import_module("llm_attn.softplus_attention")  # the package's face has the function by this name
B, H, HKV, NQ, NK, D, E = 2, 4, 2, 19, 23, 12, 10
POWERS = (None, 3.0, 15.0, 2.5)


def random_qkv(*, dtype=torch.float64, seed=0, queries=NQ, keys=NK, heads=HKV):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, queries, D), (B, heads, keys, D), (B, heads, keys, E))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def padding(*, left=0, right=0, keys=NK):
    """The second row of the batch lacks keys, the first has all."""
    mask = torch.ones(B, keys, dtype=torch.bool)
    mask[1, :left] = False
    mask[1, keys - right :] = False
    return mask


SEEN = {
    "causal": {},
    "left padding": {"key_mask": padding(left=6)},
    "right padding": {"key_mask": padding(right=5)},
    "window": {"window": 7},
    "window and padding": {"window": 5, "key_mask": padding(left=8)},
}


def seen_mask(*, queries=NQ, keys=NK, **seen):
    return Visibility(**seen).dense(queries, keys, torch.device("cpu"))


def loop(query, key, value, seen, power):
    """The paper's formulas for one row after another, as they are printed."""
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype)
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                allowed = seen.expand(query.shape[0], -1, -1, -1)[b, 0, i].nonzero()[:, 0]
                n = len(allowed)
                if n == 0:
                    continue
                q, k = query[b, h, i], key[b, h // group, allowed]
                z = math.log(len(q)) * math.log(n) * (k @ q) / (k.norm(dim=-1) * q.norm())
                a = torch.log1p(z.exp())
                a = a / a.sum()
                if power is not None:
                    u = (n * a - (0 if n <= 3 else 1)).clamp(min=0) ** power
                    a = u / u.sum()
                out[b, h, i] = a @ value[b, h // group, allowed]
    return out


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN.keys())
def test_definition_and_fast_path_are_the_papers_formulas(seen, power):
    q, k, v = random_qkv()
    mask = seen_mask(**seen)
    wanted = loop(q, k, v, mask, power)
    dense = softplus_weights(q, k, mask, power=power) @ v.repeat_interleave(H // HKV, 1)
    assert (dense - wanted).abs().max() < 1e-12
    assert (softplus_attention(q, k, v, power=power, **seen) - wanted).abs().max() < 1e-12
    assert (softplus_attention(q, k, v, power=power, mask=mask) - wanted).abs().max() < 1e-12
    single = softplus_attention(*(t.float() for t in (q, k, v)), power=power, **seen)
    assert (single - wanted).abs().max() < (5e-5 if power == 15 else 2e-5)


def test_every_key_may_be_seen():
    q, k, v = random_qkv()
    mask = torch.ones(1, 1, NQ, NK, dtype=torch.bool)
    wanted = loop(q, k, v, mask, 3.0)
    assert (softplus_attention(q, k, v, power=3.0, causal=False) - wanted).abs().max() < 1e-12
    assert (wanted - softplus_attention(q, k, v, power=3.0)).abs().max() > 0.1


def test_rows_sum_to_one_and_nothing_below_the_mean_is_kept():
    q, k, _ = random_qkv()
    seen = seen_mask(queries=NK, keys=NK)
    q = torch.cat([q, q[:, :, : NK - NQ]], 2)
    a, w = (softplus_weights(q, k, seen, power=power) for power in (None, 15.0))
    count = seen.sum(-1, keepdim=True)
    for weights in (a, w):
        assert (weights.sum(-1) - 1).abs().max() < 1e-12
    below = (a <= 1 / count) & (count > 3) & seen
    assert below.any()
    assert (w[below] == 0).all()
    first = seen[0, 0].sum(-1) <= 3
    assert ((w > 0) == seen)[:, :, first].all()  # the first three rows keep every key
    assert (w[:, :, ~first] > 0).sum() < seen.sum() * B * H / 2


def test_lengths_of_query_and_key_do_not_matter():
    q, k, v = random_qkv()
    wanted = softplus_attention(q, k, v)
    assert (softplus_attention(3 * q, 0.1 * k, v) - wanted).abs().max() < 1e-12


def test_a_large_power_picks_the_nearest_key():
    q, k, _ = random_qkv()
    seen = seen_mask()
    weights = softplus_weights(q, k, seen, power=400.0)
    top = cosines(q, k).masked_fill(~seen, -2).topk(2)
    clear = top.values[..., 0] - top.values[..., 1] > 0.2
    assert clear.sum() > 20
    assert (weights.gather(-1, top.indices[..., :1])[..., 0][clear] > 0.99).all()


def test_power_one_over_short_rows_is_the_first_stage():
    q, k, _ = random_qkv()
    seen = seen_mask(window=3)  # no row has more than three keys, so every threshold is 0
    one, none = (softplus_weights(q, k, seen, power=power) for power in (1.0, None))
    assert (one - none).abs().max() < 1e-14


@pytest.mark.parametrize("power", [None, 3.0, 15.0])
@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN.keys())
def test_gradients_are_those_of_the_definition(seen, power):
    q, k, v = (t.requires_grad_() for t in random_qkv())
    mask = seen_mask(**seen)
    weight = torch.randn(B, H, NQ, E, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def gradients(out):
        return torch.autograd.grad((out * weight).sum(), (q, k, v))

    wanted = gradients(softplus_weights(q, k, mask, power=power) @ v.repeat_interleave(H // HKV, 1))
    fast = gradients(softplus_attention(q, k, v, power=power, **seen))
    masked = gradients(softplus_attention(q, k, v, power=power, mask=mask))
    for f, m, w in zip(fast, masked, wanted, strict=True):
        assert w.abs().max() > 1e-3
        assert (f - w).abs().max() < 1e-10 * max(1, w.abs().max())
        assert (m - w).abs().max() < 1e-10 * max(1, w.abs().max())


def test_keys_below_the_mean_still_learn():
    q, k, v = random_qkv(queries=NK)
    k.requires_grad_()
    weights = softplus_weights(q, k, seen_mask(queries=NK), power=15.0)
    (weights @ v.repeat_interleave(2, 1)).pow(2)[:, :, -1].sum().backward()
    unused = (weights[:, :, -1].view(B, HKV, 2, NK) == 0).all(2)
    assert unused.sum() > NK
    assert (k.grad.abs().sum(-1)[unused] > 1e-9).all()


@pytest.mark.parametrize("path", ["fast", "mask"])
def test_equal_keys_and_shortest_rows_stay_finite(path):
    q, k, v = (t.float() for t in random_qkv(queries=NK))
    k = k[:, :, :1].expand_as(k).clone()
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    seen = {} if path == "fast" else {"mask": seen_mask(queries=NK)}
    out = softplus_attention(q, k, v, **seen)
    means = v.detach().cumsum(2) / torch.arange(1, NK + 1)[:, None]
    assert (out - means.repeat_interleave(2, 1)).abs().max() < 1e-5  # equal scores: the mean of the values
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    one = softplus_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1])
    assert torch.equal(one, v[:, :, :1].repeat_interleave(2, 1))


@pytest.mark.parametrize("path", ["fast", "mask"])
def test_rows_without_keys_and_padding_that_is_nan(path):
    q, k, v = (t.float() for t in random_qkv())
    keep = padding(left=NK)
    keep[0, :6] = False
    k[0, :, :6], v[0, :, :6] = torch.nan, torch.nan
    k, v = k.requires_grad_(), v.requires_grad_()
    seen = {"key_mask": keep} if path == "fast" else {"mask": seen_mask(key_mask=keep)}
    out = softplus_attention(q, k, v, **seen)
    assert (out[1] == 0).all()
    assert (out[0, :, 2:].abs().sum(-1) > 0).all()
    out.sum().backward()
    assert out.isfinite().all()
    assert k.grad.isfinite().all()
    assert (v.grad[1] == 0).all()


def test_no_tokens():
    q, k, v = random_qkv()
    assert softplus_attention(q[:, :, :0], k, v).shape == (B, H, 0, E)
    assert softplus_attention(q[:, :, :0], k, v, mask=seen_mask()[:, :, :0]).shape == (B, H, 0, E)
    assert (softplus_attention(q, k[:, :, :0], v[:, :, :0], causal=False) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_row_with_one_key_that_fits(dtype):
    length = 8192
    q = torch.zeros(1, 1, 1, 64, dtype=dtype)
    q[..., 0] = 7
    k = -q.expand(1, 1, length, 64).clone()
    k[:, :, 1234] *= -1
    v = torch.zeros(1, 1, length, 16, dtype=dtype)
    v[:, :, 1234] = 1
    out = softplus_attention(q, k, v)
    assert out.isfinite().all()
    assert (out.float() > 0.999).all()


def test_half_precision_is_as_good_as_its_inputs():
    """Cosines of rounded unit vectors, all after them in float32: no worse than twice the formulas on such vectors."""
    exact = random_qkv(dtype=torch.float64)
    for power in (3.0, 15.0):
        truth = softplus_attention(*exact, power=power)
        low = [t.bfloat16() for t in exact]
        naive_weights = softplus_weights(
            *(F.normalize(t.double(), dim=-1).bfloat16().double() for t in low[:2]), seen_mask(), power=power
        )
        naive = naive_weights @ low[2].double().repeat_interleave(2, 1)
        ours = softplus_attention(*low, power=power)
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - truth).norm() < 2 * (naive - truth).norm() + 2**-8 * truth.norm()


def test_chunks_of_rows_are_the_whole(monkeypatch):
    q, k, v = random_qkv()
    wanted = softplus_attention(q, k, v, mask=seen_mask())
    monkeypatch.setattr(MODULE, "CHUNK", 5 * B * H * NK)
    monkeypatch.setattr(MODULE, "FEWEST_ROWS", 1)
    parts = []
    some_rows = MODULE._some_rows
    monkeypatch.setattr(MODULE, "_some_rows", lambda *given: parts.append(given[0].shape[2]) or some_rows(*given))
    assert (softplus_attention(q, k, v, mask=seen_mask()) - wanted).abs().max() < 1e-14
    assert parts == [5, 5, 5, 4]


def test_dropout_is_unbiased_and_follows_the_seed():
    q, k, v = random_qkv()
    wanted = softplus_attention(q, k, v, power=None)
    torch.manual_seed(0)
    draws = torch.stack([softplus_attention(q, k, v, power=None, dropout=0.3) for _ in range(100)])
    assert (draws.mean(0) - wanted).abs().max() < 6 * (draws.std(0) / 100**0.5).max()
    torch.manual_seed(0)
    assert torch.equal(softplus_attention(q, k, v, power=None, dropout=0.3), draws[0])
    assert not torch.equal(draws[0], draws[1])
    # what the gradient makes anew drops the same weights
    torch.manual_seed(0)
    v.requires_grad_()
    out = softplus_attention(q, k, v, power=None, dropout=0.3)
    (gradient,) = torch.autograd.grad(out.sum(), v)
    assert float((gradient * v).sum().detach()) == pytest.approx(float(out.sum().detach()), abs=1e-9)


@pytest.mark.parametrize("power", [None, 15.0])
def test_peak_memory_is_linear(power):
    """What one call allocates at a time, over 4,096 tokens, is below a tenth of one map of scores."""
    heads, length = 4, 4096
    q, k, v = (torch.randn(1, heads, length, 32) for _ in range(3))
    peak = allocated_peak(lambda: softplus_attention(q, k, v, power=power))
    assert peak < 0.1 * heads * length * length * 4


def test_peak_memory_with_a_mask_is_linear(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK", 1)
    peaks = []
    for length in (512, 1024):
        q, k, v = (torch.randn(1, 1, length, 32) for _ in range(3))
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril_()
        peaks.append(allocated_peak(lambda q=q, k=k, v=v, mask=mask: softplus_attention(q, k, v, mask=mask)))
    assert peaks[1] < 2.2 * peaks[0]
    assert peaks[1] < 1024 * 1024 * 4


def allocated_peak(function):
    """Bytes of CPU tensors alive at once, above what was there before, by the profiler's account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert peak > 0
    return peak


def test_control_is_softmax_of_the_same_scores():
    q, k, v = random_qkv()
    for seen in SEEN.values():
        mask = seen_mask(**seen)
        scores = math.log(D) * mask.sum(-1, keepdim=True).clamp(min=1).double().log() * cosines(q, k)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
        wanted = weights @ v.repeat_interleave(2, 1)
        assert (softmax_logn_attention(q, k, v, Visibility(**seen)) - wanted).abs().max() < 1e-12
        assert (softmax_logn_attention(q, k, v, Visibility(mask=mask)) - wanted).abs().max() < 1e-12


REFUSED = {
    "power below 1": ({"power": 0.5}, ValueError, "power must be a number of at least 1, or None"),
    "power nan": ({"power": math.nan}, ValueError, "power must be"),
    "window without causal": ({"causal": False, "window": 3}, ValueError, "window needs causal=True"),
    "the same with dropout": ({"causal": False, "window": 3, "dropout": 0.1}, ValueError, "window needs causal=True"),
    "mask and window": ({"mask": seen_mask(), "window": 3}, ValueError, "give it alone"),
    "mask of other length": ({"mask": seen_mask(queries=4)}, ValueError, r"mask must be bool \(1 or 2, 1, 19, 23\)"),
    "additive mask": ({"mask": seen_mask().double()}, ValueError, "mask must be bool"),
    "dropout of 1": ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\)"),
    "key mask of other length": ({"key_mask": padding(keys=5)}, ValueError, "key_mask must have shape"),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(changes, error, message):
    with pytest.raises(error, match=message):
        softplus_attention(*random_qkv(), **changes)


@pytest.mark.parametrize("seen", [{}, {"mask": seen_mask()}], ids=["fast", "mask"])
def test_wrong_head_counts(seen):
    q, k, v = random_qkv(heads=3)
    with pytest.raises(ValueError, match="heads of query must be a multiple of those of key, got 4 and 3"):
        softplus_attention(q, k, v, **seen)


def test_config_refuses():
    with pytest.raises(ValueError, match="power must be a number of at least 1"):
        SoftplusConfig(power=0)
    with pytest.raises(ValueError, match="mode must be one of softplus, softmax_logn, got 'relu'"):
        SoftplusConfig(mode="relu")


# ---- the door


class TestSoftplusDoor(DoorTests):
    attention = "softplus"

    def apply(self, model):
        return apply_softplus(model)


class TestSoftmaxLognDoor(DoorTests):
    families = ("llama", "mistral")
    compiled = False  # the same door

    def apply(self, model):
        return apply_softplus(model, SoftplusConfig(mode="softmax_logn"))


def logits(model, ids, **given):
    with torch.no_grad():
        return model(input_ids=ids, **given).logits


def test_the_door_runs_the_definition(monkeypatch):
    ids = tokens(2, 17)
    padded = torch.ones_like(ids)
    padded[1, :5] = 0
    model = tiny_model("mistral", sliding_window=9)
    apply_softplus(model, SoftplusConfig(power=3.0))
    fast = logits(model, ids, attention_mask=padded)
    seen = []

    def dense(query, key, value, *, power, window, key_mask, mask, dropout):
        seen.append((power, window))
        allowed = Visibility(window=window, key_mask=key_mask, mask=mask).dense(17, 17, query.device)
        return softplus_weights(query, key, allowed, power=power) @ value.repeat_interleave(2, 1)

    monkeypatch.setattr(MODULE, "softplus_attention", dense)
    assert (logits(model, ids, attention_mask=padded) - fast)[padded.bool()].abs().max() < 2e-5 * fast.abs().max()
    assert seen == [(3.0, 9)] * 2


def test_power_can_be_changed_and_is_saved(tmp_path):
    ids = tokens(1, 21)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="call apply_softplus first"):
        set_softplus_power(model, 3)
    with apply_softplus(model):
        fifteen = logits(model, ids)
        set_softplus_power(model, 3)
        three = logits(model, ids)
        with pytest.raises(ValueError, match="power must be"):
            set_softplus_power(model, 0.5)
        model.save_pretrained(tmp_path)
    with apply_softplus(model, SoftplusConfig(power=3)):
        assert torch.equal(logits(model, ids), three)
    assert (fifteen - three).abs().max() > 1e-3
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), three)


def test_power_of_some_layers(tmp_path):
    ids = tokens(1, 21)
    model = tiny_model("llama")
    with apply_softplus(model, layers=[1]) as handle:
        assert handle.layers_changed == (1,)
        some = logits(model, ids)
        set_softplus_power(model, None)
        assert (logits(model, ids) - some).abs().max() > 1e-3
        one_stage = logits(model, ids)
    with apply_softplus(model, SoftplusConfig(power=None), layers=[1]):
        assert torch.equal(logits(model, ids), one_stage)


def test_power_warms_up_in_a_trainer(tmp_path):
    warm_up = PowerWarmUp(steps=2, start=1.0, end=9.0)
    assert [warm_up.power(step) for step in (0, 1, 2, 50)] == [1, 3, 9, 9]
    model = tiny_model("llama")
    apply_softplus(model)
    powers = []
    model.register_forward_pre_hook(
        lambda *_: powers.append(model.model.layers[1].self_attn.llm_attn["softplus"].power)
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 9)]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[warm_up]).train()
    assert powers == [1, 3, 9]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        PowerWarmUp(steps=0)
    with pytest.raises(ValueError, match="1 <= start <= end, got 9 and 3"):
        PowerWarmUp(steps=4, start=9, end=3)


def test_switching_it_on_for_a_softmax_checkpoint_warns(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "softmax")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax")
    with pytest.warns(UserWarning, match="does not improve a model that was trained with softmax attention"):
        apply_softplus(loaded)
    chosen = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax", attn_implementation="softplus")
    with pytest.warns(UserWarning, match=f"weights loaded from '{tmp_path / 'softmax'}'"):
        logits(chosen, tokens(1, 5))


def test_no_warning_where_softplus_was_trained(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny_model("llama")
        apply_softplus(model)
        model.save_pretrained(tmp_path / "softplus")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "softplus")
        assert torch.equal(logits(again, tokens(1, 9)), logits(model, tokens(1, 9)))
        logits(tiny_model("llama", attn_implementation="softplus"), tokens(1, 5))


def test_capped_scores_are_refused():
    model = tiny_model("gemma2", attn_logit_softcapping=50.0)
    apply_softplus(model)
    with pytest.raises(ValueError, match="softplus does not support capped scores"):
        logits(model, tokens(1, 5))


def test_wrong_config():
    with pytest.raises(TypeError, match="config must be a SoftplusConfig, got float"):
        apply_softplus(tiny_model("llama"), 3.0)


def test_the_reference_backend_agrees():
    ids = tokens(2, 19)
    model = tiny_model("qwen3")
    apply_softplus(model)
    fast = logits(model, ids)
    with shared_kernels.backend("reference"):
        assert (logits(model, ids) - fast).abs().max() < 2e-5 * fast.abs().max()
