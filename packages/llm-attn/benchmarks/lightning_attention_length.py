"""The cost of a token in Lightning Attention, whatever the length of its sequence."""

import torch

from llm_attn.lightning_attention import continue_lightning_attention, decay_slopes, lightning_attention

CLAIM = "A token of Lightning Attention costs the same, within 15 %, in sequences of 1,024 and of 65,536."
SWEEP = {"tokens": (1_024, 4_096, 16_384, 65_536)}
BASELINE = "sequences of 1,024"
TARGET = 0.85
THREADS = 2
ROUNDS = 5
HEADS, WIDTH, SHORT = 4, 64, 1_024


def make(tokens):
    return *(torch.randn(1, HEADS, tokens, WIDTH) for _ in range(3)), decay_slopes(HEADS)


def short(inputs):
    """The same tokens as sequences that know nothing of each other."""
    *tensors, slopes = inputs
    parts = zip(*(t.split(SHORT, dim=2) for t in tensors), strict=True)
    return [lightning_attention(*part, slopes) for part in parts]


def ours(inputs):
    return lightning_attention(*inputs), inputs


RIVALS = {"sequences of 1,024": short, "ours": ours}


def check(out):
    """Joined by their states, the short sequences are the long one."""
    whole, (*tensors, slopes) = out["ours"]
    state, parts = None, []
    for part in zip(*(t.split(SHORT, dim=2) for t in tensors), strict=True):
        one, state = continue_lightning_attention(*part, slopes, state)
        parts.append(one)
    assert (torch.cat(parts, 2) - whole).norm() <= 1e-5 * whole.norm()
    assert torch.equal(out["sequences of 1,024"][0], whole[:, :, :SHORT])


def work(inputs):
    return inputs[0].shape[2], "tokens"
