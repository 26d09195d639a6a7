"""Predict yields of any number of regions in constant memory: histograms in, GeoParquet out, one row group at a time.

The unit of work is a row group of a histogram file (64 regions). A worker loads the model from its folder, predicts and
leaves a small file; at the end these are joined with the polygons of their regions, again a unit at a time, into one
file. A run that was stopped goes on with the units that are missing, and any engine gives the same bytes, since a unit
is always predicted whole and by one thread.

Decided here: history means the yields of the years before the predicted one, as at a real forecast; predictions of a
region that was not seen at all rest on nothing but its history, and show it by `valid_fraction` 0.

Shapes: N rows of a unit.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import shapely
import torch
from jaxtyping import Shaped
from pyogrio.errors import DataSourceError
from pyproj import CRS

from geo_yield.checkpoint import load_model
from geo_yield.crossfit import CrossFit
from geo_yield.engine import run_units
from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramStore, YieldTensor, from_arrow
from geo_yield.regions import ID_COLUMNS, read_regions
from geo_yield.samples import Samples
from geo_yield.scaling import Scaling
from geo_yield.training import DFYPRegressor
from geo_yield.whole_files import whole_file
from geo_yield.yields import convert_yields, county_history, match_key

MISSING_SHARE_TO_WARN = 0.25
_RUN_KEY = b"geo_yield.prediction"
_STREAMED = (".gpkg", ".shp", ".geojson", ".json", ".fgb")

_COLUMNS = {
    "region_id": pa.string(),
    "year": pa.int16(),
    "crop": pa.string(),
    "prediction": pa.float32(),
    "spread": pa.float32(),
    "lower": pa.float32(),
    "upper": pa.float32(),
    "unit": pa.string(),
    "valid_fraction": pa.float32(),
    "missing_share": pa.float32(),
    "history": pa.float32(),
}

log = logging.getLogger(__name__)


def predict_yields(
    store: HistogramStore,
    model: Path,
    out: Path,
    *,
    years: Iterable[int] | None = None,
    yields: pd.DataFrame | None = None,
    regions: Path | None = None,
    id_column: str | None = None,
    window: int = 10,
    engine: str = "local",
    workers: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `out` (GeoParquet), a row per region and year of `store`, and return it.

    Columns region_id, year, crop, prediction, spread, lower, upper, unit, valid_fraction, missing_share, history,
    geometry. model: folder written by `geo_yield.checkpoint.save_model`. years: default, all of the store. yields: past
    yields, any unit; needed if the model builds on a region's history, which is the mean of the `window` years before.
    regions: file of polygons for the geometry column; without it, points. on_batch(done, total) counts row groups.
    Raises InputProblem if the histograms do not fit the model, a year has none, or the model needs yields.
    """
    store_years = set(store.years())
    wanted = sorted(store_years if years is None else set(years))
    if missing := [year for year in wanted if year not in store_years]:
        raise InputProblem(f"'{store.path}' has no imagery of {missing}; it has {sorted(store_years)}")
    scaling, shapes = _refuse_unfit(store, model, yields), _Shapes(regions, id_column)
    units = [unit for file in store.files for unit in _units_of(file, wanted)]
    job = _Job(
        model=model,
        years=tuple(wanted),
        window=window,
        folder=out.with_name(f".{out.name}.units"),
        fingerprint=_fingerprint(store, model, (wanted, window, id_column), yields, regions),
    )
    if _is_done(out, job.fingerprint):
        if on_batch:
            on_batch(len(units), len(units))
        return out
    _open_folder(job, yields, scaling)
    _run(job, units, engine, workers, on_batch)
    _join(job, units, out, shapes)
    shutil.rmtree(job.folder)
    return out


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every unit is told; small, since it travels with each."""

    model: Path
    years: tuple[int, ...]
    window: int
    folder: Path
    """Gets one file per unit; holds yields.parquet if there are past yields."""
    fingerprint: str
    """Of everything the result depends on; a worker that serves several jobs tells models apart by it."""


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """One row group of a histogram file."""

    file: Path
    row_group: int

    @property
    def name(self) -> str:
        return f"{self.file.stem}-{self.row_group:05d}.parquet"


def _refuse_unfit(store: HistogramStore, model: Path, yields: pd.DataFrame | None) -> Scaling:
    """The model's scaling, after it was found to fit the histograms and the yields at hand."""
    scaling = _scaling_of(load_model(model))
    expected = scaling.layout
    if store.layout.doy == expected.doy[: len(store.layout.doy)]:  # a season that has only begun
        expected = replace(expected, doy=store.layout.doy)
    expected.refuse_mismatch(store.layout, given=f"'{store.path}'", expected=f"the model '{model}'")
    if scaling.history is not None and yields is None:
        raise InputProblem(
            f"the model '{model}' predicts the difference to a region's history: give the table of past yields"
        )
    return scaling


