"""Affine-Scaled Attention as SDPA and a running sum, against its formula on the whole map of weights."""

import torch

from llm_attn import affine_attention, affine_weights

CLAIM = "Affine-Scaled Attention is at least 3 times faster than its formula on the map of all weights at 1,024 tokens."
SWEEP = {"tokens": (512, 1_024, 2_048), "pass": ("forward", "forward + backward")}
BASELINE = "the formula"
TARGET = 3
TARGET_AT = {"tokens": (1_024, 2_048)}
HEADS, WIDTH, LENGTH = 4, 64, 2_048


def make(tokens, **other):
    tensors = [torch.randn(1, HEADS, tokens, WIDTH, requires_grad=True) for _ in range(3)]
    tensors.append(torch.rand(1, HEADS, tokens, requires_grad=True))  # alpha
    seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    return other["pass"], tensors, seen, torch.full((HEADS,), 0.45), torch.randn(1, HEADS, tokens, WIDTH)


def through(function):
    def run(inputs):
        which, tensors, seen, mean, d_out = inputs
        if which == "forward":
            with torch.no_grad():
                return [function(*tensors, seen, mean)]
        out = function(*tensors, seen, mean)
        return [out.detach(), *torch.autograd.grad(out, tensors, d_out)]

    return run


def formula(query, key, value, alpha, seen, mean):
    return affine_weights(query, key, alpha, mean, bias_length=LENGTH, seen=seen) @ value


def ours(query, key, value, alpha, seen, mean):  # noqa: ARG001
    return affine_attention(query, key, value, alpha, mean, bias_length=LENGTH)


RIVALS = {"the formula": through(formula), "ours": through(ours)}


def check(out):
    for found, right in zip(out["ours"], out["the formula"], strict=True):
        assert (found - right).norm() <= 1e-4 * right.norm()
