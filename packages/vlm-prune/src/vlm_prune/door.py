"""The door into a vision-language model of transformers: a method at work, its report, and the way back.

`open_pruner(model, config)` is what every `apply_<method>` calls. A config is a frozen dataclass with a `name` and
`stages(num_layers)`; nothing else makes a method, so a new one is one file. One pruner works in a model at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shared_kernels.handle import Handle
from vlm_prune.families import family_of
from vlm_prune.pruner import Pruner
from vlm_prune.report import Report
from vlm_prune.square_padding import padding_ratio
from vlm_prune.stages import BEFORE, Stage
from vlm_prune.vision import VisionCall

_SUPPORTED_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


@runtime_checkable
class Method(Protocol):
    """Settings of a method."""

    @property
    def name(self) -> str:
        """For messages and reports."""
        ...

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """When and how tokens are dropped in a language model of that many layers."""
        ...


@dataclass
class PruneHandle(Handle):
    """A pruning method at work. `remove()` undoes it, leaving the `with` block does too.

    layers_changed: the language layers that see fewer tokens.
    """

    pruner: Pruner = field(default=None, repr=False)  # type: ignore[assignment] # Handle's last field has a default

    def __enter__(self) -> "PruneHandle":
        return self

    @property
    def report(self) -> Report:
        """Counts of the last prompt. RuntimeError before the first, and after one without images."""
        if self.pruner.report is None:
            raise RuntimeError("no prompt with images was read inside the block yet, so there is nothing to report")
        return self.pruner.report

    def set_image_sizes(self, sizes: Sequence[tuple[int, int]], *, threshold: float = 0.5) -> None:
        """Says that the images of the prompts to come were padded to squares, from these (height, width).

        Patches of which more than `threshold` is border then count as padding (Attention Debiasing, arXiv:2508.17807,
        suppresses their attention). One size for each image, in the order of the prompts; an empty list ends it.
        """
        fixed = [(int(h), int(w)) for h, w in sizes]
        if any(h < 1 or w < 1 for h, w in fixed):
            raise ValueError(f"sizes must be (height, width) of at least 1, got {fixed}")

        def padding(call: VisionCall) -> Tensor:
            patches = call.family.patches(call)
            if len(fixed) != patches.shape[0] or call.family.one_sequence:
                raise ValueError(
                    f"{len(fixed)} image sizes for {patches.shape[0]} views: square padding is for families that show "
                    "each image once (LLaVA, PaliGemma, Gemma3)"
                )
            side = int(patches.shape[1] ** 0.5)
            ratio = torch.stack([padding_ratio(size, side).flatten() for size in fixed])
            return (ratio > threshold).to(patches.device, torch.float32)

        self.pruner.padding_of = padding if fixed else None


def open_pruner(model: nn.Module, config: Method) -> PruneHandle:
    """Puts a method to work in a model until the handle is removed.

    TypeError on what is no transformers model or no method, ValueError on a family that is not supported, on a model
    that prunes already, and on stages that the model cannot have.
    """
    if not isinstance(config, Method):
        raise TypeError(f"config must be a method's config, got {type(config).__name__}")
    host, base, family = family_of(model)
    decoder = base.get_decoder()
    if getattr(host, "vlm_prune", None) is not None:
        raise ValueError(
            f"{host.vlm_prune} is at work in this model already; leave its block, or call remove() on its handle first"
        )
    implementation = decoder.config._attn_implementation
    if implementation not in _SUPPORTED_ATTENTION:
        raise ValueError(
            f"attention {implementation!r} is not supported while tokens are dropped; call "
            f"model.set_attn_implementation() with one of {', '.join(_SUPPORTED_ATTENTION)}"
        )
    num_layers = len(decoder.layers)
    stages = config.stages(num_layers)
    check_stages(stages, num_layers)
    pruner = Pruner(host, base, family, config.name, stages)
    first = min((stage.after_layer for stage in stages), default=num_layers)
    handle = PruneHandle(config.name, host, config, tuple(range(first + 1, num_layers)), pruner=pruner)
    _attach(handle, pruner)
    return handle


def _attach(handle: PruneHandle, pruner: Pruner) -> None:
    host: Any = handle.model
    handle.on_remove(lambda: _detach(pruner))
    host.vlm_prune = handle.name
    handle.on_remove(lambda: delattr(host, "vlm_prune"))
    try:
        pruner.attach()
    except BaseException:
        handle.remove()
        raise


def _detach(pruner: Pruner) -> None:
    while pruner.undo:
        pruner.undo.pop()()


def check_stages(stages: tuple[Stage, ...], num_layers: int) -> None:
    """ValueError where stages are not in order, twice at one place, or where nothing is left to save."""
    layers = [stage.after_layer for stage in stages]
    if layers != sorted(set(layers)):
        raise ValueError(f"stages must be in the order of layers and not twice behind one, got {layers}")
    if layers and not (layers[0] >= BEFORE and layers[-1] <= num_layers - 2):
        raise ValueError(
            f"stages must be behind layers {BEFORE} (before the first) to {num_layers - 2} of a language model of "
            f"{num_layers} layers, got {layers}"
        )
    for stage in stages:
        language = stage.criterion.needs & {"attention", "next_attention"}
        if language and stage.after_layer == BEFORE:
            raise ValueError(f"{stage.criterion.name} reads language attention, which there is none of before layer 0")


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """A schedule written out: stages with criteria of your own."""

    name: ClassVar[str] = "stages"

    chosen: tuple[Stage, ...]
    """Stages in the order of layers."""

    def stages(self, num_layers: int) -> tuple[Stage, ...]:  # noqa: ARG002
        """As written."""
        return self.chosen


def apply_stages(model: nn.Module, config: StagesConfig) -> PruneHandle:
    """Drops tokens at stages of your own."""
    return open_pruner(model, config)
