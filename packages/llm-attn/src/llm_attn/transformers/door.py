"""The door into a transformers model: which layers a method changes, how it is chosen, and how it is undone.

An attention method registers one function and its mask function under its name, through transformers' own
AttentionInterface; `open_door` gives the layers their settings and weights, turns the name on, and returns the handle
that undoes all of it. Methods that are no attention function (they change other parts) open a door too, for the same
handle and the same way of being saved.

Decided here: one attention method at a time. Two would each want to be the attention function of the layer; the second
is refused with a sentence.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from llm_attn.transformers import saving
from llm_attn.transformers.visibility import dense_attention, key_mask, read_mask
from shared_kernels.handle import Handle

TESTED_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "phi3")
"""`config.model_type` of the families that the door tests run; others of the same build are let in."""

_ATTENTION_METHODS: set[str] = set()
_REFUSED = {"s_aux": "attention sinks (s_aux)", "position_bias": "a position bias", "cache": "paged attention"}
_INPUT = "llm_attn_input"


def register_attention(name: str, function: Callable[..., Tensor], *, softcap: bool = False) -> None:
    """Makes `function` the attention function `name` of transformers, with the mask function that goes with it.

    `function(layer, query, key, value, visible, *, scale, dropout)` returns (B, H, Nq, E): `layer` is the host's
    attention module, query (B, H, Nq, D) and key (B, Hkv, Nk, D) carry their rotary positions, key and value are the
    whole cache without heads repeated, `visible` is a `Visibility`. With `softcap=True` it is given `softcap` too, the
    bound of the scores or None; else a model that caps its scores is refused. Where the door was opened with
    `hidden_states=True` it is given `hidden_states`, the input (B, Nq, C) of the attention module.
    Layers that a door left out run dense attention.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        _refuse(name, module, kwargs, softcap)
        key, value, visible = read_mask(attention_mask, query, key, value, sliding_window)
        cap = kwargs.get("softcap")
        if left_out(module, name):
            out = dense_attention(query, key, value, visible, scale=scaling, dropout=dropout, softcap=cap)
        else:
            more = {"softcap": cap} if softcap else {}
            if _INPUT in kwargs:
                more["hidden_states"] = kwargs[_INPUT]
            out = function(module, query, key, value, visible, scale=scaling, dropout=dropout, **more)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, key_mask)
    _ATTENTION_METHODS.add(name)


def _refuse(name: str, module: nn.Module, kwargs: dict[str, Any], softcap: bool) -> None:
    for key, what in _REFUSED.items():
        if kwargs.get(key) is not None:
            raise ValueError(f"{name} does not support {what}, which {type(module).__name__} uses")
    if kwargs.get("softcap") is not None and not softcap:
        raise ValueError(f"{name} does not support capped scores (softcap), which {type(module).__name__} uses")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise ValueError(f"{name} is for causal attention, {type(module).__name__} is bidirectional")


def left_out(layer: nn.Module, name: str) -> bool:
    """Whether a door of that name is open and does not change this layer."""
    settings = getattr(layer, "llm_attn", {})
    return name in settings and settings[name] is None