def _scaling_of(model: CrossFit) -> Scaling:
    member = model.members[0]
    if not isinstance(member, DFYPRegressor) or member.scaling is None:
        raise InputProblem(f"predictions need a trained DFYP model, this one is of '{member.name}'")
    return member.scaling


def _units_of(file: Path, years: Sequence[int]) -> list[_Unit]:
    """Row groups that may hold rows of `years`, by the statistics of the file."""
    metadata = pq.read_metadata(file)
    column = metadata.schema.names.index("year")
    units = []
    for group in range(metadata.num_row_groups):
        seen = metadata.row_group(group).column(column).statistics
        if seen is None or not seen.has_min_max or any(seen.min <= year <= seen.max for year in years):
            units.append(_Unit(file=file, row_group=group))
    return units


def _fingerprint(
    store: HistogramStore, model: Path, settings: Sequence[object], yields: pd.DataFrame | None, regions: Path | None
) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    inside = sorted(path for path in Path(model).iterdir() if path.is_file())
    for file in (*store.files, *([regions] if regions else []), *inside):
        with file.open("rb") as stream:  # by content: preparing again writes the same bytes with another date
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if yields is not None:
        digest.update(yields.to_csv(index=False).encode())
    return digest.hexdigest()


def _is_done(out: Path, fingerprint: str) -> bool:
    if not out.exists():
        return False
    try:
        metadata = pq.read_schema(out).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return False
    return json.loads(metadata.get(_RUN_KEY, b"{}")).get("fingerprint") == fingerprint


def _open_folder(job: _Job, yields: pd.DataFrame | None, scaling: Scaling) -> None:
    """The folder of finished units, emptied if it belongs to another job."""
    stamp = job.folder / "job.txt"
    if stamp.exists() and stamp.read_text() == job.fingerprint:
        return
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    if yields is not None:
        known = yields[yields["crop"] == scaling.crop]
        if known.empty:
            crops = ", ".join(sorted(set(yields["crop"])))
            raise InputProblem(f"the model predicts {scaling.crop}, the table of past yields has {crops}")
        table = convert_yields(known, scaling.unit)
        table.assign(key=table["region_id"].map(match_key)).to_parquet(job.folder / "yields.parquet")
    stamp.write_text(job.fingerprint)  # last: without it the folder is begun again


def _run(
    job: _Job, units: Sequence[_Unit], engine: str, workers: int | None, on_batch: Callable[[int, int], None] | None
) -> None:
    left = [unit for unit in units if not (job.folder / unit.name).exists()]
    done = len(units) - len(left)
    if on_batch and done:
        on_batch(done, len(units))
    for _ in run_units(partial(_predict_unit, job), left, engine=engine, workers=workers):
        done += 1
        if on_batch:
            on_batch(done, len(units))


def _predict_unit(job: _Job, unit: _Unit) -> int:
    """Predict one unit into its file and return its number of rows."""
    reader = pq.ParquetFile(unit.file, pre_buffer=False)
    model = _cached_model(job.model, job.fingerprint)
    tensor = from_arrow(reader.read_row_group(unit.row_group), HistogramStore(unit.file).layout)
    tensor = tensor.take(np.isin(tensor.year, job.years))
    scaling = _scaling_of(model)
    samples = _samples(tensor, job, scaling)
    with one_thread():
        said = model.predict(samples)
    table = pa.table(
        {
            "region_id": pa.array(tensor.region_id.tolist()),
            "year": tensor.year,
            "crop": pa.array([scaling.crop] * len(tensor)),
            "prediction": said.mean,
            "spread": said.spread,
            "lower": said.lower,
            "upper": said.upper,
            "unit": pa.array([scaling.unit] * len(tensor)),
            "valid_fraction": tensor.valid_fraction,
            "missing_share": tensor.missing_share,
            "history": samples.history,
        },
        schema=pa.schema(list(_COLUMNS.items())),
    )
    point = shapely.to_wkb(shapely.points(tensor.lon.astype(float), tensor.lat.astype(float)))
    _write_whole(table.append_column("point", pa.array(point.tolist(), pa.binary())), job.folder / unit.name)
    return len(tensor)


@lru_cache(maxsize=1)
def _cached_model(folder: Path, fingerprint: str) -> CrossFit:  # noqa: ARG001
    return load_model(folder)


@lru_cache(maxsize=1)
def _cached_yields(path: Path, fingerprint: str) -> pd.DataFrame:  # noqa: ARG001
    return pd.read_parquet(path)


