"""Attention Residuals in a transformers model: its own decoder loop and layers, with another residual stream.

Hosts hand the residual stream from layer to layer and touch it in two ways only: they norm it, and they add to it. So
the door puts a `ResidualStream` in its place before the first layer; `residual + output` then appends to it, and a hook
before each pre-norm, and before the final norm, gives the norm the mix. No forward of a host is copied.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_attn.attention_residuals.config import AttentionResidualsConfig
from llm_attn.attention_residuals.module import AttentionResiduals
from llm_attn.attention_residuals.stream import ResidualStream
from llm_attn.transformers import Handle, base_model, decoder_layers, open_door, register_door

NAME = "attention_residuals"

_PRE_NORMS = {
    frozenset({"input_layernorm", "post_attention_layernorm"}): ("input_layernorm", "post_attention_layernorm"),
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
    ): ("input_layernorm", "pre_feedforward_layernorm"),
    frozenset({"input_layernorm"}): ("input_layernorm",),
}
"""Norms of a decoder layer -> those that read the residual stream, one for each sub-layer. Llama, Qwen, Mistral, Phi-3;
Gemma 2 and 3, which norm outputs too; Phi, whose attention and MLP share a norm and are one sub-layer."""


def apply_attention_residuals(model: nn.Module, config: AttentionResidualsConfig | None = None) -> Handle:
    """Replace the residual sums of a transformers model by attention over its earlier layers (Attention Residuals).

    A trained pre-norm model keeps its function with `sum_scale=True`, since queries begin at zero; train on from there.
    For training from scratch apply the defaults to a model made from a config. The queries and key norms become
    `model.llm_attn_attention_residuals`, are saved with the model and come back with it; two-phase computation,
    caches, `generate` and gradient checkpointing (not the reentrant kind) work as before. Hidden states that the model
    returns are the mixes, the inputs of the layers.

    Raises ValueError where blocks are longer than the model, the method is applied already, or the model's layers are
    not built of pre-norms and additions as llm-attn knows them.
    """
    config = config or AttentionResidualsConfig()
    host = base_model(model)
    layers = decoder_layers(host)
    norms = [_pre_norms(host, layer) for layer in layers]
    decoder, final_norm = _decoder_and_final_norm(host, layers)
    residuals = AttentionResiduals(
        sum(len(names) for names in norms),
        decoder.config.hidden_size,
        block_size=config.block_size(len(layers), len(norms[0])),
        eps=_eps(final_norm),
        sum_scale=config.sum_scale,
        variant=config.variant,
        two_phase=config.two_phase,
    )
    handle = open_door(model, NAME, config, shared=residuals)
    handle.on_remove(layers[0].register_forward_pre_hook(_Begin(residuals), with_kwargs=True).remove)
    places = [(norm, type(layer).__name__) for layer, names in zip(layers, norms, strict=True) for norm in names]
    for index, (norm, place) in enumerate(places):
        handle.on_remove(norm.register_forward_pre_hook(_Mix(index, place)).remove)
    handle.on_remove(final_norm.register_forward_pre_hook(_mix_at_last).remove)
    handle.on_remove(decoder.register_forward_hook(_mix_hidden_states).remove)
    return handle


def _apply_saved(model: nn.Module, config: AttentionResidualsConfig, layers: Sequence[int] | None) -> Handle:
    if layers is not None:
        raise ValueError(f"{NAME} changes all layers of a model, the saved model lists {list(layers)}")
    return apply_attention_residuals(model, config)


register_door(NAME, AttentionResidualsConfig, _apply_saved)


def _pre_norms(host: PreTrainedModel, layer: nn.Module) -> list[nn.Module]:
    names = frozenset(name for name, _ in layer.named_children() if "norm" in name)
    if names not in _PRE_NORMS:
        known = "; ".join(" + ".join(sorted(known)) for known in _PRE_NORMS)
        raise ValueError(
            f"{type(host).__name__} cannot take attention residuals: its layers have the norms "
            f"{' + '.join(sorted(names)) or 'none'}. Known are pre-norm layers with {known}"
        )
    return [getattr(layer, name) for name in _PRE_NORMS[names]]


def _decoder_and_final_norm(host: PreTrainedModel, layers: nn.ModuleList) -> tuple[PreTrainedModel, nn.Module]:
    models = (module for module in host.modules() if isinstance(module, PreTrainedModel))
    decoder = next(module for module in models if getattr(module, "layers", None) is layers)
    for name in ("norm", "final_layernorm"):
        if isinstance(norm := getattr(decoder, name, None), nn.Module):
            return decoder, norm
    raise ValueError(f"{type(host).__name__} cannot take attention residuals: it has no final norm")


def _eps(norm: nn.Module) -> float:
    return next(float(getattr(norm, name)) for name in ("variance_epsilon", "eps") if hasattr(norm, name))


class _Begin:
    """Before the first layer: the embedding becomes a stream. Hooks are objects, so that a deep copy of a model copies
    what they hold."""

    def __init__(self, residuals: AttentionResiduals) -> None:
        self.residuals = residuals

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if _checkpoints_reentrantly(layer):
            raise ValueError(
                "attention residuals need gradient checkpointing that is not reentrant: enable it with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        if args:
            return (self.residuals.start(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.residuals.start(kwargs["hidden_states"])}


def _checkpoints_reentrantly(layer: nn.Module) -> bool:
    # that kind detaches tensors among its arguments, and finds none in a stream: gradients would be lost
    if not (layer.training and torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False)):
        return False
    return bool(getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"))


class _Mix:
    """Before the pre-norm of sub-layer `index`."""

    def __init__(self, index: int, place: str) -> None:
        self.index, self.place = index, place

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        stream = args[0]
        if not isinstance(stream, ResidualStream):
            raise TypeError(
                f"{self.place} was given a tensor; with attention residuals a layer cannot run without those before it"
            )
        if stream.state.num_layers != self.index:
            raise RuntimeError(
                f"{self.place} has added {stream.state.num_layers} outputs to the stream where {self.index} were "
                "expected: it is not built of sub-layers as llm-attn knows them"
            )
        return (stream.mixed(),)


def _mix_at_last(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # a tensor is somebody's own, who reads a hidden state through the final norm
    return (args[0].mixed() if isinstance(args[0], ResidualStream) else args[0], *args[1:])


def _mix_hidden_states(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_as_mixes(item) for item in output)
    if getattr(output, "hidden_states", None) is not None:
        output["hidden_states"] = _as_mixes(output.hidden_states)
    return output


def _as_mixes(states: Any) -> Any:
    if not isinstance(states, tuple):
        return states
    return tuple(state.mixed() if isinstance(state, ResidualStream) else state for state in states)
