"""MultiMatch: agreement with the multimatch_gaze package, Dijkstra, and its laws."""

import multimatch_gaze
import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

from gaze_oat import ScanpathProblem, all_pairs, multimatch
from gaze_oat.multimatch import _way
from gaze_oat.pairing import Block

SCREEN = (1680.0, 1050.0)


def theirs(first: np.ndarray, second: np.ndarray) -> list[float]:
    kind = [("start_x", "f8"), ("start_y", "f8"), ("duration", "f8")]
    tables = [np.array([(x, y, 0.2) for x, y in path], dtype=kind) for path in (first, second)]
    found = multimatch_gaze.docomparison(*tables, screensize=SCREEN)[:4]
    return [float(np.asarray(value).squeeze()) for value in found]


def paths(seed: int, count: int, shortest: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random((rng.integers(shortest, 19), 2)) * SCREEN for _ in range(count)]


def test_it_agrees_with_multimatch_gaze() -> None:
    first, second = paths(0, 120, shortest=1), paths(1, 120, shortest=1)
    expected = np.array([theirs(a, b) for a, b in zip(first, second, strict=True)])
    assert 5 < np.isnan(expected[:, 0]).sum() < 60
    np.testing.assert_allclose(multimatch(first, second, screen=SCREEN), expected, atol=1e-12)


def test_equal_paths_match_wholly_and_place_does_not_matter_to_shape() -> None:
    own = paths(2, 40)
    np.testing.assert_allclose(multimatch(own, own, screen=SCREEN), 1.0, atol=1e-15)
    moved = [path + np.array([321.5, -17.25]) for path in own]
    other = paths(3, 40)
    np.testing.assert_allclose(
        multimatch(own, other, screen=SCREEN),
        multimatch(moved, [path + np.array([321.5, -17.25]) for path in other], screen=SCREEN),
        atol=1e-9,
    )
    only_position = multimatch(own, moved, screen=SCREEN)
    np.testing.assert_allclose(only_position[:, :3], 1.0, atol=1e-9)
    np.testing.assert_allclose(only_position[:, 3], 1 - np.hypot(321.5, 17.25) / np.hypot(*SCREEN), atol=1e-9)


def test_the_opposite_direction_scores_nothing() -> None:
    line = np.array([[100.0, 50], [200, 50], [300, 50], [400, 50]])
    found = multimatch([line], [line[::-1]], screen=SCREEN)[0]
    assert found[1] == pytest.approx(0.0, abs=1e-12)
    assert found[2] == pytest.approx(1.0, abs=1e-12)
    assert found[0] == pytest.approx(1 - 200 / (2 * np.hypot(*SCREEN)))


def cheapest(matrix: np.ndarray) -> float:
    """Dijkstra from corner to corner; a step costs the cell it enters."""
    rows, cols = matrix.shape
    edges = [
        (i * cols + j, a * cols + b, matrix[a, b])
        for i in range(rows)
        for j in range(cols)
        for a, b in ((i + 1, j), (i, j + 1), (i + 1, j + 1))
        if a < rows and b < cols
    ]
    start, end, cost = zip(*edges, strict=True)
    graph = coo_matrix((cost, (start, end)), shape=(rows * cols,) * 2).tocsr()
    return float(dijkstra(graph, indices=0)[-1])


def test_the_way_is_as_cheap_as_dijkstras() -> None:
    rng = np.random.default_rng(4)
    count, m, n = 60, 8, 11
    first, second = rng.normal(size=(m, 6, count)), rng.normal(size=(n, 6, count))
    block = Block(
        index=np.arange(count), first=first, second=second,
        first_length=np.full(count, m), second_length=np.full(count, n),
    )  # fmt: skip
    way_i, way_j, inside = _way(block)
    for pair in range(count):
        matrix = np.hypot(
            first[:, None, 0, pair] - second[None, :, 0, pair], first[:, None, 1, pair] - second[None, :, 1, pair]
        )
        i, j = way_i[inside[:, pair], pair], way_j[inside[:, pair], pair]
        assert (i[0], j[0], i[-1], j[-1]) == (m - 1, n - 1, 0, 0)
        assert set(zip(-np.diff(i), -np.diff(j), strict=True)) <= {(0, 1), (1, 0), (1, 1)}
        assert matrix[i, j].sum() - matrix[0, 0] == pytest.approx(cheapest(matrix), abs=1e-12)


def test_short_paths_have_no_score_unless_padded() -> None:
    short, long = [np.array([[5.0, 5]])], [np.array([[5.0, 5], [9, 9], [20, 3]])]
    assert np.isnan(multimatch(short, long, screen=SCREEN)).all()
    padded = multimatch(short, long, screen=SCREEN, compat=True)
    np.testing.assert_allclose(padded[0], theirs(np.array([[5.0, 5], [1, 1], [1, 1]]), long[0]), atol=1e-12)
    many = multimatch(short + long, long, all_pairs(2, 1), screen=SCREEN)
    assert np.isnan(many[0]).all()
    assert many[1].tolist() == [1, 1, 1, 1]


def test_each_pair_may_have_its_screen() -> None:
    first, second = paths(5, 2), paths(6, 2)
    both = multimatch(first, second, screen=np.array([[1680, 1050], [400, 300]]))
    np.testing.assert_allclose(both[0], multimatch(first, second, screen=SCREEN)[0], atol=1e-15)
    np.testing.assert_allclose(both[1], multimatch(first, second, screen=(400, 300))[1], atol=1e-15)
    with pytest.raises(ScanpathProblem, match="screen must be a positive width and height"):
        multimatch(first, second, screen=(0, 5))
