"""correlation on CPUs: a few rows of the volume at a time, turned into their softmax in place.

A tile is small enough for the cache. Powers of two instead of e, with the factor folded into one side's features. Thin
products are laid out so that their long side runs along memory: (E x M) times a tile turned is eight times faster than
the tile times (M x E).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_TILE = 1 << 18  # similarities at a time
_LOG2E = 1 / math.log(2)


def _rows(N: int, M: int) -> Iterator[slice]:
    step = max(16, _TILE // max(1, M))
    return (slice(start, min(start + step, N)) for start in range(0, N, step))


def _tile(like: Tensor, N: int, M: int) -> Tensor:
    return like.new_empty(min(N, max(16, _TILE // max(1, M))), M)


def _scaled(features: Tensor, scale: Tensor) -> Tensor:
    return torch.mul(features, scale[:, None])  # in the wider dtype, which scale has


def _exponentials(x: Tensor, y: Tensor, bias: Tensor | None, tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2^(x . y + bias - top) in the memory of `tile`, each row's top, and its sum."""
    scores = torch.mm(x, y.T, out=tile)
    if bias is not None:
        scores.add_(bias)
    top = scores.amax(1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)  # a row of -inf stays one
    weight = scores.sub_(top).exp2_()
    return weight, top, weight.sum(1, keepdim=True)


def forward(
    source: Tensor, target: Tensor, values: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    (B, N, _), M, E = source.shape, target.shape[1], values.shape[-1]
    out = torch.zeros((B, N, E), dtype=values.dtype)
    lse = torch.full((B, N), -torch.inf, dtype=row_scale.dtype)
    if M == 0 or out.numel() == 0:
        return out, lse
    tile = _tile(row_scale, N, M)
    for b in range(B):
        x, y = _scaled(source[b], row_scale[b] * _LOG2E), _scaled(target[b], column_scale[b])
        thin = values[b].T.to(y.dtype, memory_format=torch.contiguous_format)
        added = bias[b] * _LOG2E if bool(bias[b].any()) else None
        for rows in _rows(N, M):
            weight, top, total = _exponentials(x[rows], y, added, tile[: rows.stop - rows.start])
            sums = torch.mm(thin, weight.T).T
            out[b, rows] = sums.div_(total.masked_fill(total == 0, 1)).to(out.dtype)
            lse[b, rows] = (top + total.log2())[:, 0] / _LOG2E
    return out, lse


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    source: Tensor,
    target: Tensor,
    values: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, N, _), M, acc = source.shape, target.shape[1], row_scale.dtype
    gradients = [torch.zeros(t.shape, dtype=t.dtype) for t in (source, target, values, row_scale, column_scale, bias)]
    if M == 0 or out.numel() == 0:
        return tuple(gradients)  # type: ignore[return-value]
    d_source, d_target, d_values, d_row_scale, d_column_scale, d_bias = gradients
    share = (d_out.to(acc) * out.to(acc)).sum(-1) - d_lse
    tile, flow = _tile(row_scale, N, M), _tile(row_scale, N, M)
    for b in range(B):
        x, y = _scaled(source[b], row_scale[b] * _LOG2E), _scaled(target[b], column_scale[b])
        d_y, d_thin = y.new_zeros(y.shape[::-1]), y.new_zeros(values.shape[2], M)
        thin = torch.cat([values[b].T.to(acc), y.new_ones(1, M)])
        d_rows = torch.cat([d_out[b].to(acc), -share[b, :, None]], 1)
        added = bias[b] * _LOG2E if bool(bias[b].any()) else None
        for rows in _rows(N, M):
            count = rows.stop - rows.start
            weight, _, total = _exponentials(x[rows], y, added, tile[:count])
            weight.div_(total.masked_fill_(total == 0, 1))  # exact where the log-sum-exp is large and has few digits
            d_thin.addmm_(d_rows[rows, :-1].T, weight)
            d_scores = torch.mm(d_rows[rows], thin, out=flow[:count]).mul_(weight)
            d_bias[b] += d_scores.sum(0)
            d_y.addmm_(x[rows].T, d_scores)
            d_x = d_scores @ y
            d_row_scale[b, rows] = (d_x * source[b, rows]).sum(-1)
            d_source[b, rows] = _scaled(d_x, row_scale[b, rows]).to(d_source.dtype)
        d_y = d_y.div_(_LOG2E).T
        d_column_scale[b] = (d_y * target[b]).sum(-1)
        d_target[b] = _scaled(d_y, column_scale[b]).to(d_target.dtype)
        d_values[b] = d_thin.T.to(d_values.dtype)
    return d_source, d_target, d_values, d_row_scale, d_column_scale, d_bias
