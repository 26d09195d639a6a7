"""A ViT block in training, where tokens that a method drops stay in place and are masked out of attention.

Removing tokens gives no gradient to the decision; a mask does. The mask multiplies the weights before they are
normalised (Rao et al., DynamicViT, arXiv:2106.02034, equation 11; AS-ViT, arXiv:2209.13802, equation 7): an additive
mask has the same value and no gradient with respect to the decision about dropped tokens.
"""

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor

from vit_efficient.token_reduction import Seen, mlp_half

_EPS = 1e-6


def policy_softmax(logits: Float[Tensor, "B H T T"], policy: Float[Tensor, "B T"]) -> Float[Tensor, "B H T T"]:
    """Attention to the tokens that the policy (1 kept, 0 dropped) lets through; a token always sees itself."""
    T = logits.shape[-1]
    itself = torch.eye(T, dtype=torch.bool, device=logits.device)
    seen = torch.where(itself, torch.ones((), dtype=policy.dtype, device=policy.device), policy[:, None, None, :])
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * seen
    return (weights + _EPS / T) / (weights.sum(-1, keepdim=True) + _EPS)


def masked_block(
    block: Block, x: Float[Tensor, "B T C"], policy: Float[Tensor, "B T"], num_prefix: int, looked_at: bool
) -> tuple[Float[Tensor, "B T C"], Seen]:
    """timm's Block under a policy; with `looked_at`, class attention and output norms of the patches too."""
    attn, normed = block.attn, block.norm1(x)
    B, T, _ = x.shape
    query, key, value = attn.qkv(normed).reshape(B, T, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    query, key = attn.q_norm(query), attn.k_norm(key)
    weights = policy_softmax((query * attn.scale @ key.mT).float(), policy)
    context = attn.attn_drop(weights).to(value.dtype) @ value
    out = attn.norm(context.transpose(1, 2).reshape(B, T, attn.attn_dim))
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(normed).sigmoid()
    x = x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(out))))
    if not looked_at:
        return mlp_half(block, x), Seen()
    seen = Seen(weights[:, :, 0, num_prefix:], context[:, :, num_prefix:].float().norm(dim=-1))
    return mlp_half(block, x), seen
