"""What sparse_attention promises."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_kernels.sparse_attention import cpu_blocks, cpu_tokens, reference, sparse_attention, transpose_lists
from shared_kernels.states import merge_states
from shared_kernels.testing import Make, OpSpec, Sample

Op = Callable[..., Any]


def _tensors(
    make: Make, batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int, value_width: int
) -> Sample:
    return {
        "query": make.normal(batch, heads, queries, width),
        "key": make.normal(batch, kv_heads, keys, width),
        "value": make.normal(batch, kv_heads, keys, value_width),
    }


def _lists(
    make: Make, sample: Sample, block_size: tuple[int, int], m: int, *, heads: int, ragged: bool = False
) -> Sample:
    """m different key blocks per query block, in no order; ragged ones have 0 to m, but one has all and one none."""
    batch, queries, keys = sample["query"].shape[0], sample["query"].shape[2], sample["key"].shape[2]
    nq, nk = -(-queries // block_size[0]), -(-keys // block_size[1])
    generator = torch.Generator().manual_seed(nq * nk + m)
    indices = torch.rand(batch, heads, nq, nk, generator=generator).argsort(-1)[..., :m].to(torch.int32)
    lists: Sample = {"indices": indices, "block_size": block_size, "return_lse": True}
    if ragged:
        counts = torch.randint(0, m + 1, (batch, heads, nq), generator=generator, dtype=torch.int32)
        counts.view(-1)[:2] = torch.tensor([m, 0])
        lists["counts"] = counts
        # behind the end of a list stands what must not be read as a block
        lists["indices"] = indices.where(torch.arange(m) < counts[..., None], -7)
    return sample | {k: v.to(make.device) if isinstance(v, Tensor) else v for k, v in lists.items()}


def _with_rows(make: Make, sample: Sample) -> Sample:
    shape = (*sample["query"].shape[:2], sample["indices"].shape[2])
    bias = make.normal(*shape, sample["value"].shape[3])
    return sample | {"row_scale": make.normal(*shape), "row_bias": bias}


def _small(make: Make) -> dict[str, Sample]:
    grouped = _tensors(make, 2, 4, 2, 37, 53, 24, 40)
    per_head = _tensors(make, 1, 4, 2, 45, 59, 16, 16)
    more_queries = _tensors(make, 1, 2, 2, 43, 30, 32, 17)
    memory = {"query": make.transposed(2, 3, 6, 40), "key": make.strided(2, 1, 35, 40)}
    memory["value"] = make.transposed(2, 1, 35, 20)
    # every weight is 1: what reaches query and key comes from the LSE alone, and must not drown in values
    one_key = _tensors(make, 2, 2, 1, 5, 1, 16, 16) | {"value": make.normal(2, 1, 1, 16, scale=0.01)}
    large = _tensors(make, 1, 2, 1, 50, 70, 80, 24)
    # scores around 100, and -100 in every other row: exp of neither fits float32. Large ones that differ as much would
    # test how an LSE is rounded instead, of which every weight of the backward pass is made
    large["query"][..., 0], large["query"][:, :, ::2, 0], large["key"][..., 0] = 30.0, -30.0, 30.0
    return {
        "grouped heads": _with_rows(make, _lists(make, grouped, (16, 8), 4, heads=2, ragged=True)),
        "lists per head, causal": _lists(make, per_head, (32, 16), 3, heads=4, ragged=True) | {"causal": True},
        "blocks over single keys, rows that see none": _lists(make, more_queries, (16, 1), 9, heads=1)
        | {"causal": True},
        "single tokens": _lists(make, _tensors(make, 1, 4, 2, 5, 31, 19, 16), (1, 1), 7, heads=4, ragged=True),
        "single queries over blocks, strided memory": _lists(make, memory, (1, 16), 2, heads=1) | {"causal": True},
        "few rows": _lists(make, _tensors(make, 1, 2, 2, 8, 17, 33, 18), (5, 3), 4, heads=2, ragged=True),
        "large scores": _lists(make, large, (64, 32), 2, heads=1),
        "one query": _lists(make, _tensors(make, 5, 4, 2, 1, 17, 16, 16), (16, 16), 2, heads=1),
        "one key": _lists(make, one_key, (16, 16), 1, heads=1) | {"scale": 0.3},
        "no keys": _lists(make, _tensors(make, 2, 2, 1, 5, 0, 16, 20), (4, 4), 0, heads=1),
        "empty lists": _lists(make, _tensors(make, 2, 2, 1, 5, 7, 16, 20), (4, 4), 0, heads=2),
        "no batch": _lists(make, _tensors(make, 0, 2, 1, 5, 7, 16, 20), (4, 4), 1, heads=1),
        "not a number where nobody looks": _spoiled(make, 40, (32, 8)),
        "not a number where no single query looks": _spoiled(make, 6, (1, 1)),
    }


def _spoiled(make: Make, queries: int, block_size: tuple[int, int]) -> Sample:
    """Keys that no list names hold NaN; lists are short, so that what pads them could be one of those."""
    sample = _lists(make, _tensors(make, 1, 2, 1, queries, 44, 16, 24), block_size, 5, heads=1, ragged=True)
    block, size = sample["indices"] % 2, block_size[1]
    sample["indices"] = sample["indices"].where(block == 0, sample["indices"] - 1)  # even blocks only, some twice
    odd = torch.arange(44, device=make.device) // size % 2 == 1
    spoiled = {name: sample[name].masked_fill(odd[:, None], torch.nan) for name in ("key", "value")}
    return sample | spoiled


def samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        blocks = _lists(make, _tensors(make, 1, 2, 1, 11, 13, 5, 3), (6, 4), 2, heads=1, ragged=True)
        tokens = _lists(make, _tensors(make, 1, 2, 2, 5, 7, 4, 3), (1, 1), 3, heads=2, ragged=True)
        return {"blocks": _with_rows(make, blocks) | {"causal": True}, "tokens": _with_rows(make, tokens)}
    if size == "real":
        return {
            "blocks": _lists(make, _tensors(make, 1, 8, 4, 4_000, 4_100, 64, 64), (128, 64), 9, heads=4, ragged=True),
            "wide blocks": _lists(make, _tensors(make, 1, 4, 2, 4_000, 4_000, 128, 128), (64, 128), 7, heads=4),
            "widest": _lists(make, _tensors(make, 1, 2, 2, 1_000, 2_100, 256, 256), (128, 64), 5, heads=2)
            | {"causal": True},
            "odd width": _lists(make, _tensors(make, 2, 4, 2, 1_000, 2_100, 72, 40), (64, 64), 5, heads=2),
            "blocks over single keys": _lists(
                make, _tensors(make, 1, 4, 2, 2_000, 3_000, 64, 64), (128, 1), 300, heads=1
            ),
            "single tokens": _lists(make, _tensors(make, 1, 4, 4, 1_000, 2_000, 64, 64), (1, 1), 40, heads=4),
        }
    if size == "medium":
        rows = _tensors(make, 1, 2, 1, 700, 1_300, 4, 6)
        return {
            "several chunks": _lists(
                make, _tensors(make, 1, 4, 2, 1_500, 1_700, 8, 4), (64, 32), 9, heads=4, ragged=True
            ),
            "long lists, causal": _lists(make, _tensors(make, 1, 2, 1, 250, 2_900, 12, 8), (128, 16), 170, heads=2)
            | {"causal": True},
            "large blocks": _lists(make, rows, (512, 600), 2, heads=1),
            "many pairs": _lists(make, _tensors(make, 1, 6, 3, 1_100, 1_300, 4, 3), (1, 1), 200, heads=6),
        }
    return _small(make)


def _without_lists(sample: Sample) -> Sample:
    return {name: sample[name] for name in ("query", "key", "value")}


def agrees_with_the_sum_by_hand(op: Op, make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """The definition, row by row."""
    sample = _with_rows(make, _lists(make, _tensors(make, 2, 4, 2, 7, 11, 5, 3), (3, 2), 3, heads=2, ragged=True))
    query, key, value, indices, counts = (sample[n] for n in ("query", "key", "value", "indices", "counts"))
    expected, lse = torch.zeros(2, 4, 7, 3, dtype=make.dtype), torch.full((2, 4, 7), -torch.inf, dtype=make.dtype)
    for b, h, i in itertools.product(range(2), range(4), range(7)):
        block, kv = i // 3, h // 2
        named = indices[b, kv, block, : int(counts[b, kv, block])].tolist()
        keys = [j for n in named for j in (2 * n, 2 * n + 1) if j <= i + 11 - 7]
        if keys:
            scores = key[b, kv, keys] @ query[b, h, i] * 0.7
            expected[b, h, i], lse[b, h, i] = scores.softmax(0) @ value[b, kv, keys], scores.logsumexp(0)
        expected[b, h, i] *= sample["row_scale"][b, h, block]
        expected[b, h, i] += sample["row_bias"][b, h, block]
    yield from zip(op(**sample, causal=True, scale=0.7), (expected, lse), strict=True)


def all_blocks_is_sdpa(op: Op, make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    for block_size, m in (((16, 8), 5), ((1, 1), 38)):
        sample = _lists(make, _tensors(make, 2, 4, 2, 38, 38, 9, 12), block_size, m, heads=4)
        for causal in (False, True):
            expected = F.scaled_dot_product_attention(**_without_lists(sample), is_causal=causal, enable_gqa=True)
            yield op(**sample, causal=causal)[0], expected


def order_of_a_list_is_irrelevant(op: Op, make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    for block_size in ((16, 8), (1, 1)):
        sample = _lists(make, _tensors(make, 2, 2, 1, 35, 43, 9, 12), block_size, 4, heads=2)
        yield from zip(op(**sample), op(**sample | {"indices": sample["indices"].flip(-1)}), strict=True)


def both_parts_merge_to_the_whole(op: Op, make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Lists that complement one another, as attention calibration asks for, joined by `merge_states`."""
    sample = _lists(make, _tensors(make, 2, 2, 2, 35, 47, 9, 12), (16, 8), 6, heads=2)
    parts = [op(**sample | {"indices": part}) for part in sample["indices"].split((2, 4), -1)]
    yield from zip(merge_states(*parts[0], *parts[1]), op(**sample), strict=True)


