"""block_stats against two reductions of torch, one after the other."""

import torch
from torch.nn.functional import pad

from shared_kernels import block_stats

CLAIM = "The mean and mean absolute deviation of blocks take less time in one pass than as reductions of torch."
SWEEP = {"tokens": (2_048, 8_192), "block": (64, 128), "pass": ("forward", "forward + backward")}
BASELINE = "mean, abs, mean"
TARGET = 1.0
THREADS = 2
HEADS, WIDTH = 4, 64


def make(tokens, block, **other):
    """Three tokens less than whole blocks."""
    x = torch.randn(1, HEADS, tokens - 3, WIDTH, requires_grad=True)
    d_out = [torch.randn(1, HEADS, tokens // block, WIDTH) for _ in range(2)]
    return other["pass"], x, block, d_out


def reductions(x, block):
    blocks = pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
    counts = torch.full((blocks.shape[2], 1), float(block), device=x.device)
    counts[-1] -= blocks.shape[2] * block - x.shape[2]
    mean = blocks.sum(3) / counts
    distance = (blocks - mean.unsqueeze(3)).abs()
    distance[:, :, -1, int(counts[-1]) :] = 0
    return mean, distance.sum(3) / counts


def through(function):
    def run(inputs):
        which, x, block, d_out = inputs
        if which == "forward":
            with torch.no_grad():
                return function(x, block)
        results = function(x, block)
        return *(t.detach() for t in results), *torch.autograd.grad(results, x, d_out)

    return run


RIVALS = {"mean, abs, mean": through(reductions), "ours": through(lambda x, block: block_stats(x, block_size=block))}


def check(out):
    for mine, theirs in zip(out["ours"], out["mean, abs, mean"], strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
