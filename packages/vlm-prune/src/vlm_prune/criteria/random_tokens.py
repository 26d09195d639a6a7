"""Random tokens: what a criterion has to beat.

Decided here: one seeded order of the visual tokens for all samples, so that a sample's tokens do not depend on its
batch, and beams of one sample keep the same ones.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_prune.criterion import Context, Criterion
from vlm_prune.door import PruneHandle, open_pruner
from vlm_prune.stages import BEFORE, Stage, check_keep


def random_scores(context: Context, *, seed: int) -> Float[Tensor, "B n"]:
    """A random number for the first, second, ... visual token, the same for all samples of all batches."""
    rank = context.visual_rank().clamp(min=0)
    longest = int(rank.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    # drawn one by one from the same stream: a longer prompt has the numbers of a shorter one and more
    return torch.rand(longest, generator=generator, dtype=torch.float64).to(rank.device)[rank]


@dataclass(frozen=True, kw_only=True)
class RandomConfig:
    """Random tokens before the language model."""

    name: ClassVar[str] = "random"

    keep: float | int = 0.2
    """Share of the visual tokens, or their number."""
    seed: int = 0
    """Of the order."""

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def stages(self, num_layers: int) -> tuple[Stage, ...]:  # noqa: ARG002
        """One stage before the first layer."""
        criterion = Criterion(name=self.name, score=partial(random_scores, seed=self.seed))
        return (Stage(after_layer=BEFORE, keep=self.keep, criterion=criterion),)


def apply_random(model: nn.Module, config: RandomConfig | None = None) -> PruneHandle:
    """Keeps random tokens."""
    return open_pruner(model, config or RandomConfig())
