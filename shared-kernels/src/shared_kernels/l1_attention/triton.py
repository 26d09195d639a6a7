"""l1_attention on GPUs: a program of a tile of rows walks its keys twice, first for the sum, then for the powers.

The largest softplus of a row, and so its largest excess, is known after the first sweep: unlike in flash attention,
nothing is rescaled in the second. Without a power there is one sweep. The backward pass has no atomics: rows walk the
keys twice (a mean by weight and what flows into the sum of softplus need all of them), keys walk the rows.
"""

# mypy: disable-error-code=no-untyped-def
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._intervals import intervals, keys_there, plane, rows_that_see
from shared_kernels._tiles import (
    LOG2E,
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
def _lower_power(x, power, POWER: tl.constexpr):
    """x^(power - 1) of numbers from 0 to 1, and 0 where x is 0; POWER is 0 unless the power is 3 or 15."""
    if POWER == 3:
        result = x * x
    elif POWER == 15:
        square = x * x
        fourth = square * square
        sixth = fourth * square
        result = sixth * sixth * square
    else:
        result = tl.where(x > 0.0, tl.exp2((power - 1.0) * tl.log2(x)), 0.0)
    return result


@triton.jit
def _softplus(q, k, keys, there, first, last, factor, PRECISION: tl.constexpr):
    """softplus(z) and sigmoid(z) of factor * q . k = z * log2(e), 0 where the row does not see the key."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor[:, None]
    seen = there[None, :] & (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    power = tl.exp2(scores)  # scores are below 128
    # log(1 + x) of small x by its series, which 1 + x would round away
    series = power * (1.0 - power * (0.5 - power * 0.3333333))
    plus = tl.where(power < 0.002, series, tl.log2(1.0 + power) * 0.6931471805599453)
    return plus, power / (1.0 + power)


@triton.jit
def _row_constants(n_keys, strides, batch, rows, inside, log2_d):
    """N, the factor of scores to base 2, and the threshold of the excess."""
    count = tl.load(n_keys + batch * strides[0] + rows.to(tl.int64) * strides[1], mask=inside, other=1.0)
    natural = tl.log2(tl.maximum(count, 1.0)) * 0.6931471805599453
    return count, natural * log2_d, tl.where(count > 3.0, 1.0, 0.0)


@triton.jit
def _inverse(total):
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def l1_attention_fwd_kernel(
    query, key, value, bounds, key_mask, n_keys, out, state,
    query_strides, key_strides, value_strides, count_strides, bounds_stride,
    H, group, R, Nk, planes, log2_d, power,
    D: tl.constexpr, E: tl.constexpr, REWEIGHT: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    batch = (head // H).to(tl.int64)
    rows, columns, columns_e = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    inside = rows < R
    q = load_rows(plane(query, query_strides, head, H), rows.to(tl.int64) * query_strides[2], inside, columns, D)
    key, value = (
        plane(key, key_strides, head // group, H // group),
        plane(value, value_strides, head // group, H // group),
    )
    first, last = intervals(bounds, bounds_stride, batch, rows, inside, Nk)
    start, end = tl.min(first, 0), tl.max(last, 0)
    count, factor, threshold = _row_constants(n_keys, count_strides, batch, rows, inside, log2_d)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.zeros((BLOCK_M,), tl.float32)
    first_stage = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for at in range(start, end, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        there = keys_there(key_mask, batch, keys, Nk)
        k = load_rows(key, keys.to(tl.int64) * key_strides[2], there, columns, D)
        plus, _ = _softplus(q, k, keys, there, first, last, factor, PRECISION)
        total += tl.sum(plus, 1)
        largest = tl.maximum(largest, tl.max(plus, 1))
        if not REWEIGHT:
            v = load_rows(value, keys.to(tl.int64) * value_strides[2], there, columns_e, E)
            first_stage = tl.dot(plus.to(v.dtype), v, acc=first_stage, input_precision=PRECISION)
    inverse = _inverse(total)
    at_row = head.to(tl.int64) * R + rows
    tl.store(state + at_row, total, mask=inside)
    if not REWEIGHT:
        store_rows(out, first_stage * inverse[:, None], at_row * E, inside, columns_e, E)
    else:
        # the largest excess is known before the second sweep, so nothing is rescaled there
        share = count * inverse
        top = tl.maximum(largest * share - threshold, 0.0)
        flat = top <= FLAT
        safe = tl.where(flat, 1.0, top)
        powers = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        for at in range(start, end, BLOCK_N):
            keys = at + tl.arange(0, BLOCK_N)
            there = keys_there(key_mask, batch, keys, Nk)
            k = load_rows(key, keys.to(tl.int64) * key_strides[2], there, columns, D)
            plus, _ = _softplus(q, k, keys, there, first, last, factor, PRECISION)
            x = tl.maximum(plus * (share / safe)[:, None] - (threshold / safe)[:, None], 0.0)
            y = tl.where(flat[:, None], plus, _lower_power(x, power, POWER) * x)
            powers += tl.sum(y, 1)
            v = load_rows(value, keys.to(tl.int64) * value_strides[2], there, columns_e, E)
            acc = tl.dot(y.to(v.dtype), v, acc=acc, input_precision=PRECISION)
        tl.store(state + planes.to(tl.int64) * R + at_row, top, mask=inside)
        tl.store(state + 2 * planes.to(tl.int64) * R + at_row, powers, mask=inside)
        store_rows(out, acc * _inverse(powers)[:, None], at_row * E, inside, columns_e, E)


@triton.jit
def _row_state(state, planes, R, at_row, inside, FLAT: tl.constexpr):
    """1 / sum of softplus, whether the row has no excess, its largest excess or 1, and 1 / sum of its weights."""
    inverse = _inverse(tl.load(state + at_row, mask=inside, other=0.0))
    step = planes.to(tl.int64) * R
    top = tl.load(state + step + at_row, mask=inside, other=0.0)
    normal = _inverse(tl.load(state + 2 * step + at_row, mask=inside, other=0.0))
    flat = top <= FLAT
    return inverse, flat, tl.where(flat, 1.0, top), normal


@triton.jit
def _slope_of_weights(plus, share, threshold, flat, safe, normal, power, POWER: tl.constexpr):
    """Weights, and d weight / d excess up to what sums to nothing."""
    x = tl.maximum(plus * (share / safe)[:, None] - (threshold / safe)[:, None], 0.0)
    lower = _lower_power(x, power, POWER)
    weights = tl.where(flat[:, None], plus, lower * x) * normal[:, None]
    return weights, lower * (power * normal / safe)[:, None]


@triton.jit
def l1_attention_bwd_kernel_query(
    query, key, value, d_out, bounds, key_mask, n_keys, state, means, d_query,
    query_strides, key_strides, value_strides, count_strides, bounds_stride,
    H, group, R, Nk, planes, log2_d, power,
    D: tl.constexpr, E: tl.constexpr, REWEIGHT: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Also writes the `means` of d weights by weight, and what flows back through the sum of softplus of each row."""
    tile, head = tl.program_id(0), tl.program_id(1)
    batch = (head // H).to(tl.int64)
    rows, columns, columns_e = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    inside = rows < R
    q = load_rows(plane(query, query_strides, head, H), rows.to(tl.int64) * query_strides[2], inside, columns, D)
    key, value = (
        plane(key, key_strides, head // group, H // group),
        plane(value, value_strides, head // group, H // group),
    )
    first, last = intervals(bounds, bounds_stride, batch, rows, inside, Nk)
    start, end = tl.min(first, 0), tl.max(last, 0)
    count, factor, threshold = _row_constants(n_keys, count_strides, batch, rows, inside, log2_d)
    at_row = head.to(tl.int64) * R + rows
    d = load_rows(d_out, at_row * E, inside, columns_e, E)
    inverse, flat, safe, normal = _row_state(state, planes, R, at_row, inside, FLAT)
    share = count * inverse
    mean = tl.zeros((BLOCK_M,), tl.float32)
    of_slopes = tl.zeros((BLOCK_M,), tl.float32)
    slopes = tl.zeros((BLOCK_M,), tl.float32)
    for at in range(start, end, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        there = keys_there(key_mask, batch, keys, Nk)
        k = load_rows(key, keys.to(tl.int64) * key_strides[2], there, columns, D)
        v = load_rows(value, keys.to(tl.int64) * value_strides[2], there, columns_e, E)
        plus, _ = _softplus(q, k, keys, there, first, last, factor, PRECISION)
        d_weights = tl.dot(d, tl.trans(v), input_precision=PRECISION)
        if REWEIGHT:
            weights, slope = _slope_of_weights(plus, share, threshold, flat, safe, normal, power, POWER)
            of_slopes += tl.sum(slope * d_weights, 1)
            slopes += tl.sum(slope, 1)
        else:
            weights = plus * inverse[:, None]
        mean += tl.sum(weights * d_weights, 1)
    through_sum = tl.where(flat, 0.0, (of_slopes - mean * slopes) * threshold)
    tl.store(means + at_row, mean, mask=inside)
    tl.store(means + planes.to(tl.int64) * R + at_row, through_sum, mask=inside)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in range(start, end, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        there = keys_there(key_mask, batch, keys, Nk)
        k = load_rows(key, keys.to(tl.int64) * key_strides[2], there, columns, D)
        v = load_rows(value, keys.to(tl.int64) * value_strides[2], there, columns_e, E)
        plus, sigmoid = _softplus(q, k, keys, there, first, last, factor, PRECISION)
        flow = tl.dot(d, tl.trans(v), input_precision=PRECISION) - mean[:, None]
        if REWEIGHT:
            _, slope = _slope_of_weights(plus, share, threshold, flat, safe, normal, power, POWER)
            flow = tl.where(flat[:, None], flow, flow * slope * count[:, None] - through_sum[:, None])
        flow *= sigmoid * inverse[:, None]
        acc = tl.dot(flow.to(k.dtype), k, acc=acc, input_precision=PRECISION)
    acc *= factor[:, None] * 0.6931471805599453
    store_rows(d_query, acc, at_row * D, inside, columns, D)


@triton.jit
def l1_attention_bwd_kernel_key(
    query, key, value, d_out, bounds, key_mask, n_keys, state, means, d_key, d_value,
    query_strides, key_strides, value_strides, count_strides, bounds_stride,
    H, group, R, Nk, planes, log2_d, power,
    D: tl.constexpr, E: tl.constexpr, REWEIGHT: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    batch = (kv_head // (H // group)).to(tl.int64)
    columns, columns_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    start = tile * BLOCK_N
    keys = start + tl.arange(0, BLOCK_N)
    there = keys_there(key_mask, batch, keys, Nk)
    k = load_rows(plane(key, key_strides, kv_head, H // group), keys.to(tl.int64) * key_strides[2], there, columns, D)
    value = plane(value, value_strides, kv_head, H // group)
    v = load_rows(value, keys.to(tl.int64) * value_strides[2], there, columns_e, E)
    low, high = rows_that_see(bounds, bounds_stride, batch, start, start + BLOCK_N, R)
    key_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_sum = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        of_head = plane(query, query_strides, head, H)
        for at in range(low, high, BLOCK_M):
            rows = at + tl.arange(0, BLOCK_M)
            inside = rows < R
            at_row = head.to(tl.int64) * R + rows
            q = load_rows(of_head, rows.to(tl.int64) * query_strides[2], inside, columns, D)
            d = load_rows(d_out, at_row * E, inside, columns_e, E)
            first, last = intervals(bounds, bounds_stride, batch, rows, inside, Nk)
            count, factor, threshold = _row_constants(n_keys, count_strides, batch, rows, inside, log2_d)
            inverse, flat, safe, normal = _row_state(state, planes, R, at_row, inside, FLAT)
            plus, sigmoid = _softplus(q, k, keys, there, first, last, factor, PRECISION)
            flow = tl.dot(d, tl.trans(v), input_precision=PRECISION)
            flow -= tl.load(means + at_row, mask=inside, other=0.0)[:, None]
            if REWEIGHT:
                weights, slope = _slope_of_weights(plus, count * inverse, threshold, flat, safe, normal, power, POWER)
                through_sum = tl.load(means + planes.to(tl.int64) * R + at_row, mask=inside, other=0.0)
                flow = tl.where(flat[:, None], flow, flow * slope * count[:, None] - through_sum[:, None])
            else:
                weights = plus * inverse[:, None]
            value_sum = tl.dot(tl.trans(weights.to(d.dtype)), d, acc=value_sum, input_precision=PRECISION)
            flow *= sigmoid * (inverse * factor * 0.6931471805599453)[:, None]
            key_sum = tl.dot(tl.trans(flow.to(q.dtype)), q, acc=key_sum, input_precision=PRECISION)
    at_key = kv_head.to(tl.int64) * Nk + keys
    store_rows(d_key, key_sum, at_key * D, keys < Nk, columns, D)
    store_rows(d_value, value_sum, at_key * E, keys < Nk, columns_e, E)


_FORWARD = {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)}
_BACKWARD = {64: Tile(32, 32, 4, 2), 128: Tile(32, 64, 8, 1), 256: Tile(16, 32, 8, 1)}
_NARROW = {"forward": {64: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)}, "backward": {256: Tile(16, 32, 4, 1)}}
_FLOAT32 = {  # three products take the place of one, with operands in registers
    "forward, float32": {128: Tile(32, 32, 4, 1), 512: Tile(16, 32, 4, 1)},
    "backward, float32": {128: Tile(16, 32, 4, 1), 256: Tile(16, 32, 8, 1), 512: Tile(16, 16, 8, 1)},
}
_TABLE = {"forward": _FORWARD, "backward": _BACKWARD} | _FLOAT32
TILES: TileTable = {
    "interpreter": {kernel: {512: Tile(16, 32, 4, 1)} for kernel in _NARROW},
    "sm_80": _TABLE,
    "sm_89": _TABLE,
    "sm_90": _TABLE,
    "sm_100": _TABLE,
    "sm_120": _TABLE,
    "gfx942": _NARROW,
}


class _Launch:
    """Grids and arguments that all kernels of a call have in common."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, key_mask: Tensor | None,
        n_keys: Tensor, log_d: float, power: float | None,
    ) -> None:  # fmt: skip
        no_float64(query)
        self.tensors = [strided_rows(t) for t in (query, key, value)]
        bounds = None if bounds is None else bounds.contiguous()
        mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.rows = (bounds, mask, n_keys)
        self.B, self.H, self.R, self.D = query.shape
        self.Nk, self.E, self.power = key.shape[2], value.shape[3], power
        self.group, self.planes = self.H // key.shape[1], self.B * self.H
        stride = 0 if bounds is None or bounds.shape[0] == 1 else 2 * self.R
        strides = [t.stride()[:3] for t in self.tensors]
        self.sizes = (
            *strides, n_keys.stride(), stride, self.H, self.group, self.R, self.Nk, self.planes,
            log_d * LOG2E, 1.0 if power is None else power,
        )  # fmt: skip

    def constants(self, kernel: str) -> dict[str, Any]:
        tile = table_tile(TILES, kernel, self.tensors[0], max(self.D, self.E))
        return {
            "D": self.D,
            "E": self.E,
            "REWEIGHT": self.power is not None,
            "POWER": int(self.power) if self.power in (3, 15) else 0,
            "PRECISION": dot_precision(self.tensors[0]),
            "FLAT": 64 * torch.finfo(torch.float32).eps,
            "BLOCK_M": min(tile.rows, width(self.R)),
            "BLOCK_N": min(tile.keys, width(self.Nk)),
            "BLOCK_D": width(self.D),
            "BLOCK_E": width(self.E),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "enable_fp_fusion": True,
        }


def forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, key_mask: Tensor | None, n_keys: Tensor,
    log_d: float, power: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    launch = _Launch(query, key, value, bounds, key_mask, n_keys, log_d, power)
    out = torch.empty((*query.shape[:3], launch.E), dtype=query.dtype, device=query.device)
    state = torch.zeros((3, *query.shape[:3]), dtype=torch.float32, device=query.device)
    if query.numel() == 0 or key.numel() == 0:
        return out.zero_(), state
    constants = launch.constants("forward")
    grid = triton.cdiv(launch.R, constants["BLOCK_M"]), launch.planes
    l1_attention_fwd_kernel[grid](*launch.tensors, *launch.rows, out, state, *launch.sizes, **constants)
    return out, state


def backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, state: Tensor, bounds: Tensor | None,
    key_mask: Tensor | None, n_keys: Tensor, log_d: float, power: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if query.numel() == 0 or key.numel() == 0:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    launch = _Launch(query, key, value, bounds, key_mask, n_keys, log_d, power)
    d_out = d_out.contiguous()
    means = torch.empty((2, *query.shape[:3]), dtype=torch.float32, device=query.device)
    d_query, d_key, d_value = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    constants = launch.constants("backward")
    inputs = (*launch.tensors, d_out, *launch.rows, state.contiguous(), means)
    grid = triton.cdiv(launch.R, constants["BLOCK_M"]), launch.planes
    l1_attention_bwd_kernel_query[grid](*inputs, d_query, *launch.sizes, **constants)
    grid = triton.cdiv(launch.Nk, constants["BLOCK_N"]), launch.planes // launch.group
    l1_attention_bwd_kernel_key[grid](*inputs, d_key, d_value, *launch.sizes, **constants)
    return d_query, d_key, d_value
