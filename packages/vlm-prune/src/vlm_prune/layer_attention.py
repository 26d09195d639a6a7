"""Attention of single layers, without the maps of any: queries and keys are caught where the host hands them over.

A probe wraps the attention function of chosen attention modules, through transformers' AttentionInterface: the module's
own config (a copy) names the probe, the model's config, which makes the masks, keeps its name. So masks stay those of
the host's implementation and flash attention stays flash attention. What is caught are references to queries and keys
(rotary positions and q/k norms applied, heads of keys not repeated); criteria compute the few rows they want from them.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

from shared_kernels import attention_received

PROBE = "vlm_prune_probe"
_CHUNK = 1 << 26
"""Attention values that are held at once."""


@dataclass(frozen=True)
class Caught:
    """One call of an attention function: query (B, H, n, D), key (B, Hkv, n, D), the host's mask, scale, softcap."""

    query: Float[Tensor, "B H n D"]
    key: Float[Tensor, "B Hkv n D"]
    mask: Tensor | None
    scale: float
    softcap: float | None = None


class _Stop(Exception):
    """Raised once queries and keys are caught and the rest of the layer is not wanted."""


def _probe(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    host, observe = module.vlm_prune_probe
    scale = kwargs.get("scaling")
    caught = Caught(
        query, key, attention_mask, query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("softcap")
    )
    observe(caught, kwargs)
    return host(module, query, key, value, attention_mask, **kwargs)


def attach_probe(module: Any, observe: Callable[[Caught, dict[str, Any]], None]) -> Callable[[], None]:
    """Has `observe` called with what the attention module hands to its attention function; returns the way back.

    TypeError on a module that does not choose its attention through transformers' AttentionInterface.
    """
    modeling = sys.modules[type(module).__module__]
    config = getattr(module, "config", None)
    if config is None or not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        raise TypeError(
            f"{type(module).__name__} does not choose its attention through transformers' AttentionInterface, so its "
            "queries cannot be read; use a criterion without attention (divprune, uniform)"
        )
    AttentionInterface.register(PROBE, _probe)
    before = getattr(module, "vlm_prune_probe", None)
    if before is None:
        host = AttentionInterface().get_interface(config._attn_implementation, modeling.eager_attention_forward)
    else:
        host = before[0]
    module.vlm_prune_probe = (host, observe)
    module.config = copy.copy(config)
    module.config._attn_implementation_internal = PROBE

    def undo() -> None:
        module.config = config
        if before is None:
            del module.vlm_prune_probe
        else:
            module.vlm_prune_probe = before

    return undo


@contextmanager
def _watched(module: Any, observe: Callable[[Caught, dict[str, Any]], None]) -> Iterator[None]:
    undo = attach_probe(module, observe)
    try:
        yield
    finally:
        undo()


def look_ahead(layer: Any, hidden: Float[Tensor, "B n C"], positions: Any, mask: Tensor | None) -> Caught:
    """Queries and keys that the decoder layer will have for `hidden`, its cache untouched, nothing else computed."""
    found: list[Caught] = []

    def observe(caught: Caught, _: dict[str, Any]) -> None:
        found.append(caught)
        raise _Stop

    with _watched(layer.self_attn, observe), suppress(_Stop):
        layer.self_attn(layer.input_layernorm(hidden), attention_mask=mask, position_embeddings=positions)
    return Caught(found[0].query, found[0].key, mask, found[0].scale, found[0].softcap)


@dataclass(frozen=True)
class LayerAttention:
    """Attention of a language layer at prefill, row by row.

    caught: queries, keys and mask. valid: (B, n), False on padding. plain: whether the layer is causal and nothing
    more, so that the mask need not be read. Values are float32 (float64 stays), softmax over all keys.
    """

    caught: Caught
    valid: Bool[Tensor, "B n"]
    plain: bool

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.caught.query.shape[1]

    def rows(self, index: Int[Tensor, "B r"], heads: slice | None = None) -> Float[Tensor, "B h r n"]:
        """Attention of the query rows at `index` (of the heads in `heads`, all if None) to all n tokens."""
        query, key = self._operands(index, heads)
        scores = query @ key.transpose(-1, -2) * self.caught.scale
        if self.caught.softcap is not None:
            scores = self.caught.softcap * torch.tanh(scores / self.caught.softcap)
        mask = self.caught.mask
        if mask is None or mask.ndim == 2:
            places = torch.arange(self.valid.shape[1], device=index.device)
            visible = (places <= index[..., None]) & self.valid[:, None, :]
            visible = (visible | (places == index[..., None]))[:, None]
            return scores.masked_fill(~visible, -torch.inf).softmax(-1)
        mask = mask[..., : self.valid.shape[1]].expand(len(index), -1, -1, -1)
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
        return (scores + mask.to(scores.dtype)).softmax(-1)

    def _operands(self, index: Tensor, heads: slice | None) -> tuple[Tensor, Tensor]:
        query, n = self.caught.query, self.valid.shape[1]
        key = self.caught.key[:, :, :n]
        query = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        wide = torch.promote_types(query.dtype, torch.float32)
        chosen = torch.arange(query.shape[1], device=query.device)[heads or slice(None)]
        return query[:, chosen].to(wide), key[:, chosen // (query.shape[1] // key.shape[1])].to(wide)

    def head_chunks(self, num_rows: int) -> list[slice]:
        """Heads in groups small enough that `num_rows` rows of attention fit into memory."""
        size = max(1, _CHUNK // max(1, self.valid.numel() * num_rows))
        return [slice(i, min(i + size, self.num_heads)) for i in range(0, self.num_heads, size)]

    def received(self, rows: Bool[Tensor, "B n"]) -> Float[Tensor, "B n"]:
        """Attention that each token receives from the rows where `rows` is True: mean over heads, sum over rows."""
        index, present = padded_index(rows)
        weight = present.to(torch.float32)
        if self.plain and self.caught.softcap is None:
            n = self.valid.shape[1]
            found = attention_received(
                self.caught.query, self.caught.key[:, :, :n], rows=index, row_weights=weight[:, None], causal=True,
                key_mask=self.valid, scale=self.caught.scale,
            )  # fmt: skip
            return found.mean(1)
        total = torch.zeros(self.valid.shape, device=rows.device)
        for heads in self.head_chunks(index.shape[1]):
            total = total + torch.einsum("bhrn,br->bn", self.rows(index, heads), weight)
        return total / self.num_heads


def padded_index(rows: Bool[Tensor, "B n"]) -> tuple[Int[Tensor, "B r"], Bool[Tensor, "B r"]]:
    """Positions where `rows` is True, in order, padded on the right to the longest; and which are real."""
    count = rows.sum(1, keepdim=True)
    width = max(1, int(count.max())) if rows.numel() else 0
    order = torch.sort(rows, dim=1, descending=True, stable=True).indices[:, :width]
    return order, torch.arange(width, device=rows.device) < count


def attention_modules(layers: nn.ModuleList) -> list[Any]:
    """The attention module of each layer of a tower or language model. TypeError where a layer has none."""
    found = []
    for layer in layers:
        attention = next((getattr(layer, n) for n in ("self_attn", "attention", "attn") if hasattr(layer, n)), None)
        if attention is None:
            raise TypeError(f"{type(layer).__name__} has no attention module that vlm-prune knows")
        found.append(attention)
    return found
