"""What select_blocks and choose_blocks promise."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shared_kernels.select_blocks import choose_blocks, reference, select_blocks
from shared_kernels.testing import Make, OpSpec, Refusal, Sample

INF, NAN = math.inf, math.nan


def _tokens(
    make: Make, queries: int, keys: int, *, batch: int = 1, heads: int = 3, kv_heads: int = 3, width: int = 20
) -> Sample:
    return {"query": make.normal(batch, heads, queries, width), "key": make.normal(batch, kv_heads, keys, width)}


def _whole_numbers(make: Make, batch: int, heads: int, tokens: int, width: int) -> dict[str, Tensor]:
    """Means over powers of two, and their products, are exact in float32: what ties, ties in every implementation."""
    return {name: make.normal(batch, heads, tokens, width).round() for name in ("query", "key")}


def _pattern(make: Make, *shape: int, every: int) -> Tensor:
    return (torch.arange(math.prod(shape), device=make.device) % every == 2).view(shape)


def _band(make: Make, rows: int, columns: int) -> Tensor:
    """The first column and a diagonal."""
    row, column = torch.arange(rows, device=make.device)[:, None], torch.arange(columns, device=make.device)
    return (column == 0) | (row == column)


def select_samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {"a share": {**_tokens(make, 7, 11), "block_size": (2, 3), "topk": 0.5}}
    if size == "medium":
        return {"many blocks": {**_tokens(make, 1501, 1203, batch=2), "block_size": (4, 4), "topk": 0.1}}
    if size == "real":
        return {
            "a share": {**_whole_numbers(make, 1, 16, 32768, 64), "block_size": (64, 64), "topk": 0.1},
            "1,024 blocks": {**_whole_numbers(make, 1, 2, 65536, 128), "block_size": (64, 64), "topk": 0.05},
        }
    few = {"block_size": (8, 4)}
    causal = {"causal": True, "forced": _band(make, 5, 14)}
    return {
        "a share": {**_tokens(make, 37, 53, batch=2), **few, "topk": 0.25},
        "a mass": {**_tokens(make, 37, 53), **few, "topp": 0.6, "scale": 2.0},
        "a share and a mass": {
            **_tokens(make, 37, 53, heads=4, kv_heads=2), **few, "topk": 3, "topp": 0.3, "scale": 1.5
        },
        "a list for each group": {**_tokens(make, 37, 53, heads=6), **few, "topk": 4, "list_heads": 3},
        "a list for all heads": {
            **_tokens(make, 37, 53, heads=6), **few, "topk": 2, "topp": 0.5, "scale": 4.0, "list_heads": 1
        },
        "forced for each sequence": {
            **_tokens(make, 37, 53, batch=2), **few, "topk": 2, "forced": _pattern(make, 2, 1, 1, 14, every=5)
        },
        "causal": {**_tokens(make, 37, 53), **few, "topk": 3, **causal},
        "causal, fewer keys": {**_tokens(make, 37, 19), "block_size": (5, 3), "topk": 3, "causal": True},
        "causal, a mass": {**_tokens(make, 37, 53), **few, "topp": 0.5, "scale": 3.0, **causal},
        "single keys": {**_tokens(make, 37, 21), "block_size": (16, 1), "topk": 0.3},
        "many ties": {**_whole_numbers(make, 2, 1, 40, 2), "block_size": (8, 2), "topk": 7, "scale": 1.0},
        "large scores": {
            "query": make.normal(1, 2, 23, 16, scale=30.0), "key": make.normal(1, 2, 41, 16, scale=30.0),
            "block_size": (4, 4), "topp": 0.9,
        },
        "keys that are no numbers": {
            "query": make.normal(1, 2, 23, 16),
            "key": make.normal(1, 2, 41, 16).index_fill(2, torch.tensor([13, 40], device=make.device), NAN),
            "block_size": (4, 4), "topk": 9, "topp": 0.9,
        },
        "one token": {**_tokens(make, 1, 1), "topk": 1},
        "strided memory": {"query": make.strided(1, 2, 23, 16), "key": make.transposed(1, 2, 41, 16), **few, "topk": 4},
        "no keys": {**_tokens(make, 7, 0), **few, "topk": 3},
        "no queries": {**_tokens(make, 0, 7), **few, "topp": 0.4},
        "no sequences": {"query": make.normal(0, 2, 9, 8), "key": make.normal(0, 2, 9, 8), **few, "topk": 2},
    }  # fmt: skip


def _spoiled(make: Make) -> Tensor:
    """Scores with NaN, both infinities, and a row of nothing."""
    scores = make.normal(2, 2, 7, 53)
    if make.device == "meta":
        return scores
    scores[0, 0, 0, :3] = NAN
    scores[0, 1, 1] = -INF
    scores[0, 1, 2, 5:] = -INF
    scores[1, 1, 3, 7] = INF
    return scores


def choose_samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {"a mass": {"scores": make.normal(2, 2, 3, 9), "topp": 0.7}}
    if size == "medium":
        wide = make.normal(2, 3, 501, 131, wide=True)
        return {
            "several chunks": {"scores": wide, "topk": 0.1, "forced": _band(make, 501, 131)},
            "several chunks, a mass": {"scores": wide, "topk": 3, "topp": 0.3},
        }
    if size == "real":
        return {
            "512 blocks": {"scores": make.normal(1, 16, 512, 512), "topk": 0.1},
            "1,024 blocks, everything": {
                "scores": make.normal(1, 12, 1024, 1024, wide=True), "topk": 0.2, "topp": 0.3,
                "forced": _band(make, 1024, 1024),
            },
            "100 blocks": {"scores": make.normal(2, 4, 100, 100, wide=True), "topp": 0.5},
            "8,192 blocks": {"scores": make.normal(1, 1, 300, 8192), "topk": 512},
        }  # fmt: skip
    return {
        "a number": {"scores": make.normal(1, 3, 19, 53), "topk": 5},
        "not a number, infinities": {"scores": _spoiled(make), "topk": 5},
        "not a number, infinities, a mass": {"scores": _spoiled(make), "topp": 0.3},
        "not a number, infinities, forced": {
            "scores": _spoiled(make), "topk": 9, "topp": 0.5, "forced": _pattern(make, 7, 53, every=9)
        },
        "forced alone": {"scores": _spoiled(make), "topk": 0, "forced": _pattern(make, 2, 1, 1, 53, every=6)},
        "more than there are": {"scores": _spoiled(make), "topk": 60},
        "none": {"scores": make.normal(1, 1, 7, 13), "topk": 0},
        "all the mass": {"scores": make.normal(1, 1, 7, 53), "topp": 1.0},
        "no mass": {"scores": make.normal(1, 1, 7, 53), "topp": 0.0},
        "ties": {"scores": make.normal(1, 1, 7, 53).round(), "topk": 9},
        "ties in the mass": {"scores": make.normal(1, 1, 7, 53).round(), "topp": 0.515},
        "strided memory": {"scores": make.strided(1, 2, 7, 11), "topk": 0.5},
    }  # fmt: skip


def _lists(keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    indices = torch.full((*keep.shape[:-1], width), -1, dtype=torch.int32)
    for row, listed in zip(keep.flatten(0, 2), indices.flatten(0, 2), strict=True):
        found = row.nonzero()[:, 0]
        listed[: len(found)] = found
    return indices, keep.sum(-1, dtype=torch.int32)


def agrees_with_a_loop(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Block by block, taking the best until there are enough."""
    query, key = make.normal(2, 3, 11, 5), make.normal(2, 3, 13, 5)
    keep = torch.zeros(2, 3, 3, 5, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, keep.shape[:3])):
        scores = torch.stack([query[b, h, 4 * i : 4 * i + 4].mean(0) @ k.mean(0) for k in key[b, h].split(3)]) / 5**0.5
        weight = scores.exp() / scores.exp().sum()
        while keep[b, h, i].sum() < 2 or weight[keep[b, h, i]].sum() <= 0.5:
            keep[b, h, i, scores.masked_fill(keep[b, h, i], -INF).argmax()] = True
    yield from zip(op(query, key, block_size=(4, 3), topk=2, topp=0.5), _lists(keep, 5), strict=True)


