"""block_stats on CPUs: chunks of blocks, so that the second look at a block, for the deviation, is into the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 262_144  # numbers; a MiB in float32

Place = tuple[int, slice, slice, slice, int]
"""Batch element, heads, tokens, their blocks, and tokens per block: a piece of x whose blocks are all alike."""


def _places(x: Tensor, lengths: Tensor | None, block_size: int) -> Iterator[Place]:
    B, H, N, D = x.shape
    ends = [N] * B if lengths is None else lengths.clamp(0, N).tolist()
    for b, end in enumerate(ends):
        blocks_at_once = max(1, _CHUNK // (block_size * D))
        heads_at_once = max(1, _CHUNK // (max(1, min(end, blocks_at_once * block_size)) * D))
        for head in range(0, H, heads_at_once):
            heads = slice(head, head + heads_at_once)
            whole = end // block_size
            for first in range(0, whole, blocks_at_once):
                last = min(first + blocks_at_once, whole)
                yield b, heads, slice(first * block_size, last * block_size), slice(first, last), block_size
            if tail := end % block_size:
                yield b, heads, slice(end - tail, end), slice(whole, whole + 1), tail


def _blocks(x: Tensor, place: Place) -> Tensor:
    """The piece as (heads, blocks, tokens per block, D), in float32 at least."""
    b, heads, tokens, _, per_block = place
    wide = torch.promote_types(x.dtype, torch.float32)
    return x[b, heads, tokens].unflatten(1, (-1, per_block)).to(wide)


def forward(x: Tensor, lengths: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    B, H, N, D = x.shape
    shape, wide = (B, H, -(-N // block_size), D), torch.promote_types(x.dtype, torch.float32)
    mean, deviation = torch.zeros(shape, dtype=wide), torch.zeros(shape, dtype=wide)
    if x.numel() == 0:
        return mean, deviation
    for place in _places(x, lengths, block_size):
        b, heads, _, blocks, _ = place
        values = _blocks(x, place)
        own = torch.mean(values, 2, out=mean[b, heads, blocks])
        torch.mean((values - own.unsqueeze(2)).abs_(), 2, out=deviation[b, heads, blocks])
    return mean, deviation


def backward(
    d_mean: Tensor, d_deviation: Tensor, x: Tensor, lengths: Tensor | None, mean: Tensor, block_size: int
) -> Tensor:
    d_x = torch.zeros(x.shape, dtype=x.dtype)
    if x.numel() == 0:
        return d_x
    for place in _places(x, lengths, block_size):
        b, heads, tokens, blocks, per_block = place
        side = (_blocks(x, place) - mean[b, heads, blocks].unsqueeze(2)).sign_()
        share = d_deviation[b, heads, blocks] / per_block
        same = d_mean[b, heads, blocks] / per_block - share * side.mean(2)  # the mean moves with every token
        flow = torch.addcmul(same.unsqueeze(2), side, share.unsqueeze(2))
        d_x[b, heads, tokens].unflatten(1, (-1, per_block)).copy_(flow)
    return d_x
