"""local_attention and neighborhood_attention on GPUs: a square of queries meets the rectangle of keys it can see.

The queries of a block share a window; the squares into which neighbourhoods are cut see the union of theirs. Either way
a program takes queries of one square and walks the keys of its rectangle, addressed by arithmetic: no window is ever
copied out. What a single query does not see is masked, biases are read by index.

The backward pass has no atomics. dQ walks like the forward pass; what flows into the logits of a window's rows and
columns is summed by a product with unit vectors, what flows into a bias table is written per query and key and summed
by two products outside. dK and dV walk the squares whose rectangles reach a square of keys; squares of keys begin where
windows end, so that with a halo of at most half a block these are four.
"""

# mypy: disable-error-code=no-untyped-def
from typing import Any, NamedTuple

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

_SQUARE = 8
"""Side of the squares of queries, and of keys, into which neighbourhoods are cut."""


@triton.jit
def _plane(base, strides, unit, heads):
    """Where a map of one batch and head begins."""
    return base + (unit // heads).to(tl.int64) * strides[0] + (unit % heads).to(tl.int64) * strides[1]


@triton.jit
def _place(flat, first_row, first_column, sides, SIDE_R: tl.constexpr, SIDE_C: tl.constexpr):
    """Row, column, token and existence of places in a rectangle of a map with so many rows and columns."""
    row, column = first_row + flat // SIDE_C, first_column + flat % SIDE_C
    there = (flat < SIDE_R * SIDE_C) & (row >= 0) & (row < sides[0]) & (column >= 0) & (column < sides[1])
    return row, column, tl.where(there, row * sides[1] + column, 0).to(tl.int64), there


@triton.jit
def _origin(tile, size, SIDE: tl.constexpr, BLOCK: tl.constexpr, HALO: tl.constexpr, K: tl.constexpr):
    """The first row (or column) of the rectangle that a square of queries sees."""
    if K > 0:
        return tl.maximum(tl.minimum(tile * SIDE - K // 2, size - K), 0)
    return tile * BLOCK - HALO


@triton.jit
def _seen(queries, keys, low, end, size, K: tl.constexpr):
    """Which keys each query sees along one side of the map; `low` and `end` bound what is a key at all."""
    if K > 0:
        first = tl.maximum(tl.minimum(queries - K // 2, size - K), 0)[:, None]
        return (keys[None, :] >= first) & (keys[None, :] < first + K)
    return ((keys >= low) & (keys < end))[None, :] & (queries >= 0)[:, None]


@triton.jit
def _scores(
    q, k, qr, qc, q_there, kr, kc, k_there, tile_r, tile_c, first, second, token, scale, sides_k, low, ends,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, HALO: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr,
    WINDOW: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores (M, N) to base 2, -inf where a query does not see a key.

    `first` points to the bias table of the head, or to the row logits of the map, and `second` to its column logits.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    seen = _seen(qr, kr, low, ends[0], sides_k[0], K) & _seen(qc, kc, low, ends[1], sides_k[1], K)
    seen &= q_there[:, None] & k_there[None, :]
    if BIASED:
        if K > 0:
            place = (kr[None, :] - qr[:, None] + K - 1) * (2 * K - 1) + kc[None, :] - qc[:, None] + K - 1
            bias = tl.load(first + place, mask=seen, other=0.0)
        else:
            row = kr[None, :] - (tile_r * BLOCK - HALO) - STEP * (qr - tile_r * SIDE)[:, None] + WINDOW - 1
            column = kc[None, :] - (tile_c * BLOCK - HALO) - STEP * (qc - tile_c * SIDE)[:, None] + WINDOW - 1
            bias = tl.load(first + token[:, None] + row, mask=seen, other=0.0)
            bias += tl.load(second + token[:, None] + column, mask=seen, other=0.0)
        scores += bias * 1.4426950408889634
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _bias_planes(first, second, strides, unit, heads, K: tl.constexpr, BIASED: tl.constexpr):
    """Where the biases of a head, or the logits of a map, begin."""
    if BIASED:
        if K > 0:
            first += (unit % heads) * (2 * K - 1) * (2 * K - 1)
        else:
            first, second = _plane(first, strides, unit, heads), _plane(second, strides, unit, heads)
    return first, second


@triton.jit
def local_attention_fwd_kernel(
    query, key, value, first, second, out, lse, strides_q, strides_k, strides_v, strides_b, heads, group,
    sides_q, sides_k, low, ends, tiles_c, scale,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, HALO: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr,
    WINDOW: tl.constexpr, BIASED: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(SIDE * SIDE, BLOCK_M)
    tile, part, unit = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1)
    tile_r, tile_c = tile // tiles_c, tile % tiles_c
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    inner = part * BLOCK_M + tl.arange(0, BLOCK_M)
    qr, qc, token, q_there = _place(inner, tile_r * SIDE, tile_c * SIDE, sides_q, SIDE, SIDE)
    kv_unit = unit // heads * (heads // group) + unit % heads // group
    key, value = _plane(key, strides_k, kv_unit, heads // group), _plane(value, strides_v, kv_unit, heads // group)
    first, second = _bias_planes(first, second, strides_b, unit, heads, K, BIASED)
    q = load_rows(_plane(query, strides_q, unit, heads), token * strides_q[2], q_there, d, D)
    origin_r = _origin(tile_r, sides_k[0], SIDE, BLOCK, HALO, K)
    origin_c = _origin(tile_c, sides_k[1], SIDE, BLOCK, HALO, K)
    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(0, WINDOW * WINDOW, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        kr, kc, at, k_there = _place(slot, origin_r, origin_c, sides_k, WINDOW, WINDOW)
        k = load_rows(key, at * strides_k[2], k_there, d, D)
        scores = _scores(
            q, k, qr, qc, q_there, kr, kc, slot < WINDOW * WINDOW, tile_r, tile_c, first, second, token * strides_b[2],
            scale, sides_k, low, ends, SIDE, BLOCK, HALO, STEP, K, WINDOW, BIASED, PRECISION,
        )  # fmt: skip
        top, total, weights, shrink = softmax_step(scores, top, total)
        v = load_rows(value, at * strides_v[2], k_there, e, E)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    inverse, natural = softmax_end(top, total)
    tokens = sides_q[0] * sides_q[1]
    row = unit.to(tl.int64) * tokens + token
    store_rows(out, acc * inverse[:, None], row * E, q_there, e, E)
    tl.store(lse + row, natural, mask=q_there)


@triton.jit
def local_attention_bwd_kernel_dq(
    d_out, delta, query, key, value, first, second, lse, d_query, d_first, d_second, strides_o, strides_q, strides_k,
    strides_v, strides_b, heads, group, sides_q, sides_k, low, ends, tiles_c, scale, scale_log2,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, HALO: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr,
    WINDOW: tl.constexpr, BIASED: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(SIDE * SIDE, BLOCK_M)
    tile, part, unit = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1)
    tile_r, tile_c = tile // tiles_c, tile % tiles_c
    d, e, window = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_W)
    inner = part * BLOCK_M + tl.arange(0, BLOCK_M)
    qr, qc, token, q_there = _place(inner, tile_r * SIDE, tile_c * SIDE, sides_q, SIDE, SIDE)
    row = unit.to(tl.int64) * sides_q[0] * sides_q[1] + token
    kv_unit = unit // heads * (heads // group) + unit % heads // group
    key, value = _plane(key, strides_k, kv_unit, heads // group), _plane(value, strides_v, kv_unit, heads // group)
    first, second = _bias_planes(first, second, strides_b, unit, heads, K, BIASED)
    q = load_rows(_plane(query, strides_q, unit, heads), token * strides_q[2], q_there, d, D)
    d_o = load_rows(_plane(d_out, strides_o, unit, heads), token * strides_o[2], q_there, e, E)
    row_lse = tl.load(lse + row, mask=q_there, other=0.0) * 1.4426950408889634
    row_delta = tl.load(delta + row, mask=q_there, other=0.0)
    origin_r = _origin(tile_r, sides_k[0], SIDE, BLOCK, HALO, K)
    origin_c = _origin(tile_c, sides_k[1], SIDE, BLOCK, HALO, K)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    by_row, by_column = tl.zeros((BLOCK_M, BLOCK_W), tl.float32), tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for start in range(0, WINDOW * WINDOW, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        kr, kc, at, k_there = _place(slot, origin_r, origin_c, sides_k, WINDOW, WINDOW)
        k = load_rows(key, at * strides_k[2], k_there, d, D)
        scores = _scores(
            q, k, qr, qc, q_there, kr, kc, slot < WINDOW * WINDOW, tile_r, tile_c, first, second, token * strides_b[2],
            scale_log2, sides_k, low, ends, SIDE, BLOCK, HALO, STEP, K, WINDOW, BIASED, PRECISION,
        )  # fmt: skip
        v = load_rows(value, at * strides_v[2], k_there, e, E)
        d_weights = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
        d_scores = tl.exp2(scores - row_lse[:, None]) * (d_weights - row_delta[:, None])
        acc += tl.dot(d_scores.to(k.dtype), k, input_precision=PRECISION)
        if BIASED:
            if K > 0:
                own_r = kr[None, :] - tl.maximum(tl.minimum(qr - K // 2, sides_k[0] - K), 0)[:, None]
                own_c = kc[None, :] - tl.maximum(tl.minimum(qc - K // 2, sides_k[1] - K), 0)[:, None]
                own = row[:, None] * (K * K) + own_r * K + own_c
                tl.store(d_first + own, d_scores, mask=scores != float("-inf"))
            else:
                rounded = d_scores.to(k.dtype)
                unit_r = (slot[:, None] // WINDOW == window[None, :]).to(k.dtype)
                unit_c = (slot[:, None] % WINDOW == window[None, :]).to(k.dtype)
                by_row += tl.dot(rounded, unit_r, input_precision=PRECISION)
                by_column += tl.dot(rounded, unit_c, input_precision=PRECISION)
    store_rows(d_query, acc * scale, row * D, q_there, d, D)
    if BIASED and K == 0:
        from_r = row * (2 * WINDOW - 1) - STEP * (qr - tile_r * SIDE) + WINDOW - 1
        from_c = row * (2 * WINDOW - 1) - STEP * (qc - tile_c * SIDE) + WINDOW - 1
        store_rows(d_first, by_row, from_r, q_there, window, WINDOW)
        store_rows(d_second, by_column, from_c, q_there, window, WINDOW)


@triton.jit
def _reach(first, last, size, tiles, SIDE: tl.constexpr, BLOCK: tl.constexpr, HALO: tl.constexpr, K: tl.constexpr):
    """First square of queries that sees any of the keys first .. last along one side of the map, and how many do."""
    if K > 0:
        start = tl.where(first < K, 0, first - (K - 1 - K // 2)) // SIDE
        end = tl.where(last >= size - K, size - 1, last + K // 2) // SIDE
    else:
        start = tl.maximum(first - HALO, 0) // BLOCK
        end = (last + HALO) // BLOCK
    return start, tl.minimum(end, tiles - 1) - start + 1


@triton.jit
def local_attention_bwd_kernel_dkv(
    d_out, delta, query, key, value, first, second, lse, d_key, d_value, strides_o, strides_q, strides_k, strides_v,
    strides_b, heads, group, sides_q, sides_k, low, ends, tiles_r, tiles_c, key_tiles_c, scale, scale_log2,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, HALO: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr,
    WINDOW: tl.constexpr, BIASED: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    FROM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    key_parts, parts = tl.cdiv(BLOCK * BLOCK, BLOCK_N), tl.cdiv(SIDE * SIDE, BLOCK_M)
    key_tile, key_part, kv_unit = tl.program_id(0) // key_parts, tl.program_id(0) % key_parts, tl.program_id(1)
    first_r, first_c = key_tile // key_tiles_c * BLOCK + FROM, key_tile % key_tiles_c * BLOCK + FROM
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    slot = key_part * BLOCK_N + tl.arange(0, BLOCK_N)
    kr, kc, at, k_there = _place(slot, first_r, first_c, sides_k, BLOCK, BLOCK)
    k = load_rows(_plane(key, strides_k, kv_unit, heads // group), at * strides_k[2], k_there, d, D)
    v = load_rows(_plane(value, strides_v, kv_unit, heads // group), at * strides_v[2], k_there, e, E)
    start_r, count_r = _reach(first_r, first_r + BLOCK - 1, sides_k[0], tiles_r, SIDE, BLOCK, HALO, K)
    start_c, count_c = _reach(first_c, first_c + BLOCK - 1, sides_k[1], tiles_c, SIDE, BLOCK, HALO, K)
    d_k, d_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for step in range(group * count_r * count_c * parts):
        tile = step // parts
        tile_r, tile_c = start_r + tile // count_c % count_r, start_c + tile % count_c
        unit = kv_unit * group + tile // (count_c * count_r)
        inner = step % parts * BLOCK_M + tl.arange(0, BLOCK_M)
        qr, qc, token, q_there = _place(inner, tile_r * SIDE, tile_c * SIDE, sides_q, SIDE, SIDE)
        origin_r = _origin(tile_r, sides_k[0], SIDE, BLOCK, HALO, K)
        origin_c = _origin(tile_c, sides_k[1], SIDE, BLOCK, HALO, K)
        within = k_there & (kr >= origin_r) & (kr < origin_r + WINDOW) & (kc >= origin_c) & (kc < origin_c + WINDOW)
        of_map, of_map_too = _bias_planes(first, second, strides_b, unit, heads, K, BIASED)
        q = load_rows(_plane(query, strides_q, unit, heads), token * strides_q[2], q_there, d, D)
        scores = _scores(
            q, k, qr, qc, q_there, kr, kc, within, tile_r, tile_c, of_map, of_map_too, token * strides_b[2],
            scale_log2, sides_k, low, ends, SIDE, BLOCK, HALO, STEP, K, WINDOW, BIASED, PRECISION,
        )  # fmt: skip
        row = unit.to(tl.int64) * sides_q[0] * sides_q[1] + token
        d_o = load_rows(_plane(d_out, strides_o, unit, heads), token * strides_o[2], q_there, e, E)
        weights = tl.exp2(scores - tl.load(lse + row, mask=q_there, other=0.0)[:, None] * 1.4426950408889634)
        d_v += tl.dot(tl.trans(weights.to(d_o.dtype)), d_o, input_precision=PRECISION)
        d_weights = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
        d_scores = weights * (d_weights - tl.load(delta + row, mask=q_there, other=0.0)[:, None])
        d_k += tl.dot(tl.trans(d_scores.to(q.dtype)), q, input_precision=PRECISION)
    row = kv_unit.to(tl.int64) * sides_k[0] * sides_k[1] + at
    store_rows(d_key, d_k * scale, row * D, k_there, d, D)
    store_rows(d_value, d_v, row * E, k_there, e, E)


_FORWARD = {64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1), 512: Tile(16, 32, 8, 1)}
_DQ = {64: Tile(64, 32, 4, 2), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)}
_DKV = {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 4, 1), 256: Tile(32, 32, 8, 1), 512: Tile(16, 16, 8, 1)}
_ONE_TILE = {512: Tile(32, 64, 4, 1)}
_FEWER_KEYS = {256: Tile(16, 32, 8, 1)}
TILES: TileTable = {
    "interpreter": {"forward": _ONE_TILE, "dq": _ONE_TILE, "dkv": _ONE_TILE},
    **{target: {"forward": _FORWARD, "dq": _DQ, "dkv": _DKV} for target in ("sm_80", "sm_90", "sm_100")},
    **{target: {"forward": _FORWARD, "dq": _DQ, "dkv": _DKV | _FEWER_KEYS} for target in ("sm_89", "sm_120")},
    "gfx942": {
        "forward": _FORWARD | {256: Tile(16, 32, 8, 1)},
        "dq": _DQ | {128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 8, 1)},
        "dkv": _DKV | _FEWER_KEYS | {64: Tile(64, 32, 4, 2)},
    },
}


class _Cut(NamedTuple):
    """How maps are cut into squares of queries, and what the constants of every kernel are."""

    constants: dict[str, Any]
    sides_q: tuple[int, int]
    sides_k: tuple[int, int]
    low: int
    ends: tuple[int, int]
    tiles: tuple[int, int]


def _blocks(query: Tensor, key: Tensor, block: int, halo: int, stride: int, step: int, masked: bool) -> _Cut:
    rows, columns = key.shape[2:4]
    ends = tuple(n if masked or n % block else n + halo for n in (rows, columns))
    constants = {"SIDE": block // stride, "BLOCK": block, "HALO": halo, "STEP": step, "K": 0}
    constants["WINDOW"] = block + 2 * halo
    tiles = -(-rows // block), -(-columns // block)
    low = 0 if masked else -halo
    return _Cut(constants, tuple(query.shape[2:4]), (rows, columns), low, ends, tiles)  # type: ignore[arg-type]


def _squares(query: Tensor, k: int) -> _Cut:
    sides = tuple(query.shape[2:4])
    constants = {"SIDE": _SQUARE, "BLOCK": _SQUARE, "HALO": 0, "STEP": 1, "K": k, "WINDOW": _SQUARE + k - 1}
    tiles = tuple(-(-n // _SQUARE) for n in sides)
    return _Cut(constants, sides, sides, 0, sides, tiles)  # type: ignore[arg-type]


def _tokens(t: Tensor) -> Tensor:
    """(B, H, rows, columns, X) as (B, H, tokens, X) with neighbours in memory last, a view where that can be."""
    return strided_rows(t.flatten(2, 3))


def _options(cut: _Cut, kernel: str, query: Tensor, value: Tensor, biased: bool) -> dict[str, Any]:
    D, E = query.shape[-1], value.shape[-1]
    tile = table_tile(TILES, kernel, query, max(width(D), width(E)))
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "BLOCK_D": width(D), "BLOCK_E": width(E)}
    if kernel == "dkv":
        blocks |= {"BLOCK_M": tile.keys, "BLOCK_N": tile.rows}
    given = {"BIASED": biased, "D": D, "E": E, "PRECISION": dot_precision(query)}
    launch = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return cut.constants | blocks | given | launch


def _attend(
    cut: _Cut, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, second: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; `first` is a bias table, or both are logits by row and column."""
    no_float64(query)
    out = query.new_empty((*query.shape[:4], value.shape[4]))
    lse = query.new_empty(query.shape[:4], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse.fill_(-torch.inf)
    q, k, v = (_tokens(t) for t in (query, key, value))
    options = _options(cut, "forward", query, value, first is not None)
    strides_b = first.stride()[:3] if second is not None and first is not None else (0, 0, 0)
    parts = triton.cdiv(options["SIDE"] ** 2, options["BLOCK_M"])
    H = query.shape[1]
    local_attention_fwd_kernel[(cut.tiles[0] * cut.tiles[1] * parts, query.shape[0] * H)](
        q, k, v, q if first is None else first, q if second is None else second, out, lse,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], strides_b, H, H // key.shape[1],
        cut.sides_q, cut.sides_k, cut.low, cut.ends, cut.tiles[1], scale * LOG2E, **options,
    )  # fmt: skip
    return out, lse


class _Gradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    first: Tensor
    second: Tensor


def _differentiate(
    cut: _Cut,
    d_out: Tensor,
    delta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    lse: Tensor,
    scale: float,
) -> _Gradients:
    """The gradient of a bias table is returned per query and key, (B, H, tokens, k * k)."""
    no_float64(query)
    (B, H, *_), Hkv, w, k_size = query.shape, key.shape[1], cut.constants["WINDOW"], cut.constants["K"]
    per_query = k_size**2 if second is None else 2 * w - 1
    shape = B, H, query.shape[2] * query.shape[3], per_query
    d_first, d_second = (query.new_zeros((0,) if t is None else shape, dtype=torch.float32) for t in (first, second))
    d_query, d_key, d_value = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    result = _Gradients(d_query, d_key, d_value, d_first, d_second)
    if d_out.numel() == 0:
        return result
    q, k, v, d_o = (_tokens(t) for t in (query, key, value, d_out))
    strides_b = first.stride()[:3] if second is not None and first is not None else (0, 0, 0)
    tensors = (d_o, delta.contiguous(), q, k, v, q if first is None else first, q if second is None else second, lse)
    strides = (*(t.stride()[:3] for t in (d_o, q, k, v)), strides_b)
    map_args = (H, H // Hkv, cut.sides_q, cut.sides_k, cut.low, cut.ends)
    scales = (scale, scale * LOG2E)
    options = _options(cut, "dq", query, value, first is not None)
    parts = triton.cdiv(options["SIDE"] ** 2, options["BLOCK_M"])
    local_attention_bwd_kernel_dq[(cut.tiles[0] * cut.tiles[1] * parts, B * H)](
        *tensors, result.query, d_first, d_second, *strides, *map_args, cut.tiles[1], *scales,
        **options, BLOCK_W=width(w),
    )  # fmt: skip
    options = _options(cut, "dkv", query, value, first is not None)
    block, halo = options["BLOCK"], options["HALO"]
    start = halo - -(-halo // block) * block  # squares of keys begin where windows end
    key_tiles = [triton.cdiv(n - start, block) for n in cut.sides_k]
    parts = triton.cdiv(block**2, options["BLOCK_N"])
    local_attention_bwd_kernel_dkv[(key_tiles[0] * key_tiles[1] * parts, B * Hkv)](
        *tensors, result.key, result.value, *strides, *map_args, *cut.tiles, key_tiles[1], *scales,
        **options, FROM=start,
    )  # fmt: skip
    return result


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_logits: Tensor | None,
    column_logits: Tensor | None,
    block: int,
    halo: int,
    stride: int,
    step: int,
    masked: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    cut = _blocks(query, key, block, halo, stride, step, masked)
    return _attend(cut, query, key, value, *_logits(row_logits, column_logits), scale)


def backward(
    d_out: Tensor,
    delta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_logits: Tensor | None,
    column_logits: Tensor | None,
    lse: Tensor,
    block: int,
    halo: int,
    stride: int,
    step: int,
    masked: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cut = _blocks(query, key, block, halo, stride, step, masked)
    logits = _logits(row_logits, column_logits)
    *gradients, d_rows, d_columns = _differentiate(cut, d_out, delta, query, key, value, *logits, lse, scale)
    if row_logits is not None:
        d_rows, d_columns = (t.view(row_logits.shape) for t in (d_rows, d_columns))
    return *gradients, d_rows, d_columns  # type: ignore[return-value]


def _logits(rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both (B, H, tokens, P) with the same strides."""
    if rows is None or columns is None:
        return None, None
    rows, columns = _tokens(rows), _tokens(columns)
    return (rows, columns) if rows.stride() == columns.stride() else (rows.contiguous(), columns.contiguous())


def neighborhood(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    table = None if bias is None else bias.contiguous()
    return _attend(_squares(query, kernel_size), query, key, value, table, None, scale)


def neighborhood_backward(
    d_out: Tensor,
    delta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    kernel_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cut, table = _squares(query, kernel_size), None if bias is None else bias.contiguous()
    *gradients, d_scores, _ = _differentiate(cut, d_out, delta, query, key, value, table, None, lse, scale)
    if bias is None:
        return *gradients, d_scores  # type: ignore[return-value]
    rows, columns = (_relative(n, kernel_size, query.device) for n in query.shape[2:4])
    shape = *query.shape[:4], kernel_size, kernel_size
    d_bias = torch.einsum("hrcxy,rxp,cyq->hpq", d_scores.view(shape).sum(0), rows, columns)
    return *gradients, d_bias.to(bias.dtype).contiguous()  # type: ignore[return-value]


def _relative(n: int, k: int, device: torch.device) -> Tensor:
    """(n, k, 2k - 1) along one side of the map: 1 where the query meets its key at that relative position."""
    queries = torch.arange(n, device=device)
    keys = (queries - k // 2).clamp(0, max(n - k, 0))[:, None] + torch.arange(k, device=device)
    positions = torch.arange(2 * k - 1, device=device)
    return ((keys - queries[:, None] + k - 1)[..., None] == positions).float()
