"""What an object looks like, as one vector: OAT's small CNN over crops, a timm backbone, or given features.

The paper's CNN (Fang et al., ECCV 2024, arXiv:2407.13335, figure 2):

    crop 3 x 150 x 93, scaled to [0, 1]
    conv 5x5 to 16, ReLU, max-pool 5      (16, 29, 17)
    conv 3x3 to 32, ReLU, max-pool 3      (32, 9, 5)
    Linear 1440 -> 256

For crops of varying size the last pooling becomes a spatial pyramid: maxima over 1, 4, 16, 64 bins (2, 3 or 4 levels).

Decided here: all crops are min-max scaled to [0, 1] on their own (the published book-cover script leaves one data set
unscaled); a crop of a single colour becomes 0; a timm backbone is followed by a linear layer and starts from random
weights unless the caller loads others.

Shapes: B scenes, P objects, V features; h, w pixels of a crop.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gaze_oat.errors import ScanpathProblem
from gaze_oat.layouts import Layout

if TYPE_CHECKING:
    from PIL import Image

_CHANNELS = (16, 32)


class CropEncoder(nn.Module):
    """The paper's CNN; with `pyramid_levels` it takes crops of any size from 13 x 13 pixels."""

    def __init__(self, width: int, *, crop_size: tuple[int, int], pyramid_levels: int | None) -> None:
        super().__init__()
        self.pyramid_levels = pyramid_levels
        self.crop_size = crop_size
        self.conv1 = nn.Conv2d(3, _CHANNELS[0], 5)
        self.conv2 = nn.Conv2d(_CHANNELS[0], _CHANNELS[1], 3)
        if pyramid_levels is None:
            height, breadth = (((side - 4) // 5 - 2) // 3 for side in crop_size)
            if min(height, breadth) < 1:
                raise ScanpathProblem(
                    f"crop_size {crop_size} is too small for two poolings: take at least 29 x 29 pixels"
                )
            bins = height * breadth
        else:
            bins = sum(4**level for level in range(pyramid_levels))
        self.linear = nn.Linear(bins * _CHANNELS[1], width)

    def forward(self, crops: Float[Tensor, "N 3 h w"]) -> Float[Tensor, "N V"]:
        """One vector a crop. Raises ScanpathProblem for another crop size than the one it was built for."""
        if self.pyramid_levels is None and tuple(crops.shape[-2:]) != tuple(self.crop_size):
            raise ScanpathProblem(
                f"crops must be {self.crop_size} pixels (h, w), got {tuple(crops.shape[-2:])}: resize them"
            )
        maps = nn.functional.max_pool2d(self.conv1(crops).relu(), 5)
        maps = self.conv2(maps).relu()
        if self.pyramid_levels is None:
            return self.linear(nn.functional.max_pool2d(maps, 3).flatten(1))
        levels = [nn.functional.adaptive_max_pool2d(maps, 2**level).flatten(1) for level in range(self.pyramid_levels)]
        return self.linear(torch.cat(levels, 1))


class TimmEncoder(nn.Module):
    """A timm backbone with pooled features, and a linear layer onto the model's width."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise ImportError(f"crop_encoder='{name}' is a timm model: install gaze-oat[timm]") from None
        if not timm.is_model(name):
            raise ScanpathProblem(f"crop_encoder must be 'cnn', 'features' or a timm model, got '{name}'")
        self.backbone = timm.create_model(name, pretrained=False, num_classes=0)
        self.linear = nn.Linear(self.backbone.num_features, width)

    def forward(self, crops: Float[Tensor, "N 3 h w"]) -> Float[Tensor, "N V"]:
        """One vector a crop."""
        return self.linear(self.backbone(crops))


def crop_objects(image: "Image.Image", layout: Layout, *, crop_size: tuple[int, int]) -> Float[Tensor, "P 3 h w"]:
    """Each object's box out of the image, resized (bilinear), min-max scaled to [0, 1] by itself.

    Args:
        image: picture of the layout's size, or of any other: boxes are scaled with it.
        crop_size: height and width of a crop, pixels; OATConfig.crop_size.
    """
    from PIL import Image

    picture = image.convert("RGB")
    scale = np.array([picture.width / layout.width, picture.height / layout.height] * 2)
    crops = []
    for x0, y0, x1, y1 in (layout.boxes * scale).tolist():
        # cut first: a resize with a box looks over the box's edge
        piece = picture.crop((math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)))
        piece = piece.resize(crop_size[::-1], Image.Resampling.BILINEAR)
        crops.append(torch.from_numpy(np.array(piece)).permute(2, 0, 1).float())
    return scale_crops(torch.stack(crops))


def scale_crops(crops: Float[Tensor, "P 3 h w"]) -> Float[Tensor, "P 3 h w"]:
    """(crop - min) / (max - min) of each crop; 0 where a crop has one colour."""
    low, high = crops.amin((1, 2, 3), keepdim=True), crops.amax((1, 2, 3), keepdim=True)
    return (crops - low) / (high - low).clamp(min=1e-12)


def position_features(layout: Layout, target: int) -> Float[Tensor, "P 2"]:
    """Objects without pictures (crop_encoder='features', feature_size=2): a constant, and whether it is the target."""
    features = torch.zeros(len(layout), 2)
    features[:, 0] = 1.0
    features[target, 1] = 1.0
    return features
