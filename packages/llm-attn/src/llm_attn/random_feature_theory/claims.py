"""What the paper claims, held against the runs: each claim with what was measured and whether it held.

Decided here: an ordering of models holds if it holds in every seed; a claim about orders of growth is shown as the
numbers of samples that the mean curves need, interpolated in log n against log error.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llm_attn.random_feature_theory.bounds import biased_gain
from llm_attn.random_feature_theory.figures import Runs, mean_and_spread
from llm_attn.random_feature_theory.simulations import MODELS


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, and what came out."""

    claim: str
    held: bool
    measured: str


def curve_claims(runs: Runs) -> Iterator[Claim]:
    """Claims about samples and complexity, at the largest n of the runs."""
    yield from (_ordered(runs, "RFA", "RFMLP", f"average p={p}") for p in (2, 4))
    yield from (_ordered(runs, "RFA", "RFMLP", f"correlation q={q}") for q in (1, 2, 3))
    yield from (_ordered(runs, "BRFA", "RFA", f"correlation q={q}") for q in (1, 2, 3))
    yield _gain(runs)
    yield _harder(runs, [f"average p={p}" for p in (1, 2, 3, 4)], "RFA")
    yield _harder(runs, [f"correlation q={q}" for q in (1, 2, 3, 4)], "RFA")
    yield _harder(runs, ["average p=2", "mixture g=0.25", "mixture g=0.5", "mixture g=0.75", "correlation q=1"], "RFA")
    yield from (_rate(runs, "RFA", target) for target in ("average p=2", "average p=4"))


def head_claims(runs: Runs) -> Iterator[Claim]:
    """Claims about the number of heads: the error falls towards the kernel's, about as 1/M."""
    counts = runs[0]["config"]["head_counts"]
    for model, target in (("RFA", "average p=2"), ("RFA", "average p=4"), ("BRFA", "correlation q=1")):
        limit, _ = mean_and_spread(runs, model, target, "limit")
        excess = [mean_and_spread(runs, model, target, str(count))[0] - limit for count in counts]
        # below a few per cent of the limit the excess is noise of the draw of the heads
        steep = [(c, e) for c, e in zip(counts, excess, strict=True) if e > 0.05 * limit]
        slope = _slope(*zip(*steep, strict=True)) if len(steep) > 1 else math.nan
        measured = (
            f"excess over infinitely many heads {excess[0]:.3f} at M={counts[0]}, {excess[-1]:.3f} at M={counts[-1]}"
        )
        yield Claim(
            f"{model} on {target}: the error exceeds that of infinitely many heads by O(1/M)",
            slope <= -0.8,
            f"{measured}; slope {slope:.2f} in log M",
        )


def samples_to_reach(runs: Runs, model: str, target: str, level: float) -> float:
    """n at which the mean error first falls to `level`, interpolated; infinite if it does not."""
    sizes = runs[0]["config"]["sizes"]
    errors = [mean_and_spread(runs, model, target, str(n))[0] for n in sizes]
    for at in range(1, len(sizes)):
        if errors[at] <= level < errors[at - 1]:
            share = math.log(errors[at - 1] / level) / math.log(errors[at - 1] / errors[at])
            return float(sizes[at - 1] * (sizes[at] / sizes[at - 1]) ** share)
    return float(sizes[0]) if errors[0] <= level else math.inf


def error_table(runs: Runs, targets: Sequence[str]) -> str:
    """Markdown: error of each model at n of 256, 1024 and the largest, mean and standard deviation over seeds."""
    every = list(runs[0]["config"]["sizes"])
    sizes = [n for n in every if n in (256, 1024, every[-1])] if 1024 in every else every
    lines = ["| model | n | " + " | ".join(targets) + " |", "| --- | ---: |" + " ---: |" * len(targets)]
    constants = [np.mean([run["constant"][target] for run in runs]) for target in targets]
    lines.append("| best constant | | " + " | ".join(f"{constant:.3f}" for constant in constants) + " |")
    for model in MODELS:
        for n in sizes:
            pairs = [mean_and_spread(runs, model, target, str(n)) for target in targets]
            lines.append(
                f"| {model} | {n} | " + " | ".join(f"{mean:.3f} ± {spread:.3f}" for mean, spread in pairs) + " |"
            )
    return "\n".join(lines) + "\n"


def claim_table(claims: Sequence[Claim]) -> str:
    """Markdown: one row for each claim."""
    rows = [f"| {each.claim} | {'yes' if each.held else '**no**'} | {each.measured} |" for each in claims]
    return "\n".join(["| claim | held | measured |", "| --- | --- | --- |", *rows]) + "\n"


def _ordered(runs: Runs, better: str, worse: str, target: str) -> Claim:
    n = str(runs[0]["config"]["sizes"][-1])
    errors = {(run["model"], run["seed"]): run["errors"][target][n]["error"] for run in runs}
    seeds = sorted(
        {seed for model, seed in errors if model == better} & {seed for model, seed in errors if model == worse}
    )
    wins = sum(errors[better, seed] < errors[worse, seed] for seed in seeds)
    ours, other = (np.mean([errors[model, seed] for seed in seeds]) for model in (better, worse))
    return Claim(
        f"{better} is below {worse} on {target}, n={n}",
        wins == len(seeds),
        f"{ours:.4f} against {other:.4f}, {wins} of {len(seeds)} seeds",
    )


def _gain(runs: Runs) -> Claim:
    d, most = runs[0]["config"]["d"], runs[0]["config"]["sizes"][-1]
    level, _ = mean_and_spread(runs, "RFA", "correlation q=1", str(most))
    biased = samples_to_reach(runs, "BRFA", "correlation q=1", level)
    return Claim(
        f"BRFA needs fewer samples than RFA, by the bounds up to d^q; here q=1, d^q={biased_gain(1, d):.0f}",
        most / biased > 1,
        f"{most / biased:.1f} times fewer: n={biased:.0f} for the error {level:.3f} that RFA reaches at n={most}",
    )


def _harder(runs: Runs, targets: Sequence[str], model: str) -> Claim:
    n = str(runs[0]["config"]["sizes"][-1])
    errors = [mean_and_spread(runs, model, target, n, "over variance")[0] for target in targets]
    return Claim(
        f"{model}, n={n}: the error over the variance rises with the complexity of the target ({', '.join(targets)})",
        errors == sorted(errors),
        ", ".join(f"{error:.4f}" for error in errors),
    )


def _rate(runs: Runs, model: str, target: str) -> Claim:
    sizes = runs[0]["config"]["sizes"][-4:]
    errors = [mean_and_spread(runs, model, target, str(n))[0] for n in sizes]
    slope = _slope(sizes, errors)
    return Claim(
        f"{model} on {target}: the excess risk falls at least as n^-1/2 (theorem 2)",
        slope <= -0.5,
        f"slope {slope:.2f} in log n over n={sizes[0]}..{sizes[-1]}",
    )


def _slope(at: Sequence[float], values: Sequence[float]) -> float:
    """Of a line through the logarithms."""
    return float(np.polyfit(np.log(at), np.log(values), 1)[0])
