"""The alignment metrics as textbooks write them: one pair, two loops. What the batched versions are held against."""

import math
from collections.abc import Callable, Sequence

import numpy as np


def needleman_wunsch(
    first: Sequence[object], second: Sequence[object], score: Callable[[object, object], float], gap: float = 0.0
) -> float:
    """Best total score of an alignment of two sequences; `gap` is added for each element that is left alone."""
    table = np.zeros((len(first) + 1, len(second) + 1))
    table[1:, 0] = gap * np.arange(1, len(first) + 1)
    table[0, 1:] = gap * np.arange(1, len(second) + 1)
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i, j] = max(table[i - 1, j - 1] + score(a, b), table[i - 1, j] + gap, table[i, j - 1] + gap)
    return float(table[-1, -1])


def sequence_score(first: Sequence[int], second: Sequence[int]) -> float:
    """Needleman-Wunsch with match 1, mismatch 0, gap 0, over the longer length."""
    return needleman_wunsch(first, second, lambda a, b: float(a == b)) / max(len(first), len(second))


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """Levenshtein distance: the best alignment with match 0, mismatch -1, gap -1, negated."""
    return round(-needleman_wunsch(first, second, lambda a, b: float(a == b) - 1, gap=-1.0))


def scanmatch(first: np.ndarray, second: np.ndarray, threshold: float = 3.5) -> float:
    """Needleman-Wunsch on cells with T - distance and gap 0, over T times the longer length."""
    total = needleman_wunsch(list(first), list(second), lambda a, b: threshold - math.dist(a, b))  # type: ignore[arg-type]
    return total / (threshold * max(len(first), len(second)))
