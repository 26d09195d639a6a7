"""Predicted scanpaths against human ones, and people against each other: every metric, every pairing rule stated.

Pairing rules, stated since published scores differ by them more than by models:

    predicted with human   every predicted path of a scene with every human path of that scene
    human with human       every two observers of a scene once (i < j), nobody with himself

A pairwise score is averaged over the pairs of a scene, then over scenes (`reduce="mean"`), or the best pair of each
predicted path is taken first (`reduce="best"`, higher for any model and not comparable with the other).

Metrics: ss, fed, scanmatch, multimatch (four and their average), behaviour (five and delta), steps (three distances),
nss.

Decided here: intervals are percentiles over scenes drawn anew with replacement; delta and step distances are recomputed
from the drawn scenes on both sides; scores that are NaN (MultiMatch of paths with less than three fixations) do not
count.

Shapes: N paths, S scenes, K pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from gaze_oat.baselines import cells_of, layout_of, objects_of
from gaze_oat.behaviour import BEHAVIOURS, behaviour, behaviour_delta, by_scene, count_steps
from gaze_oat.errors import ScanpathProblem
from gaze_oat.fixation_maps import fixation_map, nss
from gaze_oat.layouts import to_cells
from gaze_oat.multimatch import DIMENSIONS, multimatch
from gaze_oat.pairing import between_pairs, matching_pairs
from gaze_oat.scanpaths import ScanpathData
from gaze_oat.sequence_alignment import edit_distance, scanmatch, sequence_score

METRICS = ("ss", "fed", "scanmatch", "multimatch", "behaviour", "steps", "nss")
LOWER_IS_BETTER = ("fed", "delta", "step length", "step direction", "step turn")
Reduce = Literal["mean", "best"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured, and how."""

    metrics: tuple[str, ...] = METRICS
    """Any of METRICS."""
    reduce: Reduce = "mean"
    """Over the pairs of a scene: their mean, or the best for each predicted path."""
    threshold: float = 3.5
    """ScanMatch's T, cells."""
    bins: tuple[int, int] = (12, 8)
    """Columns and rows of ScanMatch's and the steps' grid where a scene has no layout."""
    compat: bool = False
    """MultiMatch pads short paths with (1, 1) as OAT's published evaluation does, instead of leaving them out."""
    resamples: int = 1000
    """Bootstrap draws of scenes; 0 for none."""
    level: float = 0.95
    """Of the intervals."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise ScanpathProblem(f"unknown metric '{(unknown or ['(none)'])[0]}': choose from {', '.join(METRICS)}")
        if self.reduce not in ("mean", "best"):
            raise ScanpathProblem(f"reduce must be 'mean' or 'best', got '{self.reduce}'")
        if not 0 < self.level < 1 or self.resamples < 0:
            raise ScanpathProblem(
                f"level must lie in (0, 1) and resamples be at least 0, got {self.level}, {self.resamples}"
            )


def evaluate(predicted: ScanpathData, human: ScanpathData, config: EvaluationConfig | None = None) -> pd.DataFrame:
    """Scores of predicted paths: metric, value, low, high. Scenes without a predicted path are an error."""
    config = config or EvaluationConfig()
    missing = sorted({path.scene for path in human} - {path.scene for path in predicted})
    if missing:
        raise ScanpathProblem(f"{len(missing)} scenes have human paths and no predicted one, such as '{missing[0]}'")
    human = human.choose(scenes=list(dict.fromkeys(path.scene for path in human)))
    predicted = predicted.choose(scenes=list(human.scenes))
    keys = [path.scene for path in human]
    pairs = matching_pairs([path.scene for path in predicted], keys)
    return _table(predicted, human, pairs, config)


def between_observers(human: ScanpathData, config: EvaluationConfig | None = None) -> pd.DataFrame:
    """People against people, the score to reach: each two observers of a scene once.

    Behaviour and steps have no pairs: there each observer is compared with all others together, and the figure is the
    mean over observers.
    """
    config = config or EvaluationConfig()
    keys, owners = [path.scene for path in human], [path.subject for path in human]
    if config.reduce == "best":
        raise ScanpathProblem("between observers each pair counts once, so reduce must be 'mean'")
    pairs = between_pairs(keys, owners)
    if len(pairs) == 0:
        raise ScanpathProblem("no scene was seen by two observers, so there is nothing to compare between them")
    parts = [name for name in config.metrics if name in ("ss", "fed", "scanmatch", "multimatch")]
    tables = [_table(human, human, pairs, replace(config, metrics=tuple(parts)))] if parts else []
    rest = tuple(name for name in config.metrics if name not in parts)
    if rest:
        tables.append(_one_against_others(human, replace(config, metrics=rest)))
    return pd.concat(tables, ignore_index=True)


def _one_against_others(human: ScanpathData, config: EvaluationConfig) -> pd.DataFrame:
    tables = []
    for subject in human.subjects:
        own = human.choose(subjects=[subject])
        seen = list(dict.fromkeys(path.scene for path in own))
        others = human.choose(scenes=seen, subjects=[name for name in human.subjects if name != subject])
        kept = list(dict.fromkeys(path.scene for path in others))
        tables.append(evaluate(own.choose(scenes=kept), others, config))
    together = pd.concat(tables)
    order = together["metric"].drop_duplicates()
    return together.groupby("metric")[["value", "low", "high"]].mean().loc[order].reset_index()


def pairwise_scores(
    first: ScanpathData, second: ScanpathData, pairs: Int[np.ndarray, "K 2"], config: EvaluationConfig | None = None
) -> dict[str, Float[np.ndarray, "K"]]:
    """ss, fed, scanmatch, the four MultiMatch similarities and their mean, of each pair of paths."""
    config = config or EvaluationConfig()
    scores: dict[str, np.ndarray] = {}
    if "ss" in config.metrics:
        scores["ss"] = sequence_score(objects_of(first), objects_of(second), pairs)
    if "fed" in config.metrics:
        scores["fed"] = edit_distance(objects_of(first), objects_of(second), pairs).astype(float)
    if "scanmatch" in config.metrics:
        cells = [grid_cells(data, config.bins) for data in (first, second)]
        scores["scanmatch"] = scanmatch(cells[0], cells[1], pairs, threshold=config.threshold)
    if "multimatch" in config.metrics:
        sizes = np.array([[first.scenes[p.scene].width, first.scenes[p.scene].height] for p in first])
        four = multimatch(
            [p.points for p in first],
            [p.points for p in second],
            pairs,
            screen=sizes[pairs[:, 0]],
            compat=config.compat,
        )
        scores |= {f"multimatch {name}": four[:, number] for number, name in enumerate(DIMENSIONS)}
        scores["multimatch"] = four.mean(1)
    return scores


def grid_cells(data: ScanpathData, bins: tuple[int, int]) -> list[Int[np.ndarray, "n 2"]]:
    """Cells of all paths: their objects', or, if a scene has no layout, of a grid of `bins` (columns, rows)."""
    if all(scene.layout is not None for scene in data.scenes.values()):
        return cells_of(data)
    sizes = [data.scenes[p.scene] for p in data]
    return [
        to_cells(p.points, width=s.width, height=s.height, rows=bins[1], cols=bins[0])
        for p, s in zip(data, sizes, strict=True)
    ]


