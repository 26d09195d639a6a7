"""A generated film of people who walk past each other, behind pillars, out of the picture and in again.

So that following can be tried, and tested, without a camera, and without anybody's picture: figures of walkers.py on a
street, with the true boxes and those that a detector might give (a little off, some missing, none of whom is hidden).
The light attention of Eisenbach et al. (arXiv:2302.14574) is judged on such re-appearances.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from reid_robot.walkers import Appearance, Pose, draw_appearance, paint_person


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """What is filmed."""

    people: int = 5
    """Who walk there."""
    frames: int = 120
    """At 10 per second."""
    size: tuple[int, int] = (288, 512)
    """Height and width of the film."""
    pillars: int = 2
    """That hide who walks behind."""
    miss: float = 0.05
    """Share of visible people whom the detector misses."""
    seed: int = 0
    """Of people, ways and detections."""

    def __post_init__(self) -> None:
        if self.people < 1 or self.frames < 1 or self.pillars < 0:
            raise ValueError(
                "people and frames must be positive, pillars not negative, got "
                f"{self.people}, {self.frames} and {self.pillars}"
            )
        if self.size[0] < 96 or self.size[1] < 96:
            raise ValueError(f"size must be at least 96 x 96, got {self.size[0]} x {self.size[1]}")
        if not 0 <= self.miss < 1:
            raise ValueError(f"miss must lie in [0, 1), got {self.miss}")


@dataclass(frozen=True)
class ClipFrame:
    """image: (H, W, 3) RGB. people, truth: numbers and boxes of those of whom at least half is seen. boxes:
    detections.
    """

    image: UInt8[np.ndarray, "H W 3"]
    people: tuple[int, ...]
    truth: Float[np.ndarray, "P 4"]
    boxes: Float[np.ndarray, "N 4"]


@dataclass(frozen=True)
class _Walk:
    appearance: Appearance
    start: float
    speed: float
    feet: float
    height: float
    phase: float

    def at(self, frame: int, width: float) -> tuple[float, int]:
        """Place of the centre and direction; at a distance outside the picture people turn round."""
        reach = width + 2 * self.height
        way = (self.start + self.speed * frame) % (2 * reach)
        return (way if way < reach else 2 * reach - way) - self.height, 1 if way < reach else -1


def film(config: ClipConfig = ClipConfig()) -> Iterator[ClipFrame]:
    """The frames, one after the other; the same config gives the same film."""
    height, width = config.size
    rng = np.random.default_rng((config.seed, 11))
    street, pillars = _street(config, rng)
    walks = sorted((_walk(config, person, rng) for person in range(config.people)), key=lambda w: w[1].feet)
    for frame in range(config.frames):
        image = street.copy()
        owner = np.full((height, width), -1)
        boxes = {}
        for person, walk in walks:
            boxes[person] = _paint(image, owner, person, walk, frame)
        for left, right in pillars:
            image[: int(0.93 * height), left:right] = (0.45, 0.44, 0.42)
            owner[: int(0.93 * height), left:right] = -1
        seen = {p: box for p, (box, area) in boxes.items() if area and (owner == p).sum() >= 0.5 * area}
        image += 0.012 * rng.standard_normal(image.shape)
        found = [
            box + rng.normal(0, 0.02, 4) * box[[2, 3, 2, 3]] for box in seen.values() if rng.random() >= config.miss
        ]
        yield ClipFrame(
            np.clip(255 * image, 0, 255).astype(np.uint8),
            tuple(seen),
            np.array(list(seen.values())).reshape(-1, 4),
            np.array(found).reshape(-1, 4),
        )


def _street(config: ClipConfig, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, int]]]:
    height, width = config.size
    street = np.empty((height, width, 3))
    street[:] = (0.62, 0.58, 0.52)
    street[int(0.45 * height) :] = (0.50, 0.51, 0.53)
    for _ in range(6):  # windows
        top, left = int(height * rng.uniform(0.03, 0.2)), int(width * rng.uniform(0, 0.9))
        street[top : top + height // 8, left : left + width // 12] = (0.3, 0.38, 0.45)
    street += 0.03 * cv2.resize(rng.standard_normal((height // 8, width // 8)), (width, height))[..., None]
    middle = [(i + 1) / (config.pillars + 1) for i in range(config.pillars)]
    return street, [(int(width * m - 0.025 * width), int(width * m + 0.035 * width)) for m in middle]


def _walk(config: ClipConfig, person: int, rng: np.random.Generator) -> tuple[int, _Walk]:
    height, width = config.size
    tall = height * float(rng.uniform(0.34, 0.46))
    return person, _Walk(
        appearance=draw_appearance(np.random.default_rng((config.seed, 12, person))),
        start=float(rng.uniform(0, 2 * (width + 2 * tall))),
        speed=width * float(rng.uniform(0.009, 0.016)),
        feet=height * float(rng.uniform(0.75, 0.95)),
        height=tall,
        phase=float(rng.uniform(0, 6)),
    )


def _paint(
    image: np.ndarray, owner: np.ndarray, person: int, walk: _Walk, frame: int
) -> tuple[Float[np.ndarray, "4"], int]:
    """Draws a person; their true box, and how many pixels of the whole person would be in the picture and beyond."""
    height, width = owner.shape
    centre, direction = walk.at(frame, width)
    size = (int(walk.height / 0.92), int(walk.height * 0.62))
    pose = Pose(phase=walk.phase + 0.75 * frame, facing=direction, height=0.92)
    colours, cover = paint_person(walk.appearance, pose, size)
    top, left = int(walk.feet - size[0]), int(centre - size[1] / 2)
    rows = slice(max(0, top), min(height, top + size[0]))
    columns = slice(max(0, left), min(width, left + size[1]))
    inside = (
        slice(rows.start - top, rows.stop - top),
        slice(columns.start - left, max(columns.start, columns.stop) - left),
    )
    ys, xs = np.nonzero(cover > 0.5)
    box = np.array([left + xs.min(), top + ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1], dtype=float)
    if columns.stop > columns.start and rows.stop > rows.start:
        alpha = cover[inside][..., None]
        image[rows, columns] += alpha * (colours[inside] - image[rows, columns])
        owner[rows, columns][cover[inside] > 0.5] = person
    return box, len(ys)
