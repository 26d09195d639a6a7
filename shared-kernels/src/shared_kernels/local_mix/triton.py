"""local_mix on GPUs: one program per run of pixels, softmax in registers, channels streamed tile by tile.

The backward pass has no atomics: the gradient of value is gathered, every cell sums the pixels of the cells that have
it in reach, on a map with room for what lies beyond the edge where the edge is replicated.
"""

# mypy: disable-error-code=no-untyped-def
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._tiles import no_float64, strided_rows, target
from shared_kernels.local_mix.edges import folded, reach

_TILE = 2048  # numbers of an output tile
_MAX_CHANNELS = 64  # of a tile


@triton.jit
def _near(y, x, offset, h, w, REPLICATE: tl.constexpr):
    """Row and column of each cell's neighbour at one offset (a pair in memory), and whether it is in the map."""
    y, x = y + tl.load(offset), x + tl.load(offset + 1)
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    if REPLICATE:
        inside = y == y
    return tl.minimum(tl.maximum(y, 0), h - 1).to(tl.int64), tl.minimum(tl.maximum(x, 0), w - 1).to(tl.int64), inside


@triton.jit
def _weight(logit, top, inverse, there, SOFTMAX: tl.constexpr):
    weight = tl.load(logit, mask=there, other=0.0).to(tl.float32)
    if SOFTMAX:
        weight = tl.exp2((weight - top) * 1.4426950408889634) * inverse
    return weight


@triton.jit
def _pixels(h, w, FACTOR: tl.constexpr, BLOCK_P: tl.constexpr):
    """Image, number among the pixels of all images, row, column and existence of this program's pixels."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    width, count = w * FACTOR, h * w * (FACTOR * FACTOR)
    return image, image * count + pixel, (pixel // width).to(tl.int64), (pixel % width).to(tl.int64), pixel < count


@triton.jit
def local_mix_fwd_kernel(
    value, logits, offsets, out, tops, inverses, strides_v, strides_l, h, w, C, n,
    FACTOR: tl.constexpr, SOFTMAX: tl.constexpr, REPLICATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, row, y, x, there = _pixels(h, w, FACTOR, BLOCK_P)
    first = logits + image * strides_l[0] + y * strides_l[2] + x * strides_l[3]
    top, total = tl.full((BLOCK_P,), float("-inf"), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    if SOFTMAX:
        logit = first
        for _ in range(n):
            number = tl.load(logit, mask=there, other=0.0).to(tl.float32)
            higher = tl.maximum(top, number)
            total = total * tl.exp2((top - higher) * 1.4426950408889634)
            total += tl.exp2((number - higher) * 1.4426950408889634)
            top = higher
            logit += strides_l[1]
        total = 1.0 / total
        tl.store(tops + row, top, mask=there)
        tl.store(inverses + row, total, mask=there)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        mask = there[:, None] & (channel < C)[None, :]
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        logit = first
        for k in range(n):
            near_y, near_x, inside = _near(y // FACTOR, x // FACTOR, offsets + 2 * k, h, w, REPLICATE)
            at = image * strides_v[0] + near_y * strides_v[1] + near_x * strides_v[2]
            near = tl.load(value + at[:, None] + channel[None, :], mask=mask & inside[:, None], other=0.0)
            acc += _weight(logit, top, total, there, SOFTMAX)[:, None] * near.to(tl.float32)
            logit += strides_l[1]
        tl.store(out + row[:, None] * C + channel[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def local_mix_bwd_kernel_logits(
    d_out, value, logits, tops, inverses, offsets, d_weights, d_logits, strides_o, strides_v, strides_l, strides_w,
    h, w, C, n,
    FACTOR: tl.constexpr, SOFTMAX: tl.constexpr, REPLICATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, row, y, x, there = _pixels(h, w, FACTOR, BLOCK_P)
    from_pixel = d_out + image * strides_o[0] + y * strides_o[1] + x * strides_o[2]
    first = logits + image * strides_l[0] + y * strides_l[2] + x * strides_l[3]
    top, inverse = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    if SOFTMAX:
        top = tl.load(tops + row, mask=there, other=0.0)
        inverse = tl.load(inverses + row, mask=there, other=0.0)
    delta = tl.zeros((BLOCK_P,), tl.float32)
    own = row + image * (n - 1) * strides_w[1]
    logit, place = first, d_weights + own
    for k in range(n):
        near_y, near_x, inside = _near(y // FACTOR, x // FACTOR, offsets + 2 * k, h, w, REPLICATE)
        at = image * strides_v[0] + near_y * strides_v[1] + near_x * strides_v[2]
        d_weight = tl.zeros((BLOCK_P,), tl.float32)
        for start in range(0, C, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            mask = (there & inside)[:, None] & (channel < C)[None, :]
            near = tl.load(value + at[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            d_result = tl.load(from_pixel[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            d_weight += tl.sum(near * d_result, 1)
        delta += d_weight * _weight(logit, top, inverse, there, SOFTMAX)
        tl.store(place, d_weight, mask=there)
        logit += strides_l[1]
        place += strides_w[1]
    if SOFTMAX:
        tl.debug_barrier()  # what the program wrote is read again, perhaps by other threads of it
        logit, place, target = first, d_weights + own, d_logits + own
        for _ in range(n):
            d_logit = tl.load(place, mask=there, other=0.0) - delta
            d_logit *= _weight(logit, top, inverse, there, SOFTMAX)
            tl.store(target, d_logit.to(d_logits.dtype.element_ty), mask=there)
            logit += strides_l[1]
            place += strides_w[1]
            target += strides_w[1]


@triton.jit
def local_mix_bwd_kernel_value(
    d_out, logits, tops, inverses, offsets, d_padded, strides_o, strides_l, h, w, C, n, room_r, room_c,
    FACTOR: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = tl.cdiv(C, BLOCK_C)
    cell = tl.program_id(0) // channels * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(0) % channels * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(1).to(tl.int64)
    width = w + 2 * room_c
    cells = (h + 2 * room_r) * width
    logits += image * strides_l[0]
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for k in range(n):
        from_y = cell // width - room_r - tl.load(offsets + 2 * k)
        from_x = cell % width - room_c - tl.load(offsets + 2 * k + 1)
        there = (cell < cells) & (from_y >= 0) & (from_y < h) & (from_x >= 0) & (from_x < w)
        mask = there[:, None] & (channel < C)[None, :]
        for inner in range(FACTOR * FACTOR):
            y = (from_y * FACTOR + inner // FACTOR).to(tl.int64)
            x = (from_x * FACTOR + inner % FACTOR).to(tl.int64)
            top, inverse = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
            if SOFTMAX:
                row = (image * h * FACTOR + y) * (w * FACTOR) + x
                top = tl.load(tops + row, mask=there, other=0.0)
                inverse = tl.load(inverses + row, mask=there, other=0.0)
            weight = _weight(logits + y * strides_l[2] + x * strides_l[3], top, inverse, there, SOFTMAX)
            at = image * strides_o[0] + y * strides_o[1] + x * strides_o[2]
            d_result = tl.load(d_out + at[:, None] + channel[None, :], mask=mask, other=0.0)
            acc += weight[:, None] * d_result.to(tl.float32)
        logits += strides_l[1]
    place = (image * cells + cell)[:, None] * C + channel[None, :]
    tl.store(d_padded + place, acc, mask=(cell < cells)[:, None] & (channel < C)[None, :])


@functools.lru_cache(maxsize=64)
def _on_device(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int32, device=device)


def _options(value: Tensor, factor: int, softmax: bool) -> dict[str, Any]:
    small = target(value) == "interpreter"  # several tiles of channels, and tails, in small samples
    channels = min(triton.next_power_of_2(value.shape[3]), 16 if small else _MAX_CHANNELS)
    pixels = min((16 * _TILE if small else _TILE) // channels, 256)
    return {
        "FACTOR": factor,
        "SOFTMAX": softmax,
        "BLOCK_P": pixels,
        "BLOCK_C": channels,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _halves(stats: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima and inverse sums; without softmax neither is looked at."""
    return (stats[0], stats[1]) if stats.numel() else (stats, stats)


