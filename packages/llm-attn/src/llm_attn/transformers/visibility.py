"""What each query may see, as transformers tells an attention function, in the few words that kernels understand.

transformers hands an attention function a mask of queries x keys, or None whose meaning depends on the case. At 32k
tokens such a mask is a gigabyte and says "causal, less the padding". The mask function here says just that instead: a
boolean mask of the keys, or None where there is no padding, always counted from the end: query i of Nq sees keys up to
i + Nk - Nq, as the ops of shared_kernels have it. What these words cannot say (packed rows, chunked attention, a mask
that the caller made) still arrives as a mask of queries x keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.masking_utils import sdpa_mask


@dataclass(frozen=True)
class Visibility:
    """What a query row may see of the keys; query i of Nq sees keys up to i + Nk - Nq, and of these:

    window: only so many, its own included; None for all.
    key_mask: (B, Nk), only keys that are True; None for all.
    mask: (B or 1, 1, Nq, Nk), given only where the words above cannot say it, and then it says everything.
    """

    window: int | None = None
    key_mask: Bool[Tensor, "B Nk"] | None = None
    mask: Bool[Tensor, "#B 1 Nq Nk"] | None = None

    @property
    def plain(self) -> bool:
        """Whether every query sees every key up to its own place."""
        return self.window is None and self.key_mask is None and self.mask is None

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Bool[Tensor, "#B 1 Nq Nk"]:
        """All of it as one mask: memory grows with queries x keys."""
        if self.mask is not None:
            return self.mask
        last = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        keys = torch.arange(num_keys, device=device)
        seen = keys <= last
        if self.window is not None:
            seen &= keys > last - self.window
        if self.key_mask is None:
            return seen[None, None]
        return seen & self.key_mask[:, None, None]

    def counts(self, num_queries: int, num_keys: int, device: torch.device) -> Int[Tensor, "#B Nq"]:
        """How many keys each query sees, int64."""
        if self.mask is not None:
            return self.mask[:, 0].sum(-1)
        past_last = torch.arange(num_keys - num_queries + 1, num_keys + 1, device=device)
        first = torch.zeros_like(past_last) if self.window is None else past_last - self.window
        first, past_last = first.clamp(min=0), past_last.clamp(min=0)
        if self.key_mask is None:
            return (past_last - first)[None]
        before = torch.nn.functional.pad(self.key_mask.cumsum(-1), (1, 0))
        return before[:, past_last] - before[:, first]


def key_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Bool[Tensor, "B seen"] | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **rest: Any,
) -> Tensor | None:
    """The mask function that transformers calls once a forward pass, registered beside each attention function.

    Returns None (no padding), a mask of the keys (B, slots written so far) that is False on padding, or, where the keys
    alone cannot say it, the mask of queries x keys (B, 1, Nq, Nk) that SDPA would be given.
    """
    chunked = local_size is not None and getattr(config, "attention_chunk_size", None) is not None
    whole = not (allow_is_causal_skip or q_length == 1) or use_vmap or chunked
    moving = isinstance(q_offset, Tensor) and (q_length == 1 or torch.compiler.is_compiling())
    if whole or moving:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
            config=config,
            **rest,
        )
    written = int(q_offset) + q_length - kv_offset
    if attention_mask is None:
        # a static cache has slots beyond the last token: a mask as wide as what is written crops them
        return None if written == kv_length else torch.ones(batch_size, written, dtype=torch.bool, device=device)
    padding = attention_mask[:, kv_offset : kv_offset + written].to(torch.bool)
    if written == kv_length and not torch.compiler.is_compiling() and bool(padding.all()):
        return None
    return padding


def read_mask(
    attention_mask: Tensor | None,
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv slots D"],
    value: Float[Tensor, "B Hkv slots E"],
    window: int | None,
) -> tuple[Float[Tensor, "B Hkv Nk D"], Float[Tensor, "B Hkv Nk E"], Visibility]:
    """Keys and values without the slots that no token was written to yet, and what the queries may see of them."""
    if attention_mask is None:
        return key, value, Visibility(_effective(window, key))
    if attention_mask.ndim == 2:
        written = attention_mask.shape[1]
        key, value = key[:, :, :written], value[:, :, :written]
        return key, value, Visibility(_effective(window, key), attention_mask.to(torch.bool))
    if attention_mask.ndim != 4 or attention_mask.shape[1] != 1:
        raise ValueError(
            "attention_mask must be (batch, tokens), or (batch, 1, queries, keys) alike for all heads, got "
            f"{tuple(attention_mask.shape)}"
        )
    mask = attention_mask[..., : key.shape[2]]
    if mask.dtype != torch.bool:
        mask = mask == 0  # additive: 0 where seen, the smallest number where not
    if query.shape[2] == 1:
        return key, value, Visibility(key_mask=mask[:, 0, 0].expand(query.shape[0], -1))
    return key, value, Visibility(mask=mask)


def _effective(window: int | None, key: Tensor) -> int | None:
    return None if window is None or window >= key.shape[2] else window


def dense_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    visible: Visibility,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Float[Tensor, "B H Nq E"]:
    """Softmax attention as hosts run it: SDPA, or eagerly where scores are capped. Rows without keys give 0."""
    (_, H, Nq, D), (Hkv, Nk) = query.shape, key.shape[1:3]
    if softcap is not None:
        return _capped_attention(query, key, value, visible, D**-0.5 if scale is None else scale, dropout, softcap)
    attend = torch.nn.functional.scaled_dot_product_attention
    if visible.plain and Nq in (1, Nk):
        causal = Nq > 1
        return attend(query, key, value, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=Hkv < H)
    mask = visible.dense(Nq, Nk, query.device)
    out = attend(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=Hkv < H)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0)


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Visibility, scale: float, dropout: float, softcap: float
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = visible.dense(query.shape[2], key.shape[2], query.device)
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32))
    scores = softcap * torch.tanh(scores * (scale / softcap))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)
    return torch.nn.functional.dropout(weights.to(value.dtype), dropout) @ value
