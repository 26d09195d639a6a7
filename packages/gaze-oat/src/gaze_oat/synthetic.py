"""Scenes and searchers that are made up: shelves of coloured products, a row-by-row reader, and a guided searcher.

They are for tests, for demonstrations, and for the built-in model, which may learn from no one's data. The guided
searcher moves as models of visual search say people do (Wolfe, "Guided Search 6.0", Psychonomic Bulletin & Review 28,
2021): to near objects, to objects that look like the target, seldom back, and it now and then overlooks the target.

    p(o) ~ exp(-distance / reach) * exp(guidance * similarity(o, target)) * (revisit if o was seen else 1)

Decided here: distances are in cells of the median box; similarity is 1 - distance of the mean colours / 255, at least
0; a share `refix` of fixations stays on the object.

Shapes: P objects.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw

from gaze_oat.errors import ScanpathProblem
from gaze_oat.layouts import Layout


@dataclass(frozen=True, kw_only=True, eq=False)
class Shelf:
    """A picture of products and where they stand."""

    image: Image.Image
    """RGB."""
    layout: Layout
    """One object a product."""
    colours: Int[np.ndarray, "P 3"]
    """Main colour of each product, 0 to 255."""


def draw_shelf(
    rows: int, cols: int, *, rng: np.random.Generator, cell: tuple[int, int] = (96, 64), kinds: int | None = None
) -> Shelf:
    """Products in a grid, each a package with a label and a cap.

    Args:
        rows, cols: of the shelf.
        rng: draws colours and shapes.
        cell: height and width of a cell, pixels.
        kinds: how many different products; None makes every product another.
    """
    if rows < 1 or cols < 1 or min(cell) < 16:
        raise ScanpathProblem(
            f"a shelf needs rows, columns and cells of at least 16 pixels, got {rows} x {cols} of {cell}"
        )
    height, width = cell
    count = rows * cols
    looks = rng.integers(30, 226, (count if kinds is None else kinds, 3))
    colours = looks[np.arange(count) if kinds is None else rng.integers(0, kinds, count)]
    image = Image.new("RGB", (cols * width, rows * height), (238, 234, 226))
    draw = ImageDraw.Draw(image)
    boxes = []
    for number, colour in enumerate(colours.tolist()):
        x, y = number % cols * width, number // cols * height
        inset, top = int(width * rng.uniform(0.1, 0.22)), 6 + int(height * rng.uniform(0.02, 0.15))
        box = (x + inset, y + top, x + width - inset, y + height - 6)
        draw.rounded_rectangle(box, radius=width // 10, fill=tuple(colour))
        middle = (box[1] + box[3]) // 2
        label = tuple(min(255, part + 90) for part in colour)
        draw.rectangle((box[0] + 3, middle - height // 10, box[2] - 3, middle + height // 8), fill=label)
        draw.rectangle((box[0] + width // 6, box[1] - 5, box[2] - width // 6, box[1]), fill=(70, 70, 70))
        boxes.append((box[0], box[1] - 5, box[2] + 1, box[3] + 1))
    for row in range(1, rows + 1):
        draw.rectangle((0, row * height - 5, cols * width, row * height - 1), fill=(150, 132, 110))
    layout = Layout.from_boxes(boxes, width=image.width, height=image.height, rows=rows, cols=cols)
    return Shelf(image=image, layout=layout, colours=colours)


def row_reader(target: int) -> Int[np.ndarray, "n"]:
    """Looks at every object in its order and stops at the target."""
    return np.arange(target + 1)


@dataclass(frozen=True, kw_only=True)
class GuidedSearcher:
    """How the guided searcher looks for things."""

    reach: float = 1.8
    """Distance over which the pull of an object falls to 1 / e, cells."""
    guidance: float = 2.5
    """How much likeness to the target draws the eyes."""
    revisit: float = 0.12
    """Pull of objects already seen, against new ones."""
    refix: float = 0.17
    """Share of fixations that stay on the object."""
    miss: float = 0.1
    """Probability of looking at the target without seeing it."""
    max_length: int = 60
    """Gives up after so many fixations."""

    def search(self, shelf: Shelf, target: int, *, rng: np.random.Generator) -> Int[np.ndarray, "n"]:
        """One path, from the object nearest the centre on."""
        layout, pull = shelf.layout, self._likeness(shelf, target)
        size = np.median(layout.boxes[:, 2:] - layout.boxes[:, :2], 0)
        centres = layout.centres / size
        here = np.array([layout.width, layout.height]) / 2 / size
        seen = np.zeros(len(layout), bool)
        path: list[int] = []
        while len(path) < self.max_length:
            if path and rng.random() < self.refix:
                path.append(path[-1])
            else:
                distance = np.hypot(*(centres - here).T)
                weight = np.exp(-distance / self.reach) * pull * np.where(seen, self.revisit, 1.0)
                if path:
                    weight[path[-1]] = 0.0
                path.append(int(rng.choice(len(layout), p=weight / weight.sum())) if weight.sum() > 0 else target)
            seen[path[-1]], here = True, centres[path[-1]]
            if path[-1] == target and rng.random() >= self.miss:
                break
        return np.array(path)

    def _likeness(self, shelf: Shelf, target: int) -> Float[np.ndarray, "P"]:
        away = np.linalg.norm(shelf.colours - shelf.colours[target], axis=1) / 255
        return np.exp(self.guidance * np.maximum(0.0, 1 - away))
