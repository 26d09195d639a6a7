"""weighted_cross_entropy against cross_entropy on all logits at once."""

import torch
from torch.nn import functional as F

from shared_kernels import weighted_cross_entropy

CLAIM = (
    "Without the logits in memory, weighted_cross_entropy takes at most 1.3 times as long as with them; sums take less."
)
SWEEP = {
    "width": (256, 1_024),
    "vocabulary": (8_192, 32_000),
    "pass": ("losses", "losses + backward", "sum + backward"),
}
BASELINE = "all logits"
TARGET = 1 / 1.3
THREADS = 2
ROUNDS = 3
TOKENS = 1_024


def make(width, vocabulary, **other):
    trained = other["pass"] != "losses"
    hidden = torch.randn(TOKENS, width, requires_grad=trained)
    weight = (torch.randn(vocabulary, width) * width**-0.5).requires_grad_(trained)
    reduction = "sum" if other["pass"] == "sum + backward" else "none"
    return hidden, weight, torch.randint(vocabulary, (TOKENS,)), torch.rand(TOKENS), reduction


def dense(hidden, weight, targets, token_weights, reduction):
    losses = token_weights * F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    return losses.sum() if reduction == "sum" else losses


def ours(hidden, weight, targets, token_weights, reduction):
    return weighted_cross_entropy(hidden, weight, targets, token_weights=token_weights, reduction=reduction)


def through(function):
    def run(inputs):
        hidden, weight, *rest = inputs
        losses = function(hidden, weight, *rest)
        if not hidden.requires_grad:
            return [losses]
        return [losses.detach(), *torch.autograd.grad(losses.sum(), (hidden, weight))]

    return run


RIVALS = {"all logits": through(dense), "ours": through(ours)}


def check(out):
    for i, (mine, theirs) in enumerate(zip(out["ours"], out["all logits"], strict=True)):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm(), f"result {i}"
