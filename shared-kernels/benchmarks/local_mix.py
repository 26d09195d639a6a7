"""local_mix against a loop over offsets that shifts, enlarges, weighs and adds."""

import torch
from torch.nn import functional as F

from shared_kernels import local_mix

CLAIM = "UPLiFT's local attender on 384 channels runs 10 times as fast as the loop over its offsets."
SWEEP = {"cells": (16, 32, 64), "channels": (384,)}
BASELINE = "shift loop"
TARGET = 10
TARGET_AT = {"cells": (32, 64)}
THREADS = 2
FACTOR = 2
OFFSETS = (
    (-2, -2), (-2, 0), (-2, 2), (-1, -1), (-1, 0), (-1, 1), (0, -2), (0, -1), (0, 0),
    (0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, -2), (2, 0), (2, 2),
)  # fmt: skip


def make(cells, channels):
    value = torch.randn(1, channels, cells, cells)
    logits = torch.randn(1, len(OFFSETS), FACTOR * cells, FACTOR * cells)
    return value, value.contiguous(memory_format=torch.channels_last), logits


def shift_loop(inputs):
    value, _, logits = inputs
    weights, (h, w), out = logits.softmax(1), value.shape[2:], 0
    padded = F.pad(value, (2, 2, 2, 2), mode="replicate")
    for k, (dy, dx) in enumerate(OFFSETS):
        near = padded[:, :, 2 + dy : 2 + dy + h, 2 + dx : 2 + dx + w]
        out = out + weights[:, k : k + 1] * near.repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)
    return out


RIVALS = {
    "shift loop": shift_loop,
    "ours, channels first": lambda s: local_mix(s[0], s[2], OFFSETS, factor=FACTOR),
    "ours": lambda s: local_mix(s[1], s[2], OFFSETS, factor=FACTOR),
}


def check(out):
    for name in ("ours", "ours, channels first"):
        assert (out[name] - out["shift loop"]).norm() <= 1e-5 * out["shift loop"].norm(), name
