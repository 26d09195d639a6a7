"""The definition of diverse_subset in plain torch; the oracle of its tests."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

NOTHING = 1e-5
"""The share of its squared length below which what is left of an element counts as nothing."""


def diverse_subset(
    features: Tensor,
    *,
    num_kept: int,
    method: str = "max_min",
    weight: Tensor | None = None,
    metric: str = "cosine",
    first: str | Tensor = "weight",
    threshold: float | Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """See `shared_kernels.diverse_subset`."""
    B, N, _ = features.shape
    acc = torch.promote_types(features.dtype, torch.float32)
    allowed = features.new_ones((B, N), dtype=torch.bool) if mask is None else mask
    wide = features.detach().to(acc).masked_fill(~allowed[..., None], 0)
    if metric == "cosine":
        wide = normalize(wide, dim=-1)
    weights = wide.new_ones((B, N)) if weight is None else weight.detach().to(acc)
    limits = wide.new_zeros((B, N)) + (0 if threshold is None else threshold)
    chosen = wide.new_full((B, min(num_kept, N)), -1, dtype=torch.int64)
    for b in range(B):
        given = first[b].tolist() if isinstance(first, Tensor) else []
        gram = wide[b] @ wide[b].T
        if method == "dpp":
            if metric == "cosine":  # lengths are 1, not nearly so, or rounding would decide between all of them
                gram.diagonal().copy_(wide[b].any(1))
            rule: _Rule = _Volume(gram, weights[b])
        else:
            distance = _distances(wide[b], gram, metric)
            if method == "threshold":
                rule = _Unsuppressed(distance, weights[b], limits[b].to(acc))
            else:
                rule = _MaxMin(
                    distance, weights[b], allowed[b], isolated=isinstance(first, str) and first == "isolated"
                )
        _choose(rule, allowed[b].clone(), given, chosen[b])
    return chosen


def _distances(x: Tensor, gram: Tensor, metric: str) -> Tensor:
    if metric == "cosine":
        return (1 - gram).clamp(min=0)
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def _choose(rule: "_Rule", available: Tensor, given: list[int], chosen: Tensor) -> None:
    """Write choices to `chosen` until it is full or nothing is left."""
    for step in range(len(chosen)):
        scores = rule.scores().masked_fill(~available, -torch.inf)
        if scores.max() == -torch.inf:
            return
        pick = given[step] if step < len(given) else int(scores.argmax())
        chosen[step] = pick
        available[pick] = False
        rule.take(pick)


class _Rule(Protocol):
    """What the next choice is made by."""

    def scores(self) -> Tensor: ...

    def take(self, pick: int) -> None: ...


class _MaxMin(_Rule):
    def __init__(self, distance: Tensor, weight: Tensor, allowed: Tensor, *, isolated: bool) -> None:
        self.distance, self.weight = distance, weight
        others = distance.masked_fill(~allowed, torch.inf).fill_diagonal_(torch.inf)
        self.nearest: Tensor | None = None
        self.start = others.amin(1) if isolated else weight

    def scores(self) -> Tensor:
        return self.start if self.nearest is None else self.weight * self.nearest

    def take(self, pick: int) -> None:
        row = self.distance[pick]
        self.nearest = row if self.nearest is None else torch.minimum(self.nearest, row)


class _Unsuppressed(_Rule):
    def __init__(self, distance: Tensor, weight: Tensor, threshold: Tensor) -> None:
        self.distance, self.weight, self.threshold = distance, weight, threshold
        self.suppressed = torch.zeros_like(weight, dtype=torch.bool)

    def scores(self) -> Tensor:
        return self.weight.masked_fill(self.suppressed, -torch.inf)

    def take(self, pick: int) -> None:
        self.suppressed |= self.distance[pick] < self.threshold[pick]


class _Volume(_Rule):
    def __init__(self, gram: Tensor, weight: Tensor) -> None:
        self.gram, self.quality = gram, weight**2
        self.residual, self.floor = gram.diagonal().clone(), NOTHING * gram.diagonal()
        self.factors: list[Tensor] = []

    def scores(self) -> Tensor:
        return self.quality * self.residual

    def take(self, pick: int) -> None:
        if self.residual[pick] == 0:
            return
        row = self.gram[pick] - sum((c[pick] * c for c in self.factors), torch.zeros_like(self.residual))
        self.factors.append(row / self.residual[pick].sqrt())
        self.residual = self.residual - self.factors[-1] ** 2
        self.residual = self.residual.masked_fill(self.residual <= self.floor, 0)
