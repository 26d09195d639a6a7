"""What an attention block adds to the time of its backbone, one crop of 256 x 128, blocks after stages 2 to 4."""

import torch

from reid_robot.folding import fold_batch_norms
from reid_robot.network import ReidConfig, ReidNet

CLAIM = "Light attention adds at most 3 % to the time of the backbone; relation-aware attention adds far more."
SWEEP = {"backbone": ("resnet18", "resnet50")}
BASELINE = "plain"
TARGET = 1 / 1.03
HEAVY = ("se", "cbam", "nonlocal", "rga-sc")


def make(backbone):
    """The same backbone weights everywhere; light attention is the identity at first, whatever it costs."""
    crops, networks = torch.randn(1, 3, 256, 128), {}
    for name in ("plain", "ours", *HEAVY):
        torch.manual_seed(0)
        attention = {"plain": None, "ours": "light"}.get(name, name)
        net = ReidNet(ReidConfig(backbone=backbone, attention=attention))
        if name == "plain":
            weights = net.state_dict()
        else:
            net.load_state_dict(weights, strict=False)
        networks[name] = fold_batch_norms(net, crops)
    return networks, crops


def run(name):
    def forward(inputs):
        with torch.inference_mode():
            return inputs[0][name](inputs[1])

    return forward


RIVALS = {name: run(name) for name in ("plain", "ours", *HEAVY)}


def check(out):
    """Light and non-local attention start as the identity; the others do not."""
    assert torch.allclose(out["ours"], out["plain"], atol=1e-4)
    assert torch.allclose(out["nonlocal"], out["plain"], atol=1e-4)
    assert all(o.shape == out["plain"].shape and bool(o.isfinite().all()) for o in out.values())
