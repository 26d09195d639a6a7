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

TILE = 1 << 18  # scores in a tile, per thread; half as many again at most
FEWEST_ROWS = 16  # of a tile; query blocks are cut down to it if key blocks are large
_WIDE = 1024  # numbers in a block from which on adding blocks one by one is faster than sorting them
_LOG2E = math.log2(math.e)


class _Chunk(NamedTuple):
    """Items that are computed together."""

    items: slice
    length: int
    """Entries of the longest list."""
    clear: int
    """Leading entries of which no row of any item must hide a key."""


class _Items:
    """What the lists say, item by item, longest first. R is the rows of an item: of a query block, in all its heads."""

    def __init__(
        self, query: Tensor, key: Tensor, indices: Tensor, counts: Tensor, causal: bool, block_q: int, block_k: int
    ) -> None:
        (B, H, self.Nq, _), (_, Hkv, self.Nk, _) = query.shape, key.shape
        self.heads = Hkv if indices.shape[1] <= Hkv else H
        self.group, self.batch, self.causal = H // self.heads, B, causal
        self.block_q, self.block_k = block_q, block_k
        self.nq, self.nk = indices.shape[2], -(-self.Nk // block_k)
        self.R = self.group * block_q
        self.rows = min(self.R, max(FEWEST_ROWS, _tile() // block_k))  # of a tile
        share = self.heads // indices.shape[1]
        counts = counts.repeat_interleave(share, 1).reshape(-1)
        self.order = counts.sort(descending=True, stable=True).indices
        self.in_order = torch.equal(self.order, torch.arange(len(counts)))
        self.counts = counts[self.order]
        lists = indices.repeat_interleave(share, 1).reshape(len(counts), -1)
        self._take_lists(lists if self.in_order else lists[self.order])
        kv_heads = self.order // self.nq // (self.heads // Hkv)
        self.flat = self.lists + (kv_heads * self.nk).to(torch.int32)[:, None]  # counted through all heads

    def _take_lists(self, lists: Tensor) -> None:
        slots = torch.arange(lists.shape[1], dtype=torch.int32)
        there = slots < self.counts[:, None]
        clear = there
        if self.causal or self.nk * self.block_k > self.Nk:
            lists = torch.where(there, lists, self.nk).sort(dim=1).values
            clear = there & ((lists + 1) * self.block_k <= self._visible(slice(None), slice(0, 1)))
        self.clear = clear.sum(1)
        # what pads a list is its own first block: what no list names is never touched
        self.lists = torch.where(there, lists, lists[:, :1])

    def _visible(self, items: slice, rows: slice) -> Tensor:
        """How many keys some rows of some items see at most, (items, rows) or (1, 1)."""
        if not self.causal:
            return torch.full((1, 1), self.Nk)
        offsets = torch.arange(rows.start, rows.stop) % self.block_q
        last = (self.order[items] % self.nq)[:, None] * self.block_q + offsets
        return (last + 1 + self.Nk - self.Nq).clamp(max=self.Nk)

    def chunks(self) -> Iterator[_Chunk]:
        """All items that have keys."""
        lengths, clears = self.counts[self.counts > 0].tolist(), self.clear.tolist()
        start = 0
        while start < len(lengths):
            many = round(_tile() / (self.rows * lengths[start] * self.block_k)) if self.rows == self.R else 1
            stop = min(len(lengths), start + max(1, many))
            yield _Chunk(slice(start, stop), lengths[start], min(clears[start:stop]))
            start = stop

    def pieces(self, length: int) -> list[slice]:
        """Lists in equal pieces whose scores fit a tile."""
        pieces = max(1, round(length * self.rows * self.block_k / _tile()))
        step = -(-length // pieces)
        return [slice(i, min(i + step, length)) for i in range(0, length, step)]

    def row_pieces(self) -> list[slice]:
        return [slice(i, min(i + self.rows, self.R)) for i in range(0, self.R, self.rows)]

    def hide(self, scores: Tensor, chunk: _Chunk, slots: slice, rows: slice) -> None:
        """Set scores (items, rows, keys) of what is not there, or not to be seen, to -inf."""
        first = max(chunk.clear, slots.start)
        if first >= slots.stop:
            return
        blocks = self.lists[chunk.items, first : slots.stop]
        keys = blocks[..., None] * self.block_k + torch.arange(self.block_k, dtype=torch.int32)
        padding = torch.arange(first, slots.stop) >= self.counts[chunk.items, None]
        keys = torch.where(padding[..., None], self.Nk, keys).flatten(1)[:, None]
        hidden = keys >= self._visible(chunk.items, rows)[..., None]
        scores[..., -keys.shape[2] :].masked_fill_(hidden, -torch.inf)

    def split(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, Nq, ...) -> (items, R, ...) in some dtype; rows beyond the last query are zero."""
        rest = tensor.shape[3:]
        padded = _padded(tensor, self.nq * self.block_q, dtype)
        parts = padded.view(self.batch, self.heads, self.group, self.nq, self.block_q, *rest)
        rows = parts.transpose(2, 3).reshape(-1, self.R, *rest)
        return rows if self.in_order else rows[self.order]

    def join(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `split`."""
        rest = rows.shape[2:]
        if not self.in_order:
            rows = torch.empty_like(rows).index_copy_(0, self.order, rows)
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

    def gather(self, name: str, blocks: Tensor, chosen: Tensor, items: int, width: int) -> Tensor:
        """The chosen blocks as rows (items, keys, width)."""
        out = self.get(name, chosen.numel(), blocks.shape[1], dtype=blocks.dtype)
        return torch.index_select(blocks, 0, chosen, out=out).view(items, -1, width)

    def bmm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self.get(name, a.shape[0], a.shape[1], b.shape[2], dtype=a.dtype))


def _weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """What weights and values are multiplied in: bfloat16 where the processor multiplies it, accumulating wide."""
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return dtype
    return torch.promote_types(dtype, torch.float32)


class _State(NamedTuple):
    """A softmax over part of the keys, not divided by its sum yet; the maximum is that of scores to base 2."""

    result: Tensor
    top: Tensor
    total: Tensor


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
    queries, keys = items.split(query, wide) * (scale * _LOG2E), items.blocks_of(key, wide)
    values = items.blocks_of(value, _weights_dtype(value.dtype))
    out = queries.new_zeros(*queries.shape[:2], value.shape[3])
    tops, totals = queries.new_zeros(2, *queries.shape[:2], 1)
    work = _Workspace(queries)
    for chunk in items.chunks():
        for rows in items.row_pieces():
            result, top, total = _attend(items, work, chunk, rows, queries[chunk.items, rows], keys, values)
            tops[chunk.items, rows], totals[chunk.items, rows] = top, total
            if chunk.clear == 0:
                total.masked_fill_(total == 0, 1.0)
            torch.div(result, total, out=out[chunk.items, rows])
    lse = (tops.double() + totals.double().log2()) / _LOG2E  # every weight of the backward pass has its error
    return items.join(out, query.dtype), items.join(lse.squeeze(-1), wide)


def _attend(
    items: _Items, work: _Workspace, chunk: _Chunk, rows: slice, q: Tensor, keys: Tensor, values: Tensor
) -> _State:
    """Some rows of some items over all their keys."""
    states: list[_State] = []
    for slots in items.pieces(chunk.length):
        chosen = items.flat[chunk.items, slots].reshape(-1)
        scores = work.bmm("scores", q, work.gather("gathered", keys, chosen, len(q), q.shape[2]).mT)
        items.hide(scores, chunk, slots, rows)
        top = scores.amax(-1, keepdim=True)
        # rows that see none of these keys
        weights = scores.sub_(top.masked_fill(top == -torch.inf, 0.0) if slots.start >= chunk.clear else top).exp2_()
        total = weights.sum(-1, keepdim=True)
        if values.dtype != weights.dtype:
            weights = work.get("weights", *weights.shape, dtype=values.dtype).copy_(weights)
        v = work.gather("gathered", values, chosen, len(q), values.shape[1] // items.block_k)
        state = _State(torch.bmm(weights, v).to(q.dtype), top, total)
        states = [_joined(states[0], state) if states else state]
    return states[0]


def _joined(a: _State, b: _State) -> _State:
    top = torch.maximum(a.top, b.top)
    safe = top.masked_fill(top == -torch.inf, 0.0)
    share_a, share_b = torch.exp2(a.top - safe), torch.exp2(b.top - safe)
    return _State(a.result * share_a + b.result * share_b, top, a.total * share_a + b.total * share_b)


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
    queries, d_outs = items.split(query, lse.dtype) * (scale * _LOG2E), items.split(d_out, lse.dtype)
    tops, deltas = items.split(lse.double() * _LOG2E, lse.dtype)[..., None], items.split(delta, lse.dtype)[..., None]
    tops.masked_fill_(tops == -torch.inf, 0.0)  # rows that see no key
    keys, values = items.blocks_of(key, lse.dtype), items.blocks_of(value, lse.dtype)
    d_queries, d_keys, d_values = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    work = _Workspace(queries)
    for chunk in items.chunks():
        for rows in items.row_pieces():
            q, d, d_q = (t[chunk.items, rows] for t in (queries, d_outs, d_queries))
            for slots in items.pieces(chunk.length):
                chosen = items.flat[chunk.items, slots].reshape(-1)
                k = work.gather("keys", keys, chosen, len(q), q.shape[2])
                weights = work.bmm("scores", q, k.mT)
                items.hide(weights, chunk, slots, rows)
                weights.sub_(tops[chunk.items, rows]).exp2_()
                _add_blocks(d_values, chosen, work.bmm("d_values", weights.mT, d))
                v = work.gather("values", values, chosen, len(q), d.shape[2])
                d_scores = work.bmm("d_weights", d, v.mT).sub_(deltas[chunk.items, rows]).mul_(weights)
                d_q.baddbmm_(d_scores, k)
                _add_blocks(d_keys, chosen, work.bmm("d_keys", d_scores.mT, q))
    return (
        items.join(d_queries.mul_(scale), query.dtype),
        _whole(d_keys.div_(_LOG2E), key),  # q carried the factors of the scores to base 2
        _whole(d_values, value),
    )


def _add_blocks(total: Tensor, chosen: Tensor, parts: Tensor) -> None:
    parts = parts.view(-1, total.shape[1])
    if total.shape[1] < _WIDE:
        total.scatter_add_(0, chosen.long()[:, None].expand_as(parts), parts)
    else:
        total.index_add_(0, chosen, parts)


def _whole(blocks: Tensor, like: Tensor) -> Tensor:
    """Key blocks of all heads -> (B, Hkv, Nk, D)."""
    B, Hkv, Nk, D = like.shape
    return blocks.view(B, Hkv, -1, D)[:, :, :Nk].to(like.dtype).contiguous()
