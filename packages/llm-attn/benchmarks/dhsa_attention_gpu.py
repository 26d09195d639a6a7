"""DHSA's lists of single keys on a GPU, in bfloat16: the kernel alone against the fastest dense SDPA."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from llm_attn.dhsa import listed_attention, select_keys, uniform_boundaries
from shared_kernels import sparse_attention

CLAIM = (
    "An eighth of 32,768 keys, chosen by DHSA one by one, is read at least 4 times as fast as FlashAttention reads all."
)
SWEEP = {"tokens": (4_096, 32_768)}
BASELINE = "dense flash"
TARGET = 4.0
TARGET_AT = {"tokens": (32_768,)}
DEVICES = ("cuda",)
BLOCK, CHECKED = 128, 256


def make(tokens):
    """Heads as in Llama-3.1-8B; chunks of 16 tokens."""
    query = torch.randn(1, 32, tokens, 128, dtype=torch.bfloat16)
    key, value = (torch.randn(1, 8, tokens, 128, dtype=torch.bfloat16) for _ in range(2))
    lists = select_keys(query, key, uniform_boundaries(1, tokens, 16, query.device), budget=tokens // 8)
    return query, key, value, lists


def dense(inputs):
    query, key, value, _ = inputs
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if query.is_cuda else SDPBackend.MATH):
        return sdpa(query, key, value, is_causal=True, enable_gqa=True)


def ours(inputs):
    query, key, value, lists = inputs
    return sparse_attention(query, key, value, *lists, block_size=(BLOCK, 1), causal=True), inputs


RIVALS = {"dense flash": dense, "ours": ours}


def check(out):
    mine, (query, key, value, lists) = out["ours"]
    blocks = CHECKED // BLOCK
    some = type(lists)(*(t[:, :, -blocks:] for t in lists))
    wide = [t.float() for t in (query[:, :, -CHECKED:], key, value)]
    expected = listed_attention(*wide, some, block_size=BLOCK)
    assert (mine[:, :, -CHECKED:] - expected).norm() <= 1e-2 * expected.norm()
