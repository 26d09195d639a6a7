"""What local_attention and neighborhood_attention promise."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_kernels.local_attention import local_attention, neighborhood_attention, reference
from shared_kernels.testing import Make, OpSpec, Refusal, Sample

Op = Callable[..., Any]
Pairs = Iterator[tuple[Tensor, Tensor]]


def _maps(
    make: Make,
    rows: int,
    columns: int,
    *,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    D: int = 8,
    E: int | None = None,
    stride: int = 1,
    scale: float = 1.0,
    normal: Callable[..., Tensor] | None = None,
) -> Sample:
    normal, kv_heads = normal or make.normal, kv_heads or heads
    return {
        "query": normal(batch, heads, -(-rows // stride), -(-columns // stride), D, scale=scale),
        "key": normal(batch, kv_heads, rows, columns, D, scale=scale),
        "value": normal(batch, kv_heads, rows, columns, E or D),
    }


def _tables(make: Make, block: int, halo: int, D: int, *, wide: bool = False) -> Sample:
    size = 2 * (block + 2 * halo) - 1
    tables = {f"{axis}_table": make.normal(size, D, scale=D**-0.5, wide=wide) for axis in ("row", "column")}
    return tables | {"block": block, "halo": halo}


def heads_last(make: Make) -> Callable[..., Tensor]:
    """Maps as a linear layer leaves them: (batch, rows, columns, heads, width) in memory."""
    return lambda B, H, R, C, D, scale=1.0: make.normal(B, R, C, H, D, scale=scale).permute(0, 3, 1, 2, 4)


def samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {
            "halo": _maps(make, 4, 6, batch=1, D=3, E=2) | _tables(make, 2, 1, 3) | {"return_lse": True},
            "stride on a map that blocks do not fill": _maps(make, 5, 7, batch=1, heads=2, kv_heads=1, D=2, stride=2)
            | _tables(make, 4, 1, 2)
            | {"stride": 2, "border": "mask"},
        }
    if size == "real":
        return {
            "halonet, 64 px": _maps(make, 64, 64, batch=8, heads=4, D=16) | _tables(make, 8, 3, 16, wide=True),
            "halonet h6, wide values": _maps(make, 16, 16, batch=4, heads=8, D=64, E=256)
            | _tables(make, 8, 4, 64, wide=True),
            "windows": _maps(make, 56, 56, batch=4, heads=3, D=32) | {"block": 7},
            "stride, odd width": _maps(make, 30, 46, heads=3, D=40, E=80, stride=2)
            | _tables(make, 14, 2, 40)
            | {"stride": 2, "border": "mask"},
            "wide heads": _maps(make, 32, 32, D=128) | _tables(make, 8, 2, 128),
            "widest heads": _maps(make, 32, 24, D=256) | _tables(make, 8, 2, 256),
        }
    if size == "medium":
        return {"several chunks": _maps(make, 45, 29, batch=1, heads=2, D=12, E=20) | _tables(make, 8, 3, 12)}
    return {
        "halo": _maps(make, 8, 5, batch=1, D=16, E=24) | _tables(make, 4, 1, 16) | {"return_lse": True},
        "wide tables": _maps(make, 5, 10, batch=1, D=20) | _tables(make, 5, 2, 20, wide=True) | {"scale": 0.4},
        "stride, positions aware of it": _maps(make, 7, 9, batch=1, heads=1, D=17, E=9, stride=2)
        | _tables(make, 4, 3, 17)
        | {"stride": 2, "return_lse": True},
        "stride, positions as timm has them": _maps(make, 6, 12, batch=1, heads=1, D=16, stride=2)
        | _tables(make, 6, 1, 16)
        | {"stride": 2, "position_stride": 1},
        "halo wider than a block, masked, grouped heads": _maps(make, 5, 4, batch=1, heads=4, kv_heads=2, D=16, E=40)
        | {"block": 3, "halo": 4, "border": "mask", "return_lse": True},
        "windows, heads last": _maps(make, 14, 7, heads=2, D=32, normal=heads_last(make)) | {"block": 7},
        # not x 30: gradients are made of a float32 log-sum-exp, as in flash attention, which has too few digits then
        "strided memory, larger scores": _maps(make, 5, 4, batch=1, D=10, E=3, scale=2.0, normal=make.strided)
        | _tables(make, 4, 2, 10)
        | {"return_lse": True},
        "one pixel": _maps(make, 1, 1, batch=3, D=16, E=1) | {"block": 8, "halo": 1, "return_lse": True},
        "no images": _maps(make, 6, 5, batch=0, D=16) | _tables(make, 4, 1, 16),
    }


def agrees_with_pixels_one_by_one(op: Op, make: Make) -> Pairs:
    """The published formula for every query, padded keys and all."""
    block, halo, stride, w = 4, 3, 2, 10
    s = _maps(make, 8, 12, D=5, E=3, stride=stride) | _tables(make, block, halo, 5)
    for step in (1, 2):
        out = op(**s, stride=stride, position_stride=step)
        keys, values = (F.pad(s[name], (0, 0, halo, halo, halo, halo)) for name in ("key", "value"))
        expected = torch.empty_like(out)
        for y in range(4):
            for x in range(6):
                (block_r, i), (block_c, j) = divmod(y, 2), divmod(x, 2)
                top, left = block * block_r, block * block_c
                here = (..., slice(top, top + w), slice(left, left + w), slice(None))
                q = s["query"][:, :, y, x, None, None]
                positions = torch.arange(w)
                by_row = s["row_table"][positions - step * i + w - 1][:, None]
                by_column = s["column_table"][positions - step * j + w - 1]
                logits = (q * (keys[here] * 5**-0.5 + by_row + by_column)).sum(-1)
                weights = logits.flatten(2).softmax(-1).view_as(logits)
                expected[:, :, y, x] = (weights[..., None] * values[here]).sum((2, 3))
        yield out, expected


def one_block_is_all_of_the_map(op: Op, make: Make) -> Pairs:
    s = _maps(make, 5, 7, heads=4, kv_heads=2, D=6, E=3)
    query, key, value = (s[name].flatten(2, 3) for name in ("query", "key", "value"))
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True).unflatten(2, (5, 7))
    yield op(**s, block=9), expected
    yield op(**s, block=2, halo=7, border="mask"), expected


def blocks_of_one_pixel_are_centred_windows(op: Op, make: Make) -> Pairs:
    """With masked borders, stand-alone self-attention (Ramachandran et al., arXiv:1906.05909)."""
    s, h = _maps(make, 6, 5, D=4), 2
    out, expected = op(**s, block=1, halo=h, border="mask"), torch.empty(2, 2, 6, 5, 4, dtype=make.dtype)
    for y in range(6):
        for x in range(5):
            here = (..., slice(max(y - h, 0), y + h + 1), slice(max(x - h, 0), x + h + 1), slice(None))
            key, value = s["key"][here].flatten(2, 3), s["value"][here].flatten(2, 3)
            expected[:, :, y, x] = F.scaled_dot_product_attention(s["query"][:, :, y, x, None], key, value)[:, :, 0]
    yield out, expected


def stride_takes_every_other_query(op: Op, make: Make) -> Pairs:
    s = _maps(make, 9, 10, D=4) | _tables(make, 4, 1, 4)
    yield op(**s | {"query": s["query"][:, :, ::2, ::2]}, stride=2), op(**s)[:, :, ::2, ::2]


def transposing_the_map_swaps_the_tables(op: Op, make: Make) -> Pairs:
    s = _maps(make, 6, 9, D=4) | _tables(make, 4, 2, 4)
    swapped = {name: s[name].transpose(2, 3) for name in ("query", "key", "value")}
    swapped |= {"row_table": s["column_table"], "column_table": s["row_table"], "block": 4, "halo": 2}
    yield op(**swapped).transpose(2, 3), op(**s)


def launches(sample: Sample) -> None:
    from shared_kernels.local_attention import triton

    query, key, value = (sample[name] for name in ("query", "key", "value"))
    block, halo, stride = (sample.get(name, default) for name, default in (("block", 1), ("halo", 0), ("stride", 1)))
    wide = partial(query.new_empty, dtype=torch.float32)
    logits = wide(*query.shape[:4], 2 * (block + 2 * halo) - 1) if "row_table" in sample else None
    rest = (block, halo, stride, stride, sample.get("border") == "mask", 0.25)
    triton.forward(query, key, value, logits, logits, *rest)
    lse, d_out = wide(query.shape[:4]), query.new_empty(*query.shape[:4], value.shape[4])
    triton.backward(d_out, lse, query, key, value, logits, logits, lse, *rest)


def cost(sample: Sample) -> tuple[int, int]:
    query, key, value = (sample[name] for name in ("query", "key", "value"))
    queries, w = query.shape[:4].numel(), sample["block"] + 2 * sample.get("halo", 0)
    positions = 2 * (2 * w - 1) * query.shape[4] if "row_table" in sample else 0
    flops = 2 * queries * (w**2 * (query.shape[4] + value.shape[4]) + positions)
    moved = (query.numel() + key.numel() + value.numel() + queries * value.shape[4]) * query.element_size()
    return flops, moved


def largest(sample: Sample) -> int:
    """A padded map, the products of all queries and positions, or the workspace of a row of blocks and a bit more."""
    (B, H, R, C, D), (_, G, *_), E = sample["key"].shape, sample["query"].shape, sample["value"].shape[4]
    block, w = sample["block"], sample["block"] + 2 * sample.get("halo", 0)
    rows, columns = (-(-n // block) * block + w - block for n in (R, C))
    row = -(-C // block) * (block**2 * w**2 * (G // H if H else 1) + w**2 * max(D, E))
    return max(B * H * rows * columns * max(D, E), B * G * rows * columns * max(E, 2 * w, D), row, 1 << 19)


SHAPES: dict[str, Refusal] = {
    "key of another width": ({"key": torch.ones(1, 2, 8, 5, 3)}, ValueError, r"key must have shape \(1, heads, rows"),
    "three dimensions": ({"query": torch.ones(2, 8, 5)}, ValueError, r"query must have shape \(batch, heads, rows"),
    "value of another size": ({"value": torch.ones(1, 2, 5, 8, 16)}, ValueError, r"value must have shape \(1, 2, 8, 5"),
    "heads that do not divide": ({"query": torch.ones(1, 3, 8, 5, 16)}, ValueError, "heads of query must be a"),
    "integers": ({"key": torch.ones(1, 2, 8, 5, 16, dtype=torch.int64)}, TypeError, "key must be of a floating-point"),
    "mixed dtypes": ({"value": torch.ones(1, 2, 8, 5, 16, dtype=torch.float64)}, TypeError, "value must be of the"),
    "another device": ({"value": torch.ones(1, 2, 8, 5, 16, device="meta")}, ValueError, "value must be on cpu like"),
    "no tensor": ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    "infinite scale": ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
}

HALO = OpSpec(
    op=local_attention,
    reference=reference.local_attention,
    samples=samples,
    gradients=("query", "key", "value", "row_table", "column_table"),
    laws=(
        agrees_with_pixels_one_by_one,
        one_block_is_all_of_the_map,
        blocks_of_one_pixel_are_centred_windows,
        stride_takes_every_other_query,
        transposing_the_map_swaps_the_tables,
    ),
    refused=SHAPES
    | {
        "block of zero": ({"block": 0}, ValueError, "block must be at least 1, got 0"),
        "negative halo": ({"halo": -1}, ValueError, "halo must be at least 0, got -1"),
        "block as float": ({"block": 8.0}, TypeError, "block must be a whole number, got float"),
        "stride that does not divide": ({"stride": 3}, ValueError, "block must be a multiple of stride, got 4 and 3"),
        "positions beyond the stride": ({"position_stride": 2}, ValueError, "position_stride must be from 0 to 1, got"),
        "all queries in spite of a stride": (
            {"stride": 2},
            ValueError,
            "query must have 4 rows and 3 columns, one for every 2 of key's 8 x 5, got 8 x 5",
        ),
        "unknown border": ({"border": "wrap"}, ValueError, "border must be one of zero, mask, got 'wrap'"),
        "one table": ({"column_table": None}, ValueError, "column_table must be given where row_table is"),
        "table of another window": ({"row_table": torch.ones(13, 16)}, ValueError, r"row_table must have shape \(11"),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.local_attention.default,
        torch.ops.shared_kernels.local_attention_backward.default,
    ),
    launches=launches,
    cost=cost,
    largest=largest,
    # dq at head_dim 256 with positions: the sums by window row and column come on top
    spill_allowed={torch.bfloat16: {"sm_89": 16, "sm_90": 40, "sm_100": 40, "sm_120": 24}},
)


def neighborhood_samples(make: Make, size: str) -> dict[str, Sample]:
    def bias(heads: int, k: int, *, wide: bool = False) -> Sample:
        return {"kernel_size": k, "bias": make.normal(heads, 2 * k - 1, 2 * k - 1, wide=wide)}

    if size == "tiny":
        return {
            "bias": _maps(make, 4, 5, batch=1, D=3, E=2) | bias(2, 3) | {"return_lse": True},
            "even": _maps(make, 3, 4, batch=1, heads=2, kv_heads=1, D=2) | {"kernel_size": 2},
        }
    if size == "real":
        return {
            "nat, 56 px": _maps(make, 56, 56, batch=4, heads=2, D=32) | bias(2, 7, wide=True),
            "k 13": _maps(make, 64, 60, heads=2, D=64) | bias(2, 13),
            "wide heads": _maps(make, 32, 30, heads=4, kv_heads=2, D=128) | {"kernel_size": 7},
            "widest heads, odd values": _maps(make, 32, 30, D=256, E=80) | {"kernel_size": 5},
        }
    if size == "medium":
        return {"several chunks": _maps(make, 41, 33, batch=2, heads=5, D=4, E=6) | bias(5, 7)}
    return {
        "bias": _maps(make, 8, 5, batch=1, D=16, E=24) | bias(2, 3) | {"return_lse": True},
        "wide bias, wide values": _maps(make, 7, 11, batch=1, heads=1, D=20, E=33) | bias(1, 5, wide=True),
        "as large as the map": _maps(make, 5, 9, heads=1, D=16) | bias(1, 5) | {"scale": 0.3},
        "grouped heads, even k": _maps(make, 6, 5, batch=1, heads=4, kv_heads=2, D=24)
        | bias(4, 4)
        | {"return_lse": True},
        "heads last": _maps(make, 9, 10, batch=1, heads=2, D=16, E=5, normal=heads_last(make)) | {"kernel_size": 7},
        "strided memory, larger scores": _maps(make, 10, 5, batch=1, D=7, scale=2.0, normal=make.strided)
        | {"kernel_size": 3, "return_lse": True},
        "one key": _maps(make, 3, 4, D=16, E=2) | {"kernel_size": 1, "return_lse": True},
        "no images": _maps(make, 6, 5, batch=0, D=16) | bias(2, 3),
    }


def neighbours_one_by_one(op: Op, make: Make) -> Pairs:
    s, k = _maps(make, 6, 9, D=4, E=3), 3
    bias = make.normal(2, 5, 5)
    out, lse = op(**s, kernel_size=k, bias=bias, return_lse=True)
    expected, expected_lse = torch.empty_like(out), torch.empty_like(lse)
    for y in range(6):
        for x in range(9):
            top, left = min(max(y - 1, 0), 6 - k), min(max(x - 1, 0), 9 - k)
            here = (..., slice(top, top + k), slice(left, left + k), slice(None))
            scores = (s["query"][:, :, y, x, None, None] * s["key"][here]).sum(-1) / 2
            scores += bias[:, top - y + k - 1 :, left - x + k - 1 :][:, :k, :k]
            weights = scores.flatten(2).softmax(-1).view_as(scores)
            expected[:, :, y, x] = (weights[..., None] * s["value"][here]).sum((2, 3))
            expected_lse[:, :, y, x] = scores.flatten(2).logsumexp(-1)
    yield out, expected
    yield lse, expected_lse


def all_of_the_map_is_sdpa(op: Op, make: Make) -> Pairs:
    s = _maps(make, 5, 5, heads=4, kv_heads=2, D=6, E=3)
    query, key, value = (s[name].flatten(2, 3) for name in ("query", "key", "value"))
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True).unflatten(2, (5, 5))
    yield op(**s, kernel_size=5), expected


def inside_it_is_a_block_of_one_pixel_with_a_halo(op: Op, make: Make) -> Pairs:
    s = _maps(make, 9, 8, D=4)
    inside = (..., slice(2, -2), slice(2, -2), slice(None))
    halo: Any = local_attention(**s, block=1, halo=2)
    yield op(**s, kernel_size=5)[inside], halo[inside]


def neighborhood_launches(sample: Sample) -> None:
    from shared_kernels.local_attention import triton

    query, key, value = (sample[name] for name in ("query", "key", "value"))
    bias = None if "bias" not in sample else sample["bias"].to(torch.float32)
    k, lse = sample["kernel_size"], query.new_empty(query.shape[:4], dtype=torch.float32)
    triton.neighborhood(query, key, value, bias, k, 0.25)
    d_out = query.new_empty(*query.shape[:4], value.shape[4])
    triton.neighborhood_backward(d_out, lse, query, key, value, bias, lse, k, 0.25)


def neighborhood_cost(sample: Sample) -> tuple[int, int]:
    flops, moved = cost(sample | {"block": sample["kernel_size"]})
    return flops, moved


def neighborhood_largest(sample: Sample) -> int:
    """The maps, or the query-key pairs of a chunk of one map at least."""
    query, key, value = (sample[name] for name in ("query", "key", "value"))
    pairs = query.shape[1:4].numel() * sample["kernel_size"] ** 2
    each = pairs // key.shape[1]
    biased = pairs if "bias" in sample else 0  # what the bias adds to every pair of every head
    return max(query.shape[:4].numel() * max(query.shape[4], value.shape[4]), biased, each, 1 << 20)


NEIGHBORHOOD = OpSpec(
    op=neighborhood_attention,
    reference=reference.neighborhood_attention,
    samples=neighborhood_samples,
    gradients=("query", "key", "value", "bias"),
    laws=(neighbours_one_by_one, all_of_the_map_is_sdpa, inside_it_is_a_block_of_one_pixel_with_a_halo),
    refused=SHAPES
    | {
        "larger than the map": (
            {"kernel_size": 6, "bias": None},
            ValueError,
            "kernel_size must be at most 5, the shorter side of the map, got 6",
        ),
        "size of zero": ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        "size as pair": ({"kernel_size": (3, 3)}, TypeError, "kernel_size must be a whole number, got tuple"),
        "map of another size": ({"query": torch.ones(1, 2, 8, 4, 16)}, ValueError, r"key must have shape \(batch"),
        "bias of another size": ({"bias": torch.ones(2, 7, 7)}, ValueError, r"bias must have shape \(2, 5, 5\), got"),
        "integer bias": (
            {"bias": torch.ones(2, 5, 5, dtype=torch.int32)},
            TypeError,
            "bias must be of a floating-point dtype, got torch.int32",
        ),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.local_attention_neighborhood.default,
        torch.ops.shared_kernels.local_attention_neighborhood_backward.default,
    ),
    launches=neighborhood_launches,
    cost=neighborhood_cost,
    largest=neighborhood_largest,
)

SPECS = (HALO, NEIGHBORHOOD)
