"""correlation: where among all target features does each source feature match? A soft read-out without the volume.

The read-out of dense matching: cosine similarities of all pairs, a sharp softmax, and the expected value (coordinates,
say) under it: soft-argmax as in UFC (Hong et al., ICLR 2024, arXiv:2403.11120, its flow head with temperature 0.02 and
eps 1e-5), or with the dual softmax of LoFTR (Sun et al., CVPR 2021, arXiv:2104.00680), in which a match must be wanted
from both sides. Written out, N x M similarities and their softmax are the memory of the whole network.

Decided here: the registered op is one softmax over targets of  (source . target) * row_scale * column_scale + bias.
Lengths, temperature and masks are small vectors around it; features stay as they are in memory, and their products are
exact in float32. The dual softmax is a second call of the same op whose bias is minus what a first one found as the
log-sum-exp of every target; log-sum-exps have gradients. Since several gradients meet in a feature then, features of
half precision are widened first, where they need any. Statistics are float32 at least, and the result has the dtype of
`values`: coordinates in bfloat16 would be off by a pixel.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import (
    check_choice,
    check_optional,
    check_positive,
    check_same_dtype,
    check_shape,
    check_tensors,
)
from shared_kernels.correlation import reference

NAME = "correlation"
Softmax = Literal["row", "column", "dual"]
_MOST_VALUES = 16


_forward = _backend.library_op(
    NAME,
    "forward",
    "(Tensor source, Tensor target, Tensor values, Tensor row_scale, Tensor column_scale, Tensor bias) "
    "-> (Tensor, Tensor)",
)


@_forward.register_fake
def _(source: Tensor, target: Tensor, values: Tensor, row_scale: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    B, N, _D = source.shape
    return values.new_empty((B, N, values.shape[-1])), row_scale.new_empty((B, N))


_backward = _backend.library_op(
    NAME,
    "backward",
    "(Tensor d_out, Tensor d_lse, Tensor source, Tensor target, Tensor values, Tensor row_scale, Tensor column_scale, "
    "Tensor bias, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(_d_out: Tensor, _d_lse: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:6])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor, ...]:
    return _backward(d_out, d_lse, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.shared_kernels.correlation)
def _flops(source_shape: torch.Size, target_shape: torch.Size, values_shape: torch.Size, *_: Any, **__: Any) -> int:
    B, N, D = source_shape
    return 2 * B * N * target_shape[1] * (D + values_shape[-1])


@register_flop_formula(torch.ops.shared_kernels.correlation_backward)
def _backward_flops(_d_out: Any, _d_lse: Any, source: torch.Size, target: torch.Size, *rest: Any, **_: Any) -> int:
    B, N, D = source
    return 2 * B * N * target[1] * (3 * D + 2 * rest[0][-1])


def correlation(
    source: Float[Tensor, "B N D"],
    target: Float[Tensor, "B M D"],
    values: Float[Tensor, "M E"] | Float[Tensor, "B M E"],
    *,
    softmax: Softmax = "row",
    temperature: float = 0.02,
    normalize: bool = True,
    eps: float = 1e-5,
    source_mask: Bool[Tensor, "B N"] | None = None,
    target_mask: Bool[Tensor, "B M"] | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B N E"] | tuple[Float[Tensor, "B N E"], Float[Tensor, "B N"]]:
    """Expected value over all targets for every source:  out_i = sum_j w_ij values_j,  sum_j w_ij = 1.

    With s_ij = <source_i, target_j> / temperature, features divided by their length + `eps` if `normalize`, w is
    - `softmax` "row": the softmax of s over targets j;
    - "dual": the product of the softmax over targets and the softmax over sources, scaled to sum 1 over targets;
    - "column": the other direction, over sources for every target; `values` (N, E) or (B, N, E) belong to sources then,
      and results are (B, M, E) and (B, M).

    Masks are True where a feature counts; what the others hold, NaN too, does not matter. A source that is masked out,
    or has no target, gets 0. `values` of 1 to 16 columns (coordinates; their squares for a variance) may be of another
    floating dtype, which is the result's. For wider values normalise and call scaled_dot_product_attention.

    `return_lse` adds the natural log-sum-exp of what w was made from: of s; for "dual" that of the product, the log of
    how much of a source's probability is returned to it: exp of it is a confidence in [0, 1]. -inf without targets.

    Differentiable once in source, target and values, also through the log-sum-exp. Raises TypeError on what is not a
    floating-point tensor and on features of mixed dtypes, ValueError on other shapes, mixed devices or other options.
    """
    values_of = source if softmax == "column" else target
    _check(source, target, values, values_of, softmax, temperature, eps, source_mask, target_mask)
    if _backend.forced == "reference":
        return reference.correlation(
            source, target, values, softmax=softmax, temperature=temperature, normalize=normalize, eps=eps,
            source_mask=source_mask, target_mask=target_mask, return_lse=return_lse,
        )  # fmt: skip
    source, target = _backend.autocast(source, target)
    if softmax == "dual" and (source.requires_grad or target.requires_grad):
        acc = torch.promote_types(source.dtype, torch.float32)
        source, target = source.to(acc), target.to(acc)
    if softmax == "column":
        source, target, source_mask, target_mask = target, source, target_mask, source_mask
    values = values.expand(target.shape[0], -1, -1)
    source, target = _without(source, source_mask), _without(target, target_mask)
    values = _without(values, target_mask)
    of_source, of_target = (_inverse_lengths(t, eps, normalize=normalize) for t in (source, target))
    of_source = of_source / temperature
    bias = _bias(target, target_mask)
    if softmax == "dual":
        out, lse = _dual(source, target, values, of_source, of_target, _bias(source, source_mask), bias, return_lse)
    else:
        out, lse = _forward(source, target, values, of_source, of_target, bias)
    if source_mask is not None:
        out = out.masked_fill(~source_mask[..., None], 0)
        lse = lse.masked_fill(~source_mask, -torch.inf)
    return (out, lse) if return_lse else out


def _dual(
    source: Tensor,
    target: Tensor,
    values: Tensor,
    of_source: Tensor,
    of_target: Tensor,
    source_bias: Tensor,
    target_bias: Tensor,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """log(row * column softmax) is 2 s_ij minus the log-sum-exp of row i, which out does not need, and of column j."""
    nothing = of_source.new_zeros(())
    _, columns = _forward(target, source, nothing.expand(*of_source.shape, 1), of_target, of_source, source_bias)
    columns = columns.masked_fill(columns == -torch.inf, 0)
    out, lse = _forward(source, target, values, 2 * of_source, of_target, target_bias - columns)
    if return_lse:
        _, rows = _forward(source, target, nothing.expand(*of_target.shape, 1), of_source, of_target, target_bias)
        lse = lse - rows.masked_fill(rows == -torch.inf, 0)
    return out, lse


def _without(features: Tensor, mask: Tensor | None) -> Tensor:
    return features if mask is None else features.masked_fill(~mask[..., None], 0)


def _inverse_lengths(features: Tensor, eps: float, *, normalize: bool) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    if not normalize:
        return features.new_ones(features.shape[:-1], dtype=dtype)
    return 1 / (torch.linalg.vector_norm(features, dim=-1, dtype=dtype) + eps)


def _bias(features: Tensor, mask: Tensor | None) -> Tensor:
    bias = features.new_zeros(features.shape[:-1], dtype=torch.promote_types(features.dtype, torch.float32))
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def _check(
    source: Any,
    target: Any,
    values: Any,
    values_of: Any,
    softmax: str,
    temperature: float,
    eps: float,
    source_mask: Any,
    target_mask: Any,
) -> None:
    check_choice("softmax", softmax, Softmax)
    check_positive("temperature", temperature)
    check_positive("eps", eps)
    check_tensors({"source": source, "target": target, "values": values})
    check_same_dtype({"source": source, "target": target})
    check_shape("source", source, "B", "N", "D")
    check_shape("target", target, source.shape[0], "M", source.shape[2])
    (B, count), E = values_of.shape[:2], values.shape[-1]
    check_shape("values", values, *((count, "E") if values.ndim == 2 else (B, count, "E")))
    if not 1 <= E <= _MOST_VALUES:
        raise ValueError(f"values must have 1 to {_MOST_VALUES} columns, got {E}")
    check_optional("source_mask", source_mask, tuple(source.shape[:2]), source.device, torch.bool)
    check_optional("target_mask", target_mask, tuple(target.shape[:2]), source.device, torch.bool)
