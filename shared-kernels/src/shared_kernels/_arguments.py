"""Checks of arguments that several ops have: one wording for one mistake.

Each names the argument, what is allowed and what was given. What is no tensor, no number or of another dtype is a
TypeError, what has another shape, device or range a ValueError. No value of a tensor is read, so no GPU is waited for.
"""

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from shared_kernels._backend import autocast_dtype

TOKENS = ("batch", "heads", "tokens", "head_dim")
MAPS = ("batch", "heads", "rows", "columns", "head_dim")
WIDEST = 256
"""Columns of a head for which kernels have tiles."""


def check_tensors(tensors: Mapping[str, Any], *dtypes: torch.dtype, device: torch.device | None = None) -> None:
    """All are tensors of one of the dtypes (any floating-point one unless given), on `device` or that of the first."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not (tensor.dtype in dtypes if dtypes else tensor.is_floating_point()):
            allowed = " or ".join(map(str, dtypes)) or "a floating-point dtype"
            raise TypeError(f"{name} must be of {allowed}, got {tensor.dtype}")
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like the other tensors, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, *sizes: int | str) -> None:
    """Sizes are numbers, or names for those that are free."""
    wrong = [n for n, size in zip(tensor.shape, sizes, strict=False) if not isinstance(size, str) and n != size]
    if wrong or tensor.ndim != len(sizes):
        wanted = ", ".join(map(str, sizes)) + ("," if len(sizes) == 1 else "")
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")


def check_optional(
    name: str, tensor: Any, sizes: tuple[int | str, ...], device: torch.device, *dtypes: torch.dtype
) -> None:
    """None, or a tensor as `check_tensors` and `check_shape` want it."""
    if tensor is not None:
        check_tensors({name: tensor}, *dtypes, device=device)
        check_shape(name, tensor, *sizes)


def check_broadcasts(name: str, tensor: Tensor, *sizes: int) -> None:
    """The shape broadcasts to these sizes, which it does not enlarge."""
    fits = zip(reversed(tensor.shape), reversed(sizes), strict=False)
    if tensor.ndim > len(sizes) or not all(n in (1, size) for n, size in fits):
        raise ValueError(f"{name} must have a shape that broadcasts to {tuple(sizes)}, got {tuple(tensor.shape)}")


def check_same_dtype(tensors: Mapping[str, Tensor]) -> None:
    """All have the dtype of the first, once autocast has cast them."""
    (first, like), *others = tensors.items()
    for name, tensor in others:
        if autocast_dtype(tensor) != autocast_dtype(like):
            raise TypeError(f"{name} must be of the dtype of {first}, {like.dtype}, got {tensor.dtype}")


def check_attention(
    *tensors: Any, scale: float | None = None, layout: tuple[int | str, ...] = TOKENS, widest: int | None = None
) -> None:
    """Query (B, H, *, D), key (B, Hkv, *, D) and perhaps value (B, Hkv, *, E), H a multiple of Hkv, fit one another."""
    named = dict(zip(("query", "key", "value"), tensors, strict=False))
    check_tensors(named)
    for name, tensor in named.items():
        check_shape(name, tensor, *layout)
    check_same_dtype(named)
    query, key = tensors[:2]
    check_shape("key", key, query.shape[0], *layout[1:-1], query.shape[-1])
    if len(tensors) == 3:
        check_shape("value", tensors[2], *key.shape[:-1], "width")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"heads of query must be a multiple of those of key, got {query.shape[1]} and {key.shape[1]}")
    check_whole_number("head_dim of query", query.shape[-1], 1, widest)
    if widest is not None:
        check_whole_number("width of value", tensors[-1].shape[-1], 1, widest)
    check_scale(scale)


def check_visibility(key: Tensor, causal: bool, window: int | None, key_mask: Tensor | None) -> None:
    """A window needs causal, a mask has one entry for each key."""
    if window is not None:
        if not causal:
            raise ValueError("window needs causal=True: it counts back from the last key that a row sees")
        check_whole_number("window", window, 1)
    check_optional("key_mask", key_mask, (key.shape[0], key.shape[2]), key.device, torch.bool)


def check_block_size(block_size: Any) -> None:
    """Two numbers, of tokens in a block of queries and in one of keys."""
    if not isinstance(block_size, tuple | list) or len(block_size) != 2:
        raise ValueError(f"block_size must be two numbers, (block_q, block_k), got {block_size}")
    for size in block_size:
        check_whole_number("block_size", size, 1)


def check_whole_number(name: str, number: Any, low: int, high: int | None = None) -> None:
    """An int (or, while tracing, what stands for one) from low on, to high if there is one; True is none."""
    if isinstance(number, bool) or not isinstance(number, int | torch.SymInt):
        raise TypeError(f"{name} must be a whole number, got {type(number).__name__}")
    if number < low or (high is not None and number > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {allowed}, got {number}")


def check_positive(name: str, number: float) -> None:
    """Above 0 and finite."""
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be positive and finite, got {number}")


def check_scale(scale: float | None) -> None:
    """None, or a finite number."""
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def check_choice(name: str, value: Any, names: Any) -> None:
    """One of the names of a Literal."""
    if value not in get_args(names):
        raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(names)))}, got {value!r}")
