"""AdaptInfer (Zhang et al., 2025, arXiv:2508.06084): visual tokens by what the text attends to, layer by layer.

A visual token's score in a layer is the attention that it receives from the text behind the image, each text token
weighted by its importance in that layer and head, which is read off the text-to-text block M of the same attention:
w_j = colsum_j(M) + rowsum_j(M) - M_jj, the attention a token gets from later text and gives to earlier text. Behind
three layers the tokens with the highest scores stay. Only the rows of the text are computed.

Decided here: tokens keep their positions (the published Qwen2-VL code does, its LLaVA code renumbers them, which breaks
generate()). All visual tokens of a sample compete, or each view gets its part (`by_view`). Text is what stands behind
the last visual token; a prompt that ends with an image has none, and keeps all its tokens. At least one token stays
unless `min_kept` is 0. lam mixes with a flat prior, whose level is the sample's mean of the symmetrised M (the code's:
of the batch). Layers are the published 1, 10, 20 of 32 at the same depth; for a new model `find_shift` derives them.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from shared_kernels import keep_tokens
from vlm_prune.criterion import Context, Criterion, Selection, best_scores
from vlm_prune.door import PruneHandle, open_pruner
from vlm_prune.layer_attention import padded_index
from vlm_prune.stages import Counts, Stage, check_keep, of_those_left, scaled_layers, scheduled
from vlm_prune.subsets import token_sets

_LOG = logging.getLogger(__name__)
PUBLISHED_LAYERS, PUBLISHED_DEPTH, DECAY = (1, 10, 20), 32, 0.25

Prior = Literal["dynamic", "none"]


def text_importance(text: Float[Tensor, "*B t t"]) -> Float[Tensor, "*B t"]:
    """w_j = colsum_j + rowsum_j - diagonal_j of attention among text tokens: column sums of M + M^T - diag(M)."""
    return text.sum(-2) + text.sum(-1) - text.diagonal(dim1=-2, dim2=-1)


def guided_scores(
    text: Float[Tensor, "B H t t"], visual: Float[Tensor, "B H t v"], *, lam: float = 1.0, prior: Prior = "dynamic"
) -> Float[Tensor, "B v"]:
    """s_u = sum over heads and text tokens of w_j C_ju.

    text, visual: attention of text tokens to text and to visual tokens, rows of one softmax over all keys. lam = 0 is
    plain attention up to a factor. prior "none": sum over heads of the mean over text, each head scaled to sum 1.
    """
    if prior == "none":
        mean = visual.mean(2)
        return (mean / mean.sum(-1, keepdim=True).clamp(min=1e-30)).sum(1)
    weight = text_importance(text)
    if lam < 1:
        flat = weight.mean(dim=(1, 2), keepdim=True)  # the mean of M_sym times t
        weight = lam * weight + (1 - lam) * flat
    return torch.einsum("bht,bhtv->bv", weight, visual)


def solve_budget(
    average: float, num_visual: float, layers: Sequence[int], num_layers: int, *, decay: float = DECAY
) -> tuple[float, float, float]:
    """Tokens k, decay k, decay^2 k behind three layers so that, over all layers, `average` leave one on average.

    The published schedules of LLaVA are of this form within 1 % (decay 1/4). A stage's own layer counts as pruned
    ("nominal"). ValueError where the layers before the first stage alone hold more than that, or k would exceed
    `num_visual`.
    """
    first, second, third = layers
    before = num_visual * first / num_layers
    span = (second - first) + decay * (third - second) + decay**2 * (num_layers - third)
    kept = (num_layers * average - num_visual * first) / span
    if kept <= 0:
        raise ValueError(
            f"an average of {average} tokens is out of reach: {first} of {num_layers} layers hold all {num_visual}, "
            f"which alone is {before:.1f} on average; prune earlier or keep more"
        )
    if kept > num_visual:
        raise ValueError(
            f"an average of {average} of {num_visual} tokens leaves the first stage nothing to drop; choose a decay "
            f"above {decay}, or an average below {(before + num_visual * span / num_layers):.1f}"
        )
    return kept, decay * kept, decay**2 * kept


@dataclass(frozen=True, kw_only=True)
class AdaptInferConfig:
    """Three stages guided by the text. One of `counts`, `ratios`, `budget` takes the place of `keep`."""

    name: ClassVar[str] = "adaptinfer"

    keep: float | int = 0.2
    """Mean share of the visual tokens, or mean number, over the layers behind the first stage."""
    budget: float | None = None
    """Nominal average of tokens over all layers, as the paper counts; solved for each number of visual tokens."""
    counts: tuple[int, ...] | None = None
    """Tokens behind each stage; published for LLaVA-1.5-7B: (290, 72, 18), (133, 27, 3), (80, 24, 2), (40, 12, 0)."""
    ratios: tuple[float, ...] | None = None
    """Share of the tokens that are left, behind each stage; published for Qwen2-VL-2B: (0.17, 0.6, 0.3) and others."""
    layers: tuple[int, ...] | None = None
    """Layers behind which tokens are dropped. None: 1, 10 and 20 of 32, at the same depth in other models."""
    lam: float = 1.0
    """Weight of text importance against a flat prior."""
    prior: Prior = "dynamic"
    """Text importance, or none: plain attention, each head counted alike."""
    by_view: bool = False
    """Whether each image, tile or frame gets its part of the budget."""
    min_kept: int = 1
    """At least so many tokens stay."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        given = [n for n in ("budget", "counts", "ratios") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of budget, counts and ratios, got {' and '.join(given)}")
        stages = 3 if self.layers is None else len(self.layers)
        for name, values in (("counts", self.counts), ("ratios", self.ratios)):
            if values is not None and len(values) != stages:
                raise ValueError(f"{name} must be one for each of {stages} stages, got {values}")
        for ratio in self.ratios or ():
            check_keep(float(ratio))
        if self.budget is not None and (stages != 3 or self.budget <= 0):
            raise ValueError(f"budget must be positive and for three stages, got {self.budget} for {stages}")
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam must lie in [0, 1], got {self.lam}")
        if self.prior not in ("dynamic", "none"):
            raise ValueError(f"prior must be 'dynamic' or 'none', got {self.prior!r}")
        if self.min_kept < 0:
            raise ValueError(f"min_kept must not be negative, got {self.min_kept}")

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """A stage behind each layer."""
        after = self.layers or scaled_layers(PUBLISHED_LAYERS, PUBLISHED_DEPTH, num_layers)
        criterion = Criterion(
            name=self.name,
            score=partial(_score, lam=self.lam, prior=self.prior),
            select=partial(_select, by_view=self.by_view),
            needs=frozenset({"attention"}),
            attends=True,
        )
        kept = self._kept(after, num_layers)
        return tuple(
            Stage(after_layer=a, keep=k, criterion=criterion, min_kept=self.min_kept)
            for a, k in zip(after, kept, strict=True)
        )

    def _kept(self, after: tuple[int, ...], num_layers: int) -> tuple[float | int | Counts, ...]:
        if self.counts is not None:
            return self.counts
        if self.ratios is not None:
            return tuple(of_those_left(ratio) for ratio in self.ratios)
        if self.budget is not None:
            return tuple(partial(_solved, average=self.budget, layers=after, depth=num_layers, i=i) for i in range(3))
        return scheduled(self.keep, [DECAY**i for i in range(len(after))], after, num_layers)


