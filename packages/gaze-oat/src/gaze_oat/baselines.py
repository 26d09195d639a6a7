"""What a scanpath model has to beat: five ways to move the eyes, each given the human path lengths and where paths end.

A kernel says how probable each object is after those before it:

    RandomKernel            all alike
    CentreBiasKernel        a Gaussian around the image's centre, its widths fitted
    PositionPriorKernel     how often people looked at each cell (no saliency, no order)
    NearestUnvisitedKernel  the nearest object not seen yet, and with a fitted share any other
    MarkovKernel            steps (rows, columns) as often as people made them, renormalised on the grid
    TransitionKernel        cell-to-cell transitions as often as people made them (first-order Markov chain over cells)

`LengthMatched` makes a full model of a kernel. It draws a length from the human lengths and, with the human
probability, puts the target at the end; its step probabilities are those of this process, exactly, so that likelihoods
are fair:

    h = P(length = l | length >= l), q = P(last is target), k = kernel
    p(o_l = o)          = (1 - h) k(o) + h (q [o = target] + (1 - q) k(o))
    p(stop after o_l)   = h e(o) / (h e(o) + (1 - h) k(o)),        e(o) = q [o = target] + (1 - q) k(o)

Decided here: counts are smoothed by adding `smoothing` to each; lengths that nobody had get a hazard from the smoothed
counts of neighbouring lengths; beyond the longest human path the hazard stays at its last value.

Shapes: S paths of l fixations so far on one scene, P objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from gaze_oat.errors import ScanpathProblem
from gaze_oat.layouts import Layout
from gaze_oat.scanpaths import ScanpathData


class Kernel(Protocol):
    """Where the eyes go next, before lengths and stopping."""

    def __call__(self, layout: Layout, history: Int[np.ndarray, "S l"]) -> Float[np.ndarray, "S P"]:
        """Distribution over the objects after each history (l may be 0)."""
        ...


def layout_of(data: ScanpathData, scene: str) -> Layout:
    """The scene's layout; ScanpathProblem if it has none."""
    layout = data.scenes[scene].layout
    if layout is None:
        raise ScanpathProblem(f"scene '{scene}' has no layout: give it boxes or a grid")
    return layout


def objects_of(data: ScanpathData) -> list[Int[np.ndarray, "n"]]:
    """Object ids of all paths; ScanpathProblem if a path has none."""
    for path in data:
        if path.objects is None:
            raise ScanpathProblem(
                f"the path of '{path.subject}' on '{path.scene}' has no objects: give its scene a layout"
            )
    return [path.objects for path in data if path.objects is not None]


def cells_of(data: ScanpathData) -> list[Int[np.ndarray, "n 2"]]:
    """Grid cells (row, column) of all paths' objects."""
    return [layout_of(data, p.scene).cells[ids] for p, ids in zip(data, objects_of(data), strict=True)]


@dataclass(frozen=True, kw_only=True)
class RandomKernel:
    """Every object alike."""

    @classmethod
    def fit(cls, data: ScanpathData) -> "RandomKernel":  # noqa: ARG003 - kernels are fitted alike
        """Nothing to learn."""
        return cls()

    def __call__(self, layout: Layout, history: Int[np.ndarray, "S l"]) -> Float[np.ndarray, "S P"]:
        """1 / P."""
        return np.full((len(history), len(layout)), 1 / len(layout))


