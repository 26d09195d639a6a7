"""diverse_subset on CPUs: lazy greedy in rounds, so that features are read once per round and not once per choice.

Scores of "max_min" and "dpp" only fall while elements are chosen, so an old score bounds the new one from above. A
round brings all scores up to date by one matrix product with what the last round chose, and takes the best 128 as its
pool. Choices are then made inside the pool, where each costs a product with 128 rows, as long as the winner beats every
old score outside. Typical features give tens of choices a round; the worst case is one, the same as without rounds.
"threshold" goes through blocks of 128 in order of weight. Nothing of N x N exists; images are processed in turn.

Lengths are divided out after products, so float32 features are not copied.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

_POOL = 128
_ROWS = 128  # of distances at a time, where all are needed
_NOTHING = 1e-5  # see the op's docstring


class _Features:
    """The features of one image, and distances or products between any of them."""

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

    def products(self, rows: Tensor, columns: "_Features") -> Tensor:
        """<row, column> of features brought to length 1 if the metric is the cosine; rows are indices into self."""
        if len(rows) == 1:  # `mv` is faster than `mm` with one row
            product = torch.mv(columns.x, self.x[int(rows)])[None]
        else:
            product = torch.mm(self.x[rows], columns.x.T)
        return product.mul_(columns.inverse).mul_(self.inverse[rows, None]) if self.cosine else product

    def distances(self, rows: Tensor, columns: "_Features") -> Tensor:
        product = self.products(rows, columns)
        if self.cosine:
            return product.neg_().add_(1).clamp_(min=0)
        return product.mul_(-2).add_(columns.squared).add_(self.squared[rows, None]).clamp_(min=0).sqrt_()

    def part(self, indices: Tensor) -> "_Features":
        """Some of the features as features of their own."""
        few = object.__new__(_Features)
        few.x, few.cosine = self.x[indices], self.cosine
        few.squared, few.inverse = self.squared[indices], self.inverse[indices]
        return few


class _Rule(Protocol):
    """What the next choice is made by."""

    def scores(self) -> Tensor:
        """Of all elements; they only fall."""

    def take(self, picks: Tensor) -> None:
        """These are chosen now."""

    def absorb(self, picks: Tensor, pool: Any, where: Tensor) -> None:
        """These are, at positions `where` of a part of this rule that took them already."""

    def part(self, indices: Tensor) -> Any:
        """The same rule for some of the elements."""


class _MaxMin:
    """weight * distance to the nearest chosen element."""

    def __init__(self, features: _Features, weight: Tensor, nearest: Tensor | None = None) -> None:
        self.features, self.weight = features, weight
        self.nearest = torch.full_like(weight, torch.inf) if nearest is None else nearest

    def scores(self) -> Tensor:
        return self.weight * self.nearest

    def take(self, picks: Tensor) -> None:
        torch.minimum(self.nearest, self.features.distances(picks, self.features).amin(0), out=self.nearest)

    def absorb(self, picks: Tensor, pool: Any, where: Tensor) -> None:  # noqa: ARG002
        self.take(picks)

    def part(self, indices: Tensor) -> "_MaxMin":
        return _MaxMin(self.features.part(indices), self.weight[indices], self.nearest[indices])


class _Volume:
    """weight^2 * squared distance to the span of the chosen elements: Cholesky factors, a row for each choice."""

    def __init__(self, features: _Features, quality: Tensor, factors: Tensor, residual: Tensor, floor: Tensor) -> None:
        self.features, self.quality = features, quality
        self.factors, self.residual, self.floor = factors, residual, floor
        self.count = 0  # rows of `factors` that are filled

    def scores(self) -> Tensor:
        return self.quality * self.residual

    def take(self, picks: Tensor) -> None:
        """Of elements that are not in the span already; one after the other."""
        for pick in picks.tolist():
            if self.residual[pick] > 0:
                done = self.factors[: self.count]
                row = self.features.products(torch.tensor([pick]), self.features)[0]
                self._append(row.sub_(done.T @ done[:, pick]).div_(self.residual[pick].sqrt())[None])

    def absorb(self, picks: Tensor, pool: "_Volume", where: Tensor) -> None:
        """What the pool chose at its positions `where`: it knows their factors' triangle, the rest is solved for."""
        done = self.factors[: self.count]
        rows = self.features.products(picks, self.features).sub_(done[:, picks].T @ done)
        triangle = pool.factors[pool.count - len(picks) : pool.count, where].T
        self._append(torch.linalg.solve_triangular(triangle, rows, upper=False))

    def _append(self, rows: Tensor) -> None:
        self.factors[self.count : self.count + len(rows)] = rows
        self.count += len(rows)
        self.residual.sub_(rows.square().sum(0))
        self.residual.masked_fill_(self.residual <= self.floor, 0)

    def part(self, indices: Tensor) -> "_Volume":
        factors = self.factors.new_empty(self.factors.shape[0], len(indices))
        factors[: self.count] = self.factors[: self.count, indices]
        few = _Volume(
            self.features.part(indices), self.quality[indices], factors, self.residual[indices], self.floor[indices]
        )
        few.count = self.count
        return few