def _solved(num_visual: Tensor, _: Tensor, *, average: float, layers: Sequence[int], depth: int, i: int) -> Tensor:
    found = [int(solve_budget(average, n, layers, depth)[i] + 1e-6) if n else 0 for n in num_visual.tolist()]
    return torch.tensor(found, device=num_visual.device)


def _score(context: Context, *, lam: float, prior: Prior) -> Float[Tensor, "B n"]:
    attention = context.rows()
    index, present = padded_index(context.text)
    total = torch.zeros(context.visual.shape, device=index.device)
    flat = torch.zeros_like(total)
    level = torch.zeros(len(index), 1, device=index.device)
    for heads in attention.head_chunks(index.shape[1]):
        rows = attention.rows(index, heads) * present[:, None, :, None]
        if prior == "none":
            rows = rows * context.visual[:, None, None, :]
            mean = rows.sum(2)
            total = total + (mean / mean.sum(-1, keepdim=True).clamp(min=1e-30)).sum(1)
            continue
        text = rows.gather(3, index[:, None, None, :].expand(*rows.shape[:3], -1)) * present[:, None, None, :]
        weight = text_importance(text)
        total = total + torch.einsum("bht,bhtn->bn", weight, rows)
        if lam < 1:
            flat = flat + rows.sum((1, 2))
            level = level + weight.sum((1, 2))[:, None]
    if prior == "none" or lam == 1:
        return total
    level = level / (attention.num_heads * present.sum(1, keepdim=True).clamp(min=1))
    return lam * total + (1 - lam) * level * flat