def _samples(tensor: YieldTensor, job: _Job, scaling: Scaling) -> Samples:
    unknown = np.full(len(tensor), np.nan, np.float32)
    history = trend = unknown
    path = job.folder / "yields.parquet"
    if path.exists():
        yields = _cached_yields(path, job.fingerprint)
        here = yields[yields["key"].isin({match_key(name) for name in tensor.region_id.tolist()})]
        history, trend = county_history(here, tensor.region_id, tensor.year, before=tensor.year, window=job.window)
    return Samples(
        inputs=tensor,
        target=unknown,
        history=history,
        trend=trend,
        unit=scaling.unit,
        crop=scaling.crop,
        past="previous-years",
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with a single thread inside, as before outside.

    Sums in another order round differently, so this is what makes engines agree to the bit; and on small batches a
    second thread costs more than it brings.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_whole(table: pa.Table, path: Path) -> None:
    with whole_file(path) as unfinished:
        pq.write_table(table, unfinished)


class _Shapes:
    """Polygons of a region file, those of one unit at a time: only ids and feature numbers stay in memory.

    A CSV of KML text or a GeoParquet file cannot be read in parts and is held whole.
    """

    def __init__(self, path: Path | None, id_column: str | None) -> None:
        self.path = path
        self.features: pd.Series | None = None
        self.whole: geopandas.GeoDataFrame | None = None
        if path is None:
            return
        if not path.exists():
            raise InputProblem(f"no region file at '{path}'")
        if path.suffix.lower() in _STREAMED:
            self.features = _feature_numbers(path, id_column)
        else:
            whole = read_regions(path, id_column=id_column).to_crs(4326)
            self.whole = whole.set_index(whole["region_id"].map(match_key))

    def of(self, region_id: Sequence[str], points: Sequence[bytes]) -> list[bytes]:
        """WKB in EPSG:4326 of every region; its point where the file has no polygon of it."""
        keys = [match_key(name) for name in region_id]
        if self.whole is not None:
            known = self.whole.geometry[self.whole.index.isin(set(keys))]
        elif self.features is not None:
            known = self._read(self.features[self.features.index.isin(set(keys))])
        else:
            return list(points)
        wkb = dict(zip(known.index, shapely.to_wkb(known.to_numpy()), strict=True))
        return [wkb.get(key, point) for key, point in zip(keys, points, strict=True)]

    def _read(self, features: Shaped[pd.Series, "M"]) -> geopandas.GeoSeries:
        if features.empty:
            return geopandas.GeoSeries([], crs=4326)
        frame = pyogrio.read_dataframe(self.path, fids=features.tolist(), columns=[], fid_as_index=True)
        frame = frame.set_index(frame.index.map(dict(zip(features, features.index, strict=True))))
        return frame.geometry.to_crs(4326)


def _feature_numbers(path: Path, id_column: str | None) -> pd.Series:
    """Feature number of every region, by the key that ids are matched with."""
    try:
        table = pyogrio.read_dataframe(path, read_geometry=False, fid_as_index=True)
    except (DataSourceError, ValueError) as problem:
        raise InputProblem(f"'{path}' cannot be read as polygons: {str(problem).splitlines()[0]}") from None
    named = [id_column] if id_column else [name for name in ID_COLUMNS if name in table.columns]
    if not named or named[0] not in table.columns:
        raise InputProblem(f"'{path}' has no column of region ids; it has {', '.join(map(str, table.columns))}")
    return pd.Series(table.index, index=[match_key(str(value)) for value in table[named[0]]])


def _join(job: _Job, units: Sequence[_Unit], out: Path, shapes: _Shapes) -> None:
    """Stream the finished units into one GeoParquet file, in the order of the store."""
    schema = pa.schema([*_COLUMNS.items(), ("geometry", pa.binary())], metadata=_metadata(job))
    poorly_seen = 0
    with whole_file(out) as unfinished, pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
        for unit in units:
            table = pq.read_table(job.folder / unit.name)
            geometry = shapes.of(table["region_id"].to_pylist(), table["point"].to_pylist())
            joined = table.drop_columns("point").append_column("geometry", pa.array(geometry, pa.binary()))
            writer.write_table(joined.cast(schema))
            poorly_seen += int((table["missing_share"].to_numpy() > MISSING_SHARE_TO_WARN).sum())
    if poorly_seen:
        log.warning(
            "%d rows miss more than %.0f %% of bands and composites; see missing_share",
            poorly_seen,
            100 * MISSING_SHARE_TO_WARN,
        )


def _metadata(job: _Job) -> dict[bytes, bytes]:
    """GeoParquet 1.1 ("geo") and what the predictions were made with."""
    geometry = {"encoding": "WKB", "geometry_types": [], "crs": CRS.from_epsg(4326).to_json_dict()}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    run = {
        "fingerprint": job.fingerprint,
        "level": _cached_model(job.model, job.fingerprint).level,
        "versions": {name: version(name) for name in ("geo-yield", "torch")},
    }
    return {b"geo": json.dumps(geo).encode(), _RUN_KEY: json.dumps(run).encode()}
