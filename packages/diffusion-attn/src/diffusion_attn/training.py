"""Losses by which a transformer is fine-tuned under sparse attention: flow matching, and distillation from itself.

SLA (arXiv:2509.24006) fine-tunes with the model's own flow-matching loss; its authors' later training code distils: the
student with SLA imitates the velocity of the frozen model with full attention, at noisy inputs whose level is
log-normal. All weights are trained.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def log_normal_times(
    count: int, *, generator: torch.Generator, mean: float = 1.5, std: float = 1.6
) -> Float[Tensor, "B"]:
    """t = sigma / (1 + sigma) in (0, 1) with log sigma normal; the defaults are those of SLA's authors."""
    sigma = (mean + std * torch.randn(count, generator=generator)).exp()
    return sigma / (1 + sigma)


def noisy_at(
    latents: Float[Tensor, "B *rest"], noise: Float[Tensor, "B *rest"], times: Float[Tensor, "B"]
) -> Float[Tensor, "B *rest"]:
    """x_t = (1 - t) x_0 + t noise."""
    times = times.to(latents).view(-1, *[1] * (latents.ndim - 1))
    return (1 - times) * latents + times * noise


def velocity(
    model: nn.Module, noisy: Float[Tensor, "B *rest"], times: Float[Tensor, "B"], conditions: Mapping[str, Any]
) -> Float[Tensor, "B *rest"]:
    """What a diffusers transformer predicts; it counts time in thousandths."""
    return model(hidden_states=noisy, timestep=(1_000 * times).to(noisy.device), return_dict=False, **conditions)[0]


def flow_matching_loss(
    model: nn.Module,
    latents: Float[Tensor, "B *rest"],
    conditions: Mapping[str, Any],
    *,
    times: Float[Tensor, "B"],
    noise: Float[Tensor, "B *rest"],
) -> Float[Tensor, ""]:
    """Mean squared distance of the predicted velocity from noise - x_0.

    conditions: what else the model is called with, such as `encoder_hidden_states`.
    """
    predicted = velocity(model, noisy_at(latents, noise, times), times, conditions)
    return F.mse_loss(predicted.float(), (noise - latents).float())


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module,
    latents: Float[Tensor, "B *rest"],
    conditions: Mapping[str, Any],
    *,
    times: Float[Tensor, "B"],
    noise: Float[Tensor, "B *rest"],
) -> Float[Tensor, ""]:
    """Mean squared distance of the student's velocity from the teacher's, which has no gradient."""
    noisy = noisy_at(latents, noise, times)
    with torch.no_grad():
        target = velocity(teacher, noisy, times, conditions)
    return F.mse_loss(velocity(student, noisy, times, conditions).float(), target.float())


@torch.no_grad()
def euler_sample(
    model: nn.Module,
    noise: Float[Tensor, "B *rest"],
    conditions: Mapping[str, Any],
    *,
    steps: int = 20,
    shift: float = 1.0,
) -> Float[Tensor, "B *rest"]:
    """Follows the predicted velocity from noise to a sample, in Euler steps.

    shift: above 1 spends more steps at high noise, t' = shift t / (1 + (shift - 1) t).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    even = torch.linspace(1, 0, steps + 1)
    times = shift * even / (1 + (shift - 1) * even)
    for now, then in pairwise(times):
        noise = noise + (then - now) * velocity(model, noise, now.expand(noise.shape[0]), conditions)
    return noise
