"""weighted_cross_entropy: hidden states x vocabulary to losses per token, without the logits in memory.

Serves losses weighted per token (PRIOR: Chen et al., arXiv:2505.08971), losses per sample whose weights depend on the
losses of the whole batch (Sow et al., "Dynamic Loss-Based Sample Reweighting", arXiv:2502.06733), and losses per
document and token log-probabilities, forward only (AttentionInfluence, arXiv:2505.07293).

Decided here: the registered op returns unweighted losses and keeps two numbers per token; weights and sums are
elementwise torch around it, so that gradients are exact whatever is done with the losses. Backward computes the logits
a second time. Where the factor of every token is known before, in "sum" and "mean", a CPU takes the gradients in the
forward pass instead: three products instead of four. On a GPU that saves nothing, since float32 logits do not stay.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import check_choice, check_optional, check_same_dtype, check_shape, check_tensors
from shared_kernels.weighted_cross_entropy import reference

NAME = "weighted_cross_entropy"
Reduction = Literal["none", "sum", "mean", "segment_sum"]


_forward = _backend.library_op(
    NAME,
    "forward",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, SymInt ignore_index) -> (Tensor, Tensor)",
)
"""Losses (T,), and of every softmax the largest logit and the logarithm of the sum, (2, T) to base 2; 0 if ignored.

Kept apart, since a large log-sum-exp would round off what the probabilities of the backward pass need.
"""


@_forward.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(hidden.shape[0], dtype=acc), hidden.new_empty((2, hidden.shape[0]), dtype=acc)


_backward = _backend.library_op(
    NAME,
    "backward",
    "(Tensor d_losses, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor softmax, "
    "SymInt ignore_index, bool hidden_too, bool weight_too) -> (Tensor, Tensor, Tensor)",
)
"""Gradients of hidden, weight and bias, which are empty where they are not asked for or there is none."""


@_backward.register_fake
def _(_: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden_too, weight_too = rest[-2:]
    d_bias = hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    d_hidden = hidden.new_empty(hidden.shape if hidden_too else 0)
    return d_hidden, weight.new_empty(weight.shape if weight_too else 0), d_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.ignore_index = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, d_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    hidden_too, weight_too, bias_too, *_ = ctx.needs_input_grad
    gradients = _backward(d_losses, *ctx.saved_tensors, ctx.ignore_index, hidden_too, weight_too)
    asked = (hidden_too, weight_too, bias_too)
    return *(d if wanted else None for d, wanted in zip(gradients, asked, strict=True)), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


_total = _backend.library_op(
    NAME,
    "total",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor token_weights, SymInt ignore_index, "
    "bool hidden_too, bool weight_too) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
"""The sum of weighted losses, the losses, and that sum's gradients of hidden, weight and bias, as `_backward`'s.

