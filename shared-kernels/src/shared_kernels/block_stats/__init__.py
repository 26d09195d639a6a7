"""block_stats: mean and mean absolute deviation of every block of tokens, in one pass.

What block-sparse attention estimates the attention between blocks from: SLA (arXiv:2509.24006) and Rectified SpaAttn
(arXiv:2511.19835) pool queries and keys to their means, and the latter bounds the error of that by the deviations.

Decided here: the last block of a sequence is divided by the tokens it has, not by the block size, so padding does not
pull its mean towards zero. Statistics are float32 at least, whatever x is.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import TOKENS, check_optional, check_shape, check_tensors, check_whole_number
from shared_kernels.block_stats import reference

NAME = "block_stats"
_FLOPS = 4  # per number: one to sum it, three for its distance from the mean, the amount of that and its sum


class BlockStats(NamedTuple):
    """Statistics of blocks, nb = ceil(N / block_size), in float32 at least; 0 for blocks without tokens."""

    mean: Float[Tensor, "B H nb D"]
    deviation: Float[Tensor, "B H nb D"]
    """Mean over the block's tokens of |x - mean|."""


_forward = _backend.library_op(NAME, "forward", "(Tensor x, Tensor? lengths, SymInt block_size) -> (Tensor, Tensor)")


@_forward.register_fake
def _(x: Tensor, lengths: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    shape = (*x.shape[:2], -(-x.shape[2] // block_size), x.shape[3])
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide)


_backward = _backend.library_op(
    NAME,
    "backward",
    "(Tensor d_mean, Tensor d_deviation, Tensor x, Tensor? lengths, Tensor mean, SymInt block_size) -> Tensor",
)


@_backward.register_fake
def _(d_mean: Tensor, d_deviation: Tensor, x: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, lengths, ctx.block_size = inputs
    ctx.save_for_backward(x, lengths, output[0])


def _differentiate(ctx: Any, d_mean: Tensor, d_deviation: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(d_mean, d_deviation, *ctx.saved_tensors, ctx.block_size), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.shared_kernels.block_stats)
def _flops(x_shape: torch.Size, *_: Any, **__: Any) -> int:
    return _FLOPS * x_shape.numel()


@register_flop_formula(torch.ops.shared_kernels.block_stats_backward)
def _backward_flops(*shapes: Any, **_: Any) -> int:
    return _FLOPS * shapes[2].numel()


def block_stats(x: Float[Tensor, "B H N D"], *, block_size: int, lengths: Int[Tensor, "B"] | None = None) -> BlockStats:
    """Mean and mean absolute deviation, per dimension, of every run of `block_size` tokens.

    mean_b = 1/n_b sum_{i in b} x_i,  deviation_b = 1/n_b sum_{i in b} |x_i - mean_b|,  n_b the tokens of block b: fewer
    at the end of a sequence. Of sequence i only the first lengths[i] tokens count; what stands behind them has no
    influence, NaN included, and blocks without tokens are 0. A length above N is N, one below 0 is 0.

    Differentiable once in x. Where a token equals the mean, |x_i - mean| takes the gradient 0.

    Raises TypeError unless x is floating-point and lengths integer, ValueError on other shapes, devices, or a block
    size below 1.
    """
    check_tensors({"x": x})
    check_shape("x", x, *TOKENS)
    check_whole_number("block_size", block_size, 1)
    check_optional("lengths", lengths, (x.shape[0],), x.device, torch.int32, torch.int64)
    if _backend.forced == "reference":
        return BlockStats(*reference.block_stats(x, block_size=block_size, lengths=lengths))
    return BlockStats(*_forward(x, lengths, block_size))
