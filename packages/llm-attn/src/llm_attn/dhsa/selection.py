"""Which keys a block of queries reads: chunks scored by their mean key, the best filled into a budget.

A chunk's vector is the mean of its keys over heads and tokens, times the square root of its length, so that long chunks
neither win nor lose by averaging; blocks of queries alike. A chunk's score is the product of both, and all tokens of
the chunk have it. The scores of tokens are never made: chunks are ranked, and their lengths added up until the budget
is full.

arXiv:2510.24606, sections 3.2 and 3.3 and the authors' released code. Decided here: what a block reads is a set, so
that no key counts twice (the code can list a key twice, and then differs from dense attention even with all keys in the
budget). A chunk that reaches beyond the block is scored by what the block may see of it, so that no later token moves
an earlier output. The last block is as long as it is. Scores that are NaN rank last.

Shapes: B batch, H query heads, Hkv key heads, Hl heads with lists of their own (1, or Hkv), Nq queries, Nk keys, D head
width, M chunks, nq blocks of queries, n keys listed.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_attn.dhsa.config import Pooling


class KeyLists(NamedTuple):
    """For each block of queries, the keys that it reads."""

    indices: Int[Tensor, "B Hl nq n"]
    """int32, ascending, -1 behind the last."""
    counts: Int[Tensor, "B Hl nq"]
    """int32, how many of the n entries hold."""


class Reach(NamedTuple):
    """Keys from `start` up to, not with, `stop`, that each block of queries may read."""

    start: Int[Tensor, "#B nq"]
    stop: Int[Tensor, "#B nq"]


def pool_ranges(
    x: Float[Tensor, "B Hl N D"], start: Int[Tensor, "#B m"], stop: Int[Tensor, "#B m"], pooling: Pooling
) -> Float[Tensor, "B Hl m D"]:
    """Tokens start[i] to stop[i] - 1 as one vector; 0 for none."""
    B, Hl, N, D = x.shape
    length = (stop - start).clamp(min=0)
    length, start = (t.expand(B, -1)[:, None].expand(B, Hl, -1).reshape(-1) for t in (length, start))
    first = start + torch.arange(B * Hl, device=x.device).repeat_interleave(start.numel() // max(1, B * Hl)) * N
    offsets = length.cumsum(0) - length
    index = torch.arange(int(length.sum()), device=x.device) + (first - offsets).repeat_interleave(length)
    mode = "max" if pooling == "maxpool" else "mean"
    pooled = torch.nn.functional.embedding_bag(index, x.reshape(-1, D), offsets, mode=mode)
    if pooling == "avgpool_norm":
        pooled = pooled * length.sqrt().to(pooled.dtype)[:, None]
    return pooled.view(B, Hl, -1, D)


def shared_heads(x: Float[Tensor, "B H N D"], list_heads: int) -> Float[Tensor, "B Hl N D"]:
    """Mean over the heads that share a list, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.detach()
    if list_heads == 1:
        return x.mean(1, keepdim=True, dtype=wide)
    return x.unflatten(1, (list_heads, -1)).mean(2, dtype=wide)


def chunk_keys(
    key: Float[Tensor, "B Hkv Nk D"],
    boundaries: Int[Tensor, "B M+1"],
    *,
    pooling: Pooling = "avgpool_norm",
    list_heads: int = 1,
) -> Float[Tensor, "B Hl M D"]:
    """The vector of each chunk: sqrt(m) times the mean of its m keys."""
    return pool_ranges(shared_heads(key, list_heads), boundaries[:, :-1], boundaries[:, 1:], pooling)


