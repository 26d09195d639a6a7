"""Attention Debiasing (Zhao et al., 2025, arXiv:2508.17807): scores without what position and padding put into them.

Attention of text to visual tokens rises with their index, about exponentially, whatever they show, and padding of
square-padded images draws some. Positional debiasing divides the score a_i by f(i / L) = mu exp(sigma i / L), fitted to
the mean attention over a corpus; padding suppression sets the score of padding patches to 0. The rest of the method
stays as it is, so this goes around any criterion whose score is attention.

Decided here: the fit is linear least squares, padding left out, on the user's own prompts (`fit_trend`); one sigma for
each base method by default, the mean of those published per benchmark, since a sigma per benchmark leaks its
statistics. FastV's published vector is no exponential but a cubic: `trend="cubic"`. Only the first stage is debiased,
as in the published code. The index runs over each view by itself, or over all visual tokens (`span="all"`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm_prune.criterion import Context, Criterion
from vlm_prune.door import Method, PruneHandle, StagesConfig, open_pruner
from vlm_prune.families import family_of
from vlm_prune.stages import Stage
from vlm_prune.subsets import token_sets

PUBLISHED_SIGMA: Mapping[str, float] = {
    "fastv": 0.815,
    "himap": 1.07,
    "pyramiddrop": 1.89,
    "sparsevlm": 1.94,
    "tokencarve": 0.83,
}
"""Bias strength on LLaVA-1.5-7B: means over benchmarks of the published vectors (FastV: log-linear fit of a cubic)."""
FASTV_CUBIC = (1.0, 1.73675, -4.84324, 4.90965)
"""The published FastV vector is 1 / (c0 + c1 x + c2 x^2 + c3 x^3), x = i / L."""

Span = Literal["view", "all"]


def exponential_weight(x: Float[Tensor, "*s"], sigma: float) -> Float[Tensor, "*s"]:
    """exp(-sigma x): division by the trend, up to a factor that does not change a ranking."""
    return torch.exp(-sigma * x)


def cubic_weight(x: Float[Tensor, "*s"], coefficients: tuple[float, ...] = FASTV_CUBIC) -> Float[Tensor, "*s"]:
    """1 / (c0 + c1 x + c2 x^2 + c3 x^3)."""
    return 1 / torch.stack([c * x**power for power, c in enumerate(coefficients)]).sum(0)


def debias(
    attention: Float[Tensor, "B L"], *, sigma: float, padding: Bool[Tensor, "B L"] | None = None
) -> Float[Tensor, "B L"]:
    """Scores of L visual tokens in raster order without the trend; 0 on padding. float32, or float64 for float64."""
    length = attention.shape[-1]
    x = (
        torch.arange(length, device=attention.device, dtype=torch.promote_types(attention.dtype, torch.float32))
        / length
    )
    scores = attention * exponential_weight(x, sigma)
    return scores if padding is None else scores.masked_fill(padding, 0.0)


def fit_trend(
    mean_attention: Float[Tensor, "L"],
    valid: Bool[Tensor, "L"] | None = None,
    *,
    space: Literal["linear", "log"] = "linear",
) -> tuple[float, float]:
    """(mu, sigma) of mu exp(sigma i / L) closest to the mean attention, least squares in `space`, where `valid`.

    Linear: mu is solved for each sigma, sigma by golden section around the log-linear fit. ValueError where fewer than
    two tokens are valid, or attention is negative or nowhere positive.
    """
    y = mean_attention.detach().double().cpu().numpy()
    x = np.arange(len(y)) / len(y)
    if valid is not None:
        chosen = valid.cpu().numpy()
        x, y = x[chosen], y[chosen]
    if len(y) < 2 or (y < 0).any() or not (y > 0).any():
        raise ValueError(f"a trend needs attention of at least 2 valid tokens, none negative, got {len(y)} valid ones")
    slope, offset = np.polyfit(x, np.log(np.clip(y, 1e-12, None)), 1)
    if space == "log":
        return float(np.exp(offset)), float(slope)

    def scale(sigma: float) -> float:
        curve = np.exp(sigma * x)
        return float(y @ curve / (curve @ curve))

    def error(sigma: float) -> float:
        return float(np.square(y - scale(sigma) * np.exp(sigma * x)).sum())

    sigma = _golden_section(error, slope - 3, slope + 3)
    return scale(sigma), sigma


def _golden_section(error: Callable[[float], float], low: float, high: float) -> float:
    golden = (5**0.5 - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    error_a, error_b = error(a), error(b)
    while high - low > 1e-9:
        if error_a <= error_b:
            high, b, error_b = b, a, error_a
            a = high - golden * (high - low)
            error_a = error(a)
        else:
            low, a, error_a = a, b, error_b
            b = low + golden * (high - low)
            error_b = error(b)
    return (low + high) / 2


@dataclass
class TrendAccumulator:
    """Mean attention by index over many images of one number of tokens, padding left out."""

    total: Tensor | None = None
    count: Tensor | None = None

    def update(self, attention: Float[Tensor, "B L"], padding: Bool[Tensor, "B L"] | None = None) -> None:
        """Adds images. ValueError where they have another number of tokens than those before."""
        content = torch.ones_like(attention, dtype=torch.bool) if padding is None else ~padding
        if self.total is None or self.count is None:
            self.total = torch.zeros(attention.shape[1], dtype=torch.float64)
            self.count = torch.zeros(attention.shape[1], dtype=torch.float64)
        if len(self.total) != attention.shape[1]:
            raise ValueError(
                f"images of {len(self.total)} visual tokens were added, these have {attention.shape[1]}; fit images of "
                "one size together"
            )
        self.total += (attention.double() * content).sum(0).cpu()
        self.count += content.sum(0).cpu()

    def result(self) -> tuple[Float[Tensor, "L"], Bool[Tensor, "L"]]:
        """Mean attention, and where any image had content. ValueError before the first image."""
        if self.total is None or self.count is None:
            raise ValueError("no image was added yet")
        return self.total / self.count.clamp(min=1), self.count > 0


def index_in_span(context: Context, span: Span) -> tuple[Int[Tensor, "B n"], Int[Tensor, "B n"]]:
    """Index of each visual token in its view (or among all of its sample), and their number; 0 and 1 elsewhere."""
    index, length = torch.zeros_like(context.view), torch.ones_like(context.view)
    sets = token_sets(context, by_view=span == "view")
    rank = torch.arange(sets.places.shape[1], device=index.device).expand_as(sets.places)
    sample = sets.sample[:, None].expand_as(sets.places)
    index[sample[sets.present], sets.places[sets.present]] = rank[sets.present]
    sizes = sets.present.sum(1, keepdim=True).expand_as(sets.places)
    length[sample[sets.present], sets.places[sets.present]] = sizes[sets.present]
    return index, length


@dataclass(frozen=True, kw_only=True)
class AttentionDebiasingConfig:
    """Debiasing around a method whose scores are attention."""

    method: Method
    """The method, e.g. FastVConfig(keep=0.2)."""
    sigma: float | None = None
    """Bias strength; 0 leaves the trend in. None: what was published for the method, if anything was."""
    trend: Literal["exponential", "cubic"] = "exponential"
    """Form of the trend; "cubic" is the published FastV vector and takes no sigma."""
    suppress_padding: bool = True
    """Whether padding patches score 0, where the image sizes are known (`handle.set_image_sizes`)."""
    limit_to_content: bool | None = None
    """Whether the budget falls to the number of patches with content, where that is smaller. None: for FastV, as
    published."""
    span: Span = "view"
    """Whether the index starts anew in each image, tile or frame."""
    stages_debiased: Literal["first", "all"] = "first"
    """Stages that are debiased; later ones rank raw attention in the published code."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(f"method must be a method's config, got {type(self.method).__name__}")
        if self.trend == "exponential" and self.sigma is None and self.method.name not in PUBLISHED_SIGMA:
            raise ValueError(
                f"no sigma was published for {self.method.name}; fit one to your prompts (vlm_prune.fit_debias), or "
                "give sigma=0 to suppress padding alone"
            )
        if self.trend == "cubic" and self.sigma is not None:
            raise ValueError("the cubic trend takes no sigma; leave it out, or use trend='exponential'")

    @property
    def name(self) -> str:
        """The method's, and that it is debiased."""
        return f"{self.method.name}, debiased"

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """The method's stages with debiased scores. ValueError where a score that is debiased is no attention."""
        found = []
        for number, stage in enumerate(self.method.stages(num_layers)):
            if number and self.stages_debiased == "first":
                found.append(stage)
                continue
            found.append(replace(stage, criterion=self.around(stage.criterion)))
        return tuple(found)

    def around(self, criterion: Criterion) -> Criterion:
        """The criterion with a debiased score. ValueError where its score is no attention."""
        if not criterion.attends:
            raise ValueError(f"the score of {criterion.name} is not attention, so there is no attention bias to remove")
        wrapped = replace(criterion, score=partial(_debiased, config=self, score=criterion.score))
        limited = self.method.name == "fastv" if self.limit_to_content is None else self.limit_to_content
        if not limited:
            return wrapped
        return replace(wrapped, select=lambda context, scores: criterion.select(_content_only(context), scores))


