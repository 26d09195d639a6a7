"""The definitions of local_attention and neighborhood_attention in plain torch; the oracle of their tests."""

import torch
from torch import Tensor


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block: int,
    halo: int = 0,
    stride: int = 1,
    row_table: Tensor | None = None,
    column_table: Tensor | None = None,
    position_stride: int | None = None,
    border: str = "zero",
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `shared_kernels.local_attention`."""
    acc = torch.promote_types(query.dtype, torch.float32)  # float64 stays float64, or gradcheck would mean nothing
    wide = query.to(acc)
    group, scale = query.shape[1] // key.shape[1], query.shape[4] ** -0.5 if scale is None else scale
    rows, columns = (_window_of_every_query(n, block, halo, stride, border) for n in key.shape[2:4])
    keys, values = (_gathered(t.to(acc).repeat_interleave(group, 1), rows, columns) for t in (key, value))
    scores = torch.einsum("bhrcd,bhrxcyd->bhrcxy", wide, keys) * scale
    if row_table is not None and column_table is not None:
        step = stride if position_stride is None else position_stride
        by_row, by_column = (
            table.to(acc)[_relative(n, block, halo, stride, step)]
            for table, n in ((row_table, query.shape[2]), (column_table, query.shape[3]))
        )
        scores = scores + torch.einsum("bhrcd,rxd->bhrcx", wide, by_row)[..., None]
        scores = scores + torch.einsum("bhrcd,cyd->bhrcy", wide, by_column)[..., None, :]
    allowed = rows[1][:, None, :, None] & columns[1][:, None, :]
    return _attended(scores, allowed, values, query.dtype, return_lse)


def _window_of_every_query(n: int, block: int, halo: int, stride: int, border: str) -> tuple[Tensor, Tensor]:
    """Along one side of the map: positions of the window of every query (queries, w), and which of them are keys."""
    queries = torch.arange(0, n, stride)
    positions = queries[:, None] // block * block - halo + torch.arange(block + 2 * halo)
    keys = (positions >= 0) & (positions < n)
    if border == "zero":
        keys |= (positions < 0) if n % block else (positions < 0) | (positions >= n)
    return positions, keys


def _relative(queries: int, block: int, halo: int, stride: int, step: int) -> Tensor:
    """(queries, w): the row of a position table for every query and position in its window."""
    w = block + 2 * halo
    in_block = torch.arange(queries) % (block // stride)
    return torch.arange(w) - step * in_block[:, None] + w - 1


def _gathered(maps: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    """(B, H, R, C, X) at the windows: (B, H, queries, w, queries, w, X), zeros outside the map."""
    (R, C), inside = maps.shape[2:4], []
    for n, (positions, _) in ((R, rows), (C, columns)):
        inside.append((positions >= 0) & (positions < n))
    r, c = rows[0].clamp(0, max(R - 1, 0)), columns[0].clamp(0, max(C - 1, 0))
    there = inside[0][:, :, None, None] & inside[1]
    return maps[:, :, r[:, :, None, None], c].masked_fill(~there[..., None].to(maps.device), 0.0)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel_size: int,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `shared_kernels.neighborhood_attention`."""
    acc = torch.promote_types(query.dtype, torch.float32)
    k, group = kernel_size, query.shape[1] // key.shape[1]
    rows, columns = (_neighbors(n, k) for n in key.shape[2:4])
    keys, values = (t.to(acc).repeat_interleave(group, 1)[:, :, rows[:, :, None, None], columns] for t in (key, value))
    scores = torch.einsum("bhrcd,bhrxcyd->bhrcxy", query.to(acc), keys)
    scores = scores * (query.shape[4] ** -0.5 if scale is None else scale)
    if bias is not None:
        by_row, by_column = (at - torch.arange(len(at))[:, None] + k - 1 for at in (rows, columns))
        scores = scores + bias.to(acc)[:, by_row[:, None, :, None], by_column[:, None, :]]
    return _attended(scores, torch.ones((), dtype=torch.bool), values, query.dtype, return_lse)


def _neighbors(n: int, k: int) -> Tensor:
    """(n, k): the keys of every query along one side of the map."""
    return (torch.arange(n) - k // 2).clamp(0, n - k)[:, None] + torch.arange(k)


def _attended(
    scores: Tensor, allowed: Tensor, values: Tensor, dtype: torch.dtype, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax of (B, H, R, C, x, y) over the last two dimensions, times values (B, H, R, x, C, y, E)."""
    scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf).flatten(-2)
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1).unflatten(-1, values.shape[3:6:2])
    out = torch.einsum("bhrcxy,bhrxcye->bhrce", weights, values).to(dtype).contiguous()
    return (out, lse) if return_lse else out
