"""Which keys each query row may see, as an interval of keys per row.

An interval covers causal attention, sliding windows and any choice of query rows, and costs a kernel two integers per
row. Keys that are no tokens (padding) are masked on top of it.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def key_bounds(
    positions: Int[Tensor, "*B R"], num_rows: int, num_keys: int, *, causal: bool, window: int | None = None
) -> Int[Tensor, "B R 2"] | None:
    """First key that each row sees, and the one past the last; None if every row sees all.

    `positions` are the places of the rows among `num_rows` queries, aligned bottom-right with the keys: row i sees keys
    up to i + num_keys - num_rows, with a window only so many of them. int32; B is 1 if all batches share the rows.
    """
    if not causal:
        return None
    last = positions + (num_keys - num_rows + 1)
    first = torch.zeros_like(last) if window is None else last - window
    bounds = torch.stack([first, last], -1).clamp(0, num_keys).to(torch.int32)
    return bounds if bounds.ndim == 3 else bounds[None]


def visible_keys(bounds: Int[Tensor, "B R 2"], num_keys: int) -> Bool[Tensor, "B R Nk"]:
    """The intervals as a mask, for a few rows at a time."""
    keys = torch.arange(num_keys, device=bounds.device)
    return (keys >= bounds[..., :1]) & (keys < bounds[..., 1:])
