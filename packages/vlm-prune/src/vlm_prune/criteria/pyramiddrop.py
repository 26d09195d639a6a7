"""PyramidDrop (Xing et al., CVPR 2025, arXiv:2410.17247): fewer tokens from stage to stage.

Before each of a few layers, the tokens that the last instruction token looks at in that very layer stay: queries and
keys are computed for the layer's input ahead of time, as in the published code. Decided here: tokens keep their
positions (the code renumbers them). The instruction's last token is the prompt's.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vlm_prune.criteria.fastv import last_token_attention
from vlm_prune.criterion import Criterion
from vlm_prune.door import PruneHandle, open_pruner
from vlm_prune.stages import Stage, check_keep, scaled_layers, scheduled

PUBLISHED_LAYERS, PUBLISHED_DEPTH = (2, 10, 20), 32


@dataclass(frozen=True, kw_only=True)
class PyramidDropConfig:
    """Three stages; published for an average of 128 of 576 tokens: `ratios=(0.32, 0.16, 0.08)`."""

    name: ClassVar[str] = "pyramiddrop"

    keep: float | int = 0.2
    """Mean share of the visual tokens, or mean number, over the layers behind the first stage."""
    ratios: tuple[float, ...] | None = None
    """Share of the prompt's visual tokens behind each stage, in place of `keep`."""
    layers: tuple[int, ...] | None = None
    """Layers before which tokens are dropped. None: 2, 10 and 20 of 32, at the same depth in other models."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        number = 3 if self.layers is None else len(self.layers)
        if self.ratios is not None and len(self.ratios) != number:
            raise ValueError(f"ratios must be one for each of {number} stages, got {self.ratios}")
        for ratio in self.ratios or ():
            check_keep(float(ratio))

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """A stage before each layer."""
        if self.layers is None:
            after = scaled_layers([layer - 1 for layer in PUBLISHED_LAYERS], PUBLISHED_DEPTH, num_layers)
        else:
            after = tuple(layer - 1 for layer in self.layers)
        halves = [0.5**i for i in range(len(after))]
        kept = self.ratios or scheduled(self.keep, halves, after, num_layers)
        criterion = Criterion(
            name=self.name, score=last_token_attention, needs=frozenset({"next_attention"}), attends=True
        )
        return tuple(Stage(after_layer=a, keep=k, criterion=criterion) for a, k in zip(after, kept, strict=True))


def apply_pyramiddrop(model: nn.Module, config: PyramidDropConfig | None = None) -> PruneHandle:
    """Drops tokens in three stages."""
    return open_pruner(model, config or PyramidDropConfig())
