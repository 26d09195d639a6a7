"""DivPrune (Alvar et al., CVPR 2025, arXiv:2503.02175): the tokens that are farthest from each other.

Max-min diversity of the projected features by cosine distance, from the token whose nearest neighbour is farthest.
The selection is `shared_kernels.diverse_subset`. Decided here: counts are rounded down, as everywhere.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from shared_kernels import diverse_subset
from vlm_prune.criterion import Context, Criterion, Selection
from vlm_prune.door import PruneHandle, open_pruner
from vlm_prune.stages import BEFORE, Stage, check_keep
from vlm_prune.subsets import token_sets


def _no_scores(context: Context) -> Float[Tensor, "B n"]:
    return context.visual.double()


def most_diverse(context: Context, scores: Float[Tensor, "B n"]) -> Selection:  # noqa: ARG001
    """Greedy max-min subset of each sample's visual tokens."""
    sets = token_sets(context)
    chosen = diverse_subset(sets.take(context.hidden), num_kept=sets.most(), first="isolated", mask=sets.present)
    return Selection(sets.kept(chosen, context.visual))


@dataclass(frozen=True, kw_only=True)
class DivPruneConfig:
    """A diverse subset before the language model."""

    name: ClassVar[str] = "divprune"

    keep: float | int = 0.2
    """Share of the visual tokens, or their number."""

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def stages(self, num_layers: int) -> tuple[Stage, ...]:  # noqa: ARG002
        """One stage before the first layer."""
        criterion = Criterion(name=self.name, score=_no_scores, select=most_diverse)
        return (Stage(after_layer=BEFORE, keep=self.keep, criterion=criterion),)


def apply_divprune(model: nn.Module, config: DivPruneConfig | None = None) -> PruneHandle:
    """Keeps the most diverse tokens."""
    return open_pruner(model, config or DivPruneConfig())
