"""Head masking: chosen heads give the mean of the values they see, whatever the query asks (appendix C).

A head whose attention weights are all equal retrieves nothing. Its output is a running mean of values, so masking
costs a cumulative sum, and no attention map is made. It is done in transformers' attention function, where the values
of the whole cache are at hand, so it holds with caches, padding, packing and sliding windows.

Decided here: the paper's weight 1/L over the whole sequence would show a causal model its future, so row t has 1/(t+1)
over the keys that it sees, within a sliding window over those; padding does not count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_attn.transformers.door import Handle, attention_layers, base_model, layer_config, open_door, register_attention
from llm_attn.transformers.saving import register_door
from llm_attn.transformers.visibility import Visibility, dense_attention

NAME = "influence"
Replacement = Literal["mean", "sum over length", "zero"]
Rows = Literal["all", "second half"]
Heads = Mapping[int, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class HeadMaskingConfig:
    """Which heads are masked, and with what."""

    heads: Heads
    """Query heads by layer, {3: (0, 7)}; an empty mapping masks none."""
    replacement: Replacement = "mean"
    """What a masked head gives: "mean" of the values seen; their "sum over length", the paper's 1/L read literally,
    with the values up to the row and the length of the sequence so far; or "zero"."""
    rows: Rows = "all"
    """Rows of the batch to mask; "second half" runs the intact and the masked model side by side on a doubled batch."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", sorted_heads(self.heads))
        for name, kinds in (("replacement", Replacement), ("rows", Rows)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}")


def sorted_heads(heads: Heads) -> dict[int, tuple[int, ...]]:
    """Heads by layer, both in order, without empty layers. ValueError on negative or repeated ones."""
    # JSON has layers as strings and heads as lists
    chosen = {int(layer): tuple(sorted(int(head) for head in of_layer)) for layer, of_layer in heads.items()}
    for layer, of_layer in chosen.items():
        if layer < 0 or len(set(of_layer)) < len(of_layer) or (of_layer and of_layer[0] < 0):
            raise ValueError(f"heads must name layers and heads from 0 on, each head once, got {layer}: {of_layer}")
    return {layer: chosen[layer] for layer in sorted(chosen) if chosen[layer]}


def visible_value_mean(
    value: Float[Tensor, "B H Nk E"], visible: Visibility, num_queries: int, *, over_length: bool = False
) -> Float[Tensor, "B H Nq E"]:
    """For the last `num_queries` rows, the mean of the values that each sees; 0 where it sees none.

    over_length: the sum over the largest number of keys that any of the rows sees instead, for causal rows without
    packing the length of the sequence. Computed in float32 at least. ValueError for `over_length` of packed rows.
    """
    num_keys, wide = value.shape[2], torch.promote_types(value.dtype, torch.float32)
    if over_length and visible.mask is not None:
        raise ValueError('replacement="sum over length" knows the length of whole rows only, not of packed sequences')
    total = _seen_total(value.to(wide), visible, num_queries)
    counts = visible.counts(num_queries, num_keys, value.device).clamp(min=1)
    if over_length:
        counts = counts.amax(-1, keepdim=True)
    return (total / counts[:, None, :, None]).to(value.dtype)


def _seen_total(value: Tensor, visible: Visibility, num_queries: int) -> Tensor:
    if visible.mask is not None:
        return visible.mask.to(value.dtype) @ value
    if visible.key_mask is not None:
        value = value.masked_fill(~visible.key_mask[:, None, :, None], 0)
    num_keys = value.shape[2]
    running = value.cumsum(2)
    if visible.window is None and num_queries <= num_keys:
        return running[:, :, num_keys - num_queries :]
    running = nn.functional.pad(running, (0, 0, 1, 0))
    past_last = torch.arange(num_keys - num_queries + 1, num_keys + 1, device=value.device)
    total = running[:, :, past_last.clamp(min=0)]
    if visible.window is not None:
        total = total - running[:, :, (past_last - visible.window).clamp(min=0)]
    return total


def apply_head_masking(model: nn.Module, config: HeadMaskingConfig, *, layers: Sequence[int] | None = None) -> Handle:
    """Masks `config.heads` in a transformers model, of these only the ones in `layers` if given.

    The rest of the model is what it was, and with no heads all of it. ValueError on heads that the model does not have,
    and where another attention method is at work.
    """
    if not isinstance(config, HeadMaskingConfig):
        raise TypeError(f"config must be a HeadMaskingConfig, got {type(config).__name__}")
    num_layers = len(attention_layers(model))
    num_heads = base_model(model).config.get_text_config(decoder=True).num_attention_heads
    for layer, heads in config.heads.items():
        if layer >= num_layers or heads[-1] >= num_heads:
            given = f"layer {layer}, heads {list(heads)}"
            raise ValueError(f"the model has {num_layers} layers of {num_heads} heads, counted from 0, got {given}")
    chosen = tuple(config.heads) if layers is None else tuple(layer for layer in config.heads if layer in layers)
    return open_door(model, NAME, config, layers=chosen or layers)


def _attention(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    *,
    scale: float | None,
    dropout: float,
    softcap: float | None = None,
) -> Tensor:
    config = layer_config(layer, NAME, None)
    if config is None:
        raise ValueError(
            f"attn_implementation='{NAME}' alone does not say which heads are masked; build the model without it and "
            "call llm_attn.apply_head_masking(model, HeadMaskingConfig(heads=...))"
        )
    out = dense_attention(query, key, value, visible, scale=scale, dropout=dropout, softcap=softcap)
    heads = config.heads.get(layer.layer_idx, ())
    if not heads:
        return out
    first = query.shape[0] // 2 if config.rows == "second half" else 0
    masked = _masked_heads(config, heads, value[first:], _of_rows(visible, first), *query.shape[1:3])
    out = out.clone() if out.requires_grad else out
    out[first:, list(heads)] = masked if isinstance(masked, float) else masked.to(out.dtype)
    return out


def _masked_heads(
    config: HeadMaskingConfig, heads: Sequence[int], value: Tensor, visible: Visibility, num_heads: int, rows: int
) -> Tensor | float:
    if config.replacement == "zero":
        return 0.0
    group = num_heads // value.shape[1]
    shared = sorted({head // group for head in heads})  # several masked heads may read the same values
    means = visible_value_mean(value[:, shared], visible, rows, over_length=config.replacement == "sum over length")
    return means[:, [shared.index(head // group) for head in heads]]


def _of_rows(visible: Visibility, first: int) -> Visibility:
    def of(mask: Tensor | None) -> Tensor | None:
        return mask if mask is None or mask.shape[0] == 1 else mask[first:]

    return Visibility(visible.window, of(visible.key_mask), of(visible.mask))


register_attention(NAME, _attention, softcap=True)
register_door(NAME, HeadMaskingConfig, apply_head_masking)
