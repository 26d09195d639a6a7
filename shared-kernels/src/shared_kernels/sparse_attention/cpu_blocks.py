"""Lists shared by many query rows: gather the listed key blocks, then dense products of matrices, a tile at a time.

An item is a query block of all heads that share its list and its keys; its rows are multiplied with one gathered copy.
Items are sorted by the length of their lists, so that those of one tile hardly need padding, and those that need a mask
(the short last key block, keys in the future) stand apart: all others run without. Tiles are small enough to stay in a
core's cache while the softmax, to base 2, goes over them in place.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_TILE = 1 << 18  # scores in a tile, per thread
_FEWEST_ROWS = 16  # of a tile; query blocks are cut down to it if key blocks are large
_LOG2E = math.log2(math.e)


class _Chunk(NamedTuple):
    """Items that are computed together."""

    items: Tensor
    length: int
    """Entries of the longest list."""
    masked: bool


class _Items:
    """What the lists say, item by item. Z is batches times heads of items, R the rows of an item."""

    def __init__(
        self, query: Tensor, key: Tensor, indices: Tensor, counts: Tensor, causal: bool, block_q: int, block_k: int
    ) -> None:
        (B, H, self.Nq, _), (_, Hkv, self.Nk, _) = query.shape, key.shape
        self.heads = Hkv if indices.shape[1] <= Hkv else H
        self.group, self.batch, self.causal = H // self.heads, B, causal
        self.block_q, self.block_k = block_q, block_k
        self.nq, self.nk = indices.shape[2], -(-self.Nk // block_k)
        self.R = self.group * block_q
        self.rows = min(self.R, max(_FEWEST_ROWS, _tile() // block_k))  # of a tile
        share = self.heads // indices.shape[1]
        self.lists = indices.repeat_interleave(share, 1).reshape(B * self.heads * self.nq, -1)
        self.counts = counts.repeat_interleave(share, 1).reshape(-1)
        heads_of_items = torch.arange(B * self.heads, dtype=torch.int32).repeat_interleave(self.nq)
        self.first_block = heads_of_items // (self.heads // Hkv) * self.nk
        slots = torch.arange(self.lists.shape[1], dtype=torch.int32)
        there = slots < self.counts[:, None]
        self.needs_mask = self._needs_mask(torch.where(there, self.lists, -1).amax(1))
        # what pads a list is its own first block: what no list names is never touched
        self.lists = torch.where(there, self.lists, self.lists[:, :1])

    def _needs_mask(self, last: Tensor) -> Tensor:
        needs = (last == self.nk - 1) & (self.nk * self.block_k > self.Nk)
        if self.causal:
            needs |= (last + 1) * self.block_k - 1 > self._limits(torch.arange(len(last)), 0, 1)[:, 0]
        return needs

    def _limits(self, items: Tensor, start: int, stop: int) -> Tensor:
        """The last key that each of some rows of items may see, (items, rows)."""
        rows = torch.arange(start, stop) % self.block_q
        return (items % self.nq)[:, None] * self.block_q + rows + (self.Nk - self.Nq)

    def chunks(self) -> Iterator[_Chunk]:
        """All items that have keys, longest lists first, those with masks before the others."""
        order = (self.counts + self.needs_mask * (self.lists.shape[1] + 1)).sort(descending=True, stable=True).indices
        order = order[self.counts[order] > 0]
        lengths, masks = self.counts[order].tolist(), self.needs_mask[order].tolist()
        start = 0
        while start < len(lengths):
            length = lengths[start]
            stop = min(len(lengths), start + max(1, _tile() // (self.rows * length * self.block_k)))
            if self.rows < self.R:
                stop = start + 1
            if masks[start] != masks[stop - 1]:
                stop = masks.index(False, start)
            masked = masks[start] or lengths[stop - 1] < length
            yield _Chunk(order[start:stop], length, masked)
            start = stop

    def pieces(self, length: int) -> Iterator[slice]:
        """Lists in pieces whose scores fit a tile."""
        step = max(1, _tile() // (self.rows * self.block_k))
        return (slice(i, min(i + step, length)) for i in range(0, length, step))

    def row_pieces(self) -> Iterator[slice]:
        return (slice(i, min(i + self.rows, self.R)) for i in range(0, self.R, self.rows))

    def hidden(self, items: Tensor, slots: slice, rows: slice) -> Tensor:
        """Which scores count nothing: (items, 1 or rows, keys)."""
        blocks = self.lists[items, slots]
        keys = (blocks[..., None] * self.block_k + torch.arange(self.block_k, dtype=torch.int32)).flatten(1)
        padding = torch.arange(slots.start, slots.stop) >= self.counts[items, None]
        hidden = ((keys >= self.Nk) | padding.repeat_interleave(self.block_k, 1))[:, None]
        if not self.causal:
            return hidden
        return hidden | (keys[:, None] > self._limits(items, rows.start, rows.stop)[..., None])

    def split(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, Nq, ...) -> (items, R, ...) in some dtype; rows beyond the last query are zero."""
        rest = tensor.shape[3:]
        padded = _padded(tensor, self.nq * self.block_q, dtype)
        parts = padded.view(self.batch, self.heads, self.group, self.nq, self.block_q, *rest)
        return parts.transpose(2, 3).reshape(-1, self.R, *rest)

    def join(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `split`."""
        rest = rows.shape[2:]
        parts = rows.view(self.batch, self.heads, self.nq, self.group, self.block_q, *rest).transpose(2, 3)
        whole = parts.reshape(self.batch, self.heads * self.group, -1, *rest)
        return whole[:, :, : self.Nq].to(dtype).contiguous()

    def blocks_of(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, Hkv, Nk, D) -> (key blocks of all heads, block_k * D); keys beyond the last are zero."""
        return _padded(tensor, self.nk * self.block_k, dtype).reshape(-1, self.block_k * tensor.shape[3])


def _tile() -> int:
    return _TILE * torch.get_num_threads()


def _padded(tensor: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    if tensor.shape[2] == length:
        return tensor.to(dtype).contiguous()
    whole = tensor.new_zeros((*tensor.shape[:2], length, *tensor.shape[3:]), dtype=dtype)
    whole[:, :, : tensor.shape[2]] = tensor
    return whole


class _Workspace:
    """Memory that every chunk uses anew."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        size, dtype = math.prod(shape), dtype or self._like.dtype
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < size:
            flat = self._flat[name, dtype] = self._like.new_empty(size, dtype=dtype)
        return flat[:size].view(shape)

    def gather(self, name: str, blocks: Tensor, chosen: Tensor, width: int) -> Tensor:
        """The chosen blocks (items, slots) as rows (items, keys, width)."""
        out = self.get(name, chosen.numel(), blocks.shape[1], dtype=blocks.dtype)
        return torch.index_select(blocks, 0, chosen.reshape(-1), out=out).view(len(chosen), -1, width)

    def bmm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self.get(name, a.shape[0], a.shape[1], b.shape[2], dtype=a.dtype))


def _weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """What weights and values are multiplied in: bfloat16 where the processor multiplies it, accumulating wide."""
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return dtype
    return torch.promote_types(dtype, torch.float32)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    causal: bool,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    items = _Items(query, key, indices, counts, causal, block_q, block_k)
    wide = torch.promote_types(query.dtype, torch.float32)
    queries, keys = items.split(query, wide), items.blocks_of(key, wide)
    values = items.blocks_of(value, _weights_dtype(value.dtype))
    out = queries.new_zeros(*queries.shape[:2], value.shape[3])
    lse = queries.new_full(queries.shape[:2], -torch.inf)
    work = _Workspace(queries)
    for chunk in items.chunks():
        for rows in items.row_pieces():
            q = queries[chunk.items, rows].mul_(scale * _LOG2E)
            result, top, total = _attend(items, work, chunk, rows, q, keys, values)
            empty = total == 0 if chunk.masked else None
            if empty is not None:
                total = total.masked_fill(empty, 1.0)
            out[chunk.items, rows] = result.div_(total)
            lse[chunk.items, rows] = ((top + total.log2()) / _LOG2E).squeeze(-1)
    return items.join(out, query.dtype), items.join(lse, wide)


def _attend(
    items: _Items, work: _Workspace, chunk: _Chunk, rows: slice, q: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of values, running maximum to base 2 and sum of weights, (items, rows, E | 1 | 1)."""
    top = total = result = None
    for slots in items.pieces(chunk.length):
        chosen = items.lists[chunk.items, slots] + items.first_block[chunk.items, None]
        scores = work.bmm("scores", q, work.gather("keys", keys, chosen, q.shape[2]).mT)
        if chunk.masked:
            scores.masked_fill_(items.hidden(chunk.items, slots, rows), -torch.inf)
        peak = scores.amax(-1, keepdim=True)
        if top is not None:
            peak = torch.maximum(top, peak)
        safe = peak.masked_fill(peak == -torch.inf, 0.0) if chunk.masked else peak
        weights = scores.sub_(safe).exp2_()
        step = weights.sum(-1, keepdim=True)
        if values.dtype != weights.dtype:
            weights = work.get("weights", *weights.shape, dtype=values.dtype).copy_(weights)
        chosen_values = work.gather("values", values, chosen, values.shape[1] // items.block_k)
        part = torch.bmm(weights, chosen_values).to(q.dtype)
        if top is None:
            total, result = step, part
        else:
            shrink = torch.exp2(top - safe)
            total, result = total * shrink + step, result.mul_(shrink).add_(part)
        top = peak
    return result, top, total


def backward(
    d_out: Tensor,
    delta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    entries: Tensor,  # noqa: ARG001 - sums of whole blocks need no order
    starts: Tensor,  # noqa: ARG001
    causal: bool,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    items = _Items(query, key, indices, counts, causal, block_q, block_k)
    wide = lse.dtype
    queries, d_outs = items.split(query, wide), items.split(d_out, wide)
    lses, deltas = items.split(lse, wide)[..., None], items.split(delta, wide)[..., None]
    keys, values = items.blocks_of(key, wide), items.blocks_of(value, wide)
    d_queries, d_keys, d_values = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    work = _Workspace(queries)
    for chunk in items.chunks():
        for rows in items.row_pieces():
            q = queries[chunk.items, rows].mul_(scale * _LOG2E)
            top = lses[chunk.items, rows].mul_(_LOG2E)
            top.masked_fill_(top == -torch.inf, 0.0)
            d, shift = d_outs[chunk.items, rows], deltas[chunk.items, rows]
            d_q = torch.zeros_like(q)
            for slots in items.pieces(chunk.length):
                chosen = items.lists[chunk.items, slots] + items.first_block[chunk.items, None]
                k = work.gather("keys", keys, chosen, q.shape[2])
                weights = work.bmm("scores", q, k.mT)
                if chunk.masked:
                    weights.masked_fill_(items.hidden(chunk.items, slots, rows), -torch.inf)
                weights.sub_(top).exp2_()
                _add_blocks(d_values, chosen, work.bmm("d_values", weights.mT, d))
                v = work.gather("values", values, chosen, d.shape[2])
                d_scores = work.bmm("d_weights", d, v.mT).sub_(shift).mul_(weights)
                d_q.baddbmm_(d_scores, k)
                _add_blocks(d_keys, chosen, work.bmm("d_keys", d_scores.mT, q))
            d_queries[chunk.items, rows] = d_q.mul_(scale)
    return (
        items.join(d_queries, query.dtype),
        _whole(d_keys.div_(_LOG2E), key),  # q carried the factors of the scores to base 2
        _whole(d_values, value),
    )


def _add_blocks(total: Tensor, chosen: Tensor, parts: Tensor) -> None:
    total.index_add_(0, chosen.reshape(-1), parts.view(-1, total.shape[1]))


def _whole(blocks: Tensor, like: Tensor) -> Tensor:
    """Key blocks of all heads -> (B, Hkv, Nk, D)."""
    B, Hkv, Nk, D = like.shape
    return blocks.view(B, Hkv, -1, D)[:, :, :Nk].to(like.dtype).contiguous()
