"""MultiMatch: shape, direction, length and position similarity of two scanpaths, for thousands of pairs at once.

Saccades u_i = f_(i+1) - f_i of both paths are aligned by the cheapest way through the matrix M_ij = |u_i - w_j| from
corner to corner (steps right, down, diagonal; a step costs the cell it enters). Medians along the way, D the screen's
diagonal:

    vector      1 - median |u_i - w_j| / (2 D)
    direction   1 - median angle between them, in [0, pi] / pi
    length      1 - median ||u_i| - |w_j|| / D
    position    1 - median |start of u_i - start of w_j| / D

Jarodzka, Holmqvist, Nyström, "A vector-based, multidimensional scanpath similarity measure", ETRA 2010; Dewhurst et
al., Behavior Research Methods 44, 2012. Without simplification and without durations, as OAT's evaluation uses it.

Decided here: where two ways into a cell cost the same, the diagonal one is taken, then the one along the first path
(`multimatch_gaze` leaves it to the order of a heap); paths with less than three fixations give NaN as there, and
`compat=True` instead pads them with points (1, 1) up to three, as OAT's published evaluation does; a saccade of length
0 has angle 0, as there.

Shapes: K pairs; m and n saccades.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from gaze_oat.errors import ScanpathProblem
from gaze_oat.pairing import Block, blocks, check_pairs, check_paths

DIMENSIONS = ("vector", "direction", "length", "position")
_DIAGONAL, _ALONG_FIRST, _ALONG_SECOND = 0, 1, 2


def multimatch(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    pairs: Int[np.ndarray, "K 2"] | None = None,
    *,
    screen: tuple[float, float] | Float[np.ndarray, "K 2"],
    compat: bool = False,
) -> Float[np.ndarray, "K 4"]:
    """Similarities in the order of DIMENSIONS, each 1 for equal paths; NaN for paths with less than three fixations.

    Args:
        first, second: paths of points (x, y) in pixels, (n, 2) each.
        pairs: (K, 2) indices into them; None compares first[i] with second[i].
        screen: width and height in pixels, one for all or one for each pair.
        compat: pad short paths with points (1, 1) instead of answering NaN.
    """
    first = [path.astype(float) for path in check_paths("first", first, 2)]
    second = [path.astype(float) for path in check_paths("second", second, 2)]
    pairs = check_pairs(len(first), len(second), pairs)
    size = np.broadcast_to(np.asarray(screen, float), (len(pairs), 2))
    if not (size > 0).all():
        raise ScanpathProblem(f"screen must be a positive width and height in pixels, got {screen}")
    if compat:
        first, second = _lengthened(first), _lengthened(second)
    long = np.array([len(path) > 2 for path in first]), np.array([len(path) > 2 for path in second])
    kept = np.flatnonzero(long[0][pairs[:, 0]] & long[1][pairs[:, 1]])
    medians = np.full((len(pairs), 4), np.nan)
    saccades = [[_saccades(path) for path in paths] for paths in (first, second)]
    for block in blocks(saccades[0], saccades[1], pairs[kept]):
        medians[kept[block.index]] = _medians(block)
    diagonal = np.hypot(size[:, 0], size[:, 1])
    scale = np.stack([2 * diagonal, np.full(len(pairs), np.pi), diagonal, diagonal], 1)
    return 1 - medians / scale


def _lengthened(paths: list[np.ndarray]) -> list[np.ndarray]:
    return [np.concatenate([path, np.ones((max(0, 3 - len(path)), 2))]) for path in paths]


def _saccades(path: np.ndarray) -> np.ndarray:
    """(n - 1, 6): vector, start, angle, length."""
    step = np.diff(path, axis=0)
    angle, length = np.arctan2(step[:, 1], step[:, 0]), np.hypot(step[:, 0], step[:, 1])
    if len(path) < 2:
        return np.zeros((1, 6))  # never aligned: such pairs are NaN
    return np.concatenate([step, path[:-1], angle[:, None], length[:, None]], 1)


def _medians(block: Block) -> np.ndarray:
    way_i, way_j, inside = _way(block)
    pair = np.broadcast_to(np.arange(len(block.index)), way_i.shape)
    i, j, k = way_i[inside], way_j[inside], pair[inside]
    u, w = block.first[i, :, k], block.second[j, :, k]
    turn = np.abs(u[:, 4] - w[:, 4])
    values = (
        np.hypot(u[:, 0] - w[:, 0], u[:, 1] - w[:, 1]),
        np.where(turn > np.pi, 2 * np.pi - turn, turn),
        np.abs(u[:, 5] - w[:, 5]),
        np.hypot(u[:, 2] - w[:, 2], u[:, 3] - w[:, 3]),
    )
    count = inside.sum(0)
    low, high, rows = (count - 1) // 2, count // 2, np.arange(len(count))
    found = np.empty((len(count), 4))
    for column, value in enumerate(values):
        table = np.full(inside.shape, np.inf)
        table[inside] = value
        ordered = np.sort(np.ascontiguousarray(table.T), axis=1)
        found[:, column] = (ordered[rows, low] + ordered[rows, high]) / 2
    return found


def _way(block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Saccade indices along the cheapest way, from its end to its start, and which entries are part of it."""
    entered = _entered_from(block)
    count = len(block.index)
    longest = len(block.first) + len(block.second) - 1
    i, j, k = block.first_length - 1, block.second_length - 1, np.arange(count)
    way_i, way_j = np.zeros((longest, count), np.int16), np.zeros((longest, count), np.int16)
    inside = np.zeros((longest, count), bool)
    going = np.ones(count, bool)
    for t in range(longest):
        way_i[t], way_j[t], inside[t] = i, j, going
        going = going & ((i > 0) | (j > 0))
        if not going.any():
            break
        origin = entered[i, j, k]
        i = np.maximum(i - (origin != _ALONG_SECOND), 0)
        j = np.maximum(j - (origin != _ALONG_FIRST), 0)
    return way_i, way_j, inside


def _entered_from(block: Block) -> np.ndarray:
    """(m, n, K): by which step the cheapest way enters each cell."""
    m, n, count = len(block.first), len(block.second), len(block.index)
    entered = np.empty((m, n, count), np.int8)
    cost = np.full((n + 1, count), np.inf)  # column 0 is a border that no way crosses
    new = np.full((n + 1, count), np.inf)
    for i, u in enumerate(block.first):
        distance = np.hypot(block.second[:, 0] - u[0], block.second[:, 1] - u[1])
        before = np.minimum(cost[:-1], cost[1:])
        if i == 0:
            before[0] = -distance[0]  # the start costs nothing
        for j in range(n):
            np.minimum(before[j], new[j], out=new[j + 1])
            new[j + 1] += distance[j]
        way = entered[i]
        np.less(cost[1:], cost[:-1], out=way, casting="unsafe")  # 1 where coming along the first path is cheaper
        way[new[:-1] < before] = _ALONG_SECOND
        cost, new = new, cost
    return entered
