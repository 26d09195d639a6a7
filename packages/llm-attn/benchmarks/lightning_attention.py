"""Lightning Attention against causal scaled_dot_product_attention of the same tensors, and fla's where it runs."""

import importlib.util

import torch
from torch.nn import functional as F

from llm_attn.lightning_attention import decay_slopes, lightning_attention, lightning_attention_quadratic

CLAIM = "Lightning Attention is at least 4.8 times faster than causal SDPA at 2,048 tokens and 16 times at 8,192."
SWEEP = {"tokens": (512, 2_048, 8_192)}
BASELINE = "sdpa, causal"
TARGETS = ((4.8, {"tokens": (2_048,)}), (16, {"tokens": (8_192,)}))
THREADS = 2
ROUNDS = 5
HEADS, WIDTH = 4, 64
CHECKED = 512  # tokens of the output that are compared with the definition


def make(tokens):
    return *(torch.randn(1, HEADS, tokens, WIDTH) for _ in range(3)), decay_slopes(HEADS)


def sdpa(inputs):
    return F.scaled_dot_product_attention(*inputs[:3], is_causal=True)


def ours(inputs):
    return lightning_attention(*inputs), inputs


RIVALS = {"sdpa, causal": sdpa, "ours": ours}

if torch.cuda.is_available() and importlib.util.find_spec("fla"):
    from fla.ops.simple_gla import chunk_simple_gla

    def fla(inputs):
        *tensors, slopes = inputs
        rows = (t.transpose(1, 2) for t in tensors)
        return chunk_simple_gla(*rows, g_gamma=-slopes, scale=1.0)[0].transpose(1, 2)

    RIVALS["flash-linear-attention"] = fla


def check(out):
    """SDPA computes something else, so ours is compared with the definition, on a beginning that fits in memory."""
    mine, (*tensors, slopes) = out["ours"]
    truth = lightning_attention_quadratic(*(t[:, :, :CHECKED] for t in tensors), slopes)
    assert (mine[:, :, :CHECKED] - truth).norm() <= 1e-5 * truth.norm()


def work(inputs):
    return inputs[0].shape[2], "tokens"
