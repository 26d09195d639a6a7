"""Softmax attention to what is near in a map: blocks with a halo, and neighbourhoods.

`local_attention`: a block of queries shares one window of keys, the block and a halo around it. HaloNet (Vaswani et
al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv:2103.12731) with positions relative
to the query; without halo and positions the windows of L2ViT (Zheng, "The Linear Attention Resurrection in Vision
Transformer", arXiv:2501.16182). `neighborhood_attention`: every query has its own k x k keys, see there.

Decided here: a map that blocks do not fill ends where it ends, nothing is padded, and past such an end there are never
keys; `border` speaks of the other ends. Products of query and position tables are plain torch around the registered op,
which knows logits by relative position; whoever scales positions too scales the tables.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import (
    MAPS,
    check_attention,
    check_choice,
    check_optional,
    check_whole_number,
)
from shared_kernels.local_attention import reference
from shared_kernels.local_attention.neighborhood import neighborhood_attention

__all__ = ["local_attention", "neighborhood_attention"]

NAME = "local_attention"
Border = Literal["zero", "mask"]


_forward = _backend.library_op(
    NAME,
    "forward",
    "(Tensor query, Tensor key, Tensor value, Tensor? row_logits, Tensor? column_logits, SymInt block, SymInt halo, "
    "SymInt stride, SymInt step, bool masked, float scale) -> (Tensor, Tensor)",
)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((*query.shape[:4], value.shape[4])), query.new_empty(query.shape[:4], dtype=wide)


_backward = _backend.library_op(
    NAME,
    "backward",
    "(Tensor d_out, Tensor delta, Tensor query, Tensor key, Tensor value, Tensor? row_logits, Tensor? column_logits, "
    "Tensor lse, SymInt block, SymInt halo, SymInt stride, SymInt step, bool masked, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(d_out: Tensor, delta: Tensor, *inputs: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    *tensors, lse = inputs[:6]
    return tuple(lse.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.rest = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output)


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    # d score = p * (d p - delta), and what flows into the LSE adds p * d_lse
    delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - d_lse
    gradients = _backward(d_out, delta, *tensors, lse, *ctx.rest)
    wanted = [None if t is None else d for t, d in zip(tensors, gradients, strict=True)]
    return *wanted, *[None] * len(ctx.rest)


_forward.register_autograd(_differentiate, setup_context=_save)


def _pairs(query_shape: torch.Size, block: int, halo: int) -> int:
    """Queries times the keys of a window, as if each lay in the map."""
    return query_shape[:4].numel() * (block + 2 * halo) ** 2


@register_flop_formula(torch.ops.shared_kernels.local_attention)
def _flops(
    query_shape: torch.Size, key_shape: torch.Size, value_shape: torch.Size, *rest: Any, **_: Any  # noqa: ARG001
) -> int:  # fmt: skip
    return 2 * _pairs(query_shape, rest[2], rest[3]) * (query_shape[4] + value_shape[4])


@register_flop_formula(torch.ops.shared_kernels.local_attention_backward)
def _backward_flops(*inputs: Any, **_: Any) -> int:
    query_shape, value_shape, (block, halo) = inputs[2], inputs[4], inputs[8:10]
    # scores, d query and d key by the key width, d weights and d value by the value width
    return 2 * _pairs(query_shape, block, halo) * (3 * query_shape[4] + 2 * value_shape[4])


def local_attention(
    query: Float[Tensor, "B H Rq Cq D"],
    key: Float[Tensor, "B Hkv R C D"],
    value: Float[Tensor, "B Hkv R C E"],
    *,
    block: int,
    halo: int = 0,
    stride: int = 1,
    row_table: Float[Tensor, "P D"] | None = None,
    column_table: Float[Tensor, "P D"] | None = None,
    position_stride: int | None = None,
    border: Border = "zero",
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B H Rq Cq E"] | tuple[Float[Tensor, "B H Rq Cq E"], Float[Tensor, "B H Rq Cq"]]:
    """Softmax attention of every block of queries to the keys of the block and of a halo around it.

    The map of R rows and C columns of keys is cut into blocks of block x block, the last ones perhaps smaller; the
    window of a block is w = block + 2 * halo wide. Queries sit at every `stride`-th key of a block, so there are Rq =
    ceil(R / stride) rows and Cq = ceil(C / stride) columns of them; block is a multiple of stride. Query heads are a
    multiple of key heads. Halo 0 gives windows.

    With tables (P = 2w - 1), the query in row i and column j of a block of queries scores the key in row a and column c
    of its window  scale * q . k + q . (row_table[a - s * i + w - 1] + column_table[c - s * j + w - 1]),  where s is
    `position_stride`: the stride itself, unless given. `scale` is 1/sqrt(D) unless given and leaves positions alone.

    Outside the map, keys and values are zeros that keep their share of the softmax ("zero", as published) or are no
    keys ("mask"). Where blocks do not fill the map, there are no keys past its end in either case.

    timm's HaloAttn is border="zero" with position_stride=1 (its positions ignore the stride), tables height_rel and
    width_rel; with scale_pos_embed both times scale.

    Returns the output, contiguous and of query's dtype, and with `return_lse` the natural log-sum-exp of the scores, in
    float32 at least. Differentiable once in query, key, value and tables, through both outputs. Maps of any strides are
    taken as they are if the last dimension is contiguous.

    Raises TypeError on what is not a floating-point tensor or a whole number, ValueError on shapes or devices that
    disagree and on numbers out of range.
    """
    check_attention(query, key, value, scale=scale, layout=MAPS)
    _check_geometry(query, key, block, halo, stride, position_stride, border)
    _check_tables(query, row_table, column_table, 2 * (block + 2 * halo) - 1)
    query, key, value = _backend.autocast(query, key, value)
    scale = query.shape[4] ** -0.5 if scale is None else float(scale)
    step = stride if position_stride is None else position_stride
    if _backend.forced == "reference":
        return reference.local_attention(
            query, key, value, block=block, halo=halo, stride=stride, row_table=row_table, column_table=column_table,
            position_stride=step, border=border, scale=scale, return_lse=return_lse,
        )  # fmt: skip
    logits = _by_position(query, row_table, column_table)
    out, lse = _forward(query, key, value, *logits, block, halo, stride, step, border == "mask", scale)
    return (out, lse) if return_lse else out


def _by_position(
    query: Tensor, row_table: Tensor | None, column_table: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Query times both tables, (B, H, Rq, Cq, P) each, in one product that takes query as it lies in memory."""
    if row_table is None or column_table is None:
        return None, None
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        tables = torch.cat([row_table, column_table]).to(wide)
        logits = (query.permute(0, 2, 3, 1, 4).to(wide) @ tables.T).permute(0, 3, 1, 2, 4)
    rows, columns = logits.split(len(row_table), -1)
    return rows, columns


