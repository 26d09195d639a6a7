"""What a searcher does, counted: found or not, how long, new things and old; and the steps that the eyes take.

Runs of equal ids are one visit. Per path of m fixations and V visits:

    correct   the last fixation is on the target
    length    m
    search    visits of objects not seen before / m
    refix     fixations beyond the first of their visit / m
    revisit   visits of objects seen before / m                  search + refix + revisit = 1

delta = mean over the five of |model - human| / human, of averages over the paths of a scene, then over scenes (Fang et
al., ECCV 2024, arXiv:2407.13335). Steps are compared as distributions: lengths by the Wasserstein distance (cells),
directions and turns by total variation (0 equal, 1 disjoint).

Decided here: where the human average is 0, delta takes |model| itself for that term; a step's length is |rows| +
|columns| (L1), as in published figures of this data; directions are eight sectors around right, up-right, ..., and
turns four around straight on, left, back, right, both of steps that move; on screens up is smaller y.

Shapes: N paths, P objects.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gaze_oat.errors import ScanpathProblem
from gaze_oat.pairing import check_paths

BEHAVIOURS = ("correct", "length", "search", "refix", "revisit")


def behaviour(paths: Sequence[np.ndarray], targets: Sequence[int]) -> Float[np.ndarray, "N 5"]:
    """The five figures of each path, in the order of BEHAVIOURS.

    Args:
        paths: object ids, (n,) each.
        targets: the object searched for, one for each path.
    """
    paths = check_paths("paths", paths, None)
    if len(paths) != len(targets):
        raise ScanpathProblem(f"{len(paths)} paths need as many targets, got {len(targets)}")
    rows = np.empty((len(paths), 5))
    for row, path, target in zip(rows, paths, targets, strict=True):
        visits = 1 + np.count_nonzero(path[1:] != path[:-1])
        new = len(np.unique(path))
        row[:] = path[-1] == target, len(path), new, len(path) - visits, visits - new
        row[2:] /= len(path)
    return rows


def behaviour_means(values: Float[np.ndarray, "N 5"], scenes: Sequence[Hashable]) -> Float[np.ndarray, "5"]:
    """Average over the paths of each scene, then over scenes."""
    return by_scene(values, scenes).mean(0)


def by_scene(values: Float[np.ndarray, "N ..."], scenes: Sequence[Hashable]) -> Float[np.ndarray, "S ..."]:
    """Average over the paths of each scene, in the order in which scenes first appear; NaN entries do not count."""
    order = {scene: number for number, scene in enumerate(dict.fromkeys(scenes))}
    index = np.array([order[scene] for scene in scenes])
    values = np.asarray(values, float)
    known = ~np.isnan(values)
    total, count = np.zeros((2, len(order), *values.shape[1:]))
    np.add.at(total, index, np.where(known, values, 0.0))
    np.add.at(count, index, known)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def behaviour_delta(model: Float[np.ndarray, "5"], human: Float[np.ndarray, "5"]) -> float:
    """Mean of |model - human| / human over the five averages; 0 is human."""
    scale = np.where(np.asarray(human) == 0, 1.0, human)
    return float(np.mean(np.abs(np.asarray(model) - human) / scale))


@dataclass(frozen=True, kw_only=True, eq=False)
class StepStatistics:
    """Distributions of the steps between fixations, over grid cells."""

    lengths: Float[np.ndarray, "L"]
    """Share of steps of L1 length 0, 1, 2, ..."""
    directions: Float[np.ndarray, "8"]
    """Share of moving steps to the right, up-right, up, ..., counter-clockwise."""
    turns: Float[np.ndarray, "4"]
    """Share of consecutive moving steps that go on, turn left, go back, turn right."""

    @property
    def mean_length(self) -> float:
        """Mean L1 length, cells."""
        return float(self.lengths @ np.arange(len(self.lengths)))

    def distances(self, other: "StepStatistics") -> dict[str, float]:
        """`length`: Wasserstein distance in cells; `direction` and `turn`: total variation. 0 for equal ones."""
        size = max(len(self.lengths), len(other.lengths))
        ours, theirs = (np.pad(s.lengths, (0, size - len(s.lengths))).cumsum() for s in (self, other))
        return {
            "length": float(np.abs(ours - theirs).sum()),
            "direction": float(np.abs(self.directions - other.directions).sum() / 2),
            "turn": float(np.abs(self.turns - other.turns).sum() / 2),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class StepCounts:
    """Steps counted path by path, so that any part of the paths can be summed up without looking again."""

    lengths: Float[np.ndarray, "N L"]
    """Steps of L1 length 0, 1, 2, ..."""
    directions: Float[np.ndarray, "N 8"]
    """Moving steps by direction."""
    turns: Float[np.ndarray, "N 4"]
    """Pairs of consecutive moving steps by turn."""

    def statistics(self, weights: Float[np.ndarray, "N"] | None = None) -> StepStatistics:
        """Distributions over all paths, each counted `weights` times (once without it). Shares of nothing are 0."""
        weights = np.ones(len(self.lengths)) if weights is None else np.asarray(weights, float)
        parts = {}
        for name in ("lengths", "directions", "turns"):
            count = weights @ getattr(self, name)
            parts[name] = count / max(count.sum(), 1e-300)
        return StepStatistics(**parts)


def count_steps(cells: Sequence[Int[np.ndarray, "n 2"]]) -> StepCounts:
    """Steps of each path of grid cells (row, column)."""
    cells = check_paths("cells", cells, 2)
    steps = [np.diff(np.asarray(path), axis=0) for path in cells]
    longest = max((int(np.abs(step).sum(1).max()) for step in steps if len(step)), default=0)
    lengths, directions, turns = (
        np.zeros((len(cells), longest + 1)),
        np.zeros((len(cells), 8)),
        np.zeros((len(cells), 4)),
    )
    for number, step in enumerate(steps):
        lengths[number] = np.bincount(np.abs(step).sum(1), minlength=longest + 1)
        moving = step[np.abs(step).sum(1) > 0]
        angle = np.arctan2(-moving[:, 0], moving[:, 1])
        directions[number] = np.bincount(_sector(angle, 8), minlength=8)
        together = (np.abs(step[1:]).sum(1) > 0) & (np.abs(step[:-1]).sum(1) > 0)
        heading = np.arctan2(-step[:, 0], step[:, 1])
        turns[number] = np.bincount(_sector((heading[1:] - heading[:-1])[together], 4), minlength=4)
    return StepCounts(lengths=lengths, directions=directions, turns=turns)


def step_statistics(cells: Sequence[Int[np.ndarray, "n 2"]]) -> StepStatistics:
    """Distributions of step lengths, directions and turns over all paths of grid cells (row, column)."""
    return count_steps(cells).statistics()


def _sector(angle: np.ndarray, count: int) -> np.ndarray:
    return np.floor(angle / (2 * np.pi / count) + 0.5).astype(int) % count
