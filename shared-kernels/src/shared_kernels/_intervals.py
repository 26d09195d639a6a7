"""What kernels read of `_visible.key_bounds`: the interval of keys of each row, and the rows that concern some keys."""

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl

_SCANNED = tl.constexpr(1024)
"""Intervals that a program reads at once to find the rows that concern it."""


@triton.jit
def plane(base, strides, head, H):
    """The matrix of one head of all batches' heads."""
    head = head.to(tl.int64)
    return base + head // H * strides[0] + head % H * strides[1]


@triton.jit
def intervals(bounds, stride, batch, rows, inside, Nk):
    """First key and one past the last that each row sees; none for rows that are not there."""
    if bounds is None:
        first, last = tl.where(inside, 0, Nk), tl.where(inside, Nk, 0)
    else:
        pair = bounds + batch * stride + rows.to(tl.int64) * 2
        first, last = tl.load(pair, mask=inside, other=2147483647), tl.load(pair + 1, mask=inside, other=0)
    return first, last


@triton.jit
def rows_that_see(bounds, stride, batch, start, end, R):
    """The range of rows outside of which none sees keys start to end."""
    if bounds is None:
        low, high = 0, R
    else:
        low, high = R, 0
        for block in range(0, R, _SCANNED):
            rows = block + tl.arange(0, _SCANNED)
            first, last = intervals(bounds, stride, batch, rows, rows < R, 0)
            sees = (first < end) & (last > start)
            low = tl.minimum(low, tl.min(tl.where(sees, rows, R), 0))
            high = tl.maximum(high, tl.max(tl.where(sees, rows + 1, 0), 0))
    return low, high


@triton.jit
def keys_there(key_mask, batch, keys, Nk):
    """Which of these keys are tokens: inside the sequence, and not masked."""
    there = (keys >= 0) & (keys < Nk)
    if key_mask is not None:
        there &= tl.load(key_mask + batch * Nk + keys, mask=there, other=0) != 0
    return there
