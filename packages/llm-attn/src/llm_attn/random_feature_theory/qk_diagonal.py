"""Why W_0 is a diagonal: in trained transformers W_Q^T W_K stands out on its diagonal (the paper's figure of BERT).

Decided here: absolute values are taken of each head's product, then their mean over heads. Rotary models are read at
relative position 0. The number that sums a picture up is the mean of the diagonal over the mean of the rest.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def qk_mean(model: nn.Module, layer: int) -> Float[Tensor, "d d"]:
    """Mean over heads of |W_Q^T W_K| of a transformers model's layer, float32; rows belong to the query's input.

    Reads separate `query`/`key` or `q_proj`/`k_proj` (grouped keys too) and GPT-2's `c_attn`. ValueError otherwise.
    """
    found = _attention(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no query/key, q_proj/k_proj or c_attn weights that could be read")
    if not 0 <= layer < len(found):
        raise ValueError(f"layer must lie in 0..{len(found) - 1}, got {layer}")
    query, key, head_dim = found[layer]
    queries, keys = query.unflatten(0, (-1, head_dim)), key.unflatten(0, (-1, head_dim))
    if len(queries) % len(keys):
        raise ValueError(f"{len(queries)} query heads do not share {len(keys)} key heads evenly")
    total = torch.zeros(query.shape[1], query.shape[1])
    for number, of_query in enumerate(queries):
        total += (of_query.T @ keys[number * len(keys) // len(queries)]).abs()
    return total / len(queries)


def num_attention_layers(model: nn.Module) -> int:
    """Layers that `qk_mean` can read."""
    return len(_attention(model))


def diagonal_ratio(matrix: Float[Tensor, "d d"]) -> float:
    """Mean of the diagonal over mean of the rest, about 1 without structure. ValueError unless square, at least 2."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(f"a diagonal needs a square matrix of at least 2 rows, got {tuple(matrix.shape)}")
    diagonal, d = matrix.diagonal().sum(), len(matrix)
    return float((diagonal / d) / ((matrix.sum() - diagonal) / (d * d - d)))


def _attention(model: nn.Module) -> list[tuple[Tensor, Tensor, int]]:
    """Query weight, key weight (both out x in, float32) and head width of each attention, in order of depth."""
    config = getattr(model, "config", None)
    found = []
    for module in model.modules():
        pair = _query_and_key(module)
        if pair is not None and config is not None:
            query, key = (weight.detach().float() for weight in pair)
            found.append((query, key, _head_dim(module, config, query)))
    return found


def _query_and_key(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    for names in (("query", "key"), ("q_proj", "k_proj")):
        pair = [getattr(module, name, None) for name in names]
        if all(isinstance(linear, nn.Linear) for linear in pair):
            return pair[0].weight, pair[1].weight  # type: ignore[union-attr]
    fused = getattr(module, "c_attn", None)
    weight = getattr(fused, "weight", None)
    if isinstance(weight, Tensor) and weight.shape[1] == 3 * weight.shape[0]:  # GPT-2 keeps in x out
        query, key, _ = weight.T.chunk(3)
        return query, key
    return None


def _head_dim(module: nn.Module, config: object, query: Tensor) -> int:
    own = getattr(module, "head_dim", None)
    return own if isinstance(own, int) else query.shape[0] // config.num_attention_heads  # type: ignore[attr-defined]