def _debiased(context: Context, *, config: AttentionDebiasingConfig, score: Callable[[Context], Tensor]) -> Tensor:
    scores = score(context)
    index, length = index_in_span(context, config.span)
    x = index.to(scores.dtype) / length
    if config.trend == "cubic":
        weight = cubic_weight(x)
    else:
        sigma = PUBLISHED_SIGMA[config.method.name] if config.sigma is None else config.sigma
        weight = exponential_weight(x, sigma)
    scores = scores * weight
    if config.suppress_padding and context.padding is not None:
        scores = scores.masked_fill(context.padding, 0.0)
    return scores


def _content_only(context: Context) -> Context:
    if context.padding is None:
        return context
    content = (context.visual & ~context.padding).sum(1)
    return replace(context, num_kept=torch.minimum(context.num_kept, content))


def apply_attention_debiasing(model: nn.Module, config: AttentionDebiasingConfig) -> PruneHandle:
    """Puts a method to work on debiased scores."""
    return open_pruner(model, config)


@dataclass
class _Watcher:
    """Scores of a method's first stage, as they come."""

    found: TrendAccumulator = field(default_factory=TrendAccumulator)

    def around(self, criterion: Criterion) -> Criterion:
        def score(context: Context) -> Tensor:
            scores = criterion.score(context)
            counts = context.visual.sum(1)
            if bool((counts != counts[0]).any()):
                raise ValueError(f"images of one size are fitted together, got {counts.tolist()} visual tokens")
            rows = scores[context.visual].reshape(len(scores), -1)
            padding = None if context.padding is None else context.padding[context.visual].reshape(rows.shape)
            self.found.update(rows, padding)
            return scores

        return replace(criterion, score=score)


def fit_debias(
    model: nn.Module,
    method: Method,
    batches: Iterable[Mapping[str, Any]],
    *,
    space: Literal["linear", "log"] = "linear",
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """Bias strength sigma of a method's first stage in this model, over batches of inputs for one forward pass each.

    All images must have the same number of visual tokens, and the method must drop some. `on_batch` is called with the
    number of batches done. ValueError where nothing was scored.
    """
    watcher = _Watcher()
    first = method.stages(len(family_of(model)[1].get_decoder().layers))[0]
    config = StagesConfig(chosen=(replace(first, criterion=watcher.around(first.criterion)),))
    with open_pruner(model, config), torch.no_grad():
        for number, batch in enumerate(batches, 1):
            model(**batch)
            if on_batch is not None:
                on_batch(number)
    mean, valid = watcher.found.result()
    return fit_trend(mean, valid, space=space)[1]
