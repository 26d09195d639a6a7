"""The cost of a token, whatever the length of its sequence."""

import torch

from shared_kernels import linear_attention

CLAIM = "A token of causal linear attention costs the same, within 10 %, in sequences of 2,048 and of 131,072."
SWEEP = {"tokens": (2_048, 8_192, 32_768, 131_072)}
BASELINE = "sequences of 2,048"
TARGET = 0.9
THREADS = 2
ROUNDS = 5
HEADS, WIDTH, SHORT = 4, 64, 2_048


def make(tokens):
    query, key, value = (torch.randn(1, HEADS, tokens, WIDTH) for _ in range(3))
    return query, key, value, -(2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS))


def short(inputs):
    """The same tokens as sequences that know nothing of each other."""
    *tensors, log_decay = inputs
    parts = zip(*(t.split(SHORT, dim=2) for t in tensors), strict=True)
    return [linear_attention(*part, log_decay=log_decay, causal=True) for part in parts]


def ours(inputs):
    *tensors, log_decay = inputs
    return linear_attention(*tensors, log_decay=log_decay, causal=True), inputs


RIVALS = {"sequences of 2,048": short, "ours": ours}


def check(out):
    """Joined by their states, the short sequences are the long one."""
    whole, (query, key, value, log_decay) = out["ours"]
    state, parts = None, []
    for q, k, v in zip(*(t.split(SHORT, dim=2) for t in (query, key, value)), strict=True):
        part, state = linear_attention(
            q, k, v, log_decay=log_decay, causal=True, initial_state=state, return_state=True
        )
        parts.append(part)
    assert (torch.cat(parts, 2) - whole).norm() <= 1e-5 * whole.norm()
    assert torch.equal(out["sequences of 2,048"][0], whole[:, :, :SHORT])


def work(inputs):
    return inputs[0].shape[2], "tokens"
