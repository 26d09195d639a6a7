"""Evaluation: pairings, averages and intervals, against scores taken pair by pair."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from gaze_oat import (
    EvaluationConfig,
    Layout,
    Scanpath,
    ScanpathData,
    ScanpathProblem,
    Scene,
    between_observers,
    between_pairs,
    evaluate,
    matching_pairs,
    multimatch,
    path_of_objects,
    reference,
)
from gaze_oat.evaluation import METRICS

PLAIN = EvaluationConfig(resamples=0)
GRID = Layout.grid(3, 4, width=40, height=30)
SCENES = [Scene(name=name, width=40, height=30, target=target, layout=GRID) for name, target in (("a", 7), ("b", 2))]


def paths(seed: int, people: int, scenes: list[Scene] = SCENES) -> ScanpathData:
    rng, found = np.random.default_rng(seed), []
    for scene in scenes:
        for who in range(people):
            ids = [*rng.integers(0, 12, rng.integers(3, 9)).tolist(), scene.target]
            found.append(path_of_objects(scene, f"p{who}", ids))
    return ScanpathData(scenes, found)


def values(table: pd.DataFrame) -> dict[str, float]:
    return dict(zip(table["metric"], table["value"], strict=True))


def by_hand(ours: ScanpathData, people: ScanpathData, score: object) -> float:
    means = []
    for name in ours.scenes:
        first, second = ours.on_scene(name), people.on_scene(name)
        means.append(np.mean([score(a, b) for a in first for b in second]))  # type: ignore[operator]
    return float(np.mean(means))


def test_every_predicted_path_meets_every_human_path_of_its_scene() -> None:
    ours, people = paths(0, 3), paths(1, 4)
    found = values(evaluate(ours, people, PLAIN))
    assert found["ss"] == pytest.approx(
        by_hand(ours, people, lambda a, b: reference.sequence_score(a.objects, b.objects))
    )
    assert found["fed"] == pytest.approx(
        by_hand(ours, people, lambda a, b: reference.edit_distance(a.objects, b.objects))
    )
    assert found["scanmatch"] == pytest.approx(
        by_hand(ours, people, lambda a, b: reference.scanmatch(GRID.cells[a.objects], GRID.cells[b.objects]))
    )
    assert found["multimatch direction"] == pytest.approx(
        by_hand(ours, people, lambda a, b: multimatch([a.points], [b.points], screen=(40, 30))[0, 1])
    )
    four = [found[f"multimatch {name}"] for name in ("vector", "direction", "length", "position")]
    assert found["multimatch"] == pytest.approx(np.mean(four))
    assert (found["correct"], found["delta"] > 0) == (1.0, True)


def test_best_takes_the_nearest_person() -> None:
    ours, people = paths(0, 3), paths(1, 4)
    best = values(evaluate(ours, people, replace(PLAIN, reduce="best", metrics=("ss", "fed"))))
    expected = {"ss": [], "fed": []}
    for name in ours.scenes:
        for kind, pick in (("ss", max), ("fed", min)):
            metric = reference.sequence_score if kind == "ss" else reference.edit_distance
            nearest = [pick(metric(a.objects, b.objects) for b in people.on_scene(name)) for a in ours.on_scene(name)]
            expected[kind].append(np.mean(nearest))
    assert best["ss"] == pytest.approx(np.mean(expected["ss"]))
    assert best["fed"] == pytest.approx(np.mean(expected["fed"]))


def test_people_are_never_compared_with_themselves() -> None:
    keys, owners = ["a", "a", "b", "a", "b"], ["x", "y", "x", "x", "y"]
    assert between_pairs(keys, owners).tolist() == [[0, 1], [1, 3], [2, 4]]
    assert matching_pairs(["a", "c", "b"], keys).tolist() == [[0, 0], [0, 1], [0, 3], [2, 2], [2, 4]]
    same = ScanpathData(SCENES, [path_of_objects(s, who, [1, 2, 7]) for s in SCENES for who in "xyz"])
    found = values(between_observers(same, PLAIN))
    assert (found["ss"], found["fed"], found["scanmatch"], found["multimatch"]) == pytest.approx((1, 0, 1, 1))
    assert (found["delta"], found["step length"], found["step direction"]) == pytest.approx((0, 0, 0))
    differ = paths(2, 3)
    assert values(between_observers(differ, PLAIN))["ss"] < values(evaluate(differ, differ, PLAIN))["ss"]


def test_between_observers_is_the_mean_over_unordered_pairs() -> None:
    people = paths(3, 3)
    expected = []
    for name in people.scenes:
        a, b, c = (path.objects for path in people.on_scene(name))
        expected.append(np.mean([reference.sequence_score(x, y) for x, y in ((a, b), (a, c), (b, c))]))
    assert values(between_observers(people, PLAIN))["ss"] == pytest.approx(np.mean(expected))


def test_intervals_come_from_scenes_drawn_anew() -> None:
    scenes = [replace(SCENES[0], name=str(n), target=n) for n in range(9)]
    ours, people = paths(4, 2, scenes), paths(5, 3, scenes)
    config = EvaluationConfig(resamples=4000, metrics=("ss", "behaviour", "steps"))
    table = evaluate(ours, people, config).set_index("metric")
    by_scene = [
        np.mean([reference.sequence_score(a.objects, b.objects) for a in ours.on_scene(n) for b in people.on_scene(n)])
        for n in ours.scenes
    ]
    rng = np.random.default_rng(1)
    means = np.array(by_scene)[rng.integers(0, 9, (4000, 9))].mean(1)
    np.testing.assert_allclose(
        table.loc["ss", ["low", "high"]].to_numpy(float), np.quantile(means, [0.025, 0.975]), atol=0.004
    )
    assert (table["low"] <= table["value"]).loc[["ss", "length", "search"]].all()
    assert (table["high"] >= table["value"]).loc[["ss", "length", "search"]].all()
    pd.testing.assert_frame_equal(evaluate(ours, people, config).set_index("metric"), table)


def test_scenes_without_objects_still_have_their_metrics() -> None:
    """Points alone: MultiMatch and ScanMatch on a grid of the screen."""
    scene = Scene(name="a", width=40, height=30)
    points = [np.array([[1.0, 1], [20, 20], [39, 5]]), np.array([[1.0, 1], [30, 20], [39, 25]])]
    data = [ScanpathData([scene], [Scanpath(scene="a", subject="x", points=p)]) for p in points]
    found = values(evaluate(data[0], data[1], replace(PLAIN, metrics=("scanmatch", "multimatch"), bins=(4, 3))))
    assert found["scanmatch"] == pytest.approx((3.5 + 2.5 + 1.5) / (3 * 3.5))
    assert found["multimatch position"] == pytest.approx(multimatch(*[[p] for p in points], screen=(40, 30))[0, 3])
    with pytest.raises(ScanpathProblem, match="has no objects"):
        evaluate(data[0], data[1], PLAIN)


def test_bad_input_is_explained() -> None:
    ours, people = paths(0, 2), paths(1, 2)
    with pytest.raises(ScanpathProblem, match="1 scenes have human paths and no predicted one, such as 'b'"):
        evaluate(ours.choose(scenes=["a"]), people)
    with pytest.raises(ScanpathProblem, match=f"unknown metric 'speed': choose from {', '.join(METRICS)}"):
        EvaluationConfig(metrics=("ss", "speed"))
    with pytest.raises(ScanpathProblem, match="no scene was seen by two observers"):
        between_observers(people.choose(subjects=["p0"]))
    with pytest.raises(ScanpathProblem, match="reduce must be 'mean'"):
        between_observers(people, EvaluationConfig(reduce="best"))
    untold = [replace(scene, target=None) for scene in SCENES]
    blind = ScanpathData(untold, [path_of_objects(s, "x", [1, 2]) for s in untold])
    with pytest.raises(ScanpathProblem, match="behaviour needs the target of every scene"):
        evaluate(blind, blind, replace(PLAIN, metrics=("behaviour",)))