def layer_config(layer: nn.Module, name: str, default: Any) -> Any:
    """The method's settings of this layer, `default` where it was chosen by `attn_implementation` alone."""
    return getattr(layer, "llm_attn", {}).get(name, default)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the language model. ValueError on a model that has none."""
    host = base_model(model)
    layers = getattr(_decoder(host), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(
            f"{type(host).__name__} has no decoder layers that llm-attn knows; tested families: "
            + ", ".join(TESTED_FAMILIES)
        )
    return layers


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The attention module of each decoder layer, by index. ValueError on a model that has none."""
    layers: Any = decoder_layers(model)
    found = {
        index: layer.self_attn
        for index, layer in enumerate(layers)
        if getattr(getattr(layer, "self_attn", None), "layer_idx", None) is not None
    }
    if not found:
        raise ValueError(
            f"{type(base_model(model)).__name__} has no attention layers that llm-attn knows; tested families: "
            + ", ".join(TESTED_FAMILIES)
        )
    return found


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of a PEFT wrapper. TypeError on what is no transformers model."""
    unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    host = model if unwrap is None else unwrap()
    if not isinstance(host, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    return host


def _decoder(host: Any) -> Any:
    return host.get_decoder() if hasattr(host, "get_decoder") else host


def open_door(
    model: nn.Module,
    name: str,
    config: Any,
    *,
    layers: Sequence[int] | None = None,
    modules: Callable[[nn.Module], nn.Module] | None = None,
    shared: nn.Module | None = None,
    hidden_states: bool = False,
) -> Handle:
    """Turns the method `name` on in the decoder layers `layers` (None: all) of a transformers model.

    modules: what makes the weights of one layer, given its attention module; they become `layer.llm_attn_<name>`, and
        with that part of the model's state dict.
    shared: weights that all layers share; they become `model.llm_attn_<name>`.
    hidden_states: gives the attention function the input of the attention module.

    Weights move to the device of the layer's own, and parameters to their dtype. ValueError where the model has no such
    layers, runs the method already, or runs another attention method.
    """
    host = base_model(model)
    found = attention_layers(host)
    chosen = tuple(found) if layers is None else tuple(layers)
    if not chosen or not set(chosen) <= set(found):
        raise ValueError(f"layers must be some of 0 to {len(found) - 1}, got {list(chosen)}")
    attention = name in _ATTENTION_METHODS
    _check_free(host, name, attention)
    handle = Handle(name, host, config, chosen)
    try:
        for index, layer in found.items():
            _set_layer(handle, layer, config if index in chosen else None)
            if index in chosen:
                _furnish(handle, layer, modules, hidden_states)
        if shared is not None:
            host.add_module(f"llm_attn_{name}", _like(next(host.parameters()), shared))
            handle.on_remove(lambda: delattr(host, f"llm_attn_{name}"))
        if attention:
            _turn_on(handle)
        handle.on_remove(saving.remember(host, name, config, None if layers is None else chosen))
    except BaseException:
        handle.remove()
        raise
    return handle


def _check_free(host: PreTrainedModel, name: str, attention: bool) -> None:
    for other in saving.open_doors(host):
        if other == name:
            raise ValueError(f"{name} is at work in this model already; call remove() on its handle first")
        if attention and other in _ATTENTION_METHODS:
            raise ValueError(f"the model's attention is {other} already; call remove() on its handle before {name}")


def _set_layer(handle: Handle, layer: Any, config: Any) -> None:
    before = getattr(layer, "llm_attn", None)
    layer.llm_attn = {**(before or {}), handle.name: config}

    def undo() -> None:
        layer.llm_attn = {k: v for k, v in layer.llm_attn.items() if k != handle.name}
        if not layer.llm_attn:
            del layer.llm_attn

    handle.on_remove(undo)


def _furnish(
    handle: Handle, layer: nn.Module, modules: Callable[[nn.Module], nn.Module] | None, hidden_states: bool
) -> None:
    if modules is not None:
        name = f"llm_attn_{handle.name}"
        layer.add_module(name, _like(next(layer.parameters()), modules(layer)))
        handle.on_remove(lambda: delattr(layer, name))
    if hidden_states:
        hook = layer.register_forward_pre_hook(_pass_input, with_kwargs=True)
        handle.on_remove(hook.remove)


def _like(weight: Tensor, module: nn.Module) -> nn.Module:
    # buffers keep their dtype: they are statistics, and float32 on purpose
    module.to(weight.device)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(weight.dtype)
    return module


def _pass_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # hosts pass keyword arguments that they do not know on to the attention function
    given = args[0] if args else kwargs.pop("hidden_states")
    return (given, *args[1:]), {**kwargs, _INPUT: given}


def _turn_on(handle: Handle) -> None:
    decoder = _decoder(handle.model)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(handle.name)
    if decoder.config._attn_implementation != handle.name:
        raise ValueError(
            f"{type(handle.model).__name__} does not choose its attention through transformers' AttentionInterface; "
            f"tested families: {', '.join(TESTED_FAMILIES)}"
        )
    handle.on_remove(lambda: decoder.set_attn_implementation(before))
