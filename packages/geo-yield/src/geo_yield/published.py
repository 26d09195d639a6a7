"""Public crop-yield data sets, each in its own layout, as the containers of this package.

| data set | here | axes of a sample | unit |
|---|---|---|---|
| pycrop, DFYP: `histogram_all_full.npz` | `read_pycrop` | band, time, bin | bu/acre |
| SustainBench (Yeh et al., NeurIPS Datasets 2021) | `read_sustainbench`, `from_torchgeo` | bin, time, band | t/ha |
| CropNet (Lin et al., KDD 2024) | `CropNetChips`, `read_cropnet_yields` | time, chip, row, column, RGB | bu/acre |
| CY-Bench (WUR-AI/AgML-CY-Bench) | `read_cybench` | one CSV per variable | t/ha |

Time and bin are both 32 long, so the shape cannot tell which is which: the axes are an argument, and a file whose
histograms sum to 1 along another axis than the bins is refused. Histogram files hold no pixel counts: `valid_count` is
1 where a histogram has mass and 0 where it is empty. Yields come as a table with columns region_id, year, crop, yield,
unit, source, rows without a yield left out.
"""

import json
import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32, Shaped, UInt8
from torch.utils.data import Dataset

from geo_yield.composites import every, period_of
from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramLayout, YieldTensor
from geo_yield.modis import MODIS_BANDS, MODIS_SEASON, modis_layout
from geo_yield.samples import IndexSeries
from geo_yield.yields import COLUMNS, crop_name

if TYPE_CHECKING:
    from torchgeo.datasets import SustainBenchCropYield

log = logging.getLogger(__name__)

PYCROP_LAYOUT = modis_layout(qa="none", mask="mcd12q1:12")
_SUSTAINBENCH_LIMITS = (
    (1, 2200), (900, 4999), (1, 1250), (150, 1875), (750, 4999), (300, 4999), (1, 4999), (13000, 16500), (13000, 15500)
)  # fmt: skip
SUSTAINBENCH_LAYOUT = HistogramLayout(
    sensor="modis",
    bands=MODIS_BANDS,
    doy=MODIS_SEASON,
    edges=tuple(tuple(np.linspace(low, high, 33).tolist()) for low, high in _SUSTAINBENCH_LIMITS),
    qa="none",
    mask="mcd12q1:12",
)
"""Edges per band, temperature as stored. The files hold no dates: the days are those of the US season."""

CYBENCH_SEASON = every(10, first=91, last=270)
_CYBENCH_VARIABLES = {
    "ndvi": ("ndvi",),
    "fpar": ("fpar",),
    "meteo": ("tmin", "tmax", "tavg", "prec", "cwb", "rad"),
    "soil_moisture": ("ssm", "rsm"),
}
_CROPNET_UNITS = {"YIELD, MEASURED IN BU / ACRE": "bu/acre", "YIELD, MEASURED IN LB / ACRE": "lb/acre"}
_CROPNET_PRODUCTION = ("PRODUCTION, MEASURED IN BU", "PRODUCTION, MEASURED IN 480 LB BALES")


def read_pycrop(path: Path, *, axes: str = "band,time,bin") -> tuple[YieldTensor, pd.DataFrame]:
    """`histogram_all_full.npz` of pycrop-yield-prediction and DFYP, and its yields in bu/acre.

    Region ids are 2 state and 3 county digits. Raises InputProblem if an array is missing or shaped otherwise, or the
    axes are not those given.
    """
    arrays = _load_npz(path, ("output_image", "output_yield", "output_year", "output_locations", "output_index"))
    image = histograms_in(arrays["output_image"], axes=axes, layout=PYCROP_LAYOUT, source=str(path))
    count = len(image)
    places = {name: _shaped(arrays[f"output_{name}"], (count, 2), name, path) for name in ("locations", "index")}
    ids = np.array([f"{int(state):02d}{int(county):03d}" for state, county in places["index"]], dtype=str)
    tensor = _tensor(
        image,
        PYCROP_LAYOUT,
        region_id=ids,
        year=_shaped(arrays["output_year"], (count,), "year", path),
        lon=places["locations"][:, 0],
        lat=places["locations"][:, 1],
    )
    return tensor, _table(tensor, _shaped(arrays["output_yield"], (count,), "yield", path), "bu/acre", "pycrop")


