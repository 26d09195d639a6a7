"""Lists of few query rows: products at the listed keys only, by the sparse primitives of `_rows`.

Block sizes are spelled out: every query row gets the list of its keys. Several heads are computed together while their
listed pairs fit a tile; a head with more pairs is one tile, as its gradients by key need all of them.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from shared_kernels import _rows
from shared_kernels.sparse_attention.lists import listed, transpose_lists

TILE = 1 << 20  # listed pairs
_LOG2E = math.log2(math.e)


class _Heads:
    """The lists of all query heads. Z is batches times query heads, n the listed keys of a row, padding included."""

    def __init__(
        self, query: Tensor, key: Tensor, indices: Tensor, counts: Tensor, causal: bool, block_q: int, block_k: int
    ) -> None:
        (B, H, self.Nq, _), (_, Hkv, self.Nk, _) = query.shape, key.shape
        self.Z, self.causal, self.block_k = B * H, causal, block_k
        if block_q > 1:
            indices, counts = (t.repeat_interleave(block_q, 2)[:, :, : self.Nq] for t in (indices, counts))
        self.indices, self.counts = indices, counts
        heads = torch.arange(self.Z)
        self.key_head, self.list_head = heads // (H // Hkv), heads // (H // indices.shape[1])
        full = int(counts.min()) == indices.shape[3]
        self.nothing_hidden = full and not causal and self.Nk % block_k == 0

    def chunks(self) -> Iterator[slice]:
        pairs = self.Nq * self.indices.shape[3] * self.block_k
        step = max(1, TILE // pairs)
        return (slice(i, min(i + step, self.Z)) for i in range(0, self.Z, step))

    def columns(self, heads: slice) -> tuple[Tensor, Tensor | None]:
        """Listed keys of some heads as rows of the flat (B * Hkv * Nk), and (heads, Nq, n) which of them to hide.

        What is hidden beyond a list's end, or beyond the last key, is replaced by the first key of the list.
        """
        lists, offsets = self.of_lists(self.indices, heads), (self.key_head[heads] * self.Nk).to(torch.int32)
        keys = lists[..., None] * self.block_k + torch.arange(self.block_k, dtype=torch.int32)
        hidden = None
        if not self.nothing_hidden:
            there = listed(lists, self.of_lists(self.counts, heads))[..., None]
            there = (there & (keys < self.Nk)).flatten(2)
            keys = torch.where(there, keys.flatten(2), keys[..., 0, :1].clamp(0, self.Nk - 1))
            if self.causal:
                there &= keys <= torch.arange(self.Nq, dtype=torch.int32)[:, None] + (self.Nk - self.Nq)
            hidden = ~there
        return keys.flatten(2).add_(offsets[:, None, None]).view(-1), hidden

    def of_lists(self, tensor: Tensor, heads: slice) -> Tensor:
        """The part of a tensor (B, Hl, ...) that serves some query heads, (heads, ...)."""
        flat = tensor.flatten(0, 1)
        return flat[heads] if len(flat) == self.Z else flat[self.list_head[heads]]


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
    heads = _Heads(query, key, indices, counts, causal, block_q, block_k)
    wide = torch.promote_types(query.dtype, torch.float32)
    queries, keys, values = (t.to(wide).flatten(0, 1) for t in (query, key, value))
    out = query.new_empty((*queries.shape[:2], value.shape[3]))
    lse = query.new_empty(queries.shape[:2], dtype=wide)
    for chunk in heads.chunks():
        flat, hidden = heads.columns(chunk)
        scores = _rows.scores_at(queries[chunk] * (scale * _LOG2E), keys, flat)
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0.0)
        weights = scores.sub_(top).exp2_()
        total = weights.sum(-1, keepdim=True)
        # every weight of the backward pass has the error of the LSE
        lse[chunk] = ((top.double() + total.double().log2()) / _LOG2E).squeeze(-1)
        empty = total == 0
        result = _rows.weighted_rows(flat, values, weights).div_(total.masked_fill_(empty, 1.0))
        out[chunk] = result.masked_fill_(empty, 0.0)
    return out.view(*query.shape[:3], -1), lse.view(query.shape[:3])


def backward(
    d_out: Tensor,
    delta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    entries: Tensor,
    starts: Tensor,
    causal: bool,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _Heads(query, key, indices, counts, causal, block_q, block_k)
    if block_q > 1:
        entries, starts = transpose_lists(heads.indices, heads.counts, num_key_blocks=starts.shape[2] - 1)
    tensors = (t.to(lse.dtype).flatten(0, 1) for t in (d_out, query, key, value, delta[..., None], lse[..., None]))
    d_outs, queries, keys, values, deltas, lses = tensors
    d_query = torch.empty_like(queries)
    d_key, d_value = (t.new_zeros(t.shape[0], starts.shape[2] - 1, block_k, t.shape[2]) for t in (keys, values))
    for chunk in heads.chunks():
        flat, hidden = heads.columns(chunk)
        q, d, top = queries[chunk] * scale, d_outs[chunk], (lses[chunk].double() * _LOG2E).to(lse.dtype)
        scores = _rows.scores_at(q * _LOG2E, keys, flat)
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        weights = scores.sub_(top.masked_fill_(top == -torch.inf, 0.0)).exp2_()
        d_scores = _rows.scores_at(d, values, flat).sub_(deltas[chunk]).mul_(weights)
        if hidden is not None:
            d_scores.masked_fill_(hidden, 0.0)  # 0 times what stands where nothing is seen
        d_query[chunk] = _rows.weighted_rows(flat, keys, d_scores).mul_(scale)
        turned = _turned_round(*(heads.of_lists(t, chunk) for t in (entries, starts)))
        _add_by_key(d_value, heads.key_head[chunk], turned, d, weights)
        _add_by_key(d_key, heads.key_head[chunk], turned, q, d_scores)
    d_key, d_value = (
        t.flatten(1, 2)[:, : heads.Nk].reshape(s.shape).to(s.dtype) for t, s in ((d_key, key), (d_value, value))
    )
    return d_query.view(query.shape).to(query.dtype), d_key, d_value


def _turned_round(entries: Tensor, starts: Tensor) -> _rows.Transposed:
    """The lists of several heads as one, with one more key block for each head, which takes the padding."""
    Z, size = entries.shape
    offsets = torch.arange(Z, dtype=torch.int32)[:, None] * size
    bounds = torch.cat([(starts + offsets).view(-1), starts.new_tensor([Z * size])])
    return _rows.Transposed((entries + offsets).view(-1), bounds)


def _add_by_key(total: Tensor, key_head: Tensor, lists: _rows.Transposed, rows: Tensor, weights: Tensor) -> None:
    """total[key head, block, offset] += sum over the entries that name the block of weight * row."""
    _, blocks, block_k, width = total.shape
    m = weights.shape[-1] // block_k
    for offset in range(block_k):
        at = weights.view(-1, block_k)[:, offset]
        sums = _rows.summed_by_key(lists, rows.flatten(0, 1), at, m).view(-1, blocks + 1, width)
        total[:, :, offset].index_add_(0, key_head, sums[:, :-1])
