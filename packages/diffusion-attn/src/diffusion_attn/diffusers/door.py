"""The door into a diffusers transformer: a method takes over the attention of visual tokens, until it is removed.

Every layer's own processor keeps doing what it does (projections, norms, rotary positions, LoRA, fused weights); it
only runs inside a mode of torch in which `scaled_dot_product_attention` is the method's. A hook before the model
forward notes the grid of visual tokens and the step of the denoising loop in one plain object that the layers share.

Decided here, against diffusers' own slots: its attention backends are a closed enumeration, are switched for all
models at once, and do not exist for SD3, CogVideoX and Mochi; a mode around the processor works for all families alike,
also under `torch.compile(fullgraph=True)`, with gradient checkpointing (the recomputation passes through the processor
again) and with any mask that the model makes. A processor that does not end in `scaled_dot_product_attention` (the
flash, sage and flex backends) is refused when it runs, not silently left dense.
"""

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffusion_attn.diffusers.families import Family, attention_modules, family_of
from diffusion_attn.token_order import Grid, inverse_order
from diffusion_attn.visual_attention import TextKeys, attend_all
from shared_kernels.handle import Handle

log = logging.getLogger(__name__)

_SDPA = F.scaled_dot_product_attention
_MARK = "diffusion_attn_method"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Where a method does not act: some layers, the first steps of the denoising loop, short sequences."""

    dense_layers: tuple[int, ...] = ()
    """Layers, by their place in the model, that stay dense."""
    dense_steps: int = 0
    """So many first steps of the denoising loop stay dense. In training mode it has no effect. The step is counted by
    the time steps that the model is called with; both calls of classifier-free guidance count as one."""
    dense_below: int = 0
    """Calls with fewer visual tokens stay dense; it is logged once."""

    def __post_init__(self) -> None:
        """Raises ValueError on negative numbers."""
        if min((self.dense_steps, self.dense_below, *self.dense_layers)) < 0:
            raise ValueError(f"dense_layers, dense_steps and dense_below must not be negative, got {self}")


@dataclass(frozen=True)
class VisualCall:
    """One layer's attention among visual tokens, in the method's order, with the text that they also read."""

    attention: nn.Module
    """The host's attention module."""
    query: Float[Tensor, "B H S D"]
    key: Float[Tensor, "B H S D"]
    value: Float[Tensor, "B H S E"]
    text: TextKeys | None
    scale: float | None


Attend = Callable[[VisualCall, "Layout"], tuple[Float[Tensor, "B H S E"], Float[Tensor, "B Hl nq"]]]
"""A method: output of the visual queries, and the share of the key blocks that every query block read."""


