"""Lists of key blocks per query block: what they may hold, and turned round for the backward pass.

Everything here stays on the device and, but for `check_lists`, reads no value on the host.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from shared_kernels._arguments import check_optional, check_shape, check_tensors, check_whole_number

_INT16, _INT32 = 2**15, 2**31
_RADIX = 2**15  # numbers from which on torch sorts a vector by radix on a CPU


class TransposedLists(NamedTuple):
    """For every key block, the entries that name it, in the order of the entries; made by `transpose_lists`.

    An entry's position among those of its (batch, list head), counted row by row, is `query block * m + slot`: its
    query block is `position // m`. Key block k is named by the entries `starts[..., k] : starts[..., k + 1]`. Behind
    the last start stand the positions of what is padding.
    """

    entries: Int[Tensor, "B Hl nq*m"]
    """Positions, int32, sorted by key block, and among equals by position."""
    starts: Int[Tensor, "B Hl num_key_blocks+1"]
    """Where each key block's entries begin, int32, and the end of the last."""


def transpose_lists(
    indices: Int[Tensor, "B Hl nq m"],
    counts: Int[Tensor, "B Hl nq"] | None = None,
    *,
    num_key_blocks: int,
) -> TransposedLists:
    """Turn the lists of `sparse_attention` round, once for all its calls with the same lists.

    The backward pass walks lists by key block; a list that serves several layers or steps is turned round here and
    handed over as `transposed`. Not differentiable; no host synchronisation. Raises as `sparse_attention` does.
    """
    check_list_tensors(indices, counts)
    check_whole_number("num_key_blocks", num_key_blocks, 0)
    B, Hl, nq, m = indices.shape
    bins = num_key_blocks + 1  # the last one gathers padding
    named = torch.where(listed(indices, counts), indices, num_key_blocks)
    entries, starts = _sort(named.reshape(B * Hl, nq * m), bins)
    return TransposedLists(entries.view(B, Hl, nq * m), starts.view(B, Hl, bins))


def _sort(named: Int[Tensor, "lists L"], bins: int) -> tuple[Int[Tensor, "lists L"], Int[Tensor, "lists bins"]]:
    """Positions in every list, sorted by what is named there, and where each of so many names begins; int32."""
    lists, L = named.shape
    if named.device.type == "cpu" and L >= _RADIX:
        narrow = named.to(torch.int16 if bins < _INT16 else torch.int32)  # fewer digits
        ordered, order = (torch.stack(parts) for parts in zip(*(n.sort(stable=True) for n in narrow), strict=True))
        every = torch.arange(bins, dtype=narrow.dtype).expand(lists, bins).contiguous()
        return order.to(torch.int32), torch.searchsorted(ordered, every, out_int32=True)
    # all lists as one vector, which is sorted several times faster than many
    wide = torch.int32 if lists * bins < _INT32 else torch.int64
    offsets = torch.arange(lists, dtype=wide, device=named.device)[:, None]
    ordered, order = (named + offsets * bins).view(-1).sort(stable=True)
    every = offsets * bins + torch.arange(bins, dtype=wide, device=named.device)
    before = (offsets * L).to(torch.int32)
    return order.to(torch.int32).view(lists, L) - before, torch.searchsorted(ordered, every, out_int32=True) - before


def listed(indices: Int[Tensor, "B Hl nq m"], counts: Int[Tensor, "B Hl nq"] | None) -> Tensor:
    """Which entries are no padding, as a mask of the shape of `indices`."""
    if counts is None:
        return indices >= 0
    return torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]


def check_list_tensors(indices: Tensor, counts: Tensor | None, device: torch.device | None = None) -> None:
    """Raise TypeError or ValueError unless shapes, dtypes and devices of both are right; reads no value."""
    check_tensors({"indices": indices}, torch.int32, device=device)
    check_shape("indices", indices, "batch", "list heads", "query blocks", "m")
    check_optional("counts", counts, tuple(indices.shape[:-1]), indices.device, torch.int32)


def check_lists(
    indices: Int[Tensor, "B Hl nq m"], counts: Int[Tensor, "B Hl nq"] | None = None, *, num_key_blocks: int
) -> None:
    """Raise ValueError unless counts lie in [0, m], entries within them in [0, num_key_blocks) and none comes twice.

    Reads values, so on a GPU it waits for them: for hunting a bug.
    """
    check_list_tensors(indices, counts)
    m = indices.shape[-1]
    if counts is None:
        counts = (indices >= 0).sum(-1, dtype=torch.int32)
    if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= m:
        raise ValueError(f"counts must lie in [0, {m}], got {int(counts.min())} to {int(counts.max())}")
    inside = indices[listed(indices, counts)]
    if inside.numel() and not 0 <= int(inside.min()) <= int(inside.max()) < num_key_blocks:
        raise ValueError(
            f"indices must lie in [0, {num_key_blocks}) within counts, got {int(inside.min())} to {int(inside.max())}"
        )
    ordered = torch.where(listed(indices, counts), indices, -1).sort(dim=-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise ValueError("indices must name a key block at most once for each query block, got one twice")
