"""The simulations of section 5: error against samples, complexity and heads, each run kept so that work resumes.

One run is one model and one seed: its Gram matrix is computed once, at the largest n, and serves all smaller n and all
targets. The number of heads is studied in runs of its own, where the Gram matrix grows with the heads.

Errors are mean squared errors on test samples over the mean of y^2; also kept: over the variance of y (they differ
where the mean of y is most of it, as at even powers). 1 is what the constant 0 gives; the best constant is drawn too.

Decided here, where the paper's settings are not known for certain: d = N = 16, M = 1000 heads and 17,000 neurons,
inputs uniform on the sphere, no noise, beta a random direction, ridge strength by 512 validation samples.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llm_attn.random_feature_theory.features import Features, HeadFeatures, NeuronFeatures
from llm_attn.random_feature_theory.gram import gram, growing_gram
from llm_attn.random_feature_theory.inputs import as_sets, sphere_samples
from llm_attn.random_feature_theory.kernels import head_kernel
from llm_attn.random_feature_theory.ridge import STRENGTHS, RidgePath, choose_strength
from llm_attn.random_feature_theory.targets import Average, Correlation, Mixture, Target, random_direction

Model = Literal["RFA", "BRFA", "RFMLP"]
MODELS: tuple[Model, ...] = ("RFA", "BRFA", "RFMLP")
TARGETS: tuple[Target, ...] = (
    *(Average(p) for p in (1, 2, 3, 4)),
    *(Correlation(q) for q in (1, 2, 3, 4)),
    *(Mixture(g) for g in (0.25, 0.5, 0.75)),
)
HEAD_TARGETS: tuple[Target, ...] = (Average(2), Average(4), Correlation(1))
"""Targets of the study of heads."""

Report = Callable[[str, int, int], None]
"""Told what is being done, how many of its parts are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """Sizes of a study."""

    d: int = 16
    """Width of query and keys."""
    num_keys: int = 16
    """N."""
    heads: int = 1000
    """M; the RFMLP has heads * (d + 1) neurons, which train as many numbers."""
    sizes: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    """n, rising."""
    head_counts: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    """M of the study of heads, rising."""
    heads_samples: int = 1024
    """n of the study of heads."""
    validation: int = 512
    """Samples that choose the ridge strength."""
    test: int = 1024
    """Samples that errors are measured on."""

    def __post_init__(self) -> None:
        for name in ("sizes", "head_counts"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or list(values) != sorted(set(values)) or values[0] < 1:
                raise ValueError(f"{name} must be positive and rise, got {values}")
        for name in ("d", "num_keys", "heads", "heads_samples", "validation", "test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


QUICK = SimulationConfig(
    d=6, num_keys=4, heads=60, sizes=(32, 64, 128), head_counts=(8, 32, 128), heads_samples=64, validation=64, test=128
)
"""Seconds, to see that everything runs; its figures show nothing of the paper."""


class StudyProblem(ValueError):
    """Results in the folder that are of another study, or broken; the message says what to do."""


def run_curves(config: SimulationConfig, model: Model, seed: int, folder: Path, report: Report) -> dict[str, Any]:
    """Error of one model at every n on every target; read from `folder` where it was computed before."""
    path = folder / f"curves-{model}-{seed}.json"
    return _once(path, config, lambda: _curves(config, model, seed, lambda a, b: report(f"{model}, seed {seed}", a, b)))


def run_heads(config: SimulationConfig, model: Model, seed: int, folder: Path, report: Report) -> dict[str, Any]:
    """Error of RFA or BRFA at every M and in the limit of infinitely many heads, at n = `heads_samples`."""
    path = folder / f"heads-{model}-{seed}.json"
    title = f"{model} by heads, seed {seed}"
    return _once(path, config, lambda: _heads(config, model, seed, lambda a, b: report(title, a, b)))


def model_features(config: SimulationConfig, model: Model, seed: int, *, heads: int | None = None) -> Features:
    """The feature map of a model of the study."""
    heads = config.heads if heads is None else heads
    if model == "RFMLP":
        return NeuronFeatures(d=config.d, num_keys=config.num_keys, neurons=heads * (config.d + 1), seed=seed)
    return HeadFeatures(d=config.d, heads=heads, mean="identity" if model == "BRFA" else "zero", seed=seed)


def _samples(config: SimulationConfig, seed: int, n: int) -> tuple[Float[Tensor, "total N+1 d"], Float[Tensor, "d"]]:
    """n training samples, then those of validation, then those of the test; the same for every model."""
    generator = torch.Generator().manual_seed(seed)
    total = n + config.validation + config.test
    beta = random_direction(config.d, generator=generator)
    return sphere_samples(total, num_keys=config.num_keys, d=config.d, generator=generator), beta


def _values(targets: tuple[Target, ...], x: Tensor, beta: Tensor) -> Float[Tensor, "total targets"]:
    return torch.stack([target(x.double(), beta.double()) for target in targets], 1)


def _curves(config: SimulationConfig, model: Model, seed: int, step: Callable[[int, int], None]) -> dict[str, Any]:
    most = config.sizes[-1]
    x, beta = _samples(config, seed, most)
    y = _values(TARGETS, x, beta)
    parts = 1 + len(config.sizes)
    step(0, parts)
    kernel = gram(model_features(config, model, seed), as_sets(x), columns=most)
    step(1, parts)
    errors: dict[str, dict[str, Any]] = {target.label: {} for target in TARGETS}
    for done, n in enumerate(config.sizes, 2):
        for label, found in _fit(kernel, y, n, most, config.validation, TARGETS).items():
            errors[label][str(n)] = found
        step(done, parts)
    return {"model": model, "seed": seed, "errors": errors, "constant": _constant(y[-config.test :], TARGETS)}


def _heads(config: SimulationConfig, model: Model, seed: int, step: Callable[[int, int], None]) -> dict[str, Any]:
    n, counts = config.heads_samples, config.head_counts
    x, beta = _samples(config, seed, n)
    y, sets = _values(HEAD_TARGETS, x, beta), as_sets(x)
    errors: dict[str, dict[str, Any]] = {target.label: {} for target in HEAD_TARGETS}
    step(0, len(counts) + 1)
    features = model_features(config, model, seed, heads=counts[-1])
    grams = growing_gram(features, sets, counts, columns=n)
    for done, (count, kernel) in enumerate(zip(counts, grams, strict=True), 1):
        for label, found in _fit(kernel, y, n, n, config.validation, HEAD_TARGETS).items():
            errors[label][str(count)] = found
        step(done, len(counts) + 1)
    mean = "identity" if model == "BRFA" else "zero"
    limit = torch.cat((head_kernel(sets[:n], mean=mean), head_kernel(sets[n:], sets[:n], mean=mean))).double()
    for label, found in _fit(limit, y, n, n, config.validation, HEAD_TARGETS).items():
        errors[label]["limit"] = found
    step(len(counts) + 1, len(counts) + 1)
    return {"model": model, "seed": seed, "errors": errors, "constant": _constant(y[-config.test :], HEAD_TARGETS)}


def _fit(
    kernel: Float[Tensor, "total columns"], y: Tensor, n: int, most: int, validation: int, targets: tuple[Target, ...]
) -> dict[str, dict[str, float]]:
    """Fits the first n of `most` training rows, chooses on the validation rows, tests on the rest."""
    solutions = RidgePath(kernel[:n, :n]).solve(y[:n], STRENGTHS)
    chosen = choose_strength(solutions, kernel[most : most + validation, :n], y[most : most + validation])
    wanted = y[most + validation :]
    squared = (kernel[most + validation :, :n] @ chosen.solution - wanted).square().mean(0)
    scale, variance = wanted.square().mean(0), wanted.var(0, correction=0)
    return {
        target.label: {
            "error": float(squared[at] / scale[at]),
            "over variance": float(squared[at] / variance[at]),
            "strength": STRENGTHS[int(chosen.index[at])],
        }
        for at, target in enumerate(targets)
    }


def _constant(y: Tensor, targets: tuple[Target, ...]) -> dict[str, float]:
    """Error of the best constant: variance over mean square."""
    share = y.var(0, correction=0) / y.square().mean(0)
    return {target.label: float(share[at]) for at, target in enumerate(targets)}


def _once(path: Path, config: SimulationConfig, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    settings = json.loads(json.dumps(asdict(config)))
    if path.exists():
        return _read(path, settings)
    start = time.process_time()
    result = {"config": settings, **make()}
    result |= {"seconds of the processor": round(time.process_time() - start, 1), "torch": torch.__version__}
    write_text(path, json.dumps(result, indent=1) + "\n")
    return result


def _read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        same = found["config"] == settings and bool(found["errors"])
    except (ValueError, KeyError, TypeError) as error:
        raise StudyProblem(f"'{path}' is no result of this study ({error}): delete it and start again") from error
    if not same:
        raise StudyProblem(f"'{path}' is from a study with other settings: give another --out, or delete that folder")
    return found


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name first; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