@dataclass
class Layout:
    """What the layers of a model know of the call they are part of. Kept until the next call, for recomputation.

    grid: frames, rows and columns of visual tokens. step: of the denoising loop, from 0.
    """

    make_order: Callable[[Grid], Int[Tensor, "S"]] | None = None
    """The method's order of tokens; None leaves them as they are."""
    grid: Grid = (0, 0, 0)
    step: int = 0
    timestep: float | None = None
    shares: dict[int, Float[Tensor, "B Hl nq"]] = field(default_factory=dict)
    """Of each layer, the share of key blocks that every query block read in the last call that was not compiled."""
    _orders: dict[tuple[Grid, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def num_visual(self) -> int:
        """Visual tokens."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    def order(self, device: torch.device) -> tuple[Int[Tensor, "S"], Int[Tensor, "S"]] | None:
        """Token at each place, and place of each token, for the present grid."""
        if self.make_order is None:
            return None
        key = (self.grid, device)
        if key not in self._orders:
            order = self.make_order(self.grid)
            self._orders[key] = order.to(device), inverse_order(order).to(device)
        return self._orders[key]

    def note_step(self, timestep: Any) -> None:
        """Counts a new time step; one that is higher than the last begins a new picture."""
        now = float(torch.as_tensor(timestep).flatten()[0])
        if self.timestep is None or now > self.timestep:
            self.step = 0
        elif now < self.timestep:
            self.step += 1
        self.timestep = now


@dataclass
class VisualHandle(Handle):
    """A method at work in a diffusers transformer, and what its layers know.

    layout: the grid, step and densities of the last call. schedule: where the method does not act.
    """

    layout: Layout = field(default_factory=Layout)
    schedule: Schedule = field(default_factory=Schedule)

    def densities(self) -> dict[int, float]:
        """Of each layer, the share of visual key blocks that was read in its last call, if that was not compiled."""
        return {index: held.mean().item() for index, held in self.layout.shares.items()}


class _Method(TorchFunctionMode):
    """Inside it, attention of all tokens among each other is the method's."""

    def __init__(self, layer: "_Layer", attention: nn.Module) -> None:
        super().__init__()
        self.layer, self.attention = layer, attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            return self.layer.attend(self.attention, *args, **kwargs)
        return func(*args, **kwargs)


@dataclass
class _Layer:
    """A layer that the method acts in."""

    index: int
    family: Family
    layout: Layout
    schedule: Schedule
    method: Attend
    met: bool = False
    """Whether the present call of the processor has come to attention."""

    def dense_now(self, attention: nn.Module) -> bool:
        early = self.layout.step < self.schedule.dense_steps and not attention.training
        return early or self.layout.num_visual < self.schedule.dense_below

    def attend(
        self,
        attention: nn.Module,
        query: Float[Tensor, "B H N D"],
        key: Float[Tensor, "B H N D"],
        value: Float[Tensor, "B H N E"],
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Float[Tensor, "B H N E"]:
        """What `scaled_dot_product_attention` is called with in this layer."""
        self.met = True
        visual = self.layout.num_visual
        text = query.shape[2] - visual
        if key.shape[2] != query.shape[2] or self.dense_now(attention):  # an adapter's cross-attention, or the schedule
            return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if text < 0 or (text and self.family.text == "none"):
            raise ValueError(
                f"{query.shape[2]} tokens attend to each other where a grid of {self.layout.grid} has {visual}: "
                "something else drops or adds tokens in this model"
            )
        if is_causal or dropout_p:
            raise ValueError("sparse attention of visual tokens is neither causal nor has dropout")
        if enable_gqa and key.shape[1] != query.shape[1]:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        of_text = slice(0, text) if self.family.text == "first" else slice(visual, None)
        of_visual = slice(text, None) if self.family.text == "first" else slice(0, visual)
        valid = _valid_text(attn_mask, query, of_text)
        words = TextKeys(key[:, :, of_text], value[:, :, of_text], valid) if text else None
        seen = query[:, :, of_visual], key[:, :, of_visual], value[:, :, of_visual]
        out = self._attend_visual(VisualCall(attention, *seen, words, scale))
        if words is None:
            return out
        written = attend_all(query[:, :, of_text], seen[1], seen[2], words, scale=scale)
        return torch.cat([written, out] if self.family.text == "first" else [out, written], 2)

    def _attend_visual(self, call: VisualCall) -> Tensor:
        order = self.layout.order(call.query.device)
        if order is not None:
            query, key, value = (t.index_select(2, order[0]) for t in (call.query, call.key, call.value))
            call = replace(call, query=query, key=key, value=value)
        out, shares = self.method(call, self.layout)
        if not torch.compiler.is_compiling():
            self.layout.shares[self.index] = shares.detach()
        return out if order is None else out.index_select(2, order[1])


def _valid_text(mask: Tensor | None, query: Tensor, of_text: slice) -> Tensor | None:
    """Which text tokens are keys, from a mask over keys that is the same for every query."""
    if mask is None:
        return None
    B, N = query.shape[0], query.shape[2]
    if mask.ndim != 4 or mask.shape[1:3] != (1, 1) or mask.shape[3] != N:
        raise ValueError(
            f"sparse attention honours masks over text keys, (B, 1, 1, {N}), got one of shape {tuple(mask.shape)}"
        )
    seen = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] >= 0
    return seen[:, of_text].expand(B, -1)


def _processor_for(layer: _Layer, processor: Any) -> Any:
    """The layer's processor, running inside the method."""
    host: type = type(processor)

    class Taken(host):
        taken_by = layer

        @functools.wraps(host.__call__)  # diffusers passes on what the signature names
        def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
            layer.met = False
            with _Method(layer, attn):
                out = super().__call__(attn, *args, **kwargs)
            if not layer.met:
                raise RuntimeError(
                    f"{host.__name__} did not call scaled_dot_product_attention, so the method had no part in it: "
                    "use diffusers' native attention backend, model.set_attention_backend('native')"
                )
            return out

    Taken.__name__ = Taken.__qualname__ = host.__name__
    taken = copy.copy(processor)
    taken.__class__ = Taken
    return taken


def open_door(
    model: nn.Module,
    name: str,
    config: Any,
    method: Attend,
    *,
    schedule: Schedule = Schedule(),
    order: Callable[[Grid], Int[Tensor, "S"]] | None = None,
    modules: Callable[[nn.Module], nn.Module] | None = None,
) -> VisualHandle:
    """Lets `method` do the attention of visual tokens in all layers of a transformer but the schedule's dense ones.

    order: brings the visual tokens of a grid into the method's order; it is undone on the output.
    modules: makes the weights of one layer, which become `attention.diffusion_attn_<name>` and part of the state dict.

    TypeError on a model of no known family, ValueError if a method is at work already or no layer is left.
    """
    family, found = family_of(model), attention_modules(model)
    if getattr(model, _MARK, None) is not None:
        raise ValueError(f"{getattr(model, _MARK)} is at work in this model already; call remove() on its handle first")
    chosen = [index for index in range(len(found)) if index not in schedule.dense_layers]
    if not chosen:
        raise ValueError(f"dense_layers leaves none of the {len(found)} layers")
    layout = Layout(order)
    handle = VisualHandle(name, model, config, tuple(chosen), layout=layout, schedule=schedule)
    try:
        setattr(model, _MARK, name)
        handle.on_remove(lambda: delattr(model, _MARK))
        for index in chosen:
            attention: Any = found[index]
            if modules is not None:
                _furnish(handle, attention, f"diffusion_attn_{name}", modules(attention))
            layer = _Layer(index, family, layout, schedule, method)
            _take(handle, attention, _processor_for(layer, attention.processor))
        hook = _root_hook(model, family, layout, schedule, chosen)
        handle.on_remove(model.register_forward_pre_hook(hook, with_kwargs=True).remove)
    except BaseException:
        handle.remove()
        raise
    return handle


def _furnish(handle: Handle, attention: nn.Module, name: str, module: nn.Module) -> None:
    weight = next(attention.parameters())
    attention.add_module(name, module.to(weight.device))
    handle.on_remove(lambda: delattr(attention, name))


def _take(handle: Handle, attention: Any, processor: Any) -> None:
    before = attention.processor
    attention.processor = processor

    def undo() -> None:
        if attention.processor is processor:
            attention.processor = before

    handle.on_remove(undo)


def _root_hook(
    model: nn.Module, family: Family, layout: Layout, schedule: Schedule, chosen: Sequence[int]
) -> Callable[..., None]:
    """Notes grid and step before the model runs."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    said: list[int] = []

    def before(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found: list[Any] = attention_modules(model)  # of this model: a copy has the hook too
        if any(not hasattr(found[index].processor, "taken_by") for index in chosen):
            raise RuntimeError(
                "the attention processors were replaced (set_attn_processor, fuse_qkv_projections) while a method was "
                "at work: call remove() on its handle, change them, and apply the method again"
            )
        given = dict(zip(names, args, strict=False)) | kwargs
        layout.grid = family.grid(model.config, given)
        if schedule.dense_steps:
            _note_step(layout, given["timestep"])
        if layout.num_visual < schedule.dense_below and layout.num_visual not in said:
            said.append(layout.num_visual)
            log.warning(
                "attention stays dense: %d visual tokens are fewer than dense_below=%d",
                layout.num_visual, schedule.dense_below,
            )  # fmt: skip

    return before


@torch.compiler.disable  # the time step is a value
def _note_step(layout: Layout, timestep: Any) -> None:
    layout.note_step(timestep)
