"""A uniform grid: tokens at even distances in raster order, whatever the image shows.

Decided here: even distances along the sequence of each sample. On square views that is a grid up to the slant that a
keep ratio which is no square of a whole number gives it, and it is defined for tiles, video and merged tokens alike.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from vlm_prune.criterion import Context, Criterion, Selection
from vlm_prune.door import PruneHandle, open_pruner
from vlm_prune.stages import BEFORE, Stage, check_keep


def _no_scores(context: Context) -> Float[Tensor, "B n"]:
    return context.visual.double()


def evenly_spaced(context: Context, scores: Float[Tensor, "B n"]) -> Selection:  # noqa: ARG001
    """Token r of N stays where floor((r + 1/2) k / N + 1/2) passes a whole number: k of them, evenly."""
    rank, total = context.visual_rank(), context.visual.sum(1, keepdim=True).clamp(min=1)
    kept = context.num_kept[:, None].clamp(max=total)
    # whole numbers: token r is chosen where (2 r k + N) // 2N grows on the way to r + 1
    start, end = (2 * rank * kept + total) // (2 * total), (2 * (rank + 1) * kept + total) // (2 * total)
    return Selection((end > start) & context.visual)


@dataclass(frozen=True, kw_only=True)
class UniformConfig:
    """Evenly spaced tokens before the language model."""

    name: ClassVar[str] = "uniform"

    keep: float | int = 0.2
    """Share of the visual tokens, or their number."""

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def stages(self, num_layers: int) -> tuple[Stage, ...]:  # noqa: ARG002
        """One stage before the first layer."""
        criterion = Criterion(name=self.name, score=_no_scores, select=evenly_spaced)
        return (Stage(after_layer=BEFORE, keep=self.keep, criterion=criterion),)


def apply_uniform(model: nn.Module, config: UniformConfig | None = None) -> PruneHandle:
    """Keeps evenly spaced tokens."""
    return open_pruner(model, config or UniformConfig())
