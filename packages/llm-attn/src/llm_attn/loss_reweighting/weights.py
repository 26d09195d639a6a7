"""From losses to weights: the functions of the paper, each a formula (Sow et al., arXiv:2502.06733, and their code).

With  h_i = (2 l_i - l_max - l_min) / (l_max - l_min)  in [-1, 1] and a strategy f, the weights are

    w_i = exp(f(h_i) / r) / sum_j exp(f(h_j) / r),

which maximise  sum_i w_i f_i - r KL(w || uniform)  over the simplex. They sum to 1, lie between exp(-s / r) / n and
exp(s / r) / n for the span s of f (`weight_bound`), and do not change when losses are shifted or scaled.

Decided here: the paper's delta is 1, since delta and r change the same thing. The distance to l_min is taken first, so
that nothing cancels. A range below 1e-6 counts as 1e-6, as in the authors' code; losses that are all equal give 1 / n.
Samples whose loss is NaN or infinite get weight 0 and do not set the range. "uniform" is constant: the identity, which
the authors' notes give for it, is not uniform once it is exponentiated.
"""

import math
from collections.abc import Callable, Mapping
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from llm_attn.loss_reweighting.config import Strategy

Extremes = tuple[Float[Tensor, ""], Float[Tensor, ""]]
SMALLEST_RANGE = 1e-6

SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "linupper": lambda h: (h + 1).clamp(max=1),
    "quadratic": lambda h: 1 - h.square(),
    "extremes": torch.abs,
    "upper_linear": lambda h: 0.5 * h + 0.5,
    "uniform": torch.zeros_like,
}
"""f of each strategy, of h in [-1, 1]; every f lies in [0, 1]."""


def loss_extremes(losses: Float[Tensor, "n"], *, quantile: tuple[float, float] = (0.0, 1.0)) -> Extremes:
    """Lowest and highest finite loss, or these quantiles of the finite ones; NaN where there is none."""
    if losses.numel() == 0:
        return losses.new_tensor(torch.nan), losses.new_tensor(torch.nan)
    finite = losses.isfinite()
    if quantile != (0.0, 1.0):
        low, high = losses.masked_fill(~finite, torch.nan).nanquantile(losses.new_tensor(quantile))
        return low, high
    low, high = losses.masked_fill(~finite, torch.inf).amin(), losses.masked_fill(~finite, -torch.inf).amax()
    return low.masked_fill(low > high, torch.nan), high.masked_fill(low > high, torch.nan)


def normalized_losses(losses: Float[Tensor, "n"], extremes: Extremes) -> Float[Tensor, "n"]:
    """h: the losses mapped to [-1, 1] by their range; what lies outside the range is at its end."""
    low, high = extremes
    span = high - low
    return ((2 * (losses - low) - span) / span.clamp(min=SMALLEST_RANGE)).clamp(-1, 1)


def loss_weights(
    losses: Float[Tensor, "n"],
    *,
    strategy: Strategy = "linupper",
    r: float = 0.4,
    quantile: tuple[float, float] = (0.0, 1.0),
    extremes: Extremes | None = None,
) -> Float[Tensor, "n"]:
    """Weights of the losses, in float32 at least, without gradient; they sum to 1.

    Where the loss is NaN or infinite the weight is 0; where no loss is finite, all are. `extremes` are the ends of the
    range if they are not to be taken from these losses. ValueError on a strategy that does not exist, on an r that is
    not positive, and on losses that are no vector.
    """
    _check(strategy, r)
    if losses.dim() != 1:
        raise ValueError(f"losses must be a vector, one loss per sample, got shape {tuple(losses.shape)}")
    losses = losses.detach().to(torch.promote_types(losses.dtype, torch.float32))
    finite = losses.isfinite()
    ends = loss_extremes(losses, quantile=quantile) if extremes is None else extremes
    scores = SCORES[strategy](normalized_losses(losses, ends)) / r
    weights = scores.masked_fill(~finite, -torch.inf).softmax(0)
    return weights.masked_fill(~finite, 0.0)


def weight_bound(strategy: Strategy, r: float) -> float:
    """exp(span of f / r): the largest w_max / w_min there can be, and the largest n * w_max.

    With 0.4 and every strategy but "uniform" (1) it is 12.2. Past what a float holds it is infinite.
    """
    _check(strategy, r)
    if strategy == "uniform":
        return 1.0
    return math.exp(1 / r) if 1 / r < math.log(torch.finfo(torch.float64).max) else math.inf


def _check(strategy: str, r: float) -> None:
    if strategy not in SCORES:
        raise ValueError(f"strategy must be one of {', '.join(get_args(Strategy))}, got {strategy!r}")
    if not r > 0:
        raise ValueError(f"r must be positive, got {r}")
