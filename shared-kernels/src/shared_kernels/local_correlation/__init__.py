"""local_correlation: every pixel's feature against those of a window around the same place in another map.

The windowed cost volume of optical flow and stereo: FlowNet (Dosovitskiy et al., ICCV 2015, arXiv:1504.06852) and
PWC-Net (Sun et al., CVPR 2018, arXiv:1709.02371), which warp the second map by the flow so far; RAFT's lookup at whole
displacements. Composed from torch it unfolds the second map, (2 radius + 1)^2 copies of it.

Decided here: offsets run through the window row by row, as unfold has them; the scale is 1 / sqrt(C) unless given
(PWC-Net: 1 / C); outside the map everything is 0; float32 at least inside, the result in the maps' dtype.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import check_same_dtype, check_scale, check_shape, check_tensors, check_whole_number
from shared_kernels.local_correlation import reference

NAME = "local_correlation"
_LARGEST_RADIUS = 15


_forward = _backend.library_op(NAME, "forward", "(Tensor source, Tensor target, SymInt radius, float scale) -> Tensor")


@_forward.register_fake
def _(source: Tensor, _target: Tensor, radius: int, _scale: float) -> Tensor:
    B, _C, H, W = source.shape
    return source.new_empty((B, (2 * radius + 1) ** 2, H, W))


_backward = _backend.library_op(
    NAME,
    "backward",
    "(Tensor d_out, Tensor source, Tensor target, SymInt radius, float scale) -> (Tensor, Tensor)",
)


@_backward.register_fake
def _(_d_out: Tensor, source: Tensor, target: Tensor, _radius: int, _scale: float) -> tuple[Tensor, Tensor]:
    return source.new_empty(source.shape), target.new_empty(target.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    source, target, ctx.radius, ctx.scale = inputs
    ctx.save_for_backward(source, target)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(d_out, *ctx.saved_tensors, ctx.radius, ctx.scale), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.shared_kernels.local_correlation)
def _flops(source_shape: torch.Size, _target_shape: torch.Size, radius: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(source_shape) * (2 * radius + 1) ** 2


@register_flop_formula(torch.ops.shared_kernels.local_correlation_backward)
def _backward_flops(
    _d_out_shape: torch.Size, source_shape: torch.Size, _target: Any, radius: int, *_: Any, **__: Any
) -> int:
    return 4 * math.prod(source_shape) * (2 * radius + 1) ** 2


def local_correlation(
    source: Float[Tensor, "B C H W"],
    target: Float[Tensor, "B C H W"],
    *,
    radius: int,
    scale: float | None = None,
) -> Float[Tensor, "B K H W"]:
    """scale * <source at (y, x), target at (y + dy, x + dx)> for all |dy|, |dx| <= radius; 0 outside the map.

    K = (2 radius + 1)^2; channel (dy + radius) * (2 radius + 1) + dx + radius holds (dy, dx). `scale` is 1 / sqrt(C)
    unless given. Any strides and any floating dtype (no float64 on a GPU). Differentiable once in source and target.

    For cosines normalise the maps before; for windows that follow a flow warp the target by it before.

    Raises TypeError on what is not a floating-point tensor and on mixed dtypes, ValueError on other shapes, maps that
    differ in shape or device, or a radius outside 0 to 15.
    """
    maps = {"source": source, "target": target}
    check_tensors(maps)
    check_same_dtype(maps)
    check_shape("source", source, "B", "C", "H", "W")
    check_shape("target", target, *source.shape)
    if source.shape[1] == 0:
        raise ValueError("source must have at least one channel, got 0")
    check_whole_number("radius", radius, 0, _LARGEST_RADIUS)
    check_scale(scale)
    scale = source.shape[1] ** -0.5 if scale is None else scale
    if _backend.forced == "reference":
        return reference.local_correlation(source, target, radius=radius, scale=scale)
    source, target = _backend.autocast(source, target)
    return _forward(source, target, radius, scale)
