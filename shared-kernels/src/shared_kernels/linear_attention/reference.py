"""The definition of linear_attention in plain torch: the quadratic form, every weight written out."""

from itertools import pairwise

import torch
from torch import Tensor


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    normalizer: str | None = None,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    block_mask: Tensor | None = None,
    block_size: tuple[int, int] = (64, 64),
) -> Tensor | tuple[Tensor, Tensor]:
    """See `shared_kernels.linear_attention`."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    weights = (causal, log_decay, scale, normalizer, eps, block_mask, block_size)
    out, state = attend(query, key, value, initial_state, cu_seqlens, *weights)
    return (out, state) if return_state else out


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    log_decay: Tensor | None,
    scale: float,
    normalizer: str | None,
    eps: float,
    block_mask: Tensor | None,
    block_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Output and final state; keys and values have as many heads as queries."""
    acc = torch.promote_types(query.dtype, torch.float32)  # float64 stays float64, or gradcheck would mean nothing
    q, k, v = (t.to(acc) for t in (query, key, value))
    log_decay = q.new_zeros(q.shape[1]) if log_decay is None else log_decay.to(acc)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, q.shape[1], q.shape[3], v.shape[3])
    state = q.new_zeros(shape) if initial_state is None else initial_state.to(acc)
    with torch.autocast(query.device.type, enabled=False):
        if causal:
            parts = [_causal(q, k, v, s, log_decay) for q, k, v, s in _sequences(q, k, v, state, cu_seqlens)]
        else:
            seen = None if block_mask is None else _tokens(block_mask, block_size, q.shape[2], k.shape[2])
            rest = (normalizer, eps, seen)
            parts = [_full(q, k, v, s, *rest) for q, k, v, s in _sequences(q, k, v, state, cu_seqlens)]
    out, state = torch.cat([out for out, _ in parts], 2), torch.cat([state for _, state in parts])
    past = q.new_zeros(q.shape[0], q.shape[1], q.shape[2] - out.shape[2], v.shape[3])
    return (scale * torch.cat([out, past], 2)).to(query.dtype), state


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    if cu_seqlens is None:
        return [(q, k, v, state)]
    ends = cu_seqlens.tolist()
    spans = [slice(*pair) for pair in pairwise(ends)]
    return [(q[:, :, s], k[:, :, s], v[:, :, s], state[i : i + 1]) for i, s in enumerate(spans)]


def _causal(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments (B, H, N, .), state (B, H, D, E); Qin et al., the operator and its recurrence."""
    time, rate = torch.arange(q.shape[2], dtype=q.dtype, device=q.device), log_decay[:, None]
    age = (time[:, None] - time).clamp(min=0)
    weights = (q @ k.mT) * torch.exp(rate[..., None] * age).tril()
    out = weights @ v + torch.exp(rate * (time + 1))[..., None] * (q @ state)
    left = torch.exp(rate * (q.shape[2] - 1 - time))[..., None]
    return out, (left * k).mT @ v + torch.exp(rate * q.shape[2])[..., None] * state


def _full(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, normalizer: str | None, eps: float, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    weights = q @ k.mT if seen is None else (q @ k.mT) * seen
    out, total = weights @ v + q @ state, weights.sum(-1, keepdim=True)
    if normalizer is not None:
        out = out / (total + eps if normalizer == "sum" else total.clamp(min=eps))
    return out, k.mT @ v + state


def _tokens(mask: Tensor, block_size: tuple[int, int], queries: int, keys: int) -> Tensor:
    """The mask of blocks as one of tokens."""
    return mask.repeat_interleave(block_size[0], 2)[:, :, :queries].repeat_interleave(block_size[1], 3)[..., :keys]


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """See `shared_kernels.linear_attention_step`."""
    given = query.shape
    query, key, value = (t.flatten(1, 2) if t.ndim == 4 else t for t in (query, key, value))
    return step(query, key, value, state, log_decay, scale).view(*given[:-1], value.shape[-1])


def step(query: Tensor, key: Tensor, value: Tensor, state: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
    """(B, H, width) each; the recurrence, one token of it."""
    q, k, v = (t.to(state.dtype).repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (query, key, value))
    if log_decay is not None:
        state.mul_(torch.exp(log_decay.to(state.dtype))[:, None, None])
    state.add_(k[..., None] * v[..., None, :])
    return (scale * (q[..., None] * state).sum(-2)).to(query.dtype)
