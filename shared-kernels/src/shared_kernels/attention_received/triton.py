"""attention_received and attention_given on GPUs: flash attention's loops without the values.

What a row needs (log-sum-exp, entropy, masses, place of the largest score) is found by programs of a tile of rows that
walk the keys; where there are too few rows to fill a GPU, several programs share the keys of a tile. What keys receive
is then found by programs of a tile of keys that walk the rows, so nothing is added across programs. The backward passes
of both functions are one: d score = P * (constant + weight * d_key - d_entropy * (ln P + entropy) + d_mass of the
group), from which one kernel sums d query over keys and another d key over rows.

Rows that see no keys of a tile are skipped by the intervals, for rows in any order. Scores are natural here, and only
their differences to a maximum or an LSE are multiplied by log2(e): what is returned is a sum of few large
probabilities in float32, which a factor rounded before the difference is taken would be felt in.
"""

# mypy: disable-error-code=no-untyped-def
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._intervals import intervals, keys_there, plane, rows_that_see
from shared_kernels._tiles import (
    Tile,
    TileTable,
    dot_precision,
    load_rows,
    no_float64,
    store_rows,
    strided_rows,
    table_tile,
    width,
)


@triton.jit
def _scores(q, k, keys, there, first, last, factor, PRECISION: tl.constexpr):
    """factor * q . k, -inf where the row does not see the key."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
    seen = there[None, :] & (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _softmax_step(scores, top, total):
    """One step of the online softmax over natural scores; as `softmax_step`, which takes them to base 2."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2((scores - safe[:, None]) * 1.4426950408889634)
    shrink = tl.exp2((top - safe) * 1.4426950408889634)
    return new_top, total * shrink + tl.sum(weights, 1), weights, shrink


@triton.jit
def _log_probabilities(scores, lse, rows, inside):
    """Natural scores minus the LSE, -inf throughout in rows without keys."""
    natural = tl.load(lse + rows, mask=inside, other=float("-inf"))
    return scores - tl.where(natural == float("-inf"), float("inf"), natural)[:, None]


@triton.jit
def _members(labels, batch, keys, there, Nk, GROUPS: tl.constexpr):
    """Ones (N, GROUPS) where a key is of a group."""
    label = tl.load(labels + batch * Nk + keys, mask=there, other=-1).to(tl.int32)
    return (label[:, None] == tl.arange(0, GROUPS)[None, :]).to(tl.float32)


