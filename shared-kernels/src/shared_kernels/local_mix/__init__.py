"""local_mix: every pixel a weighted sum of cells near its own, with weights that are given.

Each cell of a low-resolution map is cut into factor x factor pixels; a pixel's weights, one for each of n fixed
offsets, come from outside, so there is no product of queries and keys. This is
- the local attender of UPLiFT (Walmer et al., "UPLiFT: Efficient Pixel-Dense Feature Upsampling with Local Attenders",
  arXiv:2601.17950), the edge replicated;
- the reassembly of CARAFE (Wang et al., arXiv:1905.02188), offsets = its k, border="zero"; groups are batches;
- the convex upsampling of RAFT (Teed and Deng, arXiv:2003.12039), factor 8, offsets 3, border="zero", of 8 * flow, with
  logits = pixel_shuffle(mask, 8);
- at factor 1 a convolution with a kernel for each pixel.

Decided here: the output's memory is channels-last where value's is, which is the form that everything is computed in.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import check_choice, check_shape, check_tensors, check_whole_number
from shared_kernels.local_mix import reference

__all__ = ["local_mix"]

NAME = "local_mix"
Border = Literal["replicate", "zero"]
Offsets = Sequence[tuple[int, int]]


_forward = _backend.library_op(
    NAME,
    "forward",
    "(Tensor value, Tensor logits, SymInt[] offsets, SymInt factor, bool softmax, bool replicate) -> (Tensor, Tensor)",
)
"""Value (B, h, w, C) to output (B, H, W, C) and, with softmax, the maximum and 1 / sum behind it, (2, B, H, W)."""


@_forward.register_fake
def _(value: Tensor, logits: Tensor, offsets: list[int], factor: int, softmax: bool, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    B, height, width = logits.shape[0], *logits.shape[2:]
    wide = torch.promote_types(value.dtype, torch.float32)
    stats = logits.new_empty((2, B, height, width) if softmax else (0,), dtype=wide)
    return value.new_empty((B, height, width, value.shape[3])), stats


_backward = _backend.library_op(
    NAME,
    "backward",
    "(Tensor d_out, Tensor value, Tensor logits, Tensor stats, SymInt[] offsets, SymInt factor, bool softmax, "
    "bool replicate) -> (Tensor, Tensor)",
)


@_backward.register_fake
def _(d_out: Tensor, value: Tensor, logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return value.new_empty(value.shape), logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    value, logits, *ctx.rest = inputs
    ctx.save_for_backward(value, logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(d_out, *ctx.saved_tensors, *ctx.rest), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.shared_kernels.local_mix)
def _flops(value_shape: torch.Size, logits_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(logits_shape) * value_shape[3]


@register_flop_formula(torch.ops.shared_kernels.local_mix_backward)
def _backward_flops(*inputs: Any, **_: Any) -> int:
    return 4 * math.prod(inputs[2]) * inputs[1][3]


def local_mix(
    value: Float[Tensor, "B C h w"],
    logits: Float[Tensor, "B n H W"],
    offsets: Offsets | int,
    *,
    factor: int = 1,
    softmax: bool = True,
    border: Border = "replicate",
) -> Float[Tensor, "B C H W"]:
    """out[b, c, y, x] = sum over offsets k of weight[b, k, y, x] * value[b, c, y // factor + dy_k, x // factor + dx_k].

    H = factor * h, W = factor * w. `offsets` are n pairs (dy, dx) in cells, or an odd number k for the k x k square in
    row-major order. Weights are the softmax of logits over k, or with softmax=False the logits themselves. Outside the
    map lies its nearest edge cell ("replicate") or zero.

    Returns value's dtype, computed in float32 at least, channels-last in memory if value is. Logits may be of another
    floating-point dtype. Differentiable once in value and logits.

    Raises TypeError on what is not a floating-point tensor or whole numbers, ValueError on shapes or devices that
    disagree, and on a factor or border that does not exist.
    """
    pairs = _pairs(offsets)
    check_tensors({"value": value, "logits": logits})
    check_shape("value", value, "batch", "channels", "rows", "columns")
    check_whole_number("factor", factor, 1)
    check_choice("border", border, Border)
    B, _, rows, columns = value.shape
    check_shape("logits", logits, B, len(pairs), factor * rows, factor * columns)
    (value,) = _backend.autocast(value)
    if _backend.forced == "reference":
        return reference.local_mix(value, logits, pairs, factor=factor, softmax=softmax, border=border)
    flat = [number for pair in pairs for number in pair]
    out, _ = _forward(value.permute(0, 2, 3, 1), logits, flat, factor, softmax, border == "replicate")
    out = out.permute(0, 3, 1, 2)
    return out if value.is_contiguous(memory_format=torch.channels_last) else out.contiguous()


def _pairs(offsets: Offsets | int) -> list[tuple[int, int]]:
    if isinstance(offsets, int):
        check_whole_number("offsets", offsets, 1)
        if offsets % 2 == 0:
            raise ValueError(f"offsets must be pairs, or an odd number for a square, got {offsets}")
        reach = range(-(offsets // 2), offsets // 2 + 1)
        return [(dy, dx) for dy in reach for dx in reach]
    pairs = [tuple(pair) for pair in offsets]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"offsets must be pairs (dy, dx), at least one, got {offsets!r}")
    if not all(isinstance(number, int) and not isinstance(number, bool) for pair in pairs for number in pair):
        raise TypeError(f"offsets must be whole numbers of cells, got {offsets!r}")
    return pairs  # type: ignore[return-value]
