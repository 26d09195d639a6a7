"""attention_received against attention that returns its weights, and against one pass of dense attention."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from shared_kernels import attention_received

CLAIM = "What every key receives costs at most 0.8 of one scaled_dot_product_attention from 4,096 tokens on."
SWEEP = {"tokens": (1_024, 4_096), "rows": ("all", "last 64")}
BASELINE = "sdpa"
TARGET = 1.25
TARGET_AT = {"tokens": (4_096,), "rows": ("all",)}
THREADS = 2
HEADS, HEAD_DIM = 4, 64


def make(tokens, rows):
    query, key, value = (torch.randn(1, HEADS, tokens, HEAD_DIM) for _ in range(3))
    return query, key, value, None if rows == "all" else slice(-64, None)


def eager(inputs):
    """The map, and its sum over rows."""
    query, key, _, rows = inputs
    query = query if rows is None else query[:, :, rows]
    return torch.softmax(query @ key.mT * HEAD_DIM**-0.5, -1).sum(2)


RIVALS = {
    "sdpa": lambda inputs: scaled_dot_product_attention(*inputs[:3]),  # the pass that a model pays for anyway
    "eager": eager,
    "ours": lambda inputs: attention_received(*inputs[:2], rows=inputs[3]),
}


def check(out):
    assert (out["ours"] - out["eager"]).norm() <= 1e-5 * out["eager"].norm()
