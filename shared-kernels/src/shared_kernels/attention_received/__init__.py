"""attention_received: how much attention each key receives from chosen query rows, without the map.

How much attention tokens receive decides which of them are pruned, calibrated or pointed at: AdaptInfer, FastV and
FasterVLM keep the image tokens that text or class tokens look at (arXiv:2508.06084, arXiv:2403.06764,
arXiv:2412.01818); attention calibration finds sinks by column means (Yu et al., arXiv:2406.15765); AS-ViT scores
patches by the class row (arXiv:2209.13802). What rows give, see `given.py`.

Decided here: rows, heads and weights are chosen in plain torch around the registered op, which knows an interval of
visible keys per row instead of causal masks and windows. Results are per head: a mean over heads is `.mean(1)`, the
mass on a group of keys is a sum over its columns. "mean" divides by the rows that see the key, as calibration needs it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import check_broadcasts, check_choice, check_optional, check_tensors
from shared_kernels.attention_received import reference
from shared_kernels.attention_received.given import attention_argmax, attention_given
from shared_kernels.attention_received.selection import Rows, check_selection, choose, choose_rows

__all__ = ["attention_argmax", "attention_given", "attention_received"]

NAME = "attention_received"
Reduction = Literal["sum", "mean"]


_forward = _backend.library_op(
    NAME,
    "forward",
    "(Tensor query, Tensor key, Tensor? bounds, Tensor? key_mask, Tensor? row_weights, Tensor? lse, SymInt first, "
    "SymInt last, float scale) -> (Tensor, Tensor)",
)
"""Attention on keys first to last, and the log-sum-exp if it was not given."""


@_forward.register_fake
def _(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    lse, first, last, _ = rest[-4:]
    wide = torch.promote_types(query.dtype, torch.float32)
    received = query.new_empty((*query.shape[:2], last - first), dtype=wide)
    return received, query.new_empty(query.shape[:3] if lse is None else (0,), dtype=wide)


_backward = _backend.library_op(
    NAME,
    "backward",
    "(Tensor d_received, Tensor query, Tensor key, Tensor? bounds, Tensor? key_mask, Tensor? row_weights, Tensor lse, "
    "SymInt first, SymInt last, float scale, bool normalised) -> (Tensor, Tensor, Tensor)",
)
"""Gradients of query and key, and sum_j P_ij d_received_j of every row; `normalised` if the LSE is the op's own."""


@_backward.register_fake
def _(d_received: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), d_received.new_empty(query.shape[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, lse, ctx.first, ctx.last, ctx.scale = inputs
    ctx.normalised = lse is None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1] if lse is None else lse)


