"""Which keys each query row may see, as an interval of keys per row, and the checks of the arguments that say so.

An interval covers causal attention, sliding windows and any choice of query rows, and costs a kernel two integers per
row. Keys that are no tokens (padding) are masked on top of it.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def key_bounds(
    positions: Int[Tensor, "*B R"], num_rows: int, num_keys: int, *, causal: bool, window: int | None = None
) -> Int[Tensor, "B R 2"] | None:
    """First key that each row sees, and the one past the last; None if every row sees all.

    `positions` are the places of the rows among `num_rows` queries, aligned bottom-right with the keys: row i sees keys
    up to i + num_keys - num_rows, with a window only so many of them. int32; B is 1 if all batches share the rows.
    """
    if not causal:
        return None
    last = positions + (num_keys - num_rows + 1)
    first = torch.zeros_like(last) if window is None else last - window
    bounds = torch.stack([first, last], -1).clamp(0, num_keys).to(torch.int32)
    return bounds if bounds.ndim == 3 else bounds[None]


def visible_keys(bounds: Int[Tensor, "B R 2"], num_keys: int) -> Bool[Tensor, "B R Nk"]:
    """The intervals as a mask, for a few rows at a time."""
    keys = torch.arange(num_keys, device=bounds.device)
    return (keys >= bounds[..., :1]) & (keys < bounds[..., 1:])


def check_query_key(query: Tensor, key: Tensor, scale: float | None) -> None:
    """Raises TypeError on what is no floating-point tensor, ValueError on shapes, dtypes or devices that disagree."""
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, tokens, head_dim), got {tuple(tensor.shape)}")
    if key.dtype != query.dtype or key.device != query.device:
        raise ValueError(f"key must be {query.dtype} on {query.device} like query, got {key.dtype} on {key.device}")
    (B, H, _, D), (Bk, Hkv, _, Dk) = query.shape, key.shape
    if (Bk, Dk) != (B, D):
        raise ValueError(f"key must have batch {B} and head_dim {D} like query, got {Bk} and {Dk}")
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"key must have a number of heads that divides the {H} of query, got {Hkv}")
    if not 1 <= D <= 256:
        raise ValueError(f"query must have a head_dim of 1 to 256, got {D}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")


def check_visibility(key: Tensor, causal: bool, window: int | None, key_mask: Tensor | None) -> None:
    """Raises TypeError or ValueError on a window without causal or out of range, and a mask that does not fit."""
    if window is not None:
        if not causal:
            raise ValueError("window needs causal=True: it counts back from the last key that a row sees")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
    if key_mask is not None:
        check_tensor("key_mask", key_mask, (key.shape[0], key.shape[2]), key.device, torch.bool)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype) -> None:
    """Raises TypeError or ValueError naming the argument; without dtypes, any floating-point one is allowed."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not (tensor.dtype in dtypes if dtypes else tensor.is_floating_point()):
        allowed = " or ".join(map(str, dtypes)) or "a floating-point dtype"
        raise TypeError(f"{name} must be of {allowed}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of query, {device}, got {tensor.device}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
