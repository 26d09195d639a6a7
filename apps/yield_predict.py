# /// script
# requires-python = ">=3.11"
# dependencies = ["geo-yield[hdf,stac]", "rich", "typer"]
#
# [tool.uv]
# override-dependencies = [
#     "opencv-python ; sys_platform == 'never'",
#     "opencv-python-headless ; sys_platform == 'never'",
# ]
#
# [tool.uv.sources]
# geo-yield = { path = "../packages/geo-yield", editable = true }
# shared-kernels = { path = "../shared-kernels", editable = true }
# ///
"""Predict crop yields from MODIS or Sentinel-2 images with DFYP, and see how far off the predictions are.

Without arguments everything runs on a simulated region, in a few minutes: uv run apps/yield_predict.py
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from geo_yield.errors import InputProblem

if TYPE_CHECKING:  # the rest of the package is imported inside the commands, so that --help answers at once
    import pandas as pd

    from geo_yield.simulator import SimulationConfig

stdout, stderr = Console(), Console(stderr=True)
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"max_content_width": 110},
)


class Sensor(StrEnum):
    modis = "modis"
    sentinel2 = "sentinel2"


class Quality(StrEnum):
    default = "default"
    none = "none"


class Engine(StrEnum):
    local = "local"
    ray = "ray"


class Protocol(StrEnum):
    leave_future_out = "leave-future-out"
    leave_one_year_out = "leave-one-year-out"
    spatial = "spatial"
    spatial_district = "spatial-district"


class Size(StrEnum):
    small = "small"
    paper = "paper"


class Past(StrEnum):
    residual = "residual"
    none = "none"


Histograms = Annotated[Path, typer.Option("--inputs", help="Histograms: the folder that 'prepare' wrote.")]
Yields = Annotated[Path, typer.Option(help="Table of past yields: NASS QuickStats CSV, or region_id,year,yield.")]
Regions = Annotated[Path, typer.Option(help="Polygons of counties or parcels: GeoPackage, GeoJSON, Shapefile.")]
IdColumn = Annotated[str | None, typer.Option(help="Column of --regions with the ids, if it is not told by its name.")]
Crop = Annotated[str | None, typer.Option(help="Crop, if the table of yields holds several.")]
Unit = Annotated[str | None, typer.Option(help="Unit of the result, e.g. bu/acre or t/ha (default: as in the table).")]
Years = Annotated[str | None, typer.Option("--years", "--year", help="Harvest years: 2015-2022 or 2019,2021.")]
Workers = Annotated[int | None, typer.Option(help="Processes (default: one per processor).")]
On = Annotated[Engine, typer.Option(help="'ray' runs on a Ray cluster, or starts one here.")]
Members = Annotated[int, typer.Option(help="Networks in the ensemble, each without some of the training rows.")]
Steps = Annotated[int, typer.Option(help="Training steps of each small network.")]
NetworkSize = Annotated[Size, typer.Option(help="'paper': the published network, for thousands of rows.")]
History = Annotated[Past, typer.Option(help="'residual': predict the difference to the region's own past.")]
Operators = Annotated[Path | None, typer.Option(help="Choice of operators that 'select-operator' wrote.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for everything the demonstration writes.")] = Path("yield_run"),
    counties: Annotated[str, typer.Option(help="Rows x columns of simulated counties.")] = "7x8",
    seasons: Annotated[int, typer.Option(help="Simulated seasons with images.")] = 8,
    members: Members = 4,
    steps: Steps = 300,
    seed: Seed = 5,
    engine: On = Engine.local,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more about what is read.")] = False,
) -> None:
    """Predict crop yields from MODIS or Sentinel-2 images with DFYP, and see how far off the predictions are.

    Without a command: the whole job on a small simulated region, with a map, a comparison of methods and a report.
    A run that was stopped goes on where it was.

    Example:  uv run apps/yield_predict.py --out yield_run
    """
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=stderr, show_path=False)])
    if context.invoked_subcommand is None:
        _demo(out, counties, seasons, members, steps, seed, engine)


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="New folder for imagery, counties.gpkg and yields.csv.")] = Path("region"),
    counties: Annotated[str, typer.Option(help="Rows x columns of counties.")] = "7x8",
    seasons: Annotated[int, typer.Option(help="Seasons with images.")] = 8,
    seed: Seed = 5,
) -> None:
    """Write a simulated region: MODIS files, county polygons and yields to try the other commands on.

    Example:  yield_predict.py simulate --out region
    """
    from geo_yield.simulator import simulate as simulate_region

    config = _region(counties, seasons)
    with _progress() as progress:
        task = progress.add_task("simulate seasons", total=seasons)
        region = simulate_region(out, seed=seed, config=config, on_season=lambda _: progress.advance(task))
    typer.echo(f"{region.imagery}\n{region.regions}\n{region.yields}")


@app.command()
def prepare(
    regions: Regions,
    years: Annotated[str, typer.Option("--years", "--year", help="Harvest years: 2015-2022 or 2019,2021.")],
    sensor: Annotated[Sensor, typer.Option(help="What the images are.")] = Sensor.modis,
    inputs: Annotated[list[Path] | None, typer.Option(help="Folder of images; repeat for several.")] = None,
    stack_first_year: Annotated[
        int | None, typer.Option(help="First year of Earth Engine exports, one file for all dates (use --qa none).")
    ] = None,
    stac: Annotated[Path | None, typer.Option(help="Instead of --inputs: a file of STAC items.")] = None,
    assets_root: Annotated[Path | None, typer.Option(help="Folder that the items' files were downloaded to.")] = None,
    mask: Annotated[str, typer.Option(help="Pixels that count, e.g. mcd12q1:12,14 or none (default: cropland).")] = "",
    mask_map: Annotated[Path | None, typer.Option(help="Land cover for --mask, if not among the inputs.")] = None,
    qa: Annotated[
        Quality, typer.Option(help="'none' keeps cloudy pixels, as the published pipelines do.")
    ] = Quality.default,
    offset: Annotated[
        float | None, typer.Option(help="Sentinel-2 without metadata: -1000 from baseline 04.00 on, 0 before.")
    ] = None,
    max_cloud: Annotated[float, typer.Option(help="Sentinel-2: leave out cloudier images, in per cent.")] = 100.0,
    id_column: IdColumn = None,
    out: Annotated[Path, typer.Option(help="Folder for one histogram file per year.")] = Path("histograms"),
    engine: On = Engine.local,
    workers: Workers = None,
) -> None:
    """Images to histograms: how many pixels of each region had which value, per band and date.

    Example:  yield_predict.py prepare --inputs modis/ --regions counties.gpkg --years 2015-2022 --out histograms

    Example:  yield_predict.py prepare --sensor sentinel2 --stac items.json --assets-root s2/ --regions parcels.gpkg
    --year 2023
    """
    from geo_yield.jobs import Images, prepare_files

    images = Images(
        sensor=sensor.value,
        years=_years(years),
        inputs=tuple(inputs or ()),
        stack_first_year=stack_first_year,
        stac=stac,
        assets_root=assets_root,
        mask=mask,
        mask_map=mask_map,
        qa=qa.value,
        offset=offset,
        max_cloud=max_cloud,
    )
    with _counting("read images") as count:
        files = prepare_files(
            images, regions, out, id_column=id_column, engine=engine.value, workers=workers, on_unit=count
        )
    typer.echo("\n".join(map(str, files)))


@app.command()
def train(
    inputs: Histograms,
    yields: Yields,
    years: Years = None,
    crop: Crop = None,
    unit: Unit = None,
    members: Members = 4,
    steps: Steps = 300,
    size: NetworkSize = Size.small,
    history: History = Past.residual,
    operators: Operators = None,
    seed: Seed = 0,
    workers: Workers = None,
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("model"),
) -> None:
    """Train an ensemble of DFYP networks with calibrated intervals. A stopped training goes on where it was.

    Example:  yield_predict.py train --inputs histograms --yields nass.csv --crop soybean --years 2015-2021 --out model
    """
    from geo_yield.jobs import Learning, join_files, train_files

    learning = Learning(
        size=size.value, steps=steps, members=members, history=history.value, operators=operators, seed=seed
    )
    samples = join_files(
        inputs, yields, history="previous-years", years=_years(years) if years else None, crop=crop, unit=unit
    )
    with _counting("train networks") as count:
        typer.echo(train_files(samples, out, learning, workers=workers, on_member=count))


@app.command("select-operator")
def select_operator(
    inputs: Histograms,
    yields: Yields,
    years: Years = None,
    crop: Crop = None,
    by_year: Annotated[
        bool, typer.Option("--by-year", help="Choose one for each year, validated on that year.")
    ] = False,
    steps: Steps = 300,
    size: NetworkSize = Size.small,
    history: History = Past.residual,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="JSON file for the choice, for 'train --operators'.")] = Path(
        "operators.json"
    ),
) -> None:
    """Choose DFYP's edge operator (Sobel, Scharr or learnable) by the error on rows held out of the training.

    Example:  yield_predict.py select-operator --inputs histograms --yields nass.csv --by-year --out operators.json
    """
    from geo_yield.jobs import Learning, join_files, select_operator_files

    samples = join_files(
        inputs, yields, history="previous-years", years=_years(years) if years else None, crop=crop, unit=None
    )
    learning = Learning(size=size.value, steps=steps, history=history.value, seed=seed)
    with _progress() as progress:
        task = progress.add_task("try operators", total=None)
        table = select_operator_files(samples, out, learning, by_year=by_year, on_fit=lambda *_: progress.advance(task))
    _show(table.rename(columns={"rmse": f"RMSE ({samples.unit})"}), "Validation error of each operator")
    typer.echo(out)


@app.command()
def evaluate(
    yields: Yields,
    inputs: Annotated[Path | None, typer.Option(help="Histograms: the folder that 'prepare' wrote.")] = None,
    series: Annotated[
        list[Path] | None, typer.Option(help="Instead: CSV of county-mean indices; repeat for several.")
    ] = None,
    protocol: Annotated[
        Protocol, typer.Option(help="What is left out of training and predicted.")
    ] = Protocol.leave_future_out,
    methods: Annotated[str, typer.Option(help="Comma-separated: 'DFYP,ridge,county history' (default: all).")] = "",
    test_years: Annotated[
        str | None, typer.Option(help="Seasons to test on, e.g. 2022 (default: all possible).")
    ] = None,
    folds: Annotated[int, typer.Option(help="Folds of a spatial protocol.")] = 5,
    years: Years = None,
    crop: Crop = None,
    unit: Unit = None,
    series_id: Annotated[str, typer.Option(help="Column of --series with the region.")] = "County",
    series_year: Annotated[str, typer.Option(help="Column of --series with the year.")] = "Year",
    district_column: Annotated[str | None, typer.Option(help="Column of --series with the district.")] = None,
    centroids: Annotated[
        Path | None, typer.Option(help="CSV of region, longitude, latitude: needed by the Deep GP.")
    ] = None,
    members: Members = 4,
    steps: Steps = 300,
    size: NetworkSize = Size.small,
    history: History = Past.residual,
    operators: Operators = None,
    seed: Seed = 0,
    workers: Workers = None,
    out: Annotated[Path, typer.Option(help="Folder for the rows; finished fits are not repeated.")] = Path(
        "evaluation"
    ),
) -> None:
    """Compare DFYP with county history, ridge, random forest and others on seasons or counties they have not seen.

    Example:  yield_predict.py evaluate --inputs histograms --yields nass.csv --test-years 2021,2022

    Example:  yield_predict.py evaluate --series ndvi.csv --series evi.csv --yields nass.csv --protocol spatial
    """
    from geo_yield.evaluation import history_for
    from geo_yield.jobs import METHODS, Learning, evaluate_files, is_simulated, join_files
    from geo_yield.report import skill_table
    from geo_yield.series import series_samples

    if (inputs is None) == (not series):
        raise InputProblem("give either --inputs (histograms) or --series (CSV of county-mean indices)")
    learning = Learning(
        size=size.value, steps=steps, members=members, history=history.value, operators=operators, seed=seed
    )
    past = history_for(protocol.value)
    if inputs is not None:
        wanted = _years(years) if years else None
        samples = join_files(inputs, yields, history=past, years=wanted, crop=crop, unit=unit)
    else:
        samples = series_samples(
            series or [],
            yields,
            history=past,
            id_column=series_id,
            year_column=series_year,
            centroids=centroids,
            district_column=district_column,
            crop=crop,
            unit=unit,
        )
    with _progress() as progress:
        ahead, task = progress.add_task("train networks", total=None), progress.add_task("fit", total=None)
        rows = evaluate_files(
            samples,
            out,
            learning,
            protocol=protocol.value,
            names=[name.strip() for name in methods.split(",")] if methods else METHODS,
            folds=folds,
            test_years=_years(test_years) if test_years else None,
            simulated=is_simulated(yields),
            workers=workers,
            on_unit=lambda done, total: progress.update(ahead, completed=done, total=total),
            on_fit=lambda fold, method, done, total: progress.update(
                task, completed=done, total=total, description=f"{fold}: {method}"
            ),
        )
    _show_skill(skill_table(rows), samples.unit, f"{samples.crop}, {protocol.value}")
    typer.echo(out / "evaluation.parquet")


@app.command()
def predict(
    inputs: Histograms,
    model: Annotated[Path, typer.Option(help="Folder that 'train' wrote.")],
    yields: Annotated[Path | None, typer.Option(help="Table of past yields, for each region's history.")] = None,
    regions: Annotated[Path | None, typer.Option(help="Polygons for the result (default: points).")] = None,
    id_column: IdColumn = None,
    years: Years = None,
    out: Annotated[Path, typer.Option(help="GeoParquet file for the predictions.")] = Path("yields.parquet"),
    engine: On = Engine.local,
    workers: Workers = None,
) -> None:
    """Predict every region's yield with an interval. Memory stays the same for any number of regions.

    Example:  yield_predict.py predict --inputs histograms --model model --yields nass.csv --year 2023
    """
    from geo_yield.histograms import HistogramStore
    from geo_yield.prediction import predict_yields
    from geo_yield.yields import read_yields

    store = HistogramStore(inputs)
    with _counting("predict") as count:
        path = predict_yields(
            store,
            model,
            out,
            years=_years(years) if years else None,
            yields=None if yields is None else read_yields(yields),
            regions=regions,
            id_column=id_column,
            engine=engine.value,
            workers=workers,
            on_batch=count,
        )
    typer.echo(path)


@app.command()
def report(
    evaluation: Annotated[Path | None, typer.Option(help="Folder that 'evaluate' wrote.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Instead: a file that 'predict' wrote, for a map.")] = None,
    regions: Annotated[Path | None, typer.Option(help="Polygons, for the map of an evaluation.")] = None,
    id_column: IdColumn = None,
    method: Annotated[str, typer.Option(help="Method on the map.")] = "DFYP",
    reference: Annotated[str, typer.Option(help="Method to compare it with.")] = "county history",
    out: Annotated[Path, typer.Option(help="Folder for report.md and pictures.")] = Path("report"),
) -> None:
    """Draw the map, the comparison of methods, and write the report.

    Example:  yield_predict.py report --evaluation evaluation --regions counties.gpkg --out report

    Example:  yield_predict.py report --predictions yields.parquet --out report
    """
    from geo_yield.jobs import map_predictions, report_files

    if (evaluation is None) == (predictions is None):
        raise InputProblem("give either --evaluation (a folder) or --predictions (a file)")
    if predictions is not None:
        typer.echo("\n".join(map(str, map_predictions(predictions, out))))
    elif evaluation is not None:
        path = report_files(evaluation, out, regions=regions, id_column=id_column, method=method, reference=reference)
        typer.echo(path)


def _demo(out: Path, counties: str, seasons: int, members: int, steps: int, seed: int, engine: Engine) -> None:
    from geo_yield.demo import DemoPlan, demo
    from geo_yield.jobs import Learning
    from geo_yield.report import skill_table

    plan = DemoPlan(
        region=_region(counties, seasons),
        learning=Learning(members=members, steps=steps, seed=seed),
        engine=engine.value,
    )
    with _progress() as progress:
        tasks: dict[str, int] = {}

        def on_step(what: str, done: int, total: int) -> None:
            name = what.partition(" (")[0]
            task = tasks.setdefault(name, -1)
            if task == -1:
                task = tasks[name] = progress.add_task(what, total=total)
            progress.update(task, completed=done, total=total, description=what)  # type: ignore[arg-type]

        result = demo(out, plan, on_step=on_step)
    last = int(result.rows["year"].max())
    _show_skill(skill_table(result.rows), "bu/acre", f"Simulated soybean yield {last}, not seen in training")
    stdout.print(
        f"map          {result.map}\nskill        {result.skill}\nreport       {result.report}", highlight=False
    )
    stdout.print(f"predictions  {result.predictions}", highlight=False)


def _region(counties: str, seasons: int) -> "SimulationConfig":
    from geo_yield.simulator import SimulationConfig

    rows, _, columns = counties.partition("x")
    if not (rows.isdigit() and columns.isdigit() and 0 < int(rows) * int(columns) <= 400):
        raise InputProblem(f"--counties must be rows x columns like 7x8, at most 400 in all, got '{counties}'")
    return SimulationConfig.of_size((int(rows), int(columns)), seasons=seasons)


def _years(text: str) -> tuple[int, ...]:
    """ "2015-2018,2021" -> (2015, 2016, 2017, 2018, 2021)."""
    years: set[int] = set()
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        last = last or first
        if not (first.isdigit() and last.isdigit() and len(first) == len(last) == 4 and int(first) <= int(last)):
            raise InputProblem(f"years must be like 2015-2022 or 2019,2021, got '{text}'")
        years |= set(range(int(first), int(last) + 1))
    return tuple(sorted(years))


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
    )


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for callbacks that are told (done, total)."""
    with _progress() as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _show_skill(table: "pd.DataFrame", unit: str, title: str) -> None:
    shown = table.copy()
    for column in ("rmse", "mae", "r2", "me", "width"):
        shown[column] = shown[column].map("{:.2f}".format)
    shown["coverage"] = shown["coverage"].map("{:.0%}".format)
    names = {"rmse": "RMSE", "mae": "MAE", "r2": "R2", "me": "ME"}
    _show(shown.rename(columns=names), f"{title}: RMSE, MAE, ME, width in {unit}")


def _show(table: "pd.DataFrame", title: str) -> None:
    drawn = Table(title=title, title_justify="left")
    for column in table.columns:
        named = column in ("method", "operator")
        drawn.add_column(str(column), justify="left" if named else "right", no_wrap=named)
    for row in table.itertuples(index=False):
        drawn.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row))
    stdout.print(drawn)


if __name__ == "__main__":
    try:
        app()
    except InputProblem as problem:  # the one family that is the user's to mend; others keep their traceback
        stderr.print(str(problem), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
