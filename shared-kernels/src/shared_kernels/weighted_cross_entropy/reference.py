"""The definition of weighted_cross_entropy in plain torch, all logits at once; the oracle of its tests."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["none", "sum", "mean", "segment_sum"] = "none",
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
) -> Tensor:
    """See `shared_kernels.weighted_cross_entropy`."""
    acc = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)  # float64 stays float64
    counted = targets != ignore_index
    # what an ignored token holds, NaN included, reaches nothing
    logits = hidden.to(acc).masked_fill(~counted[:, None], 0.0) @ weight.to(acc).T
    if bias is not None:
        logits = logits + bias.to(acc)
    losses = cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    weights = counted.to(acc) if token_weights is None else token_weights.to(acc).masked_fill(~counted, 0.0)
    losses = weights * losses
    if reduction == "none":
        return losses
    if segment_ids is not None:
        return losses.new_zeros(num_segments or 0).index_add(0, segment_ids, losses)
    return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()
