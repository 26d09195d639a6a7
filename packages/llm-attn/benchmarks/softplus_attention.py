"""Softplus attention against its formulas on the whole map; the price is what each allocates at most."""

import math

import torch
from torch.nn import functional as F

from llm_attn import softplus_attention

CLAIM = "From 1,024 causal tokens on, softplus attention is at least twice as fast as its formulas, in linear memory."
SWEEP = {"tokens": (512, 1024, 2048, 4096)}
BASELINE = "formulas"
TARGET = 2.0
TARGET_AT = {"tokens": (1024, 2048, 4096)}
ROUNDS = 3  # the formulas take seconds
HEADS, HEAD_DIM, POWER = 4, 64, 15


def make(tokens):
    return tuple(torch.randn(1, HEADS, tokens, HEAD_DIM) for _ in range(3))


def formulas(inputs):
    """As published reimplementations have it: mask of ones and zeros, one full map per step."""
    query, key, value = inputs
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    mask = torch.ones(query.shape[2], key.shape[2], device=query.device).tril()
    count = mask.sum(-1, keepdim=True)
    s = F.softplus(math.log(HEAD_DIM) * count.log() * (query @ key.mT)) * mask
    a = s / s.sum(-1, keepdim=True)
    u = torch.relu(count * a - (count > 3).to(a.dtype)) * mask
    y = (u / u.amax(-1, keepdim=True)) ** POWER
    return (y / y.sum(-1, keepdim=True)) @ value


RIVALS = {
    "formulas": formulas,
    "sdpa": lambda inputs: F.scaled_dot_product_attention(*inputs, is_causal=True),
    "ours": lambda inputs: softplus_attention(*inputs, power=POWER),
}


def check(out):
    assert (out["ours"] - out["formulas"]).norm() <= 1e-4 * out["formulas"].norm()


def price(out):
    with torch.device(out["ours"].device):
        inputs = make(out["ours"].shape[2])
    return {f"MiB at most, {name}": round(peak(rival, inputs) / 2**20, 1) for name, rival in RIVALS.items()}


def peak(rival, inputs):
    """Bytes of tensors alive at once inside a call, beyond its inputs."""
    if inputs[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        rival(inputs)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        rival(inputs)
    alive = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most
