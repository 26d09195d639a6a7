"""Sparsifiner's attention, predictor and lists included, against SDPA over all keys.

The predictor's rank stays at 64, as many as there are blocks at 4,096 patches: a map of so many blocks has no more.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vit_efficient.sparsifiner import SparsifinerConfig, apply_sparsifiner, sparse_layers
from vit_efficient.testing import tiny_vit

CLAIM = (
    "At 4,096 patches and a tenth of the blocks, block-wise Sparsifiner with its predictor is at least 1.5 times as "
    "fast as SDPA over all keys."
)
SWEEP = {"patches": (256, 1_024, 2_304, 4_096), "granularity": ("block", "token")}
BASELINE = "sdpa, all keys"
TARGETS = ((1.5, {"patches": (4_096,), "granularity": ("block",)}),)
THREADS = 2
ROUNDS = 3
RANK = 64


def make(patches, granularity):
    """A predictor for that many patches and random queries, keys and values of DeiT-S."""
    side = int(patches**0.5)
    model = tiny_vit(img_size=side * 8, embed_dim=384, num_heads=6, depth=1)
    config = SparsifinerConfig(keep_rate=0.1, granularity=granularity, reduce_tokens=max(6, patches // RANK))
    apply_sparsifiner(model, config)
    return sparse_layers(model)[0], [torch.randn(1, 6, patches + 1, 64) for _ in range(3)]


def run_dense(inputs):
    with torch.inference_mode():
        return sdpa(*inputs[1])


def run_sparse(inputs):
    layer, tensors = inputs
    with torch.inference_mode():
        return layer.attend(*tensors), layer, tensors


RIVALS = {"sdpa, all keys": run_dense, "ours": run_sparse}


def check(out):
    """The class row is dense; the first patch's row is softmax over its list."""
    mine, layer, (query, key, value) = out["ours"]
    torch.testing.assert_close(mine[:, :, 0], out["sdpa, all keys"][:, :, 0], atol=1e-4, rtol=1e-4)
    indices, counts, (size, _) = layer.lists(query, key)
    held = indices[0, 0, 0, : None if counts is None else counts[0, 0, 0]].long()
    keys = (held[:, None] * size + torch.arange(size)).flatten()
    keys = keys[keys < key.shape[2]]
    row = 0 if size > 1 else 1
    wanted = sdpa(query[:1, :1, row : row + 1], key[:1, :1, keys], value[:1, :1, keys])
    if size == 1:
        torch.testing.assert_close(mine[:1, :1, 1:2], wanted, atol=1e-4, rtol=1e-4)
