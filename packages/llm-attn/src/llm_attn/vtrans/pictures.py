"""Pictures: what stays of a model, and how the training of its gates went."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from llm_attn.vtrans.structure import Structure

_KEPT, _GONE = "#2266aa", "#d3d8e0"


def draw_structure(structure: Structure, whole: Structure, path: Path | str) -> Path:
    """Writes a PNG: heads and feed-forward units of each layer that stay, and which channels do."""
    figure = Figure(figsize=(10, 1.8 + 0.17 * len(whole.heads)), layout="constrained")
    heads, inter, hidden = figure.subplots(1, 3, width_ratios=[1, 1, 0.7])
    places = np.arange(len(whole.heads))
    for axes, kept, full, name in (
        (heads, structure.heads, whole.heads, "attention heads"),
        (inter, structure.inter, whole.inter, "feed-forward units"),
    ):
        axes.barh(places, [len(units) for units in full], color=_GONE)
        axes.barh(places, [len(units) for units in kept], color=_KEPT)
        axes.set(xlabel=name, ylabel="layer", yticks=places[:: 1 + len(places) // 16])
        axes.invert_yaxis()
    mask = np.zeros(len(whole.hidden))
    mask[list(structure.hidden)] = 1
    side = int(np.ceil(np.sqrt(len(mask))))
    grid = np.full(side * side, np.nan)
    grid[: len(mask)] = mask
    hidden.imshow(grid.reshape(side, side), cmap="Blues", vmin=-0.25, vmax=1.3)
    hidden.set(xticks=[], yticks=[], xlabel=f"channels: {len(structure.hidden)} of {len(whole.hidden)}")
    figure.suptitle("what stays (blue)")
    return saved(figure, Path(path))


def draw_training(history: Sequence[Mapping[str, float]], path: Path | str) -> Path:
    """Writes a PNG of `on_step` figures of the gates' training: sparsity with its target, and the loss."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [each["step"] for each in history]
    left.plot(steps, [each["target"] for each in history], "k--", label="target")
    left.plot(steps, [each["sparsity"] for each in history], color=_KEPT, label="expected sparsity")
    left.set(xlabel="step", ylabel="share of parameters that goes")
    left.legend()
    right.plot(steps, [each["loss"] for each in history], color=_KEPT)
    right.set(xlabel="step", ylabel="loss under noise")
    return saved(figure, Path(path))


def saved(figure: Figure, path: Path) -> Path:
    """Writes a temporary file and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=150)
    return part.replace(path)
