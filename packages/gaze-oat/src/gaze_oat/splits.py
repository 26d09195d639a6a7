"""Splits by scene, so that no path on a test scene is ever trained on.

The paper draws one permutation of the trials of each category, 80 / 10 / 10; a trial there is an image, seen by all its
observers.

Decided here: scenes of a group (`Scene.group`, the target's category) are spread evenly; `leave_one_group_out` is the
paper's test of generalisation to targets and layouts never seen.
"""

from collections.abc import Iterator

import numpy as np

from gaze_oat.errors import ScanpathProblem
from gaze_oat.scanpaths import ScanpathData


def scene_folds(data: ScanpathData, folds: int, *, seed: int = 1234) -> list[list[str]]:
    """Scene names dealt into disjoint folds, group by group. ScanpathProblem for more folds than scenes."""
    if not 2 <= folds <= len(data.scenes):
        raise ScanpathProblem(f"folds must be 2 to the number of scenes, {len(data.scenes)}, got {folds}")
    rng = np.random.default_rng(seed)
    dealt: list[list[str]] = [[] for _ in range(folds)]
    place = 0
    for group in sorted({scene.group for scene in data.scenes.values()}):
        names = [name for name, scene in data.scenes.items() if scene.group == group]
        for name in rng.permutation(names).tolist():
            dealt[place % folds].append(name)
            place += 1
    return dealt


def split_scenes(
    data: ScanpathData, *, shares: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 1234
) -> tuple[ScanpathData, ScanpathData, ScanpathData]:
    """Training, validation and test data, disjoint in scenes, each group cut by the same shares; none empty."""
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ScanpathProblem(f"shares must be non-negative and add up to 1, got {shares}")
    rng = np.random.default_rng(seed)
    seen = {path.scene for path in data}
    parts: tuple[list[str], ...] = ([], [], [])
    for group in sorted({scene.group for scene in data.scenes.values()}):
        names = rng.permutation([n for n, s in data.scenes.items() if s.group == group and n in seen]).tolist()
        first = round(shares[0] * len(names))
        second = first + round(shares[1] * len(names))
        for part, chosen in zip(parts, (names[:first], names[first:second], names[second:]), strict=True):
            part += chosen
    for kind, part in zip(("training", "validation", "test"), parts, strict=True):
        if not part:
            raise ScanpathProblem(f"{len(seen)} scenes leave none for {kind}: give more scenes, or other shares")
    return data.choose(scenes=parts[0]), data.choose(scenes=parts[1]), data.choose(scenes=parts[2])


def leave_one_group_out(data: ScanpathData) -> Iterator[tuple[str, ScanpathData, ScanpathData]]:
    """For each group: its name, the data without it, and its own."""
    groups = sorted({scene.group for scene in data.scenes.values()})
    if len(groups) < 2:
        raise ScanpathProblem(f"leaving a group out needs at least two, got {groups}")
    for group in groups:
        own = [name for name, scene in data.scenes.items() if scene.group == group]
        yield group, data.choose(scenes=[name for name in data.scenes if name not in own]), data.choose(scenes=own)
