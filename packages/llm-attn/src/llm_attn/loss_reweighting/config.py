"""Settings of loss-based reweighting, with the paper's defaults."""

from dataclasses import dataclass
from typing import Literal, get_args

Strategy = Literal["linupper", "quadratic", "extremes", "upper_linear", "uniform"]
Scope = Literal["micro", "window", "ema"]
Unit = Literal["row", "document"]
Head = Literal["fused", "logits"]


@dataclass(frozen=True, kw_only=True)
class LossReweightingConfig:
    """How losses become weights, from which step on, and over which samples."""

    strategy: Strategy = "linupper"
    """Which losses get the weight: "linupper" all above the middle of the range alike and less below (the paper's
    best), "upper_linear" the more the higher, "quadratic" the middle, "extremes" both ends, "uniform" all alike."""
    r: float = 0.4
    """Temperature; the smaller, the further weights are from uniform (paper: 1.0 for 124M parameters, 0.4 above)."""
    warmup_steps: int = 1000
    """First optimiser steps, whose losses do not rank samples usefully yet."""
    warmup_r: float | None = None
    """Temperature in these steps (large runs of the paper: 100); None is the plain loss, the mean over tokens."""
    scope: Scope = "micro"
    """Samples that share the weight 1: "micro" those of one micro-batch of all ranks; "window" those of all
    micro-batches of an optimiser step, for one more forward pass; "ema" as micro, with the range of losses averaged."""
    ema_decay: float = 0.9
    """Of the running averages of lowest and highest loss, for `scope="ema"`."""
    quantile: tuple[float, float] = (0.0, 1.0)
    """Quantiles of the losses that are the ends of the range: (0.0, 0.95) keeps outliers from flattening all others."""
    unit: Unit = "row"
    """What a sample is: a row of the batch, or each document packed into it, where `position_ids` begin anew."""
    length_weighted: bool = False
    """Whether a weight is also multiplied by the sample's share of the tokens on its rank, as in the authors' GPT-2
    trainer. Of equal lengths it changes nothing."""
    head: Head = "fused"
    """How a Trainer gets losses of single samples: "fused" without logits in memory, "logits" from the model's logits,
    for models that change them behind the output layer (Gemma 2 caps them) or whose output layer is no plain one."""

    def __post_init__(self) -> None:
        if self.strategy == "upper":  # what people will try
            raise ValueError(
                "strategy 'upper' means 'linupper' in the authors' FSDP code and 'upper_linear' in their GPT-2 code: "
                "name the one you mean"
            )
        for name, kinds in (("strategy", Strategy), ("scope", Scope), ("unit", Unit), ("head", Head)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}")
        for name in ("r", "warmup_r"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        low, high = self.quantile
        if not 0 <= low < high <= 1:
            raise ValueError(f"quantile must be two shares, 0 <= low < high <= 1, got {self.quantile}")


def temperature_at(step: int, *, r: float, warmup_steps: int, warmup_r: float | None = None) -> float | None:
    """The schedule: `warmup_r` for the first `warmup_steps` optimiser steps, counted from 0, then `r`.

    None is the plain loss without weights. ValueError on a negative step.
    """
    if step < 0:
        raise ValueError(f"step must be the number of optimiser steps done, at least 0, got {step}")
    return warmup_r if step < warmup_steps else r