All are float32 at least: the gradients are still to be scaled, by little after a sum over many tokens.
"""


@_total.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, token_weights: Tensor, *flags: Any
) -> tuple[Tensor, ...]:
    _, hidden_too, weight_too = flags
    shapes = ((), targets.shape, hidden.shape if hidden_too else 0, weight.shape if weight_too else 0)
    return tuple(token_weights.new_empty(shape) for shape in (*shapes, 0 if bias is None else bias.shape))


_total_backward = _backend.library_op(NAME, "total_backward", "(Tensor d_total, Tensor[] gradients) -> Tensor[]")
"""Registered, since a second derivative through plain torch would come out wrong instead of failing."""


@_total_backward.register_fake
def _(_: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    return [d.new_empty(d.shape) for d in gradients]


def _save_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.save_for_backward(*output[1:])


def _differentiate_total(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    d_weights, *gradients = _total_backward(d_total, list(ctx.saved_tensors))
    wanted = zip(gradients, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    scaled = [d.to(dtype) if needed else None for d, dtype, needed in wanted]
    return *scaled, None, d_weights, None, None, None


_total.register_autograd(_differentiate_total, setup_context=_save_total)


@register_flop_formula(torch.ops.shared_kernels.weighted_cross_entropy)
def _flops(hidden: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(torch.ops.shared_kernels.weighted_cross_entropy_backward)
def _backward_flops(_: torch.Size, hidden: torch.Size, weight: torch.Size, *rest: Any, **__: Any) -> int:
    return (1 + rest[-2] + rest[-1]) * 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(torch.ops.shared_kernels.weighted_cross_entropy_total)
def _total_flops(hidden: torch.Size, weight: torch.Size, *rest: Any, **_: Any) -> int:
    return (1 + rest[-2] + rest[-1]) * 2 * hidden[0] * hidden[1] * weight[0]


def weighted_cross_entropy(
    hidden: Float[Tensor, "T D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "T"],
    *,
    token_weights: Float[Tensor, "T"] | None = None,
    bias: Float[Tensor, "V"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "none",
    segment_ids: Int[Tensor, "T"] | None = None,
    num_segments: int | None = None,
) -> Float[Tensor, "*reduced"]:
    """w_t * (logsumexp_v z_tv - z_t,target)  with logits  z = hidden @ weight.T + bias,  natural logarithm.

    Tokens whose target is `ignore_index` count nothing, whatever they hold. `reduction` is "none" for losses (T,),
    without weights the negative log-probabilities of the targets; "sum"; "mean" for the sum over the sum of weights
    (NaN where no token counts); or "segment_sum" for one sum per segment (num_segments,), the segment of every token in
    `segment_ids`. Losses are float32 at least, and logits are accumulated in that; autocast casts hidden and weight as
    for a linear layer. Memory grows with tokens and with the vocabulary, not with their product. Differentiable once in
    hidden, weight, bias and token_weights.

    Raises TypeError on dtypes that do not fit, ValueError on shapes, mixed devices, or segments without their sum and
    the reverse; on a CPU also on targets outside the vocabulary, whose loss is NaN on a GPU. On a GPU float64 raises
    TypeError.
    """
    _check_arguments(hidden, weight, targets, token_weights, bias, reduction, segment_ids, num_segments)
    if _backend.forced == "reference":
        return reference.weighted_cross_entropy(
            hidden, weight, targets, token_weights=token_weights, bias=bias, ignore_index=ignore_index,
            reduction=reduction, segment_ids=segment_ids, num_segments=num_segments,
        )  # fmt: skip
    hidden, weight = _backend.autocast(hidden, weight)
    counted, acc = targets != ignore_index, torch.promote_types(hidden.dtype, torch.float32)
    weights = counted.to(acc) if token_weights is None else token_weights.to(acc).masked_fill(~counted, 0.0)
    learned = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    if reduction in ("sum", "mean") and learned and hidden.device.type == "cpu":
        wanted = (hidden.requires_grad, weight.requires_grad)
        total = _total(hidden, weight, bias, targets, weights, ignore_index, *wanted)[0]
        return total if reduction == "sum" else total / weights.sum()
    losses = weights * _forward(hidden, weight, bias, targets, ignore_index)[0]
    if reduction == "none":
        return losses
    if segment_ids is not None:
        return losses.new_zeros(num_segments or 0).index_add(0, segment_ids, losses)
    return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()


def _check_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    bias: Tensor | None,
    reduction: str,
    segment_ids: Tensor | None,
    num_segments: int | None,
) -> None:
    check_choice("reduction", reduction, Reduction)
    if (reduction == "segment_sum") != (segment_ids is not None) or (segment_ids is None) != (num_segments is None):
        raise ValueError("segment_ids and num_segments go with reduction='segment_sum', and it with both")
    check_tensors({"hidden": hidden, "weight": weight})
    check_tensors({"targets": targets}, torch.int64, device=hidden.device)
    check_same_dtype({"hidden": hidden, "weight": weight})
    check_shape("hidden", hidden, "T", "D")
    check_shape("weight", weight, "V", hidden.shape[1])
    tokens, vocabulary, device = (hidden.shape[0],), (weight.shape[0],), hidden.device
    check_shape("targets", targets, *tokens)
    check_optional("token_weights", token_weights, tokens, device)
    check_optional("segment_ids", segment_ids, tokens, device, torch.int64)
    check_optional("bias", bias, vocabulary, device)
