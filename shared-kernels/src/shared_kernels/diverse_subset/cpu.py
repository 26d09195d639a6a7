"""diverse_subset on CPUs: lazy greedy in rounds, so that features are read once per round and not once per choice.

Scores of "max_min" and "dpp" only fall while elements are chosen, so an old score bounds the new one from above. A
round takes the best scores as its pool and chooses inside it, on a small matrix, as long as the winner beats every old
score outside; then one matrix product brings all scores up to date. Typical features give tens of choices a round, and
where they give one, pools become small. "threshold" goes through blocks in order of weight. Nothing of N x N exists;
sets are processed in turn.

Lengths are divided out after products, so float32 features are not copied. Steps inside a pool are numpy's, whose calls
cost a fraction of torch's.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

_POOL = 128
_ROWS = 128  # of distances at a time, where all are needed
_NOTHING = 1e-5  # see the op's docstring


class _Features:
    """The features of one set, and distances or products between any of them."""

    def __init__(self, x: Tensor, mask: Tensor, metric: str) -> None:
        self.x = x if bool(mask.all()) else x.masked_fill(~mask[:, None], 0)
        self.cosine = metric == "cosine"
        if self.cosine:
            length = torch.linalg.vector_norm(self.x, dim=1)
            self.squared = (length > 0).to(x.dtype)  # exactly, or rounding would decide between all of them
            self.inverse = length.clamp_(min=1e-12).reciprocal_()
        else:
            self.squared = self.x.square().sum(1)
            self.inverse = torch.ones_like(self.squared)

    def part(self, indices: Tensor | slice) -> "_Features":
        """Some of the features as features of their own."""
        few = object.__new__(_Features)
        few.x, few.cosine = self.x[indices], self.cosine
        few.squared, few.inverse = self.squared[indices], self.inverse[indices]
        return few

    def products(self, other: "_Features") -> Tensor:
        """<own, other>, of features brought to length 1 if the metric is the cosine."""
        product = torch.mm(self.x, other.x.T)
        return product.mul_(other.inverse).mul_(self.inverse[:, None]) if self.cosine else product

    def distances(self, other: "_Features") -> Tensor:
        product = self.products(other)
        if self.cosine:
            return product.neg_().add_(1).clamp_(min=0)
        return product.mul_(-2).add_(other.squared).add_(self.squared[:, None]).clamp_(min=0).sqrt_()


class _Rule(ABC):
    """What is chosen by: a score of each element, which only falls."""

    @abstractmethod
    def take(self, picks: Tensor) -> None:
        """These are chosen now."""

    @abstractmethod
    def scores(self) -> Tensor:
        """Of all elements, chosen ones too."""

    @abstractmethod
    def step_through(self, pool: Tensor, floor: float, most: int) -> list[int]:
        """Positions in the pool of the next choices, one at least, while they score above the floor."""


class _MaxMin(_Rule):
    """weight * distance to the nearest chosen element."""

    def __init__(self, features: _Features, weight: Tensor) -> None:
        self.features, self.weight = features, weight
        self.nearest = torch.full_like(weight, torch.inf)

    def take(self, picks: Tensor) -> None:
        distances = self.features.part(picks).distances(self.features)
        torch.minimum(self.nearest, distances.amin(0), out=self.nearest)

    def scores(self) -> Tensor:
        return self.weight * self.nearest

    def step_through(self, pool: Tensor, floor: float, most: int) -> list[int]:
        block = self.features.part(pool)
        apart = block.distances(block).fill_diagonal_(-1).numpy()  # what is chosen scores below any floor
        weight, nearest = self.weight[pool].numpy(), self.nearest[pool].numpy()
        where: list[int] = []
        scores = weight * nearest
        while len(where) < most and (scores[best := int(scores.argmax())] > floor or not where):
            where.append(best)
            np.minimum(nearest, apart[best], out=nearest)
            np.multiply(weight, nearest, out=scores)
        return where


class _Volume(_Rule):
    """weight^2 * squared distance to the span of the chosen elements: a row of a Cholesky factor for each choice."""

    def __init__(self, features: _Features, weight: Tensor, num_kept: int) -> None:
        self.features, self.quality = features, weight.square()
        self.residual, self.floor = features.squared.clone(), _NOTHING * features.squared
        self.factors, self.count = weight.new_empty(num_kept, len(weight)), 0

    def take(self, picks: Tensor) -> None:
        """Factors among the new ones first, by Cholesky; those of all other columns follow by solving a triangle."""
        picks = picks[self.residual[picks] > 0]
        done, chosen = self.factors[: self.count], self.features.part(picks)
        rows = chosen.products(self.features).sub_(done[:, picks].T @ done)
        inside = rows[:, picks]
        inside.diagonal().copy_(self.residual[picks])
        triangle, failed = torch.linalg.cholesky_ex(inside)
        if int(failed):  # some of them lie in the span of others: given ones may
            for pick in picks if len(picks) > 1 else ():
                self.take(pick[None])
            return
        self.factors[self.count : self.count + len(picks)] = torch.linalg.solve_triangular(triangle, rows, upper=False)
        self.count += len(picks)
        self.residual.sub_(self.factors[self.count - len(picks) : self.count].square().sum(0))
        self.residual.masked_fill_(self.residual <= self.floor, 0)

    def scores(self) -> Tensor:
        return self.quality * self.residual

    def step_through(self, pool: Tensor, floor: float, most: int) -> list[int]:
        block, done = self.features.part(pool), self.factors[: self.count, pool]
        left = block.products(block).sub_(done.T @ done).numpy()
        quality, residual, nothing = (t[pool].numpy() for t in (self.quality, self.residual, self.floor))
        rows = np.empty((min(most, len(pool)), len(pool)), left.dtype)
        where: list[int] = []
        scores = quality * residual
        while len(where) < len(rows) and (scores[best := int(scores.argmax())] > floor or not where):
            n = len(where)
            rows[n] = (left[best] - rows[:n, best] @ rows[:n]) / np.sqrt(residual[best])
            residual -= rows[n] ** 2
            residual[residual <= nothing] = 0
            residual[best] = 0
            where.append(best)
            np.multiply(quality, residual, out=scores)
        return where


def _greedy(rule: _Rule, mask: Tensor, given: list[int], num_kept: int) -> list[int]:
    """Go on from the choices that `rule` has taken already."""
    chosen, taken, size = list(given), ~mask, _POOL
    taken[given] = True
    most = min(num_kept, len(given) + int((~taken).sum()))
    while len(chosen) < most:
        scores = rule.scores().masked_fill_(taken, -torch.inf)
        if not bool(scores.amax() > 0):  # and so it stays: the rest comes in order of index
            return chosen + (~taken).nonzero()[: most - len(chosen), 0].tolist()
        pool, outside = _pool(scores, size)
        picks = pool[rule.step_through(pool, max(outside, 0.0), most - len(chosen))]
        rule.take(picks)
        taken[picks] = True
        chosen += picks.tolist()
        size = min(_POOL, 4 * len(picks) + 8)
    return chosen


def _pool(scores: Tensor, size: int) -> tuple[Tensor, float]:
    """Indices of the best scores, the very first among them, in order; and the best score outside."""
    size = min(size, int((scores > 0).sum()))
    values, indices = scores.topk(min(size + 1, len(scores)))
    first, indices = scores.argmax(), indices[:size]
    if not bool((indices == first).any()):  # more are equally good than fit
        indices[-1] = first
    return indices.sort().values, float(values[-1]) if size < len(scores) else -torch.inf


def _unsuppressed(features: _Features, weight: Tensor, threshold: Tensor, mask: Tensor, num_kept: int) -> list[int]:
    kept: list[int] = []
    order = weight.masked_fill(~mask, -torch.inf).argsort(descending=True, stable=True)[: int(mask.sum())]
    for indices in order.split(_POOL):
        if kept:
            earlier = torch.tensor(kept)
            near = features.part(earlier).distances(features.part(indices)) < threshold[earlier, None]
            indices = indices[~near.any(0)]
        block = features.part(indices)
        near = block.distances(block) < threshold[indices, None]
        suppressed = torch.zeros(len(indices), dtype=torch.bool)
        for i, index in enumerate(indices.tolist()):
            if not suppressed[i]:
                kept.append(index)
                suppressed |= near[i]
            if len(kept) == num_kept:
                return kept
    return kept


def _most_isolated(features: _Features, mask: Tensor) -> int:
    """The allowed element whose nearest other one is farthest."""
    nearest = torch.empty_like(features.squared)
    for rows in torch.arange(len(nearest)).split(_ROWS):
        distances = features.part(rows).distances(features).masked_fill_(~mask, torch.inf)
        distances[torch.arange(len(rows)), rows] = torch.inf
        torch.amin(distances, 1, out=nearest[rows[0] : rows[-1] + 1])
    return int(nearest.masked_fill_(~mask, -torch.inf).argmax())


def _choose(
    features: _Features,
    weight: Tensor,
    mask: Tensor,
    given: Tensor,
    threshold: Tensor | None,
    num_kept: int,
    method: str,
    isolated: bool,
) -> list[int]:
    if not bool(mask.any()):
        return []
    if threshold is not None:
        return _unsuppressed(features, weight, threshold, mask, num_kept)
    if method == "dpp":
        rule: _Rule = _Volume(features, weight, num_kept)
    else:
        rule = _MaxMin(features, weight)
        if len(given) == 0:
            best = weight.masked_fill(~mask, -torch.inf).argmax()
            given = torch.tensor([_most_isolated(features, mask)]) if isolated else best[None]
    for some in given.split(_ROWS):
        rule.take(some)
    return _greedy(rule, mask, given.tolist(), num_kept)


def forward(
    features: Tensor,
    weight: Tensor,
    mask: Tensor,
    given: Tensor,
    threshold: Tensor | None,
    num_kept: int,
    method: str,
    metric: str,
    isolated: bool,
) -> Tensor:
    acc = torch.promote_types(features.dtype, torch.float32)
    if bool((weight < 0).any()):
        raise ValueError(f"weight must not be negative, got {float(weight.min())}")
    chosen = torch.full((features.shape[0], num_kept), -1, dtype=torch.int64)
    limits = [None] * len(features) if threshold is None else threshold.to(acc).unbind()
    for b, image in enumerate(features.unbind()):
        of_image = _Features(image.to(acc), mask[b], metric)
        picks = _choose(of_image, weight[b].to(acc), mask[b], given[b], limits[b], num_kept, method, isolated)
        chosen[b, : len(picks)] = torch.tensor(picks, dtype=torch.int64)
    return chosen
