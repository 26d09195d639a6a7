"""sparse_attention on GPUs: a program takes a tile of query rows and walks the list of their block, or the other way.

Query heads that share key, value and list are rows of one tile (Yuan et al., "Native Sparse Attention",
arXiv:2502.11089), so that a list per token fills tiles too where heads are grouped. Listed keys are addressed slot by
slot, whatever block_k is, or as a range where every tile lies within one block.

The backward pass has no atomics, so nothing depends on the order of programs: dQ walks the lists, dK and dV walk the
transposed lists, that is all query rows that name their key block. Blocks of fewer than 16 keys leave most of such a
tile empty. Where that costs more than it saves, each query block writes what it adds to its listed keys to a workspace,
and every key sums what is its own in the order of the lists.
"""

# mypy: disable-error-code=no-untyped-def
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._tiles import (
    LOG2E,
    Tile,
    TileTable,
    dot_precision,
    load_rows,
    no_float64,
    softmax_end,
    softmax_step,
    store_rows,
    strided_rows,
    table_tile,
    width,
)

_FAR = tl.constexpr(2**31 - 1)
"""The position of keys that are not there."""


@triton.jit
def _program(tiles, units, BACKWARDS: tl.constexpr):
    """Tile, batch and head of this program; lists of causal attention grow, and the longest should not start last."""
    program = tl.program_id(0)
    tile = program % tiles
    if BACKWARDS:
        tile = tiles - 1 - tile
    unit = program // tiles
    return tile, unit // units, unit % units