def _select(context: Context, scores: Float[Tensor, "B n"], *, by_view: bool) -> Selection:
    unguided = ~context.text.any(1)
    if bool(unguided.any()):
        _LOG.warning(
            "prompts %s end with an image: no text guides, and all their tokens stay", unguided.nonzero()[:, 0]
        )
        everything = context.visual.sum(1)
        context = replace(context, num_kept=torch.where(unguided, everything, context.num_kept))
    return _best_by_view(context, scores) if by_view else best_scores(context, scores)


def _best_by_view(context: Context, scores: Float[Tensor, "B n"]) -> Selection:
    sets = token_sets(context, by_view=True)
    budget = _apportioned(context, sets.sample, sets.present)
    best = keep_tokens(sets.take(scores), num_kept=budget, candidates=sets.present)
    mask = torch.zeros_like(context.visual)
    mask[sets.sample[:, None].expand_as(best)[best], sets.places[best]] = True
    return Selection(mask)


def _apportioned(context: Context, sample: Tensor, present: Bool[Tensor, "R M"]) -> Tensor:
    """Budgets of the views in proportion to their tokens; what rounding leaves over goes to the largest remainders."""
    sizes = present.sum(1)
    budget = torch.zeros_like(sizes)
    for b in sample.unique().tolist():
        mine = (sample == b).nonzero()[:, 0]
        wanted, total = int(context.num_kept[b]), int(sizes[mine].sum())
        exact = sizes[mine].double() * wanted / total
        share = (exact + 1e-9).long()
        order = (exact - share).sort(descending=True, stable=True).indices
        share[order[: wanted - int(share.sum())]] += 1
        budget[mine] = share
    return budget


def apply_adaptinfer(model: nn.Module, config: AdaptInferConfig | None = None) -> PruneHandle:
    """Drops tokens in three stages by what the text attends to."""
    return open_pruner(model, config or AdaptInferConfig())


PRESETS: Mapping[str, Mapping[int, AdaptInferConfig]] = {
    "llava-1.5-7b": {
        128: AdaptInferConfig(counts=(290, 72, 18)),
        64: AdaptInferConfig(counts=(133, 27, 3)),
        48: AdaptInferConfig(counts=(80, 24, 2)),
        32: AdaptInferConfig(counts=(40, 12, 0), min_kept=0),
    },
    "llava-1.5-13b": {
        128: AdaptInferConfig(counts=(300, 94, 30), layers=(1, 11, 22)),
        64: AdaptInferConfig(counts=(148, 40, 5), layers=(1, 11, 22)),
    },
    "qwen2-vl-2b": {
        10: AdaptInferConfig(ratios=(0.17, 0.6, 0.3), layers=(0, 9, 19)),
        30: AdaptInferConfig(ratios=(0.5, 0.6, 0.3), layers=(0, 9, 19)),
        50: AdaptInferConfig(ratios=(0.7, 0.9, 0.3), layers=(0, 9, 19)),
    },
}
"""Published schedules: average tokens of LLaVA's 576, percent of Qwen2-VL's. The 13B layers are not published; these
give the same averages."""
