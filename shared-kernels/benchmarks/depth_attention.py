"""depth_attention against stacking the sources, as the paper's own listing does it."""

import torch
from torch.nn import functional as F

from shared_kernels import depth_attention

CLAIM = "depth_attention is at least 14 times faster than stack, RMSNorm and einsum over 9 or 33 layer outputs."
SWEEP = {
    "sources": (9, 33),
    "width": (1_024, 2_048),
    "pass": ("forward", "forward + backward"),
}
BASELINE = "stack + einsum"
TARGET = 14.0
TARGET_AT = {"pass": ("forward",)}
THREADS = 2
ROUNDS = 5
TOKENS, EPS = 1_024, 1e-6


def make(sources, width, **other):
    trained = other["pass"] != "forward"
    values = [torch.randn(TOKENS, width).requires_grad_(trained) for _ in range(sources)]
    query = (torch.randn(width) * width**-0.5).requires_grad_(trained)
    return values, query, torch.ones(width, requires_grad=trained), torch.randn(TOKENS, width)


def stacked(values, query, key_weight):
    value = torch.stack(values)
    key = F.rms_norm(value, query.shape, key_weight, EPS)
    weight = torch.einsum("d, l t d -> l t", query, key).softmax(0)
    return torch.einsum("l t, l t d -> t d", weight, value)


def ours(values, query, key_weight):
    return depth_attention(values, query, key_weight=key_weight, eps=EPS)


def through(function):
    def run(inputs):
        values, query, key_weight, d_out = inputs
        out = function(values, query, key_weight)
        if not query.requires_grad:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, [*values, query, key_weight], d_out)]

    return run


RIVALS = {"stack + einsum": through(stacked), "ours": through(ours)}


def check(out):
    for i, (mine, theirs) in enumerate(zip(out["ours"], out["stack + einsum"], strict=True)):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm(), f"result {i}"
