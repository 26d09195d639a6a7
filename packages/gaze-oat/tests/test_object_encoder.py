"""Crops and their encoders."""

import numpy as np
import pytest
import torch
from PIL import Image

from gaze_oat import Layout, ScanpathProblem, crop_objects, position_features
from gaze_oat.object_encoder import CropEncoder, TimmEncoder, scale_crops


def test_crops_show_their_boxes() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:10, 20:40, 0] = 200
    pixels[12, 25] = (10, 20, 30)
    layout = Layout.from_boxes([[0, 0, 20, 10], [15, 0, 45, 10], [20, 10, 40, 20]], width=60, height=20)
    crops = crop_objects(Image.fromarray(pixels), layout, crop_size=(10, 30))
    assert crops.shape == (3, 3, 10, 30)
    assert (crops[0] == 0).all()
    assert crops[1, 0, 5, 15] == 1
    assert (crops[1, 1:] == 0).all()
    assert crops[1, 0, 5, [1, 28]].tolist() == [0, 0]
    assert crops[2].max() == 1
    halved = crop_objects(Image.fromarray(pixels).resize((30, 10)), layout, crop_size=(10, 30))
    assert halved[1, 0, 5, 15] > 0.95


def test_scaling_is_by_crop() -> None:
    crops = torch.tensor([[3.0, 7], [5, 5]]).reshape(2, 1, 1, 2)
    assert scale_crops(crops).flatten().tolist() == [0, 1, 0, 0]


def test_the_papers_cnn_has_its_sizes() -> None:
    encoder = CropEncoder(256, crop_size=(150, 93), pyramid_levels=None)
    assert encoder.linear.in_features == 1440
    assert sum(p.numel() for p in encoder.parameters()) == 1216 + 4640 + 1440 * 256 + 256
    assert encoder(torch.rand(2, 3, 150, 93)).shape == (2, 256)
    with pytest.raises(ScanpathProblem, match=r"crops must be \(150, 93\) pixels"):
        encoder(torch.rand(2, 3, 150, 94))
    with pytest.raises(ScanpathProblem, match="too small for two poolings"):
        CropEncoder(8, crop_size=(20, 93), pyramid_levels=None)


@pytest.mark.parametrize(("levels", "inputs"), [(2, 160), (3, 672), (4, 2720)])
def test_pyramids_take_any_size(levels: int, inputs: int) -> None:
    encoder = CropEncoder(16, crop_size=(150, 93), pyramid_levels=levels)
    assert encoder.linear.in_features == inputs
    for size in ((150, 93), (61, 77)):
        assert torch.isfinite(encoder(torch.rand(1, 3, *size))).all()


def test_timm_backbones() -> None:
    encoder = TimmEncoder("test_resnet", 16)
    assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, 16)
    with pytest.raises(ScanpathProblem, match="crop_encoder must be 'cnn', 'features' or a timm model, got 'nothing'"):
        TimmEncoder("nothing", 16)


def test_positions_alone() -> None:
    layout = Layout.grid(1, 3, width=3, height=1)
    assert position_features(layout, 2).tolist() == [[1, 0], [1, 0], [1, 1]]
