"""local_correlation on CPUs: products at listed positions of a padded map, which torch computes for sparse matrices.

Channels become the last dimension, so that a product reads two runs of memory. The target is padded with zeros, so that
every window has the same list, only shifted. The gradient of either map is a weighted sum over windows of the other;
that of the target reads the incoming gradient at the mirrored offset of each neighbour.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_kernels._rows import flat_columns, scores_at, weighted_rows


def _padded(maps: Tensor, radius: int) -> Tensor:
    """(B, C, H, W) as (B, (H + 2 r) (W + 2 r), C) in float32 at least, zeros around."""
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.pad(wide, (radius,) * 4).flatten(2).mT.contiguous()  # turning first would be four times slower


def _windows(shape: torch.Size, radius: int) -> Tensor:
    """Which positions of all padded maps, end to end, each pixel's window has: (B * H * W * n)."""
    B, _, H, W = shape
    side, row = 2 * radius + 1, W + 2 * radius
    dtype = torch.int32 if B * (H + 2 * radius) * row * 2 < 2**31 else torch.int64
    y, x, k = (torch.arange(n, dtype=dtype) for n in (H, W, side))
    corner = (y[:, None] * row + x).view(1, H * W, 1)
    return flat_columns(
        (corner + (k[:, None] * row + k).view(1, 1, side * side)).expand(B, -1, -1), (H + 2 * radius) * row
    )


def forward(source: Tensor, target: Tensor, radius: int, scale: float) -> Tensor:
    B, _, H, W = source.shape
    out = torch.empty((B, (2 * radius + 1) ** 2, H, W), dtype=source.dtype)
    if out.numel() == 0:
        return out
    pixels = _padded(source, 0) * scale
    scores = scores_at(pixels, _padded(target, radius), _windows(source.shape, radius))
    return out.copy_(scores.mT.view(out.shape))


def backward(d_out: Tensor, source: Tensor, target: Tensor, radius: int, scale: float) -> tuple[Tensor, Tensor]:
    d_source, d_target = (torch.empty(t.shape, dtype=t.dtype) for t in (source, target))
    if source.numel() == 0:
        return d_source, d_target
    windows = _windows(source.shape, radius)
    for gradient, other, weights in (
        (d_source, target, d_out.flatten(2)),
        (d_target, source, _mirrored(d_out, radius)),
    ):
        wide = weights.mT.to(torch.promote_types(d_out.dtype, torch.float32)).mul(scale)
        rows = weighted_rows(windows, _padded(other, radius), wide.contiguous())
        gradient.copy_(rows.mT.view(gradient.shape))
    return d_source, d_target


def _mirrored(d_out: Tensor, radius: int) -> Tensor:
    """(B, n, H * W): at pixel q and offset k what flows from q + k back to it, the gradient at q + k of offset -k."""
    B, n, H, W = d_out.shape
    side = 2 * radius + 1
    padded = F.pad(d_out.flip(1), (radius, radius, radius, radius))
    shifted = d_out.new_empty((B, n, H, W))
    for k in range(n):
        y, x = divmod(k, side)
        shifted[:, k] = padded[:, k, y : y + H, x : x + W]
    return shifted.flatten(2)
