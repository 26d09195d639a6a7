"""The definition of block_stats in plain torch; the oracle of its tests."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def block_stats(x: Tensor, *, block_size: int, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `shared_kernels.block_stats`."""
    B, _, N, _ = x.shape
    blocks = -(-N // block_size)
    missing = blocks * block_size - N
    length = torch.full((B,), N, device=x.device) if lengths is None else lengths
    valid = torch.arange(N + missing, device=x.device) < length.clamp(max=N)[:, None]
    valid = valid.unflatten(1, (blocks, block_size))[:, None, :, :, None]  # (B, 1, nb, block_size, 1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # float64 stays float64
    values = pad(wide, (0, 0, 0, missing)).unflatten(2, (blocks, block_size)).masked_fill(~valid, 0.0)
    count = valid.sum(3).clamp(min=1)
    mean = values.sum(3) / count
    deviation = (values - mean.unsqueeze(3)).masked_fill(~valid, 0.0).abs().sum(3) / count
    return mean, deviation
