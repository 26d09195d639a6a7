"""l1_attention: attention weights from softplus instead of exp, l1-normalised, and sharpened above the row's mean.

Softplus attention with re-weighting (LSSA, LSSAR; Gao, Spratling and Gionfrida, "Softplus Attention with Re-weighting
Boosts Length Extrapolation in Large Language Models", arXiv:2501.13428). It holds its loss at many times the training
length, and costs more than softmax attention: it is a choice made for training, not a faster kernel.

Decided here: the row's number of keys N is counted over the keys that it may see, so that padding, packing and cached
decoding agree; its first re-weighting threshold is 0 up to N = 3, by count. Rows whose excess over the mean is nothing
but rounding (all scores equal) keep the weights of the first stage. Query and key come normalised, so that their norms
stay in autograd's hands. The state of a row is (sum, largest excess, sum of powers), not a log-sum-exp: results over
parts of the keys cannot be merged.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import WIDEST, check_attention, check_optional, check_positive, check_visibility
from shared_kernels._visible import key_bounds
from shared_kernels.l1_attention import reference

__all__ = ["l1_attention"]

NAME = "l1_attention"


_forward = _backend.library_op(
    NAME,
    "forward",
    "(Tensor query, Tensor key, Tensor value, Tensor? bounds, Tensor? key_mask, Tensor n_keys, float log_d, "
    "float? power) -> (Tensor, Tensor)",
)
"""Output, and the state (3, B, H, Nq): sum of softplus, largest excess, sum of its powers relative to that."""


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((*query.shape[:3], value.shape[3])), query.new_empty((3, *query.shape[:3]), dtype=wide)


_backward = _backend.library_op(
    NAME,
    "backward",
    "(Tensor d_out, Tensor query, Tensor key, Tensor value, Tensor state, Tensor? bounds, Tensor? key_mask, "
    "Tensor n_keys, float log_d, float? power) -> (Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(d_out: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    query, key, value = (t.new_empty(t.shape) for t in inputs[:3])
    return query, key, value


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *rest, ctx.log_d, ctx.power = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, output[1], *rest)


def _differentiate(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(d_out.contiguous(), *ctx.saved_tensors, ctx.log_d, ctx.power)
    return *gradients, *[None] * 5


_forward.register_autograd(_differentiate, setup_context=_save)


def _products(query_shape: torch.Size, key_shape: torch.Size, value_shape: torch.Size, of_d: int, of_e: int) -> int:
    B, H, R, D = query_shape
    return 2 * B * H * R * key_shape[2] * (of_d * D + of_e * value_shape[3])


@register_flop_formula(torch.ops.shared_kernels.l1_attention)
def _flops(query_shape: torch.Size, key_shape: torch.Size, value_shape: torch.Size, *_: Any, **__: Any) -> int:
    return _products(query_shape, key_shape, value_shape, 1, 1)


@register_flop_formula(torch.ops.shared_kernels.l1_attention_backward)
def _backward_flops(_: Any, query_shape: Any, key_shape: Any, value_shape: Any, *__: Any, **___: Any) -> int:
    return _products(query_shape, key_shape, value_shape, 3, 2)  # scores, d query, d key; d weights, d value


def l1_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    *,
    power: float | None = None,
    causal: bool = False,
    window: int | None = None,
    key_mask: Bool[Tensor, "B Nk"] | None = None,
    n_keys: Float[Tensor, "B Nq"] | None = None,
    log_d: float | None = None,
) -> Float[Tensor, "B H Nq E"]:
    """o_i = sum_j w_ij v_j with softplus weights over the N_i keys that row i sees.

        s_ij = softplus(log_d ln(N_i) q_i . k_j),  a_ij = s_ij / sum_j s_ij                (power=None: w = a, LSSA)
        u_ij = relu(N_i a_ij - [N_i > 3]),         w_ij = u_ij^power / sum_j u_ij^power     (LSSAR, power 15 or 3)

    `query` and `key` are meant to be of unit length along D (after rotary positions or before, which is the same);
    `log_d` is ln D unless given, and |log_d ln(N) q . k| must stay below 88. `causal` is aligned bottom-right, as in
    flash attention: query i sees keys up to i + Nk - Nq, with `window` only the last so many of those. `key_mask` is
    True at keys that exist; others have no influence, NaN included. `n_keys` replaces the count of visible keys, where
    a cache holds not all that the row attends to. Key and value may have fewer heads than query.

    Returns the output, contiguous, in query's dtype; inside everything is float32, or float64 for float64. Memory is
    in proportion to the tokens. Rows that see no key: output 0, gradients 0. Differentiable once in query, key and
    value.

    Raises TypeError on other types and dtypes, ValueError on shapes or devices that disagree and values out of range.
    """
    _check(query, key, value, power, n_keys, log_d)
    check_visibility(key, causal, window, key_mask)
    query, key, value = _backend.autocast(query, key, value)
    log_d = math.log(query.shape[3]) if log_d is None else float(log_d)
    power = None if power is None else float(power)
    if _backend.forced == "reference":
        return reference.l1_attention(
            query, key, value, power=power, causal=causal, window=window, key_mask=key_mask, n_keys=n_keys, log_d=log_d
        )
    B, _, Nq, _ = query.shape
    Nk, wide = key.shape[2], torch.promote_types(query.dtype, torch.float32)
    positions = torch.arange(Nq, device=query.device)
    bounds = key_bounds(positions, Nq, Nk, causal=causal, window=window)
    count = _visible_count(query, bounds, key_mask, Nk) if n_keys is None else n_keys
    out, _state = _forward(query, key, value, bounds, key_mask, count.to(wide).expand(B, Nq), log_d, power)
    return out


def _visible_count(query: Tensor, bounds: Tensor | None, key_mask: Tensor | None, Nk: int) -> Tensor:
    """Keys that each row sees, (B or 1, Nq or 1)."""
    if key_mask is None:
        return query.new_full((1, 1), Nk, dtype=torch.int64) if bounds is None else bounds[..., 1] - bounds[..., 0]
    before = torch.nn.functional.pad(key_mask.to(torch.int64).cumsum(1), (1, 0))
    if bounds is None:
        return before[:, -1:]
    ends = bounds.to(torch.int64).expand(key_mask.shape[0], -1, -1)
    return before.gather(1, ends[..., 1]) - before.gather(1, ends[..., 0])


def _check(
    query: Tensor, key: Tensor, value: Tensor, power: float | None, n_keys: Tensor | None, log_d: float | None
) -> None:
    check_attention(query, key, value, widest=WIDEST)
    if power is not None and not power >= 1:
        raise ValueError(f"power must be at least 1, or None for one stage, got {power}")
    if log_d is not None:
        check_positive("log_d", log_d)
    check_optional("n_keys", n_keys, (query.shape[0], query.shape[2]), query.device)
