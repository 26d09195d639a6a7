"""Gram matrices of features, chunk by chunk of heads: memory does not grow with the number of heads.

Products of a chunk are taken in the dtype of the samples and added up in float64. Only the lower triangle is computed.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_attn.random_feature_theory.features import Features
from llm_attn.random_feature_theory.inputs import Sets

CHUNK = 2048
"""Numbers of a chunk of features, at least one unit of them: about 120 heads at d = 16."""
_PANEL = 512

OnChunk = Callable[[int, int], None]
"""Told how many units are done, of how many."""


def gram(
    features: Features,
    sets: Sets,
    *,
    columns: int | None = None,
    chunk: int | None = None,
    on_chunk: OnChunk | None = None,
) -> Float[Tensor, "n columns"]:
    """<phi(x), phi(x')> of all samples with the first `columns` (by default all), float64.

    chunk: units at a time; the result does not depend on it beyond rounding.
    """
    return next(growing_gram(features, sets, [features.count], columns=columns, chunk=chunk, on_chunk=on_chunk))


def growing_gram(
    features: Features,
    sets: Sets,
    counts: Sequence[int],
    *,
    columns: int | None = None,
    chunk: int | None = None,
    on_chunk: OnChunk | None = None,
) -> Iterator[Float[Tensor, "n columns"]]:
    """Gram matrices of the first `counts` units, each as if the map had just these, in one pass over the last."""
    if list(counts) != sorted(set(counts)) or not 1 <= counts[0] <= counts[-1] <= features.count:
        raise ValueError(f"counts must rise and lie in 1..{features.count}, got {list(counts)}")
    columns = len(sets) if columns is None else columns
    total = torch.zeros(len(sets), columns, dtype=torch.float64, device=sets.keys.device)
    done = 0
    for count in counts:
        for start, stop in _pieces(done, count, chunk or max(1, CHUNK // features.width)):
            _add_lower(total, features(sets, start, stop))
            if on_chunk is not None:
                on_chunk(stop, counts[-1])
        done = count
        yield _mirrored(total * (features.count / count))


def feature_sum(
    features: Features, sets: Sets, rows: Float[Tensor, "n targets"], *, chunk: int | None = None
) -> Float[Tensor, "features targets"]:
    """phi(X)^T rows: turns dual coefficients into weights of the features (float64)."""
    pieces = _pieces(0, features.count, chunk or max(1, CHUNK // features.width))
    return torch.cat([features(sets, *piece).double().T @ rows for piece in pieces])


def feature_dot(
    features: Features, sets: Sets, weights: Float[Tensor, "features targets"], *, chunk: int | None = None
) -> Float[Tensor, "n targets"]:
    """phi(X) weights: what a model with these weights says about samples (float64)."""
    out = torch.zeros(len(sets), weights.shape[1], dtype=torch.float64, device=weights.device)
    for start, stop in _pieces(0, features.count, chunk or max(1, CHUNK // features.width)):
        out += features(sets, start, stop).double() @ weights[start * features.width : stop * features.width]
    return out


def _pieces(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    if size < 1:
        raise ValueError(f"chunk must be at least 1, got {size}")
    for left in range(start, stop, size):
        yield left, min(left + size, stop)


def _add_lower(total: Tensor, phi: Tensor) -> None:
    columns = total.shape[1]
    for left in range(0, columns, _PANEL):
        right = min(left + _PANEL, columns)
        total[left:, left:right] += phi[left:] @ phi[left:right].T


def _mirrored(total: Tensor) -> Tensor:
    columns = total.shape[1]
    for left in range(0, columns, _PANEL):
        right = min(left + _PANEL, columns)
        square = total[left:right, left:right]
        square.copy_(square.tril() + square.tril(-1).T)
        total[left:right, right:] = total[right:columns, left:right].T
    return total
