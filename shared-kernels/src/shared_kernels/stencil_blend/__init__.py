"""stencil_blend: the magnitude of two 3x3 correlations, blended with the image, in one pass.

The operator layer of DFYP (Zhang et al., "DFYP: A Dynamic Fusion Framework with Spectral Channel Attention and Adaptive
Operator Learning for Crop Yield Prediction", arXiv:2507.05849, section on AOL-Net); with Sobel kernels and weight 1 it
is the usual edge map. Composed from torch it costs about seven passes over memory and two depthwise convolutions.

Decided here: the registered op knows `edge * magnitude + keep * x` only, with edge = weight * gain and keep =
1 - weight; weight, gain and luma are a few scalar or elementwise torch operations around it. Everything is computed in
float32 at least, also under autocast.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import check_optional, check_positive, check_shape, check_tensors
from shared_kernels.stencil_blend import reference

NAME = "stencil_blend"
_FLOPS_OF_CORRELATIONS = 2 * 2 * 9  # two kernels, a multiplication and an addition for each of nine taps


_forward = _backend.library_op(
    NAME,
    "forward",
    "(Tensor x, Tensor kernel_x, Tensor kernel_y, Tensor edge, Tensor keep, float eps) -> Tensor",
)


@_forward.register_fake
def _(x: Tensor, *_: Tensor | float) -> Tensor:
    return x.new_empty(x.shape)


_backward = _backend.library_op(
    NAME,
    "backward",
    "(Tensor d_out, Tensor x, Tensor kernel_x, Tensor kernel_y, Tensor edge, Tensor keep, float eps, "
    "bool kernels_too) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(_: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:5])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    kernels_too = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]  # fixed kernels spare 18 sums over the image
    return *_backward(d_out, *ctx.saved_tensors, ctx.eps, kernels_too), None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.shared_kernels.stencil_blend)
def _flops(x_shape: torch.Size, *_: Any, **__: Any) -> int:
    return _FLOPS_OF_CORRELATIONS * math.prod(x_shape)


@register_flop_formula(torch.ops.shared_kernels.stencil_blend_backward)
def _backward_flops(x_shape: torch.Size, *rest: Any, **_: Any) -> int:
    # the forward correlations again, their transposes, and perhaps the gradients of the kernels
    return (3 if rest[-1] else 2) * _FLOPS_OF_CORRELATIONS * math.prod(x_shape)


def stencil_blend(
    x: Float[Tensor, "N C H W"],
    kernel_x: Float[Tensor, "3 3"],
    kernel_y: Float[Tensor, "3 3"],
    weight: Float[Tensor, ""],
    *,
    gain: Float[Tensor, ""] | None = None,
    eps: float = 1e-8,
    luma: Float[Tensor, "C"] | None = None,
) -> Float[Tensor, "N C H W"]:
    """weight * gain * m + (1 - weight) * x,  with  m = sqrt((kernel_x * x)^2 + (kernel_y * x)^2 + eps).

    `*` inside m is cross-correlation of every plane with the same 3x3 kernel, zeros outside the image. With `luma`, m
    is one map per image, that of  sum_c luma_c x_c  (Sentinel-2 form of DFYP: 0.299, 0.587, 0.114), blended into every
    channel. Differentiable once in x, kernel_x, kernel_y, weight, gain and luma.

    x may be of any floating dtype and any strides; the output is contiguous and of x's dtype, computed in float32 at
    least. The small tensors may have another floating dtype but must be on x's device. On a CPU the values of the
    kernels are read: zeros cost nothing, and separable kernels (Sobel, Scharr and their blends) cost half. A zero times
    an infinity is therefore not promised to be NaN.

    Raises TypeError on what is not a floating-point tensor, ValueError on other shapes, mixed devices or eps <= 0.
    """
    _check(x, kernel_x, kernel_y, weight, gain, luma)
    check_positive("eps", eps)  # where both correlations are 0, the magnitude has no gradient without
    if _backend.forced == "reference":
        return reference.stencil_blend(x, kernel_x, kernel_y, weight, gain=gain, eps=eps, luma=luma)
    acc = torch.promote_types(x.dtype, torch.float32)
    kernel_x, kernel_y, weight = kernel_x.to(acc), kernel_y.to(acc), weight.to(acc)
    edge = weight if gain is None else weight * gain.to(acc)
    if luma is None:
        return _forward(x, kernel_x, kernel_y, edge, 1 - weight, eps)
    wide = x.to(acc)
    plane = (luma.to(acc)[:, None, None] * wide).sum(1, keepdim=True)
    magnitude = _forward(plane, kernel_x, kernel_y, edge, torch.zeros_like(edge), eps)
    return torch.addcmul(magnitude, wide, 1 - weight).to(x.dtype)


def _check(
    x: Tensor, kernel_x: Tensor, kernel_y: Tensor, weight: Tensor, gain: Tensor | None, luma: Tensor | None
) -> None:
    check_tensors({"x": x, "kernel_x": kernel_x, "kernel_y": kernel_y, "weight": weight})
    check_shape("x", x, "N", "C", "H", "W")
    check_shape("kernel_x", kernel_x, 3, 3)
    check_shape("kernel_y", kernel_y, 3, 3)
    check_shape("weight", weight)
    check_optional("gain", gain, (), x.device)
    check_optional("luma", luma, (x.shape[1],), x.device)
