"""Sequence Score, edit distance and ScanMatch against textbook loops, by hand, and by their laws."""

import numpy as np
import pytest

from gaze_oat import ScanpathProblem, all_pairs, edit_distance, reference, scanmatch, sequence_score

COUNT = 1000


def paths(seed: int, objects: int = 5, longest: int = 23) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, objects, rng.integers(1, longest)) for _ in range(COUNT)]


def longest_common_subsequence(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """By the definition's other recursion, from the ends."""
    table: dict[tuple[int, int], int] = {}
    for i in range(len(a), -1, -1):
        for j in range(len(b), -1, -1):
            if i == len(a) or j == len(b):
                table[i, j] = 0
            elif a[i] == b[j]:
                table[i, j] = 1 + table[i + 1, j + 1]
            else:
                table[i, j] = max(table[i + 1, j], table[i, j + 1])
    return table[0, 0]


def test_sequence_score_is_the_longest_common_subsequence() -> None:
    first, second = paths(0), paths(1)
    found = sequence_score(first, second)
    for a, b, score in zip(first, second, found, strict=True):
        assert score == longest_common_subsequence(tuple(a), tuple(b)) / max(len(a), len(b))
    assert found[:100].tolist() == [
        reference.sequence_score(a, b) for a, b in zip(first[:100], second[:100], strict=True)
    ]


def test_edit_distance_is_levenshtein() -> None:
    words = [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("a", "bcd", 3), ("intention", "execution", 5)]
    first = [np.array([ord(c) for c in a]) for a, _, _ in words]
    second = [np.array([ord(c) for c in b]) for _, b, _ in words]
    assert edit_distance(first, second).tolist() == [3, 2, 3, 5]
    first, second = paths(2)[:200], paths(3)[:200]
    expected = [reference.edit_distance(a, b) for a, b in zip(first, second, strict=True)]
    assert edit_distance(first, second).tolist() == expected


def test_edit_distance_is_a_metric() -> None:
    own = paths(4)[:60]
    table = edit_distance(own, own, all_pairs(60, 60)).reshape(60, 60)
    assert (np.diag(table) == 0).all()
    assert (table == table.T).all()
    assert (table[:, :, None] <= table[:, None, :] + table.T[None]).all()
    scores = sequence_score(own, own, all_pairs(60, 60)).reshape(60, 60)
    assert (np.diag(scores) == 1).all()
    assert (scores == scores.T).all()


def test_scanmatch_is_needleman_wunsch_on_cells() -> None:
    rng = np.random.default_rng(5)
    first = [rng.integers(0, 9, (rng.integers(1, 17), 2)) for _ in range(150)]
    second = [rng.integers(0, 9, (rng.integers(1, 17), 2)) for _ in range(150)]
    expected = [reference.scanmatch(a, b, 2.7) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(scanmatch(first, second, threshold=2.7), expected, rtol=1e-12)
    assert scanmatch(first, first) == pytest.approx(1.0, abs=1e-12)
    by_hand = scanmatch([np.array([[0, 0], [0, 5]])], [np.array([[0, 1], [0, 5], [4, 4]])])
    assert by_hand == pytest.approx((2.5 + 3.5) / (3.5 * 3))


def test_a_tiny_threshold_leaves_exact_matching() -> None:
    rng = np.random.default_rng(6)
    cells = [rng.integers(0, 4, (rng.integers(2, 12), 2)) for _ in range(80)]
    ids = [cell[:, 0] * 4 + cell[:, 1] for cell in cells]
    pairs = all_pairs(40, 80)
    found = scanmatch(cells[:40], cells, pairs, threshold=1e-6)
    np.testing.assert_allclose(found, sequence_score(ids[:40], ids, pairs), atol=1e-9)


def test_scanmatch_falls_with_spatial_error() -> None:
    base = np.array([[0, 0], [3, 3], [6, 1], [2, 2]])
    moved = [base + np.array([[0, error], [0, 0], [0, 0], [0, 0]]) for error in (0, 1, 2, 3)]
    found = scanmatch([base] * 4, moved)
    assert (np.diff(found) < 0).all()
    assert found[1] == pytest.approx(1 - 1 / (3.5 * 4))


def test_pairs_may_be_any_and_in_any_order() -> None:
    first, second = paths(7)[:30], paths(8)[:40]
    whole = sequence_score(first, second, all_pairs(30, 40)).reshape(30, 40)
    pairs = np.random.default_rng(9).integers(0, 30, (500, 2))
    assert (sequence_score(first, second, pairs) == whole[pairs[:, 0], pairs[:, 1]]).all()
    assert sequence_score(first, second, np.zeros((0, 2), int)).shape == (0,)
    assert sequence_score([], []).shape == (0,)
    assert sequence_score([np.array([1])], [np.array([1])])[0] == 1
    assert edit_distance([np.array([1])], [np.arange(300)])[0] == 299


def test_bad_input_is_explained() -> None:
    one = [np.array([1, 2])]
    for metric in (sequence_score, edit_distance):
        with pytest.raises(ScanpathProblem, match=r"first\[0\] is empty"):
            metric([np.array([], int)], one)
        with pytest.raises(ScanpathProblem, match="1 paths cannot go one by one with 2"):
            metric(one, one * 2)
        with pytest.raises(ScanpathProblem, match="point at paths up to"):
            metric(one, one, np.array([[0, 1]]))
        with pytest.raises(ScanpathProblem, match=r"\(K, 2\) indices"):
            metric(one, one, np.array([0, 1]))
    with pytest.raises(ScanpathProblem, match=r"second\[0\] has shape \(2,\): each path must be \(n, 2\)"):
        scanmatch([np.array([[1, 2]])], one)
    with pytest.raises(ScanpathProblem, match="threshold must be positive"):
        scanmatch([np.array([[1, 2]])], [np.array([[1, 2]])], threshold=0)