@triton.jit
def attention_received_fwd_kernel_rows(
    query, key, bounds, key_mask, labels, lse, entropy, mass,
    query_strides, key_strides, bounds_stride, H, group, R, Nk, planes, keys_per_split, num_groups, factor,
    D: tl.constexpr, GROUPS: tl.constexpr, ENTROPY: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, split, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch = (head // H).to(tl.int64)
    rows, columns = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = rows < R
    q = load_rows(plane(query, query_strides, head, H), rows.to(tl.int64) * query_strides[2], inside, columns, D)
    key = plane(key, key_strides, head // group, H // group)
    first, last = intervals(bounds, bounds_stride, batch, rows, inside, Nk)
    start = tl.maximum(split * keys_per_split, tl.min(first, 0) // BLOCK_N * BLOCK_N)
    end = tl.minimum(tl.minimum((split + 1) * keys_per_split, Nk), tl.max(last, 0))
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    spread = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, GROUPS), tl.float32)
    for at in range(start, end, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        there = keys_there(key_mask, batch, keys, Nk)
        k = load_rows(key, keys.to(tl.int64) * key_strides[2], there, columns, D)
        scores = _scores(q, k, keys, there, first, last, factor, PRECISION)
        before, total_before = top, total
        top, total, weights, shrink = _softmax_step(scores, top, total)
        if ENTROPY:  # sum of weight * (score - top)
            fall = tl.where(total_before == 0.0, 0.0, before - top)
            rise = tl.where(weights == 0.0, 0.0, scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
            spread = (spread + total_before * fall) * shrink + tl.sum(weights * rise, 1)
        if GROUPS > 1:
            members = _members(labels, batch, keys, there, Nk, GROUPS)
            sums = tl.dot(weights, members, acc=sums * shrink[:, None], input_precision=WIDE)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    log_total = tl.log2(total) * 0.6931471805599453
    at_row = head.to(tl.int64) * R + rows
    tl.store(
        lse + split.to(tl.int64) * planes * R + at_row, tl.where(empty, float("-inf"), top + log_total), mask=inside
    )
    if ENTROPY:
        tl.store(entropy + at_row, log_total - spread / total, mask=inside)
    if GROUPS > 1:
        groups = tl.arange(0, GROUPS)[None, :]
        target = mass + at_row[:, None] * num_groups + groups
        tl.store(target, sums / total[:, None], mask=inside[:, None] & (groups < num_groups))


@triton.jit
def attention_received_fwd_kernel_argmax(
    query, key, bounds, key_mask, place,
    query_strides, key_strides, bounds_stride, H, group, R, Nk, factor,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    batch = (head // H).to(tl.int64)
    rows, columns = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = rows < R
    q = load_rows(plane(query, query_strides, head, H), rows.to(tl.int64) * query_strides[2], inside, columns, D)
    key = plane(key, key_strides, head // group, H // group)
    first, last = intervals(bounds, bounds_stride, batch, rows, inside, Nk)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    best = tl.full((BLOCK_M,), -1, tl.int32)
    for at in range(tl.min(first, 0), tl.max(last, 0), BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        there = keys_there(key_mask, batch, keys, Nk)
        k = load_rows(key, keys.to(tl.int64) * key_strides[2], there, columns, D)
        scores = _scores(q, k, keys, there, first, last, factor, PRECISION)
        largest = tl.max(scores, 1)
        lowest = tl.min(tl.where(scores == largest[:, None], keys[None, :], 2147483647), 1)
        better = largest > top
        top, best = tl.where(better, largest, top), tl.where(better, lowest, best)
    tl.store(place + head.to(tl.int64) * R + rows, best.to(tl.int64), mask=inside)


@triton.jit
def attention_received_fwd_kernel_columns(
    query, key, bounds, key_mask, row_weights, lse, received,
    query_strides, key_strides, bounds_stride, H, group, R, Nk, first_key, end_key, factor,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    batch, columns = (head // H).to(tl.int64), tl.arange(0, BLOCK_D)
    start = first_key + tile * BLOCK_N
    keys = start + tl.arange(0, BLOCK_N)
    there = keys_there(key_mask, batch, keys, Nk)
    key = plane(key, key_strides, head // group, H // group)
    k = load_rows(key, keys.to(tl.int64) * key_strides[2], there, columns, D)
    query = plane(query, query_strides, head, H)
    low, high = rows_that_see(bounds, bounds_stride, batch, start, start + BLOCK_N, R)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # added up over rows once, at the end
    for at in range(low, high, BLOCK_M):
        rows = at + tl.arange(0, BLOCK_M)
        inside = rows < R
        q = load_rows(query, rows.to(tl.int64) * query_strides[2], inside, columns, D)
        first, last = intervals(bounds, bounds_stride, batch, rows, inside, Nk)
        scores = _scores(q, k, keys, there, first, last, factor, PRECISION)
        at_row = head.to(tl.int64) * R + rows
        p = tl.exp2(_log_probabilities(scores, lse, at_row, inside) * 1.4426950408889634)
        if row_weights is not None:
            p *= tl.load(row_weights + at_row, mask=inside, other=0.0)[:, None]
        sums += p
    target = received + head.to(tl.int64) * (end_key - first_key) + (keys - first_key)
    tl.store(target, tl.sum(sums, 0), mask=keys < end_key)


@triton.jit
def attention_received_bwd_kernel_paid(
    query, key, bounds, key_mask, d_keys, lse, paid,
    query_strides, key_strides, bounds_stride, H, group, R, Nk, first_key, end_key, factor,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sum_j P_ij d_key_j of every row."""
    tile, head = tl.program_id(0), tl.program_id(1)
    batch = (head // H).to(tl.int64)
    rows, columns = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = rows < R
    q = load_rows(plane(query, query_strides, head, H), rows.to(tl.int64) * query_strides[2], inside, columns, D)
    key = plane(key, key_strides, head // group, H // group)
    first, last = intervals(bounds, bounds_stride, batch, rows, inside, Nk)
    at_row = head.to(tl.int64) * R + rows
    d_keys += head.to(tl.int64) * (end_key - first_key) - first_key
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for at in range(tl.maximum(first_key, tl.min(first, 0)), tl.minimum(end_key, tl.max(last, 0)), BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        there = keys_there(key_mask, batch, keys, end_key)
        k = load_rows(key, keys.to(tl.int64) * key_strides[2], there, columns, D)
        scores = _scores(q, k, keys, there, first, last, factor, PRECISION)
        p = tl.exp2(_log_probabilities(scores, lse, at_row, inside) * 1.4426950408889634)
        sums += tl.sum(p * tl.load(d_keys + keys, mask=keys < end_key, other=0.0)[None, :], 1)
    tl.store(paid + at_row, sums, mask=inside)


@triton.jit
def _flow(
    scores, keys, there, at_row, inside, batch, head, Nk, first_key, end_key, num_groups,
    constant, row_weights, d_keys, lse, entropy, d_entropy, labels, d_mass, GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """d score of a tile, see above. `scores` are natural; pointers that are None contribute nothing."""
    log_p = _log_probabilities(scores, lse, at_row, inside)
    p = tl.exp2(log_p * 1.4426950408889634)
    flow = tl.zeros(scores.shape, tl.float32) + tl.load(constant + at_row, mask=inside, other=0.0)[:, None]
    if d_keys is not None:
        of_keys = (keys >= first_key) & (keys < end_key)
        own = d_keys + head.to(tl.int64) * (end_key - first_key) + (keys - first_key)
        d_key = tl.load(own, mask=of_keys, other=0.0)[None, :]
        if row_weights is not None:
            d_key = d_key * tl.load(row_weights + at_row, mask=inside, other=0.0)[:, None]
        flow += d_key
    if d_entropy is not None:
        slope = tl.load(d_entropy + at_row, mask=inside, other=0.0)[:, None]
        surprise = tl.where(p == 0.0, 0.0, log_p + tl.load(entropy + at_row, mask=inside, other=0.0)[:, None])
        flow -= slope * surprise
    if GROUPS > 1:
        groups = tl.arange(0, GROUPS)[None, :]
        there_too = inside[:, None] & (groups < num_groups)
        masses = tl.load(d_mass + at_row[:, None] * num_groups + groups, mask=there_too, other=0.0)
        members = _members(labels, batch, keys, there, Nk, GROUPS)
        flow = tl.dot(masses, tl.trans(members), acc=flow, input_precision=WIDE)
    return p * flow


@triton.jit
def attention_received_bwd_kernel_query(
    query, key, bounds, key_mask, constant, row_weights, d_keys, lse, entropy, d_entropy, labels, d_mass, d_query,
    query_strides, key_strides, bounds_stride, H, group, R, Nk, first_key, end_key, num_groups, factor,
    D: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    batch = (head // H).to(tl.int64)
    rows, columns = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = rows < R
    q = load_rows(plane(query, query_strides, head, H), rows.to(tl.int64) * query_strides[2], inside, columns, D)
    key = plane(key, key_strides, head // group, H // group)
    first, last = intervals(bounds, bounds_stride, batch, rows, inside, Nk)
    at_row = head.to(tl.int64) * R + rows
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in range(tl.min(first, 0), tl.max(last, 0), BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        there = keys_there(key_mask, batch, keys, Nk)
        k = load_rows(key, keys.to(tl.int64) * key_strides[2], there, columns, D)
        scores = _scores(q, k, keys, there, first, last, factor, PRECISION)
        flow = _flow(
            scores, keys, there, at_row, inside, batch, head, Nk, first_key, end_key, num_groups,
            constant, row_weights, d_keys, lse, entropy, d_entropy, labels, d_mass, GROUPS, WIDE,
        )  # fmt: skip
        acc = tl.dot(flow.to(k.dtype), k, acc=acc, input_precision=PRECISION)
    store_rows(d_query, acc * factor, at_row * D, inside, columns, D)


@triton.jit
def attention_received_bwd_kernel_key(
    query, key, bounds, key_mask, constant, row_weights, d_keys, lse, entropy, d_entropy, labels, d_mass, d_key,
    query_strides, key_strides, bounds_stride, H, group, R, Nk, first_key, end_key, num_groups, factor,
    D: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    batch, columns = (kv_head // (H // group)).to(tl.int64), tl.arange(0, BLOCK_D)
    start = tile * BLOCK_N
    keys = start + tl.arange(0, BLOCK_N)
    there = keys_there(key_mask, batch, keys, Nk)
    k = load_rows(plane(key, key_strides, kv_head, H // group), keys.to(tl.int64) * key_strides[2], there, columns, D)
    low, high = rows_that_see(bounds, bounds_stride, batch, start, start + BLOCK_N, R)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        of_head = plane(query, query_strides, head, H)
        for at in range(low, high, BLOCK_M):
            rows = at + tl.arange(0, BLOCK_M)
            inside = rows < R
            at_row = head.to(tl.int64) * R + rows
            q = load_rows(of_head, rows.to(tl.int64) * query_strides[2], inside, columns, D)
            first, last = intervals(bounds, bounds_stride, batch, rows, inside, Nk)
            scores = _scores(q, k, keys, there, first, last, factor, PRECISION)
            flow = _flow(
                scores, keys, there, at_row, inside, batch, head, Nk, first_key, end_key, num_groups,
                constant, row_weights, d_keys, lse, entropy, d_entropy, labels, d_mass, GROUPS, WIDE,
            )  # fmt: skip
            acc = tl.dot(tl.trans(flow.to(q.dtype)), q, acc=acc, input_precision=PRECISION)
    store_rows(d_key, acc * factor, (kv_head.to(tl.int64) * Nk + keys) * D, keys < Nk, columns, D)


_ROWS = {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 1)}
_COLUMNS = {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 1)}
_BACKWARD = {64: Tile(64, 64, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)}
_GIVEN = {128: Tile(32, 32, 4, 1), 256: Tile(32, 32, 8, 1)}
_FLOAT32 = {  # three products take the place of one, with operands in registers
    "rows, float32": {128: Tile(64, 32, 4, 1), 512: Tile(16, 32, 4, 1)},
    "columns, float32": {128: Tile(32, 32, 4, 1), 512: Tile(16, 32, 8, 1)},
    "backward, float32": {128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1), 512: Tile(16, 16, 8, 1)},
    "given, float32": {128: Tile(32, 32, 4, 1), 512: Tile(16, 16, 8, 1)},
}
_KERNELS = {"rows": _ROWS, "columns": _COLUMNS, "backward": _BACKWARD, "given": _GIVEN}
_TABLE = _KERNELS | _FLOAT32
TILES: TileTable = {
    "interpreter": {kernel: {256: Tile(16, 32, 4, 1)} for kernel in _KERNELS},
    "sm_80": _TABLE,
    "sm_89": _TABLE,
    "sm_90": _TABLE,
    "sm_100": _TABLE,
    "sm_120": _TABLE,
    "gfx942": {
        "rows": _ROWS,
        "columns": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 4, 1)},
        "backward": {64: Tile(32, 64, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
        "given": {64: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
    },
}
_PROGRAMS = 264
"""Programs that fill a large GPU; of fewer, the keys of a tile are split."""
_FEWEST_KEYS = 1024
"""Keys that are worth a program of their own."""


class _Launch:
    """Grids and arguments that all kernels of a call have in common."""

    def __init__(self, query: Tensor, key: Tensor, bounds: Tensor | None, key_mask: Tensor | None) -> None:
        no_float64(query)
        self.query, self.key = strided_rows(query), strided_rows(key)
        self.bounds = None if bounds is None else bounds.contiguous()
        self.key_mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.B, self.H, self.R, self.D = query.shape
        self.Nk, self.group = key.shape[2], self.H // key.shape[1]
        self.planes = self.B * self.H
        self.inputs = (self.query, self.key, self.bounds, self.key_mask)
        stride = 0 if bounds is None or bounds.shape[0] == 1 else 2 * self.R
        strides = self.query.stride()[:3], self.key.stride()[:3]
        self.sizes = (*strides, stride, self.H, self.group, self.R, self.Nk)

    def constants(self, kernel: str) -> dict[str, Any]:
        tile = table_tile(TILES, kernel, self.query, self.D)
        block_m, block_n = min(tile.rows, width(self.R)), min(tile.keys, width(self.Nk))
        return {
            "D": self.D,
            "PRECISION": dot_precision(self.query),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_D": width(self.D),
            "num_warps": min(4, tile.warps) if block_m < min(tile.rows, 64) else tile.warps,
            "num_stages": tile.stages,
            "enable_fp_fusion": True,
        }

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.query.device)

    def splits(self, block_m: int, block_n: int) -> tuple[int, int]:
        """Programs that share the keys of a tile of rows, and keys of each."""
        tiles = triton.cdiv(self.R, block_m) * self.planes
        fewest = _FEWEST_KEYS if self.query.device.type != "cpu" else 2 * block_n
        splits = max(1, min(_PROGRAMS // tiles, self.Nk // fewest))
        keys = triton.cdiv(triton.cdiv(self.Nk, splits), block_n) * block_n
        return triton.cdiv(self.Nk, keys), keys


def _groups(labels: Tensor | None, num_groups: int) -> int:
    """Columns of the matrix of members; 1 stands for no groups."""
    return 1 if labels is None else width(num_groups)


def _statistics(
    launch: _Launch, labels: Tensor | None, num_groups: int, entropy: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (launch.B, launch.H, launch.R)
    entropies = launch.empty(*shape) if entropy else launch.empty(0)
    mass = launch.empty(*shape, num_groups)
    constants = launch.constants("rows" if labels is None else "given")
    splits, keys = (1, max(1, launch.Nk))
    if labels is None and not entropy and launch.Nk:
        splits, keys = launch.splits(constants["BLOCK_M"], constants["BLOCK_N"])
    lse = launch.empty(splits, *shape)
    grid = triton.cdiv(launch.R, constants["BLOCK_M"]), splits, launch.planes
    attention_received_fwd_kernel_rows[grid](
        *launch.inputs, labels, lse, entropies, mass,
        *launch.sizes, launch.planes, keys, num_groups, scale,
        GROUPS=_groups(labels, num_groups), ENTROPY=entropy, WIDE=dot_precision(lse), **constants,
    )  # fmt: skip
    return lse[0] if splits == 1 else lse.logsumexp(0), entropies, mass


def forward(
    query: Tensor, key: Tensor, bounds: Tensor | None, key_mask: Tensor | None, row_weights: Tensor | None,
    lse: Tensor | None, first: int, last: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    launch = _Launch(query, key, bounds, key_mask)
    received = launch.empty(*query.shape[:2], last - first)
    found = launch.empty(*(query.shape[:3] if lse is None else (0,)))
    if query.numel() == 0 or last == first:
        return received.zero_(), found.fill_(-torch.inf)
    if lse is None:
        lse = found = _statistics(launch, None, 0, False, scale)[0]
    constants = launch.constants("columns")
    grid = triton.cdiv(last - first, constants["BLOCK_N"]), launch.planes
    weights = None if row_weights is None else row_weights.contiguous()
    attention_received_fwd_kernel_columns[grid](
        *launch.inputs, weights, lse.contiguous(), received, *launch.sizes, first, last, scale, **constants
    )
    return received, found


def _gradients(
    launch: _Launch, scale: float, *, constant: Tensor, lse: Tensor, row_weights: Tensor | None = None,
    d_keys: Tensor | None = None, columns: tuple[int, int] = (0, 0), entropy: Tensor | None = None,
    d_entropy: Tensor | None = None, labels: Tensor | None = None, d_mass: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    d_query = launch.empty(*launch.query.shape, dtype=launch.query.dtype)
    d_key = launch.empty(*launch.key.shape, dtype=launch.key.dtype)
    num_groups = 0 if d_mass is None else d_mass.shape[-1]
    constants = launch.constants("backward" if d_keys is not None else "given")
    constants |= {"GROUPS": _groups(labels, num_groups), "WIDE": dot_precision(lse)}
    flow = (constant, row_weights, d_keys, lse, entropy, d_entropy, labels, d_mass)
    sizes = (*launch.sizes, *columns, num_groups, scale)
    grid = triton.cdiv(launch.R, constants["BLOCK_M"]), launch.planes
    attention_received_bwd_kernel_query[grid](*launch.inputs, *flow, d_query, *sizes, **constants)
    grid = triton.cdiv(launch.Nk, constants["BLOCK_N"]), launch.planes // launch.group
    attention_received_bwd_kernel_key[grid](*launch.inputs, *flow, d_key, *sizes, **constants)
    return d_query, d_key


def backward(
    d_received: Tensor, query: Tensor, key: Tensor, bounds: Tensor | None, key_mask: Tensor | None,
    row_weights: Tensor | None, lse: Tensor, first: int, last: int, scale: float, normalised: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    launch = _Launch(query, key, bounds, key_mask)
    paid = launch.empty(*query.shape[:3])
    if query.numel() == 0 or last == first:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), paid.zero_()
    d_keys, lse = d_received.contiguous(), lse.contiguous()
    weights = None if row_weights is None else row_weights.contiguous()
    constants = launch.constants("rows")
    grid = triton.cdiv(launch.R, constants["BLOCK_M"]), launch.planes
    attention_received_bwd_kernel_paid[grid](
        *launch.inputs, d_keys, lse, paid, *launch.sizes, first, last, scale, **constants
    )
    constant = torch.zeros_like(paid) if not normalised else -paid if weights is None else -paid * weights
    gradients = _gradients(
        launch, scale, constant=constant, lse=lse, row_weights=weights, d_keys=d_keys, columns=(first, last)
    )
    return *gradients, paid


def given(
    query: Tensor, key: Tensor, bounds: Tensor | None, key_mask: Tensor | None, labels: Tensor | None,
    num_groups: int, entropy: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    launch = _Launch(query, key, bounds, key_mask)
    if query.numel() == 0:
        shape = query.shape[:3]
        return launch.empty(*shape), launch.empty(*(shape if entropy else (0,))), launch.empty(*shape, num_groups)
    return _statistics(launch, None if labels is None else labels.contiguous(), num_groups, entropy, scale)


def given_backward(
    d_scores: Tensor, d_entropy: Tensor | None, d_mass: Tensor, query: Tensor, key: Tensor, bounds: Tensor | None,
    key_mask: Tensor | None, labels: Tensor | None, lse: Tensor, entropy: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    launch = _Launch(query, key, bounds, key_mask)
    if query.numel() == 0 or key.numel() == 0:
        return query.new_zeros(query.shape), key.new_zeros(key.shape)
    labels = None if labels is None else labels.contiguous()
    return _gradients(
        launch, scale, constant=d_scores.contiguous(), lse=lse, entropy=entropy,
        d_entropy=None if d_entropy is None else d_entropy.contiguous(), labels=labels, d_mass=d_mass.contiguous(),
    )  # fmt: skip


def argmax(query: Tensor, key: Tensor, bounds: Tensor | None, key_mask: Tensor | None) -> Tensor:
    launch = _Launch(query, key, bounds, key_mask)
    place = launch.empty(*query.shape[:3], dtype=torch.int64)
    if query.numel() == 0:
        return place
    constants = launch.constants("rows")
    grid = triton.cdiv(launch.R, constants["BLOCK_M"]), launch.planes
    attention_received_fwd_kernel_argmax[grid](*launch.inputs, place, *launch.sizes, 1.0, **constants)
    return place
