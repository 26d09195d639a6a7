"""VisPruner (Zhang et al., ICCV 2025, arXiv:2412.01818v3): half by the tower's attention, half by diversity.

The first half has the highest attention of the class token. The rest, in order of attention, is thinned out: tokens at
even places are compared with those at odd places, and the 8 even ones that are most similar to an odd one go, again and
again until enough are gone. Decided here: features are the projected ones; where the number of tokens is odd, the last
one counts as standing at an odd place (the published code fails there).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm_prune.criteria.fastervlm import tower_attention
from vlm_prune.criterion import Context, Criterion, Selection
from vlm_prune.door import PruneHandle, open_pruner
from vlm_prune.stages import BEFORE, Stage, check_keep


def thin_out(features: Float[Tensor, "m C"], num_kept: int, *, at_once: int = 8) -> Int[Tensor, "k"]:
    """Indices of what is left of tokens in order of importance, most similar ones removed step by step.

    The order of the survivors matters for the next split: even ones by falling similarity, then all odd ones.
    """
    left = torch.arange(len(features), device=features.device)
    unit = nn.functional.normalize(features, dim=-1)
    while len(left) > num_kept:
        half = len(left) // 2
        even, odd = left[: 2 * half : 2], torch.cat([left[1 : 2 * half : 2], left[2 * half :]])
        if half == 0:
            return left[:num_kept]
        similarity = (unit[even] @ unit[odd].T).max(1).values
        order = similarity.sort(descending=True, stable=True).indices
        gone = min(at_once, len(left) - num_kept, half)
        left = torch.cat([even[order[gone:]], odd])
    return left


def attention_then_diversity(context: Context, scores: Float[Tensor, "B n"], *, ratio: float | Tensor) -> Selection:
    """int(ratio * num_kept) tokens by score, the others by thinning out what is left. ratio: a number, or (B,)."""
    kept = torch.zeros_like(context.visual)
    shares = torch.as_tensor(ratio, dtype=torch.float64).expand(len(kept)).tolist()
    for b, (wanted, share) in enumerate(zip(context.num_kept.tolist(), shares, strict=True)):
        tokens = context.visual[b].nonzero()[:, 0]
        order = tokens[scores[b, tokens].sort(descending=True, stable=True).indices]
        first = int(wanted * share + 1e-9)
        rest = order[first:]
        kept[b, order[:first]] = True
        kept[b, rest[thin_out(context.hidden[b, rest].float(), wanted - first)]] = True
    return Selection(kept)


@dataclass(frozen=True, kw_only=True)
class VisPrunerConfig:
    """Attention and diversity, before the language model."""

    name: ClassVar[str] = "vispruner"

    keep: float | int = 0.2
    """Share of the visual tokens, or their number."""
    attention_ratio: float = 0.5
    """Share of the kept tokens that attention chooses."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not 0 <= self.attention_ratio <= 1:
            raise ValueError(f"attention_ratio must lie in [0, 1], got {self.attention_ratio}")

    def stages(self, num_layers: int) -> tuple[Stage, ...]:  # noqa: ARG002
        """One stage before the first layer."""
        criterion = Criterion(
            name=self.name,
            score=tower_attention,
            select=partial(attention_then_diversity, ratio=self.attention_ratio),
            needs=frozenset({"tower_attention"}),
            attends=True,
        )
        return (Stage(after_layer=BEFORE, keep=self.keep, criterion=criterion),)


def apply_vispruner(model: nn.Module, config: VisPrunerConfig | None = None) -> PruneHandle:
    """Keeps attended and diverse tokens."""
    return open_pruner(model, config or VisPrunerConfig())
