"""The door into transformers: attention implementation "act", and the state that follows a cache.

What a layer has counted belongs to the text in the cache, so it is kept on the layer of the cache and is reordered,
repeated and reset with it: beams and batches then need no care. The attention function is not given the cache; hooks
hand it over, which is why "act" chosen by `attn_implementation` alone, without `apply_act`, ends with the prompt.
"""

from abc import ABC
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from llm_attn.attention_calibration.calibrate import calibrate_known_sinks, of_heads, prompt_sinks
from llm_attn.attention_calibration.config import ACTConfig
from llm_attn.attention_calibration.counting import first_keys, rows_that_see
from llm_attn.attention_calibration.running import SinkState, running_attention
from llm_attn.transformers.door import Handle, attention_layers, base_model, layer_config, open_door, register_attention
from llm_attn.transformers.saving import register_door
from llm_attn.transformers.visibility import Visibility, dense_attention

NAME = "act"
OnSinks = Callable[[int, tuple[int, ...], Float[Tensor, "B h Nk"], Bool[Tensor, "B h Nk"]], None]
"""Told, after each call of a layer: its index, the heads, what each key received on average, and sinks of any row."""

# what layers carry while the door is open, and what layers of a cache carry
_HEADS, _CACHE, _WATCHER, _STATE = "llm_attn_act_heads", "llm_attn_act_cache", "llm_attn_act_on_sinks", "llm_attn_act"
_DEFAULT = ACTConfig()


def apply_act(
    model: nn.Module,
    config: ACTConfig = _DEFAULT,
    *,
    layers: Sequence[int] | None = None,
    on_sinks: OnSinks | None = None,
) -> Handle:
    """Calibrates the sinks of the heads in `config` in a transformers model, until the handle's `remove()`.

    `layers` narrows the layers down; without heads in the config, it is every head of these. `on_sinks` is told of each
    layer's sinks as they are found, also at beta 1, where the model gives its own output.

    Raises ValueError on a model of an unsupported family, on heads or layers that it lacks, and where nothing is left
    to calibrate.
    """
    host = base_model(model)
    found = attention_layers(host)
    chosen = _chosen_heads(config, found, layers)
    handle = open_door(host, NAME, config, layers=sorted(chosen))
    for index, heads in chosen.items():
        _furnish(handle, found[index], heads, on_sinks)
    return handle


