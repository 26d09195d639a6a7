"""The definition of local_correlation in plain torch; the oracle of its tests."""

import torch
from torch import Tensor
from torch.nn.functional import unfold


def local_correlation(source: Tensor, target: Tensor, *, radius: int, scale: float | None = None) -> Tensor:
    """See `shared_kernels.local_correlation`."""
    (B, C, H, W), side = source.shape, 2 * radius + 1
    acc = torch.promote_types(source.dtype, torch.float32)
    if source.numel() == 0:
        return (source.sum(1, keepdim=True) + target.sum(1, keepdim=True)).expand(B, side * side, H, W)
    windows = unfold(target.to(acc), side, padding=radius).view(B, C, side * side, H, W)
    scale = C**-0.5 if scale is None else scale
    return (scale * (source.to(acc)[:, :, None] * windows).sum(1)).to(source.dtype)
