"""SLA with its classification of blocks, against dense attention, forward and with the backward pass."""

import torch
from torch.nn import functional as F

from diffusion_attn import SLAConfig, SparseLinearAttention

CLAIM = (
    "SLA with 5 % critical blocks is at least 5 times faster than dense attention of 8,192 tokens, backward included."
)
SWEEP = {"tokens": (512, 2_048, 8_192), "pass": ("forward", "forward + backward")}
BASELINE = "sdpa"
TARGET = 5
TARGET_AT = {"tokens": (8_192,), "pass": ("forward + backward",)}
ROUNDS = 3
HEADS, WIDTH = 4, 64


def make(tokens, **other):
    blocks = (torch.randn(1, HEADS, tokens // 64, WIDTH).repeat_interleave(64, 2) for _ in range(3))
    qkv = tuple((b + torch.randn(1, HEADS, tokens, WIDTH)).requires_grad_() for b in blocks)
    scopes = {scope: SparseLinearAttention(WIDTH, SLAConfig(linear_scope=scope)) for scope in ("marginal", "all")}
    for layer in scopes.values():
        torch.nn.init.eye_(layer.proj.weight)
    return other["pass"], qkv, scopes, torch.randn(1, HEADS, tokens, WIDTH)


def through(attend):
    def run(inputs):
        which, qkv, scopes, d_out = inputs
        if which == "forward":
            with torch.no_grad():
                return [attend(scopes, *qkv)]
        out = attend(scopes, *qkv)
        return [out.detach(), *torch.autograd.grad(out, qkv, d_out)]

    return run


RIVALS = {
    "sdpa": through(lambda _, *qkv: F.scaled_dot_product_attention(*qkv)),
    "ours, all tokens linear": through(lambda scopes, *qkv: scopes["all"](*qkv)),
    "ours": through(lambda scopes, *qkv: scopes["marginal"](*qkv)),
}


def check(out):
    """Both are finite, and not the same: the linear branch sees other tokens."""
    mine, other = out["ours"][0], out["ours, all tokens linear"][0]
    assert mine.isfinite().all()
    assert (mine - other).norm() > 1e-4 * mine.norm()
