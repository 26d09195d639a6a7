"""The core of token-wise Sparsifiner: attention over a list of keys for each query, the lists given, against SDPA."""

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from shared_kernels import sparse_attention

CLAIM = (
    "At 1,024 tokens and a tenth of the keys, attention over given lists is at least twice as fast as SDPA on a CPU."
)
SWEEP = {"tokens": (256, 1_024, 4_096)}
BASELINE = "sdpa, all keys"
TARGET = 2
TARGET_AT = {"tokens": (1_024,)}
THREADS = 2
ROUNDS = 5
DEVICES = ("cpu",)


def make(tokens):
    """Queries, keys and values of DeiT-S; for every query a tenth of the keys, drawn at random."""
    scores = torch.rand(1, 6, tokens, tokens)
    lists = scores.topk(-(-tokens // 10), -1, sorted=False).indices.int()
    return [torch.randn(1, 6, tokens, 64) for _ in range(3)], lists


def run_dense(inputs):
    with torch.inference_mode():
        return sdpa(*inputs[0])


def run_lists(inputs):
    tensors, lists = inputs
    with torch.inference_mode():
        return sparse_attention(*tensors, lists, block_size=(1, 1)), inputs


RIVALS = {"sdpa, all keys": run_dense, "ours": run_lists}


def check(out):
    """Rows of the first head are softmax over their lists."""
    mine, ((query, key, value), lists) = out["ours"]
    for row in (0, 7, mine.shape[2] - 1):
        keys = lists[0, 0, row].long()
        wanted = sdpa(query[:, :1, row : row + 1], key[:, :1, keys], value[:, :1, keys])
        torch.testing.assert_close(mine[:, :1, row : row + 1], wanted, atol=1e-4, rtol=1e-4)