def _greedy(rule: _Rule, mask: Tensor, chosen: list[int], num_kept: int) -> list[int]:
    """Go on from the elements `chosen` already, which `rule` knows."""
    taken = ~mask
    taken[chosen] = True
    num_kept = min(num_kept, len(chosen) + int((~taken).sum()))
    while len(chosen) < num_kept:
        scores = rule.scores().masked_fill_(taken, -torch.inf)
        if not bool(scores.amax() > 0):  # and so it stays: the rest comes in order of index
            return chosen + (~taken).nonzero()[: num_kept - len(chosen), 0].tolist()
        indices, outside = _pool(scores)
        pool = rule.part(indices)
        where = _choose_within(pool, scores[indices], outside, num_kept - len(chosen))
        picks = indices[where]
        rule.absorb(picks, pool, where)
        taken[picks] = True
        chosen = chosen + picks.tolist()
    return chosen


def _pool(scores: Tensor) -> tuple[Tensor, float]:
    """Indices of the best scores, the very first among them, in order; and the best score outside."""
    if len(scores) <= _POOL:
        return torch.arange(len(scores)), -torch.inf
    values, indices = scores.topk(_POOL + 1)
    first, indices = scores.argmax(), indices[:-1]
    if not bool((indices == first).any()):  # more are equally good than fit
        indices[-1] = first
    return indices.sort().values, float(values[-1])


def _choose_within(pool: _Rule, scores: Tensor, outside: float, most: int) -> Tensor:
    """Positions in the pool, in order of choice: one at least, further ones while they beat what is outside."""
    where: list[int] = []
    taken = scores == -torch.inf
    while len(where) < most:
        position = scores.argmax()
        if where and not scores[position] > max(outside, 0.0):
            break
        where.append(int(position))
        taken[position] = True
        pool.take(position[None])
        scores = pool.scores().masked_fill_(taken, -torch.inf)
    return torch.tensor(where)


def _unsuppressed(features: _Features, weight: Tensor, threshold: Tensor, mask: Tensor, num_kept: int) -> list[int]:
    kept: list[int] = []
    order = weight.masked_fill(~mask, -torch.inf).argsort(descending=True, stable=True)[: int(mask.sum())]
    for indices in order.split(_POOL):
        if kept:
            earlier = torch.tensor(kept)
            near = features.distances(earlier, features.part(indices)) < threshold[earlier, None]
            indices = indices[~near.any(0)]
        block = features.part(indices)
        near = block.distances(torch.arange(len(indices)), block) < threshold[indices, None]
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
        distances = features.distances(rows, features).masked_fill_(~mask, torch.inf)
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
        squares = features.squared
        factors = squares.new_empty(num_kept, len(squares))
        rule: _Rule = _Volume(features, weight.square(), factors, squares.clone(), _NOTHING * squares)
    else:
        rule = _MaxMin(features, weight)
        if len(given) == 0:
            best = weight.masked_fill(~mask, -torch.inf).argmax()
            given = torch.tensor([_most_isolated(features, mask)]) if isolated else best[None]
    if len(given):
        rule.take(given)
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