def blocks_are_their_tokens(op: Op, make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Any block size, and lists for any number of heads, spelled out as lists of single tokens of every head."""
    for block_size, heads in itertools.product(((9, 4), (3, 1), (1, 5)), (1, 2, 4)):
        sample = _lists(make, _tensors(make, 1, 4, 2, 21, 22, 6, 3), block_size, 3, heads=heads)
        keys = (sample["indices"][..., None] * block_size[1] + torch.arange(block_size[1])).flatten(-2)
        keys = keys.where(keys < 22, -1).sort(-1, descending=True).values.to(torch.int32)
        tokens = keys.repeat_interleave(block_size[0], 2)[:, :, :21].repeat_interleave(4 // heads, 1)
        single = sample | {"indices": tokens, "block_size": (1, 1)}
        for causal in (False, True):
            yield from zip(op(**sample, causal=causal), op(**single, causal=causal), strict=True)


def transposed_lists_change_nothing(op: Op, make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    for block_size, nk in (((16, 8), 6), ((1, 1), 43)):
        sample = _lists(make, _tensors(make, 2, 4, 2, 35, 43, 9, 12), block_size, 4, heads=2, ragged=True)
        lists = transpose_lists(sample["indices"], sample["counts"], num_key_blocks=nk)
        leaves = [sample[name].requires_grad_() for name in ("query", "key", "value")]
        given, made = (op(**sample, transposed=lists)[0], op(**sample)[0])
        weight = make.normal(*made.shape)
        gradients = [torch.autograd.grad(out, leaves, weight) for out in (given, made)]
        yield from zip(*gradients, strict=True)


def launches(sample: Sample) -> None:
    from shared_kernels.sparse_attention import triton

    query, key, value, indices = (sample[name] for name in ("query", "key", "value", "indices"))
    counts = sample.get("counts", indices.new_empty(indices.shape[:3]))
    block_q, block_k = sample["block_size"]
    rest = {"causal": sample.get("causal", False), "scale": 0.125, "block_q": block_q, "block_k": block_k}
    out, lse = triton.forward(query, key, value, indices, counts, **rest)
    lists = transpose_lists(indices, counts, num_key_blocks=-(-key.shape[2] // block_k))
    triton.backward(out, lse, query, key, value, lse, indices, counts, *lists, **rest)


def cost(sample: Sample) -> tuple[int, int]:
    query, key, value, indices = (sample[name] for name in ("query", "key", "value", "indices"))
    blocks = int(sample["counts"].sum()) if "counts" in sample else indices.numel()
    block_q, block_k = sample["block_size"]
    pairs = blocks * (query.shape[1] // indices.shape[1]) * block_q * block_k
    out = query.numel() // query.shape[3] * value.shape[3]
    numbers = query.numel() + key.numel() + value.numel() + out
    return 2 * pairs * (query.shape[3] + value.shape[3]), numbers * query.element_size()


def largest(sample: Sample) -> int:
    """A tile of scores, the keys gathered for one, the lists of all query heads, or whole blocks of what was given."""
    query, key, value, indices = (sample[name] for name in ("query", "key", "value", "indices"))
    block_q, block_k = sample["block_size"]
    nq, m = indices.shape[2:]
    width = max(query.shape[3], value.shape[3])
    whole = [query.shape[0] * query.shape[1] * nq * block_q, key.shape[0] * key.shape[1] * (key.shape[2] + block_k)]
    lists = query.shape[0] * query.shape[1] * nq * m
    if block_q < 8:  # lists of single queries: listed pairs of some heads, or of one
        return max(max(whole) * width, lists, cpu_tokens.TILE, query.shape[2] * m * block_k)
    tile = max(cpu_blocks.TILE * 3 // 2, 16 * block_k)
    return max(max(whole) * width, lists, tile, tile // block_q * width)


SPEC = OpSpec(
    op=sparse_attention,
    reference=reference.sparse_attention,
    samples=samples,
    gradients=("query", "key", "value", "row_scale", "row_bias"),
    laws=(
        agrees_with_the_sum_by_hand,
        all_blocks_is_sdpa,
        order_of_a_list_is_irrelevant,
        both_parts_merge_to_the_whole,
        blocks_are_their_tokens,
        transposed_lists_change_nothing,
    ),
    refused={
        "query without heads": ({"query": torch.ones(2, 37, 24)}, ValueError, r"query must have shape \(batch, heads"),
        "integers": (
            {"value": torch.ones(2, 2, 53, 40, dtype=torch.int32)},
            TypeError,
            "value must be of a floating-point dtype, got torch.int32",
        ),
        "mixed dtypes": (
            {"key": torch.ones(2, 2, 53, 24, dtype=torch.float64)},
            TypeError,
            "key must be of the dtype of query, torch.float32, got torch.float64",
        ),
        "key as list": ({"key": [1.0]}, TypeError, "key must be a tensor, got list"),
        "another device": ({"value": torch.ones(2, 2, 53, 40, device="meta")}, ValueError, "value must be on cpu like"),
        "another width": ({"key": torch.ones(2, 2, 53, 23)}, ValueError, r"key must have shape \(2, heads, tokens"),
        "more keys than values": ({"value": torch.ones(2, 2, 52, 40)}, ValueError, r"value must have shape \(2, 2, 53"),
        "heads that do not divide": (
            {"key": torch.ones(2, 3, 53, 24), "value": torch.ones(2, 3, 53, 40)},
            ValueError,
            "heads of query must be a multiple of those of key, got 4 and 3",
        ),
        "infinite scale": ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        "wide indices": ({"indices": torch.zeros(2, 2, 3, 4, dtype=torch.int64)}, TypeError, "indices must be of"),
        "lists for other blocks": (
            {"block_size": (8, 8)},
            ValueError,
            r"indices must be \(2, list heads, 5, m\) for 37 queries in blocks of 8, with \[1, 2, 4\] list heads, got "
            r"\(2, 2, 3, 4\)",
        ),
        "counts of another shape": (
            {"counts": torch.ones(2, 2, 4, dtype=torch.int32)},
            ValueError,
            r"counts must have shape \(2, 2, 3\), got \(2, 2, 4\)",
        ),
        "blocks of nothing": ({"block_size": (16, 0)}, ValueError, "block_size must be at least 1, got 0"),
        "scale per head": ({"row_scale": torch.ones(2, 4)}, ValueError, r"row_scale must have shape \(2, 4, 3\), got"),
        "bias as number": ({"row_bias": 1.0}, TypeError, "row_bias must be a tensor, got float"),
        "lists of other keys turned round": (
            {"transposed": transpose_lists(torch.zeros(2, 2, 3, 4, dtype=torch.int32), None, num_key_blocks=9)},
            ValueError,
            r"transposed.starts must have shape \(2, 2, 8\), got \(2, 2, 10\)",
        ),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.sparse_attention.default,
        torch.ops.shared_kernels.sparse_attention_backward.default,
    ),
    launches=launches,
    cost=cost,
    # float32 rows of 256, for the most part; in bfloat16 single tokens
    spill_allowed={
        torch.float32: {"sm_80": 272, "sm_89": 272, "sm_90": 288, "sm_100": 288, "sm_120": 312, "gfx942": 368},
        torch.bfloat16: {"sm_90": 16},
    },
    largest=largest,
)
