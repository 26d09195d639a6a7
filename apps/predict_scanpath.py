# /// script
# requires-python = ">=3.11"
# dependencies = ["gaze-oat", "rich", "typer"]
#
# [tool.uv.sources]
# gaze-oat = { path = "../packages/gaze-oat", editable = true }
# shared-kernels = { path = "../shared-kernels", editable = true }
# ///
"""See where people would look while they search a picture for one of its objects: numbered scanpath, film, table.

Without arguments it draws a shelf and searches that: uv run apps/predict_scanpath.py
"""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

if TYPE_CHECKING:  # the package is imported inside the command, so that --help answers at once
    from PIL.Image import Image

    from gaze_oat import Layout, ScanpathData

stdout, stderr = Console(), Console(stderr=True)
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"max_content_width": 110},
)
DEMO_TARGET, DEMO_SEED = 14, 7


class Problem(Exception):
    """A mistake of the user's, told in one sentence."""


def _demo(out: Path) -> tuple[Path, Path]:
    """Draws a shelf, and writes picture and boxes as a user would have them."""
    import numpy as np

    from gaze_oat import save_png
    from gaze_oat.scanpaths import write_text
    from gaze_oat.synthetic import draw_shelf

    shelf = draw_shelf(3, 9, rng=np.random.default_rng(DEMO_SEED), cell=(180, 130))
    save_png(shelf.image, out / "shelf.png")
    write_text(out / "boxes.json", json.dumps({"boxes": shelf.layout.boxes.tolist()}) + "\n")
    return out / "shelf.png", out / "boxes.json"


def _layout(picture: "Image", boxes: Path | None, grid: str | None) -> "Layout":
    from gaze_oat import Layout
    from gaze_oat.cli import pair_of
    from gaze_oat.jobs import read_boxes

    if boxes is not None:
        return read_boxes(boxes, width=picture.width, height=picture.height)
    return Layout.grid(*pair_of(grid or "", "--grid"), width=picture.width, height=picture.height)


def _run(
    image: Path | None, boxes: Path | None, grid: str | None, target: int | None, model: Path | None,
    samples: int, temperature: float, seed: int, out: Path,
) -> None:  # fmt: skip
    from gaze_oat import OATModel, save_gif, save_png, write_csv
    from gaze_oat.baselines import objects_of
    from gaze_oat.drawing import draw_scanpath
    from gaze_oat.jobs import SEARCHER, most_typical, open_image, simulate

    if image is None:
        if boxes is not None or grid is not None:
            raise Problem("--boxes and --grid say where objects are in IMAGE: give the image too, or none of them")
        image, boxes = _demo(out)
        target = DEMO_TARGET if target is None else target
        stderr.print("no image given: this is a drawn shelf of 27 products")
    elif (boxes is None) == (grid is None):
        raise Problem("say where the objects are with either --boxes FILE or --grid ROWSxCOLS")
    if target is None:
        raise Problem("say what is searched for with --target NUMBER: objects count from 0 in the order of the boxes")
    if model is None:
        stderr.print("no --model: the searcher was learnt from simulated search, not from people (--help says more)")
    picture = open_image(image)
    layout = _layout(picture, boxes, grid)
    data = simulate(
        OATModel.load(model or SEARCHER), picture, layout, target, name=image.name,
        num_samples=samples, temperature=temperature, seed=seed,
    )  # fmt: skip
    typical = objects_of(data)[most_typical(data)]
    write_csv(data, out / "scanpaths.csv")
    save_png(draw_scanpath(picture, layout, typical, target=target), out / "scanpath.png")
    save_gif(picture, layout, typical, out / "scanpath.gif", target=target)
    _report(data, typical.tolist(), target, out)


def _report(data: "ScanpathData", typical: list[int], target: int, out: Path) -> None:
    paths = [path.objects.tolist() for path in data if path.objects is not None]
    found = sum(path[-1] == target for path in paths) / len(paths)
    lengths = sorted(len(path) for path in paths)
    seen = Counter(number for path in paths for number in set(path))
    table = Table("object", "looked at by", title="What is seen on the way")
    for number, count in seen.most_common(8):
        table.add_row(f"{number}{' (target)' if number == target else ''}", f"{count / len(paths):.0%}")
    stdout.print(table)
    stdout.print(f"typical path: {' > '.join(map(str, typical))}", soft_wrap=True)
    middle, late = lengths[len(lengths) // 2], lengths[int(0.9 * (len(lengths) - 1))]
    stdout.print(
        f"{len(paths)} searches: {found:.0%} end on the target, half by fixation {middle}, nine in ten by {late}"
    )
    stdout.print(f"scanpath.png, scanpath.gif and scanpaths.csv are in {out}", soft_wrap=True)


@app.command()
def main(
    image: Annotated[Path | None, typer.Argument(help="Picture of the scene. None: a drawn shelf.")] = None,
    boxes: Annotated[
        Path | None,
        typer.Option(help="Where objects are: JSON list of x0, y0, x1, y1 in pixels, COCO file or detections, or CSV."),
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="ROWSxCOLS of equal boxes that fill the picture, such as 3x9.")
    ] = None,
    target: Annotated[int | None, typer.Option(help="Object searched for, from 0 in the order of the boxes.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder written by `gaze-oat train` on scanpaths of people.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Searches to simulate; the picture shows the most typical.")] = 100,
    temperature: Annotated[float, typer.Option(help="Below 1 more typical searches, above 1 more varied ones.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws: the same seed, the same paths.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for scanpath.png, scanpath.gif and scanpaths.csv.")] = Path(
        "scanpath"
    ),
) -> None:
    """Predict how people search a picture for one of its objects, with OAT (arXiv:2407.13335).

    You need a [bold]picture[/bold], the [bold]boxes[/bold] of its objects (of a shelf plan,
    an annotation tool, or any detector), and the [bold]target[/bold], one of them.
    You get many simulated searches as CSV, and the one most like all the
    others as a picture with numbered fixations and as a film.

    A drawn shelf, a regular shelf, and boxes and a model of your own:

      uv run apps/predict_scanpath.py
      uv run apps/predict_scanpath.py shelf.jpg --grid 3x9 --target 17
      uv run apps/predict_scanpath.py desk.png --boxes boxes.json --target 4
        --model my-model

    The built-in model learnt from a simulated searcher (near objects first,
    guided by colour, seldom back). It shows what OAT does, not what your
    customers do: for that, train one on their scanpaths, [bold]gaze-oat train[/bold].
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=stderr)])
    from gaze_oat import ScanpathProblem

    try:
        _run(image, boxes, grid, target, model, samples, temperature, seed, out)
    except (Problem, ScanpathProblem) as problem:
        stderr.print(str(problem), style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
