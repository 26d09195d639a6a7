"""sparse_attention on CPUs, in one of two ways by how many query rows share a list and its keys.

Many rows: gather the listed keys and multiply matrices (`cpu_blocks`). Few: compute single products at listed keys
(`cpu_tokens`). Gathering a key costs as much as about 8 products with it that need no gathering.
"""

from types import ModuleType

import torch
from torch import Tensor

from shared_kernels.sparse_attention import cpu_blocks, cpu_tokens

_MANY_ROWS = 8


def _way(query: Tensor, key: Tensor, indices: Tensor, block_q: int) -> ModuleType:
    group = query.shape[1] // key.shape[1] if indices.shape[1] <= key.shape[1] else 1
    return cpu_blocks if group * block_q >= _MANY_ROWS else cpu_tokens


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    causal: bool,
    scale: float,
    block_q: int,
    block_k: int,
    *_turned_round: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if 0 in (query.numel(), key.numel(), indices.numel()):
        wide = torch.promote_types(query.dtype, torch.float32)
        return query.new_zeros((*query.shape[:3], value.shape[3])), query.new_full(
            query.shape[:3], -torch.inf, dtype=wide
        )
    run = _way(query, key, indices, block_q).forward
    return run(query, key, value, indices, counts, causal, scale, block_q, block_k)


def backward(
    d_out: Tensor,
    delta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    entries: Tensor,
    starts: Tensor,
    causal: bool,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if 0 in (query.numel(), key.numel(), indices.numel()):
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    run = _way(query, key, indices, block_q).backward
    lists = (indices, counts, entries, starts)
    return run(d_out, delta, query, key, value, lse, *lists, causal, scale, block_q, block_k)
