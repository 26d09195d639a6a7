"""A ViT block in training, where tokens that a method drops stay in place and are masked out of attention.

Removing tokens gives no gradient to the decision; a mask does. The mask multiplies the weights before they are
normalised (Rao et al., DynamicViT, arXiv:2106.02034, equation 11; AS-ViT, arXiv:2209.13802, equation 7): an additive
mask has the same value and no gradient with respect to the decision about dropped tokens.

Decided here: before anything is dropped attention is SDPA (the formula's epsilon apart, it is the same); the shift by a
row's largest score, which keeps the exponential finite, is a constant to the gradient.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vit_efficient.blocks import close_attention, mlp_half, project, split_heads
from vit_efficient.token_reduction import Seen, attention_halves, dense_attention

_EPS = 1e-6


class _PolicySoftmax(torch.autograd.Function):
    """With its own backward pass, which takes half the passes over the map that autograd's takes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, policy: Tensor) -> Tensor:
        exponentials = (logits - logits.amax(-1, keepdim=True)).exp_()
        weights = _seen(exponentials, policy)
        total = weights.sum(-1, keepdim=True) + _EPS
        weights = weights.add_(_EPS / logits.shape[-1]).div_(total)
        ctx.save_for_backward(exponentials, policy, weights, total)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        exponentials, policy, weights, total = ctx.saved_tensors
        slope = gradient - (gradient * weights).sum(-1, keepdim=True)
        slope = slope.div_(total).mul_(exponentials)
        to_policy = slope.sum((1, 2)) - slope.diagonal(dim1=-2, dim2=-1).sum(1)
        return _seen(slope, policy), to_policy


def _seen(weights: Tensor, policy: Tensor) -> Tensor:
    """Columns times the policy; a token always sees itself."""
    out = weights * policy[:, None, None, :]
    out.diagonal(dim1=-2, dim2=-1).copy_(weights.diagonal(dim1=-2, dim2=-1))
    return out


def policy_softmax(logits: Float[Tensor, "B H T T"], policy: Float[Tensor, "B T"]) -> Float[Tensor, "B H T T"]:
    """Attention to the tokens that the policy (1 kept, 0 dropped) lets through; a token always sees itself.

    Differentiable once.
    """
    weights: Tensor = _PolicySoftmax.apply(logits, policy)
    return weights


def masked_block(
    block: Any,
    x: Float[Tensor, "B T C"],
    policy: Float[Tensor, "B T"] | None,
    num_prefix: int,
    looked_at: bool,
    rope: Tensor | None = None,
) -> tuple[Float[Tensor, "B T C"], Seen]:
    """timm's block under a policy; with `looked_at`, class attention and output norms of the patches too.

    policy: None where nothing is dropped yet. rope: rotary positions of the patches, if the host has any.
    """
    if policy is None:
        wants = frozenset(("class_attention", "context_norm") if looked_at else ())
        x, (seen,) = attention_halves(block, [x], [None], [rope], wants, num_prefix, [dense_attention])
        return mlp_half(block, x), seen
    attn, normed = block.attn, block.norm1(x)
    query, key, value = split_heads(attn, project(attn, normed), num_prefix, rope)
    weights = policy_softmax((query * attn.scale @ key.mT).float(), policy)
    context = attn.attn_drop(weights).to(value.dtype) @ value
    x = x + close_attention(block, normed, context.transpose(1, 2).flatten(2))
    if not looked_at:
        return mlp_half(block, x), Seen()
    seen = Seen(weights[:, :, 0, num_prefix:], context[:, :, num_prefix:].float().norm(dim=-1))
    return mlp_half(block, x), seen
