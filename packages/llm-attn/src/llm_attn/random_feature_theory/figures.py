"""Figures of the simulations (matplotlib PNG), ours and not the paper's, each with the numbers it shows as CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from torch import Tensor

from llm_attn.random_feature_theory.bounds import biased_gain
from llm_attn.random_feature_theory.qk_diagonal import diagonal_ratio
from llm_attn.random_feature_theory.simulations import MODELS, write_text

COLOURS = {"RFA": "#2266aa", "BRFA": "#cc5522", "RFMLP": "#777777"}
MARKERS = {"RFA": "o", "BRFA": "s", "RFMLP": "^"}
_LINES = ("-", "--", ":")
_DIAGONAL_COLOURS = {"trained": "#2266aa", "random weights": "#b0b7c3"}
Runs = Sequence[Mapping[str, Any]]
Measure = Literal["error", "over variance"]


def mean_and_spread(runs: Runs, model: str, target: str, at: str, measure: Measure = "error") -> tuple[float, float]:
    """Mean and standard deviation over seeds of a model's error on a target at some n or M; nan without runs."""
    found = [run["errors"][target][at][measure] for run in runs if run["model"] == model]
    return (float(np.mean(found)), float(np.std(found))) if found else (math.nan, math.nan)


def draw_samples(runs: Runs, targets: Sequence[str], title: str, path: Path) -> Path:
    """Test error against n, one panel for each target (E1, E2); shades are the standard deviation over seeds."""
    sizes = runs[0]["config"]["sizes"]
    figure = Figure(figsize=(3.6 * len(targets) + 0.4, 3.7), layout="constrained")
    for axes, target in zip(figure.subplots(1, len(targets), sharey=True, squeeze=False)[0], targets, strict=True):
        for model in MODELS:
            _curve(axes, sizes, [mean_and_spread(runs, model, target, str(n)) for n in sizes], model)
        _constant_line(axes, runs, target)
        _log_errors(axes)
        axes.set(xlabel="samples n", title=_with_gain(target, runs[0]["config"]["d"]))
        _log2(axes, sizes)
    _finish(figure, f"{title}; {_seeds(runs)}")
    _write_table(runs, targets, [str(n) for n in sizes], "n", path)
    return save(figure, path)


def draw_complexity(runs: Runs, path: Path) -> Path:
    """Test error against the degree p or q and against the mixing g, at three n (E3).

    Over the variance of y: an even power is mostly its mean, which any model gets, so targets would not compare.
    """
    sizes = runs[0]["config"]["sizes"][::-2][:3][::-1]
    families: dict[str, dict[float, str]] = {
        "degree p of the average": {p: f"average p={p}" for p in (1, 2, 3, 4)},
        "degree q of the correlation": {q: f"correlation q={q}" for q in (1, 2, 3, 4)},
        "share g of the correlation q=1\nin a mixture with the average p=2": {
            0: "average p=2",
            **{g: f"mixture g={g}" for g in (0.25, 0.5, 0.75)},
            1: "correlation q=1",
        },
    }
    figure = Figure(figsize=(11.6, 4.1), layout="constrained")
    for axes, (name, targets) in zip(figure.subplots(1, 3), families.items(), strict=True):
        for model in MODELS:
            for n, line in zip(sizes, _LINES[::-1][-len(sizes) :], strict=True):
                points = [mean_and_spread(runs, model, each, str(n), "over variance") for each in targets.values()]
                _curve(axes, list(targets), points, model, line=line, label=f"{model}, n={n}")
        axes.axhline(1, color="black", linestyle=":", linewidth=1, label="best constant")
        axes.set(xlabel=name, xticks=list(targets))
        _log_errors(axes)
    figure.axes[0].set_ylabel("test error / variance of y")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"Samples against complexity of the target; {_seeds(runs)}", fontsize=11)
    names = list(dict.fromkeys(target for targets in families.values() for target in targets.values()))
    _write_table(runs, names, [str(n) for n in sizes], "n", path)
    return save(figure, path)


def draw_heads(runs: Runs, targets: Sequence[str], path: Path) -> Path:
    """Test error against the number of heads, with the kernel of infinitely many as a line (E4)."""
    config = runs[0]["config"]
    counts = config["head_counts"]
    figure = Figure(figsize=(3.8 * len(targets) + 0.4, 3.7), layout="constrained")
    for axes, target in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets, strict=True):
        for model in ("RFA", "BRFA"):
            points = [mean_and_spread(runs, model, target, str(count)) for count in counts]
            limit, _ = mean_and_spread(runs, model, target, "limit")
            _curve(axes, counts, points, model)
            axes.axhline(limit, color=COLOURS[model], linestyle="--", linewidth=1, label=f"{model}, infinitely many")
        axes.set(xlabel="heads M", title=target)
        axes.set_ylim(bottom=0)
        _log2(axes, counts)
    _finish(figure, f"More heads at n = {config['heads_samples']}; {_seeds(runs)}")
    _write_table(runs, targets, [*(str(count) for count in counts), "limit"], "M", path)
    return save(figure, path)


