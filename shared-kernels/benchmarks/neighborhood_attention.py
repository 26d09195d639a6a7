"""neighborhood_attention against gathering every query's neighbours, and against SDPA over all of the map."""

import torch
from torch.nn import functional as F

from shared_kernels import neighborhood_attention

CLAIM = "7 x 7 neighbourhoods cost a sixteenth of gathering them."
SWEEP = {"pixels": (16, 32, 56), "kernel_size": (7, 13)}
BASELINE = "gather"
TARGET = 16
TARGET_AT = {"pixels": (32, 56), "kernel_size": (7,)}
THREADS = 2
HEADS, WIDTH = 4, 64


def make(pixels, kernel_size):
    return *(torch.randn(1, HEADS, pixels, pixels, WIDTH) for _ in range(3)), kernel_size


def gather(inputs):
    query, key, value, k = inputs
    pixels = query.shape[2]
    near = (torch.arange(pixels, device=query.device) - k // 2).clamp(0, pixels - k)[:, None]
    near = near + torch.arange(k, device=query.device)
    keys, values = (t[:, :, near[:, None, :, None], near[:, None, :]].flatten(4, 5) for t in (key, value))
    scores = (query[..., None, :] @ keys.mT) * WIDTH**-0.5
    return (scores.softmax(-1) @ values).squeeze(-2)


def sdpa_all(inputs):
    """More than is asked for: what a map would cost if it attended everywhere."""
    query, key, value = (t.flatten(2, 3) for t in inputs[:3])
    return F.scaled_dot_product_attention(query, key, value)


def ours(inputs):
    query, key, value, k = inputs
    return neighborhood_attention(query, key, value, kernel_size=k)


RIVALS = {"gather": gather, "sdpa, all of the map": sdpa_all, "ours": ours}


def check(out):
    assert (out["ours"] - out["gather"]).norm() <= 1e-5 * out["gather"].norm()
