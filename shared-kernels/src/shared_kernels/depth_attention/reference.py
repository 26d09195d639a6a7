"""The definition of depth_attention in plain torch, sources stacked; the oracle of its tests."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def depth_attention(
    sources: Sequence[Tensor],
    query: Tensor,
    *,
    key_weight: Tensor | None = None,
    eps: float,
    scale: float = 1.0,
    normed_values: bool = False,
    state: Sequence[Tensor] | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """See `shared_kernels.depth_attention`."""
    dtype = reduce(torch.promote_types, (source.dtype for source in sources))
    acc = torch.promote_types(dtype, torch.float32)  # float64 stays float64, or gradcheck would mean nothing
    value = torch.stack([source.to(acc) for source in sources])
    key = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if normed_values:
        value = key
    query = query.to(acc) if key_weight is None else query.to(acc) * key_weight.to(acc)
    several = query.ndim == 2
    score = scale * torch.einsum("l...d,sd->sl...", key, query if several else query[None])
    value = value.expand(score.shape[0], *value.shape)
    if state is not None:
        out, lse = (t.to(acc) if several else t.to(acc)[None] for t in state)
        out = out.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)  # nothing was seen, whatever stands there
        score, value = torch.cat([score, lse.unsqueeze(1)], 1), torch.cat([value, out.unsqueeze(1)], 1)
    weight = score.softmax(1)
    results = [torch.einsum("sl...,sl...d->s...d", weight, value).to(dtype)]
    results += [score.logsumexp(1)] if return_lse else []
    results += [weight[:, : len(sources)].movedim(1, -1)] if return_weights else []
    results = results if several else [t.squeeze(0) for t in results]
    return results[0] if len(results) == 1 else tuple(results)
