"""Sequence Score, fixation edit distance and ScanMatch: dynamic programmes over thousands of pairs at once.

    Sequence Score   Needleman-Wunsch with match 1, mismatch 0, gap 0, over max(m, n); this is LCS(a, b) / max(m, n)
    FED              Levenshtein distance with unit costs, not normalised
    ScanMatch        Needleman-Wunsch with S_ij = T - |cell_i - cell_j| and gap 0, over T max(m, n)

Yang et al., "Predicting Goal-directed Human Attention Using Inverse Reinforcement Learning", CVPR 2020 (Sequence
Score); Cristino et al., "ScanMatch", Behavior Research Methods 42, 2010; Levenshtein 1966. `gaze_oat.reference` has the
textbook loops.

Decided here: ids are compared as they are (the Sequence Score of the literature first clusters fixations; objects are
the clusters here); ScanMatch has no durations, as in the paper's evaluation; T defaults to 3.5 cells. With gap 0 the
value left of a cell is carried on unchanged, and with gap 1 up to a ramp, so a row needs no loop over its cells: it is
a running maximum.

Shapes: K pairs, m and n fixations of the two paths.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from gaze_oat.errors import ScanpathProblem
from gaze_oat.pairing import Block, blocks, check_pairs, check_paths

Paths = Sequence[np.ndarray]
Pairs = Int[np.ndarray, "K 2"]


def sequence_score(first: Paths, second: Paths, pairs: Pairs | None = None) -> Float[np.ndarray, "K"]:
    """LCS(a, b) / max(m, n) of each pair of id sequences: 1 for equal paths, 0 for paths that share no object.

    Args:
        first, second: paths of object ids, (n,) each.
        pairs: (K, 2) indices into them; None compares first[i] with second[i].
    """
    first, second = check_paths("first", first, None), check_paths("second", second, None)
    pairs = check_pairs(len(first), len(second), pairs)
    scores = np.zeros(len(pairs))
    for block in blocks(first, second, pairs):
        scores[block.index] = _common(block) / np.maximum(block.first_length, block.second_length)
    return scores


def edit_distance(first: Paths, second: Paths, pairs: Pairs | None = None) -> Int[np.ndarray, "K"]:
    """FED: insertions, deletions and substitutions that turn one path into the other. Arguments as `sequence_score`."""
    first, second = check_paths("first", first, None), check_paths("second", second, None)
    pairs = check_pairs(len(first), len(second), pairs)
    distances = np.zeros(len(pairs), int)
    for block in blocks(first, second, pairs):
        distances[block.index] = _edits(block)
    return distances


def scanmatch(
    first: Paths, second: Paths, pairs: Pairs | None = None, *, threshold: float = 3.5
) -> Float[np.ndarray, "K"]:
    """ScanMatch of each pair: 1 for equal paths.

    Args:
        first, second: paths of grid cells (row, column), (n, 2) each; `gaze_oat.to_cells` makes them from pixels.
        pairs: (K, 2) indices into them; None compares first[i] with second[i].
        threshold: T, the distance in cells up to which two fixations still add to the score.
    """
    if not threshold > 0:
        raise ScanpathProblem(f"threshold must be positive (cells), got {threshold}")
    first, second = check_paths("first", first, 2), check_paths("second", second, 2)
    pairs = check_pairs(len(first), len(second), pairs)
    scores = np.zeros(len(pairs))
    for block in blocks([path.astype(float) for path in first], [path.astype(float) for path in second], pairs):
        longer = np.maximum(block.first_length, block.second_length)
        scores[block.index] = _aligned(block, threshold) / (threshold * longer)
    return scores


def _running_max(rows: np.ndarray) -> None:
    for j in range(1, len(rows)):
        np.maximum(rows[j], rows[j - 1], out=rows[j])


def _ends(table: np.ndarray, row: int, block: Block, out: np.ndarray) -> None:
    """Reads the last cell of the pairs whose first path ends with this row."""
    ended = np.flatnonzero(block.first_length == row)
    out[ended] = table[block.second_length[ended], ended]


def _common(block: Block) -> np.ndarray:
    n, count = block.second.shape
    table, out = np.zeros((n + 1, count), np.int16), np.zeros(count, np.int16)
    for i, symbol in enumerate(block.first, 1):
        grown = table[:-1] + (block.second == symbol)
        np.maximum(table[1:], grown, out=table[1:])
        _running_max(table)
        _ends(table, i, block, out)
    return out


def _edits(block: Block) -> np.ndarray:
    """Keeps j - D[i, j], in which a gap along the row costs nothing."""
    n, count = block.second.shape
    ramp = np.arange(n + 1, dtype=np.int16)[:, None]
    table, out = np.zeros((n + 1, count), np.int16), np.zeros(count, np.int16)
    for i, symbol in enumerate(block.first, 1):
        grown = table[:-1] + (block.second == symbol)
        np.maximum(table[1:] - 1, grown, out=table[1:])
        table[0] = -i
        _running_max(table)
        ended = np.flatnonzero(block.first_length == i)
        last = block.second_length[ended]
        out[ended] = ramp[last, 0] - table[last, ended]
    return out


def _aligned(block: Block, threshold: float) -> np.ndarray:
    n, _, count = block.second.shape
    table, out = np.zeros((n + 1, count)), np.zeros(count)
    for i, cell in enumerate(block.first, 1):
        distance = np.hypot(block.second[:, 0] - cell[0], block.second[:, 1] - cell[1])
        np.maximum(table[1:], table[:-1] + (threshold - distance), out=table[1:])
        _running_max(table)
        _ends(table, i, block, out)
    return out
