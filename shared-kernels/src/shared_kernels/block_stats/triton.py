"""block_stats on GPUs: one program per block and tile of dimensions; it reads its tokens twice, once from the cache."""

# mypy: disable-error-code=no-untyped-def
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._tiles import load_tile, no_float64, store_tile, strided_rows, target


@triton.jit
def _place(lengths, H, N, block_size, num_blocks, HAS_LENGTHS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Batch times heads, batch, head, first token of this program's block, end of its tokens, their number, columns."""
    program = tl.program_id(0)
    bh, start = program // num_blocks, (program % num_blocks) * block_size
    b, h = bh // H, bh % H
    end = N
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + b).to(tl.int32), N)
    end = tl.minimum(start + block_size, end)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    return bh.to(tl.int64), b.to(tl.int64), h.to(tl.int64), start, end, tl.maximum(end - start, 1), columns


@triton.jit
def block_stats_fwd_kernel(
    x, lengths, mean, deviation, H, N, D, block_size, num_blocks, stride_b, stride_h, stride_n,
    HAS_LENGTHS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    _, b, h, start, end, count, columns = _place(lengths, H, N, block_size, num_blocks, HAS_LENGTHS, BLOCK_D)
    base = x + b * stride_b + h * stride_h
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(start, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        total += tl.sum(load_tile(base, rows, columns, stride_n, end, D).to(tl.float32), 0)
    own = total / count
    apart = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(start, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        values = load_tile(base, rows, columns, stride_n, end, D).to(tl.float32)
        apart += tl.sum(tl.where((rows < end)[:, None], tl.abs(values - own[None, :]), 0.0), 0)
    at = tl.program_id(0).to(tl.int64) * D + columns
    tl.store(mean + at, own, mask=columns < D)
    tl.store(deviation + at, apart / count, mask=columns < D)


@triton.jit
def block_stats_bwd_kernel(
    d_mean, d_deviation, x, lengths, mean, d_x, H, N, D, block_size, num_blocks, stride_b, stride_h, stride_n,
    HAS_LENGTHS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    bh, b, h, start, end, count, columns = _place(lengths, H, N, block_size, num_blocks, HAS_LENGTHS, BLOCK_D)
    base = x + b * stride_b + h * stride_h
    at = tl.program_id(0).to(tl.int64) * D + columns
    own = tl.load(mean + at, mask=columns < D, other=0.0)
    share = tl.load(d_deviation + at, mask=columns < D, other=0.0) / count
    sides = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(start, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        apart = load_tile(base, rows, columns, stride_n, end, D).to(tl.float32) - own[None, :]
        side = tl.where(apart > 0.0, 1.0, tl.where(apart < 0.0, -1.0, 0.0))
        sides += tl.sum(tl.where((rows < end)[:, None], side, 0.0), 0)
    same = tl.load(d_mean + at, mask=columns < D, other=0.0) / count - share * sides / count
    own_end = tl.minimum(start + block_size, N)
    for first in range(start, own_end, BLOCK_N):  # tokens past the length get 0
        rows = first + tl.arange(0, BLOCK_N)
        apart = load_tile(base, rows, columns, stride_n, end, D).to(tl.float32) - own[None, :]
        side = tl.where(apart > 0.0, 1.0, tl.where(apart < 0.0, -1.0, 0.0))
        flow = tl.where((rows < end)[:, None], same[None, :] + side * share[None, :], 0.0)
        store_tile(d_x + bh * N * D, flow, rows, columns, D, own_end, D)


def tiles(x: Tensor) -> dict[str, int]:
    if target(x) == "interpreter":
        return {"BLOCK_N": 8, "BLOCK_D": 32}
    return {"BLOCK_N": 64, "BLOCK_D": 64 if x.shape[3] > 32 else 32}


def _launch(
    x: Tensor, lengths: Tensor | None, block_size: int
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """Grid, sizes and constants of both kernels."""
    no_float64(x)
    B, H, N, D = x.shape
    num_blocks, tile = triton.cdiv(N, block_size), tiles(x)
    grid = (B * H * num_blocks, triton.cdiv(D, tile["BLOCK_D"]))
    constants = {**tile, "HAS_LENGTHS": lengths is not None, "num_warps": 4, "enable_fp_fusion": True}
    return grid, (H, N, D, block_size, num_blocks, *x.stride()[:3]), constants


def forward(x: Tensor, lengths: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    B, H, N, D = x.shape
    mean, deviation = (
        torch.empty((B, H, triton.cdiv(N, block_size), D), dtype=torch.float32, device=x.device) for _ in range(2)
    )
    if x.numel() == 0:
        return mean, deviation
    x = strided_rows(x)
    grid, sizes, constants = _launch(x, lengths, block_size)
    block_stats_fwd_kernel[grid](x, lengths, mean, deviation, *sizes, **constants)
    return mean, deviation


def backward(
    d_mean: Tensor, d_deviation: Tensor, x: Tensor, lengths: Tensor | None, mean: Tensor, block_size: int
) -> Tensor:
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return d_x
    x = strided_rows(x)
    grid, sizes, constants = _launch(x, lengths, block_size)
    block_stats_bwd_kernel[grid](
        d_mean.contiguous(), d_deviation.contiguous(), x, lengths, mean, d_x, *sizes, **constants
    )
    return d_x
