"""FastV (Chen et al., ECCV 2024, arXiv:2403.06764): after a few layers, the tokens that the last prompt token looks at.

Score: attention of the prompt's last token in layer K - 1, mean over heads; dropped before layer K. Decided here: the
last token is the query, as in the published code (the paper's text averages over all queries).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm_prune.criterion import Context, Criterion
from vlm_prune.door import PruneHandle, open_pruner
from vlm_prune.stages import Stage, check_keep


def last_token(context: Context) -> Int[Tensor, "B 1"]:
    """Position of each sample's last token that is not padding."""
    places = torch.arange(context.valid.shape[1], device=context.valid.device)
    return torch.where(context.valid, places, -1).max(1, keepdim=True).values


def last_token_attention(context: Context) -> Float[Tensor, "B n"]:
    """Attention of the last token to all others, mean over heads."""
    return context.rows().rows(last_token(context)).mean(1)[:, 0]


@dataclass(frozen=True, kw_only=True)
class FastVConfig:
    """One stage inside the language model."""

    name: ClassVar[str] = "fastv"

    keep: float | int = 0.5
    """Share of the visual tokens, or their number, in layers from `layer` on."""
    layer: int = 2
    """K: the first layer that sees fewer tokens; scored by the one before it."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.layer < 1:
            raise ValueError(f"layer must be at least 1, the layer before it is read, got {self.layer}")

    def stages(self, num_layers: int) -> tuple[Stage, ...]:  # noqa: ARG002
        """One stage before layer K."""
        criterion = Criterion(name=self.name, score=last_token_attention, needs=frozenset({"attention"}), attends=True)
        return (Stage(after_layer=self.layer - 1, keep=self.keep, criterion=criterion),)


def apply_fastv(model: nn.Module, config: FastVConfig | None = None) -> PruneHandle:
    """Drops tokens before layer K."""
    return open_pruner(model, config or FastVConfig())
