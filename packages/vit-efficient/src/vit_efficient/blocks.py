"""The parts of a transformer block of timm, read the same way from `VisionTransformer` and from `Eva`.

Eva's blocks (EVA-02, Fang et al., arXiv:2303.11331) name some parts otherwise: projections with biases of their own or
apart from each other, scales that are plain parameters, and rotary positions of the patches, which have to follow a
patch when its neighbours are dropped.
"""

from typing import Any

import torch
from jaxtyping import Float
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn


def attention_width(block: Any) -> int:
    """Channels of attention, all heads together."""
    return block.attn.num_heads * block.attn.head_dim


def linear_macs(block: Any) -> int:
    """Multiply-adds of the linear maps of a block for one token."""
    return sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))


def project(attn: Any, normed: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows D3"]:
    """Queries, keys and values of each row, beside each other."""
    if attn.qkv is None:
        return torch.cat([attn.q_proj(normed), attn.k_proj(normed), attn.v_proj(normed)], -1)
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(normed)
    bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return nn.functional.linear(normed, attn.qkv.weight, bias)


def split_heads(
    attn: Any, qkv: Float[Tensor, "b t D3"], num_prefix: int, rope: Tensor | None
) -> tuple[Float[Tensor, "b H t D"], Float[Tensor, "b H t D"], Float[Tensor, "b H t D"]]:
    """Queries, keys and values by head, normalised and turned by their positions as the host does it.

    rope: (n, D2) or (b, 1, n, D2), of the patches; None where the host has no rotary positions.
    """
    b, t, _ = qkv.shape
    query, key, value = qkv.reshape(b, t, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    query, key = attn.q_norm(query), attn.k_norm(key)
    if rope is not None:
        query, key = (_turn(x, num_prefix, rope, attn.rotate_half).type_as(value) for x in (query, key))
    return query, key, value


def _turn(x: Tensor, num_prefix: int, rope: Tensor, half: bool) -> Tensor:
    return torch.cat([x[:, :, :num_prefix], apply_rot_embed_cat(x[:, :, num_prefix:], rope, half=half)], 2)


def close_attention(block: Any, normed: Float[Tensor, "*rows C"], context: Float[Tensor, "*rows D"]) -> Tensor:
    """What attention adds to the rows: norm, gate, projection, scale and drop path."""
    attn, out = block.attn, block.attn.norm(context)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(normed).sigmoid()
    return block.drop_path1(_scaled(block, 1, attn.proj_drop(attn.proj(out))))


def mlp_half(block: Any, x: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
    """x + MLP, as the block has it."""
    return x + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(x))))


def _scaled(block: Any, half: int, x: Tensor) -> Tensor:
    """LayerScale: a module of `Block`, a parameter or None of `EvaBlock`."""
    if hasattr(block, f"ls{half}"):
        return getattr(block, f"ls{half}")(x)
    gamma = getattr(block, f"gamma_{half}")
    return x if gamma is None else gamma * x
