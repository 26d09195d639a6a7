"""The query rows and heads that the two functions of this folder look at."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shared_kernels._arguments import (
    WIDEST,
    check_attention,
    check_shape,
    check_tensors,
    check_visibility,
    check_whole_number,
)
from shared_kernels._visible import key_bounds

Rows = slice | Int[Tensor, "*B R"] | None
"""Query rows: a slice, or their numbers (int64), the same for all batches (R,) or for each (B, R); None is all."""


class Chosen(NamedTuple):
    """What is left of a call's arguments once heads and rows are chosen."""

    query: Float[Tensor, "B H R D"]
    key: Float[Tensor, "B Hkv Nk D"]
    bounds: Int[Tensor, "Bb R 2"] | None
    """Interval of keys that each row sees, see `key_bounds`."""


def choose(
    query: Tensor, key: Tensor, *, rows: Rows, heads: Sequence[int] | None, causal: bool, window: int | None
) -> Chosen:
    """Take the chosen heads and rows out of query and key, and say which keys each row sees."""
    Nq, Nk = query.shape[2], key.shape[2]
    if heads is not None:
        group = query.shape[1] // key.shape[1]
        key = _of_heads(key, [head // group for head in heads])
    query = choose_rows(query, rows, heads)
    numbers = torch.arange(Nq, device=query.device) if rows is None or isinstance(rows, slice) else rows
    if isinstance(rows, slice):
        numbers = numbers[rows]
    return Chosen(query, key, key_bounds(numbers, Nq, Nk, causal=causal, window=window))


def choose_rows(tensor: Float[Tensor, "B H Nq *D"], rows: Rows, heads: Sequence[int] | None) -> Tensor:
    """The chosen heads and rows of what every query row has."""
    if heads is not None:
        tensor = _of_heads(tensor, heads)
    if rows is None:
        return tensor
    if isinstance(rows, slice):
        return tensor[:, :, rows]
    if rows.ndim == 1:
        return tensor.index_select(2, rows)
    rows = rows[:, None].expand(-1, tensor.shape[1], -1)
    if tensor.ndim == 4:
        rows = rows[..., None].expand(*rows.shape, tensor.shape[3])
    return tensor.gather(2, rows)


def _of_heads(tensor: Tensor, heads: Sequence[int]) -> Tensor:
    return tensor.index_select(1, torch.tensor(list(heads), dtype=torch.int64, device=tensor.device))


def check_selection(
    query: Tensor,
    key: Tensor,
    *,
    rows: Rows,
    heads: Sequence[int] | None,
    causal: bool,
    window: int | None,
    key_mask: Tensor | None,
    scale: float | None = None,
) -> None:
    """Raises TypeError or ValueError naming the argument. The numbers in `rows` are left to torch's own check."""
    check_attention(query, key, scale=scale, widest=WIDEST)
    check_visibility(key, causal, window, key_mask)
    if isinstance(rows, Tensor):
        check_tensors({"rows": rows}, torch.int64, device=query.device)
        check_shape("rows", rows, *((query.shape[0], "R") if rows.ndim == 2 else ("R",)))
    elif not (rows is None or isinstance(rows, slice)):
        raise TypeError(f"rows must be a slice, a tensor of row numbers or None, got {type(rows).__name__}")
    for head in heads or ():
        check_whole_number("heads", head, 0, query.shape[1] - 1)
