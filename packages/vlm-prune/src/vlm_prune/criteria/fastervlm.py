"""FasterVLM (Zhang et al., 2024, arXiv:2412.01818): the patches that the vision tower's class token looks at.

Attention of the class token in the layer whose output the features are, mean over heads. Decided here: a tower without
a class token gives the attention that a patch receives from all patches; a token made of several patches, their mean.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from vlm_prune.criterion import Context, Criterion
from vlm_prune.door import PruneHandle, open_pruner
from vlm_prune.stages import BEFORE, Stage, check_keep


def tower_attention(context: Context) -> Float[Tensor, "B n"]:
    """The vision tower's attention to each visual token."""
    return context.tower().attention()


@dataclass(frozen=True, kw_only=True)
class FasterVLMConfig:
    """The tower's most attended tokens, before the language model."""

    name: ClassVar[str] = "fastervlm"

    keep: float | int = 0.2
    """Share of the visual tokens, or their number."""

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def stages(self, num_layers: int) -> tuple[Stage, ...]:  # noqa: ARG002
        """One stage before the first layer."""
        criterion = Criterion(name=self.name, score=tower_attention, needs=frozenset({"tower_attention"}), attends=True)
        return (Stage(after_layer=BEFORE, keep=self.keep, criterion=criterion),)


def apply_fastervlm(model: nn.Module, config: FasterVLMConfig | None = None) -> PruneHandle:
    """Keeps what the tower's class token looks at."""
    return open_pruner(model, config or FasterVLMConfig())
