"""Global linear attention of L2ViT against global softmax attention, as maps grow."""

import torch

from vit_efficient.l2vit import ReLULinearAttention

CLAIM = "Global attention in L2ViT's third stage grows linearly with pixels, up to images of 2,048 x 2,048."
SWEEP = {"image side": (224, 512, 1_024, 2_048)}
BASELINE = "softmax"
TARGET = 10
TARGET_AT = {"image side": (2_048,)}
THREADS = 2
ROUNDS = 3
DIM, HEADS, STRIDE = 384, 12, 16


def make(**sizes):
    """A map at stride 16."""
    side = sizes["image side"] // STRIDE
    return ReLULinearAttention(DIM, HEADS).eval(), torch.randn(1, side, side, DIM)


def run_softmax(inputs):
    layer, x = inputs
    with torch.inference_mode():
        query, key, value = layer.qkv(x).flatten(1, 2).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return layer.proj(out.transpose(1, 2).flatten(2).view_as(x))


def run_ours(inputs):
    layer, x = inputs
    with torch.inference_mode():
        return layer(x)


RIVALS = {"softmax": run_softmax, "ours": run_ours}


def check(out):
    """Both give a map; they are different attentions."""
    assert out["ours"].shape == out["softmax"].shape
    assert bool(out["ours"].isfinite().all())


def work(inputs):
    """Positions of the map."""
    return inputs[1].shape[1] * inputs[1].shape[2], "positions"
