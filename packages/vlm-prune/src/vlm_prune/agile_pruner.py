"""AgilePruner (Baek et al., ICLR 2026, arXiv:2603.01236): as much diversity as the image is complex.

Tokens are gone through by falling attention of the tower's class token; each that is kept deletes those that are
closer to it than tau_i = min(rank_i * erank / erank_avg * 0.01, tau_max) in cosine distance. Rank counts all tokens,
from 1; erank is the effective rank of the image's features. tau_max = 0 is FasterVLM.

Decided here, since the code is not published: tau_max 0.25, or the largest for which enough tokens pass ("auto"); if
fewer than asked for pass, the best of the others by attention fill up (or those farthest from the kept ones), and the
report says how many passed; features for erank and distance are the projected ones; tiles and frames each by
themselves, with an equal part of the budget. erank_avg = 95 is CLIP-L/14-336 with LLaVA's projector: calibrate it
(`mean_erank`) for any other model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from shared_kernels import diverse_subset
from vlm_prune.criteria.fastervlm import tower_attention
from vlm_prune.criteria.vispruner import attention_then_diversity
from vlm_prune.criterion import Context, Criterion, Selection
from vlm_prune.door import PruneHandle, StagesConfig, open_pruner
from vlm_prune.stages import BEFORE, Stage, check_keep
from vlm_prune.subsets import TokenSets, token_sets

Backfill = Literal["attention", "max_min"]


def attention_entropy(attention: Float[Tensor, "*B N"]) -> Float[Tensor, "*B"]:
    """H(p) = -sum p ln p of attention over N tokens scaled to sum 1; 0 ln 0 = 0. Between 0 and ln N."""
    share = attention / attention.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1)


def effective_rank(
    features: Float[Tensor, "*B N d"], present: Bool[Tensor, "*B N"] | None = None
) -> Float[Tensor, "*B"]:
    """exp(-sum q ln q), q the singular values scaled to sum 1; features are not centred. Between 1 and min(N, d).

    From the eigenvalues of the smaller Gram matrix, in float64: in float32 the null space of a Gram matrix of low rank
    is not empty. Tokens where `present` is False do not count. 0 for features that are all zero.
    """
    x = features.double()
    if present is not None:
        x = x * present[..., None]
    gram = x @ x.transpose(-1, -2) if x.shape[-2] <= x.shape[-1] else x.transpose(-1, -2) @ x
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    # what rounding leaves of zero eigenvalues, whose roots would count
    floor = eigenvalues.amax(-1, keepdim=True) * gram.shape[-1] * torch.finfo(torch.float64).eps
    values = torch.where(eigenvalues > floor, eigenvalues, 0.0).sqrt()
    total = values.sum(-1, keepdim=True)
    share = values / total.clamp(min=1e-300)
    return torch.where(total[..., 0] > 0, torch.special.entr(share).sum(-1).exp(), 0.0)


def adaptive_thresholds(
    attention: Float[Tensor, "R M"],
    erank: Float[Tensor, "R"],
    *,
    erank_avg: float,
    step: float,
    tau_max: Float[Tensor, "R"],
    present: Bool[Tensor, "R M"],
) -> Float[Tensor, "R M"]:
    """tau_i = min(rank_i * erank / erank_avg * step, tau_max), rank by falling attention, from 1."""
    order = attention.masked_fill(~present, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(1, attention.shape[1] + 1, device=attention.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, place)
    return torch.minimum(rank * (erank / erank_avg * step)[:, None], tau_max[:, None])


def agile_select(
    features: Float[Tensor, "N d"],
    attention: Float[Tensor, "N"],
    num_kept: int,
    *,
    erank_avg: float = 95.0,
    tau_max: float = 0.25,
    step: float = 0.01,
) -> tuple[Int[Tensor, "K"], int]:
    """Positions of K tokens of one image, in order, and how many of them passed the thresholds."""
    everything = torch.ones_like(attention, dtype=torch.bool)[None]
    sets = TokenSets(
        torch.zeros(1, dtype=torch.long), torch.arange(len(attention))[None], everything, torch.tensor([num_kept])
    )
    config = AgilePrunerConfig(erank_avg=erank_avg, tau_max=tau_max, step=step)
    chosen, passed, _ = _scan(features[None], attention[None], sets, config)
    return chosen[0, :num_kept].sort().values, int(passed[0])


def adaptive_ratio(
    erank: Float[Tensor, "B"],
    *,
    erank_avg: float,
    ratio: float = 0.5,
    gain: float = 0.5,
    bounds: tuple[float, float] = (0.1, 0.9),
) -> Float[Tensor, "B"]:
    """Share of the budget that attention chooses in a hybrid: ratio - gain (erank / erank_avg - 1), within bounds.

    A negative gain is the paper's inverse rule. Decided here: linear; the paper says that it falls with erank.
    """
    return (ratio - gain * (erank / erank_avg - 1)).clamp(*bounds)


def adaptive_count(
    erank: Float[Tensor, "B"], num_kept: int, *, erank_avg: float, bounds: tuple[int, int]
) -> Int[Tensor, "B"]:
    """Tokens for each image: num_kept * erank / erank_avg, rounded, within bounds."""
    return (num_kept * erank / erank_avg).round().long().clamp(*bounds)


@dataclass(frozen=True, kw_only=True)
class AgilePrunerConfig:
    """Attention with thresholds that adapt to the image, before the language model."""

    name: ClassVar[str] = "agile"

    keep: float | int = 0.2
    """Share of the visual tokens, or their number."""
    erank_avg: float = 95.0
    """Mean effective rank of images in this model (`mean_erank`); 95 is published for LLaVA-1.5."""
    tau_max: float | Literal["auto"] = 0.25
    """Largest threshold; "auto": for each image the largest with which enough tokens pass."""
    step: float = 0.01
    """Threshold for each rank."""
    backfill: Backfill = "attention"
    """What fills up where too few tokens pass: the highest attention, or the farthest from those that are kept."""
    by_view: bool = True
    """Whether each tile, frame or image gets its part of the budget by itself."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.tau_max != "auto" and not 0 <= self.tau_max <= 2:
            raise ValueError(f"tau_max must be 'auto' or a cosine distance in [0, 2], got {self.tau_max}")
        for name, value in (("erank_avg", self.erank_avg), ("step", self.step)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.backfill not in ("attention", "max_min"):
            raise ValueError(f"backfill must be 'attention' or 'max_min', got {self.backfill!r}")

    def stages(self, num_layers: int) -> tuple[Stage, ...]:  # noqa: ARG002
        """One stage before the first layer."""
        criterion = Criterion(
            name=self.name,
            score=tower_attention,
            select=partial(_select, config=self),
            needs=frozenset({"tower_attention"}),
            attends=True,
        )
        return (Stage(after_layer=BEFORE, keep=self.keep, criterion=criterion),)


def _select(context: Context, scores: Float[Tensor, "B n"], *, config: AgilePrunerConfig) -> Selection:
    sets = token_sets(context, by_view=config.by_view)
    features, attention = sets.take(context.hidden), sets.take(scores)
    chosen, passed, erank = _scan(features, attention, sets, config)
    entropy = attention_entropy(attention * sets.present)
    context.notes.update(sample=sets.sample, erank=erank, entropy=entropy, num_passed=passed)
    return Selection(sets.kept(chosen, context.visual))


def _scan(
    features: Tensor, attention: Tensor, sets: TokenSets, config: AgilePrunerConfig
) -> tuple[Int[Tensor, "R K"], Int[Tensor, "R"], Float[Tensor, "R"]]:
    """Chosen elements of each set with those that fill up, how many passed, and the effective rank."""
    erank = effective_rank(features, sets.present).to(attention.dtype)
    if config.tau_max == "auto":
        tau_max = _largest_threshold(features, attention, erank, sets, config)
    else:
        tau_max = torch.full_like(erank, config.tau_max)
    passing = _passing(features, attention, erank, tau_max, sets, config)
    rank = torch.arange(passing.shape[1], device=passing.device)
    passed = ((passing >= 0) & (rank < sets.num_kept[:, None])).sum(1)
    return _filled(passing, passed, features, attention, sets, config.backfill), passed, erank


def _passing(
    features: Tensor, attention: Tensor, erank: Tensor, tau_max: Tensor, sets: TokenSets, config: AgilePrunerConfig
) -> Int[Tensor, "R K"]:
    threshold = adaptive_thresholds(
        attention, erank, erank_avg=config.erank_avg, step=config.step, tau_max=tau_max, present=sets.present
    )
    return diverse_subset(
        features, num_kept=sets.most(), method="threshold", weight=attention, threshold=threshold, mask=sets.present
    )


def _largest_threshold(
    features: Tensor, attention: Tensor, erank: Tensor, sets: TokenSets, config: AgilePrunerConfig
) -> Float[Tensor, "R"]:
    """By bisection in 12 steps the largest tau_max with which the whole budget passes."""
    low, high = torch.zeros_like(erank), torch.ones_like(erank)
    for _ in range(12):
        middle = (low + high) / 2
        passing = _passing(features, attention, erank, middle, sets, config)
        enough = (passing >= 0).sum(1) >= sets.num_kept
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def _filled(
    passing: Tensor, passed: Tensor, features: Tensor, attention: Tensor, sets: TokenSets, backfill: Backfill
) -> Int[Tensor, "R K"]:
    """The elements that passed, and behind them others up to the budget."""
    if bool((passed >= sets.num_kept).all()):
        return passing
    rows = []
    for r, count in enumerate(passed.tolist()):
        kept = passing[r, :count]
        if backfill == "max_min" and count:
            one = slice(r, r + 1)
            rows.append(
                diverse_subset(features[one], num_kept=sets.most(), first=kept[None], mask=sets.present[one])[0]
            )
            continue
        order = attention[r].masked_fill(~sets.present[r], -torch.inf).sort(descending=True, stable=True).indices
        others = order[~torch.isin(order, kept)]
        rows.append(torch.cat([kept, others])[: passing.shape[1]])
    return torch.stack(rows)


def apply_agile_pruner(model: nn.Module, config: AgilePrunerConfig | None = None) -> PruneHandle:
    """Keeps attended tokens, as diverse as the image is complex."""
    return open_pruner(model, config or AgilePrunerConfig())


@dataclass(frozen=True, kw_only=True)
class AdaptiveVisPrunerConfig:
    """VisPruner whose share of attention falls with the image's effective rank (the paper's hybrid)."""

    name: ClassVar[str] = "vispruner-adaptive"

    keep: float | int = 0.2
    """Share of the visual tokens, or their number."""
    erank_avg: float = 95.0
    """Mean effective rank of images in this model."""
    ratio: float = 0.5
    """Attention's share for an image of mean effective rank."""
    gain: float = 0.5
    """How fast it falls; negative for the inverse rule."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must lie in [0, 1], got {self.ratio}")

    def stages(self, num_layers: int) -> tuple[Stage, ...]:  # noqa: ARG002
        """One stage before the first layer."""
        criterion = Criterion(
            name=self.name,
            score=tower_attention,
            select=partial(_select_hybrid, config=self),
            needs=frozenset({"tower_attention"}),
            attends=True,
        )
        return (Stage(after_layer=BEFORE, keep=self.keep, criterion=criterion),)


def _select_hybrid(context: Context, scores: Tensor, *, config: AdaptiveVisPrunerConfig) -> Selection:
    erank = effective_rank(context.hidden, context.visual)
    ratio = adaptive_ratio(erank, erank_avg=config.erank_avg, ratio=config.ratio, gain=config.gain)
    context.notes.update(erank=erank, attention_ratio=ratio)
    return attention_then_diversity(context, scores, ratio=ratio)


def apply_adaptive_vispruner(model: nn.Module, config: AdaptiveVisPrunerConfig | None = None) -> PruneHandle:
    """Keeps attended and diverse tokens in a proportion that the image decides."""
    return open_pruner(model, config or AdaptiveVisPrunerConfig())


def mean_erank(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, by_view: bool = True) -> float:
    """Mean effective rank of the images in batches of inputs: the erank_avg of this model. The paper's: 95.

    ValueError where no batch has an image.
    """
    found: list[Tensor] = []

    def note(context: Context, _: Tensor) -> Selection:
        sets = token_sets(replace(context, num_kept=context.visual.sum(1)), by_view=by_view)
        found.append(effective_rank(sets.take(context.hidden), sets.present))
        return Selection(context.visual & (context.visual_rank() < context.num_kept[:, None]))

    watch = Criterion(name="mean_erank", score=lambda context: context.visual.float(), select=note)
    config = StagesConfig(chosen=(Stage(after_layer=BEFORE, keep=1, criterion=watch),))
    with open_pruner(model, config), torch.no_grad():
        for batch in batches:
            model(**batch)
    if not found:
        raise ValueError("no image in these batches; give inputs as for model(**inputs), with pixel_values")
    return float(torch.cat(found).mean())
