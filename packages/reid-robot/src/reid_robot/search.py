"""Search for places of attention that pay: many placements tried, the best trade-offs kept, rules read off.

Eisenbach et al. (arXiv:2302.14574) derive rules for placing attention from an extensive search over architectures. How
they did is not published in the abstract; here: an evaluation is a pair (accuracy on identities split off the training
set, latency), strategies choose what to evaluate, and a rule is a main effect that a resample does not turn around:

    accuracy ~ a0 + sum_f a_f x_f        log latency ~ b0 + sum_f b_f x_f        x_f in {0, 1}: features of a placement

by least squares over all that was evaluated, 95 % intervals from resampling evaluations. Rules are ranked by what they
gain per cost, a_f / b_f.

Strategies: exhaustive, random, regularised evolution (Real et al., AAAI 2019), successive halving (Jamieson and
Talwalkar, AISTATS 2016). Decided here: evolution aims at the whole front, so a tournament is won by
whom the fewest beat in both, among equals by accuracy against log latency at a share drawn anew; nothing is evaluated
twice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reid_robot.placement import Candidate, Site

Evaluate = Callable[[Candidate], tuple[float, float]]


@dataclass(frozen=True)
class Evaluation:
    """accuracy: the larger the better. latency: in seconds, or a ratio to the plain network."""

    candidate: Candidate
    accuracy: float
    latency: float


def evaluate_all(
    candidates: Sequence[Candidate],
    evaluate: Evaluate,
    *,
    on_evaluation: Callable[[Evaluation], None] = lambda _: None,
) -> list[Evaluation]:
    """Exhaustive search: every candidate, in order."""
    found = []
    for candidate in candidates:
        found.append(Evaluation(candidate, *evaluate(candidate)))
        on_evaluation(found[-1])
    return found


def random_search(
    candidates: Sequence[Candidate], evaluate: Evaluate, *, budget: int, seed: int = 0
) -> list[Evaluation]:
    """`budget` candidates, drawn without replacement."""
    chosen = np.random.default_rng(seed).permutation(len(candidates))[:budget]
    return evaluate_all([candidates[i] for i in chosen], evaluate)


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """Regularised evolution."""

    budget: int = 64
    """Evaluations in all."""
    population: int = 16
    """Candidates alive; the oldest dies."""
    tournament: int = 4
    """Of whom the fittest is mutated."""
    seed: int = 0
    """Of all draws."""

    def __post_init__(self) -> None:
        if not 1 <= self.tournament <= self.population <= self.budget:
            raise ValueError(
                "1 <= tournament <= population <= budget must hold, got "
                f"{self.tournament}, {self.population} and {self.budget}"
            )


def evolve(
    start: Sequence[Candidate],
    mutate: Callable[[Candidate, np.random.Generator], Candidate],
    evaluate: Evaluate,
    config: EvolutionConfig = EvolutionConfig(),
    *,
    on_evaluation: Callable[[Evaluation], None] = lambda _: None,
) -> list[Evaluation]:
    """All evaluations, in order. `start`: candidates of which the first population is drawn.

    Ends early if a hundred mutations in a row are known already: then the neighbourhood is exhausted.
    """
    rng = np.random.default_rng(config.seed)
    first = rng.permutation(len(start))[: config.population]
    found = evaluate_all([start[i] for i in first], evaluate, on_evaluation=on_evaluation)
    alive, known = list(found), {e.candidate for e in found}
    while len(found) < config.budget:
        weight = rng.random()
        for _ in range(100):
            rivals = [alive[i] for i in rng.choice(len(alive), min(config.tournament, len(alive)), replace=False)]
            parent = max(rivals, key=lambda e: _fitness(e, found, weight))
            child = mutate(parent.candidate, rng)
            if child not in known:
                break
        else:
            break
        known.add(child)
        found.append(Evaluation(child, *evaluate(child)))
        on_evaluation(found[-1])
        alive = [*alive, found[-1]][-config.population :]
    return found


def _fitness(evaluation: Evaluation, found: Sequence[Evaluation], weight: float) -> tuple[int, float]:
    """How few beat it in both, and among equals accuracy against log latency, both scaled to what was seen."""
    beaten = sum(e.accuracy > evaluation.accuracy and e.latency < evaluation.latency for e in found)
    accuracy = [e.accuracy for e in found]
    cost = [math.log(e.latency) for e in found]
    gain = (evaluation.accuracy - min(accuracy)) / max(max(accuracy) - min(accuracy), 1e-12)
    price = (math.log(evaluation.latency) - min(cost)) / max(max(cost) - min(cost), 1e-12)
    return -beaten, weight * gain - (1 - weight) * price


def successive_halving(
    candidates: Sequence[Candidate],
    evaluate: Callable[[Candidate, int], tuple[float, float]],
    *,
    epochs: int,
    keep: float = 0.5,
) -> list[Evaluation]:
    """Rounds of training twice as long as the one before; in each the Pareto layers that fill `keep` go on.

    evaluate: (candidate, epochs) -> (accuracy, latency). `epochs`: of the first round. Returns the last round.
    """
    if not 0 < keep < 1:
        raise ValueError(f"keep must lie in (0, 1), got {keep}")
    alive = list(candidates)
    while True:
        found = [Evaluation(c, *evaluate(c, epochs)) for c in alive]
        if len(alive) <= 2:
            return found
        wanted, rest = max(1, math.floor(keep * len(alive))), list(found)
        layers: list[Evaluation] = []
        while len(layers) < wanted:
            front = pareto_front(rest)
            layers += front
            rest = [e for e in rest if e not in front]
        alive, epochs = [e.candidate for e in layers[:wanted]], 2 * epochs


def pareto_front(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those that no other beats in one and equals in the other, by rising latency."""
    front: list[Evaluation] = []
    for each in sorted(evaluations, key=lambda e: (e.latency, -e.accuracy)):
        if not front or each.accuracy > front[-1].accuracy:
            front.append(each)
    return front


