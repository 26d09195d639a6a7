"""Splits never share a scene."""

import pytest

from gaze_oat import (
    Layout,
    ScanpathData,
    ScanpathProblem,
    Scene,
    leave_one_group_out,
    path_of_objects,
    scene_folds,
    split_scenes,
)


def people(scenes: int = 40) -> ScanpathData:
    layout = Layout.grid(1, 3, width=3, height=1)
    found = [Scene(name=f"s{n}", width=3, height=1, layout=layout, target=0, group=f"g{n % 4}") for n in range(scenes)]
    return ScanpathData(found, [path_of_objects(scene, who, [1, 0]) for scene in found for who in "ab"])


def test_shares_hold_in_every_group() -> None:
    data = people()
    parts = split_scenes(data)
    assert [len(part.scenes) for part in parts] == [32, 4, 4]
    assert [len(part) for part in parts] == [64, 8, 8]
    assert set.union(*(set(part.scenes) for part in parts)) == set(data.scenes)
    for part, each in zip(parts, (8, 1, 1), strict=True):
        groups = [scene.group for scene in part.scenes.values()]
        assert {group: groups.count(group) for group in groups} == dict.fromkeys(("g0", "g1", "g2", "g3"), each)
    assert list(split_scenes(data)[2].scenes) == list(parts[2].scenes)
    assert list(split_scenes(data, seed=5)[2].scenes) != list(parts[2].scenes)


def test_folds_are_disjoint_and_whole() -> None:
    data = people(42)
    folds = scene_folds(data, 5)
    assert sorted(len(fold) for fold in folds) == [8, 8, 8, 9, 9]
    assert sorted(name for fold in folds for name in fold) == sorted(data.scenes)


def test_one_group_is_left_out() -> None:
    seen = []
    for group, training, test in leave_one_group_out(people(8)):
        assert {scene.group for scene in test.scenes.values()} == {group}
        assert group not in {scene.group for scene in training.scenes.values()}
        seen.append(group)
    assert seen == ["g0", "g1", "g2", "g3"]


def test_too_few_scenes_are_explained() -> None:
    with pytest.raises(ScanpathProblem, match="8 scenes leave none for validation"):
        split_scenes(people(8))
    with pytest.raises(ScanpathProblem, match="folds must be 2 to the number of scenes, 8, got 9"):
        scene_folds(people(8), 9)
    with pytest.raises(ScanpathProblem, match="shares must be non-negative"):
        split_scenes(people(), shares=(0.5, 0.1, 0.1))
    with pytest.raises(ScanpathProblem, match="needs at least two"):
        next(leave_one_group_out(people(8).choose(scenes=["s0"])))
