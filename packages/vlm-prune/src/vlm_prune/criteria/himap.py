"""HiMAP (Yin et al., 2025, arXiv:2503.13108): first what text looks at, then what the image looks at.

Before layer 2, tokens by the attention that they receive from all text behind the image; before layer 8, by the
attention that they receive from the image tokens that are left. Mean over heads, sum over queries. Published budget
on LLaVA-1.5-7B: 115, then 90 of 576 tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from vlm_prune.criterion import Context, Criterion, Need
from vlm_prune.door import PruneHandle, open_pruner
from vlm_prune.stages import Stage, check_keep, scaled_layers, scheduled

PUBLISHED_LAYERS, PUBLISHED_DEPTH, PUBLISHED_COUNTS = (2, 8), 32, (115, 90)


def from_text(context: Context) -> Float[Tensor, "B n"]:
    """Attention received from the text behind the image."""
    return context.rows().received(context.text)


def from_image(context: Context) -> Float[Tensor, "B n"]:
    """Attention received from the visual tokens that are left."""
    return context.rows().received(context.visual)


@dataclass(frozen=True, kw_only=True)
class HiMAPConfig:
    """Two stages."""

    name: ClassVar[str] = "himap"

    keep: float | int = 0.2
    """Mean share of the visual tokens, or mean number, over the layers behind the first stage."""
    counts: tuple[int, int] | None = None
    """Tokens behind each stage, in place of `keep`; published: (115, 90)."""
    layers: tuple[int, int] | None = None
    """Layers before which tokens are dropped. None: 2 and 8 of 32, at the same depth in other models."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.counts is not None and not self.counts[0] >= self.counts[1] >= 1:
            raise ValueError(f"counts must fall and be at least 1, got {self.counts}")

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """One stage by text, one by the image."""
        if self.layers is None:
            after = scaled_layers([layer - 1 for layer in PUBLISHED_LAYERS], PUBLISHED_DEPTH, num_layers)
        else:
            after = tuple(layer - 1 for layer in self.layers)
        kept = self.counts or scheduled(self.keep, PUBLISHED_COUNTS, after, num_layers)
        needs: frozenset[Need] = frozenset({"attention"})
        by_text = Criterion(name=self.name, score=from_text, needs=needs, attends=True)
        by_image = Criterion(name=f"{self.name}, by image", score=from_image, needs=needs, attends=True)
        return tuple(
            Stage(after_layer=a, keep=k, criterion=c) for a, k, c in zip(after, kept, (by_text, by_image), strict=True)
        )


def apply_himap(model: nn.Module, config: HiMAPConfig | None = None) -> PruneHandle:
    """Drops tokens in two stages."""
    return open_pruner(model, config or HiMAPConfig())
