"""Lists shared by many query rows: gather the listed key blocks, then dense products of matrices, a tile at a time.

An item is a query block of all heads that share its list and its keys; its rows are multiplied with one gathered copy.
Items are sorted by the length of their lists, so that those of one tile hardly need padding. Where something must be
hidden (keys in the future, the short last block, padding), lists are sorted as well: it then stands at their ends, and
only there a mask is applied. Tiles are small enough to stay in a core's cache while the softmax, to base 2, goes over
them in place.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 1 << 18  # scores in a tile, per thread
_FEWEST_ROWS = 16  # of a tile; query blocks are cut down to it if key blocks are large
_WIDE = 1024  # numbers in a block from which on adding blocks one by one is faster than sorting them
_LOG2E = math.log2(math.e)


class _Chunk(NamedTuple):
    """Items that are computed together."""

    items: Tensor | slice
    length: int
    """Entries of the longest list."""
    clear: int
    """Leading entries of which no row of any item must hide a key."""


class _Items:
    """What the lists say, item by item. R is the rows of an item: a query block's of all heads that share it."""

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
        lists = indices.repeat_interleave(share, 1).reshape(B * self.heads * self.nq, -1)
        self.counts = counts.repeat_interleave(share, 1).reshape(-1)
        heads = torch.arange(B * self.heads, dtype=torch.int32).repeat_interleave(self.nq)
        self.first_block = (heads // (self.heads // Hkv) * self.nk)[:, None]
        there = torch.arange(lists.shape[1], dtype=torch.int32) < self.counts[:, None]
        if causal or self.nk * block_k > self.Nk:
            lists = torch.where(there, lists, self.nk).sort(dim=1).values
            there &= (lists + 1) * block_k <= self._visible(torch.arange(len(lists)), 0, 1)
        self.clear = there.sum(1)
        # what pads a list is its own first block: what no list names is never touched
        slots = torch.arange(lists.shape[1], dtype=torch.int32)
        self.lists = torch.where(slots < self.counts[:, None], lists, lists[:, :1])

    def _visible(self, items: Tensor, start: int, stop: int) -> Tensor:
        """How many keys some rows of some items see at most, (items, rows or 1)."""
        if not self.causal:
            return torch.full((1, 1), self.Nk)
        rows = torch.arange(start, stop) % self.block_q
        last = (items % self.nq)[:, None] * self.block_q + rows
        return (last + 1 + self.Nk - self.Nq).clamp(max=self.Nk)

    def chunks(self) -> Iterator[_Chunk]:
        """All items that have keys, longest lists first."""
        order = self.counts.sort(descending=True, stable=True).indices
        order = order[: int((self.counts > 0).sum())]
        lengths, clears, numbers = self.counts[order].tolist(), self.clear[order].tolist(), order.tolist()
        start = 0
        while start < len(numbers):
            many = _tile() // (self.rows * lengths[start] * self.block_k) if self.rows == self.R else 1
            stop = min(len(numbers), start + max(1, many))
            first, last = numbers[start], numbers[stop - 1]
            in_order = numbers[start:stop] == list(range(first, last + 1))
            items = slice(first, last + 1) if in_order else order[start:stop]
            yield _Chunk(items, lengths[start], min(clears[start:stop]))
            start = stop

    def pieces(self, length: int) -> Iterator[slice]:
        """Lists in pieces whose scores fit a tile."""
        step = max(1, _tile() // (self.rows * self.block_k))
        return (slice(i, min(i + step, length)) for i in range(0, length, step))

    def row_pieces(self) -> Iterator[slice]:
        return (slice(i, min(i + self.rows, self.R)) for i in range(0, self.R, self.rows))

    def blocks(self, chunk: _Chunk, slots: slice) -> Tensor:
        """The listed key blocks, counted through all heads."""
        return self.lists[chunk.items, slots] + self.first_block[chunk.items]

    def hide(self, scores: Tensor, chunk: _Chunk, slots: slice, rows: slice) -> None:
        """Set scores (items, rows, keys) of what is not there, or not to be seen, to -inf."""
        slots = slice(max(chunk.clear, slots.start), slots.stop)
        if slots.start >= slots.stop:
            return
        blocks = self.lists[chunk.items, slots]
        keys = blocks[..., None] * self.block_k + torch.arange(self.block_k, dtype=torch.int32)
        padding = torch.arange(slots.start, slots.stop) >= self.counts[chunk.items, None]
        keys = torch.where(padding[..., None], self.Nk, keys).flatten(1)[:, None]
        items = torch.arange(len(self.lists))[chunk.items]
        hidden = keys >= self._visible(items, rows.start, rows.stop)[..., None]
        scores[..., -keys.shape[2] :].masked_fill_(hidden, -torch.inf)

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
    return TILE * torch.get_num_threads()


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
    work = _Workspace(queries)
    tops, totals = queries.new_zeros(2, *queries.shape[:2])
    for chunk in items.chunks():
        for rows in items.row_pieces():
            q = queries[chunk.items, rows] * (scale * _LOG2E)
            result, top, total = _attend(items, work, chunk, rows, q, keys, values)
            tops[chunk.items, rows], totals[chunk.items, rows] = top.squeeze(-1), total.squeeze(-1)
            if chunk.clear == 0:
                total.masked_fill_(total == 0, 1.0)
            out[chunk.items, rows] = result.div_(total)
    lse = tops.add_(totals.log2_()).div_(_LOG2E)
    return items.join(out, query.dtype), items.join(lse, wide)


class _State(NamedTuple):
    """A softmax over part of the keys, not divided by its sum yet; the maximum is that of scores to base 2."""

    result: Tensor
    top: Tensor
    total: Tensor


def _attend(
    items: _Items, work: _Workspace, chunk: _Chunk, rows: slice, q: Tensor, keys: Tensor, values: Tensor
) -> _State:
    """Some rows of some items over all their keys."""
    states: list[_State] = []
    for slots in items.pieces(chunk.length):
        chosen = items.blocks(chunk, slots)
        scores = work.bmm("scores", q, work.gather("keys", keys, chosen, q.shape[2]).mT)
        items.hide(scores, chunk, slots, rows)
        top = scores.amax(-1, keepdim=True)
        # rows that see none of these keys
        weights = scores.sub_(top.masked_fill(top == -torch.inf, 0.0) if slots.start >= chunk.clear else top).exp2_()
        total = weights.sum(-1, keepdim=True)
        if values.dtype != weights.dtype:
            weights = work.get("weights", *weights.shape, dtype=values.dtype).copy_(weights)
        chosen_values = work.gather("values", values, chosen, values.shape[1] // items.block_k)
        state = _State(torch.bmm(weights, chosen_values).to(q.dtype), top, total)
        states = [_joined(states[0], state) if states else state]
    return states[0]


def _joined(a: _State, b: _State) -> _State:
    top = torch.maximum(a.top, b.top)
    safe = top.masked_fill(top == -torch.inf, 0.0)
    share_a, share_b = torch.exp2(a.top - safe), torch.exp2(b.top - safe)
    result = (a.result * share_a).addcmul_(b.result, share_b)
    return _State(result, top, a.total * share_a + b.total * share_b)


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
            q, top = queries[chunk.items, rows] * (scale * _LOG2E), lses[chunk.items, rows] * _LOG2E
            top.masked_fill_(top == -torch.inf, 0.0)
            d, shift = d_outs[chunk.items, rows], deltas[chunk.items, rows]
            d_q = torch.zeros_like(q)
            for slots in items.pieces(chunk.length):
                chosen = items.blocks(chunk, slots)
                k = work.gather("keys", keys, chosen, q.shape[2])
                weights = work.bmm("scores", q, k.mT)
                items.hide(weights, chunk, slots, rows)
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
    parts, chosen = parts.view(-1, total.shape[1]), chosen.reshape(-1)
    if total.shape[1] < _WIDE:
        total.scatter_add_(0, chosen.long()[:, None].expand_as(parts), parts)
    else:
        total.index_add_(0, chosen, parts)


def _whole(blocks: Tensor, like: Tensor) -> Tensor:
    """Key blocks of all heads -> (B, Hkv, Nk, D)."""
    B, Hkv, Nk, D = like.shape
    return blocks.view(B, Hkv, -1, D)[:, :, :Nk].to(like.dtype).contiguous()
