"""sparse_attention over a twentieth of the blocks, in float32 and bfloat16, against SDPA over all keys."""

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from shared_kernels import backend, sparse_attention

CLAIM = (
    "At 8,192 tokens and a twentieth of the blocks of 64 x 64, sparse_attention is at least 13 times faster than SDPA "
    "over all keys, and 16 times in bfloat16."
)
SWEEP = {"tokens": (2_048, 8_192), "dtype": ("float32", "bfloat16")}
BASELINE = "sdpa, all keys"
TARGETS = ((13, {"tokens": (8_192,), "dtype": ("float32",)}), (16, {"tokens": (8_192,), "dtype": ("bfloat16",)}))
THREADS = 2
BLOCK, HEADS, WIDTH = 64, 4, 64
CHECKED = 256  # queries that are compared with the definition


def make(tokens, dtype):
    tensors = [torch.randn(1, HEADS, tokens, WIDTH).to(getattr(torch, dtype)) for _ in range(3)]
    blocks = tokens // BLOCK
    order = torch.rand(1, HEADS, blocks, blocks).argsort(-1)
    return tensors, order[..., : round(0.047 * blocks)].to(torch.int32)


def ours(inputs):
    tensors, indices = inputs
    return sparse_attention(*tensors, indices, block_size=(BLOCK, BLOCK)), inputs


RIVALS = {"sdpa, all keys": lambda inputs: sdpa(*inputs[0]), "ours": ours}


def check(out):
    mine, ((query, key, value), indices) = out["ours"]
    wide = [t.double() for t in (query[:, :, :CHECKED], key, value)]
    with backend("reference"):
        expected = sparse_attention(*wide, indices[:, :, : CHECKED // BLOCK], block_size=(BLOCK, BLOCK))
    allowed = {torch.float32: 1e-5, torch.bfloat16: 4e-3}[mine.dtype]
    assert (mine[:, :, :CHECKED] - expected).norm() <= allowed * expected.norm()