def _check_geometry(
    query: Tensor, key: Tensor, block: int, halo: int, stride: int, position_stride: int | None, border: Border
) -> None:
    check_whole_number("block", block, 1)
    check_whole_number("halo", halo, 0)
    check_whole_number("stride", stride, 1)
    if block % stride:
        raise ValueError(f"block must be a multiple of stride, got {block} and {stride}")
    if position_stride is not None:
        check_whole_number("position_stride", position_stride, 0, stride)
    check_choice("border", border, Border)
    rows, columns = (-(-size // stride) for size in key.shape[2:4])
    if query.shape[2:4] != (rows, columns):
        raise ValueError(
            f"query must have {rows} rows and {columns} columns, one for every {stride} of key's "
            f"{key.shape[2]} x {key.shape[3]}, got {query.shape[2]} x {query.shape[3]}"
        )


def _check_tables(query: Tensor, row_table: Tensor | None, column_table: Tensor | None, positions: int) -> None:
    if (row_table is None) != (column_table is None):
        given, absent = ("column", "row") if row_table is None else ("row", "column")
        raise ValueError(f"{absent}_table must be given where {given}_table is")
    for name, table in (("row_table", row_table), ("column_table", column_table)):
        check_optional(name, table, (positions, query.shape[4]), query.device)
