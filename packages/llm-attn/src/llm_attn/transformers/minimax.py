"""MiniMax-01's lightning layers, computed in chunks and single steps instead of Python loops.

transformers computes them block by block in Python, keeps their state in the model's dtype, and goes token by token as
soon as there is a cache, also when a prompt is read in parts. `accelerate_minimax` gives them
`continue_lightning_attention`: the same numbers, the state in float32. Weights, checkpoints, cache and all other layers
stay the host's.

Li et al., "MiniMax-01: Scaling Foundation Models with Lightning Attention", arXiv:2501.08313.

Decided here: decay comes from the layer's own `slope_rate`, which is in the checkpoint, so results are the host's even
where a cast rounded it. `generate` with beams stays the host's too, whose cache does not reorder these states.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from llm_attn.lightning_attention import continue_lightning_attention
from llm_attn.transformers.door import Handle


class _Chunked(MiniMaxLightningAttention):
    """The host's layer with another way to the same numbers; instances are made by changing the class of the host's."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,  # noqa: ARG002 - the host's signature
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        cache = past_key_values if cache is None else cache  # renamed in transformers 5.24
        mixed = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            here = attention_mask[:, attention_mask.shape[1] - mixed.shape[1] :]
            mixed = mixed.masked_fill(here[..., None] == 0, 0)
        heads = mixed.unflatten(-1, (self.num_attention_heads, 3 * self.head_dim)).transpose(1, 2)
        before = None if cache is None else cache.get_linear_cache(self.layer_idx)
        if before is not None:
            before = before.to(torch.promote_types(heads.dtype, torch.float32))
        query, key, value = heads.split(self.head_dim, dim=-1)
        out, state = continue_lightning_attention(query, key, value, self.slope_rate.flatten(), before)
        if cache is not None:
            cache.set_linear_cache(self.layer_idx, state)
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * out), state


def accelerate_minimax(model: nn.Module) -> Handle:
    """Computes the lightning layers of a MiniMax model in chunks; outputs stay equal up to rounding.

    ValueError if the model has none (they are the layers of `config.layer_types` that say "linear_attention"), or if
    they are accelerated already.
    """
    layers = [m for m in model.modules() if isinstance(m, MiniMaxLightningAttention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no lightning layers of MiniMax-01 (model_type 'minimax')")
    if any(isinstance(layer, _Chunked) for layer in layers):
        raise ValueError("the model is accelerated already; call remove() on its handle first")
    handle = Handle("minimax", model, None, tuple(layer.layer_idx for layer in layers))
    for layer in layers:
        _change(handle, layer)
    return handle


def _change(handle: Handle, layer: nn.Module) -> None:
    host_class = type(layer)
    layer.__class__ = _Chunked

    def undo() -> None:
        layer.__class__ = host_class

    handle.on_remove(undo)
