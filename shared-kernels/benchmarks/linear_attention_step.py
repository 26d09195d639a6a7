"""Decoding one token: a step of linear attention against SDPA over all cached keys and values."""

import torch
from torch.nn import functional as F

from shared_kernels import linear_attention, linear_attention_step

CLAIM = "A step of linear attention takes the same time after any number of tokens, and less than SDPA from 2,048 on."
SWEEP = {"tokens": (512, 2_048, 8_192, 32_768)}
BASELINE = "sdpa over the cache"
TARGET = 1.0
TARGET_AT = {"tokens": (2_048, 8_192, 32_768)}
THREADS = 2
HEADS, WIDTH = 8, 64


def make(tokens):
    """A token, what came before it as cached keys and values, and the state they leave."""
    key, value = (torch.randn(1, HEADS, tokens, WIDTH) for _ in range(2))
    token = [torch.randn(1, HEADS, 1, WIDTH) for _ in range(3)]
    log_decay = -(2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS))
    _, state = linear_attention(key, key, value, log_decay=log_decay, causal=True, return_state=True)
    return token, (key, value), state, state.clone(), log_decay


def sdpa(inputs):
    (query, *_), cached, *_ = inputs
    return F.scaled_dot_product_attention(query, *cached)


def ours(inputs):
    token, _, _, state, log_decay = inputs
    return linear_attention_step(*token, state, log_decay=log_decay), inputs


RIVALS = {"sdpa over the cache": sdpa, "ours": ours}


def check(out):
    """The step is the last token of the sequence."""
    mine, (token, _, state, after, log_decay) = out["ours"]
    expected, last = linear_attention(*token, log_decay=log_decay, causal=True, initial_state=state, return_state=True)
    assert (mine - expected).norm() <= 1e-5 * expected.norm()
    assert (after - last).norm() <= 1e-5 * last.norm()
