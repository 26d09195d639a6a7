"""Likelihood of what was done, by hand."""

import numpy as np
import pytest

from gaze_oat import ScanpathProblem, done_probabilities, negative_log_likelihood, sim


def test_by_hand() -> None:
    chances = np.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [0.1, 0.7, 0.2]])
    done = done_probabilities(chances, [1, 0])
    assert done.tolist() == [0.5, 0.25, 0.2]
    assert sim([done]) == pytest.approx(0.95 / 3)
    assert negative_log_likelihood([done, np.array([1.0])]) == pytest.approx(np.log(2 * 4 * 5) / 4)
    onehot = np.eye(3)[[1, 0, 2]]
    assert sim([done]) == pytest.approx(np.minimum(chances, onehot).sum(1).mean())
    assert negative_log_likelihood([np.array([0.0])]) == np.inf


def test_bad_input_is_explained() -> None:
    even = np.full((2, 3), 1 / 3)
    with pytest.raises(ScanpathProblem, match="a path of 2 fixations needs 3 rows, got 2"):
        done_probabilities(even, [0, 1])
    with pytest.raises(ScanpathProblem, match="each row must be a distribution"):
        done_probabilities(even * 2, [0])
    with pytest.raises(ScanpathProblem, match="objects must lie in 0 to 1"):
        done_probabilities(even, [2])
