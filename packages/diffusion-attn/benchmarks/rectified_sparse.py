"""Rectified SpaAttn with all that chooses and rectifies, against dense attention of the same tokens."""

import torch
from torch.nn import functional as F

from diffusion_attn import RectifiedSparseConfig, rectified_sparse_attention
from diffusion_attn.rectified_sparse import choose_critical, estimate_attention, rectification
from diffusion_attn.visual_attention import attend_blocks

CLAIM = (
    "Rectified SpaAttn, choice of blocks included, is at least 5 times faster than dense attention of 8,192 tokens "
    "at density 0.1, and 9 times at 0.05."
)
SWEEP = {"tokens": (512, 2_048, 8_192), "density": (0.1, 0.05)}
BASELINE = "sdpa"
TARGETS = ((5, {"tokens": (8_192,), "density": (0.1,)}), (9, {"tokens": (8_192,), "density": (0.05,)}))
ROUNDS = 5
HEADS, WIDTH, BLOCK = 4, 64, 64


def make(tokens, density):
    """Tokens of a block are alike, as neighbours in a video are; noise alone would have nothing rectified."""
    blocks = (2 * torch.randn(1, HEADS, tokens // BLOCK, WIDTH) for _ in range(3))
    qkv = tuple(b.repeat_interleave(BLOCK, 2) + torch.randn(1, HEADS, tokens, WIDTH) for b in blocks)
    config = RectifiedSparseConfig(density=density, topp=0, block_size=BLOCK)
    plain = RectifiedSparseConfig(density=density, topp=0, block_size=BLOCK, correction=False)
    estimate = estimate_attention(*qkv, config, text=None, scale=WIDTH**-0.5)
    return qkv, config, plain, choose_critical(estimate.attention, config, kept=None), estimate


def sdpa(inputs):
    return F.scaled_dot_product_attention(*inputs[0])


def sparse_alone(inputs):
    return attend_blocks(*inputs[0], inputs[3], block_size=(BLOCK, BLOCK))


def choice_alone(inputs):
    """What comes before and beside the sparse attention: estimate, lists, scales and residuals."""
    qkv, config, *_ = inputs
    estimate = estimate_attention(*qkv, config, text=None, scale=WIDTH**-0.5)
    lists = choose_critical(estimate.attention, config, kept=None)
    return rectification(estimate, lists, config)


def plain_sparse(inputs):
    return rectified_sparse_attention(*inputs[0], inputs[2])[0]


def ours(inputs):
    return rectified_sparse_attention(*inputs[0], inputs[1])[0]


RIVALS = {
    "sdpa": sdpa,
    "sparse alone": sparse_alone,
    "choice and rectification alone": choice_alone,
    "not rectified": plain_sparse,
    "ours": ours,
}


def check(out):
    """Ours is nearer to dense attention than what is not rectified."""
    errors = {name: (out[name] - out["sdpa"]).norm() / out["sdpa"].norm() for name in ("not rectified", "ours")}
    assert errors["ours"] < errors["not rectified"]


def work(inputs):
    return inputs[0][0].shape[2], "tokens"
