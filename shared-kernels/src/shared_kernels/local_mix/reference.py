"""The definition of local_mix in plain torch; the oracle of its tests."""

import torch
from torch import Tensor


def local_mix(
    value: Tensor,
    logits: Tensor,
    offsets: list[tuple[int, int]] | int,
    *,
    factor: int = 1,
    softmax: bool = True,
    border: str = "replicate",
) -> Tensor:
    """See `shared_kernels.local_mix`."""
    acc = torch.promote_types(value.dtype, torch.float32)  # float64 stays float64, or gradcheck would mean nothing
    if isinstance(offsets, int):
        reach = range(-(offsets // 2), offsets // 2 + 1)
        offsets = [(dy, dx) for dy in reach for dx in reach]
    weights = logits.to(acc).softmax(1) if softmax else logits.to(acc)
    h, w = value.shape[2:]
    out = torch.zeros(*value.shape[:2], *logits.shape[2:], dtype=acc, device=value.device)
    for k, (dy, dx) in enumerate(offsets):
        near = _shifted(_shifted(value.to(acc), dy, h, 2, border), dx, w, 3, border)
        out = out + weights[:, k : k + 1] * near.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    memory = torch.channels_last if value.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return out.to(value.dtype).contiguous(memory_format=memory)


def _shifted(cells: Tensor, by: int, size: int, dim: int, border: str) -> Tensor:
    """Every cell's neighbour `by` further along one side of the map."""
    at = torch.arange(size, device=cells.device) + by
    near = cells.index_select(dim, at.clamp(0, max(size - 1, 0)))
    if border == "replicate":
        return near
    inside = ((at >= 0) & (at < size)).view(-1, *[1] * (3 - dim))
    return near.masked_fill(~inside, 0.0)
