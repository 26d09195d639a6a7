"""sparse_attention against compiled FlexAttention with the same mask; FlexAttention's compilation is not counted."""

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from shared_kernels import sparse_attention

CLAIM = (
    "At 8,192 tokens, sparse_attention takes at most 1.15 times as long as compiled FlexAttention with the same mask, "
    "and does not take a minute to compile."
)
SWEEP = {"tokens": (8_192,), "blocks": ((64, 0.1), (128, 0.094))}
BASELINE = "flex, same mask"
TARGET = 1 / 1.15
THREADS = 2
SLOW = True
HEADS, WIDTH = 4, 64


def make(tokens, blocks):
    """Blocks are their size and the share that is listed."""
    size, density = blocks
    query, key, value = (torch.randn(1, HEADS, tokens, WIDTH) for _ in range(3))
    number = tokens // size
    order = torch.rand(1, HEADS, number, number).argsort(-1).to(torch.int32)
    counts = torch.full((1, HEADS, number), round(density * number), dtype=torch.int32)
    # every listed block is full, there is nothing to mask inside; the compiler takes one tensor for one argument only
    mask = BlockMask.from_kv_blocks(torch.zeros_like(counts), order.clone(), counts, order, BLOCK_SIZE=size)
    return (query, key, value), order[..., : round(density * number)].contiguous(), size, mask


_compiled = torch.compile(flex_attention)


def flex(inputs):
    tensors, _, _, mask = inputs
    with torch.no_grad():
        return _compiled(*tensors, block_mask=mask)


def ours(inputs):
    tensors, indices, size, _ = inputs
    return sparse_attention(*tensors, indices, block_size=(size, size))


RIVALS = {"flex, same mask": flex, "ours": ours}


def check(out):
    assert (out["ours"] - out["flex, same mask"]).norm() <= 1e-5 * out["flex, same mask"].norm()
