"""Attention sinks among the visual tokens, and what a criterion does with them.

In the language models of these hosts a few visual tokens, mostly on background, draw attention whatever is asked. They
show by a massive value of their hidden state in a few fixed dimensions, the ones in which the first token has it too
(Kang et al., ICLR 2025, arXiv:2503.03321): phi(x) = max over those dimensions of |x_d| / rms(x) exceeds 20. A guard
goes around any criterion inside the language model and sees to it that sinks are dropped first, or never.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_prune.criterion import Context, Criterion
from vlm_prune.door import Method, PruneHandle, open_pruner
from vlm_prune.stages import BEFORE, Stage


def sink_strength(hidden: Float[Tensor, "B n C"], dims: Sequence[int], *, eps: float = 1e-6) -> Float[Tensor, "B n"]:
    """phi: the largest magnitude in the sink dimensions over the root mean square of all, float32."""
    x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    scale = (x.square().mean(-1) + eps).sqrt()
    return x[..., list(dims)].abs().amax(-1) / scale


@dataclass(frozen=True, kw_only=True)
class SinkGuardConfig:
    """A guard around a method that prunes inside the language model."""

    method: Method
    """The method, e.g. FastVConfig(keep=0.2, layer=3)."""
    dims: tuple[int, ...]
    """Sink dimensions of the language model; published: (1415, 2533) for LLaMA-2-7B, (458, 2570) for Qwen2-VL-7B."""
    threshold: float = 20.0
    """phi above which a token is a sink."""
    policy: Literal["drop", "keep"] = "drop"
    """Whether sinks go first, or stay."""

    def __post_init__(self) -> None:
        if not self.dims or min(self.dims) < 0:
            raise ValueError(f"dims must name at least one dimension of the hidden state, got {self.dims}")
        if not self.threshold > 0:
            raise ValueError(f"threshold must be positive, got {self.threshold}")
        if self.policy not in ("drop", "keep"):
            raise ValueError(f"policy must be 'drop' or 'keep', got {self.policy!r}")

    @property
    def name(self) -> str:
        """The method's, and that it is guarded."""
        return f"{self.method.name}, sinks guarded"

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """The method's stages with guarded scores. ValueError where one is before the first layer."""
        stages = self.method.stages(num_layers)
        if any(stage.after_layer == BEFORE for stage in stages):
            raise ValueError(f"{self.method.name} prunes before the language model, where there are no sinks yet")
        return tuple(replace(stage, criterion=self.around(stage.criterion)) for stage in stages)

    def around(self, criterion: Criterion) -> Criterion:
        """The criterion with the scores of sinks at one end or the other."""
        return replace(criterion, score=partial(_guarded, criterion=criterion, config=self))


def _guarded(context: Context, *, criterion: Criterion, config: SinkGuardConfig) -> Float[Tensor, "B n"]:
    channels = context.hidden.shape[-1]
    if max(config.dims) >= channels:
        raise ValueError(f"dims must be below {channels}, the width of the hidden state, got {config.dims}")
    scores = criterion.score(context)
    sinks = (sink_strength(context.hidden, config.dims) > config.threshold) & context.visual
    context.notes["sinks"] = sinks.sum(1)
    # a sink that is dropped first is still taken before nothing at all
    edge = scores.min() - 1 if config.policy == "drop" else scores.max() + 1
    return torch.where(sinks, edge, scores)


def apply_sink_guard(model: nn.Module, config: SinkGuardConfig) -> PruneHandle:
    """Puts a method to work with guarded scores."""
    return open_pruner(model, config)