def forward(
    value: Tensor, logits: Tensor, offsets: list[int], factor: int, softmax: bool, replicate: bool
) -> tuple[Tensor, Tensor]:
    no_float64(value, logits)
    B, n, height, width = logits.shape
    h, w, C = value.shape[1:]
    out = value.new_empty(B, height, width, C)
    stats = logits.new_empty((2, B, height, width) if softmax else (0,), dtype=torch.float32)
    if out.numel() == 0:
        return out, stats.zero_()
    value, options = strided_rows(value), _options(value, factor, softmax)
    steps = _on_device(tuple(offsets), value.device)
    local_mix_fwd_kernel[(triton.cdiv(height * width, options["BLOCK_P"]), B)](
        value, logits, steps, out, *_halves(stats), value.stride()[:3], logits.stride(), h, w, C, n,
        **options, REPLICATE=replicate,
    )  # fmt: skip
    return out, stats


def backward(
    d_out: Tensor,
    value: Tensor,
    logits: Tensor,
    stats: Tensor,
    offsets: list[int],
    factor: int,
    softmax: bool,
    replicate: bool,
) -> tuple[Tensor, Tensor]:
    no_float64(value, logits)
    (B, n, height, width), (h, w, C) = logits.shape, value.shape[1:]
    d_weights = logits.new_zeros(logits.shape, dtype=torch.float32)
    d_logits = torch.empty_like(d_weights, dtype=logits.dtype) if softmax else d_weights
    room_r, room_c = reach(offsets) if replicate else (0, 0)
    d_padded = value.new_zeros((B, h + 2 * room_r, w + 2 * room_c, C), dtype=torch.float32)
    if d_out.numel() > 0:
        value, d_out, options = strided_rows(value), strided_rows(d_out), _options(value, factor, softmax)
        steps, strides = _on_device(tuple(offsets), value.device), (d_out.stride()[:3], value.stride()[:3])
        local_mix_bwd_kernel_logits[(triton.cdiv(height * width, options["BLOCK_P"]), B)](
            d_out, value, logits, *_halves(stats), steps, d_weights, d_logits, *strides, logits.stride(),
            d_weights.stride(), h, w, C, n, **options, REPLICATE=replicate,
        )  # fmt: skip
        cells = triton.cdiv(d_padded.shape[1] * d_padded.shape[2], options["BLOCK_P"])
        local_mix_bwd_kernel_value[(cells * triton.cdiv(C, options["BLOCK_C"]), B)](
            d_out,
            logits,
            *_halves(stats),
            steps,
            d_padded,
            strides[0],
            logits.stride(),
            h,
            w,
            C,
            n,
            room_r,
            room_c,
            **options,
        )
    return folded(d_padded, room_r, room_c, replicate).to(value.dtype).contiguous(), d_logits.to(logits.dtype)
