"""Affine-Scaled Attention in transformers models, and its running means over the ranks of data parallel training."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_attn.affine_attention.formula import Sight
from llm_attn.affine_attention.scale import AffineConfig, AffineScale
from llm_attn.transformers.door import Handle, base_model, layer_config, open_door, register_attention
from llm_attn.transformers.saving import register_door
from llm_attn.transformers.visibility import Visibility, dense_attention

NAME = "affine"


def apply_affine(
    model: nn.Module, config: AffineConfig | None = None, *, layers: Sequence[int] | None = None
) -> Handle:
    """Gives a transformers model Affine-Scaled Attention in the decoder layers `layers` (None: all), to be trained so.

    Each layer gets an `AffineScale` as `self_attn.llm_attn_affine`, drawn from torch's global generator unless
    `config.init` says otherwise. Works in whatever chooses its attention through transformers' AttentionInterface, with
    caches, padding, packing, sliding windows and capped scores. A model that was trained with softmax attention needs
    `AffineConfig(init="identity")`: with any other its output is damaged until it is trained on.
    """
    config = AffineConfig() if config is None else config
    if not isinstance(config, AffineConfig):
        raise TypeError(f"config must be an AffineConfig, got {type(config).__name__}")
    host = base_model(model).config.get_text_config(decoder=True)

    def scale_of(layer: nn.Module) -> AffineScale:
        heads = host.num_attention_heads
        spread = getattr(host, "initializer_range", 0.02)
        width: int = layer.head_dim  # type: ignore[assignment]
        return AffineScale(host.hidden_size, heads, width, config, initializer_range=spread).train(layer.training)

    return open_door(model, NAME, config, layers=layers, modules=scale_of, hidden_states=True)


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
    hidden_states: Tensor | None = None,
) -> Tensor:
    if hidden_states is None or layer_config(layer, NAME, None) is None:
        raise ValueError(
            f"attn_implementation='{NAME}' alone lacks the weights of Affine-Scaled Attention; build the model without "
            "it and call llm_attn.apply_affine(model, AffineConfig()), or load one that was saved with it"
        )
    attended = dense_attention(query, key, value, visible, scale=scale, dropout=dropout, softcap=softcap)
    seen = Sight(query.shape[2], key.shape[2], key.device, visible)
    # called as a module: PEFT may have wrapped it
    return layer.llm_attn_affine(attended, query, key, value, hidden_states, seen, scale=scale, softcap=softcap)  # type: ignore[operator]


register_attention(NAME, _attention, softcap=True)
register_door(NAME, AffineConfig, apply_affine)


@torch.no_grad()
def average_affine_means(model: nn.Module, *, group: distributed.ProcessGroup | None = None) -> int:
    """Makes every `alpha_ma` in the model its mean over the ranks of `group`; one all-reduce of a few numbers.

    For data parallel training, whose ranks see different tokens: before saving, or after every step with
    `AverageAffineMeans`. Without a process group it does nothing. Returns how many
    buffers there are; every rank must call it. ValueError if there are none.
    """
    means = [module.alpha_ma for module in model.modules() if isinstance(module, AffineScale) and _has_mean(module)]
    if not means:
        raise ValueError(f"{type(model).__name__} has no running means; call apply_affine on it first")
    if distributed.is_available() and distributed.is_initialized():
        together = torch.cat([mean.flatten() for mean in means])
        distributed.all_reduce(together, group=group)
        together /= distributed.get_world_size(group)
        for mean, averaged in zip(means, together.split([mean.numel() for mean in means]), strict=True):
            mean.copy_(averaged)
    return len(means)


class AverageAffineMeans(TrainerCallback):
    """Has a Trainer call `average_affine_means` after every step, so that what it saves holds the mean of all ranks."""

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: nn.Module,
    ) -> None:
        """The mean over the ranks."""
        average_affine_means(kwargs["model"])


def _has_mean(scale: AffineScale) -> bool:
    return scale.config.scaling == "affine"
