"""Where the objects of a scene are: boxes in pixels, and the grid cell that each of them stands in.

OAT attends over objects and knows their places as (row, column) of a grid. On a shelf the grid is given; for
free-standing boxes row and column are those of the quantised box centre.

Fang et al., "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", ECCV 2024, arXiv:2407.13335.
Decided here: a fixation belongs to the box that contains it, of several to the one whose centre is nearest, and outside
all boxes to the nearest centre; boxes are half-open, so a point on a common edge belongs to the right or lower one;
without rows and columns given, `from_boxes` takes cells of the median box size, but never more than 64 a side.

Shapes: P objects, N points; x to the right, y down, pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gaze_oat.errors import ScanpathProblem

_MOST_CELLS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Objects of one scene. ScanpathProblem for boxes without area or outside the image, and cells outside the grid."""

    boxes: Float[np.ndarray, "P 4"]
    """x0, y0, x1, y1 of each object, pixels."""
    cells: Int[np.ndarray, "P 2"]
    """Row and column of each object, from 0."""
    rows: int
    """Rows of the grid."""
    cols: int
    """Columns of the grid."""
    width: float
    """Image width, pixels."""
    height: float
    """Image height, pixels."""

    def __post_init__(self) -> None:
        if not (self.width > 0 and self.height > 0):
            raise ScanpathProblem(
                f"an image of {self.width} x {self.height} pixels has no area: give its width and height"
            )
        check_boxes(self.boxes, self.width, self.height)
        if self.cells.shape != (len(self.boxes), 2):
            raise ScanpathProblem(f"cells must be ({len(self.boxes)}, 2), one for each box, got {self.cells.shape}")
        if (self.cells < 0).any() or (self.cells >= (self.rows, self.cols)).any():
            raise ScanpathProblem(
                f"cells must lie in a grid of {self.rows} x {self.cols}, got up to {self.cells.max(0)}"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def centres(self) -> Float[np.ndarray, "P 2"]:
        """x and y of the box centres, pixels."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    @classmethod
    def grid(cls, rows: int, cols: int, *, width: float, height: float) -> "Layout":
        """rows x cols equal boxes that fill the image, numbered row by row."""
        if rows < 1 or cols < 1:
            raise ScanpathProblem(f"a grid needs at least one row and one column, got {rows} x {cols}")
        row, col = (part.ravel() for part in np.mgrid[:rows, :cols])
        scale = np.array([width / cols, height / rows, width / cols, height / rows])
        boxes = np.stack([col, row, col + 1, row + 1], 1) * scale
        return cls(boxes=boxes, cells=np.stack([row, col], 1), rows=rows, cols=cols, width=width, height=height)

    @classmethod
    def from_boxes(
        cls,
        boxes: Float[np.ndarray, "P 4"] | Sequence[Sequence[float]],
        *,
        width: float,
        height: float,
        rows: int | None = None,
        cols: int | None = None,
    ) -> "Layout":
        """Boxes (x0, y0, x1, y1) anywhere in the image; row and column are the quantised box centre."""
        array = np.asarray(boxes, float).reshape(-1, 4) if len(boxes) else np.zeros((0, 4))
        check_boxes(array, width, height)
        size = np.median(array[:, 2:] - array[:, :2], 0)
        cols = min(_MOST_CELLS, max(1, round(width / size[0]))) if cols is None else cols
        rows = min(_MOST_CELLS, max(1, round(height / size[1]))) if rows is None else rows
        centres = (array[:, :2] + array[:, 2:]) / 2
        cells = to_cells(centres, width=width, height=height, rows=rows, cols=cols)
        return cls(boxes=array, cells=cells, rows=rows, cols=cols, width=width, height=height)

    def mirrored(self) -> "Layout":
        """The same objects seen in a mirror: left and right exchanged, numbers kept."""
        boxes = self.boxes.copy()
        boxes[:, [0, 2]] = self.width - boxes[:, [2, 0]]
        cells = self.cells.copy()
        cells[:, 1] = self.cols - 1 - cells[:, 1]
        return Layout(boxes=boxes, cells=cells, rows=self.rows, cols=self.cols, width=self.width, height=self.height)

    def object_at(self, points: Float[np.ndarray, "N 2"]) -> Int[np.ndarray, "N"]:
        """The object that each point (x, y) belongs to: the box around it, or else the nearest centre."""
        points = np.asarray(points, float).reshape(-1, 2)
        x, y = points[:, :1], points[:, 1:]
        inside = (x >= self.boxes[:, 0]) & (x < self.boxes[:, 2]) & (y >= self.boxes[:, 1]) & (y < self.boxes[:, 3])
        distance = np.hypot(x - self.centres[:, 0], y - self.centres[:, 1])
        within = np.where(inside, distance, np.inf)
        return np.where(inside.any(1), within.argmin(1), distance.argmin(1))


def check_boxes(boxes: Float[np.ndarray, "P 4"], width: float, height: float) -> None:
    """ScanpathProblem for no box at all, and for boxes that are not finite, have no area or leave the image."""
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) == 0:
        raise ScanpathProblem(f"boxes must be (P, 4) with at least one object, got {boxes.shape}")
    wrong = ~np.isfinite(boxes).all(1) | (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])
    if wrong.any():
        first = int(wrong.argmax())
        raise ScanpathProblem(
            f"box {first} is {boxes[first].tolist()}, which has no area: give x0, y0, x1, y1 with x0 < x1 and y0 < y1"
        )
    slack = 1e-6 * max(width, height)
    outside = (boxes < -slack).any(1) | (boxes[:, 2] > width + slack) | (boxes[:, 3] > height + slack)
    if outside.any():
        first = int(outside.argmax())
        raise ScanpathProblem(
            f"box {first} is {boxes[first].tolist()}, outside the image of {width:g} x {height:g} pixels: "
            "clip it or leave it out"
        )


def to_cells(
    points: Float[np.ndarray, "N 2"], *, width: float, height: float, rows: int, cols: int
) -> Int[np.ndarray, "N 2"]:
    """Row and column of the equal cell that holds each point (x, y); points on the far edge fall into the last cell."""
    points = np.asarray(points, float).reshape(-1, 2)
    row = np.floor(points[:, 1] / height * rows).astype(int).clip(0, rows - 1)
    col = np.floor(points[:, 0] / width * cols).astype(int).clip(0, cols - 1)
    return np.stack([row, col], 1)
