# /// script
# requires-python = ">=3.11"
# dependencies = ["reid-robot", "rich", "typer"]
#
# [tool.uv]
# override-dependencies = [
#     "opencv-python ; sys_platform == 'never'",
#     "opencv-python-headless ; sys_platform == 'never'",
# ]
#
# [tool.uv.sources]
# reid-robot = { path = "../packages/reid-robot", editable = true }
# shared-kernels = { path = "../shared-kernels", editable = true }
# ///
"""Follow people through a video, and know them again when they come back: detect, track, re-identify, draw.

Without a video it makes a film of generated people: uv run apps/follow_person.py
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:  # the package is imported inside the command, so that --help answers at once
    import numpy as np

    from reid_robot import Followed, Gallery

stdout, stderr = Console(), Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
Detect = Callable[[int, "np.ndarray"], "np.ndarray"]
Embed = Callable[[Any], Any]


class Problem(Exception):
    """A mistake of the user's, told in one sentence."""


@app.command()
def main(
    video: Annotated[Path | None, typer.Argument(help="What OpenCV can read; a generated film without it.")] = None,
    boxes: Annotated[
        Path | None,
        typer.Option(help="CSV of boxes (frame from 0, x, y, width, height) of a detector of yours, in place of HOG."),
    ] = None,
    enrol: Annotated[
        list[str] | None, typer.Option(help="NAME=PICTURE, a person cut out; may be given often, also for one name.")
    ] = None,
    gallery: Annotated[Path | None, typer.Option(help="Known people, from --save-gallery of an earlier run.")] = None,
    save_gallery: Annotated[Path | None, typer.Option(help="Where to keep who was seen and who is known.")] = None,
    model: Annotated[Path | None, typer.Option(help="Checkpoint of a ReidNet; the small network without it.")] = None,
    overlap_only: Annotated[bool, typer.Option("--overlap-only", help="Track without re-identification.")] = False,
    look: Annotated[float, typer.Option(help="Cosine distance up to which a person is known again.")] = 0.25,
    enlarge: Annotated[float, typer.Option(help="HOG finds people from about 96 / this pixels of height.")] = 1.5,
    limit: Annotated[int | None, typer.Option(help="Frames at most.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for followed.avi and sightings.csv.")] = Path("followed"),
) -> None:
    """Find people in a video, follow them, and recognise them after they were hidden or away.

    [bold]followed.avi[/bold] shows a box and a number for each person, a name for those
    who are enrolled; [bold]sightings.csv[/bold] has the same as a table. A person who is
    lost (behind a pillar, out of the picture) and comes back gets the old
    number, by looks: a small network turns each box into 128 numbers that are
    alike for one person. It was trained on generated people only; with --model
    use one trained on pictures like yours.

    A generated film, to see what comes out:
      uv run apps/follow_person.py

    OpenCV's HOG detector (slow, upright people only), or any detector's boxes:
      uv run apps/follow_person.py street.avi --out street
      uv run apps/follow_person.py street.avi --boxes yolo.csv

    Call Anna by her name, keep all others too, know them in the next video:
      uv run apps/follow_person.py hall.mp4 --enrol anna=anna.png
        --save-gallery known.safetensors
      uv run apps/follow_person.py later.mp4 --gallery known.safetensors
    """
    from reid_robot import follow, write_sightings

    embed, threshold = (None, look) if overlap_only else (_embedder(model), look)
    known = _gallery(gallery, enrol or [], embed, threshold)
    frames, detect, rate, total = _source(video, boxes, enlarge, limit)
    with _progress(total) as on_frame, _explained():
        from reid_robot import TrackerConfig

        result = follow(
            frames, detect, embed=embed, config=TrackerConfig(look=look), gallery=known, out=out / "followed.avi",
            rate=rate, on_frame=on_frame,
        )  # fmt: skip
        write_sightings(out / "sightings.csv", result.sightings)
    if save_gallery is not None:
        _keep(save_gallery, known, result, video, boxes, embed, threshold, limit)
    _report(result, out, video)


def _embedder(model: Path | None) -> Embed:
    from reid_robot import ReidNet, TorchEmbedder, load_small

    with _explained():
        return TorchEmbedder(load_small() if model is None else ReidNet.load(model))


