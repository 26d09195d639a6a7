"""The jobs that the command line offers, each one function from files to files.

prepare -> train -> predict is what a statistics office runs every season; evaluate and report say how far to trust it.
Every job leaves what a later one needs, and a second run goes on where the first stopped.
Decided here: the default DFYP is the small one, with the residual on a region's history, since county tables mostly
have hundreds of rows and not thousands; `size="paper"` is the published network and training. Yields that lie beside
the `simulation.json` of `geo_yield.simulator` are simulated, and what is made from them says so.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from geo_yield.baselines import CountyHistory, CountyTrend, DeepGaussianProcess, MeanYield, RandomForest, Ridge
from geo_yield.checkpoint import save_model
from geo_yield.crossfit import CrossFit, Regressor, held_out_parts
from geo_yield.dfyp import OPERATORS, DFYPConfig, Operator
from geo_yield.engine import run_units
from geo_yield.errors import InputProblem
from geo_yield.evaluation import CALIBRATION, evaluate, make_folds
from geo_yield.histograms import HistogramLayout, HistogramStore
from geo_yield.modis import modis_layout, modis_scenes
from geo_yield.prediction import one_thread
from geo_yield.prepare import prepare_histograms
from geo_yield.regions import read_regions
from geo_yield.report import Subject, draw_predictions, write_report
from geo_yield.samples import IndexSeries, Samples
from geo_yield.scaling import History
from geo_yield.scenes import Scene
from geo_yield.sentinel2 import SENSOR, sentinel2_layout, sentinel2_scenes
from geo_yield.training import (
    DFYPRegressor,
    TrainConfig,
    select_operator,
    select_operators_by_year,
)
from geo_yield.whole_files import whole_file
from geo_yield.yields import join_yields, read_yields

SENSORS = ("modis", "sentinel2")
METHODS = ("mean", "county history", "county trend", "ridge", "ridge + history", "random forest", "Deep GP", "DFYP")
"""What `evaluate_files` compares, in this order."""

SLOW = ("Deep GP", "random forest")
"""Baselines that are worth a process of their own."""

OnCount = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How DFYP is built and trained by the jobs here."""

    size: Literal["small", "paper"] = "small"
    """"small": for hundreds of rows; "paper": the published network and training, for thousands."""
    steps: int = 300
    """Training steps of the small network (the paper's has its own 25,000)."""
    members: int = 4
    """Networks in the ensemble, each without one fold of the training rows."""
    history: History = "residual"
    """"residual": predict the difference to what the region's past lets expect; "none": from images alone."""
    operator: Operator = "sobel"
    operators: Path | None = None
    """JSON file written by `select_operator_files`; overrides `operator`."""
    candidates: tuple[Operator, ...] = ()
    """Operators that every fit chooses among by validation inside its own rows."""
    level: float = 0.9
    """Nominal coverage of the intervals."""
    seed: int = 0

    def network(self, samples: Samples) -> DFYPConfig:
        """The network for the bands of `samples`."""
        inputs = samples.inputs
        bands = len(inputs.bands) if isinstance(inputs, IndexSeries) else len(inputs.layout.bands)
        config = DFYPConfig.small(bands) if self.size == "small" else DFYPConfig(bands=bands)
        if not isinstance(inputs, IndexSeries):
            _, steps, bins = inputs.layout.shape
            patch = config.patch
            config = replace(config, steps=-(-steps // patch) * patch, bins=bins)  # a short season is padded with zeros
        return _with_chosen(config, self.operators) if self.operators else config.with_operators(self.operator)

    def training(self) -> TrainConfig:
        if self.size == "paper":
            return TrainConfig(history=self.history)
        config = TrainConfig.small(history=self.history, max_steps=self.steps)
        return replace(config, validation="random") if self.candidates else config

    def regressor(self, samples: Samples, resume_dir: Path | None = None) -> DFYPRegressor:
        """An untrained DFYP for rows like `samples`; trainings that finished in `resume_dir` are not repeated."""
        return DFYPRegressor(self.network(samples), self.training(), candidates=self.candidates, resume_dir=resume_dir)


@dataclass(frozen=True, kw_only=True)
class Images:
    """Where images are and how they are read."""

    sensor: str
    """"modis" or "sentinel2"."""
    years: tuple[int, ...]
    """Harvest years."""
    inputs: tuple[Path, ...] = ()
    """Folders of images."""
    stack_first_year: int | None = None
    """First year of stacks exported from Earth Engine, if the folders hold such; see `find_composites`."""
    stac: Path | None = None
    """Instead of folders: a file of STAC items."""
    assets_root: Path | None = None
    """Folder that the items' assets were downloaded to."""
    mask: str = ""
    """E.g. "mcd12q1:12" or "none"; "" is the sensor's default (cropland for MODIS, none for Sentinel-2)."""
    mask_map: Path | None = None
    """Land cover: a folder of MCD12Q1 (if it is not among the inputs), or any map for Sentinel-2."""
    qa: str = "default"
    """"default" drops clouds, shadows and bad retrievals; "none" keeps them, as the published pipelines do."""
    offset: float | None = None
    """Sentinel-2 whose metadata do not tell: added to DN, -1000 from baseline 04.00 on; see `offset_for`."""
    max_cloud: float = 100.0
    """Sentinel-2: products cloudier than this many per cent are left out."""

    def __post_init__(self) -> None:
        if self.sensor not in SENSORS:
            raise InputProblem(f"sensor must be one of {', '.join(SENSORS)}, got '{self.sensor}'")
        if bool(self.inputs) == bool(self.stac):
            raise InputProblem("give either folders of images (--inputs) or a file of STAC items (--stac)")
        for path in (*self.inputs, *(path for path in (self.stac, self.assets_root, self.mask_map) if path)):
            if not path.exists():
                raise InputProblem(f"'{path}' does not exist")

    def layout(self) -> HistogramLayout:
        if self.sensor == "modis":
            mask = {"": "mcd12q1:12", "mcd12q1": "mcd12q1:12"}.get(self.mask, self.mask)
            return modis_layout(qa=self.qa, mask=mask)
        return sentinel2_layout(qa=self.qa, mask=self.mask or "none")

    def scenes(self) -> Sequence[Scene]:
        """Every scene of the years. Raises InputProblem if there is none."""
        layout = self.layout()
        if self.stac:
            from geo_yield.stac import read_items, stac_scenes

            return stac_scenes(
                read_items(self.stac),
                years=self.years,
                layout=layout,
                assets_root=self.assets_root,
                offset=self.offset,
                max_cloud=self.max_cloud,
                mask_map=self.mask_map,
            )
        if layout.sensor == SENSOR:
            return sentinel2_scenes(
                self.inputs,
                years=self.years,
                layout=layout,
                offset=self.offset,
                max_cloud=self.max_cloud,
                mask_map=self.mask_map,
            )
        return modis_scenes(
            list(self.inputs), years=self.years, mask=self.mask_map, stack_first_year=self.stack_first_year
        )


def prepare_files(
    images: Images,
    regions: Path,
    out: Path,
    *,
    id_column: str | None = None,
    engine: str = "local",
    workers: int | None = None,
    on_unit: OnCount | None = None,
) -> list[Path]:
    """Images to one histogram file per year in folder `out`; see `geo_yield.prepare.prepare_histograms`."""
    shapes = read_regions(regions, id_column=id_column)
    return prepare_histograms(
        images.scenes(), shapes, images.layout(), out, engine=engine, workers=workers, on_unit=on_unit
    )


def join_files(
    inputs: Path, yields: Path, *, history: str, years: Sequence[int] | None = None, crop: str | None, unit: str | None
) -> Samples:
    """Histograms of `inputs` joined with the yields of a table. Raises InputProblem as the readers do."""
    table = read_yields(yields, crop=crop)
    return join_yields(HistogramStore(inputs).read(years=years), table, history=history, crop=crop, unit=unit)


@dataclass(frozen=True, kw_only=True)
class _Network:
    """One network of an ensemble, to be trained in a process of its own."""

    samples: Samples
    learning: Learning
    resume_dir: Path
    seed: int

    def run(self) -> None:
        self.learning.regressor(self.samples, self.resume_dir).fit(self.samples, seed=self.seed)


def _networks(samples: Samples, learning: Learning, *, group: str, resume_dir: Path) -> list[_Network]:
    """The networks that a `CrossFit` of these settings will ask for, which it then finds in `resume_dir`.

    None for the paper's network, which can use every processor by itself, and none where every fit chooses an operator
    first: `CrossFit` trains these.
    """
    if learning.size != "small" or learning.candidates:
        return []
    known = samples.take(np.isfinite(samples.target))
    parts = held_out_parts(known, folds=learning.members, group=group, seed=learning.seed)
    return [
        _Network(samples=known.take(~part), learning=learning, resume_dir=resume_dir, seed=learning.seed + k)
        for k, part in enumerate(parts)
    ]


def _run_ahead(units: Sequence["_Network | _Method"], workers: int | None, on_unit: OnCount | None) -> None:
    """Side by side: small networks on small batches gain nothing from a second processor, a second network does."""
    for done, _ in enumerate(run_units(_run, units, workers=workers), 1):
        if on_unit:
            on_unit(done, len(units))


def _run(unit: "_Network | _Method") -> None:
    unit.run()


def train_files(
    samples: Samples,
    out: Path,
    learning: Learning,
    *,
    metadata: Mapping[str, object] | None = None,
    resume_dir: Path | None = None,
    workers: int | None = None,
    on_member: OnCount | None = None,
) -> Path:
    """Train the ensemble on all rows with a yield and write it into folder `out`.

    The networks leave out whole seasons in turn, or regions if there is one season only. Unfinished trainings are kept
    in `resume_dir`, by default beside `out` until the job is done.
    """
    folder = resume_dir or out.with_name(f".{out.name}.training")
    known = np.isfinite(samples.target)
    group = "year" if len(set(samples.year[known].tolist())) > 1 else "region"
    if resume_dir is None:
        _run_ahead(_networks(samples, learning, group=group, resume_dir=folder), workers, on_member)
    ensemble = CrossFit(
        lambda: learning.regressor(samples, folder), folds=learning.members, group=group, level=learning.level
    )
    with _threads_for(learning):
        ensemble.fit(samples, seed=learning.seed)
    facts = {"years": sorted(set(samples.year[known].tolist())), "rows": int(known.sum()), "learning": _plain(learning)}
    save_model(ensemble, out, metadata=facts | dict(metadata or {}))
    if resume_dir is None:
        shutil.rmtree(folder)
    return out


def select_operator_files(
    samples: Samples,
    out: Path,
    learning: Learning,
    *,
    by_year: bool = False,
    candidates: Sequence[Operator] = OPERATORS,
    on_fit: Callable[[str, float], None] | None = None,
) -> pd.DataFrame:
    """Stage one of DFYP's operator selection; writes the choice as JSON to `out` and returns the validation errors."""
    known = samples.take(np.isfinite(samples.target))
    config, training = learning.network(known), replace(learning.training(), validation="random")
    if by_year:
        chosen, table = select_operators_by_year(
            known, config, training, candidates=candidates, seed=learning.seed, on_fit=on_fit
        )
    else:
        operator, table = select_operator(
            known, config, training, candidates=candidates, seed=learning.seed, on_fit=on_fit
        )
        chosen = config.with_operators(operator)
    choice = {
        "operator": chosen.operator,
        "operator_by_year": {str(year): name for year, name in dict(chosen.operator_by_year).items()},
        "operator_after": chosen.operator_after,
        "validation_rmse": table.to_dict(orient="records"),
        "unit": samples.unit,
    }
    _write_json(out, choice)
    return table


def standard_methods(
    samples: Samples,
    learning: Learning,
    *,
    protocol: str,
    names: Sequence[str] = METHODS,
    test_years: Sequence[int] | None = None,
    resume_dir: Path | None = None,
) -> dict[str, Callable[[], Regressor]]:
    """Makers of the methods asked for; choices in their training rows keep together what `protocol` does."""
    if unknown := sorted(set(names) - set(METHODS)):
        raise InputProblem(f"no method {', '.join(map(repr, unknown))}; there are {', '.join(METHODS)}")
    if protocol not in CALIBRATION:
        raise InputProblem(f"no protocol '{protocol}'; there are {', '.join(CALIBRATION)}")
    group = _inner_group(samples, protocol, learning.members, test_years)
    every: dict[str, Callable[[], Regressor]] = {
        "mean": MeanYield,
        "county history": CountyHistory,
        "county trend": CountyTrend,
        "ridge": lambda: Ridge(group=group),
        "ridge + history": lambda: Ridge(name="ridge + history", history="residual", group=group),
        "random forest": RandomForest,
        "Deep GP": lambda: DeepGaussianProcess(name="Deep GP"),
        "DFYP": lambda: learning.regressor(samples, resume_dir),
    }
    return {name: every[name] for name in METHODS if name in names}


def _inner_group(samples: Samples, protocol: str, members: int, test_years: Sequence[int] | None) -> str:
    """What ridge keeps together when it chooses its penalty: seasons, unless some member sees a single one."""
    if CALIBRATION[protocol] != "year":
        return CALIBRATION[protocol]
    years = sorted(set(samples.year[np.isfinite(samples.target)].tolist()))
    first = min(test_years) if test_years else years[min(2, len(years) - 1)]
    earlier = sum(year < first for year in years) if protocol == "leave-future-out" else len(years) - 1
    left_out = -(-earlier // min(members or earlier, earlier)) if earlier else 0
    return "year" if earlier - left_out >= 2 else "region"


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """An evaluation as it was asked for; any part of it can be done in another process and is then found on disk."""

    samples: Samples
    learning: Learning
    protocol: str
    folds: int
    test_years: Sequence[int] | None
    out: Path

    def methods(self, names: Sequence[str]) -> dict[str, Callable[[], Regressor]]:
        return standard_methods(
            self.samples,
            self.learning,
            protocol=self.protocol,
            names=names,
            test_years=self.test_years,
            resume_dir=self.out / "training",
        )

    def units(self, names: Sequence[str]) -> list["_Network | _Method"]:
        """The parts that take long: slow baselines whole, and each network of every fold."""
        units: list[_Network | _Method] = [_Method(comparison=self, name=name) for name in SLOW if name in names]
        if "DFYP" not in names:
            return units
        known, seed = self.samples.take(np.isfinite(self.samples.target)), self.learning.seed
        splits = make_folds(known, protocol=self.protocol, folds=self.folds, seed=seed, test_years=self.test_years)
        for fold in splits:
            group, resume_dir = CALIBRATION[self.protocol], self.out / "training"
            units += _networks(known.take(fold.train), self.learning, group=group, resume_dir=resume_dir)
        return units

    def run(
        self,
        methods: Mapping[str, Callable[[], Regressor]],
        on_fit: Callable[[str, str, int, int], None] | None = None,
    ) -> pd.DataFrame:
        return evaluate(
            self.samples,
            methods,
            protocol=self.protocol,
            test_years=self.test_years,
            folds=self.folds,
            members=self.learning.members,
            seed=self.learning.seed,
            level=self.learning.level,
            resume_dir=self.out / "parts",
            on_fit=on_fit,
        )


@dataclass(frozen=True, kw_only=True)
class _Method:
    """One baseline in all folds, in a process of its own."""

    comparison: _Comparison
    name: str

    def run(self) -> None:
        self.comparison.run(self.comparison.methods([self.name]))


def evaluate_files(
    samples: Samples,
    out: Path,
    learning: Learning,
    *,
    protocol: str = "leave-future-out",
    names: Sequence[str] = METHODS,
    folds: int = 5,
    test_years: Sequence[int] | None = None,
    simulated: bool = False,
    workers: int | None = None,
    on_unit: OnCount | None = None,
    on_fit: Callable[[str, str, int, int], None] | None = None,
) -> pd.DataFrame:
    """Compare methods and keep the rows in `<out>/evaluation.parquet`, with what `report_files` needs.

    What takes long is done first, `workers` at a time: on_unit(done, total). Then every method of each fold is fitted,
    or read back: on_fit(fold, method, done, total).
    """
    comparison = _Comparison(
        samples=samples, learning=learning, protocol=protocol, folds=folds, test_years=test_years, out=out
    )
    methods = comparison.methods(names)
    if not (out / "evaluation.parquet").exists():
        _run_ahead(comparison.units(names), workers, on_unit)
    with _threads_for(learning):
        rows = comparison.run(methods, on_fit)
    _keep(rows, samples, out, {"protocol": protocol, "simulated": simulated, "learning": _plain(learning)})
    return rows


def _keep(rows: pd.DataFrame, samples: Samples, out: Path, facts: Mapping[str, object]) -> None:
    """evaluation.parquet, evaluation.json, and for histograms seen.parquet: how much of each region was seen."""
    inputs = samples.inputs
    _write_table(out / "evaluation.parquet", rows)
    if isinstance(inputs, IndexSeries):
        bands: object = inputs.bands
    else:
        bands = json.loads(inputs.layout.to_json())
        columns = ("region_id", "year", "valid_fraction", "missing_share")
        _write_table(out / "seen.parquet", pd.DataFrame({name: getattr(inputs, name) for name in columns}))
    _write_json(out / "evaluation.json", {"crop": samples.crop, "unit": samples.unit, **facts, "bands": bands})


def report_files(
    evaluation: Path,
    out: Path,
    *,
    regions: Path | None = None,
    id_column: str | None = None,
    method: str = "DFYP",
    reference: str = "county history",
    done: Sequence[str] = (),
) -> Path:
    """Pictures and report.md in folder `out` from what `evaluate_files` left in `evaluation`."""
    record = evaluation / "evaluation.json"
    if not record.exists():
        raise InputProblem(f"no evaluation in '{evaluation}'. Make one with: yield_predict.py evaluate")
    facts = json.loads(record.read_text())
    subject = Subject(
        crop=facts["crop"],
        unit=facts["unit"],
        level=facts["learning"]["level"],
        simulated=facts["simulated"],
        method=method,
        reference=reference,
    )
    seen = evaluation / "seen.parquet"
    return write_report(
        pd.read_parquet(evaluation / "evaluation.parquet"),
        subject,
        out,
        regions=None if regions is None else read_regions(regions, id_column=id_column),
        done=done,
        settings={name: facts[name] for name in ("protocol", "learning", "bands")},
        seen=pd.read_parquet(seen) if seen.exists() else None,
    )


def map_predictions(predictions: Path, out: Path) -> list[Path]:
    """A map for every season of a file that `predict_yields` wrote, as `<out>/map-<year>.png`."""
    try:
        table = geopandas.read_parquet(predictions)
        run = json.loads((pq.read_schema(predictions).metadata or {})[b"geo_yield.prediction"])
    except (OSError, ValueError, KeyError, pa.ArrowException) as problem:
        raise InputProblem(f"'{predictions}' is no file of predictions ({type(problem).__name__})") from None
    return [
        draw_predictions(table[table["year"] == year], out / f"map-{year}.png", year=year, level=run["level"])
        for year in sorted(set(table["year"].tolist()))
    ]


def _with_chosen(config: DFYPConfig, path: Path) -> DFYPConfig:
    try:
        raw = json.loads(path.read_text())
        by_year = {int(year): name for year, name in raw["operator_by_year"].items()}
        return replace(config.with_operators(raw["operator"], by_year), operator_after=raw["operator_after"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise InputProblem(f"'{path}' is no choice of operators made by select-operator: {problem}") from None


def is_simulated(yields: Path) -> bool:
    """Whether a table of yields lies in a folder that `geo_yield.simulator.simulate` wrote."""
    return (yields.parent / "simulation.json").exists()


def _threads_for(learning: Learning) -> AbstractContextManager[None]:
    """One thread for small networks, which makes results repeat to the bit; all for the paper's."""
    return one_thread() if learning.size == "small" else nullcontext()


def _plain(learning: Learning) -> dict[str, object]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(learning).items()}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1))


def _write_table(path: Path, table: pd.DataFrame) -> None:
    with whole_file(path) as partial:
        table.to_parquet(partial, index=False)
