"""correlation against the same soft-argmax with all similarities in memory."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from shared_kernels import correlation

CLAIM = (
    "On maps of 64 x 64 the soft read-out of all pairs is at least 1.1 times as fast as with their volume in memory."
)
SWEEP = {"map": (32, 64), "width": (64, 256), "softmax": ("row", "dual"), "pass": ("forward", "forward + backward")}
BASELINE = "volume"
TARGET = 1.1
TARGET_AT = {"map": (64,), "width": (64, 256), "softmax": ("row",), "pass": ("forward",)}
THREADS = 2
ROUNDS = 3
TEMPERATURE = 0.02


def make(width, softmax, **other):
    side = other["map"]
    axis = torch.linspace(-1, 1, side)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2)
    source, target = (torch.randn(1, side * side, width, requires_grad=True) for _ in range(2))
    return other["pass"], softmax, source, target, grid, torch.randn(1, side * side, 2)


def unit(features):
    return features / (features.norm(dim=-1, keepdim=True) + 1e-5)


def volume(softmax, source, target, grid):
    scores = unit(source) @ unit(target).mT / TEMPERATURE
    weights = scores.softmax(2)
    if softmax == "dual":
        weights = weights * scores.softmax(1)
        weights = weights / weights.sum(2, keepdim=True)
    return weights @ grid


def padded_sdpa(softmax, source, target, grid):
    """Values as wide as the features, as the fused kernels need it; the dual softmax has no such form."""
    if softmax == "dual":
        return volume(softmax, source, target, grid)
    values = torch.zeros_like(target)
    values[..., :2] = grid
    heads = (t[:, None] for t in (unit(source), unit(target), values))
    return scaled_dot_product_attention(*heads, scale=1 / TEMPERATURE)[:, 0, :, :2]


def ours(softmax, source, target, grid):
    return correlation(source, target, grid, softmax=softmax, temperature=TEMPERATURE)


def through(function):
    def run(inputs):
        which, softmax, source, target, grid, d_out = inputs
        if which == "forward":
            with torch.no_grad():
                return [function(softmax, source, target, grid)]
        out = function(softmax, source, target, grid)
        return [out.detach(), *torch.autograd.grad(out, [source, target], d_out)]

    return run


RIVALS = {"volume": through(volume), "padded SDPA": through(padded_sdpa), "ours": through(ours)}


def check(out):
    for mine, theirs in zip(out["ours"], out["volume"], strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()
