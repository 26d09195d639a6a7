"""L2ViT-Tiny against Swin-T, images per second; and how its time grows with pixels."""

import timm
import torch

import vit_efficient  # noqa: F401 - registers the model

CLAIM = "l2vit_tiny takes at least as many images a second as swin_tiny at 224."
SWEEP = {"side": (224, 448, 896)}
BASELINE = "swin_tiny"
TARGET = 1
TARGET_AT = {"side": (224,)}
THREADS = 2
ROUNDS = 5


def make(side):
    """Random weights."""
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=side).eval()
    return swin, timm.create_model("l2vit_tiny").eval(), torch.randn(1, 3, side, side)


def run(which):
    def forward(inputs):
        with torch.inference_mode():
            return inputs[which](inputs[2])

    return forward


RIVALS = {"swin_tiny": run(0), "ours": run(1)}


def check(out):
    """Logits of the same shape."""
    assert out["ours"].shape == out["swin_tiny"].shape
    assert bool(out["ours"].isfinite().all())


def work(inputs):
    """Pixels."""
    return inputs[2].shape[-1] ** 2, "pixels"
