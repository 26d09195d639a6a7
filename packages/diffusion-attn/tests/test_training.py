"""The losses of fine-tuning, and that a few steps of each lower it."""

import copy

import pytest
import torch

from diffusion_attn import (
    SLAConfig,
    apply_sla,
    distillation_loss,
    flow_matching_loss,
    log_normal_times,
)
from diffusion_attn.testing import inputs_of, tiny_model
from diffusion_attn.training import euler_sample, noisy_at


def batch():
    given = inputs_of("wan")
    conditions = {"encoder_hidden_states": given["encoder_hidden_states"]}
    noise = torch.randn(given["hidden_states"].shape, generator=torch.Generator().manual_seed(4))
    return given["hidden_states"], conditions, {"times": torch.tensor([0.3, 0.8]), "noise": noise}


def test_times_are_log_normal():
    times = log_normal_times(20_000, generator=torch.Generator().manual_seed(0))
    log_sigma = (times / (1 - times)).log()
    assert log_sigma.mean().item() == pytest.approx(1.5, abs=0.05)
    assert log_sigma.std().item() == pytest.approx(1.6, abs=0.05)


def test_noise_is_mixed_in():
    latents, noise = torch.ones(2, 3, 4), torch.full((2, 3, 4), 5.0)
    mixed = noisy_at(latents, noise, torch.tensor([0.0, 0.25]))
    assert torch.equal(mixed[0], latents[0])
    assert torch.equal(mixed[1], torch.full((3, 4), 2.0))


def test_the_flow_matching_loss_of_a_model_that_is_right_is_zero():
    latents, conditions, drawn = batch()
    model = tiny_model("wan")
    model.forward = lambda **_: (drawn["noise"] - latents,)
    assert flow_matching_loss(model, latents, conditions, **drawn).item() == 0
    model.forward = lambda **_: (torch.zeros_like(latents),)
    expected = (drawn["noise"] - latents).square().mean()
    assert flow_matching_loss(model, latents, conditions, **drawn).item() == pytest.approx(expected.item())


def test_a_student_with_full_attention_is_its_teacher():
    latents, conditions, drawn = batch()
    model = tiny_model("wan")
    assert distillation_loss(model, copy.deepcopy(model), latents, conditions, **drawn).item() == 0


def test_distillation_brings_sla_nearer_to_its_teacher():
    latents, conditions, drawn = batch()
    teacher = tiny_model("wan")
    student = copy.deepcopy(teacher)
    apply_sla(student.train(), SLAConfig(critical=0.2, negligible=0.2, block_size=(8, 8)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = distillation_loss(student, teacher, latents, conditions, **drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_follows_the_velocity(shift):
    """A constant velocity is followed exactly whatever the steps; time falls from 1,000 to above 0."""
    noise, asked = torch.zeros(2, 3), []
    model = torch.nn.Module()

    def forward(hidden_states, timestep, return_dict):
        asked.append(timestep[0].item())
        return (torch.full_like(hidden_states, 2.0),)

    model.forward = forward
    sample = euler_sample(model, noise, {}, steps=4, shift=shift)
    torch.testing.assert_close(sample, torch.full((2, 3), -2.0))
    even = [1.0, 0.75, 0.5, 0.25]
    assert asked == pytest.approx([1_000 * shift * t / (1 + (shift - 1) * t) for t in even])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        euler_sample(model, noise, {}, steps=0)
