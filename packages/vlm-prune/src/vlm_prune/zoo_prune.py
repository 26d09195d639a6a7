"""ZOO-Prune (Kim et al., CVPR 2026, arXiv:2509.24837): tokens to which the projector is sensitive, far from each other.

Sensitivity S_i = E_u ||J(x_i) u|| over random unit directions u, J the projector's Jacobian at visual token x_i; tokens
are then chosen greedily by normalised sensitivity times distance to the nearest chosen one (SADS). Estimators of S:

- "fd", as published: central differences along m directions shared by all tokens, m = 64, h = 0.01. The first layer's
  product is not repeated for each direction, which gives the same number; with `rank`, the second layer is truncated
  (published for LLaVA-NeXT: 128).
- "jvp": its limit for h -> 0, through any projector.
- "exact": sqrt(E ||J u||^2) = ||W2 diag(phi') W1||_F / sqrt(d) for projectors linear - activation - linear, in one
  product with Q = (W2^T W2) * (W1 W1^T). No randomness; ranks as the sampled one does.
- "norm": the norm of the projected feature, a control: in some models sensitivity is hardly more.

Decided here: computed in float32 whatever the model's dtype (a step of 0.01 is lost in half precision); "exact" by
default where the projector allows it, "jvp" with 16 directions elsewhere; each tile or frame gets its part of the
budget; a projector that is linear has one sensitivity for all, and the choice is by diversity alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shared_kernels import diverse_subset
from vlm_prune.criterion import Context, Criterion, Selection
from vlm_prune.door import PruneHandle, open_pruner
from vlm_prune.stages import BEFORE, Stage, check_keep
from vlm_prune.subsets import token_sets
from vlm_prune.vision import VisionCall

Estimator = Literal["exact", "jvp", "fd", "norm"]
_CHUNK = 1 << 24
"""Values of a difference that are held at once."""


class TwoLayers(NamedTuple):
    """A projector linear - activation - linear: W1 (h, d), b1 (h,), activation, W2 (l, h), all at least float32."""

    first: Float[Tensor, "h d"]
    bias: Float[Tensor, "h"]
    activation: Callable[[Tensor], Tensor]
    second: Float[Tensor, "l h"]


def two_layers(projector: Any) -> TwoLayers | None:
    """The parts of a projector that is linear - activation - linear and nothing else, None for any other."""
    children = {name for name, _ in projector.named_children()}
    if children == {"linear_1", "act", "linear_2"}:
        first, activation, second = projector.linear_1, projector.act, projector.linear_2
    elif isinstance(projector, nn.Sequential) and len(projector) == 3:
        first, activation, second = projector
    else:
        return None
    if not (isinstance(first, nn.Linear) and isinstance(second, nn.Linear)):
        return None
    wide = torch.promote_types(first.weight.dtype, torch.float32)
    bias = torch.zeros(len(first.weight), device=first.weight.device) if first.bias is None else first.bias
    return TwoLayers(first.weight.to(wide), bias.to(wide), activation, second.weight.to(wide))


def unit_directions(number: int, width: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "m d"]:
    """Random directions of length 1: the same for one seed, on any device."""
    drawn = torch.randn(number, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn / (drawn.norm(dim=1, keepdim=True) + 1e-12)).to(dtype)


def sensitivity_sampled(
    layers: TwoLayers,
    x: Float[Tensor, "N d"],
    directions: Float[Tensor, "m d"],
    *,
    step: float = 1e-2,
    rank: int | None = None,
) -> Float[Tensor, "N"]:
    """S_i = mean_j ||(M(x_i + h u_j) - M(x_i - h u_j)) / 2h||, the published estimator.

    With A = W1 x + b1 and G = h W1 u the difference is W2 (phi(A + G) - phi(A - G)). With `rank`, W2 = U S V^T is cut
    to that rank and S V^T stands for it, which has the same norms.
    """
    second = layers.second if rank is None else _truncated(layers.second, rank)
    hidden = x @ layers.first.T + layers.bias
    moves = step * directions @ layers.first.T
    total = torch.zeros(len(x), dtype=hidden.dtype, device=x.device)
    for part in moves.split(max(1, _CHUNK // max(1, hidden.numel()))):
        ahead, back = hidden + part[:, None], hidden - part[:, None]
        difference = layers.activation(ahead) - layers.activation(back)
        total += (difference @ second.T).norm(dim=-1).sum(0)
    return total / (2 * step * len(directions))


def _truncated(weight: Tensor, rank: int) -> Tensor:
    _, values, right = torch.linalg.svd(weight, full_matrices=False)
    return values[:rank, None] * right[:rank]


def coupling(layers: TwoLayers) -> Float[Tensor, "h h"]:
    """Q = (W2^T W2) * (W1 W1^T), which depends on the projector alone."""
    return (layers.second.T @ layers.second) * (layers.first @ layers.first.T)


def sensitivity_exact(
    layers: TwoLayers,
    x: Float[Tensor, "N d"],
    *,
    hidden: Float[Tensor, "N h"] | None = None,
    pairs: Float[Tensor, "h h"] | None = None,
) -> Float[Tensor, "N"]:
    """||W2 diag(phi'(A_i)) W1||_F / sqrt(d) = sqrt(phi'(A_i)^T Q phi'(A_i) / d): the root of the mean squared response.

    hidden: A = W1 x + b1, where the caller has it. pairs: Q, likewise.
    """
    hidden = x @ layers.first.T + layers.bias if hidden is None else hidden
    pairs = coupling(layers) if pairs is None else pairs
    slope = _slope(layers.activation, hidden)
    squared = ((slope @ pairs) * slope).sum(-1)
    return squared.clamp(min=0).sqrt() / x.shape[1] ** 0.5


def _slope(activation: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """The derivative of an activation, element by element; under inference_mode too."""
    with torch.inference_mode(False), torch.enable_grad():
        point = hidden.detach().clone().requires_grad_()
        return torch.autograd.grad(activation(point).sum(), point)[0]


def sensitivity_jvp(
    projector: nn.Module, x: Float[Tensor, "V P d"], directions: Float[Tensor, "m d"]
) -> Float[Tensor, "*T"]:
    """S of what any projector puts out, all its inputs moving along one direction at a time: the limit h -> 0 of "fd".

    A merger of several patches is read at its merged tokens. Shape of the output without channels.
    """
    state = {n: t.to(torch.promote_types(t.dtype, x.dtype)) for n, t in _state(projector)}

    def run(features: Tensor) -> Tensor:
        return torch.func.functional_call(projector, state, (features,))

    total: Tensor | float = 0.0
    for direction in directions:
        moved = torch.func.jvp(run, (x,), (direction.expand_as(x).contiguous(),))[1]
        total = total + moved.norm(dim=-1)
    return torch.as_tensor(total) / len(directions)


def _state(projector: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*projector.named_parameters(), *projector.named_buffers()]
    return [(n, t.detach()) for n, t in named if t.is_floating_point()]


def normalised_sensitivity(score: Float[Tensor, "R M"], present: Float[Tensor, "R M"]) -> Float[Tensor, "R M"]:
    """(S - min) / (max - min + 1e-8) within each set; all ones where all are equal, 0 on padding."""
    low = score.masked_fill(~present, torch.inf).min(1, keepdim=True).values
    high = score.masked_fill(~present, -torch.inf).max(1, keepdim=True).values
    # a linear projector's sensitivities are equal up to rounding, and must not become a random ranking
    equal = high - low <= 8 * torch.finfo(score.dtype).eps * high.abs()
    scaled = torch.where(equal, torch.ones_like(score), (score - low) / (high - low + 1e-8))
    return scaled.masked_fill(~present, 0.0)


def sads_select(features: Float[Tensor, "N l"], sensitivity: Float[Tensor, "N"], num_kept: int) -> Int[Tensor, "K"]:
    """Positions of K tokens in order, chosen by normalised sensitivity times cosine distance to the nearest chosen."""
    present = torch.ones_like(sensitivity, dtype=torch.bool)[None]
    weight = normalised_sensitivity(sensitivity[None], present)
    return diverse_subset(features[None], num_kept=num_kept, weight=weight)[0].sort().values


@dataclass(frozen=True, kw_only=True)
class ZooPruneConfig:
    """Sensitivity and diversity, before the language model."""

    name: ClassVar[str] = "zoo"

    keep: float | int = 0.2
    """Share of the visual tokens, or their number; newline tokens come on top."""
    estimator: Estimator | None = None
    """How sensitivity is found. None: "exact" where the projector is linear - activation - linear, else "jvp"."""
    directions: int | None = None
    """m, random directions. None: 64 for "fd", 16 for "jvp"."""
    step: float = 1e-2
    """h, of "fd"."""
    rank: int | None = None
    """Rank that "fd" truncates the second layer to; None: none. Published for LLaVA-NeXT: 128."""
    seed: int = 0
    """Of the directions."""
    by_view: bool = True
    """Whether each tile, frame or image gets its part of the budget by itself."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.estimator not in (None, "exact", "jvp", "fd", "norm"):
            raise ValueError(f"estimator must be 'exact', 'jvp', 'fd' or 'norm', got {self.estimator!r}")
        for name, value in (("directions", self.directions), ("rank", self.rank)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.step > 0:
            raise ValueError(f"step must be positive, got {self.step}")

    def stages(self, num_layers: int) -> tuple[Stage, ...]:  # noqa: ARG002
        """One stage before the first layer."""
        criterion = Criterion(
            name=self.name,
            score=_Score(self),
            select=partial(_select, by_view=self.by_view),
            needs=frozenset({"projector_input"}),
        )
        return (Stage(after_layer=BEFORE, keep=self.keep, criterion=criterion),)


def zoo_sensitivity(projector: nn.Module, x: Float[Tensor, "V P d"], config: ZooPruneConfig) -> Float[Tensor, "*T"]:
    """Sensitivity of what a projector makes of x, by the config's estimator, at least float32.

    ValueError where the estimator needs a projector linear - activation - linear and this is another.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    layers = two_layers(projector)
    estimator = config.estimator or ("jvp" if layers is None else "exact")
    if estimator == "norm":
        return _widened(projector, x).norm(dim=-1)
    directions = unit_directions(
        config.directions or (64 if estimator == "fd" else 16), x.shape[-1], seed=config.seed, dtype=x.dtype
    ).to(x.device)
    if estimator == "jvp":
        return sensitivity_jvp(projector, x, directions)
    if layers is None:
        raise ValueError(
            f"estimator {estimator!r} needs a projector linear - activation - linear, got "
            f"{type(projector).__name__}; use 'jvp'"
        )
    flat = x.flatten(0, -2)
    if estimator == "exact":
        return sensitivity_exact(layers, flat).reshape(x.shape[:-1])
    found = sensitivity_sampled(layers, flat, directions, step=config.step, rank=config.rank)
    return found.reshape(x.shape[:-1])


def _widened(projector: nn.Module, x: Tensor) -> Tensor:
    state = {n: t.to(torch.promote_types(t.dtype, x.dtype)) for n, t in _state(projector)}
    return torch.func.functional_call(projector, state, (x,))


class _Score:
    """Sensitivity of a prompt's tokens; what depends on the projector alone is computed once."""

    def __init__(self, config: ZooPruneConfig) -> None:
        self.config = config
        self.pairs: tuple[tuple[int, ...], Tensor] | None = None

    def __call__(self, context: Context) -> Float[Tensor, "B n"]:
        return context.tower().gather_tokens(self._values)

    def _values(self, call: VisionCall) -> Float[Tensor, "N"]:
        if call.projector is None or call.projector_input is None:
            raise RuntimeError("the projector was not recorded: name 'projector_input' among the needs")
        found = self._exact(call)
        if found is None:
            found = zoo_sensitivity(call.projector, call.projector_input, self.config)
        return call.projected_to_tokens(found if found.ndim == 2 else found[None])

    def _exact(self, call: VisionCall) -> Tensor | None:
        layers, hidden = two_layers(call.projector), call.activation_input
        if self.config.estimator not in (None, "exact") or layers is None or hidden is None:
            return None
        if hidden.dtype.itemsize < 4 or call.projector_input is None:  # too few digits for a slope
            return None
        weights = (layers.first, layers.second)
        key = tuple(n for w in weights for n in (w.data_ptr(), w._version))
        if self.pairs is None or self.pairs[0] != key:
            self.pairs = (key, coupling(layers))
        x = call.projector_input.flatten(0, -2)
        score = sensitivity_exact(layers, x, hidden=hidden.flatten(0, -2), pairs=self.pairs[1])
        return score.reshape(call.projector_input.shape[:-1])


def _select(context: Context, scores: Float[Tensor, "B n"], *, by_view: bool) -> Selection:
    sets = token_sets(context, by_view=by_view)
    weight = normalised_sensitivity(sets.take(scores), sets.present)
    chosen = diverse_subset(sets.take(context.hidden), num_kept=sets.most(), weight=weight, mask=sets.present)
    return Selection(sets.kept(chosen, context.visual))


def apply_zoo_prune(model: nn.Module, config: ZooPruneConfig | None = None) -> PruneHandle:
    """Keeps tokens to which the projector is sensitive and that are unlike each other."""
    return open_pruner(model, config or ZooPruneConfig())