def _differentiate(ctx: Any, d_received: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, row_weights, lse = ctx.saved_tensors
    d_query, d_key, paid = _backward(
        d_received, *tensors, row_weights, lse, ctx.first, ctx.last, ctx.scale, ctx.normalised
    )
    d_lse = None if ctx.normalised else -paid if row_weights is None else -paid * row_weights
    d_weights = None if row_weights is None else paid
    return d_query, d_key, None, None, d_weights, d_lse, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _product(query_shape: torch.Size, key_shape: torch.Size) -> int:
    """FLOPs of all scores."""
    B, H, R, D = query_shape
    return 2 * B * H * R * key_shape[2] * D


@register_flop_formula(torch.ops.shared_kernels.attention_received)
def _flops(query_shape: torch.Size, key_shape: torch.Size, *_: Any, **__: Any) -> int:
    return _product(query_shape, key_shape)


@register_flop_formula(torch.ops.shared_kernels.attention_received_backward)
def _backward_flops(_: torch.Size, query_shape: torch.Size, key_shape: torch.Size, *__: Any, **___: Any) -> int:
    return 3 * _product(query_shape, key_shape)  # scores again, d query, d key


def attention_received(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    *,
    rows: Rows = None,
    heads: Sequence[int] | None = None,
    row_weights: Float[Tensor, "*#rows"] | None = None,
    lse: Float[Tensor, "B H Nq"] | None = None,
    causal: bool = False,
    window: int | None = None,
    key_mask: Bool[Tensor, "B Nk"] | None = None,
    columns: slice | None = None,
    reduce: Reduction = "sum",
    scale: float | None = None,
) -> Float[Tensor, "B h n"]:
    """Softmax attention that each key receives: sum over rows i of w_i P_ij,  P_ij = exp(scale q_i . k_j - lse_i).

    `rows` (a slice, or int64 numbers (R,) or, for each batch, (B, R)) are the query rows that count, `heads` the query
    heads; all by default. `row_weights` w are theirs, of a shape that broadcasts to (B, h, R); 1 by default. With
    reduce="mean" the sum is divided by the sum of w over the rows that see the key, and 0 where there is none.

    `causal` is aligned bottom-right, as in flash attention: query i sees keys up to i + Nk - Nq, with `window` only the
    last so many of those. `key_mask` is True at keys that exist; others receive nothing and have no influence, NaN
    included. `columns` (a slice of step 1) are the keys that are returned; P is normalised over all keys. `lse`, where
    the caller has it, is the natural log-sum-exp of all rows of `query`, over whatever keys P is to be normalised by:
    then other columns cost nothing, and on GPUs half the work is saved. `scale` is 1/sqrt(D) unless given.

    Returns float32, or float64 for float64. Costs one product of rows and keys, and memory in proportion to their
    number. Differentiable once in query, key, row_weights and lse. Rows that see no key give nothing, gradients 0.

    Raises TypeError on other types and dtypes, ValueError on shapes or devices that disagree and values out of range.
    """
    check_selection(query, key, rows=rows, heads=heads, causal=causal, window=window, key_mask=key_mask, scale=scale)
    first, last = _check_received(query, key, row_weights, lse, columns, reduce)
    query, key = _backend.autocast(query, key)
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    if _backend.forced == "reference":
        return reference.attention_received(
            query, key, rows=rows, heads=heads, row_weights=row_weights, lse=lse, causal=causal, window=window,
            key_mask=key_mask, columns=columns, reduce=reduce, scale=scale,
        )  # fmt: skip
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key, bounds = choose(query, key, rows=rows, heads=heads, causal=causal, window=window)
    if row_weights is not None:
        check_broadcasts("row_weights", row_weights, *query.shape[:3])
        row_weights = row_weights.to(wide).expand(query.shape[:3])
    if lse is not None:
        lse = choose_rows(lse.to(wide), rows, heads)
        key = key[:, :, first:last]
        key_mask = None if key_mask is None else key_mask[:, first:last]
        bounds = None if bounds is None else (bounds - first).clamp(0, last - first)
        first, last = 0, last - first
    received, _ = _forward(query, key, bounds, key_mask, row_weights, lse, first, last, scale)
    if reduce == "sum":
        return received
    seen = _weight_that_sees(query, bounds, row_weights, torch.arange(first, last, device=query.device))
    return received / torch.where(seen == 0, 1, seen).to(wide)


def _weight_that_sees(query: Tensor, bounds: Tensor | None, weights: Tensor | None, keys: Tensor) -> Tensor:
    """For every key, the number or the weight of the rows that see it."""
    if bounds is None:
        return keys.new_tensor(query.shape[2]) if weights is None else weights.sum(-1, keepdim=True)
    return _weight_before(bounds[..., 0], weights, keys) - _weight_before(bounds[..., 1], weights, keys)


def _weight_before(ends: Tensor, weights: Tensor | None, keys: Tensor) -> Tensor:
    """For every key, the number or the weight of the rows whose end (B or 1, R) is not past it."""
    ends, order = ends.sort(dim=-1)
    below = torch.searchsorted(ends, keys.to(ends.dtype).expand(ends.shape[0], -1).contiguous(), right=True)[:, None]
    if weights is None:
        return below
    shape = weights.shape
    order, below = order[:, None].expand(shape), below.expand(*shape[:2], -1)
    # differences of sums: wide, that what is left of a cancellation counts
    sums = weights.to(torch.float64).gather(-1, order).cumsum(-1)
    return torch.cat([sums.new_zeros(*shape[:2], 1), sums], -1).gather(-1, below)


def _check_received(
    query: Tensor,
    key: Tensor,
    row_weights: Tensor | None,
    lse: Tensor | None,
    columns: slice | None,
    reduce: str,
) -> tuple[int, int]:
    """First and last column, and the checks that attention_given has no need of."""
    check_choice("reduce", reduce, Reduction)
    if row_weights is not None:
        check_tensors({"row_weights": row_weights}, device=query.device)
    check_optional("lse", lse, tuple(query.shape[:3]), query.device)
    if columns is None:
        return 0, key.shape[2]
    if not isinstance(columns, slice) or columns.step not in (None, 1):
        raise ValueError(f"columns must be a slice of step 1, got {columns}")
    first, last, _ = columns.indices(key.shape[2])
    return first, max(first, last)
