"""Which paths are compared with which, as index pairs, and how thousands of pairs are laid out for numpy.

Every pairwise metric of this package takes two lists of paths and `pairs`, (K, 2) indices into them. Scores in the
literature differ by as much as 0.51 against 0.64 on one data set because pairings differ (a path compared with itself
raises the human score), so the rule is an argument here and never a habit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from gaze_oat.errors import ScanpathProblem

_MOST_CELLS = 1 << 18
_FEW, _MANY = 3_000, 60_000


def elementwise(count: int) -> Int[np.ndarray, "K 2"]:
    """Path i with path i."""
    return np.repeat(np.arange(count)[:, None], 2, 1)


def all_pairs(first: int, second: int) -> Int[np.ndarray, "K 2"]:
    """Each of the first with each of the second; reshape scores to (first, second)."""
    return np.stack([part.ravel() for part in np.mgrid[:first, :second]], 1)


def between_pairs(keys: Sequence[object], owners: Sequence[object]) -> Int[np.ndarray, "K 2"]:
    """i < j with equal keys (scene) and different owners (observer): no path meets itself, no pair counts twice."""
    groups: dict[object, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    found = [
        (i, j) for own in groups.values() for a, i in enumerate(own) for j in own[a + 1 :] if owners[i] != owners[j]
    ]
    return np.array(found, int).reshape(-1, 2)


def matching_pairs(first_keys: Sequence[object], second_keys: Sequence[object]) -> Int[np.ndarray, "K 2"]:
    """Every path of the first list with every path of the second that has the same key (scene)."""
    where: dict[object, list[int]] = {}
    for number, key in enumerate(second_keys):
        where.setdefault(key, []).append(number)
    found = [(i, j) for i, key in enumerate(first_keys) for j in where.get(key, ())]
    return np.array(found, int).reshape(-1, 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Pairs of similar lengths, padded to the longest; the pair is the last axis, so that one operation serves all."""

    index: Int[np.ndarray, "K"]
    """Where the pairs stand in the list that was asked for."""
    first: np.ndarray
    """(m, ..., K), padded with whatever the last element is."""
    second: np.ndarray
    """(n, ..., K)."""
    first_length: Int[np.ndarray, "K"]
    """Lengths before padding."""
    second_length: Int[np.ndarray, "K"]
    """Lengths before padding."""


def check_paths(name: str, paths: Sequence[np.ndarray], width: int | None) -> list[np.ndarray]:
    """Paths as arrays, (n,) or (n, width); ScanpathProblem for an empty path or another shape."""
    arrays = [np.asarray(path) for path in paths]
    for number, path in enumerate(arrays):
        if path.ndim != (1 if width is None else 2) or (width is not None and path.shape[1] != width):
            wanted = "(n,) object ids" if width is None else f"(n, {width})"
            raise ScanpathProblem(f"{name}[{number}] has shape {path.shape}: each path must be {wanted}")
        if len(path) == 0:
            raise ScanpathProblem(f"{name}[{number}] is empty: a path needs at least one fixation")
        if not np.isfinite(path).all():
            raise ScanpathProblem(f"{name}[{number}] holds a value that is not finite: leave that fixation out")
    return arrays


def check_pairs(first: int, second: int, pairs: Int[np.ndarray, "K 2"] | None) -> Int[np.ndarray, "K 2"]:
    """The pairs, `None` meaning i with i; ScanpathProblem where they point nowhere."""
    if pairs is None:
        if first != second:
            raise ScanpathProblem(
                f"{first} paths cannot go one by one with {second}: give pairs, such as all_pairs(...)"
            )
        return elementwise(first)
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ScanpathProblem(f"pairs must be (K, 2) indices, got {pairs.shape}")
    if len(pairs) and (pairs.min() < 0 or (pairs.max(0) >= (first, second)).any()):
        raise ScanpathProblem(f"pairs point at paths up to {pairs.max(0).tolist()}, but there are {first} and {second}")
    return pairs


def blocks(first: Sequence[np.ndarray], second: Sequence[np.ndarray], pairs: Int[np.ndarray, "K 2"]) -> Iterator[Block]:
    """All pairs, those of similar lengths together; at most about 2^18 cells of an m x n table row at once."""
    padded, lengths = zip(*(_padded(paths) for paths in (first, second)), strict=True)
    own = [lengths[side][pairs[:, side]] for side in (0, 1)]
    rounded = [_rounded(length, len(pairs)) for length in own]
    order = np.lexsort((rounded[1], rounded[0]))
    edges = np.flatnonzero((np.diff(rounded[0][order]) != 0) | (np.diff(rounded[1][order]) != 0)) + 1
    for group in np.split(order, edges):
        if len(group) == 0:
            continue
        m, n = int(own[0][group].max()), int(own[1][group].max())
        most = max(1, _MOST_CELLS // max(m, n))
        for start in range(0, len(group), most):
            index = group[start : start + most]
            sides = [
                np.ascontiguousarray(np.moveaxis(padded[side][pairs[index, side], :size], 0, -1))
                for side, size in ((0, m), (1, n))
            ]
            yield Block(
                index=index, first=sides[0], second=sides[1], first_length=own[0][index], second_length=own[1][index]
            )


def _padded(paths: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(path) for path in paths], int)
    if not len(paths):
        return np.zeros((0, 1)), lengths
    take = np.minimum(np.arange(lengths.max())[None], lengths[:, None] - 1)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return np.concatenate(list(paths))[starts[:, None] + take], lengths


def _rounded(lengths: np.ndarray, count: int) -> np.ndarray:
    """Length classes: four an octave for many pairs, fewer for few, as each block of pairs costs its own loop."""
    octave = np.log2(np.maximum(lengths, 1))
    if count < _MANY:
        width = 2 if count < _FEW else 1
        return np.ceil(octave / width).astype(int)
    step = 2 ** np.maximum(1, np.floor(octave).astype(int) - 2)
    return -(-lengths // step) * step
