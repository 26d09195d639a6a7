"""SparseVLM (Zhang et al., ICML 2025, arXiv:2410.04417): tokens that the words about the image look at.

Raters are the text tokens whose mean similarity to the visual tokens, before the first layer, is above average; behind
each of a few layers tokens stay by the raters' attention in it, mean over heads and raters. With `recycle`, the best of
what is dropped is clustered (density peaks) and each cluster's mean takes the place of its centre, as in version 1.0 of
the published code; version 2 leaves that out, and so does the default here, which then meets its budget exactly.

Decided here: tokens keep their positions, as in version 2. Shape of the schedule: the published 303, 110, 36 tokens of
576 for an average of 128.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm_prune.criterion import Context, Criterion, Selection, best_scores
from vlm_prune.door import PruneHandle, open_pruner
from vlm_prune.stages import Stage, check_keep, scaled_layers, scheduled

PUBLISHED_LAYERS, PUBLISHED_DEPTH, PUBLISHED_COUNTS = (2, 6, 15), 32, (303, 110, 36)


def raters(
    embeddings: Float[Tensor, "B S C"], visual: Bool[Tensor, "B S"], text: Bool[Tensor, "B S"]
) -> Bool[Tensor, "B S"]:
    """Text tokens t with r_t > mean(r); r is the mean over visual tokens of softmax over text of their products."""
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    similarity = (wide @ wide.transpose(1, 2)).masked_fill(~text[:, None, :], -torch.inf)
    share = similarity.softmax(-1).nan_to_num(0.0) * visual[:, :, None]
    mean = share.sum(1) / visual.sum(1, keepdim=True).clamp(min=1)
    threshold = mean.sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
    chosen = text & (mean > threshold)
    return torch.where(chosen.any(1, keepdim=True), chosen, text)  # equal text tokens: all rate


def rated(context: Context) -> Float[Tensor, "B n"]:
    """Attention from the raters, mean over heads and raters."""
    if context.prompt is None:
        raise RuntimeError("SparseVLM needs the prompt's embeddings to choose its raters")
    prompt = context.prompt
    chosen = raters(prompt.embeddings, prompt.visual, prompt.text).gather(1, context.prompt_index) & context.valid
    return context.rows().received(chosen) / chosen.sum(1, keepdim=True).clamp(min=1)


def cluster_centres(
    features: Float[Tensor, "m C"], num_clusters: int, neighbours: int = 5
) -> tuple[Int[Tensor, "c"], Int[Tensor, "m"]]:
    """Density-peak clustering (DPC-kNN): the centres, and the number of the centre that each token goes to.

    density = exp(-mean squared distance to the nearest `neighbours`), delta = distance to the nearest denser token;
    centres have the greatest density * delta. Distances are divided by the square root of C.
    """
    distance = torch.cdist(features, features) / features.shape[1] ** 0.5
    nearest = distance.topk(min(neighbours, len(features)), largest=False).values
    density = torch.exp(-nearest.square().mean(1))
    denser = density[None, :] > density[:, None]
    delta = torch.where(denser, distance, distance.max()).min(1).values
    centres = (density * delta).topk(num_clusters).indices
    assigned = distance[:, centres].argmin(1)
    assigned[centres] = torch.arange(num_clusters, device=features.device)
    return centres, assigned


def recycled(context: Context, scores: Float[Tensor, "B n"]) -> Selection:
    """The best stay; of the rest, int(0.3 m) + 1 become int(m2 / 10) + 1 clusters, on top of the budget."""
    kept = best_scores(context, scores).kept
    hidden = context.hidden.clone()
    for b in range(len(kept)):
        dropped = (context.visual[b] & ~kept[b]).nonzero()[:, 0]
        if len(dropped) == 0:
            continue
        best = dropped[scores[b, dropped].topk(min(int(0.3 * len(dropped)) + 1, len(dropped))).indices]
        features = context.hidden[b, best].float()
        centres, assigned = cluster_centres(features, len(best) // 10 + 1)
        sums = torch.zeros(len(centres), features.shape[1], device=features.device).index_add(0, assigned, features)
        hidden[b, best[centres]] = (sums / assigned.bincount()[:, None]).to(hidden.dtype)
        kept[b, best[centres]] = True
    return Selection(kept, hidden)


@dataclass(frozen=True, kw_only=True)
class SparseVLMConfig:
    """Three stages guided by raters."""

    name: ClassVar[str] = "sparsevlm"

    keep: float | int = 0.2
    """Mean share of the visual tokens, or mean number, over the layers behind the first stage; clusters come on top."""
    counts: tuple[int, ...] | None = None
    """Tokens behind each stage, in place of `keep`; published for 576: (303, 110, 36) at 128, (66, 30, 17) at 64."""
    layers: tuple[int, ...] | None = None
    """Layers behind which tokens are dropped. None: 2, 6 and 15 of 32, at the same depth in other models."""
    recycle: bool = False
    """Whether the best of the dropped tokens are merged and kept, as in version 1.0."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        number = 3 if self.layers is None else len(self.layers)
        if self.counts is not None and (len(self.counts) != number or min(self.counts) < 1):
            raise ValueError(f"counts must be {number} numbers of at least 1, one for each stage, got {self.counts}")
        if self.layers is not None and number != 3 and self.counts is None:
            raise ValueError(f"with {number} layers in place of 3, give counts: the published schedule has three")

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """A stage behind each layer."""
        after = self.layers or scaled_layers(PUBLISHED_LAYERS, PUBLISHED_DEPTH, num_layers)
        kept = self.counts or scheduled(self.keep, PUBLISHED_COUNTS, after, num_layers)
        criterion = Criterion(
            name=self.name,
            score=rated,
            select=recycled if self.recycle else best_scores,
            needs=frozenset({"attention"}),
            attends=True,
        )
        return tuple(Stage(after_layer=a, keep=k, criterion=criterion) for a, k in zip(after, kept, strict=True))


def apply_sparsevlm(model: nn.Module, config: SparseVLMConfig | None = None) -> PruneHandle:
    """Drops tokens in three stages."""
    return open_pruner(model, config or SparseVLMConfig())
