"""The families of diffusers transformers: which layers attend among visual tokens, and where text stands.

A family is a row of `FAMILIES`: to add one, say where its attention modules are, on which side of the sequence text
tokens stand when they meet attention, and how the grid of visual tokens follows from what the model is called with.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion_attn.token_order import Grid

Given = Mapping[str, Any]
"""What a model is called with, by name."""


@dataclass(frozen=True)
class Family:
    """One class of diffusers models."""

    layers: tuple[str, ...]
    """Where the attention modules are: `list.attribute` of every block of a module list."""
    text: Literal["none", "first", "last"]
    """Where text tokens stand in the sequence that attends."""
    grid: Callable[[Any, Given], Grid]
    """Frames, rows and columns of visual tokens, from the model's config and what it is called with."""


def _video_grid(config: Any, given: Given) -> Grid:
    """(B, C, T, H, W) and a patch size per axis, or per plane and time."""
    frames, rows, columns = given["hidden_states"].shape[2:]
    size = config.patch_size
    t, h, w = size if not isinstance(size, int) else (getattr(config, "patch_size_t", None) or 1, size, size)
    return frames // t, rows // h, columns // w


def _frames_first_grid(config: Any, given: Given) -> Grid:
    """(B, T, C, H, W)."""
    _, frames, _, rows, columns = given["hidden_states"].shape
    return frames // (config.patch_size_t or 1), rows // config.patch_size, columns // config.patch_size


def _image_grid(config: Any, given: Given) -> Grid:
    """(B, C, H, W)."""
    rows, columns = given["hidden_states"].shape[2:]
    return 1, rows // config.patch_size, columns // config.patch_size


def _stated_grid(_: Any, given: Given) -> Grid:
    """Tokens come in a row, with their numbers beside them."""
    return given["num_frames"], given["height"], given["width"]


@torch.compiler.disable  # the size stands in the values
def _grid_of_ids(_: Any, given: Given) -> Grid:
    """Image ids (S, 3): frame, row and column of each token."""
    ids: Tensor = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    frames, rows, columns = (int(n) + 1 for n in ids.amax(0).tolist()[-3:])
    if frames * rows * columns != ids.shape[0]:
        raise ValueError(
            f"img_ids of {ids.shape[0]} tokens are no grid of {frames} x {rows} x {columns}: several pictures in one "
            "sequence are not supported"
        )
    return frames, rows, columns


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": Family(("blocks.attn1",), "none", _video_grid),
    "HunyuanVideoTransformer3DModel": Family(
        ("transformer_blocks.attn", "single_transformer_blocks.attn"), "last", _video_grid
    ),
    "FluxTransformer2DModel": Family(
        ("transformer_blocks.attn", "single_transformer_blocks.attn"), "first", _grid_of_ids
    ),
    "SD3Transformer2DModel": Family(("transformer_blocks.attn", "transformer_blocks.attn2"), "last", _image_grid),
    "CogVideoXTransformer3DModel": Family(("transformer_blocks.attn1",), "first", _frames_first_grid),
    "MochiTransformer3DModel": Family(("transformer_blocks.attn1",), "last", _video_grid),
    "LTXVideoTransformer3DModel": Family(("transformer_blocks.attn1",), "none", _stated_grid),
}


def family_of(model: nn.Module) -> Family:
    """The row of `FAMILIES` for a model. TypeError, with those there are, on any other."""
    family = FAMILIES.get(type(model).__name__)
    if family is None:
        raise TypeError(
            f"{type(model).__name__} is not supported; give the transformer of a pipeline, one of {', '.join(FAMILIES)}"
        )
    return family


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The layers in which visual tokens attend to each other, in the order in which they run."""
    found: list[nn.Module] = []
    lists: dict[str, list[str]] = {}
    for path in family_of(model).layers:
        blocks, _, attribute = path.partition(".")
        lists.setdefault(blocks, []).append(attribute)
    for blocks, attributes in lists.items():
        for block in getattr(model, blocks):
            found += [getattr(block, name) for name in attributes if getattr(block, name, None) is not None]
    return found
