"""Pictures: the scores of each domain with what is kept, and the retrieval score of every head."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from llm_attn.attention_influence.detection import HeadScores
from llm_attn.attention_influence.masking import Heads

_MOST_DOMAINS = 12
_BARS = 80


@dataclass(frozen=True)
class DomainScores:
    """Counts of a domain's scores between `edges`, and the score from which documents are kept."""

    domain: str
    edges: Float[np.ndarray, "bins+1"]
    counts: Int[np.ndarray, "bins"]
    threshold: float

    @classmethod
    def of(cls, domain: str, score: Float[np.ndarray, "n"], threshold: float) -> "DomainScores":
        """Counts scores; the half per cent at each end goes into the outermost bars."""
        finite = score[np.isfinite(score)]
        low, high = np.quantile(finite, (0.005, 0.995)) if len(finite) else (0.0, 1.0)
        edges = np.linspace(low, high if high > low else low + 1e-6, _BARS + 1)
        return cls(domain, edges, np.histogram(np.clip(finite, edges[0], edges[-1]), edges)[0], threshold)


def draw_scores(domains: Sequence[DomainScores], path: Path) -> Path:
    """Writes a PNG: one histogram for each of the dozen largest domains, what is kept in colour."""
    shown = sorted(domains, key=lambda each: -each.counts.sum())[:_MOST_DOMAINS] or [
        DomainScores.of("no documents", np.zeros(0), np.inf)
    ]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows + 0.4), layout="constrained")
    for axes, each in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        kept = each.edges[:-1] >= each.threshold - (each.edges[1] - each.edges[0])
        for part, colour in ((~kept, "#b0b7c3"), (kept, "#2266aa")):
            axes.bar(each.edges[:-1][part], each.counts[part], np.diff(each.edges)[part], align="edge", color=colour)
        if np.isfinite(each.threshold):
            axes.axvline(each.threshold, color="#aa3322", linewidth=1)
        axes.set_title(f"{each.domain}: {each.counts.sum():,} documents", fontsize=10)
        axes.set(xlabel="(masked loss - loss) / loss", ylabel="documents")
    for axes in list(figure.axes)[len(shown) :]:
        axes.set_visible(False)
    figure.suptitle("AttentionInfluence score; blue is kept", fontsize=11)
    return _saved(figure, path)


def draw_heads(scores: HeadScores, path: Path | str, *, heads: Heads | None = None) -> Path:
    """Writes a PNG: the retrieval score of every head, those in `heads` framed."""
    table = np.array(scores.scores)
    figure = Figure(figsize=(2.5 + 0.42 * table.shape[1], 1.6 + 0.2 * table.shape[0]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=max(table.max(), 1e-9), aspect="auto")
    figure.colorbar(image, ax=axes, label="retrieval score")
    for layer, chosen in (heads or {}).items():
        for head in chosen:
            axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="crimson", linewidth=1.4))
    axes.set(xlabel="head", ylabel="layer")
    return _saved(figure, Path(path))


def _saved(figure: Figure, path: Path) -> Path:
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)
    return path
