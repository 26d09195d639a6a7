"""County-mean index series: read from wide tables, and shown to histogram models as one-pixel histograms.

Many offices hold no pixels but a table: a row per county and year, columns NDVI1..NDVI26 for the weeks. A mean is a
histogram with one pixel in it, so the models for histograms take it unchanged; to keep more than 32 distinct values,
the pixel is spread linearly over the two bins whose centres are nearest.
Decided here: the bins of an index reach from its 1 % to its 99 % quantile over the training rows, values beyond are
clipped (a few weekly means are outside the physical range); the weeks stand in the middle of the 32 steps.

Shapes: N rows, C indices, T weeks, S steps, K bins.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float32, Shaped

from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramLayout, YieldTensor
from geo_yield.samples import IndexSeries, Samples
from geo_yield.yields import join_yields, match_key, read_text_table, read_years, read_yields

APRIL_1 = 91
_WEEK_COLUMN = re.compile(r"([A-Za-z][A-Za-z_]*?)_?(\d+)")

_log = logging.getLogger(__name__)


def read_series(
    paths: Sequence[Path],
    *,
    id_column: str = "County",
    year_column: str = "Year",
    indices: Sequence[str] | None = None,
    first_day: int = APRIL_1,
    every: int = 7,
    centroids: Path | None = None,
) -> IndexSeries:
    """One row per (region, year) that all files hold, the index columns of all files side by side.

    Index columns are a name and a running number (NDVI1, NDVI2, ...); number 1 stands for day of year `first_day`, each
    further one for `every` days later. indices: the ones to keep, in order; default all, in order of appearance.
    centroids: table of one row per region: its id, longitude and latitude. Empty cells become NaN.
    Raises InputProblem for an unreadable file, missing or non-numeric columns, a (region, year) that comes twice,
    indices of different lengths, or no common row.
    """
    if not paths:
        raise InputProblem(
            "no series file was given; a wide CSV has a row per region and year, columns NDVI1, NDVI2, ..."
        )
    merged: pd.DataFrame | None = None
    for path in paths:
        table = _read_wide(Path(path), id_column, year_column)
        if merged is None:
            merged = table
            continue
        if twice := sorted(set(merged.columns) & set(table.columns)):
            raise InputProblem(f"column '{twice[0]}' of '{path}' is also in an earlier file: pass each index once")
        before = max(len(merged), len(table))
        merged = merged.join(table, how="inner")
        if len(merged) < before:
            _log.warning("%d (region, year) rows are not in every series file and are left out", before - len(merged))
    if merged is None or merged.empty:
        raise InputProblem(f"the series files {[str(p) for p in paths]} have no (region, year) in common")
    return _to_series(merged.sort_index(), indices, first_day, every, centroids)


def _read_wide(path: Path, id_column: str, year_column: str) -> pd.DataFrame:
    """The index columns of one file as numbers, indexed by (region_id, year)."""
    text = read_text_table(path)
    for column in (id_column, year_column):
        if column not in text.columns:
            raise InputProblem(
                f"'{path}' has no column '{column}'; it has {_some(text.columns)}. Name it by an option."
            )
    weeks = [c for c in text.columns if _WEEK_COLUMN.fullmatch(c) and c not in (id_column, year_column)]
    if not weeks:
        raise InputProblem(f"'{path}' has no index columns like NDVI1, NDVI2, ...; it has {_some(text.columns)}")
    ids = text[id_column].str.strip()
    if (ids == "").any():
        raise InputProblem(f"'{path}' row {int(np.argmax(ids == '')) + 2} has no region in column '{id_column}'")
    table = pd.DataFrame({c: _numbers(text[c], path) for c in weeks}, dtype=np.float32)
    table.index = pd.MultiIndex.from_arrays([ids, read_years(text[year_column], path)], names=["region_id", "year"])
    if table.index.has_duplicates:
        region, year = table.index[table.index.duplicated()][0]
        raise InputProblem(f"'{path}' has region '{region}' in {year} twice: keep one row for each region and year")
    return table


def _numbers(text: pd.Series, path: Path) -> Float32[np.ndarray, "N"]:
    numbers = pd.to_numeric(text.replace({"": np.nan, "NA": np.nan, "NaN": np.nan}), errors="coerce")
    bad = (numbers.isna() & ~text.isin(["", "NA", "NaN"])) | np.isinf(numbers.to_numpy(np.float64))
    if bad.any():
        row = int(np.argmax(bad.to_numpy()))
        raise InputProblem(f"'{path}' row {row + 2}, column '{text.name}': '{text.iloc[row]}' is not a number")
    return numbers.to_numpy(np.float32)


def _to_series(
    table: pd.DataFrame, indices: Sequence[str] | None, first_day: int, every: int, centroids: Path | None
) -> IndexSeries:
    weeks: dict[str, list[tuple[int, str]]] = {}
    for column in table.columns:
        match = _WEEK_COLUMN.fullmatch(column)
        if match is not None:
            weeks.setdefault(match[1], []).append((int(match[2]), column))
    wanted = tuple(indices) if indices is not None else tuple(weeks)
    if missing := [name for name in wanted if name not in weeks]:
        raise InputProblem(f"no index '{missing[0]}' in the series files; there are {', '.join(weeks)}")
    numbers = [sorted(n for n, _ in weeks[name]) for name in wanted]
    if any(n != numbers[0] for n in numbers):
        name = wanted[next(i for i, n in enumerate(numbers) if n != numbers[0])]
        raise InputProblem(f"'{name}' and '{wanted[0]}' have different week numbers; every index needs the same weeks")
    region_id = table.index.get_level_values("region_id").to_numpy(str)
    lon, lat = _centroids(centroids, region_id)
    return IndexSeries(
        values=np.stack([table[[c for _, c in sorted(weeks[name])]].to_numpy(np.float32) for name in wanted], axis=1),
        bands=wanted,
        doy=tuple(first_day + every * (n - 1) for n in numbers[0]),
        region_id=region_id,
        year=table.index.get_level_values("year").to_numpy(np.int16),
        lon=lon,
        lat=lat,
    )


def _centroids(
    path: Path | None, region_id: Shaped[np.ndarray, "N"]
) -> tuple[Float32[np.ndarray, "N"], Float32[np.ndarray, "N"]]:
    """Longitude and latitude of every row, NaN where there is no file. Columns: id, then lon and lat by their names."""
    if path is None:
        return np.full((2, len(region_id)), np.nan, np.float32)[0], np.full(len(region_id), np.nan, np.float32)
    text = read_text_table(path)
    lower = {c.lower(): c for c in text.columns}
    lon, lat = (
        next((lower[n] for n in names if n in lower), None) for names in (("lon", "longitude"), ("lat", "latitude"))
    )
    if lon is None or lat is None:
        raise InputProblem(f"'{path}' needs columns longitude and latitude beside the id; it has {_some(text.columns)}")
    ids = text[next(c for c in text.columns if c not in (lon, lat))].map(match_key)
    places = pd.DataFrame({"lon": _numbers(text[lon], path), "lat": _numbers(text[lat], path)}).set_axis(ids.to_numpy())
    if places.index.has_duplicates:
        raise InputProblem(f"'{path}' has region '{places.index[places.index.duplicated()][0]}' twice")
    keys = [match_key(name) for name in region_id]
    if unknown := sorted(set(keys) - set(places.index)):
        raise InputProblem(f"'{path}' lacks {len(unknown)} regions of the series, first '{unknown[0]}'")
    found = places.loc[keys]
    return found["lon"].to_numpy(np.float32), found["lat"].to_numpy(np.float32)


def read_districts(
    path: Path, region_id: Shaped[np.ndarray, "N"], *, column: str, id_column: str = "County"
) -> Shaped[np.ndarray, "N"]:
    """District (text) of every row of `region_id`, from a table that holds one for each region.

    Raises InputProblem if a column is missing, a region has none, or has two.
    """
    text = read_text_table(path)
    for name in (column, id_column):
        if name not in text.columns:
            raise InputProblem(f"'{path}' has no column '{name}'; it has {_some(text.columns)}")
    pairs = pd.DataFrame(
        {"key": text[id_column].map(match_key), "district": text[column].str.strip()}
    ).drop_duplicates()
    if pairs["key"].duplicated().any():
        name = pairs.loc[pairs["key"].duplicated(), "key"].iloc[0]
        raise InputProblem(f"'{path}' puts region '{name}' into two districts of column '{column}'")
    district = dict(zip(pairs["key"], pairs["district"], strict=True))
    if unknown := sorted({match_key(name) for name in region_id} - set(district)):
        raise InputProblem(f"'{path}' has no district for {len(unknown)} regions, first '{unknown[0]}'")
    return np.array([district[match_key(name)] for name in region_id])


def series_samples(
    paths: Sequence[Path],
    yields: Path,
    *,
    history: str,
    crop: str | None = None,
    unit: str | None = None,
    id_column: str = "County",
    year_column: str = "Year",
    centroids: Path | None = None,
    district_column: str | None = None,
    window: int = 10,
) -> Samples:
    """The rows of series files that have a yield in a table of yields, ready for `evaluate`.

    history: see `join_yields`; `evaluation.history_for(protocol)` names the one that fits. district_column: a column of
    one of the series files. Raises InputProblem as `read_series`, `read_yields` and `join_yields` do.
    """
    series = read_series(paths, id_column=id_column, year_column=year_column, centroids=centroids)
    district = None
    if district_column is not None:
        holding = [path for path in paths if district_column in read_text_table(path).columns]
        if not holding:
            raise InputProblem(f"no series file has the district column '{district_column}'")
        district = read_districts(holding[0], series.region_id, column=district_column, id_column=id_column)
    table = read_yields(yields, crop=crop, unit=unit)
    samples = join_yields(series, table, history=history, window=window, district=district)
    return samples.take(np.isfinite(samples.target))


def fit_limits(series: IndexSeries) -> Float32[np.ndarray, "C 2"]:
    """1 % and 99 % quantile of each index over all rows and weeks given. Pass training rows only.

    An index that does not vary gets limits 0.001 apart. Raises InputProblem if an index has no value at all.
    """
    limits = np.empty((len(series.bands), 2), np.float32)
    for c, name in enumerate(series.bands):
        values = series.values[:, c]
        if not np.isfinite(values).any():
            raise InputProblem(f"index '{name}' has no value in the {len(series)} rows to learn from")
        # quantiles, not extremes: one weekly mean out of physical range would squeeze all others into few bins
        low, high = np.nanquantile(values, [0.01, 0.99])
        limits[c] = low, max(high, low + 1e-3)
    return limits


def series_to_histograms(
    series: IndexSeries, limits: Float32[np.ndarray, "C 2"], *, steps: int = 32, bins: int = 32
) -> YieldTensor:
    """(N, C, S, K) one-pixel histograms: the value clipped to its limits, spread over its two nearest bin centres.

    Bin centres lie at limits[c, 0], ..., limits[c, 1], evenly. The T weeks take the middle of the S steps; the steps
    around them, and missing weeks, are all zero with valid_count 0. Raises InputProblem if T > S or K < 2.
    """
    N, C, T = series.values.shape
    if steps < T or bins < 2:
        raise InputProblem(f"{T} weeks need at least {T} steps and 2 bins, got steps={steps}, bins={bins}")
    start = (steps - T) // 2  # centred, so that the convolutions' zero padding stays away from the season
    low, high = limits[:, :1], limits[:, 1:]
    seen = np.isfinite(series.values)
    place = np.clip((series.values - low) / (high - low), 0, 1) * (bins - 1)
    # a value at the upper limit belongs wholly to the last bin, which then is the right one of its pair
    left = np.minimum(np.nan_to_num(place).astype(np.int64), bins - 2)
    share = np.nan_to_num(place).astype(np.float32) - left
    image = np.zeros((N, C, steps, bins), np.float32)
    weeks = image[:, :, start : start + T]
    np.put_along_axis(weeks, left[..., None], np.where(seen, 1 - share, 0)[..., None], axis=-1)
    np.put_along_axis(weeks, left[..., None] + 1, np.where(seen, share, 0)[..., None], axis=-1)
    valid_count = np.zeros((N, C, steps), np.int32)
    valid_count[:, :, start : start + T] = seen
    return YieldTensor(
        layout=_layout(series, limits, start, steps, bins),
        image=image,
        region_id=series.region_id,
        year=series.year,
        lon=series.lon,
        lat=series.lat,
        valid_count=valid_count,
        pixel_count=np.ones(N, np.int32),
    )


def _layout(
    series: IndexSeries, limits: Float32[np.ndarray, "C 2"], start: int, steps: int, bins: int
) -> HistogramLayout:
    """Days of the empty steps go on at the spacing of the weeks; edges lie half a bin around the centres."""
    every = int(np.median(np.diff(series.doy))) if len(series.doy) > 1 else 7
    before = [series.doy[0] - every * k for k in range(start, 0, -1)]
    after = [series.doy[-1] + every * k for k in range(1, steps - start - len(series.doy) + 1)]
    edges = []
    for low, high in limits.astype(np.float64).tolist():
        half = (high - low) / (bins - 1) / 2
        edges.append(tuple(np.linspace(low - half, high + half, bins + 1).tolist()))
    return HistogramLayout(
        sensor="series",
        bands=series.bands,
        doy=(*before, *series.doy, *after),
        edges=tuple(edges),
        unit="index",
        qa="none",
    )


def _some(columns: Iterable[str]) -> str:
    columns = list(columns)
    names = ", ".join(map(str, columns[:8]))
    return names + (f", ... ({len(columns)} columns)" if len(columns) > 8 else "")
