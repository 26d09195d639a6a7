"""Where people are in a frame: OpenCV's HOG detector, or boxes that another detector wrote to a CSV file.

HOG: histograms of oriented gradients in a window of 64 x 128 with a linear classifier (Dalal and Triggs, CVPR 2005), as
OpenCV ships it. Its windows have a margin around the person, which is taken off, since embeddings want the person.
Windows that overlap give way to the one with the highest score.

A CSV file of boxes has columns frame (from 0), x, y, width, height in pixels, and may have score; so a better detector
can run anywhere and its boxes be used here.
"""

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from reid_robot.tracking import overlaps

# shares of HOG's window that the person fills: 96 of 128 pixels in height, with a little room for stride and pose
_LEFT, _TOP, _WIDTH, _HEIGHT = 0.22, 0.1, 0.56, 0.8


class VideoProblem(ValueError):
    """A video or a file of boxes that cannot be used; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class HogConfig:
    """OpenCV's person detector."""

    enlarge: float = 1.5
    """Factor by which frames are enlarged first: people are found from about 96 / enlarge pixels of height on."""
    min_score: float = 0.2
    """Smallest distance from the classifier's plane."""
    max_overlap: float = 0.4
    """Boxes that overlap a better one by more give way."""
    stride: int = 8
    """Pixels between windows, a multiple of 8."""
    scale: float = 1.05
    """Between the levels of the pyramid."""

    def __post_init__(self) -> None:
        if self.enlarge <= 0 or self.scale <= 1:
            raise ValueError(f"enlarge must be positive and scale above 1, got {self.enlarge} and {self.scale}")
        if self.stride < 8 or self.stride % 8:
            raise ValueError(f"stride must be a positive multiple of 8, got {self.stride}")
        if not 0 < self.max_overlap <= 1:
            raise ValueError(f"max_overlap must lie in (0, 1], got {self.max_overlap}")


class HogDetector:
    """Called with a frame, (H, W, 3) RGB, it gives boxes (N, 4) and scores (N,), the best first."""

    def __init__(self, config: HogConfig = HogConfig()) -> None:
        self.config = config
        self._hog = cv2.HOGDescriptor()
        self._hog.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())  # type: ignore[attr-defined]

    def __call__(self, frame: UInt8[np.ndarray, "H W 3"]) -> tuple[Float[np.ndarray, "N 4"], Float[np.ndarray, "N"]]:
        """Nobody: arrays of length 0."""
        config = self.config
        size = (round(frame.shape[1] * config.enlarge), round(frame.shape[0] * config.enlarge))
        if size[0] < 64 or size[1] < 128:
            return np.zeros((0, 4)), np.zeros(0)  # no window fits
        enlarged = cv2.resize(frame[..., ::-1], size)
        windows, found = self._hog.detectMultiScale(
            enlarged,
            0.0,
            (config.stride,) * 2,
            (8, 8),
            config.scale,
            0.0,  # ungrouped: that is done below
        )
        scores = np.ravel(np.asarray(found, dtype=np.float64))
        if not len(scores):
            return np.zeros((0, 4)), np.zeros(0)
        x, y, w, h = (np.asarray(windows, dtype=np.float64) / config.enlarge).T
        boxes = np.stack([x + _LEFT * w, y + _TOP * h, _WIDTH * w, _HEIGHT * h], 1)
        kept = suppress(boxes, scores, min_score=config.min_score, max_overlap=config.max_overlap)
        return boxes[kept], scores[kept]


def suppress(
    boxes: Float[np.ndarray, "N 4"], scores: Float[np.ndarray, "N"], *, min_score: float, max_overlap: float
) -> np.ndarray:
    """Numbers of the boxes that stay, the best first: none overlaps a better one, or lies mostly within it."""
    kept: list[int] = []
    areas = boxes[:, 2:].prod(1)
    for i in np.argsort(-scores, kind="stable"):
        if scores[i] < min_score:
            break
        if kept:
            union = overlaps(boxes[i : i + 1], boxes[kept])[0]
            shared = union * (areas[i] + areas[kept]) / (1 + union)
            if (union > max_overlap).any() or (shared > 0.7 * np.minimum(areas[i], areas[kept])).any():
                continue
        kept.append(int(i))
    return np.array(kept, dtype=int)


def read_boxes(path: Path) -> dict[int, Float[np.ndarray, "N 4"]]:
    """Frame -> boxes. VideoProblem names the line of a value that is no number, not finite, or a box without area."""
    if not path.exists():
        raise VideoProblem(f"no file of boxes at '{path}'")
    wanted = ("frame", "x", "y", "width", "height")
    found: dict[int, list[list[float]]] = defaultdict(list)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in wanted if name not in (reader.fieldnames or ())]
        if missing:
            raise VideoProblem(f"'{path}' lacks the columns {', '.join(missing)}; it must have {', '.join(wanted)}")
        for number, row in enumerate(reader, 2):
            try:
                frame, *box = int(row["frame"]), *(float(row[name]) for name in wanted[1:])
            except (TypeError, ValueError):
                raise VideoProblem(f"line {number} of '{path}' holds something that is no number") from None
            if frame < 0 or not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
                raise VideoProblem(f"line {number} of '{path}': frame {frame} has a box with no area or place, {box}")
            found[frame].append(box)
    return {frame: np.array(boxes) for frame, boxes in found.items()}


def write_boxes(path: Path, boxes: dict[int, Float[np.ndarray, "N 4"]]) -> None:
    """What `read_boxes` reads."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("frame", "x", "y", "width", "height"))
        for frame in sorted(boxes):
            writer.writerows((frame, *(f"{v:.1f}" for v in box)) for box in boxes[frame])
    temporary.replace(path)
