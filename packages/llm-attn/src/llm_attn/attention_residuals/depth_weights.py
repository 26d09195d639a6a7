"""Which earlier layers each layer reads: the weights of Attention Residuals, as tensors and as a figure."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from llm_attn.attention_residuals.module import AttentionResiduals


@torch.no_grad()
def depth_weights(model: nn.Module, inputs: dict[str, Any]) -> list[Float[Tensor, "*tokens sources"]]:
    """Weights of every layer, and last of the final aggregation, over its sources, when the model reads `inputs`.

    Sources are the embedding, the closed blocks and, inside a block, its partial sum: layers differ in their number.
    `model` is one with `apply_attention_residuals`, called as model(**inputs), or an `AttentionResiduals`.
    ValueError if it is neither.
    """
    found = [module for module in model.modules() if isinstance(module, AttentionResiduals)]
    if len(found) != 1:
        raise ValueError(f"model must have attention residuals once, found them {len(found)} times")
    weights: dict[int, Tensor] = {}
    found[0].on_weights = weights.__setitem__
    try:
        model(**inputs)
    finally:
        found[0].on_weights = None
    return [weights[index] for index in sorted(weights)]


def plot_depth_weights(
    weights: list[Float[Tensor, "*tokens sources"]], path: str | Path, *, block_size: int, title: str = ""
) -> None:
    """Draw their means over tokens: layers downwards, sources to the right. Writes a PNG."""
    rows = torch.full((len(weights), max(w.shape[-1] for w in weights)), torch.nan)
    for row, weight in zip(rows, weights, strict=True):
        row[: weight.shape[-1]] = weight.reshape(-1, weight.shape[-1]).float().mean(0).cpu()
    height = min(14.0, 2.0 + 0.17 * len(rows))
    figure = Figure(figsize=(2.8 + 0.45 * rows.shape[1], height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows.numpy(), aspect="auto", vmin=0, cmap="viridis", interpolation="nearest")
    figure.colorbar(image, label="mean weight")
    for layer in range(block_size, len(rows), block_size):
        axes.axhline(layer - 0.5, color="white", linewidth=0.6)
    every = max(1, len(rows) // 24)
    places = sorted({*range(0, len(rows) - every, every), len(rows) - 1})
    axes.set_yticks(places, [*map(str, places[:-1]), "final"])
    axes.set_xticks(range(rows.shape[1]), ["emb.", *map(str, range(1, rows.shape[1]))])
    axes.set(xlabel="source: embedding, then blocks (the last of a row may be open)", ylabel="layer", title=title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial.png")
    figure.savefig(unfinished, dpi=130)
    unfinished.replace(path)
