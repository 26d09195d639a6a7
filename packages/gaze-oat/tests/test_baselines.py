"""Baselines: kernels by hand, and that a length-matched searcher's likelihood is that of the process it samples."""

import numpy as np
import pytest

from gaze_oat import (
    CentreBiasKernel,
    Layout,
    LengthMatched,
    MarkovKernel,
    NearestUnvisitedKernel,
    PositionPriorKernel,
    RandomKernel,
    Scanpath,
    ScanpathData,
    ScanpathProblem,
    Scene,
    TransitionKernel,
    fit_baselines,
    path_of_objects,
)
from gaze_oat.baselines import KERNELS

GRID = Layout.grid(2, 3, width=3, height=2)
START = np.zeros((1, 0), int)


def people(paths: list[list[int]], target: int = 5) -> ScanpathData:
    scene = Scene(name="s", width=3, height=2, target=target, layout=GRID)
    return ScanpathData([scene], [path_of_objects(scene, str(n), ids) for n, ids in enumerate(paths)])


DATA = people([[0, 1, 2, 5], [0, 1, 4, 5], [1, 2, 5], [0, 0, 3]])


def test_centre_bias_is_a_fitted_gaussian() -> None:
    kernel = CentreBiasKernel.fit(people([[0, 5], [3]]))
    assert kernel.spread == pytest.approx((1 / 3, 1 / 4))
    chances = kernel(GRID, np.zeros((2, 4), int))
    weight = np.exp(-0.5 * np.array([1 + 1, 0 + 1, 1 + 1, 1 + 1, 0 + 1, 1 + 1]))
    np.testing.assert_allclose(chances, np.tile(weight / weight.sum(), (2, 1)))


def test_the_position_prior_counts_cells() -> None:
    chances = PositionPriorKernel.fit(DATA, smoothing=0.5)(GRID, START)[0]
    np.testing.assert_allclose(chances, (np.array([4, 3, 2, 1, 1, 3]) + 0.5) / (14 + 3))


def test_the_nearest_unvisited_object_comes_next() -> None:
    greedy = NearestUnvisitedKernel(slip=0.0)
    assert greedy(GRID, START)[0].tolist() == [0, 0.5, 0, 0, 0.5, 0]
    assert greedy(GRID, np.array([[0]]))[0].tolist() == [0, 0.5, 0, 0.5, 0, 0]
    assert greedy(GRID, np.array([[3, 1, 0]]))[0].tolist() == [0, 0, 0, 0, 1, 0]
    assert greedy(GRID, np.array([[0, 1, 2, 3, 4, 5]]))[0].tolist() == [0, 0, 0, 0, 0, 1]
    np.testing.assert_allclose(NearestUnvisitedKernel(slip=0.3)(GRID, START)[0], [0.05, 0.4, 0.05, 0.05, 0.4, 0.05])
    orderly = NearestUnvisitedKernel.fit(people([[1, 0, 3, 4, 5, 2]] * 3))
    assert orderly.slip < 0.1 < NearestUnvisitedKernel.fit(people([[0, 5, 0, 5, 0, 5]] * 3)).slip


def test_markov_steps_are_counts_over_chances() -> None:
    kernel = MarkovKernel.fit(people([[0, 1, 2], [3, 4, 5], [0, 3, 4]]), smoothing=1e-9)
    right, down = kernel.steps[1, 3], kernel.steps[2, 2]
    assert right == pytest.approx(5 / 6)  # six departures, all can go right (none starts in the last column), five do
    assert down == pytest.approx(1 / 3)  # from the upper row: 0, 1, 0; one goes down
    chances = kernel(GRID, np.array([[0]]))[0]
    np.testing.assert_allclose(chances, np.array([0, right, 0, down, 0, 0]) / (right + down), atol=1e-6)
    np.testing.assert_allclose(kernel(GRID, START)[0], [2 / 3, 0, 0, 1 / 3, 0, 0], atol=1e-6)


def test_transitions_are_counts_backed_by_the_prior() -> None:
    kernel = TransitionKernel.fit(DATA, smoothing=2.0)
    prior = PositionPriorKernel.fit(DATA)(GRID, START)[0]
    counts = np.array([1, 2, 0, 1, 0, 0])  # from 0: to 1 twice, to 0 once, to 3 once
    np.testing.assert_allclose(kernel(GRID, np.array([[4, 0]]))[0], (counts + 2 * prior) / (4 + 2))


@pytest.mark.parametrize("name", KERNELS)
def test_chances_are_distributions(name: str) -> None:
    model = fit_baselines(DATA)[name]
    for history in (START, np.array([[0], [5]]), np.array([[1, 1, 4], [5, 2, 5]])):
        assert model.kernel(GRID, history).sum(1) == pytest.approx(1)
        chances = model.next_probabilities(GRID, 5, history)
        assert chances.shape == (len(history), 7)
        assert chances.sum(1) == pytest.approx(1)
        assert (chances >= 0).all()
    assert model.next_probabilities(GRID, 5, START)[0, 6] == 0


def test_stepwise_chances_are_those_of_the_whole_process() -> None:
    """P(path) by the definition: draw a length, walk, replace the last step by the target with probability q."""
    kernel = PositionPriorKernel.fit(DATA)
    model = LengthMatched(kernel=kernel, hazard=np.array([0.1, 0.3, 0.6]), on_target=0.7)
    k = kernel(GRID, START)[0]
    path, target = np.array([2, 5, 0, 5]), 5
    survived = 0.9 * 0.7 * 0.4 * 0.6  # the hazard stays at its last value
    whole = survived * k[2] * k[5] * k[0] * (0.7 + 0.3 * k[5])
    chances = model.probabilities(GRID, target, [path])[0]
    stepwise = np.prod(chances[np.arange(5), np.append(path, 6)])
    assert stepwise == pytest.approx(whole, rel=1e-12)


def test_samples_have_human_lengths_and_endings() -> None:
    rng = np.random.default_rng(0)
    human = people([[*rng.integers(0, 5, n).tolist(), 5] for n in rng.integers(1, 9, 400)])
    model = LengthMatched.fit(RandomKernel.fit(human), human)
    paths = model.sample(GRID, 5, num_samples=4000, rng=rng)
    assert len(paths) == 4000
    assert np.mean([len(p) for p in paths]) == pytest.approx(np.mean([len(p) for p in human]), abs=0.25)
    assert np.mean([p[-1] == 5 for p in paths]) > 0.98
    halves = [np.mean([len(p) for p in part]) for part in (paths[:2000], paths[2000:])]
    assert halves[0] == pytest.approx(halves[1], abs=0.4)  # short ones do not come first
    short = model.sample(GRID, 5, num_samples=50, rng=rng, max_length=2)
    assert max(len(p) for p in short) == 2
    again = [model.sample(GRID, 5, num_samples=9, rng=np.random.default_rng(1)) for _ in range(2)]
    assert [p.tolist() for p in again[0]] == [p.tolist() for p in again[1]]


def test_what_is_missing_is_told() -> None:
    bare = Scene(name="s", width=3, height=2)
    data = ScanpathData([bare], [Scanpath(scene="s", subject="a", points=np.array([[1.0, 1]]))])
    with pytest.raises(ScanpathProblem, match="the path of 'a' on 's' has no objects"):
        fit_baselines(data)
    untold = Scene(name="s", width=3, height=2, layout=GRID)
    with pytest.raises(ScanpathProblem, match="needs the target of every scene"):
        fit_baselines(ScanpathData([untold], [path_of_objects(untold, "a", [1, 2])]))
