"""DHSA attention of a prompt, keys chosen and read, against causal SDPA; heads as in SmolLM2."""

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from llm_attn.dhsa import DHSAConfig, dhsa_attention, listed_attention, select_keys, uniform_boundaries

CLAIM = (
    "Reading 1,024 keys, DHSA attention with the selection is at least 5 times faster than causal SDPA at 16,384 "
    "tokens, and 2 times at 8,192."
)
SWEEP = {"tokens": (2_048, 8_192, 16_384), "block": (128, 256)}
BASELINE = "causal sdpa"
TARGET = 5.0
TARGET_AT = {"tokens": (16_384,)}
THREADS = 2
ROUNDS = 5
HEADS, KV_HEADS, WIDTH, CHUNK = 9, 3, 64, 16
CHECKED = 512  # queries that are compared with the definition


def make(tokens, block):
    """Random queries and keys; chunks of 16 tokens, as many as a predictor may make."""
    query = torch.randn(1, HEADS, tokens, WIDTH)
    key, value = (torch.randn(1, KV_HEADS, tokens, WIDTH) for _ in range(2))
    boundaries = uniform_boundaries(1, tokens, CHUNK, query.device)
    return query, key, value, boundaries, DHSAConfig(boundary="uniform", budget=1024, block_size=block)


def ours(inputs):
    with torch.no_grad():
        return dhsa_attention(*inputs), inputs


RIVALS = {
    "causal sdpa": lambda inputs: sdpa(*inputs[:3], is_causal=True, enable_gqa=True),
    "ours": ours,
}


def check(out):
    """Some queries in the middle against the definition over the same lists, the last ones against SDPA."""
    mine, (query, key, value, boundaries, config) = out["ours"]
    tail = config.instruction_tokens
    stop = query.shape[2] // 2
    lists = select_keys(
        query[:, :, :stop], key[:, :, :stop], boundaries, budget=config.budget, block_size=config.block_size,
        local_tokens=config.always_local,
    )  # fmt: skip
    blocks = CHECKED // config.block_size
    some = [t[:, :, -blocks:] for t in lists]
    expected = listed_attention(
        query[:, :, stop - CHECKED : stop], key[:, :, :stop], value[:, :, :stop], type(lists)(*some),
        block_size=config.block_size,
    )  # fmt: skip
    assert (mine[:, :, stop - CHECKED : stop] - expected).norm() <= 1e-5 * expected.norm()
    dense = out["causal sdpa"][:, :, -tail:]
    assert (mine[:, :, -tail:] - dense).norm() <= 1e-5 * dense.norm()