def read_sustainbench(
    root: Path, *, country: str, split: str, axes: str = "bin,time,band"
) -> tuple[YieldTensor, pd.DataFrame]:
    """`soybeans/<country>/<split>_{hists,yields,years}.npz` below `root`, and the yields in t/ha.

    The files name no regions: ids are "<country>-<split>-<row>", places unknown (NaN). Raises as `read_pycrop`.
    """
    folder = Path(root) / "soybeans" / country
    if not folder.is_dir():
        raise InputProblem(f"no folder '{folder}'. SustainBench has usa, argentina and brazil below soybeans.")
    parts = {name: folder / f"{split}_{name}.npz" for name in ("hists", "yields", "years")}
    arrays = {name: _load_npz(path, ("data",))["data"] for name, path in parts.items()}
    image = histograms_in(arrays["hists"], axes=axes, layout=SUSTAINBENCH_LAYOUT, source=str(parts["hists"]))
    years, values = (_shaped(arrays[name], (len(image),), name, parts[name]) for name in ("years", "yields"))
    return _nameless(image, years, values, f"{country}-{split}")


def from_torchgeo(dataset: "SustainBenchCropYield") -> tuple[YieldTensor, pd.DataFrame]:
    """The same out of torchgeo's class, which stores a sample as (band, bin, time)."""
    if not len(dataset):
        raise InputProblem("torchgeo's SustainBenchCropYield is empty")
    samples = [dataset[row] for row in range(len(dataset))]
    stack = np.stack([sample["image"].numpy() for sample in samples])
    image = histograms_in(stack, axes="band,bin,time", layout=SUSTAINBENCH_LAYOUT, source="torchgeo's data set")
    years = np.array([int(sample["year"]) for sample in samples])
    values = np.array([float(sample["label"]) for sample in samples], dtype=np.float32)
    return _nameless(image, years, values, f"{'+'.join(dataset.countries)}-{dataset.split}")


def _nameless(
    image: Float32[np.ndarray, "N C T K"], years: Shaped[np.ndarray, "N"], values: Shaped[np.ndarray, "N"], prefix: str
) -> tuple[YieldTensor, pd.DataFrame]:
    ids = np.array([f"{prefix}-{row:05d}" for row in range(len(image))], dtype=str)
    nowhere = np.full(len(image), np.nan)
    tensor = _tensor(image, SUSTAINBENCH_LAYOUT, region_id=ids, year=years, lon=nowhere, lat=nowhere)
    return tensor, _table(tensor, values, "t/ha", "sustainbench")


def histograms_in(
    stored: Shaped[np.ndarray, "N a b c"], *, axes: str, layout: HistogramLayout, source: str
) -> Float32[np.ndarray, "N C T K"]:
    """Bring histograms to (band, time, bin) and to shares. `axes` names the stored order, e.g. "bin,time,band".

    Counts are divided by their sum, an empty histogram stays all zero. Raises InputProblem if the shape does not fit
    the layout, a value is negative, or the histograms sum to 1 along time instead of along the bins.
    """
    order, canonical = axes.split(","), ("band", "time", "bin")
    if sorted(order) != sorted(canonical):
        raise InputProblem(f"axes must be an order of band,time,bin, got '{axes}'")
    expected = tuple(dict(zip(canonical, layout.shape, strict=True))[name] for name in order)
    if stored.ndim != 4 or stored.shape[1:] != expected or stored.dtype.kind not in "fiu":
        raise InputProblem(
            f"{source}: expected numbers (N, {expected}) for axes {axes}, got {stored.dtype} {stored.shape}"
        )
    image = np.nan_to_num(stored.transpose(0, *(1 + order.index(name) for name in canonical)).astype(np.float32))
    if image.size and image.min() < 0:
        raise InputProblem(f"{source}: histograms hold negative values, down to {image.min():g}")
    if _are_shares(image, axis=3):
        return image
    if _are_shares(image, axis=2):
        raise InputProblem(f"{source}: histograms sum to 1 along time, not along the bins: axes are not '{axes}'")
    log.warning("%s holds counts, not shares; each histogram is divided by its sum", source)
    total = image.sum(axis=3, keepdims=True)
    return image / np.where(total > 0, total, 1)


