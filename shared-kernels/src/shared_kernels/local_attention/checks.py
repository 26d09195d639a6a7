"""What both functions of this folder demand of their arguments."""

import math

import torch
from torch import Tensor


def check_maps(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> None:
    """Query, key and value are (batch, heads, rows, columns, width) of one dtype and device, and fit one another."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_float_tensor(name, tensor, query)
        if tensor.ndim != 5:
            raise ValueError(f"{name} must be (batch, heads, rows, columns, width), got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"{name} must be of query's dtype, {query.dtype}, got {tensor.dtype}")
    B, H, *_, D = query.shape
    if key.shape[0] != B or key.shape[4] != D or D == 0:
        raise ValueError(
            f"key must be ({B}, heads, rows, columns, {D}) to query's {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if value.shape[:4] != key.shape[:4]:
        raise ValueError(f"value must be {tuple(key.shape[:4])} + (width,) as key is, got {tuple(value.shape)}")
    if key.shape[1] == 0 or H % key.shape[1]:
        raise ValueError(f"query's heads must be a multiple of key's, got {H} and {key.shape[1]}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def check_float_tensor(name: str, tensor: Tensor, query: Tensor) -> None:
    """Raise TypeError or ValueError unless the tensor is floating-point and on query's device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")


def check_whole_number(name: str, number: int, low: int) -> None:
    """Raise TypeError on what is no int, ValueError on one below `low`."""
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be a whole number, got {type(number).__name__}")
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {number}")