def draw_diagonals(
    trained: Sequence[Float[Tensor, "d d"]], random: Sequence[Float[Tensor, "d d"]], name: str, path: Path
) -> Path:
    """|W_Q^T W_K| of a trained model's most diagonal layer, and the ratio of every layer beside random weights."""
    ratios = {"trained": [diagonal_ratio(m) for m in trained], "random weights": [diagonal_ratio(m) for m in random]}
    layer = int(np.argmax(ratios["trained"]))
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    matrix, offsets, bars = figure.subplots(1, 3, width_ratios=[1, 1, 1.1])
    shown = trained[layer][:48, :48]
    top = float(torch.quantile(shown.flatten(), 0.995))
    image = matrix.imshow(shown.numpy(), cmap="viridis", vmin=0, vmax=top)
    figure.colorbar(image, ax=matrix, shrink=0.85)
    matrix.set(title=f"layer {layer}: mean over heads of |W_Qᵀ W_K|,\nfirst {len(shown)} of {len(trained[layer])} rows")
    for which, of_layer in zip(ratios, (trained[layer], random[layer]), strict=True):
        offsets.plot(*_by_offset(of_layer), marker=".", color=_DIAGONAL_COLOURS[which], label=which)
    offsets.set(
        xlabel="column - row", ylabel="mean of that diagonal / mean of all", title=f"layer {layer}: every diagonal"
    )
    offsets.legend(frameon=False)
    for number, (which, values) in enumerate(ratios.items()):
        places = np.arange(len(values)) + 0.4 * number
        bars.bar(places, values, 0.4, align="edge", label=which, color=_DIAGONAL_COLOURS[which])
    bars.axhline(1, color="black", linewidth=0.8)
    bars.set_xticks(np.arange(len(trained)) + 0.4, [str(at) for at in range(len(trained))])
    bars.set(xlabel="layer", ylabel="mean of diagonal / mean of the rest", title=name)
    bars.set_ylim(0, 1.2 * max(ratios["trained"]))
    bars.legend(frameon=False, ncols=2, loc="upper center")
    rows = [["layer", *ratios], *([at, *pair] for at, pair in enumerate(zip(*ratios.values(), strict=True)))]
    write_text(path.with_suffix(".csv"), _csv(rows))
    return save(figure, path)


def _by_offset(matrix: Float[Tensor, "d d"], reach: int = 24) -> tuple[range, list[float]]:
    """Mean of each diagonal near the middle one over the mean of all entries."""
    places = range(-min(reach, len(matrix) - 1), min(reach, len(matrix) - 1) + 1)
    return places, [float(matrix.diagonal(at).mean() / matrix.mean()) for at in places]


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)
    return path


def _curve(
    axes: Axes,
    at: Sequence[float],
    points: Sequence[tuple[float, float]],
    model: str,
    *,
    line: str = "-",
    label: str = "",
) -> None:
    mean, spread = np.array(points).T
    colour = COLOURS[model]
    axes.plot(at, mean, line, marker=MARKERS[model], markersize=4, color=colour, label=label or model)
    axes.fill_between(at, np.maximum(mean - spread, 1e-5), mean + spread, color=colour, alpha=0.15, linewidth=0)


def _constant_line(axes: Axes, runs: Runs, target: str) -> None:
    level = float(np.mean([run["constant"][target] for run in runs]))
    axes.axhline(level, color="black", linestyle=":", linewidth=1, label="best constant")


def _log2(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values], fontsize=8)
    axes.xaxis.minorticks_off()


def _log_errors(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _finish(figure: Figure, title: str) -> None:
    figure.axes[0].set_ylabel("test error / mean of y²")
    figure.axes[-1].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)


def _seeds(runs: Runs) -> str:
    config, seeds = runs[0]["config"], len({run["seed"] for run in runs})
    return f"d = {config['d']}, N = {config['num_keys']}, {seeds} seed{'s' if seeds > 1 else ''} (our simulation)"


def _with_gain(target: str, d: int) -> str:
    kind, _, degree = target.partition(" q=")
    return f"{target}\nbound: B of RFA / BRFA ~ {biased_gain(int(degree), d):,.0f}" if kind == "correlation" else target


def _write_table(runs: Runs, targets: Sequence[str], places: Sequence[str], name: str, path: Path) -> None:
    rows: list[list[Any]] = [
        ["target", "model", name, "seeds", "error, mean", "error, standard deviation", "best constant"]
    ]
    for target in targets:
        constant = float(np.mean([run["constant"][target] for run in runs]))
        for model in dict.fromkeys(run["model"] for run in runs):
            seeds = sum(run["model"] == model for run in runs)
            for at in places:
                mean, spread = mean_and_spread(runs, model, target, at)
                rows.append([target, model, at, seeds, f"{mean:.5f}", f"{spread:.5f}", f"{constant:.5f}"])
    write_text(path.with_suffix(".csv"), _csv(rows))


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
