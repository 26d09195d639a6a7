"""The search on a planted oracle whose truth is known: fronts, evolution, halving, rules."""

import math

import numpy as np
import pytest

from reid_robot.placement import Candidate, density_candidates
from reid_robot.search import (
    Evaluation,
    EvolutionConfig,
    evaluate_all,
    evolve,
    extract_rules,
    hypervolume,
    mutate_stage,
    pareto_front,
    placement_features,
    random_search,
    successive_halving,
)

DEPTHS = (3, 4, 6, 3)
GAIN = {1: 0.002, 2: 0.01, 3: 0.02, 4: 0.03}
COST = {1: 0.2, 2: 0.06, 3: 0.02, 4: 0.01}


def oracle(candidate):
    """Each site adds accuracy, less the second time in a stage, and latency."""
    accuracy, latency = 0.7, 1.0
    for stage in GAIN:
        count = sum(site.stage == stage for site in candidate.placement)
        accuracy += GAIN[stage] * (1 - 0.5**count)
        latency += COST[stage] * count
    return accuracy, latency


@pytest.fixture(scope="module")
def everything():
    return evaluate_all(list(density_candidates(DEPTHS)), oracle)


def test_front_is_the_true_one(everything):
    true = [
        e
        for e in everything
        if not any(
            o.accuracy >= e.accuracy and o.latency <= e.latency and (o.accuracy, o.latency) != (e.accuracy, e.latency)
            for o in everything
        )
    ]
    front = pareto_front(everything)
    assert {(e.accuracy, e.latency) for e in front} == {(e.accuracy, e.latency) for e in true}
    assert front[0].candidate.placement == ()
    assert [e.latency for e in front] == sorted(e.latency for e in front)


def test_hypervolume_by_hand():
    some = [Evaluation(Candidate("light", ()), a, t) for a, t in ((0.2, 1.0), (0.5, math.e), (0.4, 3.0))]
    assert hypervolume(some, worst=(0.1, math.e**2)) == pytest.approx(0.1 * 2 + 0.3 * 1)


def test_evolution_with_a_quarter_of_the_evaluations(everything):
    start, worst = [e.candidate for e in everything], (0.69, max(e.latency for e in everything))
    whole = hypervolume(everything, worst=worst)
    reached, by_chance = [], []
    for seed in range(8):
        told = []
        found = evolve(
            start, mutate_stage(DEPTHS), oracle, EvolutionConfig(budget=64, seed=seed), on_evaluation=told.append
        )
        assert told == found
        assert len({e.candidate for e in found}) == len(found) == 64
        reached.append(hypervolume(found, worst=worst) / whole)
        by_chance.append(hypervolume(random_search(start, oracle, budget=64, seed=seed), worst=worst) / whole)
    assert np.mean(reached) >= 0.95
    assert min(reached) >= 0.9
    assert np.mean(reached) > np.mean(by_chance)


def test_random_search_draws_without_replacement(everything):
    found = random_search([e.candidate for e in everything], oracle, budget=40, seed=1)
    assert len({e.candidate for e in found}) == 40


def test_evolution_ends_where_nothing_is_left():
    only = list(density_candidates((1,)))
    config = EvolutionConfig(budget=30, population=2, tournament=1)
    assert len(evolve(only, mutate_stage((1,)), oracle, config)) == 2


def test_halving_keeps_the_front_and_trains_it_longest(everything):
    asked = []

    def train(candidate, epochs):
        asked.append(epochs)
        accuracy, latency = oracle(candidate)
        return accuracy - 0.1 / epochs, latency

    last = successive_halving([e.candidate for e in everything[::4]], train, epochs=1)
    assert sorted(set(asked)) == [1, 2, 4, 8, 16, 32]
    assert asked.count(1) == 64
    assert asked.count(2) == 32
    assert len(last) == 2


def test_rules_find_planted_effects_and_no_others():
    """Stage 4 pays, stage 1 costs, density of stage 3 does nothing; noise of a third of the smallest effect."""
    features = {
        name: f
        for name, f in placement_features(DEPTHS).items()
        if name.startswith(("block in", "every block of stage 3"))
    }
    effect = {"block in stage 1": (0.0, 0.2), "block in stage 2": (0.01, 0.05), "block in stage 3": (0.015, 0.03)}
    effect["block in stage 4"] = (0.02, 0.02)
    candidates = list(density_candidates(DEPTHS))
    false, repeats = 0, 50
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        some = [candidates[i] for i in rng.permutation(256)[:96]]
        found = []
        for candidate in some:
            on = [effect[name] for name, f in features.items() if name in effect and f(candidate)]
            accuracy = 0.7 + sum(gain for gain, _ in on) + 0.0033 * rng.normal()
            latency = math.exp(sum(cost for _, cost in on) + 0.0066 * rng.normal())
            found.append(Evaluation(candidate, accuracy, latency))
        rules = {rule.feature: rule for rule in extract_rules(found, features, resamples=200, seed=repeat)}
        for name, (gain, cost) in effect.items():
            assert rules[name].cost_interval[0] < cost + 0.01
            assert rules[name].cost > 0
            if gain:
                assert rules[name].benefit_interval[0] > 0
        rule = rules.get("every block of stage 3")
        false += rule is not None and not rule.benefit_interval[0] <= 0 <= rule.benefit_interval[1]
    assert false <= 0.1 * repeats
    order = list(rules)
    assert order.index("block in stage 4") < order.index("block in stage 3") < order.index("block in stage 2")


def test_refused(everything):
    with pytest.raises(ValueError, match="tournament <= population <= budget"):
        EvolutionConfig(budget=4)
    with pytest.raises(ValueError, match="need at least"):
        extract_rules(everything[:2], placement_features(DEPTHS))
    with pytest.raises(ValueError, match="keep must lie"):
        successive_halving([], lambda *_: (0, 1), epochs=1, keep=1)