def _table(
    predicted: ScanpathData, human: ScanpathData, pairs: Int[np.ndarray, "K 2"], config: EvaluationConfig
) -> pd.DataFrame:
    scenes = list(dict.fromkeys(path.scene for path in human))
    rng = np.random.default_rng(config.seed)
    draws = rng.multinomial(len(scenes), np.full(len(scenes), 1 / len(scenes)), size=config.resamples)
    weights = np.concatenate([np.ones((1, len(scenes))), draws]).astype(float)
    rows: dict[str, np.ndarray] = {}
    for name, values in pairwise_scores(predicted, human, pairs, config).items():
        rows[name] = _weighted_means(_scene_means(values, predicted, pairs, scenes, name, config.reduce), weights)
    if "behaviour" in config.metrics:
        rows |= _behaviour_rows(predicted, human, scenes, weights)
    if "steps" in config.metrics:
        rows |= _step_rows(predicted, human, scenes, weights, config)
    if "nss" in config.metrics:
        rows["nss"] = _weighted_means(np.array([_scene_nss(predicted, human, name) for name in scenes]), weights)
    tail = (1 - config.level) / 2
    records: list[dict[str, Any]] = []
    for name, found in rows.items():
        known = found[1:][~np.isnan(found[1:])]
        low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (np.nan, np.nan)
        records.append({"metric": name, "value": found[0], "low": low, "high": high})
    return pd.DataFrame.from_records(records)


