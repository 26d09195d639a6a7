"""neighborhood_attention: softmax attention of every query to the k x k keys around it.

Hassani et al., "Neighborhood Attention Transformer", arXiv:2204.07143: near the border of the map a neighbourhood is
moved inside, so that all have k x k keys. The bias by relative position is that paper's, one table per head.

Decided here: one k for rows and columns, no dilation. An even k reaches one key further to the top and left.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import (
    MAPS,
    check_attention,
    check_optional,
    check_shape,
    check_whole_number,
)
from shared_kernels.local_attention import reference

FOLDER = "local_attention"


_forward = _backend.library_op(
    FOLDER,
    "neighborhood",
    "(Tensor query, Tensor key, Tensor value, Tensor? bias, SymInt kernel_size, float scale) -> (Tensor, Tensor)",
)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((*query.shape[:4], value.shape[4])), query.new_empty(query.shape[:4], dtype=wide)


_backward = _backend.library_op(
    FOLDER,
    "neighborhood_backward",
    "(Tensor d_out, Tensor delta, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor lse, "
    "SymInt kernel_size, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(d_out: Tensor, delta: Tensor, *inputs: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    *tensors, lse = inputs[:5]
    return tuple(lse.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kernel_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, bias, out, lse = ctx.saved_tensors
    delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - d_lse
    gradients = _backward(d_out, delta, query, key, value, bias, lse, ctx.kernel_size, ctx.scale)
    return *gradients[:3], None if bias is None else gradients[3], None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.shared_kernels.local_attention_neighborhood)
def _flops(
    query_shape: torch.Size, key_shape: torch.Size, value_shape: torch.Size, *rest: Any, **_: Any  # noqa: ARG001
) -> int:  # fmt: skip
    return 2 * query_shape[:4].numel() * rest[1] ** 2 * (query_shape[4] + value_shape[4])


@register_flop_formula(torch.ops.shared_kernels.local_attention_neighborhood_backward)
def _backward_flops(*inputs: Any, **_: Any) -> int:
    query_shape, value_shape, k = inputs[2], inputs[4], inputs[7]
    return 2 * query_shape[:4].numel() * k**2 * (3 * query_shape[4] + 2 * value_shape[4])


def neighborhood_attention(
    query: Float[Tensor, "B H R C D"],
    key: Float[Tensor, "B Hkv R C D"],
    value: Float[Tensor, "B Hkv R C E"],
    *,
    kernel_size: int,
    bias: Float[Tensor, "H P P"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B H R C E"] | tuple[Float[Tensor, "B H R C E"], Float[Tensor, "B H R C"]]:
    """Softmax attention of the query at (i, j) to the k x k keys around (i, j), k = `kernel_size`.

    Along a side of n positions, the keys of query i are the k from  min(max(i - k // 2, 0), n - k)  on: NATTEN's
    definition. With `bias` (P = 2k - 1), the key at (a, c) scores  scale * q . k + bias[head, a - i + k - 1,
    c - j + k - 1].  `scale` is 1/sqrt(D) unless given. Query heads are a multiple of key heads.

    Returns the output, contiguous and of query's dtype, and with `return_lse` the natural log-sum-exp of the scores, in
    float32 at least. Differentiable once in query, key, value and bias, through both outputs.

    Raises TypeError on what is not a floating-point tensor or a whole number, ValueError on shapes or devices that
    disagree and on a neighbourhood larger than the map.
    """
    check_attention(query, key, value, scale=scale, layout=MAPS)
    check_shape("key", key, "batch", "heads", *query.shape[2:])
    check_whole_number("kernel_size", kernel_size, 1)
    if query.numel() > 0 and kernel_size > min(key.shape[2:4]):
        raise ValueError(
            f"kernel_size must be at most {min(key.shape[2:4])}, the shorter side of the map, got {kernel_size}"
        )
    check_optional("bias", bias, (query.shape[1], 2 * kernel_size - 1, 2 * kernel_size - 1), query.device)
    query, key, value = _backend.autocast(query, key, value)
    scale = query.shape[4] ** -0.5 if scale is None else float(scale)
    if _backend.forced == "reference":
        return reference.neighborhood_attention(
            query, key, value, kernel_size=kernel_size, bias=bias, scale=scale, return_lse=return_lse
        )
    wide = None if bias is None else bias.to(torch.promote_types(query.dtype, torch.float32))
    out, lse = _forward(query, key, value, wide, kernel_size, scale)
    return (out, lse) if return_lse else out