def select_keys(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    boundaries: Int[Tensor, "B M+1"],
    *,
    budget: int,
    block_size: int = 128,
    edges: Int[Tensor, "B nq+1"] | None = None,
    window: int | None = None,
    local_tokens: int = 128,
    global_tokens: int = 128,
    pooling: Pooling = "avgpool_norm",
    per_kv_head: bool = False,
) -> KeyLists:
    """The keys that each block of queries reads, `budget` of them or all that it may.

    Query i stands at key i + Nk - Nq. A block may read up to its last query's own key, and of these the last `window`;
    it always reads the last `local_tokens` and the first `global_tokens` that it may. `edges` are the ends of blocks of
    unequal length, instead of `block_size`. Boundaries ascend from 0 to at least Nk.
    """
    list_heads = key.shape[1] if per_kv_head else 1
    (Nq, Nk), base = (query.shape[2], key.shape[2]), key.shape[2] - query.shape[2]
    if edges is None:
        ends = torch.arange(0, Nq + block_size, block_size, device=key.device).clamp(max=Nq)
        edges = ends[: -(-Nq // block_size) + 1][None]
    stop = edges[:, 1:] + base
    start = torch.zeros_like(stop) if window is None else (stop - window).clamp(min=0)
    boundaries = boundaries.clamp(max=Nk)
    queries = pool_ranges(shared_heads(query, list_heads), edges[:, :-1], edges[:, 1:], pooling)
    scores = _scores(queries, shared_heads(key, list_heads), boundaries, stop, pooling)
    reach = Reach(start, stop)
    longest = min(Nk, budget) if window is None else min(Nk, budget, window)
    return fill_budget(
        scores, boundaries, reach, budget=budget, local_tokens=local_tokens, global_tokens=global_tokens, width=longest
    )


def _scores(
    queries: Tensor, key: Tensor, boundaries: Tensor, stop: Int[Tensor, "#B nq"], pooling: Pooling
) -> Float[Tensor, "B Hl nq M"]:
    """Products of blocks and chunks; the chunk that a block ends in counts up to there."""
    B, Hl, nq, _ = queries.shape
    M = boundaries.shape[1] - 1
    stop = stop.expand(B, -1)
    last = torch.searchsorted(boundaries[:, 1:].contiguous(), stop.contiguous())  # the chunk that holds token stop - 1
    last = last.clamp(max=M - 1)
    begin = boundaries[:, :-1].gather(1, last)
    starts, stops = torch.cat([boundaries[:, :-1], begin], 1), torch.cat([boundaries[:, 1:], stop], 1)
    vectors = pool_ranges(key, starts, stops, pooling)
    scores = queries @ vectors[:, :, :M].mT
    partial = (queries * vectors[:, :, M:]).sum(-1)
    cut = (boundaries[:, 1:].gather(1, last) > stop)[:, None]
    whole = scores.gather(3, last[:, None, :, None].expand(B, Hl, nq, 1))[..., 0]
    value = torch.where(cut, partial, whole)
    return scores.scatter(3, last[:, None, :, None].expand(B, Hl, nq, 1), value[..., None])


def fill_budget(
    scores: Float[Tensor, "B Hl nq M"],
    boundaries: Int[Tensor, "B M+1"],
    reach: Reach,
    *,
    budget: int,
    local_tokens: int,
    global_tokens: int,
    width: int,
) -> KeyLists:
    """Chunks into lists, best first, the last one cut; of equal scores the earlier chunk first.

    `width` is the room of a list, at least min(budget, keys in reach). Nothing of the size of blocks x tokens is
    sorted.
    """
    start, stop = (t[:, None] for t in reach)  # (B or 1, 1, nq)
    total = (stop - start).clamp(max=budget)
    local = total.clamp(max=local_tokens)
    first = (total - local).clamp(max=global_tokens)
    middle, end = start + first, stop - local
    cut = boundaries[:, None, None].clamp(middle[..., None], end[..., None])  # (B, 1, nq, M + 1)
    lengths = cut.diff(dim=-1).expand(scores.shape)
    order = scores.masked_fill(scores.isnan(), -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    ranked = lengths.gather(3, order)
    before = ranked.cumsum(-1) - ranked
    taken = torch.minimum(ranked, ((total - local - first)[..., None] - before).clamp(min=0))
    taken = torch.zeros_like(taken).scatter_(3, order, taken)
    edge = scores.shape[:3]
    firsts = torch.cat([t.expand(*edge, -1) for t in (start[..., None], cut[..., :-1], end[..., None])], 3)
    taken = torch.cat([first[..., None].expand(*edge, 1), taken, local[..., None].expand(*edge, 1)], 3)
    return _expand(firsts, taken, width)


def _expand(firsts: Int[Tensor, "B Hl nq m"], taken: Int[Tensor, "B Hl nq m"], width: int) -> KeyLists:
    """taken[i] numbers from firsts[i] on, for all i, as one list."""
    upto = taken.cumsum(-1)
    slots = torch.arange(width, device=taken.device).expand(*taken.shape[:3], -1).contiguous()
    run = torch.searchsorted(upto, slots, right=True).clamp(max=taken.shape[3] - 1)
    indices = (firsts - upto + taken).gather(3, run) + slots
    counts = upto[..., -1]
    return KeyLists(indices.masked_fill(slots >= counts[..., None], -1).int(), counts.int())
