"""Behaviour, delta and steps, counted by hand."""

import numpy as np
import pytest

from gaze_oat import ScanpathProblem, behaviour, behaviour_delta, behaviour_means, step_statistics
from gaze_oat.behaviour import by_scene, count_steps


def test_the_example_by_hand() -> None:
    """5 5 2 5 7: visits 5, 2, 5, 7; new are 5, 2, 7; once again 5; one fixation stays."""
    row = behaviour([np.array([5, 5, 2, 5, 7])], [7])[0]
    assert row.tolist() == [1, 5, 3 / 5, 1 / 5, 1 / 5]
    assert behaviour([np.array([4])], [7])[0].tolist() == [0, 1, 1, 0, 0]


def test_the_three_shares_make_a_whole() -> None:
    rng = np.random.default_rng(0)
    paths = [rng.integers(0, 4, rng.integers(1, 30)) for _ in range(300)]
    rows = behaviour(paths, [0] * 300)
    np.testing.assert_allclose(rows[:, 2:].sum(1), 1.0, atol=1e-12)
    assert (rows >= 0).all()
    assert rows[:, 0].tolist() == [float(path[-1] == 0) for path in paths]


def test_averages_are_over_scenes_not_paths() -> None:
    rows = behaviour([np.array([1]), np.array([1, 2, 1]), np.array([2, 2])], [1, 1, 1])
    assert behaviour_means(rows, ["a", "a", "b"])[:2].tolist() == [(1 + 0) / 2, (2 + 2) / 2]
    assert by_scene(np.array([1.0, np.nan, np.nan]), ["a", "a", "b"])[0] == 1.0
    assert np.isnan(by_scene(np.array([1.0, np.nan, np.nan]), ["a", "a", "b"])[1])


def test_delta_is_the_mean_relative_error() -> None:
    human = np.array([0.8, 10.0, 0.5, 0.25, 0.25])
    assert behaviour_delta(human, human) == 0
    assert behaviour_delta(np.array([0.4, 20, 0.5, 0.5, 0.25]), human) == pytest.approx((0.5 + 1 + 0 + 1 + 0) / 5)
    assert behaviour_delta(np.array([1, 1, 1, 1, 0.3]), np.array([1, 1, 1, 1, 0])) == pytest.approx(0.06)


def test_steps_by_hand() -> None:
    """(0,0) (0,2) (0,2) (1,2) (0,1): right 2, stay, down 1, up-left 2; then one turn."""
    steps = step_statistics([np.array([[0, 0], [0, 2], [0, 2], [1, 2], [0, 1]])])
    assert steps.lengths.tolist() == [1 / 4, 1 / 4, 2 / 4]
    assert steps.mean_length == pytest.approx(1.25)
    assert steps.directions.tolist() == pytest.approx([1 / 3, 0, 0, 1 / 3, 0, 0, 1 / 3, 0])
    assert steps.turns.sum() == pytest.approx(1)
    # from down (270 degrees) to up-left (135): 135 to the right, the edge between right and back
    assert steps.turns[2] + steps.turns[3] == pytest.approx(1)
    onward = step_statistics([np.array([[0, 0], [0, 1], [0, 2], [0, 1], [2, 1]])])
    assert onward.turns.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])  # left, then down: a turn to the left


def test_distances_between_distributions() -> None:
    right = step_statistics([np.array([[0, 0], [0, 1], [0, 2]])])
    far = step_statistics([np.array([[0, 0], [4, 0], [8, 0]])])
    assert right.distances(right) == {"length": 0.0, "direction": 0.0, "turn": 0.0}
    assert right.distances(far) == {"length": 3.0, "direction": 1.0, "turn": 0.0}
    assert far.distances(right) == right.distances(far)


def test_weights_count_paths_several_times() -> None:
    cells = [np.array([[0, 0], [0, 1]]), np.array([[0, 0], [3, 0]])]
    counted = count_steps(cells)
    twice = step_statistics([cells[0], cells[0], cells[1]])
    np.testing.assert_allclose(counted.statistics(np.array([2.0, 1.0])).lengths, twice.lengths)
    assert step_statistics([np.array([[0, 0]])]).lengths.tolist() == [0.0]


def test_bad_input_is_explained() -> None:
    with pytest.raises(ScanpathProblem, match="1 paths need as many targets, got 2"):
        behaviour([np.array([1])], [1, 2])
    with pytest.raises(ScanpathProblem, match=r"paths\[0\] is empty"):
        behaviour([np.array([], int)], [1])