def _are_shares(image: Float[np.ndarray, "N C T K"], *, axis: int) -> bool:
    total = image.sum(axis=axis)
    return bool(np.all((np.abs(total - 1) < 1e-3) | (total == 0)))


def _tensor(
    image: Float32[np.ndarray, "N C T K"], layout: HistogramLayout, **columns: Shaped[np.ndarray, "N"]
) -> YieldTensor:
    seen = (image.sum(axis=3) > 0).astype(np.int32)
    return YieldTensor(
        layout=layout,
        image=image,
        region_id=columns["region_id"],
        year=columns["year"].astype(np.int16),
        lon=columns["lon"].astype(np.float32),
        lat=columns["lat"].astype(np.float32),
        valid_count=seen,
        pixel_count=np.ones(len(image), dtype=np.int32),
    )


def _table(tensor: YieldTensor, values: Shaped[np.ndarray, "N"], unit: str, source: str) -> pd.DataFrame:
    rows = {"region_id": tensor.region_id, "year": tensor.year.astype(int), "crop": "soybean"}
    table = pd.DataFrame(rows | {"yield": values.astype(float), "unit": unit, "source": source})
    return table[table["yield"].notna()][COLUMNS].reset_index(drop=True)


def _load_npz(path: Path, names: Sequence[str]) -> dict[str, Shaped[np.ndarray, "..."]]:
    if not Path(path).exists():
        raise InputProblem(f"no file '{path}'")
    try:
        with np.load(path, allow_pickle=False) as stored:
            missing = [name for name in names if name not in stored.files]
            if missing:
                raise InputProblem(f"'{path}' lacks {', '.join(missing)} (it has {', '.join(stored.files)})")
            return {name: stored[name] for name in names}
    except (OSError, EOFError, zipfile.BadZipFile, AttributeError) as problem:
        raise InputProblem(f"'{path}' is no readable npz file: {problem}") from None
    except ValueError as problem:
        raise problem if isinstance(problem, InputProblem) else InputProblem(f"'{path}': {problem}") from None


def _shaped(
    array: Shaped[np.ndarray, "..."], shape: tuple[int, ...], name: str, path: Path
) -> Shaped[np.ndarray, "..."]:
    if array.shape == shape or (array.size == np.prod(shape) and array.ndim == len(shape) + 1):
        return array.reshape(shape)
    raise InputProblem(f"'{path}': {name} must be {shape} as the histograms, got {array.shape}")


