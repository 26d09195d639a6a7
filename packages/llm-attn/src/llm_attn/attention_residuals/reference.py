"""The definition of Attention Residuals in plain torch, sources stacked; the oracle of its tests."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def mix(
    sources: Sequence[Float[Tensor, "*tokens D"]],
    query: Float[Tensor, "D"],
    key_weight: Float[Tensor, "D"] | None,
    *,
    eps: float,
    normed: bool = False,
) -> Float[Tensor, "*tokens D"]:
    """Equations 2 to 4, softmax over the sources of w . RMSNorm(v_i); `normed` is Inkling-2's way."""
    value = torch.stack(list(sources))
    key = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if normed:
        logits = key @ query * query.shape[-1] ** -0.5
    else:
        logits = (key if key_weight is None else key * key_weight) @ query
    return (logits.softmax(0).unsqueeze(-1) * (key if normed else value)).sum(0)


def attention_residuals(
    embedding: Float[Tensor, "*tokens D"],
    layers: Sequence[Callable[[Tensor], Tensor]],
    queries: Float[Tensor, "L+1 D"],
    key_weights: Float[Tensor, "L+1 D"] | None,
    *,
    block_size: int,
    eps: float,
    sum_scale: bool = False,
    normed: bool = False,
) -> list[Float[Tensor, "*tokens D"]]:
    """h_1 to h_L and the final aggregation. Written from equations 5 and 6: block sums from all outputs, each time."""
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    for index, query in enumerate(queries):
        blocks = [outputs[i : i + block_size] for i in range(0, index, block_size)]
        sources = [embedding, *(torch.stack(block).sum(0) for block in blocks)]
        if len(sources) == 1:
            mixed = embedding
        else:
            weight = None if key_weights is None else key_weights[index]
            mixed = mix(sources, query, weight, eps=eps, normed=normed)
        inputs.append(mixed * len(sources) if sum_scale else mixed)
        if index < len(layers):
            outputs.append(layers[index](inputs[-1]))
    return inputs
