"""Handwritten digits on cluttered canvases: a task on which most of an image does not matter, made from real digits.

One whole digit, scaled, turned and put anywhere, among fainter pieces of other digits on an uneven, noisy ground. Which
digit it is decides the class; which tokens show it is known, so that what a pruned model keeps can be judged. Canvases
are drawn anew for every epoch and are the same for the same generator.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Digits:
    """images: (N, 20, 20) or (N, 8, 8) in [0, 1], strokes bright. labels: (N,), 0 to 9."""

    images: Float[Tensor, "N s s"]
    labels: Int[Tensor, "N"]

    def split(self, test_share: float = 0.2) -> tuple["Digits", "Digits"]:
        """Training and test digits; the last share of each class is for testing."""
        test = torch.zeros_like(self.labels, dtype=torch.bool)
        for label in range(10):
            where = (self.labels == label).nonzero()[:, 0]
            test[where[len(where) - round(test_share * len(where)) :]] = True
        return Digits(self.images[~test], self.labels[~test]), Digits(self.images[test], self.labels[test])


def load_digits(path: Path | None = None) -> Digits:
    """OpenCV's 5,000 digits from its sample `digits.png`; without a path, scikit-learn's 1,797.

    Raises FileNotFoundError, and ValueError on a picture of another size.
    """
    if path is None:
        from sklearn.datasets import load_digits as packaged  # an optional dependency

        data = packaged()
        return Digits(torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target))
    if not path.exists():
        raise FileNotFoundError(f"no picture at {path}: give OpenCV's samples/data/digits.png, or nothing")
    sheet = np.asarray(Image.open(path).convert("L"), dtype=np.float32) / 255
    if sheet.shape != (1000, 2000):
        raise ValueError(f"{path} is {sheet.shape[1]} x {sheet.shape[0]}; OpenCV's digits.png is 2000 x 1000")
    cells = sheet.reshape(50, 20, 100, 20).transpose(0, 2, 1, 3).reshape(5000, 20, 20)
    return Digits(torch.from_numpy(cells.copy()), torch.arange(10).repeat_interleave(500))


@dataclass(frozen=True, kw_only=True)
class CanvasConfig:
    """How canvases look.

    size: of their sides in pixels. digit: smallest and largest side of the digit in pixels.
    pieces: of other digits, smaller and fainter. noise: standard deviation of the white noise.
    turn: largest angle in radians.
    """

    size: int = 112
    digit: tuple[int, int] = (36, 52)
    pieces: int = 6
    noise: float = 0.08
    turn: float = 0.25


@dataclass(frozen=True)
class Canvases:
    """A batch.

    images: (B, 1, size, size), about zero mean and unit range. labels: (B,).
    shows: (B, size, size), where the digit's box lies.
    """

    images: Float[Tensor, "B 1 s s"]
    labels: Int[Tensor, "B"]
    shows: Bool[Tensor, "B s s"]


def draw_canvases(
    digits: Digits, index: Int[Tensor, "B"], generator: torch.Generator, config: CanvasConfig = CanvasConfig()
) -> Canvases:
    """A canvas for each digit named by `index`."""
    B, size = index.shape[0], config.size
    side = torch.empty(B).uniform_(*config.digit, generator=generator)
    digit, shows = _place(digits.images[index], side, generator, config)
    canvas = _ground(B, size, generator)
    for _ in range(config.pieces):
        other = digits.images[torch.randint(len(digits.images), (B,), generator=generator)]
        piece, _ = _place(_half(other, generator), 0.75 * side, generator, config)
        canvas = torch.maximum(canvas, 0.6 * piece)
    canvas = torch.maximum(canvas, digit)
    canvas = canvas + config.noise * torch.randn(B, size, size, generator=generator)
    return Canvases((canvas[:, None] - 0.25) / 0.35, digits.labels[index], shows)


def _half(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with three of its quarters, or one half, blacked out."""
    s = images.shape[-1]
    across, down = torch.randint(2, (2, len(images)), generator=generator)
    kind = torch.randint(3, (len(images),), generator=generator)
    side = torch.arange(s)
    left = (side[None] < s // 2) == across[:, None].bool()
    top = (side[None] < s // 2) == down[:, None].bool()
    keep_columns, keep_rows = left | (kind == 0)[:, None], top | (kind == 1)[:, None]
    return images * keep_columns[:, None, :] * keep_rows[:, :, None]


def _place(images: Tensor, side: Tensor, generator: torch.Generator, config: CanvasConfig) -> tuple[Tensor, Tensor]:
    """Images scaled to `side`, turned, anywhere on the canvas; and which pixels their boxes cover."""
    B, size = len(images), config.size
    angle = torch.empty(B).uniform_(-config.turn, config.turn, generator=generator)
    reach = (size - side) / size
    centre = torch.empty(B, 2).uniform_(-1, 1, generator=generator) * reach[:, None]
    scale = size / side
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, sin, -sin, cos], 1).view(B, 2, 2)
    theta = torch.cat([rows, -(rows @ centre[..., None])], 2)
    grid = F.affine_grid(theta, [B, 1, size, size], align_corners=False)
    placed = F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
    return placed, (grid.abs() < 1).all(-1)


def _ground(batch: int, size: int, generator: torch.Generator) -> Tensor:
    coarse = torch.rand(batch, 1, 5, 5, generator=generator)
    return 0.35 * F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)[:, 0].clamp(0, 1)


def tokens_that_show(canvases: Canvases, patch: int, share: float = 0.3) -> Bool[Tensor, "B N"]:
    """Patches of which at least `share` lies in the digit's box."""
    covered = F.avg_pool2d(canvases.shows[:, None].float(), patch)
    return covered.flatten(1) >= share


def batches(num: int, size: int, generator: torch.Generator) -> list[Int[Tensor, "b"]]:
    """Indices 0 to num - 1 in random order, in batches of `size`; the last may be smaller."""
    order = torch.randperm(num, generator=generator)
    return [order[i * size : (i + 1) * size] for i in range(math.ceil(num / size))]
