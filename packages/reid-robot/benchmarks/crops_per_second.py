"""Pictures of people to embeddings, scaling included: PyTorch, ONNX Runtime, ONNX Runtime in eight bits."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from reid_robot.network import ReidConfig, ReidNet
from reid_robot.onnx_export import OnnxEmbedder, TorchEmbedder, export_onnx, quantize_onnx
from reid_robot.small import load_small
from reid_robot.walkers import WalkerConfig, draw_walkers

CLAIM = "The small network embeds at least 60 crops a second on two cores in ONNX Runtime."
SWEEP = {"network": ("small, 64 x 32", "mobilenetv3_small_100, 256 x 128")}
BASELINE = "torch, eager"
TARGET_RATE = 60
TARGET_AT = {"network": ("small, 64 x 32",)}
THREADS = 2
DEVICES = ("cpu",)


def make(network):
    """32 pictures of 180 x 80 pixels."""
    people = draw_walkers(4, WalkerConfig(size=(180, 80), images_per_camera=4), seed=3)
    pictures = [np.ascontiguousarray(p) for p in people.images.permute(0, 2, 3, 1).numpy()]
    if network.startswith("small"):
        net = load_small()
    else:
        net = ReidNet(ReidConfig(backbone="mobilenetv3_small_100", where="s3.last,s4.last,s5.last")).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export_onnx(net, path)
        crops = torch.nn.functional.interpolate(people.images.float(), net.config.input_size).to(torch.uint8).numpy()
        quantize_onnx(path, Path(folder) / "int8.onnx", (crops[i : i + 8] for i in range(0, 32, 8)))
        float32, int8 = (OnnxEmbedder(p, threads=THREADS) for p in (path, Path(folder) / "int8.onnx"))
    return {"torch, eager": TorchEmbedder(net), "ours": float32, "8 bits": int8}, pictures


RIVALS = {
    "torch, eager": lambda s: s[0]["torch, eager"](s[1]),
    "ours": lambda s: s[0]["ours"](s[1]),
    "8 bits": lambda s: s[0]["8 bits"](s[1]),
}


def check(out):
    """The same embeddings."""
    assert np.abs(out["ours"] - out["torch, eager"]).max() < 1e-4


def price(out):
    """Of eight bits: the smallest cosine to the float embedding."""
    return {"smallest cosine, 8 bits": float((out["8 bits"] * out["ours"]).sum(1).min())}


def work(inputs):
    """Crops."""
    return len(inputs[1]), "crops"