def hypervolume(evaluations: Sequence[Evaluation], *, worst: tuple[float, float]) -> float:
    """Area in (accuracy, log latency) that the front dominates, up to worst = (accuracy, latency)."""
    area, reached = 0.0, worst[0]
    limit = math.log(worst[1])
    for each in pareto_front(evaluations):
        if each.latency < worst[1] and each.accuracy > reached:
            area += (each.accuracy - reached) * (limit - math.log(each.latency))
            reached = each.accuracy
    return area


@dataclass(frozen=True)
class Rule:
    """A main effect with its 95 % interval. benefit: change of accuracy; cost: of log latency.

    benefit_interval, cost_interval: (low, high). per_cost: benefit / cost, infinite where a gain costs nothing that can
    be told from zero.
    """

    feature: str
    benefit: float
    benefit_interval: tuple[float, float]
    cost: float
    cost_interval: tuple[float, float]
    per_cost: float


def placement_features(depths: Sequence[int]) -> dict[str, Callable[[Candidate], bool]]:
    """The binary features that rules are about."""

    def in_stage(stage: int) -> Callable[[Candidate], bool]:
        return lambda c: any(site.stage == stage for site in c.placement)

    def every(stage: int) -> Callable[[Candidate], bool]:
        depth = depths[stage - 1]
        return lambda c: depth > 1 and sum(site.stage == stage for site in c.placement) == depth

    features = {f"block in stage {stage}": in_stage(stage) for stage in range(1, len(depths) + 1)}
    features |= {f"every block of stage {stage}": every(stage) for stage in range(1, len(depths) + 1)}
    features["inside the residual branch"] = lambda c: any(site.place == "in" for site in c.placement)
    features["spatial gate"] = lambda c: bool(c.placement) and c.kind in ("light", "light-s", "cbam", "rga-s", "rga-sc")
    return features


def extract_rules(
    evaluations: Sequence[Evaluation],
    features: dict[str, Callable[[Candidate], bool]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Rule]:
    """Effects on accuracy or latency whose interval leaves out zero, the best gain per cost first.

    Features that are the same for all evaluations, or the same as one before, say nothing and are left out. Raises
    ValueError with fewer evaluations than features and two.
    """
    x, names = _design(evaluations, features)
    if len(evaluations) < x.shape[1] + 1:
        raise ValueError(f"{len(names)} features need at least {x.shape[1] + 1} evaluations, got {len(evaluations)}")
    y = np.array([[e.accuracy, math.log(e.latency)] for e in evaluations])
    effects = np.linalg.lstsq(x, y, rcond=None)[0]
    rng, draws = np.random.default_rng(seed), []
    for _ in range(resamples):
        rows = rng.integers(0, len(y), len(y))
        draws.append(np.linalg.lstsq(x[rows], y[rows], rcond=None)[0])
    low, high = np.quantile(np.stack(draws), (0.025, 0.975), axis=0)
    rules = []
    for i, name in enumerate(names, 1):
        told = [not low[i, j] <= 0 <= high[i, j] for j in (0, 1)]
        if any(told):
            per_cost = effects[i, 0] / effects[i, 1] if told[1] else math.copysign(math.inf, effects[i, 0])
            intervals = [(float(low[i, j]), float(high[i, j])) for j in (0, 1)]
            rules.append(
                Rule(name, float(effects[i, 0]), intervals[0], float(effects[i, 1]), intervals[1], float(per_cost))
            )
    return sorted(rules, key=lambda rule: -rule.per_cost)


def _design(
    evaluations: Sequence[Evaluation], features: dict[str, Callable[[Candidate], bool]]
) -> tuple[np.ndarray, list[str]]:
    columns, names = [np.ones(len(evaluations))], []
    for name, feature in features.items():
        column = np.array([float(feature(e.candidate)) for e in evaluations])
        if not any(np.array_equal(column, other) or np.array_equal(1 - column, other) for other in columns):
            columns.append(column)
            names.append(name)
    return np.stack(columns, 1), names


def mutate_stage(depths: Sequence[int]) -> Callable[[Candidate, np.random.Generator], Candidate]:
    """One mutation of level 2: a stage gets another of none, last, first, every; the place stays "out"."""

    def mutate(candidate: Candidate, rng: np.random.Generator) -> Candidate:
        stage = int(rng.integers(1, len(depths) + 1))
        depth = depths[stage - 1]
        choices = {(), (depth,), (1,), tuple(range(1, depth + 1))}
        now = tuple(site.block for site in candidate.placement if site.stage == stage)
        others = sorted(choices - {now})
        blocks = others[int(rng.integers(0, len(others)))]
        kept = [site for site in candidate.placement if site.stage != stage]
        return Candidate(candidate.kind, tuple(sorted([*kept, *(Site(stage, block) for block in blocks)])))

    return mutate
