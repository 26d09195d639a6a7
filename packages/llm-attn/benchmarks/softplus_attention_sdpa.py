"""What softplus attention costs beside causal softmax attention, forward and with the backward pass."""

import torch
from torch.nn import functional as F

from llm_attn import softplus_attention

CLAIM = "From 1,024 causal tokens on, softplus attention with re-weighting takes at most three times as long as SDPA."
SWEEP = {"backward": (False, True), "tokens": (512, 1024, 2048, 4096)}
BASELINE = "sdpa"
TARGET = 1 / 3
TARGET_AT = {"backward": (False,), "tokens": (1024, 2048, 4096)}
HEADS, HEAD_DIM, POWER = 4, 64, 15


def make(backward, tokens):
    return tuple(torch.randn(1, HEADS, tokens, HEAD_DIM, requires_grad=backward) for _ in range(3))


def run(attend):
    """Output, or the gradients of its sum of squares."""

    def rival(inputs):
        out = attend(*inputs)
        return torch.autograd.grad(out.square().sum(), inputs) if out.requires_grad else out

    return rival


RIVALS = {
    "sdpa": run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    "one stage": run(lambda q, k, v: softplus_attention(q, k, v, power=None)),
    "ours": run(lambda q, k, v: softplus_attention(q, k, v, power=POWER)),
}


def check(out):
    """Different weights of the same values: the first row sees one key, and all rivals give its value (gradient 0)."""
    whole = {name: t if isinstance(t, torch.Tensor) else t[0] for name, t in out.items()}
    rounding = 1e-5 * max(1.0, whole["sdpa"].abs().max().item())  # SDPA's own gradient is 0 only to that
    first = whole["sdpa"][0, :, 0]
    for name in ("one stage", "ours"):
        assert torch.allclose(whole[name][0, :, 0], first, rtol=0, atol=rounding)