def read_cropnet_yields(path: Path) -> pd.DataFrame:
    """`USDA_<Crop>_County_<year>.csv`, or all of them below a folder. One row per county, year and crop.

    Columns region_id (5 digits), year, crop, yield, unit, source, production. Raises InputProblem if there is no such
    file, or one lacks a column.
    """
    path = Path(path)
    files = sorted(path.rglob("USDA_*_County_*.csv")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise InputProblem(f"no USDA_<Crop>_County_<year>.csv in '{path}'")
    return pd.concat([_cropnet_file(file) for file in files], ignore_index=True)


def _cropnet_file(file: Path) -> pd.DataFrame:
    try:
        text = pd.read_csv(file, dtype=str)
    except (ValueError, OSError) as problem:
        raise InputProblem(f"'{file}' is no readable CSV: {problem}") from None
    unit = next((column for column in _CROPNET_UNITS if column in text), None)
    production = next((column for column in _CROPNET_PRODUCTION if column in text), None)
    needed = {"commodity_desc", "year", "state_ansi", "county_ansi"}
    if unit is None or production is None or not needed <= set(text.columns):
        raise InputProblem(f"'{file}' lacks one of {', '.join(sorted(needed))}, a yield or a production column")
    numbers = {
        n: pd.to_numeric(text[c].str.replace(",", ""), errors="coerce") for n, c in (("y", unit), ("p", production))
    }
    table = pd.DataFrame(
        {
            "region_id": text["state_ansi"].str.zfill(2) + text["county_ansi"].str.zfill(3),
            "year": text["year"].astype(int),
            "crop": text["commodity_desc"].map(crop_name),
            "yield": numbers["y"],
            "unit": _CROPNET_UNITS[unit],
            "source": "cropnet",
            "production": numbers["p"],
        }
    )
    return table[table["region_id"].notna() & table["yield"].notna()].reset_index(drop=True)


class CropNetChips(Dataset[dict[str, Any]]):
    """Chips of one county and year with the log of its production and yield, from an index file and HDF5.

    A sample is {"chips": uint8 (T, G, 224, 224, 3), "target": float32 (2,) ln of [production, yield], "region_id",
    "year"}; T first-of-month images (the files also hold the 15th), G chips of 9 x 9 km, which differs by county.
    Channels are the "agriculture" rendering of Sentinel-2 L1C. Index rows without a positive yield and production are
    left out and counted in the log. Raises InputProblem on a missing extra, index, file or county.
    """

    def __init__(
        self,
        root: Path,
        index: Path,
        *,
        days: Sequence[int] = (1,),
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.root, self.days, self.transform = Path(root), tuple(days), transform
        rows = _read_index(Path(index))
        self.rows: list[Mapping[str, Any]] = []
        self.targets: list[tuple[float, float]] = []
        tables: dict[str, dict[tuple[str, int], tuple[float, float]]] = {}
        for row in rows:
            file = row["data"]["USDA"]
            if file not in tables:
                table = read_cropnet_yields(self.root / file)
                keys = zip(table["region_id"], table["year"], strict=True)
                tables[file] = dict(zip(keys, zip(table["production"], table["yield"], strict=True), strict=True))
            production, value = tables[file].get((row["FIPS"], int(row["year"])), (0.0, 0.0))
            if production > 0 and value > 0:
                self.rows.append(row)
                self.targets.append((float(production), float(value)))
        if len(self.rows) < len(rows):
            log.warning("%d of %d index rows have no yield and are left out", len(rows) - len(self.rows), len(rows))
        if not self.rows:
            raise InputProblem(f"no row of '{index}' has a yield")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        entry = self.rows[row]
        dates = [chips for file in entry["data"]["sentinel"] for chips in self._read(self.root / file, entry["FIPS"])]
        if len({chips.shape for chips in dates}) != 1:
            raise InputProblem(
                f"county {entry['FIPS']} of {entry['year']} has dates with {[len(c) for c in dates]} chips"
            )
        chips = torch.from_numpy(np.stack(dates))
        return {
            "chips": chips if self.transform is None else self.transform(chips),
            "target": torch.tensor(self.targets[row]).log(),
            "region_id": entry["FIPS"],
            "year": int(entry["year"]),
        }

    def _read(self, file: Path, county: str) -> list[UInt8[np.ndarray, "G 224 224 3"]]:
        try:
            import h5py
        except ImportError:
            raise InputProblem("reading CropNet needs geo-yield[cropnet]: uv add 'geo-yield[cropnet]'") from None
        try:
            with h5py.File(file, "r") as stored:
                if county not in stored:
                    raise InputProblem(f"'{file}' has no county {county}")
                wanted = [day for day in sorted(stored[county]) if int(day[-2:]) in self.days]
                return [stored[county][day]["data"][:] for day in wanted]
        except (OSError, KeyError) as problem:
            raise InputProblem(f"'{file}' is no readable CropNet file: {problem}") from None


def _read_index(path: Path) -> list[Mapping[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        good: list[Mapping[str, Any]] = [
            {**row, "FIPS": str(row["FIPS"]).zfill(5)}
            for row in rows
            if row["data"]["USDA"] and row["data"]["sentinel"]
        ]
        years = [int(row["year"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise InputProblem(f"'{path}' is no CropNet index (FIPS, year, data: USDA, sentinel): {problem!r}") from None
    if len(good) != len(years) or not good:
        raise InputProblem(f"'{path}' has {len(years) - len(good)} rows without files, or no rows")
    return good


def read_cybench(
    root: Path,
    *,
    crop: str,
    country: str,
    inputs: Sequence[str] = ("ndvi", "fpar", "meteo"),
    doy: Sequence[int] = CYBENCH_SEASON,
) -> tuple[IndexSeries, pd.DataFrame]:
    """`<crop>/<CC>/<input>_<crop>_<CC>.csv`: means over the periods `doy`, a row per region and year with a yield.

    A period without an observation is NaN; places are NaN without a location file. `inputs` of ndvi, fpar, meteo,
    soil_moisture. A season over New Year counts for the year it ends in. Raises InputProblem on a missing file or
    column.
    """
    folder = Path(root) / crop / country
    unknown = set(inputs) - set(_CYBENCH_VARIABLES)
    if unknown:
        raise InputProblem(f"CY-Bench inputs are {', '.join(_CYBENCH_VARIABLES)}, not {', '.join(sorted(unknown))}")
    table = _cybench_csv(folder / f"yield_{crop}_{country}.csv", ("adm_id", "harvest_year", "yield"))
    table = table.assign(**{"yield": pd.to_numeric(table["yield"], errors="coerce")}).dropna(subset=["yield"])
    rows = pd.MultiIndex.from_arrays([table["adm_id"].astype(str), table["harvest_year"].astype(int)])
    bands: list[str] = []
    values = []
    for name in inputs:
        variables = _CYBENCH_VARIABLES[name]
        observed = _cybench_csv(folder / f"{name}_{crop}_{country}.csv", ("adm_id", "date", *variables))
        values.append(_period_means(observed, variables, rows, doy))
        bands += variables
    lon, lat = _cybench_places(folder / f"location_{crop}_{country}.csv", rows)
    ids, years = rows.get_level_values(0).to_numpy(dtype=str), rows.get_level_values(1).to_numpy()
    series = IndexSeries(
        values=np.concatenate(values, axis=1),
        bands=tuple(bands),
        doy=tuple(doy),
        region_id=ids,
        year=years.astype(np.int16),
        lon=lon,
        lat=lat,
    )
    yields = {"region_id": ids, "year": years, "crop": crop_name(crop), "yield": table["yield"].to_numpy()}
    return series, pd.DataFrame(yields | {"unit": "t/ha", "source": "cybench"})[COLUMNS]


def _cybench_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype={"adm_id": str})
    except (ValueError, OSError) as problem:
        raise InputProblem(f"'{path}' is no readable CSV: {problem}") from None
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputProblem(f"'{path}' lacks {', '.join(missing)} (it has {', '.join(table.columns)})")
    return table


def _period_means(
    observed: pd.DataFrame, variables: Sequence[str], rows: pd.MultiIndex, doy: Sequence[int]
) -> Float32[np.ndarray, "N C T"]:
    days = pd.to_datetime(observed["date"].astype(str), format="%Y%m%d", errors="coerce")
    if days.isna().any():
        raise InputProblem(f"date '{observed['date'][days.isna()].iloc[0]}' is not written YYYYMMDD")
    found = {day: period_of(day.date(), doy) for day in days.unique()}
    inside = days.map(lambda day: found[day] is not None)
    kept, periods = observed[inside], [found[day] for day in days[inside]]
    keys = [kept["adm_id"].astype(str), [p[0] for p in periods if p], [p[1] for p in periods if p]]
    means = kept[list(variables)].groupby(keys).mean()
    steps = range(len(doy))
    wide = [means[v].unstack(level=2).reindex(index=rows, columns=steps).to_numpy(np.float32) for v in variables]
    return np.stack(wide, axis=1)


def _cybench_places(path: Path, rows: pd.MultiIndex) -> tuple[Float32[np.ndarray, "N"], Float32[np.ndarray, "N"]]:
    if not path.exists():
        nowhere = np.full(len(rows), np.nan, dtype=np.float32)
        return nowhere, nowhere.copy()
    table = _cybench_csv(path, ("adm_id", "longitude", "latitude")).drop_duplicates("adm_id").set_index("adm_id")
    there = table.reindex(rows.get_level_values(0))
    return there["longitude"].to_numpy(np.float32), there["latitude"].to_numpy(np.float32)
