"""VisionZip (Yang et al., CVPR 2025, arXiv:2412.04467): what the tower attends to, and a digest of the rest.

Dominant tokens have the highest attention of the class token. Of the remaining tokens, evenly spaced ones are targets;
each other one joins the target whose key in the tower's layer is most similar, and a target becomes itself plus the
mean of what joined it. Decided here: merging is of projected features, so that it works in every family (the published
code merges before the projector). 10 of 64 tokens are contextual, as published for 64.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm_prune.criteria.fastervlm import tower_attention
from vlm_prune.criterion import Context, Criterion, Selection, best_scores
from vlm_prune.door import PruneHandle, open_pruner
from vlm_prune.stages import BEFORE, Stage, check_keep


def merge_into_targets(
    features: Float[Tensor, "m C"], keys: Float[Tensor, "m d"], num_targets: int
) -> tuple[Int[Tensor, "t"], Float[Tensor, "t C"]]:
    """Evenly spaced targets, and their features plus the mean feature of the tokens that are most similar to them."""
    step = max(1, len(features) // num_targets)
    targets = torch.arange(0, len(features), step, device=features.device)[:num_targets]
    others = torch.ones(len(features), dtype=torch.bool, device=features.device)
    others[targets] = False
    unit = nn.functional.normalize(keys, dim=-1)
    nearest = (unit[others] @ unit[targets].T).argmax(1)
    sums = torch.zeros(len(targets), features.shape[1], dtype=features.dtype, device=features.device)
    sums = sums.index_add(0, nearest, features[others])
    count = nearest.bincount(minlength=len(targets)).clamp(min=1)
    return targets, features[targets] + sums / count[:, None]


def zipped(context: Context, scores: Float[Tensor, "B n"], *, contextual: float) -> Selection:
    """Dominant tokens by score, and contextual ones merged from the rest."""
    num_targets = (context.num_kept * contextual + 0.5).long()
    dominant = Context(**{**vars(context), "num_kept": context.num_kept - num_targets})
    kept = best_scores(dominant, scores).kept
    keys = context.tower().keys()
    hidden = context.hidden.clone()
    for b, wanted in enumerate(num_targets.tolist()):
        rest = (context.visual[b] & ~kept[b]).nonzero()[:, 0]
        if wanted == 0 or len(rest) == 0:
            continue
        targets, merged = merge_into_targets(context.hidden[b, rest].float(), keys[b, rest], wanted)
        hidden[b, rest[targets]] = merged.to(hidden.dtype)
        kept[b, rest[targets]] = True
    return Selection(kept, hidden)


@dataclass(frozen=True, kw_only=True)
class VisionZipConfig:
    """Dominant and contextual tokens, before the language model."""

    name: ClassVar[str] = "visionzip"

    keep: float | int = 0.2
    """Share of the visual tokens, or their number, contextual ones among them."""
    contextual: float = 10 / 64
    """Share of the kept tokens that are merged from the rest."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not 0 <= self.contextual < 1:
            raise ValueError(f"contextual must lie in [0, 1), got {self.contextual}")

    def stages(self, num_layers: int) -> tuple[Stage, ...]:  # noqa: ARG002
        """One stage before the first layer."""
        criterion = Criterion(
            name=self.name,
            score=tower_attention,
            select=partial(zipped, contextual=self.contextual),
            needs=frozenset({"tower_attention"}),
            attends=True,
        )
        return (Stage(after_layer=BEFORE, keep=self.keep, criterion=criterion),)


def apply_visionzip(model: nn.Module, config: VisionZipConfig | None = None) -> PruneHandle:
    """Keeps dominant tokens and a digest of the rest."""
    return open_pruner(model, config or VisionZipConfig())
