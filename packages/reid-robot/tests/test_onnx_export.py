"""Exported networks are the same networks, in float and in eight bits."""

import numpy as np
import pytest
import torch

from reid_robot.network import ReidConfig, ReidNet
from reid_robot.onnx_export import (
    OnnxEmbedder,
    TorchEmbedder,
    export_onnx,
    quantize_onnx,
    scale_pictures,
    worst_cosine,
)
from reid_robot.small import load_small
from reid_robot.timm_door import attention_blocks
from reid_robot.walkers import draw_walkers


@pytest.fixture(scope="module")
def crops():
    return draw_walkers(6, seed=9).images


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_onnx(load_small(), path)
    return path


def test_pixels_in_unit_vectors_out(exported, crops):
    net, embedder = load_small(), OnnxEmbedder(exported, threads=1)
    assert embedder.uint8
    for batch in (1, 3, 40):
        with torch.no_grad():
            expected = net(crops[:batch]).numpy()
        found = embedder.run(crops[:batch].numpy())
        assert np.abs(found - expected).max() < 1e-4
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5
    assert worst_cosine(net, embedder, crops) > 0.99999


def test_pictures_of_any_size(exported, crops):
    pictures = [c.permute(1, 2, 0).numpy() for c in crops[:3]] + [np.full((200, 90, 3), 7, np.uint8)]
    ours, theirs = OnnxEmbedder(exported, threads=1)(pictures), TorchEmbedder(load_small())(pictures)
    assert np.abs(ours - theirs).max() < 1e-4
    assert scale_pictures(pictures[:1], (64, 32))[0].tolist() == crops[0].tolist()


def test_eight_bits(exported, crops, tmp_path):
    quantize_onnx(exported, tmp_path / "small.onnx", (crops[i : i + 16].numpy() for i in range(0, 96, 16)))
    assert (tmp_path / "small.onnx").stat().st_size < 0.5 * exported.stat().st_size
    embedder = OnnxEmbedder(tmp_path / "small.onnx", threads=1)
    cosine = worst_cosine(load_small(), embedder, crops[::3])
    assert 0.9 < cosine < 0.999999, "close, and not the same network"


@pytest.mark.parametrize("block", ["rga-sc", "nonlocal"])
def test_heavy_blocks_too_and_normalisation_outside(block, crops, tmp_path):
    torch.manual_seed(0)
    net = ReidNet(
        ReidConfig(backbone="resnet18_reid_w16", attention=block, where="s3.last", input_size=(64, 32))
    ).eval()
    for parameter in (p for b in attention_blocks(net).values() for p in b.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    export_onnx(net, tmp_path / "net.onnx", input_type="float32")
    embedder = OnnxEmbedder(tmp_path / "net.onnx", threads=1)
    with torch.no_grad():
        expected = net(crops[:4]).numpy()
        normalised = ((crops[:4] / 255 - net.mean) / net.std).numpy()
    assert np.abs(embedder.run(normalised) - expected).max() < 1e-4
    with pytest.raises(ValueError, match="takes normalised floats"):
        embedder([np.zeros((64, 32, 3), np.uint8)])


def test_refused(tmp_path, exported):
    with pytest.raises(ValueError, match="input_type must be"):
        export_onnx(load_small(), tmp_path / "x.onnx", input_type="float16")
    with pytest.raises(FileNotFoundError, match="no network at"):
        OnnxEmbedder(tmp_path / "none.onnx")
    for bad in (np.zeros((0, 5, 3), np.uint8), np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3))):
        with pytest.raises(ValueError, match=r"picture 0 must be \(h, w, 3\) uint8"):
            OnnxEmbedder(exported, threads=1)([bad])
