"""An ensemble with an interval that means something, around any regressor: cross-conformal prediction.

K copies are fitted, each without one fold of the training rows; the prediction is their mean, the spread their standard
deviation. Every training row has a score, |y - prediction of the copy that never saw it|, and the interval is the mean
plus or minus a quantile of those scores. On new rows exchangeable with the folds it covers at about the nominal level.

Vovk, "Cross-conformal predictors", Annals of Mathematics and Artificial Intelligence 74 (2015); K = 1 with one held-out
part is split conformal (Papadopoulos et al., ECML 2002), whose coverage is guaranteed.
Decided here: folds may keep whole years or whole regions together, because the rows of one season share their weather:
an interval for a season nobody has seen has to be calibrated on left-out seasons. The same left-out errors choose among
candidates, if several are given; the choice is made once for all members, so its effect on the interval is small.

Shapes: N rows, K members.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float32, Shaped

from geo_yield.errors import InputProblem
from geo_yield.samples import Samples

GROUPS = ("random", "year", "region", "district")
SPLIT_PARTS = 5
"""K = 1 holds out one of this many folds."""

_log = logging.getLogger(__name__)


class Regressor(Protocol):
    """What is evaluated: the network, every baseline, and whatever a user brings."""

    name: str

    def fit(self, samples: Samples, *, seed: int) -> None:
        """Learn from rows whose yields are known. Every choice (scaling, penalty, operator) is made on these rows."""

    def predict(self, samples: Samples) -> Float32[np.ndarray, "N"]:
        """Yield of every row in `samples.unit`; targets are hidden (NaN), so none can be read."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What an ensemble says of N rows, in the unit of its samples."""

    mean: Float32[np.ndarray, "N"]
    spread: Float32[np.ndarray, "N"]
    """Standard deviation over the members: how much they disagree, no coverage promised."""
    lower: Float32[np.ndarray, "N"]
    upper: Float32[np.ndarray, "N"]
    """Calibrated interval; infinite where too few rows were left out to support the level."""


class CrossFit:
    """K regressors, each fitted without one fold, with the interval that their left-out errors support.

    make: makes an unfitted regressor; several are candidates, of which `fit` keeps one.
    """

    def __init__(
        self,
        make: Callable[[], Regressor] | Sequence[Callable[[], Regressor]],
        *,
        folds: int = 5,
        group: str = "random",
        level: float = 0.9,
    ) -> None:
        if folds < 1:
            raise InputProblem(f"an ensemble needs at least 1 fold, got {folds}")
        if group not in GROUPS:
            raise InputProblem(f"folds can be made by {', '.join(GROUPS)}, got '{group}'")
        if not 0 < level < 1:
            raise InputProblem(f"an interval's level lies between 0 and 1 (0.9 covers nine rows in ten), got {level}")
        self.candidates = (make,) if callable(make) else tuple(make)
        if not self.candidates:
            raise InputProblem("an ensemble needs something to make its members with, got no candidate")
        self.folds, self.group, self.level = folds, group, level
        self.members: list[Regressor] = []
        self.scores = np.empty(0, np.float32)
        self.chosen = 0

    def fit(self, samples: Samples, *, seed: int, on_member: Callable[[int, int], None] | None = None) -> None:
        """Fit the members on the rows whose yield is known; member k starts from seed + k.

        Of several candidates the one with the smallest mean squared score is kept, and `chosen` says which: a choice
        made on rows left out of the training rows. on_member(done, total) is called after each fit.
        Raises InputProblem if the rows hold fewer than two groups.
        """
        known = samples.take(np.isfinite(samples.target))  # rows still to be predicted may be among them
        held_out = held_out_parts(known, folds=self.folds, group=self.group, seed=seed)
        total, best = len(self.candidates) * len(held_out), float("inf")
        for i, make in enumerate(self.candidates):
            members, scores = [], []
            for k, part in enumerate(held_out):
                member = make()
                member.fit(known.take(~part), seed=seed + k)
                left_out = known.take(part)
                scores.append(np.abs(left_out.target - member.predict(without_target(left_out))))
                members.append(member)
                if on_member is not None:
                    on_member(i * len(held_out) + k + 1, total)
            error = float(np.mean(np.square(np.concatenate(scores), dtype=np.float64)))
            if error < best:
                best, self.chosen, self.members = error, i, members
                self.scores = np.concatenate(scores).astype(np.float32)
        if len(self.candidates) > 1:
            _log.info("candidate %d of %d errs least on left-out rows", self.chosen + 1, len(self.candidates))

    def predict(self, samples: Samples) -> Prediction:
        """Mean, spread and interval of every row. Raises InputProblem before `fit`."""
        if not self.members:
            raise InputProblem("the model has no members yet: fit it, or load one that is")
        each = np.stack([member.predict(without_target(samples)) for member in self.members]).astype(np.float32)
        mean, margin = each.mean(axis=0), conformal_quantile(self.scores, self.level)
        return Prediction(
            mean=mean,
            spread=each.std(axis=0),
            lower=(mean - margin).astype(np.float32),
            upper=(mean + margin).astype(np.float32),
        )


def conformal_quantile(scores: Shaped[np.ndarray, "N"], level: float) -> float:
    """The ceil((N + 1) level)-th smallest score, infinite if N is too small for the level.

    The finite-sample quantile of Vovk et al., "Algorithmic Learning in a Random World" (2005): an exchangeable new
    score lies at or below it with probability at least `level`.
    """
    rank = int(np.ceil((len(scores) + 1) * level))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else float("inf")


def group_of(samples: Samples, group: str) -> Shaped[np.ndarray, "N"]:
    """What must stay together for each row: its year, region, district, or nothing but itself ("random")."""
    if group == "random":
        return np.arange(len(samples))
    if group == "district":
        if samples.district is None:
            raise InputProblem("folds by district need a district for every row: name the column that holds it")
        return samples.district
    return samples.year if group == "year" else samples.region_id


def held_out_parts(samples: Samples, *, folds: int, group: str, seed: int) -> list[Bool[np.ndarray, "N"]]:
    """Masks of the rows that each member leaves out: whole groups, shuffled by `seed`, in equal parts.

    Fewer groups than folds give one fold a group. folds = 1 gives the single held-out part of split conformal.
    """
    groups = group_of(samples, group)
    names = np.unique(groups)
    if len(names) < 2:
        raise InputProblem(
            f"{len(samples)} rows with a known yield in {len(names)} {group} group(s) cannot be split: "
            "give more rows, or make folds by another group"
        )
    parts = min(SPLIT_PARTS if folds == 1 else folds, len(names))
    if parts < folds:
        _log.debug("%d folds instead of %d: there are only %d %s groups", parts, folds, len(names), group)
    # shuffled, since neighbours in the alphabet of region ids are neighbours on the map
    shuffled = np.random.default_rng(seed).permutation(names)
    masks = [np.isin(groups, part) for part in np.array_split(shuffled, parts)]
    return masks[:1] if folds == 1 else masks


def without_target(samples: Samples) -> Samples:
    """The rows as a model may see them at prediction time."""
    return samples.replace(target=np.full(len(samples), np.nan, np.float32))
