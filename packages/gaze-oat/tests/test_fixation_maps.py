"""NSS against the formula written out, and the map it is read from."""

import numpy as np
import pytest

from gaze_oat import ScanpathProblem, fixation_map, nss


def test_maps_say_where_fixations_fell() -> None:
    points = np.array([[0.5, 2.9], [3, 0], [3.9, 0.2]])
    expected = np.zeros((3, 4))
    expected[2, 0], expected[0, 3] = 1, 2
    assert np.array_equal(fixation_map(points, width=4, height=3, binary=False), expected)
    assert np.array_equal(fixation_map(points, width=4, height=3), np.minimum(expected, 1))


def test_nss_is_the_z_score_at_fixations() -> None:
    rng = np.random.default_rng(0)
    seen = np.stack([rng.integers(0, 30, 40), rng.integers(0, 20, 40)], 1)
    human = np.stack([rng.integers(0, 30, 15), rng.integers(0, 20, 15)], 1)
    human[:5] = seen[:5]
    binary = fixation_map(seen, width=30, height=20)
    mean = binary.sum() / 600
    deviation = (((binary - mean) ** 2).sum() / 600) ** 0.5
    expected = np.mean([(binary[y, x] - mean) / deviation for x, y in human])
    assert nss(binary, human) == pytest.approx(expected, abs=1e-12)
    share = binary.mean()
    hit = binary[human[:, 1], human[:, 0]].mean()
    assert nss(binary, human) == pytest.approx((hit - share) / (share * (1 - share)) ** 0.5)
    assert np.isnan(nss(np.ones((3, 3)), np.array([[1, 1]])))
    assert nss(7 * binary + 3, human) == pytest.approx(expected, abs=1e-12)


def test_bad_input_is_explained() -> None:
    with pytest.raises(ScanpathProblem, match="points must lie in a map of 4 x 3"):
        fixation_map(np.array([[4, 0]]), width=4, height=3)
    with pytest.raises(ScanpathProblem, match="at least one point"):
        nss(np.eye(3), np.zeros((0, 2)))
    with pytest.raises(ScanpathProblem, match=r"\(H, W\) and finite"):
        nss(np.full((2, 2), np.nan), np.array([[1, 1]]))
