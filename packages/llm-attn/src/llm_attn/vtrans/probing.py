"""Attention probing: what every head of a model looks at, before and after it is shrunk.

Five figures for each head, means over the tokens of some texts, and a picture of them all in which the heads that a
structure keeps are framed:

    entropy    of the attention, relative to that of uniform attention over the tokens a row sees: 0 one token, 1 all
    distance   in tokens between a row and what it attends to, its mean
    first, previous, self    the share of attention on the first token, the token before, the row's own

Dutta et al., arXiv:2406.05276, look at what pruned attention attends to; these figures, usual in the study of heads
(Clark et al., "What Does BERT Look At?", BlackboxNLP 2019), are decided here.

Shapes: L layers, H query heads, B batch, T tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from llm_attn.transformers.door import base_model
from llm_attn.vtrans.families import Anatomy
from llm_attn.vtrans.pictures import saved
from llm_attn.vtrans.structure import Structure
from llm_attn.vtrans.training import collate, to_device

FIGURES = ("entropy", "distance", "first", "previous", "self")


@torch.no_grad()
def probe_attention(
    model: nn.Module, data: Sequence[Tensor], *, batch_size: int = 8
) -> dict[str, Float[np.ndarray, "L H"]]:
    """The figures of every head over texts (token ids, 1-D). In ragged models heads that a layer lacks are NaN.

    The attention maps are in memory for one batch. ValueError without a text of two tokens.
    """
    host: Any = base_model(model)
    texts = [text for text in data if len(text) > 1]
    if not texts:
        raise ValueError("probing takes at least one text of two tokens")
    before = host.config._attn_implementation
    host.set_attn_implementation("eager")  # the others give no maps
    try:
        sums: list[Tensor] = []
        rows = 0
        for start in range(0, len(texts), batch_size):
            batch = to_device(collate(texts[start : start + batch_size], 0), host)
            maps = host(**batch, output_attentions=True).attentions
            counted = batch["attention_mask"].bool()
            found = [_of_layer(each, counted) for each in maps]
            sums = [old + new for old, new in zip(sums or [torch.zeros(())] * len(found), found, strict=True)]
            rows += int(counted[:, 1:].sum())
    finally:
        host.set_attn_implementation(before)
    heads = max(each.shape[1] for each in sums)
    table = np.full((len(FIGURES), len(sums), heads), np.nan)
    for layer, each in enumerate(sums):
        table[:, layer, : each.shape[1]] = (each / rows).double().cpu().numpy()
    return dict(zip(FIGURES, table, strict=True))


def _of_layer(weights: Float[Tensor, "B H T T"], counted: Bool[Tensor, "B T"]) -> Float[Tensor, "5 H"]:
    """Sums over all counted rows but each text's first, which sees too little to tell."""
    tokens = weights.shape[-1]
    place = torch.arange(tokens, device=weights.device)
    seen = (weights > 0).sum(-1).clamp(min=2)
    entropy = -torch.special.xlogy(weights, weights).sum(-1) / seen.log()
    distance = (weights * (place[:, None] - place).abs()).sum(-1)
    own = weights.diagonal(dim1=-2, dim2=-1)
    previous = torch.zeros_like(own)
    previous[..., 1:] = weights.diagonal(-1, -2, -1)
    figures = torch.stack([entropy, distance, weights[..., 0], previous, own])  # 5, B, H, T
    rows = counted.clone()
    rows[:, 0] = False
    return (figures * rows[:, None]).sum((1, 3))


def draw_attention(
    probes: dict[str, dict[str, Float[np.ndarray, "L H"]]],
    path: Path | str,
    *,
    structure: Structure | None = None,
    model: nn.Module | None = None,
) -> Path:
    """Writes a PNG: a row for each probe (title: figures), a column for each figure, a square for each head.

    structure: frames the heads it keeps in the first probe, which must be the original's; `model` is that original
    where key heads are shared.
    """
    names = list(probes)
    size = next(iter(probes.values()))["entropy"].shape
    figure = Figure(figsize=(3.0 * len(FIGURES), len(names) * (1.3 + 0.2 * size[0])), layout="constrained")
    axes = figure.subplots(len(names), len(FIGURES), squeeze=False)
    for column, what in enumerate(FIGURES):
        high = max(float(np.nanmax(probe[what])) for probe in probes.values())
        for row, name in enumerate(names):
            image = axes[row][column].imshow(probes[name][what], vmin=0, vmax=high, cmap="viridis", aspect="auto")
            axes[row][column].set_title(f"{name}: {what}", fontsize=9)
            axes[row][column].set(xlabel="head", ylabel="layer")
            axes[row][column].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=[axes[row][column] for row in range(len(names))], shrink=0.8)
    if structure is not None:
        _frame(axes[0], structure, 1 if model is None else Anatomy(model).group)
    return saved(figure, Path(path))


def _frame(row: Any, structure: Structure, group: int) -> None:
    for axes in row:
        for layer in structure.layers:
            for head in structure.heads[layer]:
                corner = (head * group - 0.5, layer - 0.5)
                axes.add_patch(Rectangle(corner, group, 1, fill=False, edgecolor="crimson", linewidth=1.2))
