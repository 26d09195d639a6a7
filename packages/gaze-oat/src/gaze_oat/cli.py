"""The command `gaze-oat`: simulate scanpaths, evaluate them against human ones, train OAT on your own.

Results go to stdout and files, progress and mistakes to stderr; exit code 2 is a mistake of the user's, told in one
sentence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

if TYPE_CHECKING:  # the package is imported inside the commands, so that --help answers at once
    from gaze_oat.training import EpochReport

stdout, stderr = Console(), Console(stderr=True)
app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode="rich", help=(
        "Where people look: object-level scanpaths (OAT), and every established scanpath metric."
    ),
)  # fmt: skip
Images = Annotated[
    Path | None, typer.Option(help="Folder with one image a scene. Without it objects are positions alone.")
]
Grid = Annotated[str | None, typer.Option(help="ROWSxCOLS of equal boxes in place of --boxes, such as 3x9.")]


@contextmanager
def _told() -> Iterator[None]:
    from gaze_oat.errors import ScanpathProblem

    try:
        yield
    except ScanpathProblem as problem:
        stderr.print(str(problem), style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def pair_of(text: str, option: str) -> tuple[int, int]:
    """'3x9' -> (3, 9); ScanpathProblem otherwise."""
    from gaze_oat.errors import ScanpathProblem

    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ScanpathProblem(f"{option} must be two numbers like 3x9, got '{text}'")
    return int(parts[0]), int(parts[1])


@app.command()
def simulate(
    image: Annotated[Path, typer.Argument(help="Picture of the scene.")],
    target: Annotated[int, typer.Option(help="Number of the object searched for, from 0, in the order of the boxes.")],
    boxes: Annotated[Path | None, typer.Option(help="Boxes: JSON list of [x0, y0, x1, y1], COCO file, or CSV.")] = None,
    grid: Grid = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder that `gaze-oat train` wrote. Default: simulated searcher.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Scanpaths to draw.")] = 100,
    temperature: Annotated[float, typer.Option(help="Below 1 more typical paths, above 1 more varied ones.")] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The one most probable path instead of samples.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    out: Annotated[Path, typer.Option(help="CSV of the scanpaths, one row a fixation.")] = Path("scanpaths.csv"),
) -> None:
    """Draw scanpaths of people who search a picture for one of its objects.

    Example: gaze-oat simulate shelf.png --boxes boxes.json --target 17 --samples 100 --out scanpaths.csv
    """
    with _told():
        from gaze_oat import jobs
        from gaze_oat.errors import ScanpathProblem
        from gaze_oat.layouts import Layout
        from gaze_oat.oat import OATModel
        from gaze_oat.scanpaths import write_csv

        if (boxes is None) == (grid is None):
            raise ScanpathProblem("say where the objects are with either --boxes FILE or --grid ROWSxCOLS")
        picture = jobs.open_image(image)
        if boxes is not None:
            layout = jobs.read_boxes(boxes, width=picture.width, height=picture.height)
        else:
            layout = Layout.grid(*pair_of(grid or "", "--grid"), width=picture.width, height=picture.height)
        if model is None:
            stderr.print(
                "no --model: these paths come from the built-in searcher, learnt from simulated search, not people"
            )
        data = jobs.simulate(
            OATModel.load(model or jobs.SEARCHER), picture, layout, target, name=image.name,
            num_samples=samples, temperature=temperature, greedy=greedy, seed=seed,
        )  # fmt: skip
        write_csv(data, out)
        stdout.print(
            f"{len(data)} scanpaths, {sum(map(len, data)) / len(data):.1f} fixations each on average, are in {out}"
        )


@app.command()
def evaluate(
    predicted: Annotated[Path, typer.Argument(help="Scanpaths of a model, CSV or JSON.")],
    human: Annotated[Path, typer.Argument(help="Scanpaths of people, CSV or JSON.")],
    metrics: Annotated[str, typer.Option(help="Any of ss, fed, scanmatch, multimatch, behaviour, steps, nss.")] = (
        "ss,fed,scanmatch,multimatch,behaviour"
    ),
    reduce: Annotated[
        str, typer.Option(help="Pairs of a scene: 'mean' of all, or 'best' of each predicted path.")
    ] = "mean",
    screen: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, where CSV files do not say.")] = None,
    scenes: Annotated[Path | None, typer.Option(help="COCO-like JSON of images and boxes, for CSV files.")] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap draws of scenes for 95 % intervals; 0 for none.")] = 1000,
    compat: Annotated[
        bool, typer.Option("--compat", help="MultiMatch pads short paths as OAT's evaluation does.")
    ] = False,
    drop_outside: Annotated[
        bool, typer.Option("--drop-outside", help="Leave out fixations outside the image.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
) -> None:
    """Score predicted scanpaths against human ones, with what two people score against each other beside it.

    Example: gaze-oat evaluate pred.csv human.csv --metrics ss,fed,multimatch
    """
    with _told():
        from gaze_oat import evaluation, jobs
        from gaze_oat.errors import ScanpathProblem
        from gaze_oat.scanpaths import write_text

        config = evaluation.EvaluationConfig(
            metrics=tuple(name.strip() for name in metrics.split(",") if name.strip()),
            resamples=resamples, compat=compat,
            reduce="best" if reduce == "best" else "mean",
        )  # fmt: skip
        if reduce not in ("mean", "best"):
            raise ScanpathProblem(f"--reduce must be mean or best, got '{reduce}'")
        size = None if screen is None else tuple(map(float, pair_of(screen, "--screen")))
        ours, people = (
            jobs.read_scanpaths(file, screen=size, scenes=scenes, drop_outside=drop_outside)  # type: ignore[arg-type]
            for file in (predicted, human)
        )
        table = evaluation.evaluate(ours, people, config)
        if len(people.subjects) > 1 and config.reduce == "mean":
            upper = evaluation.between_observers(people, config)[["metric", "value"]]
            table = table.merge(upper.rename(columns={"value": "between people"}), how="left", on="metric")
        if out is not None:
            write_text(out, table.to_csv(index=False))
        shown = Table(*table.columns)
        for row in table.itertuples(index=False):
            shown.add_row(str(row[0]), *(f"{value:.4f}" for value in row[1:]))
        stdout.print(shown)
        stdout.print(
            f"{len(ours)} predicted and {len(people)} human paths; pairs: every predicted with every human of a scene"
        )


@app.command()
def train(
    data: Annotated[
        Path, typer.Argument(help="Human scanpaths: COCO-like JSON with boxes, or the Amazon covers' JSON.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run and the model. A run that was stopped goes on.")],
    images: Images = None,
    width: Annotated[int, typer.Option(help="Width of the model; the paper's is 512, small data wants less.")] = 512,
    layers: Annotated[int, typer.Option(help="Layers of encoder and decoder each.")] = 4,
    backbone: Annotated[str, typer.Option(help="With --images: cnn, or the name of a timm model.")] = "cnn",
    epochs: Annotated[int, typer.Option(help="At most.")] = 500,
    batch: Annotated[int, typer.Option(help="Trials a step.")] = 20,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
    patience: Annotated[int, typer.Option(help="Epochs without a better validation figure before it stops.")] = 30,
    monitor: Annotated[
        str, typer.Option(help="Validation figure: delta (greedy paths) or nll (human paths).")
    ] = "delta",
    mirror: Annotated[bool, typer.Option("--mirror", help="Show scenes mirrored left to right as well.")] = False,
    offset_bias: Annotated[
        bool, typer.Option("--offset-bias", help="Learn a score for each step; helps on few paths.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of split, weights and order.")] = 1234,
) -> None:
    """Train OAT on human scanpaths: 80 % of the scenes, 10 % to stop early, 10 % held out for you.

    Example: gaze-oat train shelf.json --images shelf/ --out model
    """
    with _told():
        from gaze_oat import jobs
        from gaze_oat.oat import OATConfig
        from gaze_oat.training import TrainingConfig

        architecture = OATConfig(
            width=width, feedforward=width, encoder_layers=layers, decoder_layers=layers, offset_bias=offset_bias,
            crop_encoder="features" if images is None else backbone, feature_size=2 if images is None else 0,
        )  # fmt: skip
        settings = TrainingConfig(
            epochs=epochs, batch_size=batch, lr=lr, patience=patience, mirror=mirror, seed=seed,
            monitor=monitor,  # type: ignore[arg-type]
        )  # fmt: skip
        paths = jobs.read_scanpaths(data)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=stderr) as progress:
            task = progress.add_task("epochs", total=epochs)

            def on_epoch(report: "EpochReport") -> None:
                text = f"loss {report.loss:.3f}, {monitor} {report.score:.3f} (best {report.best:.3f})"
                progress.update(task, completed=report.epoch + 1, description=text)

            _, held_out = jobs.train(
                paths, out, images=images, model=architecture, training=settings, on_epoch=on_epoch
            )
        stdout.print(f"the model is in {out}; run.json there names the {len(held_out.scenes)} scenes it has not seen")


if __name__ == "__main__":
    app()