def _gallery(path: Path | None, enrol: list[str], embed: Embed | None, threshold: float) -> "Gallery | None":
    from reid_robot import Gallery, GalleryConfig, enrol_pictures

    if path is None and not enrol:
        return None
    if embed is None:
        raise Problem("--gallery and --enrol need re-identification: leave --overlap-only out")
    with _explained():
        known = Gallery(GalleryConfig(threshold=threshold)) if path is None else Gallery.load(path)
        known.config = replace(known.config, threshold=threshold)
        for one in enrol:
            name, equals, picture = one.partition("=")
            if not equals or not name or not picture:
                raise Problem(f"--enrol must be NAME=PICTURE, got '{one}'")
            if not Path(picture).exists():
                raise Problem(f"no picture of {name} at '{picture}'")
            enrol_pictures(known, name, [Path(picture)], embed)
    return known


def _source(
    video: Path | None, boxes: Path | None, enlarge: float, limit: int | None
) -> tuple[Iterable[Any], Detect, float, int | None]:
    """Frames, detector, frames per second, number of frames if known."""
    import numpy as np

    from reid_robot import ClipConfig, HogConfig, HogDetector, film, frame_rate, read_boxes, read_frames

    if limit is not None and limit < 1:
        raise Problem(f"--limit must be at least 1, got {limit}")
    nobody = np.zeros((0, 4))
    with _explained():
        given = None if boxes is None else read_boxes(boxes)
        if video is None:
            clip = list(film(ClipConfig(frames=min(limit or 120, 120))))
            made = given if given is not None else {n: frame.boxes for n, frame in enumerate(clip)}
            return (frame.image for frame in clip), lambda n, _: made.get(n, nobody), 10.0, len(clip)
        if not video.exists():
            raise Problem(f"no video at '{video}'")
        frames, rate = read_frames(video, limit=limit), frame_rate(video)
        if given is not None:
            return frames, lambda n, _: given.get(n, nobody), rate, limit
        hog = HogDetector(HogConfig(enlarge=enlarge))
        return frames, lambda _, frame: hog(frame)[0], rate, limit


def _keep(
    path: Path, known: "Gallery | None", result: "Followed", video: Path | None, boxes: Path | None,
    embed: Embed | None, threshold: float, limit: int | None,
) -> None:  # fmt: skip
    """Everybody seen clearly becomes a person of the gallery, a few boxes of each; those with names keep them."""
    from reid_robot import Gallery, GalleryConfig, enrol_from_video

    if embed is None:
        raise Problem("--save-gallery needs re-identification: leave --overlap-only out")
    kept = Gallery(GalleryConfig(threshold=threshold)) if known is None else known
    wanted: dict[int, list[Any]] = {}
    seen: dict[str, int] = {}
    for one in result.sightings:
        name = one.name or f"person {one.number}"
        if seen.get(name, 0) % 8 == 0:  # every eighth: poses differ by then
            wanted.setdefault(one.frame, []).append((name, one.box))
        seen[name] = seen.get(name, 0) + 1
    frames, *_ = _source(video, boxes, 1.5, limit)
    with _explained():
        for number, frame in enumerate(frames):
            for name, box in wanted.get(number, []):
                enrol_from_video(kept, name, frame, box, embed)
        kept.save(path)
    typer.echo(path)


class _progress:  # noqa: N801 - used as a function
    """A bar for `on_frame`, on stderr."""

    def __init__(self, total: int | None) -> None:
        columns = (TextColumn("frame {task.completed}"), BarColumn(), TimeElapsedColumn())
        self.bar, self.total = Progress(*columns, console=stderr), total

    def __enter__(self) -> Callable[[int], None]:
        self.bar.start()
        task = self.bar.add_task("", total=self.total)
        return lambda number: self.bar.update(task, completed=number)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


class _explained:  # noqa: N801 - used as a function
    """Turns what the package says to the user into a Problem."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, problem: BaseException | None, _: Any) -> None:
        if isinstance(problem, ValueError | FileNotFoundError):
            raise Problem(str(problem)) from problem


def _report(result: "Followed", out: Path, video: Path | None) -> None:
    stages = result.stages
    whole = max(result.seconds, 1e-9)
    table = Table(title=f"{'A generated film' if video is None else video.name}", title_justify="left")
    for column in ("frames", "frames/s", "people", "known again", "detect", "track and embed", "draw and write"):
        table.add_column(column, justify="right")
    shares = [f"{stages[stage] / whole:.0%}" for stage in ("detect", "track", "draw")]
    numbers = [str(result.frames), f"{result.per_second:.1f}", str(result.people), str(result.returned)]
    table.add_row(*numbers, *shares)
    stdout.print(table)
    if not result.people:
        stdout.print("Nobody was found. People below 64 pixels? Try --enlarge 2, or --boxes of another detector.")
    for file in ("followed.avi", "sightings.csv"):
        typer.echo(out / file)


if __name__ == "__main__":
    try:
        app()
    except Problem as problem:  # the user's to mend; others keep their traceback
        stderr.print(str(problem), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
