"""The whole job on a region that is simulated: what somebody sees who starts the app without having any data.

Imagery and yields are simulated, everything else is what runs on real files: the same readers, model, evaluation,
prediction and report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from geo_yield.histograms import HistogramStore
from geo_yield.jobs import Images, Learning, evaluate_files, join_files, prepare_files, report_files, train_files
from geo_yield.prediction import predict_yields
from geo_yield.simulator import SimulatedRegion, SimulationConfig, simulate
from geo_yield.yields import read_yields

OnStep = Callable[[str, int, int], None]
"""Told what is being done, how much of it is finished, and how much there is."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Where the results of `demo` are."""

    rows: pd.DataFrame
    """Of the evaluation."""
    predictions: Path
    report: Path
    map: Path
    skill: Path


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """What the demo does; everything but `region` and `learning` is fixed."""

    region: SimulationConfig = field(default_factory=SimulationConfig)
    learning: Learning = field(default_factory=Learning)
    engine: str = "local"
    workers: int | None = None


def demo(out: Path, plan: DemoPlan, *, on_step: OnStep | None = None) -> Demo:
    """The whole job on the simulated region: simulate, prepare, evaluate on the last season, train, predict, report.

    on_step(what, done, total) tells how far the current step is. A second call goes on where the first stopped.
    """
    tell = on_step or _say_nothing
    region = _simulated(out / "region", plan, tell)
    images = Images(sensor="modis", inputs=(region.imagery,), years=region.years)
    prepare_files(
        images,
        region.regions,
        out / "histograms",
        engine=plan.engine,
        workers=plan.workers,
        on_unit=lambda done, total: tell("read 8-day composites", done, total),
    )
    last = region.years[-1]
    samples = join_files(out / "histograms", region.yields, history="previous-years", crop=region.crop, unit=None)
    folder = out / "evaluation"
    rows = evaluate_files(
        samples,
        folder,
        plan.learning,
        test_years=[last],
        simulated=True,
        workers=plan.workers,
        on_unit=lambda done, total: tell("train networks and forests", done, total),
        on_fit=lambda _, method, done, total: tell(f"compare methods ({method})", done, total),
    )
    earlier = samples.take(samples.year < last)
    # the evaluation has trained this very ensemble; its members are read back
    model = train_files(
        earlier, out / "model", plan.learning, metadata={"simulated": True}, resume_dir=folder / "training"
    )
    predictions = predict_yields(
        HistogramStore(out / "histograms"),
        model,
        out / "predictions.parquet",
        years=[last],
        yields=read_yields(region.yields),
        regions=region.regions,
        engine=plan.engine,
        workers=1 if plan.engine == "local" else plan.workers,
        on_batch=lambda done, total: tell("predict", done, total),
    )
    report = report_files(folder, out, regions=region.regions, done=_story(plan, region.years))
    return Demo(rows=rows, predictions=predictions, report=report, map=out / "map.png", skill=out / "skill.png")


def _simulated(folder: Path, plan: DemoPlan, tell: OnStep) -> SimulatedRegion:
    seasons: list[int] = []

    def count(year: int) -> None:
        seasons.append(year)
        tell("simulate seasons", len(seasons), plan.region.seasons)

    return simulate(folder, seed=plan.learning.seed, config=plan.region, on_season=count)


def _say_nothing(what: str, done: int, total: int) -> None:
    """For callers who do not want to know."""


def _story(plan: DemoPlan, years: Sequence[int]) -> list[str]:
    last = years[-1]
    return [
        f"Simulated {plan.region.seasons} seasons of weather, crop and imagery ({years[0]}-{last}) with a heat wave "
        f"in {last}, and {plan.region.earlier_seasons} earlier harvests without imagery: {plan.region.crop}, seed "
        f"{plan.learning.seed}.",
        "Read the GeoTIFFs (MOD09A1, MYD11A2, MCD12Q1) of two tiles, masked clouds and all that is not cropland, and "
        "counted every county's pixels into one histogram per band and 8-day composite.",
        f"Trained every method on {years[0]}-{last - 1} and tested it on {last}. Intervals were calibrated on left-out "
        "training seasons.",
        f"Wrote predictions.parquet with the {plan.learning.members} DFYP networks, each trained without some seasons.",
    ]
