"""What a prompt cost: tokens of each layer, kept patches, cache entries and bytes, work in proportion to no pruning."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vlm_prune.prefill import Prefill


@dataclass(frozen=True)
class Report:
    """Counts of the last prompt that was read.

    method: its name. num_visual: (B,), visual tokens of the prompt, newline tokens left out.
    num_tokens: (B,), all its tokens. kept: for each stage, by `after_layer`, the prompt positions of the visual tokens
    that stayed, sample by sample. entering: (B, L), tokens that enter each layer, which is what its cache holds.
    notes: what the criterion said of itself, by stage. bytes_per_entry: of a layer's cache, keys and values.
    """

    method: str
    num_visual: Int[Tensor, "B"]
    num_tokens: Int[Tensor, "B"]
    entering: Int[Tensor, "B L"]
    bytes_per_entry: int
    layer: "LayerShape"
    kept: dict[int, list[Tensor]] = field(default_factory=dict)
    notes: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def kv_entries(self) -> Int[Tensor, "B L"]:
        """Cache entries of the prompt, layer by layer."""
        return self.entering

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of the prompt, all samples and layers; the host's padding left out."""
        return int(self.entering.sum()) * self.bytes_per_entry

    @property
    def kv_bytes_unpruned(self) -> int:
        """The same without pruning."""
        return int(self.num_tokens.sum()) * self.entering.shape[1] * self.bytes_per_entry

    @property
    def visual_entering(self) -> Int[Tensor, "B L"]:
        """Visual tokens that enter each layer; newline tokens left out."""
        return self.entering - (self.num_tokens - self.num_visual)[:, None]

    @property
    def average_true(self) -> Tensor:
        """(B,) visual tokens that enter a layer, mean over layers: what is computed."""
        return self.visual_entering.double().mean(1)

    @property
    def average_nominal(self) -> Tensor:
        """(B,) visual tokens that leave a layer, mean over layers: how papers count, a stage's own layer as pruned."""
        visual = self.visual_entering.double()
        last = self.kept.get(visual.shape[1] - 1)
        end = visual[:, -1:] if last is None else torch.tensor([[len(k)] for k in last]).to(visual)
        return torch.cat([visual[:, 1:], end], 1).mean(1)

    @property
    def flops_ratio(self) -> float:
        """Multiply-adds of the language model's layers at prefill, in proportion to those without pruning."""
        layers = self.entering.shape[1]
        full = sum(self.layer.macs(int(n)) for n in self.num_tokens.tolist()) * layers
        return sum(self.layer.macs(int(n)) for n in self.entering.flatten().tolist()) / full


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a decoder layer: channels, query heads times head_dim, key heads times head_dim, MLP width."""

    channels: int
    query_width: int
    key_width: int
    mlp_width: int

    def macs(self, n: int) -> float:
        """Multiply-adds for n tokens: projections, attention counted in full, gated MLP; as AdaptInfer counts."""
        projections = n * self.channels * (2 * self.query_width + 2 * self.key_width)
        return projections + 2 * n * n * self.query_width + 3 * n * self.channels * self.mlp_width


def layer_shape(config: Any) -> LayerShape:
    """Sizes out of a text config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return LayerShape(
        config.hidden_size, config.num_attention_heads * head_dim, key_heads * head_dim, config.intermediate_size
    )


def make_report(method: str, prefill: Prefill, config: Any, dtype: torch.dtype, num_tokens: Tensor) -> Report:
    """The report of a prompt that has been read. num_tokens: (B,) of the prompt, padding left out."""
    shape = layer_shape(config)
    columns = []
    for layer in range(config.num_hidden_layers):
        group = prefill.group(layer)
        columns.append(num_tokens if group is None else group.valid.sum(1))
    return Report(
        method=method,
        num_visual=prefill.num_visual,
        num_tokens=num_tokens,
        entering=torch.stack(columns, 1),
        bytes_per_entry=2 * shape.key_width * dtype.itemsize,
        layer=shape,
        kept=dict(prefill.kept),
        notes=dict(prefill.notes),
    )