@dataclass(frozen=True, kw_only=True)
class CentreBiasKernel:
    """Gaussian around the centre, in shares of the image's width and height."""

    spread: tuple[float, float]
    """Standard deviations of x / width and y / height."""

    @classmethod
    def fit(cls, data: ScanpathData) -> "CentreBiasKernel":
        """Root mean square distance of the fixations from the centre."""
        shares = [p.points / (data.scenes[p.scene].width, data.scenes[p.scene].height) - 0.5 for p in data]
        x, y = np.sqrt((np.concatenate(shares) ** 2).mean(0))
        return cls(spread=(max(float(x), 1e-3), max(float(y), 1e-3)))

    def __call__(self, layout: Layout, history: Int[np.ndarray, "S l"]) -> Float[np.ndarray, "S P"]:
        """The Gaussian at the objects' centres, normalised."""
        share = layout.centres / (layout.width, layout.height) - 0.5
        weight = np.exp(-0.5 * ((share / self.spread) ** 2).sum(1))
        return np.repeat((weight / weight.sum())[None], len(history), 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class PositionPriorKernel:
    """How often each cell of the grid was looked at."""

    counts: Float[np.ndarray, "rows cols"]
    """Smoothed counts."""

    @classmethod
    def fit(cls, data: ScanpathData, *, smoothing: float = 1.0) -> "PositionPriorKernel":
        """Counts over all scenes; the grid is the largest of them."""
        layouts = [layout_of(data, name) for name in data.scenes]
        counts = np.full((max(one.rows for one in layouts), max(one.cols for one in layouts)), smoothing)
        np.add.at(counts, tuple(np.concatenate(cells_of(data)).T), 1.0)
        return cls(counts=counts)

    def __call__(self, layout: Layout, history: Int[np.ndarray, "S l"]) -> Float[np.ndarray, "S P"]:
        """Each object's cell's count, normalised."""
        row, col = np.minimum(layout.cells, np.array(self.counts.shape) - 1).T
        weight = self.counts[row, col]
        return np.repeat((weight / weight.sum())[None], len(history), 0)


@dataclass(frozen=True, kw_only=True)
class NearestUnvisitedKernel:
    """To the nearest object not looked at yet (the first to the one nearest the centre); ties are shared."""

    slip: float
    """Probability of going to any object instead; 0 is the deterministic searcher."""

    @classmethod
    def fit(cls, data: ScanpathData) -> "NearestUnvisitedKernel":
        """The slip that makes the paths most probable, to 2 %."""
        best, grid = -np.inf, np.linspace(0.02, 1.0, 50)
        greedy, spread = cls(slip=0.0), []
        for path, ids in zip(data, objects_of(data), strict=True):
            layout = layout_of(data, path.scene)
            for step in range(len(ids)):
                spread.append((greedy(layout, ids[None, :step])[0, ids[step]], 1 / len(layout)))
        near, uniform = np.array(spread).T
        for slip in grid:
            found = float(np.log((1 - slip) * near + slip * uniform).sum())
            if found > best:
                best, chosen = found, float(slip)
        return cls(slip=chosen)

    def __call__(self, layout: Layout, history: Int[np.ndarray, "S l"]) -> Float[np.ndarray, "S P"]:
        """Mass shared by the nearest unvisited objects, plus the slip."""
        centres = layout.centres
        middle = np.array([layout.width, layout.height]) / 2
        here = centres[history[:, -1]] if history.shape[1] else np.repeat(middle[None], len(history), 0)
        distance = np.hypot(centres[:, 0] - here[:, :1], centres[:, 1] - here[:, 1:])
        if history.shape[1]:
            seen = np.zeros(distance.shape, bool)
            np.put_along_axis(seen, history, True, axis=1)
            seen[seen.all(1)] = False  # all seen: begin anew
            distance = np.where(seen, np.inf, distance)
        near = distance <= distance.min(1, keepdims=True) * (1 + 1e-9)
        return (1 - self.slip) * near / near.sum(1, keepdims=True) + self.slip / len(layout)


@dataclass(frozen=True, kw_only=True, eq=False)
class MarkovKernel:
    """First-order: the step taken depends on nothing but the grid's edge; the first fixation on the cell."""

    steps: Float[np.ndarray, "2R-1 2C-1"]
    """Smoothed relative frequency of steps by (rows, columns)."""
    start: PositionPriorKernel
    """Where paths begin."""

    @classmethod
    def fit(cls, data: ScanpathData, *, smoothing: float = 0.1) -> "MarkovKernel":
        """Counts of all steps, divided by how often the grid allowed them."""
        cells, names = cells_of(data), [p.scene for p in data]
        rows, cols = (max(getattr(layout_of(data, name), side) for name in data.scenes) for side in ("rows", "cols"))
        counts, chances = np.full((2, 2 * rows - 1, 2 * cols - 1), smoothing)
        for own, name in zip(cells, names, strict=True):
            layout = layout_of(data, name)
            step = np.diff(own, axis=0) + np.array([rows - 1, cols - 1])
            np.add.at(counts, tuple(step.T), 1.0)
            reach = (layout.cells[None] - own[:-1, None] + (rows - 1, cols - 1)).reshape(-1, 2)
            np.add.at(chances, tuple(reach.T), 1.0)
        first = [
            type(p)(scene=p.scene, subject=p.subject, points=p.points[:1], objects=ids[:1])
            for p, ids in zip(data, objects_of(data), strict=True)
        ]
        start = PositionPriorKernel.fit(ScanpathData(data.scenes.values(), first), smoothing=smoothing)
        return cls(steps=counts / chances, start=start)

    def __call__(self, layout: Layout, history: Int[np.ndarray, "S l"]) -> Float[np.ndarray, "S P"]:
        """The steps to each object, normalised."""
        if not history.shape[1]:
            return self.start(layout, history)
        half = np.array(self.steps.shape) // 2
        step = layout.cells[None] - layout.cells[history[:, -1]][:, None] + half
        row, col = np.clip(step, 0, 2 * half).transpose(2, 0, 1)
        weight = self.steps[row, col]
        return weight / weight.sum(1, keepdims=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class TransitionKernel:
    """First-order Markov chain over cells: a table of transitions, backed off to the position prior."""

    transitions: dict[tuple[int, int], Float[np.ndarray, "rows cols"]]
    """Counts of the next cell, by cell."""
    prior: PositionPriorKernel
    """What the counts are smoothed with."""
    start: PositionPriorKernel
    """Where paths begin."""
    smoothing: float
    """Weight of the prior, in transitions."""

    @classmethod
    def fit(cls, data: ScanpathData, *, smoothing: float = 10.0) -> "TransitionKernel":
        """Counts over all scenes."""
        prior = PositionPriorKernel.fit(data)
        table: dict[tuple[int, int], np.ndarray] = {}
        for own in cells_of(data):
            for here, there in zip(own[:-1].tolist(), own[1:].tolist(), strict=True):
                table.setdefault((here[0], here[1]), np.zeros(prior.counts.shape))[there[0], there[1]] += 1
        return cls(transitions=table, prior=prior, start=MarkovKernel.fit(data).start, smoothing=smoothing)

    def __call__(self, layout: Layout, history: Int[np.ndarray, "S l"]) -> Float[np.ndarray, "S P"]:
        """Smoothed transitions from the last cell, normalised."""
        if not history.shape[1]:
            return self.start(layout, history)
        row, col = np.minimum(layout.cells, np.array(self.prior.counts.shape) - 1).T
        base, none = self.prior(layout, history), np.zeros(self.prior.counts.shape)
        last = layout.cells[history[:, -1]]
        seen = np.stack([self.transitions.get((int(r), int(c)), none)[row, col] for r, c in last])
        weight = seen + self.smoothing * base
        return weight / weight.sum(1, keepdims=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class LengthMatched:
    """A kernel with human lengths and endings: a model that samples and that has exact likelihoods."""

    kernel: Kernel
    """Where the eyes go."""
    hazard: Float[np.ndarray, "longest"]
    """P(length = l | length >= l) for l = 1, 2, ..."""
    on_target: float
    """P(the last fixation is on the target)."""

    @classmethod
    def fit(cls, kernel: Kernel, data: ScanpathData, *, smoothing: float = 0.5) -> "LengthMatched":
        """Lengths and endings of the paths."""
        objects = objects_of(data)
        lengths = np.array([len(ids) for ids in objects])
        targets = [data.scenes[p.scene].target for p in data]
        if any(target is None for target in targets):
            raise ScanpathProblem("a length-matched searcher needs the target of every scene")
        counts = np.bincount(lengths)[1:].astype(float)
        window = np.convolve(counts, np.ones(5) / 5, mode="same") + smoothing / len(lengths)
        alive = window[::-1].cumsum()[::-1]
        hits = sum(int(ids[-1] == target) for ids, target in zip(objects, targets, strict=True))
        hazard = np.minimum(window / alive, 0.5)
        return cls(kernel=kernel, hazard=hazard, on_target=(hits + 0.5) / (len(objects) + 1))

    def _hazard(self, length: int) -> float:
        return float(self.hazard[min(length, len(self.hazard)) - 1])

    def _ending(self, chances: np.ndarray, target: int) -> np.ndarray:
        ending = (1 - self.on_target) * chances
        ending[:, target] += self.on_target
        return ending

    def next_probabilities(
        self, layout: Layout, target: int, history: Int[np.ndarray, "S l"]
    ) -> Float[np.ndarray, "S P+1"]:
        """p(next object) and, last, p(stop) after each history of one length."""
        stop = self._stop(layout, target, history)
        hazard, chances = self._hazard(history.shape[1] + 1), self.kernel(layout, history)
        move = (1 - hazard) * chances + hazard * self._ending(chances, target)
        return np.concatenate([(1 - stop)[:, None] * move, stop[:, None]], 1)

    def _stop(self, layout: Layout, target: int, history: np.ndarray) -> np.ndarray:
        if not history.shape[1]:
            return np.zeros(len(history))
        hazard, last = self._hazard(history.shape[1]), history[:, -1]
        chances = self.kernel(layout, history[:, :-1])
        rows = np.arange(len(history))
        ending, going = hazard * self._ending(chances, target)[rows, last], (1 - hazard) * chances[rows, last]
        return ending / np.maximum(ending + going, 1e-300)

    def probabilities(
        self, layout: Layout, target: int, paths: Sequence[Int[np.ndarray, "n"]]
    ) -> list[Float[np.ndarray, "n+1 P+1"]]:
        """p before each decision of given paths, and of stopping at their end."""
        return [
            np.concatenate(
                [self.next_probabilities(layout, target, path[None, :step]) for step in range(len(path) + 1)]
            )
            for path in map(np.asarray, paths)
        ]

    def sample(
        self, layout: Layout, target: int, *, num_samples: int, rng: np.random.Generator, max_length: int = 92
    ) -> list[Int[np.ndarray, "n"]]:
        """Paths drawn step by step; cut at max_length."""
        history, rows = np.zeros((num_samples, 0), int), np.arange(num_samples)
        done: dict[int, np.ndarray] = {}
        while len(rows):
            chances = self.next_probabilities(layout, target, history)
            picked = (chances.cumsum(1) > rng.random((len(history), 1)) * chances.sum(1, keepdims=True)).argmax(1)
            stopped = picked == len(layout)
            done |= dict(zip(rows[stopped].tolist(), history[stopped], strict=True))
            history, rows = np.concatenate([history[~stopped], picked[~stopped, None]], 1), rows[~stopped]
            if history.shape[1] >= max_length:
                done |= dict(zip(rows.tolist(), history, strict=True))
                break
        return [done[number] for number in range(num_samples)]


KERNELS: dict[str, Any] = {
    "random": RandomKernel,
    "centre bias": CentreBiasKernel,
    "position prior": PositionPriorKernel,
    "nearest unvisited": NearestUnvisitedKernel,
    "Markov (steps)": MarkovKernel,
    "Markov (cells)": TransitionKernel,
}


def fit_baselines(data: ScanpathData) -> dict[str, LengthMatched]:
    """Every baseline, fitted on these paths, by name."""
    return {name: LengthMatched.fit(kernel.fit(data), data) for name, kernel in KERNELS.items()}
