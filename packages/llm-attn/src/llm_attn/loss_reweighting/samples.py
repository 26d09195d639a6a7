"""Losses of single samples: rows of a batch, or the documents packed into them, without all logits in memory.

Decided here: logits that are few anyway (`FEW_LOGITS`) are made and kept for the backward pass, which saves the product
that makes them again and with it some per cent of a training step; more are never made at once.

Shapes: B rows, N tokens, C width, V vocabulary, n samples.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from shared_kernels import weighted_cross_entropy

IGNORED = -100
FEW_LOGITS = 1 << 23
"""Tokens times vocabulary up to which logits are kept: 32 MiB in float32."""


class SampleLosses(NamedTuple):
    """Of n samples: the mean loss of their tokens, 0 where none counts, and how many count."""

    losses: Float[Tensor, "n"]
    num_tokens: Int[Tensor, "n"]


def next_targets(labels: Int[Tensor, "B N"], documents: Int[Tensor, "B N"] | None = None) -> Int[Tensor, "B N"]:
    """What place n is to predict: label n + 1, and nothing (-100) at the end of a row and of each document."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if documents is None:
        return targets
    last = F.pad(documents[:, 1:] != documents[:, :-1], (0, 1), value=True)
    return targets.masked_fill(last, IGNORED)


def documents_of(position_ids: Int[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """Numbers the documents of a batch from 0: one begins with every row, and wherever positions do not go up by one.

    Padding may so belong to the document before it, or be one: its labels are ignored, and it does not count.
    """
    new = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0), value=True)
    return new.flatten().cumsum(0).view(new.shape) - 1


def token_losses(
    hidden: Float[Tensor, "T C"],
    head_weight: Float[Tensor, "V C"],
    targets: Int[Tensor, "T"],
    *,
    bias: Float[Tensor, "V"] | None = None,
) -> Float[Tensor, "T"]:
    """Cross-entropy of each token, 0 where its target is -100; in float32 at least."""
    if hidden.shape[0] * head_weight.shape[0] > FEW_LOGITS:
        return weighted_cross_entropy(hidden, head_weight, targets, bias=bias, ignore_index=IGNORED)
    logits = F.linear(hidden, head_weight, bias)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")


def sample_means(
    token_losses: Float[Tensor, "B N"],
    targets: Int[Tensor, "B N"],
    documents: Int[Tensor, "B N"] | None = None,
    *,
    sequence_group: dist.ProcessGroup | None = None,
) -> SampleLosses:
    """Means over the tokens of each row, or of each document, whose target is not -100.

    sequence_group: ranks that hold the parts of the same rows (sequence parallelism). Each then gets the means over all
    parts, and gradients for its own that are right once they are averaged over these ranks too, as one
    DistributedDataParallel over all ranks does.
    """
    wide = torch.promote_types(token_losses.dtype, torch.float32)
    counted = targets != IGNORED
    losses = token_losses.to(wide).masked_fill(~counted, 0.0)
    if documents is None:
        totals, numbers = losses.sum(1), counted.sum(1)
    else:
        n = int(documents.max()) + 1 if documents.numel() else 0
        totals = losses.new_zeros(n).index_add(0, documents.flatten(), losses.flatten())
        numbers = counted.new_zeros(n, dtype=torch.int64).index_add(0, documents.flatten(), counted.flatten().long())
    if sequence_group is not None:
        totals, numbers = _sum_over(totals, sequence_group), _sum_over(numbers, sequence_group)
    return SampleLosses(totals / numbers.clamp(min=1), numbers)


def _sum_over(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = values.detach().clone()
    dist.all_reduce(total, group=group)
    if not values.requires_grad:
        return total
    ours = dist.get_world_size(group) * values  # its gradient is that of the sum of all ranks' equal losses
    return ours + (total - ours).detach()


def per_sample_losses(
    hidden: Float[Tensor, "B N C"],
    head_weight: Float[Tensor, "V C"],
    labels: Int[Tensor, "B N"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    position_ids: Int[Tensor, "B N"] | None = None,
    sequence_group: dist.ProcessGroup | None = None,
) -> SampleLosses:
    """Cross-entropy of each row's next tokens, from the decoder's last hidden states and the output layer's weight.

    Labels are those of the places themselves, as transformers takes them (-100 does not count); with `position_ids` a
    sample is a document of a packed row. Losses are float32 at least. Beyond `FEW_LOGITS` memory grows with tokens and
    with the vocabulary, not with their product, in the backward pass too. ValueError on shapes that do not fit.
    """
    if labels.shape != hidden.shape[:2]:
        raise ValueError(f"labels must be {tuple(hidden.shape[:2])} like the hidden states, got {tuple(labels.shape)}")
    if position_ids is not None and position_ids.shape != labels.shape:
        raise ValueError(f"position_ids must be {tuple(labels.shape)} like labels, got {tuple(position_ids.shape)}")
    documents = None if position_ids is None else documents_of(position_ids)
    targets = next_targets(labels, documents)
    losses = token_losses(hidden.flatten(0, 1), head_weight, targets.flatten(), bias=bias)
    return sample_means(losses.view(targets.shape), targets, documents, sequence_group=sequence_group)
