"""The door into a timm ViT: which models a method may change, how it is undone, and how it is saved.

A method is put into a model by giving it another class (a subclass of its own, with the same attributes) and modules of
the method's own; no block of timm is patched, and `remove()` gives the class back. What is not known to be right is
refused: patches that go through by chance are how token merging came to be silently wrong on DeiT-3 and DINOv2.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from shared_kernels.handle import Handle

SUPPORTED = (
    "timm's VisionTransformer with standard blocks and a class token: ViT, DeiT, DeiT-3, DINOv2 and CLIP, with or "
    "without LayerScale, registers, qk-norm, norm_pre and a distillation token"
)
EVA = ", or Eva with a class token: EVA, EVA-02, with rotary positions or without, SwiGLU or MLP"


@dataclass(frozen=True)
class _Method:
    config_class: type
    apply: Callable[..., Handle]


_METHODS: dict[str, _Method] = {}


def register_method(name: str, config_class: type, apply: Callable[..., Handle]) -> None:
    """Lets `load_method` open the method `name` again: `apply(model, config_class(**saved))`."""
    _METHODS[name] = _Method(config_class, apply)


def check_vit(model: Any, *, eva: bool = False) -> Any:
    """The model, if token methods are right on it. ValueError or TypeError with what is supported.

    eva: whether the method is right on timm's Eva too, whose patches carry rotary positions.
    """
    if getattr(model, "vit_efficient_method", None) is not None:
        raise ValueError(
            f"{model.vit_efficient_method} is at work in this model already; call remove() on its handle first"
        )
    supported = f"{SUPPORTED}{EVA}" if eva else SUPPORTED
    if type(model) not in (VisionTransformer, VisionTransformerDistilled, *((Eva,) if eva else ())):
        raise TypeError(f"{type(model).__name__} is not supported; supported is {supported}")
    parts = (EvaBlock, EvaAttention) if isinstance(model, Eva) else (Block, Attention)
    odd = [type(m).__name__ for b in model.blocks for m in (b, b.attn) if type(m) not in parts]
    if odd:
        raise TypeError(f"blocks of {odd[0]} are not supported; supported is {supported}")
    if isinstance(model, Eva) and (model.rope_mixed or model.patch_drop is not None):
        raise ValueError(f"Eva with positions learned by block or with patch dropout is not supported; {supported} is")
    if model.cls_token is None:
        raise ValueError(f"the model has no class token; supported is {supported}")
    prefix_pooled = getattr(model, "pool_include_prefix", False)
    if model.attn_pool is not None or model.global_pool not in ("token", "avg", "") or prefix_pooled:
        pool = "an attention pool" if model.attn_pool is not None else f"global_pool={model.global_pool!r}"
        raise ValueError(f"{pool} is not supported: VisionTransformer with 'token' or 'avg' pooling is")
    return model


def check_locations(model: Any, locations: tuple[int, ...] | None, *, first: int = 0) -> tuple[int, ...]:
    """The blocks where a method drops tokens: those given, or a quarter, a half and three quarters of the depth.

    ValueError unless they increase and lie from `first` to the last block.
    """
    depth = len(model.blocks)
    if locations is None:
        locations = tuple(sorted({max(depth * quarter // 4, first) for quarter in (1, 2, 3)}))
    if list(locations) != sorted(set(locations)) or not all(first <= place < depth for place in locations):
        raise ValueError(f"locations must be increasing blocks from {first} to {depth - 1}, got {locations}")
    return locations


def open_door(
    model: Any, name: str, config: Any, changed_class: type, modules: dict[str, nn.Module], layers: Any
) -> Handle:
    """Gives a checked model another class and the modules of a method, on its device and in its dtype.

    changed_class: a subclass of the model's class that finds `modules` as attributes.
    """
    handle = Handle(name, model, config, tuple(layers))
    before, weight = type(model), next(model.parameters())
    for key, module in modules.items():
        model.add_module(key, module.to(weight.device))
        handle.on_remove(lambda key=key: delattr(model, key))  # type: ignore[misc]
    model.vit_efficient_method = name
    handle.on_remove(lambda: delattr(model, "vit_efficient_method"))
    model.__class__ = changed_class
    handle.on_remove(lambda: setattr(model, "__class__", before))
    return handle


def save_method(handle: Handle, folder: Path) -> None:
    """Writes `method.json` (name and settings) and `model.safetensors` (all weights, host and method) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in handle.model.state_dict().items()}
    save_file(weights, folder / "model.safetensors.part")
    (folder / "model.safetensors.part").replace(folder / "model.safetensors")
    (folder / "method.json.part").write_text(
        json.dumps({"name": handle.name, "config": asdict(handle.config)}, indent=2)
    )
    (folder / "method.json.part").replace(folder / "method.json")


def load_method(model: nn.Module, folder: Path) -> Handle:
    """Opens the saved method in a fresh host of the same architecture and loads all weights.

    Raises FileNotFoundError, and ValueError on a method that this version does not know or weights of another shape.
    """
    path = folder / "method.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no method.json; save_method writes one")
    saved = json.loads(path.read_text())
    if saved["name"] not in _METHODS:
        raise ValueError(f"{path} is of method {saved['name']}; known are {', '.join(sorted(_METHODS))}")
    method = _METHODS[saved["name"]]
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in saved["config"].items()}
    handle = method.apply(model, method.config_class(**config))
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as problem:
        handle.remove()
        raise ValueError(
            f"{folder} was saved from another architecture: {str(problem).splitlines()[1].strip()}"
        ) from problem
    return handle