def more_never_removes_a_block(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    query, key = make.normal(1, 2, 29, 6), make.normal(1, 2, 31, 6)
    before = torch.zeros(1, 2, 8, 16, dtype=torch.bool)
    for topk, topp in ((1, 0.0), (2, 0.2), (2, 0.5), (6, 0.5), (6, 0.9), (0.9, 0.9), (1.0, 0.9)):
        indices, counts = op(query, key, block_size=(4, 2), topk=topk, topp=topp)
        kept = indices.long().masked_fill(indices < 0, 16)
        keep = torch.zeros(1, 2, 8, 17).scatter(-1, kept, 1.0)[..., :16] > 0
        yield keep.sum(-1, dtype=torch.int32), counts
        yield keep & before, before
        before = keep
    yield before, torch.ones_like(before)


def a_constant_added_to_all_keys_changes_nothing(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    query, key, constant = make.normal(1, 2, 29, 6), make.normal(1, 2, 31, 6), make.normal(6)
    choice = {"block_size": (4, 2), "topk": 3, "topp": 0.4}
    yield from zip(op(query, key, **choice), op(query, key + constant, **choice), strict=True)
    choice["topp"] = None  # only a share is blind to the scale
    yield from zip(op(query, key, **choice), op(7 * query, key, **choice), strict=True)


def scores_decide(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    scores = torch.tensor([[[[1.0, 3.0, 3.0, -INF, 3.0, NAN, 2.0]]]], dtype=make.dtype)
    weights = scores.exp().nan_to_num(nan=0.0)
    share = float(weights[..., 1] / weights.sum())
    forced = torch.tensor([False, True, False, True, False, False, True])
    for choice, expected in (
        ({"topk": 2}, [1, 2]),
        ({"topk": 7}, [0, 1, 2, 4, 6, -1, -1]),
        ({"topk": 0.6}, [1, 2, 4, 6]),
        ({"topk": 0.01}, [1]),
        ({"topp": 1.5 * share}, [1, 2, -1, -1, -1, -1, -1]),
        ({"topp": 1.5 * share, "topk": 1}, [1, 2, -1, -1, -1, -1, -1]),
        ({"topp": 0.5 * share, "topk": 3}, [1, 2, 4, -1, -1, -1, -1]),
        (
            {"topk": 1, "forced": forced},
            [1, 3, 6, -1, -1, -1, -1],
        ),
    ):
        indices, counts = op(scores, **choice)
        yield indices[0, 0, 0], torch.tensor(expected, dtype=torch.int32)
        yield counts[0, 0, 0], torch.tensor(sum(e >= 0 for e in expected), dtype=torch.int32)


def launches(sample: Sample) -> None:
    from shared_kernels.select_blocks import triton

    scores = sample.get("scores")
    if scores is None:
        blocks = [
            sample[name].shape[2] // size for name, size in zip(("query", "key"), sample["block_size"], strict=True)
        ]
        scores = torch.empty((*sample["query"].shape[:2], *blocks), device="meta")
    forced, topk = sample.get("forced"), sample.get("topk", 0)
    forced = None if forced is None else forced.expand(scores.shape)
    count = int(topk * scores.shape[-1]) if isinstance(topk, float) else topk
    triton.forward(scores.float(), forced, count, sample.get("topp"))


def cost(sample: Sample) -> tuple[int, int]:
    """Of the matrix product; the rest is comparisons."""
    if (scores := sample.get("scores")) is not None:
        return 0, scores.numel() * 4
    query, key = sample["query"], sample["key"]
    sizes = sample.get("block_size", (128, 128))
    B, H, Nq, D = query.shape
    pairs = math.ceil(Nq / sizes[0]) * math.ceil(key.shape[2] / sizes[1])
    products = key.shape[1] if sample.get("list_heads") == 1 else sample.get("list_heads", H)
    return 2 * B * products * pairs * D, query.nbytes + key.nbytes


def _largest(sample: Sample) -> int:
    """Scores or lists themselves, whichever are more, or where each kept block of a chunk stands, as two numbers."""
    if (scores := sample.get("scores")) is not None:
        return max(scores.untyped_storage().nbytes() // scores.element_size(), 2 * min(scores.numel(), 262_144))
    sizes = sample.get("block_size", (128, 128))
    rows = math.prod(sample["query"].shape[:2]) * math.ceil(sample["query"].shape[2] / sizes[0])
    scores = rows * math.ceil(sample["key"].shape[2] / sizes[1])
    return max(scores, 2 * min(scores, 262_144), rows)


_REFUSED_CHOICE: dict[str, Refusal] = {
    "neither": ({"topk": None}, ValueError, "give topk, topp or both, got neither"),
    "a share of more than all": ({"topk": 1.5}, ValueError, r"topk as a share must lie in \(0, 1\], got 1.5"),
    "a negative number": ({"topk": -1}, ValueError, "topk must be at least 0, got -1"),
    "a mass of more than all": ({"topp": 1.5}, ValueError, r"topp must lie in \[0, 1\], got 1.5"),
    "forced numbers": ({"forced": torch.ones(5, 14)}, TypeError, "forced must be of torch.bool, got torch.float32"),
    "forced of another shape": ({"forced": torch.ones(3, 14, dtype=torch.bool)}, ValueError, "forced must have a"),
    "forced on another device": (
        {"forced": torch.ones(1, 1, dtype=torch.bool, device="meta")}, ValueError, "forced must be on cpu"
    ),
}  # fmt: skip

# a packed mask goes through the stack
_SPILLED = {dtype: {"sm_89": 8, "sm_90": 8, "sm_100": 8, "sm_120": 8} for dtype in (torch.float32, torch.bfloat16)}

SPECS = (
    OpSpec(
        op=select_blocks,
        reference=reference.select_blocks,
        samples=select_samples,
        laws=(agrees_with_a_loop, more_never_removes_a_block, a_constant_added_to_all_keys_changes_nothing),
        refused={
            **_REFUSED_CHOICE,
            "query without heads": ({"query": torch.ones(2, 9, 8)}, ValueError, r"query must have shape \(batch"),
            "query of integers": ({"query": torch.ones(2, 3, 9, 20).int()}, TypeError, "query must be of a"),
            "key of another dtype": ({"key": torch.ones(2, 3, 9, 20).half()}, TypeError, "key must be of the dtype of"),
            "key of another width": ({"key": torch.ones(2, 3, 9, 7)}, ValueError, r"key must have shape \(2, heads"),
            "key heads do not divide": ({"key": torch.ones(2, 2, 9, 20)}, ValueError, "heads of query must be a"),
            "key elsewhere": ({"key": torch.ones(2, 3, 9, 20, device="meta")}, ValueError, "key must be on cpu like"),
            "no block size": ({"block_size": (8, 0)}, ValueError, "block_size must be at least 1, got 0"),
            "list heads in between": ({"list_heads": 2}, ValueError, r"list_heads must be one of \[1, 3\], got 2"),
        },
        library_ops=(torch.ops.shared_kernels.select_blocks.default,),
        launches=launches,
        cost=cost,
        spill_allowed=_SPILLED,
        largest=_largest,
    ),
    OpSpec(
        op=choose_blocks,
        reference=reference.choose_blocks,
        samples=choose_samples,
        laws=(scores_decide,),
        refused={
            **_REFUSED_CHOICE,
            "scores without heads": ({"scores": torch.ones(2, 9, 8)}, ValueError, r"scores must have shape \(batch"),
            "scores of integers": ({"scores": torch.ones(2, 3, 9, 8).int()}, TypeError, "scores must be of a"),
        },
        library_ops=(torch.ops.shared_kernels.select_blocks.default,),
        launches=launches,
        cost=cost,
        spill_allowed=_SPILLED,
        largest=_largest,
    ),
)  # fmt: skip