@triton.jit
def _plane(base, strides, batch, head):
    return base + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _query_rows(block, inner, first_head, block_q, Nq):
    """Head, position and existence of rows of a query block, which run through its positions head by head."""
    position = (block * block_q + inner % block_q).to(tl.int64)
    return (first_head + inner // block_q).to(tl.int64), position, (position >= 0) & (position < Nq)


@triton.jit
def _listed(entries, start, end, size, absent, WIDTH: tl.constexpr, GATHER: tl.constexpr):
    """Slots start .. start + WIDTH of listed blocks of `size`: the entry of each, or of all; and the place inside."""
    if GATHER:
        slots = start + tl.arange(0, WIDTH)
        entry, place = tl.load(entries + slots // size, mask=slots < end, other=absent), slots % size
    else:
        entry, place = tl.load(entries + start // size), start % size + tl.arange(0, WIDTH)
    return entry, place


@triton.jit
def _list_of(block, indices, counts, index_strides, count_strides, batch, list_head, block_k):
    """Where the list of a query block begins, and how many slots it has."""
    count = tl.load(_plane(counts, count_strides, batch, list_head) + block * count_strides[2])
    return _plane(indices, index_strides, batch, list_head) + block.to(tl.int64) * index_strides[2], count * block_k


@triton.jit
def _statistics(lse, delta, rows, inside):
    """LSE to base 2, and delta; rows without keys, and those outside, get inf, with which every weight becomes 0."""
    natural = tl.load(lse + rows, mask=inside, other=float("-inf"))
    base_2 = tl.where(natural == float("-inf"), float("inf"), natural * 1.4426950408889634)
    return base_2, tl.load(delta + rows, mask=inside, other=0.0)


@triton.jit
def sparse_attention_fwd_kernel(
    query, key, value, indices, counts, out, lse,
    query_strides, key_strides, value_strides, index_strides, count_strides,
    H, Nq, Nk, block_q, block_k, fold, group, heads_per_list, query_blocks, log2_scale,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(fold * block_q, BLOCK_M)
    tile, batch, unit = _program(query_blocks * tiles, H // fold, CAUSAL)
    block, inner = tile // tiles, tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_head = unit * fold
    head, position, inside = _query_rows(block, inner, first_head, block_q, Nq)
    inside &= inner < fold * block_q
    columns, columns_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    rows = head * query_strides[1] + position * query_strides[2]
    q = load_rows(query + batch.to(tl.int64) * query_strides[0], rows, inside, columns, D)
    entries, slots = _list_of(
        block, indices, counts, index_strides, count_strides, batch, first_head // heads_per_list, block_k
    )
    key = _plane(key, key_strides, batch, first_head // group)
    value = _plane(value, value_strides, batch, first_head // group)
    end = tl.minimum((block + 1) * block_q, Nq) + (Nk - Nq) if CAUSAL else Nk
    limit = (position + (Nk - Nq)).to(tl.int32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(0, slots, BLOCK_N):
        key_block, place = _listed(entries, start, slots, block_k, -1, BLOCK_N, GATHER)
        keys = key_block * block_k + place
        listed = (keys >= 0) & (keys < end)
        k = load_rows(key, keys.to(tl.int64) * key_strides[2], listed, columns, D)
        visible = tl.where(listed, keys, _FAR)[None, :] <= limit[:, None] if CAUSAL else listed[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
        scores = tl.where(visible, scores, float("-inf"))
        top, total, weights, shrink = softmax_step(scores, top, total)
        v = load_rows(value, keys.to(tl.int64) * value_strides[2], listed, columns_e, E)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    inverse, natural = softmax_end(top, total)
    results = (batch * H + head) * Nq + position
    store_rows(out, acc * inverse[:, None], results * E, inside, columns_e, E)
    tl.store(lse + results, natural, mask=inside)


@triton.jit
def sparse_attention_bwd_kernel_dq(
    d_out, delta, query, key, value, lse, indices, counts, d_query,
    d_out_strides, query_strides, key_strides, value_strides, index_strides, count_strides,
    H, Nq, Nk, block_q, block_k, fold, group, heads_per_list, query_blocks, scale, log2_scale,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(fold * block_q, BLOCK_M)
    tile, batch, unit = _program(query_blocks * tiles, H // fold, CAUSAL)
    block, inner = tile // tiles, tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_head = unit * fold
    head, position, inside = _query_rows(block, inner, first_head, block_q, Nq)
    inside &= inner < fold * block_q
    columns, columns_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    rows = head * query_strides[1] + position * query_strides[2]
    q = load_rows(query + batch.to(tl.int64) * query_strides[0], rows, inside, columns, D)
    rows = head * d_out_strides[1] + position * d_out_strides[2]
    d = load_rows(d_out + batch.to(tl.int64) * d_out_strides[0], rows, inside, columns_e, E)
    results = (batch * H + head) * Nq + position
    row_lse, row_delta = _statistics(lse, delta, results, inside)
    entries, slots = _list_of(
        block, indices, counts, index_strides, count_strides, batch, first_head // heads_per_list, block_k
    )
    key = _plane(key, key_strides, batch, first_head // group)
    value = _plane(value, value_strides, batch, first_head // group)
    end = tl.minimum((block + 1) * block_q, Nq) + (Nk - Nq) if CAUSAL else Nk
    limit = (position + (Nk - Nq)).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, slots, BLOCK_N):
        key_block, place = _listed(entries, start, slots, block_k, -1, BLOCK_N, GATHER)
        keys = key_block * block_k + place
        listed = (keys >= 0) & (keys < end)
        k = load_rows(key, keys.to(tl.int64) * key_strides[2], listed, columns, D)
        visible = tl.where(listed, keys, _FAR)[None, :] <= limit[:, None] if CAUSAL else listed[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
        weights = tl.exp2(tl.where(visible, scores, float("-inf")) - row_lse[:, None])
        v = load_rows(value, keys.to(tl.int64) * value_strides[2], listed, columns_e, E)
        d_weights = tl.dot(d, tl.trans(v), input_precision=PRECISION)
        d_scores = tl.where(visible, weights * (d_weights - row_delta[:, None]), 0.0)
        acc = tl.dot(d_scores.to(k.dtype), k, acc, input_precision=PRECISION)
    store_rows(d_query, acc * scale, results * D, inside, columns, D)


@triton.jit
def _add_rows(
    acc_k, acc_v, k, v, keys, d_out, delta, query, lse, d_out_strides, query_strides, batch, head, position, exists,
    columns, columns_e, H, Nq, Nk, log2_scale,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a tile of query rows (M) gives to the gradients of a tile of keys (N); dK lacks the scale."""
    q = load_rows(query, head * query_strides[1] + position * query_strides[2], exists, columns, D)
    row_lse, row_delta = _statistics(lse, delta, (batch * H + head) * Nq + position, exists)
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * log2_scale - row_lse[None, :])
    if CAUSAL:
        visible = keys[:, None] <= (position + (Nk - Nq)).to(tl.int32)[None, :]
        weights = tl.where(visible, weights, 0.0)
    d = load_rows(d_out, head * d_out_strides[1] + position * d_out_strides[2], exists, columns_e, E)
    acc_v = tl.dot(weights.to(d.dtype), d, acc_v, input_precision=PRECISION)
    d_scores = weights * (tl.dot(v, tl.trans(d), input_precision=PRECISION) - row_delta[None, :])
    if CAUSAL:
        d_scores = tl.where(visible, d_scores, 0.0)
    return tl.dot(d_scores.to(q.dtype), q, acc_k, input_precision=PRECISION), acc_v


@triton.jit
def sparse_attention_bwd_kernel_dkv(
    d_out, delta, query, key, value, lse, entries, starts, d_key, d_value,
    d_out_strides, query_strides, key_strides, value_strides, entry_strides, start_strides,
    H, Nq, Nk, block_q, block_k, fold, group, heads_per_list, entries_per_block, key_blocks, scale, log2_scale,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(block_k, BLOCK_N)
    tile, batch, kv_head = _program(key_blocks * tiles, H // group, False)
    block, inner = tile // tiles, tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = block * block_k + inner
    inside = (inner < block_k) & (keys < Nk)
    columns, columns_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    places = keys.to(tl.int64)
    k = load_rows(_plane(key, key_strides, batch, kv_head), places * key_strides[2], inside, columns, D)
    v = load_rows(_plane(value, value_strides, batch, kv_head), places * value_strides[2], inside, columns_e, E)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    query += batch.to(tl.int64) * query_strides[0]
    d_out += batch.to(tl.int64) * d_out_strides[0]
    size = fold * block_q
    for part in range(group // fold):
        first_head = kv_head * group + part * fold
        limits = _plane(starts, start_strides, batch, first_head // heads_per_list) + block
        first = tl.load(limits)
        slots = (tl.load(limits + 1) - first) * size
        own = _plane(entries, entry_strides, batch, first_head // heads_per_list) + first
        for start in range(0, slots, BLOCK_M):
            entry, place = _listed(own, start, slots, size, -entries_per_block, BLOCK_M, GATHER)
            query_block = entry // entries_per_block
            if GATHER:
                head, position, exists = _query_rows(query_block, place, first_head, block_q, Nq)
            else:
                head = (first_head + start % size // block_q).to(tl.int64)
                position = query_block.to(tl.int64) * block_q + start % size % block_q + tl.arange(0, BLOCK_M)
                exists = position < Nq
            acc_k, acc_v = _add_rows(
                acc_k, acc_v, k, v, keys, d_out, delta, query, lse, d_out_strides, query_strides, batch, head,
                position, exists, columns, columns_e, H, Nq, Nk, log2_scale, D, E, CAUSAL, PRECISION,
            )  # fmt: skip
    results = (batch * (H // group) + kv_head).to(tl.int64) * Nk + places
    store_rows(d_key, acc_k * scale, results * D, inside, columns, D)
    store_rows(d_value, acc_v, results * E, inside, columns_e, E)


@triton.jit
def sparse_attention_bwd_kernel_slots(
    d_out, delta, query, key, value, lse, indices, counts, slots_k, slots_v,
    d_out_strides, query_strides, key_strides, value_strides, index_strides, count_strides, first_unit,
    H, Nq, Nk, block_q, block_k, fold, group, heads_per_list, query_blocks, most_slots, log2_scale,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What one query block adds to the gradients of its listed keys; row (unit, query block, slot) of the workspace."""
    tiles = tl.cdiv(most_slots, BLOCK_N)
    tile, own, _ = _program(query_blocks * tiles, 1, False)
    block, start = tile // tiles, tile % tiles * BLOCK_N
    batch, first_head = (first_unit + own) // (H // fold), (first_unit + own) % (H // fold) * fold
    entries, slots = _list_of(
        block, indices, counts, index_strides, count_strides, batch, first_head // heads_per_list, block_k
    )
    key_block, place = _listed(entries, start, slots, block_k, -1, BLOCK_N, True)
    keys = key_block * block_k + place
    listed = (keys >= 0) & (keys < Nk)
    columns, columns_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    key = _plane(key, key_strides, batch, first_head // group)
    value = _plane(value, value_strides, batch, first_head // group)
    k = load_rows(key, keys.to(tl.int64) * key_strides[2], listed, columns, D)
    v = load_rows(value, keys.to(tl.int64) * value_strides[2], listed, columns_e, E)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    query += batch.to(tl.int64) * query_strides[0]
    d_out += batch.to(tl.int64) * d_out_strides[0]
    rows = tl.where(start < slots, fold * block_q, 0)
    for row in range(0, rows, BLOCK_M):
        inner = row + tl.arange(0, BLOCK_M)
        head, position, exists = _query_rows(block, inner, first_head, block_q, Nq)
        exists &= inner < rows
        acc_k, acc_v = _add_rows(
            acc_k, acc_v, k, v, keys, d_out, delta, query, lse, d_out_strides, query_strides, batch, head,
            position, exists, columns, columns_e, H, Nq, Nk, log2_scale, D, E, CAUSAL, PRECISION,
        )  # fmt: skip
    numbers = start + tl.arange(0, BLOCK_N)
    results = (own.to(tl.int64) * query_blocks + block) * most_slots + numbers
    store_rows(slots_k, acc_k, results * D, numbers < slots, columns, D)
    store_rows(slots_v, acc_v, results * E, numbers < slots, columns_e, E)


@triton.jit
def sparse_attention_bwd_kernel_sum(
    slots, entries, starts, gradient, entry_strides, start_strides, first_unit, kv_heads, Nk, block_k, fold, group,
    heads_per_list, slots_per_unit, scale, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one key: scale times the sum of its rows of the workspace."""
    token, own, _ = _program(Nk, 1, False)
    batch, kv_head = (first_unit + own) // kv_heads, (first_unit + own) % kv_heads
    columns = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for part in range(group // fold):
        list_head = (kv_head * group + part * fold) // heads_per_list
        limits = _plane(starts, start_strides, batch, list_head) + token // block_k
        first, last = tl.load(limits), tl.load(limits + 1)
        positions = _plane(entries, entry_strides, batch, list_head)
        unit = own.to(tl.int64) * (group // fold) + part
        for start in range(first, last, BLOCK_N):
            numbers = start + tl.arange(0, BLOCK_N)
            inside = numbers < last
            position = tl.load(positions + numbers, mask=inside, other=0).to(tl.int64)
            rows = unit * slots_per_unit + position * block_k + token % block_k
            acc += tl.sum(load_rows(slots, rows * D, inside, columns, D), 0)
    results = gradient + ((first_unit + own).to(tl.int64) * Nk + token) * D + columns
    tl.store(results, (acc * scale).to(gradient.dtype.element_ty), mask=columns < D)


_FORWARD = {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 64, 8, 1), 512: Tile(32, 32, 4, 1)}
_DQ = {64: Tile(64, 32, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 1), 512: Tile(32, 32, 4, 1)}
_DKV = {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 64, 8, 1), 512: Tile(16, 32, 4, 1)}
_SMALL = {256: Tile(32, 32, 4, 1)}
_DQ_NARROW = _DQ | _SMALL | {128: Tile(64, 32, 4, 2)}
_FLOAT32 = {  # three products take the place of one, with operands in registers
    "forward, float32": {128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 8, 1), 512: Tile(16, 16, 8, 1)},
    "dq, float32": {128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 8, 1), 512: Tile(16, 16, 8, 1)},
    "dkv, float32": {128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
}
_INTERPRETED = {"forward": Tile(32, 16, 4, 1), "dq": Tile(32, 16, 4, 1), "dkv": Tile(16, 32, 4, 1)}

TILES: TileTable = {
    "interpreter": {name: {512: tile} for name, tile in _INTERPRETED.items()},
    "sm_80": _FLOAT32 | {"forward": _FORWARD, "dq": _DQ, "dkv": _DKV},
    "sm_89": _FLOAT32 | {"forward": _FORWARD, "dq": _DQ_NARROW, "dkv": _DKV | {256: Tile(32, 32, 8, 1)}},
    "sm_90": _FLOAT32
    | {
        "forward": _FORWARD | {128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
        "dq": _DQ | {128: Tile(128, 64, 8, 2)},
        "dkv": _DKV | {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 32, 8, 1)},
    },
    "sm_100": _FLOAT32
    | {
        "forward": _FORWARD | {128: Tile(128, 64, 8, 2)},
        "dq": _DQ,
        "dkv": _DKV | {256: Tile(32, 32, 8, 1)},
    },
    "sm_120": _FLOAT32 | {"forward": _FORWARD, "dq": _DQ | _SMALL, "dkv": _DKV | {256: Tile(32, 32, 8, 1)}},
    "gfx942": _FLOAT32
    | {
        "forward": _FORWARD | {128: Tile(64, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
        "dq": _DQ | _SMALL | {128: Tile(64, 32, 4, 1)},
        "dkv": _DKV | _SMALL | {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 1)},
    },
}

_EMPTY_ROWS = 200
"""Query rows per block, times how many empty keys of a tile come on each one that is not, from which on a workspace is
cheaper; estimated from the FLOPs and the bandwidth of an H100."""

_WORKSPACE = 2**28
"""Numbers that a workspace has at most, if one batch and head does not need more; the others take turns."""


class _Call:
    """The sizes of a call and what follows from them for all of its kernels."""

    def __init__(
        self, query: Tensor, value: Tensor, indices: Tensor, causal: bool, scale: float, block_q: int, block_k: int
    ) -> None:
        B, H, Nq, D = query.shape
        _, kv_heads, Nk, E = value.shape
        group, heads_per_list = H // kv_heads, H // indices.shape[1]
        fold = group if heads_per_list >= group else 1
        self.sizes = (H, Nq, Nk, block_q, block_k, fold, group, heads_per_list)
        self.units, self.kv_units, self.parts = B * H // fold, B * kv_heads, group // fold
        self.query_blocks, self.entries_per_block = indices.shape[2:]
        self.rows, self.slots = fold * block_q, indices.shape[3] * block_k
        self.block_q, self.block_k, self.key_blocks = block_q, block_k, triton.cdiv(Nk, block_k)
        self.scale, self.log2_scale = scale, scale * LOG2E
        self.constants: dict[str, Any] = {
            "CAUSAL": causal,
            "PRECISION": dot_precision(query),
            "D": D,
            "E": E,
            "BLOCK_D": width(D),
            "BLOCK_E": width(E),
            "enable_fp_fusion": True,
        }
        self._query, self._columns = query, max(D, E)

    def tile(self, kernel: str, *, rows: int, keys: int) -> dict[str, Any]:
        """The row of the tile table, cut down to so many rows and keys, as constants of a launch."""
        tile = table_tile(TILES, kernel, self._query, self._columns)
        block_m, block_n = min(tile.rows, width(rows)), min(tile.keys, width(keys))
        warps = min(4, tile.warps) if block_m < min(tile.rows, 64) else tile.warps
        return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": tile.stages}


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [t.stride()[:3] for t in tensors]


def forward(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor,
    causal: bool, scale: float, block_q: int, block_k: int, *_turned_round: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    no_float64(query)
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    query, key, value, indices = map(strided_rows, (query, key, value, indices))
    call = _Call(query, value, indices, causal, scale, block_q, block_k)
    tile = call.tile("forward", rows=call.rows, keys=call.slots)
    programs = call.units * call.query_blocks * triton.cdiv(call.rows, tile["BLOCK_M"])
    sparse_attention_fwd_kernel[(programs,)](
        query, key, value, indices, counts, out, lse, *_strides(query, key, value, indices, counts),
        *call.sizes, call.query_blocks, call.log2_scale,
        **call.constants, **tile, GATHER=block_k % tile["BLOCK_N"] != 0,
    )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor, delta: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, indices: Tensor,
    counts: Tensor, entries: Tensor, starts: Tensor, causal: bool, scale: float, block_q: int, block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_query, d_key, d_value = (t.new_empty(t.shape) for t in (query, key, value))
    if lse.numel() == 0:
        return d_query, d_key.zero_(), d_value.zero_()
    d_out, query, key, value, indices, entries, starts = map(
        strided_rows, (d_out, query, key, value, indices, entries, starts)
    )
    call = _Call(query, value, indices, causal, scale, block_q, block_k)
    inputs = (d_out, delta.contiguous(), query, key, value, lse.contiguous())
    strides = _strides(d_out, query, key, value, indices, counts)
    tile = call.tile("dq", rows=call.rows, keys=call.slots)
    programs = call.units * call.query_blocks * triton.cdiv(call.rows, tile["BLOCK_M"])
    sparse_attention_bwd_kernel_dq[(programs,)](
        *inputs, indices, counts, d_query, *strides, *call.sizes, call.query_blocks, scale, call.log2_scale,
        **call.constants, **tile, GATHER=block_k % tile["BLOCK_N"] != 0,
    )  # fmt: skip
    if d_key.numel() + d_value.numel() > 0:
        if call.rows * (16 - block_k) < _EMPTY_ROWS * block_k:
            _walk_transposed_lists(call, inputs, entries, starts, d_key, d_value)
        else:
            _sum_slots(call, inputs, indices, counts, entries, starts, d_key, d_value)
    return d_query, d_key, d_value


def _walk_transposed_lists(
    call: _Call, inputs: tuple[Tensor, ...], entries: Tensor, starts: Tensor, d_key: Tensor, d_value: Tensor
) -> None:
    d_out, _, query, key, value, _ = inputs
    tile = call.tile("dkv", rows=call.query_blocks * call.rows, keys=call.block_k)
    programs = call.kv_units * call.key_blocks * triton.cdiv(call.block_k, tile["BLOCK_N"])
    sparse_attention_bwd_kernel_dkv[(programs,)](
        *inputs, entries, starts, d_key, d_value, *_strides(d_out, query, key, value, entries, starts),
        *call.sizes, call.entries_per_block, call.key_blocks, call.scale, call.log2_scale,
        **call.constants, **tile, GATHER=call.block_q % tile["BLOCK_M"] != 0,
    )  # fmt: skip


def _sum_slots(
    call: _Call, inputs: tuple[Tensor, ...], indices: Tensor, counts: Tensor, entries: Tensor, starts: Tensor,
    d_key: Tensor, d_value: Tensor,
) -> None:  # fmt: skip
    """Via a workspace with a row for every slot of every query block, some heads at a time."""
    d_out, _, query, key, value, lse = inputs
    per_list = call.query_blocks * call.slots
    numbers = call.parts * per_list * (key.shape[3] + value.shape[3])
    at_once = max(1, min(call.kv_units, _WORKSPACE // numbers if numbers else call.kv_units))
    slots_k, slots_v = (lse.new_empty((at_once * call.parts * per_list, t.shape[3])) for t in (key, value))
    tile = call.tile("dkv", rows=call.rows, keys=call.slots)
    tiles = call.query_blocks * triton.cdiv(call.slots, tile["BLOCK_N"])
    for first in range(0, call.kv_units, at_once):
        now = min(at_once, call.kv_units - first)
        sparse_attention_bwd_kernel_slots[(now * call.parts * tiles,)](
            *inputs, indices, counts, slots_k, slots_v, *_strides(d_out, query, key, value, indices, counts),
            first * call.parts, *call.sizes, call.query_blocks, call.slots, call.log2_scale,
            **call.constants, **tile,
        )  # fmt: skip
        for slots, gradient, factor in ((slots_k, d_key, call.scale), (slots_v, d_value, 1.0)):
            Nk, D = gradient.shape[2:]
            sparse_attention_bwd_kernel_sum[(now * Nk,)](
                slots, entries, starts, gradient, *_strides(entries, starts), first, key.shape[1], Nk,
                *call.sizes[4:], per_list, factor,
                D=D, BLOCK_N=16, BLOCK_D=width(D), num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
