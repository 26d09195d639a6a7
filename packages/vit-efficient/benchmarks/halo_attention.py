"""Our halo attention against timm's on the same weights."""

import torch
from timm.layers.halo_attn import HaloAttn

from vit_efficient.halonet import TimmHaloAttention

CLAIM = "On maps of 256 x 256, halo attention is at least 3 times as fast as timm's HaloAttn."
SWEEP = {"map side": (32, 64, 128, 256)}
BASELINE = "timm"
TARGET = 3
TARGET_AT = {"map side": (256,)}
THREADS = 2
ROUNDS = 5
CHANNELS, HEADS, BLOCK, HALO = 64, 4, 8, 3


def make(**sizes):
    """A layer of the first stage of HaloNet."""
    side = sizes["map side"]
    host = HaloAttn(CHANNELS, num_heads=HEADS, block_size=BLOCK, halo_size=HALO).eval()
    return host, TimmHaloAttention(host, "zero"), torch.randn(1, CHANNELS, side, side)


def run(which):
    def forward(inputs):
        with torch.inference_mode():
            return inputs[which](inputs[2])

    return forward


RIVALS = {"timm": run(0), "ours": run(1)}


def check(out):
    """The same map."""
    torch.testing.assert_close(out["ours"], out["timm"], atol=1e-4, rtol=1e-4)