def _furnish(handle: Handle, layer: Any, heads: tuple[int, ...], on_sinks: OnSinks | None) -> None:
    def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # its name differs between versions of transformers
        layer.llm_attn_act_cache = next(
            (given for given in (*args, *kwargs.values()) if isinstance(given, Cache)), None
        )

    def after(layer: Any, *_: Any) -> None:
        layer.llm_attn_act_cache = None  # the cache is the caller's: nothing of it stays in the model

    for name, value in ((_HEADS, heads), (_CACHE, None), (_WATCHER, on_sinks)):
        setattr(layer, name, value)
        handle.on_remove(partial(delattr, layer, name))
    handle.on_remove(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
    handle.on_remove(layer.register_forward_hook(after, always_call=True).remove)


def _chosen_heads(
    config: ACTConfig, found: dict[int, nn.Module], layers: Sequence[int] | None
) -> dict[int, tuple[int, ...]]:
    named = config.heads or {}
    missing = sorted((set(named) | set(layers or ())) - set(found))
    if missing:
        raise ValueError(f"the model has attention layers {min(found)} to {max(found)}, not {missing[0]}")
    chosen = {}
    for index, layer in found.items():
        if layers is not None and index not in layers:
            continue
        everywhere = config.heads is None and layers is not None
        heads = tuple(range(_num_heads(layer))) if everywhere else _heads_of(layer, config)
        if heads:
            chosen[index] = heads
    if not chosen:
        raise ValueError(
            f"nothing to calibrate: of {len(found)} layers none is left"
            + ("; name heads or layers (the first two and the last are left out by default)" if not named else "")
        )
    return chosen


def _num_heads(layer: nn.Module) -> int:
    config: Any = layer.config
    return config.num_attention_heads


def _heads_of(layer: nn.Module, config: ACTConfig) -> tuple[int, ...]:
    host: Any = layer
    return config.heads_of(host.layer_idx, num_layers=host.config.num_hidden_layers, num_heads=_num_heads(layer))


class _Call(NamedTuple):
    """One call of a layer's attention function."""

    layer: Any
    query: Tensor
    key: Tensor
    value: Tensor
    visible: Visibility
    scale: float
    dropout: float
    softcap: float | None
    config: ACTConfig
    heads: tuple[int, ...]
    slot: CacheLayerMixin | None
    """The layer of the cache."""
    watcher: OnSinks | None

    @property
    def changes(self) -> bool:
        """Whether the output is not the host's."""
        return self.config.beta < 1

    def plain(self, *, dropout: float = 0.0) -> Tensor:
        """The host's output."""
        tensors = self.query, self.key, self.value
        return dense_attention(*tensors, self.visible, scale=self.scale, dropout=dropout, softcap=self.softcap)

    def written(self, seen: int) -> "_Call":
        """Without the slots of a static cache that hold no token yet: the last key is that of the last row."""
        if seen >= self.key.shape[2]:
            return self
        mask, keys = self.visible.mask, self.visible.key_mask
        visible = Visibility(
            self.visible.window, None if keys is None else keys[:, :seen], None if mask is None else mask[..., :seen]
        )
        return self._replace(key=self.key[:, :, :seen], value=self.value[:, :, :seen], visible=visible)

    def running(self, state: SinkState) -> tuple[Tensor, SinkState]:
        parts = of_heads(self.query, self.key, self.value, self.heads)
        visible, scale, softcap = self.visible, self.scale, self.softcap
        return running_attention(*parts, state, self.config, visible=visible, scale=scale, softcap=softcap)


def _attention(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    *,
    scale: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """One layer's attention; dropout is left out in calibrated heads."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    config: ACTConfig = layer_config(layer, NAME, _DEFAULT)
    heads = getattr(layer, _HEADS, None) or _heads_of(layer, config)
    held, watcher = getattr(layer, _CACHE, None), getattr(layer, _WATCHER, None)
    slot = None if held is None else held.layers[layer.layer_idx]
    call = _Call(layer, query, key, value, visible, scale, dropout, softcap, config, heads, slot, watcher)
    if not heads or query.shape[2] == 0 or not (call.changes or watcher):
        return call.plain(dropout=dropout)
    if getattr(slot, _STATE, None) is None and query.shape[2] == key.shape[2]:
        return _begin(call)
    if config.decode == "off":
        return call.plain(dropout=dropout)
    return _go_on_eagerly(call) if torch.compiler.is_compiling() else _go_on(call)


def _begin(call: _Call) -> Tensor:
    """The first call of a text."""
    query, key, value = call.query, call.key, call.value
    parts = of_heads(query, key, value, call.heads)
    visible, scale, softcap = call.visible, call.scale, call.softcap
    out = call.plain(dropout=call.dropout)
    if call.config.causal:
        changed, state = call.running(SinkState.empty(len(query), len(call.heads), query.device, query.dtype))
        _keep(call, state)
        return _put(out, changed, call.heads) if call.changes else out
    sinks, received = prompt_sinks(*parts[:2], visible, call.config, scale=scale, softcap=softcap)
    shape = query.shape[2], key.shape[2], query.device
    rows, first = (of(visible, *shape)[:, None].expand(len(query), 1, -1) for of in (rows_that_see, first_keys))
    _keep(call, SinkState(query.shape[2], received, rows, first, sinks, sinks))
    if not call.changes:
        return out
    plain = call.plain() if call.dropout > 0 else out
    changed = calibrate_known_sinks(
        query, key, value, plain, sinks, call.config.beta,
        heads=call.heads, visible=visible, scale=scale, softcap=softcap,
    )  # fmt: skip
    return changed if plain is out else _put(out, changed.index_select(1, _index(call.heads, out)), call.heads)


def _go_on(call: _Call) -> Tensor:
    """A later call of a text."""
    if call.slot is None:
        raise ValueError(
            "act needs to count with the cache what keys receive: open the door with apply_act(model, ACTConfig(...)) "
            'before the prompt, or choose ACTConfig(decode="off")'
        )
    state, seen = getattr(call.slot, _STATE, None), int(call.slot.get_seq_length())
    call = call.written(seen)
    if state is None:
        if seen == call.query.shape[2]:
            return _begin(call)  # a prompt in a static cache, compiled
        state = SinkState.empty(len(call.query), len(call.heads), call.query.device, call.query.dtype)
    if state.received.shape[1] != len(call.heads):
        raise ValueError("the cache was filled with other heads calibrated: begin the text anew with these")
    changed, state = call.running(state)
    _keep(call, state)
    if call.changes and len(call.heads) == call.query.shape[1]:
        return changed
    out = call.plain(dropout=call.dropout)
    return _put(out, changed, call.heads) if call.changes else out


# what is known of the keys changes shape with every token: nothing to compile
_go_on_eagerly = torch.compiler.disable(_go_on)


def _index(heads: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(heads, device=like.device)


def _put(out: Tensor, changed: Tensor, heads: tuple[int, ...]) -> Tensor:
    return out.index_copy(1, _index(heads, out), changed)


def _keep(call: _Call, state: SinkState) -> None:
    """Leaves the state with the cache, and tells who wants to know."""
    if call.slot is None and call.watcher is None:
        return
    if torch.compiler.is_compiling():
        _leave_eagerly(call, state)
    else:
        _leave(call, state)


def _leave(call: _Call, state: SinkState) -> None:
    if call.slot is not None and call.config.decode != "off":
        if not isinstance(call.slot, _Follows):
            of_host: type = type(call.slot)
            call.slot.__class__ = _following(of_host)
        setattr(call.slot, _STATE, state)
    if call.watcher is not None:
        call.watcher(call.layer.layer_idx, call.heads, state.received / state.rows.clamp(min=1), state.flagged)


_leave_eagerly = torch.compiler.disable(_leave)


class _Follows(ABC):  # noqa: B024 - as CacheLayerMixin is: an object changes class only between like layouts
    """What a layer of a cache does with its texts, done with what was counted of them too."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._of_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._of_batch(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._of_batch(lambda tensor: tensor[indices])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        if hasattr(self, _STATE):
            delattr(self, _STATE)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and hasattr(self, _STATE):
            raise ValueError(
                "what act has counted cannot be taken back token by token (assisted decoding does that): choose "
                'ACTConfig(decode="off")'
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def _of_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if hasattr(self, _STATE):
            setattr(self, _STATE, getattr(self, _STATE).of_batch(change))


@cache
def _following(layer_class: type) -> type:
    # no _layer_type: classes that have one register themselves as the layer of that type
    return type(layer_class.__name__, (_Follows, layer_class), {"_layer_type": None})


register_attention(NAME, _attention, softcap=True)
register_door(NAME, ACTConfig, apply_act)
