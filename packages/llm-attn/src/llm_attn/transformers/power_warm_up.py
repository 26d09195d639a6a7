"""Softplus attention in a Trainer: its power rises over the first steps.

At power 15 few keys get all the weight from the first step on, gradients are ten times those of softmax, and learning
starts late. An extension of ours, not in the paper (arXiv:2501.13428), where the power is constant.
"""

import math
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_attn.softplus_attention import set_softplus_power


class PowerWarmUp(TrainerCallback):
    """For `Trainer(callbacks=[PowerWarmUp(steps=500)])`: from `start` to `end` by equal factors, then constant.

    The model is one that `apply_softplus` was called on. A run that is resumed goes on at its step.
    """

    def __init__(self, *, steps: int, start: float = 1.0, end: float = 15.0) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not 1 <= start <= end < math.inf:
            raise ValueError(f"start and end must satisfy 1 <= start <= end, got {start} and {end}")
        self.steps, self.start, self.end = steps, start, end

    def power(self, step: int) -> float:
        """Of a step, counted from 0; exactly `end` from `steps` on, so that a whole power is computed as products."""
        if step >= self.steps:
            return self.end
        return self.start * (self.end / self.start) ** (step / self.steps)

    def on_step_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - what the Trainer calls with
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer."""
        model: nn.Module = kwargs["model"]
        set_softplus_power(model, self.power(state.global_step))
