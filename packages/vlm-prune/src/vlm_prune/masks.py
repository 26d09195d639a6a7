"""Attention masks for fewer tokens: those of the host gathered for prefill, and our own for decoding.

A layer behind a stage holds fewer keys than the model's mask speaks of. For prefill the host's mask is gathered, which
keeps whatever the family put into it (bidirectional image blocks, windows). For decoding it is built anew from the
positions that the layer's keys had in the prompt, so a sliding window reaches as far back as it would without pruning.

Decided here: queries that are padding see themselves, so that no row is empty; eager attention gets an additive mask,
since it adds a boolean one as 0 and 1 without a word.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedConfig


def real_tokens(mask: Any, ids: Int[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
    """Which tokens of a prompt are no padding, whatever form its mask has: none, (B, S), (B, 1, S, k), or a dict.

    ValueError on a mask of another form.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise ValueError(f"attention_mask must be (B, S) or (B, 1, S, keys), got {type(mask).__name__}")
    if mask.ndim == 2:
        return mask.bool()
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    # a token that nobody sees is padding
    return seen[:, 0, :, : ids.shape[1]].any(1).expand(ids.shape)


def is_flash(config: PreTrainedConfig) -> bool:
    """Whether the attention takes a mask of keys (B, n) in place of (B, 1, n, n)."""
    return "flash" in str(config._attn_implementation)


def for_host(visible: Bool[Tensor, "B 1 q k"], config: PreTrainedConfig, dtype: torch.dtype) -> Tensor:
    """A mask of what is visible in the form that the host's attention takes."""
    if config._attn_implementation != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def gather_mask(mask: Tensor, index: Int[Tensor, "B n"], valid: Bool[Tensor, "B n"]) -> Tensor:
    """The host's prefill mask for the tokens at `index`: (B, k), or (B or 1, 1, N, K), K >= N for a static cache.

    Keys where `valid` is False are hidden. What a static cache holds in reserve stays hidden.
    """
    if mask.ndim == 2:
        return mask.expand(len(index), -1).gather(1, index) * valid.to(mask.dtype)
    heads, queries, keys = mask.shape[1:]
    mask = mask.expand(len(index), -1, -1, -1)
    mask = mask.gather(2, index[:, None, :, None].expand(-1, heads, -1, keys))
    mask = mask.gather(3, index[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
    hidden: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    seen: Any = True if mask.dtype == torch.bool else 0.0
    mask = mask.masked_fill(~valid[:, None, None, :], hidden)
    itself = torch.eye(mask.shape[2], dtype=torch.bool, device=mask.device) & ~valid[:, None, :, None]
    mask = mask.masked_fill(itself, seen)
    if keys == queries:
        return mask
    return torch.nn.functional.pad(mask, (0, keys - mask.shape[3]), value=hidden)


def causal_mask(valid: Bool[Tensor, "B n"], keys: int) -> Bool[Tensor, "B 1 n k"]:
    """Which keys a causal prefill sees where some tokens are padding; `keys` - n are a static cache's reserve."""
    n = valid.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=valid.device).tril()
    itself = torch.eye(n, dtype=torch.bool, device=valid.device)
    visible = (causal & valid[:, None, None, :]) | itself
    return torch.nn.functional.pad(visible, (0, keys - n), value=False)


def decode_mask(
    position: Int[Tensor, "B s"],
    valid: Bool[Tensor, "B s"],
    *,
    num_queries: int,
    num_keys: int,
    window: int | None,
) -> Bool[Tensor, "B 1 q k"]:
    """Which keys later queries see: slots in the order of the cache, with the positions their tokens had.

    The last `num_queries` slots are the queries. `num_keys` is what the layer's attention reads: fewer than the slots
    where a sliding cache let go of the oldest, more where a static one has a reserve.
    """
    queries = position[:, -num_queries:]
    if num_keys < position.shape[1]:
        position, valid = position[:, -num_keys:], valid[:, -num_keys:]
    distance = queries[:, :, None] - position[:, None, :]
    visible = (distance >= 0) & valid[:, None, :]
    if window is not None:
        visible = visible & (distance < window)
    reserve = max(0, num_keys - position.shape[1])
    return torch.nn.functional.pad(visible, (0, reserve), value=False)[:, None]
