"""correlation on GPUs: products of features tile by tile, turned into weights in registers and summed with the values.

The depth of features is a loop, as in a matrix product, so any width fits. Values have few columns, which are taken one
by one. The backward pass walks the tiles twice, by rows and by columns, each program owning what it sums: nothing
depends on the order of programs. A program owns 64 or 128 columns of the gradient of its features; the products are
computed once for each such part.
"""

# mypy: disable-error-code=no-untyped-def
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._tiles import (
    LOG2E,
    dot_precision,
    load_tile,
    no_float64,
    softmax_end,
    softmax_step,
    store_tile,
    strided_rows,
    width,
)
from shared_kernels._tiles import target as target_of


@triton.jit
def _scores(
    x, y, rows, columns, row_scale, column_scale, bias, stride_x, stride_y, N, M, D,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 of a tile: scales and bias of the rows and columns are loaded already."""
    product = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for d in range(0, D, BLOCK_D):
        depth = tl.arange(0, BLOCK_D)
        left = load_tile(x + d, rows, depth, stride_x, N, D - d)
        right = load_tile(y + d, columns, depth, stride_y, M, D - d)
        product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
    scores = product * row_scale[:, None] * column_scale[None, :] + bias[None, :]
    return tl.where((columns < M)[None, :], scores, float("-inf"))


@triton.jit
def _flow(d_out, v, rows, columns, stride_vn, N, M, E: tl.constexpr):
    """d_out . values of a tile, in float32."""
    flow = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for e in tl.static_range(E):
        d_rows = tl.load(d_out + rows.to(tl.int64) * E + e, mask=rows < N, other=0.0).to(tl.float32)
        values = tl.load(v + columns.to(tl.int64) * stride_vn + e, mask=columns < M, other=0.0).to(tl.float32)
        flow += d_rows[:, None] * values[None, :]
    return flow


@triton.jit
def correlation_fwd_kernel(
    x, y, v, row_scale, column_scale, bias, out, lse, N, M, D,
    stride_xb, stride_xn, stride_yb, stride_yn, stride_vb, stride_vn,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    rows, wide = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    x, y, v = x + b * stride_xb, y + b * stride_yb, v + b * stride_vb
    of_rows = tl.load(row_scale + b * N + rows, mask=rows < N, other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(0, M, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        of_columns = tl.load(column_scale + b * M + columns, mask=columns < M, other=0.0)
        added = tl.load(bias + b * M + columns, mask=columns < M, other=0.0)
        scores = _scores(
            x, y, rows, columns, of_rows, of_columns, added, stride_xn, stride_yn, N, M, D, PRECISION, BLOCK_D
        )
        top, total, weights, shrink = softmax_step(scores, top, total)
        result *= shrink[:, None]
        for e in tl.static_range(E):
            values = tl.load(v + columns.to(tl.int64) * stride_vn + e, mask=columns < M, other=0.0).to(tl.float32)
            result += tl.where(wide == e, 1.0, 0.0)[None, :] * tl.sum(weights * values[None, :], 1)[:, None]
    inverse, end = softmax_end(top, total)
    store_tile(out + b * N * E, result * inverse[:, None], rows, wide, E, N, E)
    tl.store(lse + b * N + rows, end, mask=rows < N)


@triton.jit
def correlation_bwd_kernel_rows(
    d_out, x, y, v, row_scale, column_scale, bias, ends, share, d_x, partials, N, M, D, B,
    stride_xb, stride_xn, stride_yb, stride_yn, stride_vb, stride_vn,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    E: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """PART columns of the gradient of a tile of x, and their share in that of the scale of rows."""
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own, first = tl.arange(0, PART), part * PART
    x, y, v, d_out = x + b * stride_xb, y + b * stride_yb, v + b * stride_vb, d_out + b * N * E
    of_rows = tl.load(row_scale + b * N + rows, mask=rows < N, other=0.0)
    end = tl.load(ends + b * N + rows, mask=rows < N, other=float("inf"))
    of_row = tl.load(share + b * N + rows, mask=rows < N, other=0.0)
    gradient = tl.zeros((BLOCK_M, PART), tl.float32)
    for start in range(0, M, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        of_columns = tl.load(column_scale + b * M + columns, mask=columns < M, other=0.0)
        added = tl.load(bias + b * M + columns, mask=columns < M, other=0.0)
        scores = _scores(
            x, y, rows, columns, of_rows, of_columns, added, stride_xn, stride_yn, N, M, D, PRECISION, BLOCK_D
        )
        flow = _flow(d_out, v, rows, columns, stride_vn, N, M, E) - of_row[:, None]
        flow *= tl.exp2(scores - end[:, None]) * of_columns[None, :]
        right = load_tile(y + first, columns, own, stride_yn, M, D - first)
        gradient = tl.dot(flow.to(right.dtype), right, gradient, input_precision=PRECISION)
    left = load_tile(x + first, rows, own, stride_xn, N, D - first).to(tl.float32)
    tl.store(partials + (part * B + b) * N + rows, tl.sum(left * gradient, 1), mask=rows < N)
    scaled = gradient * (of_rows * 0.6931471805599453)[:, None]
    store_tile(d_x + b * N * D + first, scaled, rows, own, D, N, D - first)


@triton.jit
def correlation_bwd_kernel_columns(
    d_out, x, y, v, row_scale, column_scale, bias, ends, share, d_y, d_v, d_bias, partials, N, M, D, B,
    stride_xb, stride_xn, stride_yb, stride_yn, stride_vb, stride_vn,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The same of a tile of y, with the gradients of its values and bias by the programs of the first part."""
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns, wide = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    own, first = tl.arange(0, PART), part * PART
    x, y, v, d_out = x + b * stride_xb, y + b * stride_yb, v + b * stride_vb, d_out + b * N * E
    of_columns = tl.load(column_scale + b * M + columns, mask=columns < M, other=0.0)
    added = tl.load(bias + b * M + columns, mask=columns < M, other=0.0)
    gradient = tl.zeros((BLOCK_N, PART), tl.float32)
    of_values = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    of_bias = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        of_rows = tl.load(row_scale + b * N + rows, mask=rows < N, other=0.0)
        end = tl.load(ends + b * N + rows, mask=rows < N, other=float("inf"))
        of_row = tl.load(share + b * N + rows, mask=rows < N, other=0.0)
        scores = _scores(
            x, y, rows, columns, of_rows, of_columns, added, stride_xn, stride_yn, N, M, D, PRECISION, BLOCK_D
        )
        weights = tl.exp2(scores - end[:, None])
        flow = weights * (_flow(d_out, v, rows, columns, stride_vn, N, M, E) - of_row[:, None])
        for e in tl.static_range(E):
            d_rows = tl.load(d_out + rows.to(tl.int64) * E + e, mask=rows < N, other=0.0).to(tl.float32)
            of_values += tl.where(wide == e, 1.0, 0.0)[None, :] * tl.sum(weights * d_rows[:, None], 0)[:, None]
        of_bias += tl.sum(flow, 0)
        left = load_tile(x + first, rows, own, stride_xn, N, D - first)
        flow = tl.trans(flow * (of_rows * 0.6931471805599453)[:, None]).to(left.dtype)
        gradient = tl.dot(flow, left, gradient, input_precision=PRECISION)
    right = load_tile(y + first, columns, own, stride_yn, M, D - first).to(tl.float32)
    tl.store(partials + (part * B + b) * M + columns, tl.sum(right * gradient, 1), mask=columns < M)
    store_tile(d_y + b * M * D + first, gradient * of_columns[:, None], columns, own, D, M, D - first)
    if part == 0:
        store_tile(d_v + b * M * E, of_values, columns, wide, E, M, E)
        tl.store(d_bias + b * M + columns, of_bias, mask=columns < M)


def _options(source: Tensor, E: int) -> dict[str, Any]:
    no_float64(source)
    rows, columns, _ = _tile(source, E)
    sizes = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_D": min(32, width(source.shape[2]))}
    values = {"E": E, "PRECISION": dot_precision(source)}
    warps = 4 if target_of(source) == "gfx942" else 8  # of 64 threads there
    return {**sizes, **values, "num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}


def _tile(source: Tensor, E: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and columns of a gradient that one program owns: as large as registers allow."""
    target = target_of(source)
    if target == "interpreter":
        return 32, 32, 32  # small samples shall have several
    if source.element_size() == 2 and E <= 4:
        return 64, 64, 128
    small = target == "gfx942" or (E > 4 and target in ("sm_89", "sm_120"))
    return (32, 32, 64) if small else (32, 64, 64)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:2]]


def forward(
    source: Tensor, target: Tensor, values: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    (B, N, D), M, E = source.shape, target.shape[1], values.shape[-1]
    out, lse = values.new_zeros((B, N, E)), row_scale.new_full((B, N), -torch.inf)
    if M == 0 or out.numel() == 0:
        return out, lse
    source, target, values = strided_rows(source), strided_rows(target), strided_rows(values)
    options = _options(source, E)
    vectors = (t.contiguous() for t in (row_scale * LOG2E, column_scale, bias * LOG2E))
    correlation_fwd_kernel[(triton.cdiv(N, options["BLOCK_M"]), B)](
        source, target, values, *vectors, out, lse, N, M, D, *_strides(source, target, values),
        **options, BLOCK_E=triton.next_power_of_2(E),
    )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    source: Tensor,
    target: Tensor,
    values: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, N, D), M, E = source.shape, target.shape[1], values.shape[-1]
    d_source, d_target, d_values = (t.new_zeros(t.shape) for t in (source, target, values))
    d_bias = bias.new_zeros(bias.shape)
    if M == 0 or out.numel() == 0:
        return d_source, d_target, d_values, row_scale.new_zeros((B, N)), bias.new_zeros((B, M)), d_bias
    source, target, values, d_out = (strided_rows(t) for t in (source, target, values, d_out))
    share = (d_out.float() * out.float()).sum(-1) - d_lse
    # rows without targets have no weights: their log-sum-exp becomes +inf
    ends = (lse * LOG2E).masked_fill(lse == -torch.inf, torch.inf)
    part = min(_tile(source, E)[2], width(D))
    parts, options = triton.cdiv(D, part), _options(source, E)
    shared = (
        d_out.contiguous(), source, target, values, (row_scale * LOG2E).contiguous(), column_scale.contiguous(),
        (bias * LOG2E).contiguous(), ends.contiguous(), share.contiguous(),
    )  # fmt: skip
    sizes = (N, M, D, B, *_strides(source, target, values))
    d_rows, d_columns = row_scale.new_empty((parts, B, N)), row_scale.new_empty((parts, B, M))
    correlation_bwd_kernel_rows[(triton.cdiv(N, options["BLOCK_M"]), parts, B)](
        *shared, d_source, d_rows, *sizes, **options, PART=part
    )
    correlation_bwd_kernel_columns[(triton.cdiv(M, options["BLOCK_N"]), parts, B)](
        *shared, d_target, d_values, d_bias, d_columns, *sizes, **options, PART=part, BLOCK_E=triton.next_power_of_2(E)
    )
    return d_source, d_target, d_values, d_rows.sum(0), d_columns.sum(0), d_bias
