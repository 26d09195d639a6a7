"""Tile loads and softmax steps that the kernels of several ops share, and what their host code asks of the target.

Everything inside kernels is float32, widened right after the load: Triton's interpreter keeps bfloat16 as bit patterns.
Softmax is to base 2: the scale is multiplied by log2(e) on the host, which spares a multiplication for each score.
"""

# mypy: disable-error-code=no-untyped-def
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

_NEAREST = {80: "sm_80", 86: "sm_89", 87: "sm_80", 89: "sm_89", 90: "sm_90", 100: "sm_100", 103: "sm_100"}
_NEWER = "sm_120"  # has the least shared memory of those that share their instructions


class Tile(NamedTuple):
    """How a kernel of the attention kind cuts its work."""

    rows: int
    """Query rows of a tile."""
    keys: int
    warps: int
    stages: int
    """Depth of the pipeline of the loop over tiles."""


TileTable = dict[str, dict[str, dict[int, Tile]]]
"""Target -> kernel -> columns of 16-bit numbers that a row has at most (half as many of 32 bits) -> tile."""


@triton.jit
def load_tile(base, rows, columns, stride_row, num_rows, num_columns):
    """rows x columns of a matrix whose columns are neighbours in memory; zeros outside. 64-bit offsets."""
    inside = (rows >= 0)[:, None] & (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride_row + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_rows(base, offsets, inside, columns, NUM_COLUMNS: tl.constexpr):
    """A tile whose rows lie anywhere: 64-bit offsets (M,) of their beginnings, zeros where not `inside` (M,).

    A number of columns known to the compiler spares the mask, and registers, where it fills the tile.
    """
    mask = inside[:, None]
    if columns.shape[0] != NUM_COLUMNS:
        mask &= (columns < NUM_COLUMNS)[None, :]
    return tl.load(base + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, values, offsets, inside, columns, NUM_COLUMNS: tl.constexpr):
    """The tile of `load_rows` written back, in the dtype of the target."""
    mask = inside[:, None]
    if columns.shape[0] != NUM_COLUMNS:
        mask &= (columns < NUM_COLUMNS)[None, :]
    tl.store(base + offsets[:, None] + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(base, values, rows, columns, stride_row, num_rows, num_columns):
    """The tile of `load_tile` written back, in the dtype of the target."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    tl.store(base + offsets, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def softmax_step(scores, top, total):
    """One step of the online softmax over rows: scores (M, N) to base 2, -inf where there is no key.

    Returns the new running maximum and sum, the step's weights, and the factor that shrinks what was summed so far.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(top - safe)
    return new_top, total * shrink + tl.sum(weights, 1), weights, shrink


@triton.jit
def softmax_end(top, total):
    """1 / sum and natural log-sum-exp of every row; 0 and -inf where there was no key."""
    empty = total == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    return inverse, lse


def width(columns: int) -> int:
    """The power of two that covers so many columns in `tl.dot`, which needs 16 of them."""
    return max(16, triton.next_power_of_2(columns))


def target(tensor: Tensor) -> str:
    """The entry of a tile table that serves this tensor: a key of `triton_compiler.TARGETS`, or "interpreter".

    Raises RuntimeError on NVIDIA GPUs before compute capability 8.0.
    """
    if tensor.device.type == "cpu":
        return "interpreter"
    gpu = driver.active.get_current_target()
    if gpu.backend == "hip":
        return "gfx942"
    capability = int(gpu.arch)
    if capability < 80:
        raise RuntimeError(
            f"the kernels need a GPU of compute capability 8.0 or later, got {capability // 10}.{capability % 10}; "
            'shared_kernels.backend("reference") runs anywhere'
        )
    return _NEAREST.get(capability, _NEWER)


def table_tile(table: TileTable, kernel: str, tensor: Tensor, columns: int) -> Tile:
    """The tile of a kernel for rows of so many columns in the tensor's dtype; beyond the table, its widest row.

    float32 may have rows of its own, under "<kernel>, float32": its products take more registers.
    """
    kernels = table[target(tensor)]
    rows = kernels[kernel]
    if tensor.dtype == torch.float32:
        rows = kernels.get(f"{kernel}, float32", rows)
    wanted = columns * tensor.element_size() // 2
    return rows[min((limit for limit in rows if limit >= wanted), default=max(rows))]


def no_float64(*tensors: Tensor) -> None:
    """Raise TypeError on float64: sums inside kernels are float32, which would be less than was asked for."""
    if any(t.dtype == torch.float64 for t in tensors):
        raise TypeError(
            "the Triton kernels take float16, bfloat16 and float32, got torch.float64; on a CPU, or under "
            'shared_kernels.backend("reference"), float64 works'
        )


def dot_precision(tensor: Tensor) -> str:
    """`input_precision` of `tl.dot`: float32 stays float32 to the last bits unless torch was told that less will do."""
    if tensor.dtype != torch.float32 or tensor.device.type == "cpu":
        return "ieee"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee" if driver.active.get_current_target().backend == "hip" else "tf32x3"


def strided_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, as kernels need it, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
