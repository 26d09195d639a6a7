"""Sensitivity of a projector of LLaVA's build to 576 visual tokens: closed form against 64 sampled directions, as
published (the whole projector, twice for each direction) and with the first layer's product taken out of the loop.
"""

import torch
from torch import nn

from vlm_prune.zoo_prune import coupling, sensitivity_exact, sensitivity_sampled, two_layers, unit_directions

CLAIM = "The closed form of ZOO-Prune's sensitivity is at least 100 times as cheap as its 64 sampled directions."
SWEEP = {"width": (256, 1024)}
BASELINE = "64 directions, as published"
TARGET = 100.0
TARGET_AT = {"width": (1024,)}
ROUNDS = 3


def make(width):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)).requires_grad_(False)
    x = torch.randn(576, width) * torch.linspace(0.5, 2, 576)[:, None]
    layers = two_layers(module)
    hidden = x @ layers.first.T + layers.bias
    directions = unit_directions(64, width, seed=0).to(x.device)
    return layers, x, hidden, coupling(layers), directions, module


def published(inputs):
    _, x, *_, directions, module = inputs
    step, total = 1e-2, 0.0
    for direction in directions:
        total = total + ((module(x + step * direction) - module(x - step * direction)) / (2 * step)).norm(dim=-1)
    return total / len(directions)


def fused(inputs):
    layers, x, _, _, directions, _ = inputs
    return sensitivity_sampled(layers, x, directions)


def ours(inputs):
    """As in a model: the hidden layer is there from the projector's own run, Q from the first prompt."""
    layers, x, hidden, pairs, *_ = inputs
    return sensitivity_exact(layers, x, hidden=hidden, pairs=pairs)


RIVALS = {"64 directions, as published": published, "64 directions, fused": fused, "ours": ours}


def check(out):
    """Both sampled forms are one; the closed form ranks tokens as they do and agrees in level."""
    exact, found = out["ours"], out["64 directions, fused"]
    torch.testing.assert_close(found, out["64 directions, as published"], rtol=5e-3, atol=0)
    ranks = torch.stack([t.argsort().argsort().double() for t in (exact, found)])
    assert torch.corrcoef(ranks)[0, 1] > 0.98
    assert abs((found / exact).mean().item() - 1) < 0.02
