"""Scanpaths as pictures: numbered fixations over the scene (PNG), and the same growing step by step (GIF).

Colours run from early (dark) to late (light), circles carry the fixation's number, the target is framed. Files are
written to a temporary name and renamed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gaze_oat.errors import ScanpathProblem
from gaze_oat.layouts import Layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TARGET, _EDGE = (214, 39, 40), (255, 255, 255)
_EARLY, _LATE = np.array([33, 60, 140]), np.array([245, 158, 40])
MILLISECONDS = 350


def draw_scanpath(
    image: Image.Image | None,
    layout: Layout,
    path: Sequence[int] | np.ndarray,
    *,
    target: int | None = None,
    longest_side: int = 1200,
) -> Image.Image:
    """The scene with numbered fixations at the objects' centres; without an image the boxes on grey."""
    canvas, scale = _canvas(image, layout, longest_side)
    draw = ImageDraw.Draw(canvas)
    if image is None:
        for box in layout.boxes * scale:
            draw.rectangle(box.tolist(), outline=(190, 190, 190), width=1)
    if target is not None:
        draw.rectangle((layout.boxes[target] * scale).tolist(), outline=_TARGET, width=max(3, longest_side // 300))
    points = _slots(layout, np.asarray(path, int)) * scale
    width = max(2, longest_side // 400)
    colours = [_colour(number, len(points)) for number in range(len(points))]
    for here, there, colour in zip(points[:-1], points[1:], colours[1:], strict=True):
        draw.line([tuple(here), tuple(there)], fill=_EDGE, width=width + 3)
        draw.line([tuple(here), tuple(there)], fill=colour, width=width)
    size = np.median(layout.boxes[:, 2:] - layout.boxes[:, :2]) * scale
    radius = float(np.clip(size / 5, 9, longest_side / 45))
    font = ImageFont.load_default(size=radius * 1.15)
    for number, (point, colour) in enumerate(zip(points, colours, strict=True), 1):
        x, y = point
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=_EDGE, width=2)
        draw.text((x, y), str(number), fill=_EDGE, anchor="mm", font=font)
    return canvas


def save_png(picture: Image.Image, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    picture.save(part, format="PNG")
    part.replace(path)


def save_gif(
    image: Image.Image | None,
    layout: Layout,
    path: Sequence[int] | np.ndarray,
    file: Path,
    *,
    target: int | None = None,
) -> None:
    """One frame a fixation; the last one stays for two seconds."""
    frames = [
        draw_scanpath(image, layout, path[: step + 1], target=target, longest_side=800).quantize(64)
        for step in range(len(path))
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    durations = [MILLISECONDS] * (len(frames) - 1) + [2000]
    frames[0].save(part, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    part.replace(file)


def plot_paths(
    axes: "Axes", layout: Layout, paths: Sequence[np.ndarray], *, target: int | None = None, title: str = ""
) -> None:
    """Several paths into one matplotlib panel, each in its colour; a dot where it starts, a cross where it ends."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    for box in layout.boxes:
        corner, size = (box[0], box[1]), (box[2] - box[0], box[3] - box[1])
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="0.85", linewidth=0.5))
    if target is not None:
        x0, y0, x1, y1 = layout.boxes[target]
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor="#d6272855", edgecolor="#d62728", zorder=1))
    for number, path in enumerate(paths):
        x, y = _spread(layout, np.asarray(path, int), seed=number).T
        colour = colormaps["tab10"](number % 10)
        axes.plot(x, y, "-", color=colour, linewidth=1.0, alpha=0.8, zorder=2)
        axes.plot(x[:1], y[:1], "o", color=colour, markersize=5, zorder=3)
        axes.plot(x[-1:], y[-1:], "X", color=colour, markeredgecolor="white", markersize=7, zorder=3)
    axes.set(xlim=(0, layout.width), ylim=(layout.height, 0), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9)


def _canvas(image: Image.Image | None, layout: Layout, longest_side: int) -> tuple[Image.Image, float]:
    if longest_side < 64:
        raise ScanpathProblem(f"longest_side must be at least 64 pixels, got {longest_side}")
    scale = longest_side / max(layout.width, layout.height)
    size = round(layout.width * scale), round(layout.height * scale)
    if image is None:
        return Image.new("RGB", size, (245, 245, 245)), scale
    return Image.blend(image.convert("RGB").resize(size), Image.new("RGB", size, (255, 255, 255)), 0.25), scale


def _colour(number: int, count: int) -> tuple[int, int, int]:
    share = number / max(1, count - 1)
    red, green, blue = (_EARLY + (_LATE - _EARLY) * share).astype(int).tolist()
    return red, green, blue


def _slots(layout: Layout, path: np.ndarray) -> np.ndarray:
    """Centres at the first look at an object, then places around it, so that no number covers another."""
    _check(layout, path)
    looks = np.array([np.count_nonzero(path[:step] == number) for step, number in enumerate(path)])
    around = np.array([[0, 0], [-1, -1], [1, 1], [1, -1], [-1, 1], [0, -1.2], [0, 1.2]]) * 0.26
    size = (layout.boxes[:, 2:] - layout.boxes[:, :2])[path]
    return layout.centres[path] + around[looks % len(around)] * size


def _check(layout: Layout, path: np.ndarray) -> None:
    if len(path) == 0 or path.min() < 0 or path.max() >= len(layout):
        raise ScanpathProblem(f"a path to draw needs objects 0 to {len(layout) - 1} and at least one")


def _spread(layout: Layout, path: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Centres, moved a little inside their boxes, so that fixations on one object do not cover each other."""
    _check(layout, path)
    size = (layout.boxes[:, 2:] - layout.boxes[:, :2])[path]
    moved = np.random.default_rng(seed).uniform(-0.28, 0.28, (len(path), 2))
    return layout.centres[path] + moved * size
