"""depth_attention on CPUs: tiles of tokens, and in each one source after another is scored and mixed while in cache.

A source's scores are one matrix product and one `vector_norm`. Its weights are exp(score - top) with `top` the first
source's score: as long as no score is far above, nothing that was summed needs scaling again. So every source is read
from memory once, forward and backward, where three separate passes would read it three times.
"""

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

_TILE = 1 << 19  # numbers of one source in a tile: larger ones leave the cache between scoring and mixing
_FAR = 30.0  # its exponential is far from the end of float32, also as a factor of large numbers


def _tiles(T: int, D: int) -> Iterator[slice]:
    step = max(1, _TILE // max(1, D))
    return (slice(start, min(start + step, T)) for start in range(0, T, step))


class _Softmax:
    """A running softmax over sources: unnormalised mixes of S queries, each (t, D), and their tops and sums (t, S)."""

    def __init__(self, mixes: Tensor) -> None:
        self.mixes = mixes
        self.top: Tensor | None = None
        self.total = mixes.new_ones((mixes.shape[1], mixes.shape[0]))

    def add(self, scores: Tensor, values: list[Tensor], shares: Tensor | None = None) -> None:
        """One more value for every query, weighted by exp(score) and, if given, by its share (t, 1)."""
        if self.top is None:
            self.top = scores
            for mix, value in zip(self.mixes, values, strict=True):
                mix.copy_(value) if shares is None else torch.mul(value, shares, out=mix)
            return
        above = scores - self.top
        if (above > _FAR).any():
            top = torch.maximum(self.top, scores)
            shrink = torch.exp(self.top - top)
            self.total *= shrink
            self.mixes *= shrink.T.unsqueeze(-1)
            self.top, above = top, scores - top
        weights = above.exp_()
        self.total += weights
        if shares is not None:
            weights = weights * shares
        for mix, value, weight in zip(self.mixes, values, weights.T.unsqueeze(-1), strict=True):
            mix.addcmul_(value, weight)

    def end(self, lse: Tensor) -> None:
        """Normalise the mixes and write the log-sum-exp (S, t)."""
        self.mixes *= self.total.reciprocal().T.unsqueeze(-1)
        if self.top is not None:
            torch.add(self.total.log(), self.top, out=lse.T)


def forward(
    sources: list[Tensor],
    queries: Tensor,
    state_out: Tensor | None,
    state_lse: Tensor | None,
    eps: float,
    normed_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, D), L, S = sources[0].shape, len(sources), queries.shape[0]
    dtype = reduce(torch.promote_types, (source.dtype for source in sources))
    out, lse = queries.new_empty((S, T, D), dtype=dtype), queries.new_empty((S, T))
    scores, inverse = queries.new_empty((T, L, S)), queries.new_empty((T, L, 1))
    for tile in _tiles(T, D):
        softmax = _Softmax(out[:, tile].to(queries.dtype))  # the output itself, if it is wide enough
        for source, score, norm in zip(sources, scores[tile].unbind(1), inverse[tile].unbind(1), strict=True):
            value = source[tile].to(queries.dtype)
            torch.linalg.vector_norm(value, dim=-1, keepdim=True, out=norm)
            norm.square_().div_(D).add_(eps).rsqrt_()
            torch.mul(torch.mm(value, queries.T), norm, out=score)
            softmax.add(score, [value] * S, norm if normed_values else None)
        if state_out is not None and state_lse is not None:
            before = state_lse[:, tile].to(queries.dtype)
            softmax.add(before.T, list(_seen(state_out[:, tile], before)))
        softmax.end(lse[:, tile])
        if dtype != queries.dtype:
            out[:, tile] = softmax.mixes
    return out, lse, scores, inverse


def _seen(state_out: Tensor, state_lse: Tensor) -> Tensor:
    """The state's mixes, 0 where nothing was seen: whatever stands there, NaN included."""
    return state_out.to(state_lse.dtype).masked_fill((state_lse == -torch.inf).unsqueeze(-1), 0.0)


def _dots(gradients: list[Tensor], values: list[Tensor]) -> Tensor:
    """gradient . value of every query, (t, S)."""
    product = torch.empty_like(gradients[0])
    dots = [torch.mul(d, value, out=product).sum(-1) for d, value in zip(gradients, values, strict=True)]
    return torch.stack(dots, -1)


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    d_scores: Tensor,
    scores: Tensor,
    inverse: Tensor,
    sources: list[Tensor],
    queries: Tensor,
    state_out: Tensor | None,
    state_lse: Tensor | None,
    normed_values: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """With p a weight and d the gradient of the mix, that of a score is p * (d . v - delta), delta = sum of p * d . v.

    Taking delta as d . out, and p as exp(score - lse), would spare the first sweep, but is not exact where one weight
    is near 1 or scores are large.
    """
    d_sources, d_queries = [source.new_empty(source.shape) for source in sources], torch.zeros_like(queries)
    d_state_out, d_state_lse = (
        queries.new_empty(0) if t is None else t.new_empty(t.shape) for t in (state_out, state_lse)
    )
    for tile in _tiles(*sources[0].shape):
        values = [source[tile].to(queries.dtype) for source in sources]
        gradients, norm = list(d_out[:, tile].to(queries.dtype)), inverse[tile]
        dots = torch.stack([_dots(gradients, [value] * len(gradients)) for value in values], 1)
        if normed_values:
            dots *= norm
        if state_out is None or state_lse is None:
            weights = scores[tile].softmax(1)
            delta = (weights * dots).sum(1) - d_lse[:, tile].T
        else:
            before = state_lse[:, tile].to(queries.dtype)
            weights, share = torch.cat([scores[tile], before.T.unsqueeze(1)], 1).softmax(1).tensor_split([-1], 1)
            share, dot = share.squeeze(1), _dots(gradients, list(_seen(state_out[:, tile], before)))
            delta = (weights * dots).sum(1) + share * dot - d_lse[:, tile].T
            d_state_lse[:, tile] = (share * (dot - delta)).T
            d_state_out[:, tile] = d_out[:, tile] * share.T.unsqueeze(-1)
        along = weights * (dots - delta.unsqueeze(1)) + d_scores[tile]
        outward = along * scores[tile]  # what the norm takes off along the source itself
        if normed_values:
            outward += weights * dots
            weights = weights * norm
        along *= norm
        outward = outward.sum(-1, keepdim=True) * norm.square()
        for i, (value, d_source) in enumerate(zip(values, d_sources, strict=True)):
            target = d_source[tile].to(queries.dtype)
            torch.mul(value, outward[:, i], out=target).div_(-value.shape[-1])
            for d, query, weight, part in zip(gradients, queries, weights[:, i].T, along[:, i].T, strict=True):
                target.addcmul_(d, weight[:, None]).addcmul_(query, part[:, None])
            d_queries.addmm_(along[:, i].T, value)
            if d_source.dtype != target.dtype:
                d_source[tile] = target
    return d_sources, d_queries, d_state_out, d_state_lse
