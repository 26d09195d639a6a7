"""Top-k attention, sparse_attention with a list of single keys for every query, against SDPA and the usual ways."""

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from shared_kernels import sparse_attention

CLAIM = "With 64 of 4,096 keys for each query, sparse_attention is at least 12 times faster than SDPA over all keys."
SWEEP = {"tokens": (1_024, 4_096), "keys": (64, 256)}
BASELINE = "sdpa, all keys"
TARGET = 12
TARGET_AT = {"tokens": (4_096,), "keys": (64,)}
THREADS = 2
ROUNDS = 5
HEADS, WIDTH = 4, 64


def make(tokens, keys):
    query, key, value = (torch.randn(1, HEADS, tokens, WIDTH) for _ in range(3))
    order = torch.rand(1, HEADS, tokens, tokens).argsort(-1)
    return query, key, value, order[..., :keys].to(torch.int32)


def masked(inputs):
    """SDPA with a mask, as top-k attention is usually written."""
    query, key, value, indices = inputs
    mask = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool).scatter_(-1, indices.long(), True)
    return sdpa(query, key, value, attn_mask=mask)


def gathered(inputs):
    """Keys and values of every query gathered, then products of matrices with one row."""
    query, key, value, indices = inputs
    rows = indices.long().flatten(2)[..., None].expand(-1, -1, -1, WIDTH)
    chosen_key, chosen_value = (t.gather(2, rows).view(*indices.shape, WIDTH) for t in (key, value))
    scores = (query[..., None, :] @ chosen_key.mT) * WIDTH**-0.5
    return (scores.softmax(-1) @ chosen_value).squeeze(-2)


RIVALS = {
    "sdpa, all keys": lambda inputs: sdpa(*inputs[:3]),
    "sdpa, mask": masked,
    "gather and bmm": gathered,
    "ours": lambda inputs: sparse_attention(*inputs, block_size=(1, 1)),
}


def check(out):
    for name in ("sdpa, mask", "gather and bmm"):
        assert (out["ours"] - out[name]).norm() <= 1e-5 * out[name].norm(), name
