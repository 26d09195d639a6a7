"""A transformer with a method at work, on disk: an ordinary diffusers folder, and beside it which method it was.

diffusers writes the weights that a method adds, but drops them without a word when it loads: only `load_transformer`
brings them back.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
from safetensors import safe_open
from torch import Tensor, nn

from diffusion_attn.block_sparse import BlockSparseConfig, SlidingTileConfig
from diffusion_attn.diffusers.door import Schedule, VisualHandle
from diffusion_attn.diffusers.methods import (
    apply_block_sparse,
    apply_rectified_sparse,
    apply_sla,
    apply_sliding_tile,
)
from diffusion_attn.rectified_sparse import RectifiedSparseConfig
from diffusion_attn.sla import SLAConfig

_FILE = "diffusion_attn.json"


@dataclass(frozen=True)
class _Method:
    config: type
    apply: Callable[..., VisualHandle]


METHODS = {
    "rectified_sparse": _Method(RectifiedSparseConfig, apply_rectified_sparse),
    "sla": _Method(SLAConfig, apply_sla),
    "block_sparse": _Method(BlockSparseConfig, apply_block_sparse),
    "sliding_tile": _Method(SlidingTileConfig, apply_sliding_tile),
}
"""By the name that a handle has."""


def save_transformer(handle: VisualHandle, folder: Path | str) -> None:
    """Writes the model with all its weights, and `diffusion_attn.json` with the method's settings and schedule."""
    model: Any = handle.model
    folder = Path(folder)
    model.save_pretrained(folder)
    settings = {"method": handle.name, "config": asdict(handle.config), "schedule": asdict(handle.schedule)}
    part = folder / f"{_FILE}.part"
    part.write_text(json.dumps(settings, indent=1) + "\n")
    part.replace(folder / _FILE)


def load_transformer(folder: Path | str) -> tuple[nn.Module, VisualHandle]:
    """The model that `save_transformer` wrote, in eval mode, with its method at work and the method's weights.

    FileNotFoundError where there is none; ValueError on a method that this version does not know, and on weights of a
    method that are missing or of another shape.
    """
    folder = Path(folder)
    if not (folder / _FILE).exists():
        raise FileNotFoundError(f"'{folder}' holds no {_FILE}: save_transformer writes one")
    settings = json.loads((folder / _FILE).read_text())
    method = METHODS.get(settings["method"])
    if method is None:
        raise ValueError(f"'{folder}' was written with the method {settings['method']!r}; known: {', '.join(METHODS)}")
    model: nn.Module = diffusers.AutoModel.from_pretrained(str(folder))
    handle = method.apply(
        model, method.config(**_tuples(settings["config"])), schedule=Schedule(**_tuples(settings["schedule"]))
    )
    try:
        _load_own(model, _own_weights(folder), folder)
    except BaseException:
        handle.remove()
        raise
    return model, handle


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _own_weights(folder: Path) -> dict[str, Tensor]:
    """What methods added, out of one file or several."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found |= {name: weights.get_tensor(name) for name in weights.keys() if ".diffusion_attn_" in name}  # noqa: SIM118
    return found


def _load_own(model: nn.Module, found: dict[str, Tensor], folder: Path) -> None:
    wanted = {name: p for name, p in model.state_dict().items() if ".diffusion_attn_" in name}
    if wanted.keys() != found.keys():
        odd = sorted(wanted.keys() ^ found.keys())[0]
        raise ValueError(f"'{folder}' does not hold the weights of the method: {odd} is missing or superfluous")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{name} in '{folder}' has shape {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}")
    model.load_state_dict(found, strict=False)