def _scene_means(
    values: np.ndarray, predicted: ScanpathData, pairs: np.ndarray, scenes: Sequence[str], name: str, reduce: Reduce
) -> np.ndarray:
    if reduce == "best":
        sign = -1.0 if name in LOWER_IS_BETTER else 1.0
        best = np.full(len(predicted), -np.inf)
        np.fmax.at(best, pairs[:, 0], sign * values)
        values = sign * np.where(np.isfinite(best), best, np.nan)
        owners = [path.scene for path in predicted]
    else:
        owners = [predicted.scanpaths[i].scene for i in pairs[:, 0]]
    found = dict(zip(dict.fromkeys(owners), by_scene(values, owners), strict=True))
    return np.array([found.get(scene, np.nan) for scene in scenes])


def _weighted_means(values: Float[np.ndarray, "S"], weights: Float[np.ndarray, "R S"]) -> Float[np.ndarray, "R"]:
    known = ~np.isnan(values)
    total = weights[:, known].sum(1)
    return np.divide(weights[:, known] @ values[known], total, out=np.full(len(weights), np.nan), where=total > 0)


def _behaviour_rows(
    predicted: ScanpathData, human: ScanpathData, scenes: Sequence[str], weights: np.ndarray
) -> dict[str, np.ndarray]:
    sides = []
    for data in (predicted, human):
        owners = [path.scene for path in data]
        targets = [data.scenes[name].target for name in owners]
        if any(target is None for target in targets):
            raise ScanpathProblem("behaviour needs the target of every scene: add it, or leave this metric out")
        means = by_scene(behaviour(objects_of(data), [int(t) for t in targets if t is not None]), owners)
        order = {name: number for number, name in enumerate(dict.fromkeys(owners))}
        means = means[[order[name] for name in scenes]]
        sides.append(weights @ means / weights.sum(1, keepdims=True))
    rows = {name: sides[0][:, number] for number, name in enumerate(BEHAVIOURS)}
    rows["delta"] = np.array([behaviour_delta(ours, theirs) for ours, theirs in zip(*sides, strict=True)])
    return rows


def _step_rows(
    predicted: ScanpathData, human: ScanpathData, scenes: Sequence[str], weights: np.ndarray, config: EvaluationConfig
) -> dict[str, np.ndarray]:
    number = {name: place for place, name in enumerate(scenes)}
    sides = []
    for data in (predicted, human):
        counts = count_steps(grid_cells(data, config.bins))
        owners = np.array([number[path.scene] for path in data])
        share = 1 / np.bincount(owners, minlength=len(scenes))[owners]  # each scene counts as much as its people
        sides.append([counts.statistics(row[owners] * share) for row in weights])
    distances = [ours.distances(theirs) for ours, theirs in zip(*sides, strict=True)]
    return {f"step {name}": np.array([one[name] for one in distances]) for name in ("length", "direction", "turn")}


def _scene_nss(predicted: ScanpathData, human: ScanpathData, scene: str) -> float:
    """On the layout's grid, a pixel a cell: how often each was looked at."""
    layout = layout_of(human, scene)
    sides = []
    for data in (predicted, human):
        ids = [path.objects for path in data.on_scene(scene) if path.objects is not None]
        sides.append(layout.cells[np.concatenate(ids)][:, ::-1])
    return nss(fixation_map(sides[0], width=layout.cols, height=layout.rows, binary=False), sides[1])
