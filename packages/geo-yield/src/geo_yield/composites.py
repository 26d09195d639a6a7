"""Irregular looks at the ground to regular time steps: which period a date falls in, composites, means per region.

Maximum-value compositing keeps, per pixel, the look with the highest NDVI, which is rarely a cloudy one: Holben,
"Characteristics of maximum-value composite images from temporal AVHRR data", Int. J. Remote Sensing 7, 1986. The median
keeps the middle value of each band. Both count how many looks a pixel had, so that "nothing seen" is never a value.

Decided here: a season may run over New Year (day 274, ..., 335, 1, 32); it then counts for the year it ends in.

Shapes: T looks, C bands, H rows, W columns, R regions, P periods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

import geopandas as gpd
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from geo_yield.errors import InputProblem
from geo_yield.samples import IndexSeries

Method = Literal["median", "max-ndvi"]

MONTH_STARTS = (1, 32, 60, 91, 121, 152, 182, 213, 244, 274, 305, 335)
"""First day of each month as day of a 365-day year."""
APRIL_TO_SEPTEMBER = MONTH_STARTS[3:9]


def every(days: int, *, first: int, last: int) -> tuple[int, ...]:
    """First days of periods of `days` days that start between day of year `first` and `last`."""
    if not (days > 0 and 1 <= first <= last <= 366):
        raise InputProblem(f"a season needs days > 0 and 1 <= first <= last <= 366, got {days}, {first}, {last}")
    return tuple(range(first, last + 1, days))


def periods(doy: Sequence[int], year: int) -> list[tuple[date, date]]:
    """First day and first day after of every period of the harvest year `year`.

    First days that are all firsts of months mean calendar months, so that leap years and short months stay right;
    otherwise a period lasts until the next begins and the last one as long as the one before.
    """
    if not doy:
        raise InputProblem("a season needs at least one period, got none")
    wrap = next((i for i in range(1, len(doy)) if doy[i] < doy[i - 1]), 0)
    years = [year - 1 if i < wrap else year for i in range(len(doy))]
    if all(day in MONTH_STARTS for day in doy):
        return [_month(y, MONTH_STARTS.index(day) + 1) for y, day in zip(years, doy, strict=True)]
    starts = [date(y, 1, 1) + timedelta(days=day - 1) for y, day in zip(years, doy, strict=True)]
    last = starts[-1] - starts[-2] if len(starts) > 1 else timedelta(days=366)
    return list(zip(starts, [*starts[1:], starts[-1] + last], strict=True))


def _month(year: int, month: int) -> tuple[date, date]:
    after = date(year + month // 12, month % 12 + 1, 1)
    return date(year, month, 1), after


def period_of(day: date, doy: Sequence[int]) -> tuple[int, int] | None:
    """(harvest year, step) of a date, or None outside the season."""
    for year in (day.year, day.year + 1):
        for step, (start, end) in enumerate(periods(doy, year)):
            if start <= day < end:
                return year, step
    return None


@dataclass(frozen=True, kw_only=True)
class Composite:
    """One value per pixel out of many looks."""

    values: Float32[np.ndarray, "C H W"]
    """NaN where no look was valid."""
    count: Int32[np.ndarray, "H W"]
    """Looks that were valid."""


def composite(
    stack: Float[np.ndarray, "T C H W"],
    valid: Bool[np.ndarray, "T H W"],
    *,
    method: Method = "median",
    ndvi: Float[np.ndarray, "T H W"] | None = None,
) -> Composite:
    """Reduce T looks to one: each band's median over valid looks, or all bands of the valid look with the highest NDVI.

    `ndvi` is needed by "max-ndvi" unless the stack has one band, which is then taken to be NDVI. Ties go to the earlier
    look. Raises InputProblem on shapes that disagree or an unknown method.
    """
    T, C, H, W = stack.shape
    if valid.shape != (T, H, W):
        raise InputProblem(f"valid must be {(T, H, W)} like the stack, got {valid.shape}")
    count = valid.sum(axis=0, dtype=np.int32)
    if method == "median":
        values = _median(stack, valid, count)
    elif method == "max-ndvi":
        if ndvi is None and C != 1:
            raise InputProblem(f"max-ndvi over {C} bands needs the NDVI of every look: pass ndvi=")
        values = _best(stack, valid, stack[:, 0] if ndvi is None else ndvi)
    else:
        raise InputProblem(f"unknown compositing method '{method}'. Choose median or max-ndvi.")
    return Composite(values=np.where(count > 0, values, np.nan).astype(np.float32), count=count)


def _median(
    stack: Float[np.ndarray, "T C H W"], valid: Bool[np.ndarray, "T H W"], count: Int32[np.ndarray, "H W"]
) -> Float[np.ndarray, "C H W"]:
    # Invalid looks sort to the end as NaN, so that the middle of the first `count` values is the median.
    ordered = np.sort(np.where(valid[:, None], stack, np.nan), axis=0)
    low, high = np.maximum(count - 1, 0) // 2, np.maximum(count, 1) // 2
    high = np.minimum(high, np.maximum(count - 1, 0))
    pick = [np.take_along_axis(ordered, index[None, None], axis=0)[0] for index in (low, high)]
    return (pick[0] + pick[1]) / 2


def _best(
    stack: Float[np.ndarray, "T C H W"], valid: Bool[np.ndarray, "T H W"], ndvi: Float[np.ndarray, "T H W"]
) -> Float[np.ndarray, "C H W"]:
    best = np.where(valid, ndvi, -np.inf).argmax(axis=0)
    return np.take_along_axis(stack, best[None, None], axis=0)[0]


def zonal_mean(
    values: Float[np.ndarray, "C H W"], valid: Bool[np.ndarray, "H W"], labels: Int[np.ndarray, "H W"], *, regions: int
) -> tuple[Float32[np.ndarray, "R C"], Int32[np.ndarray, "R"]]:
    """Mean per region over its valid pixels, and how many those were; NaN for a region without any.

    `labels` holds i + 1 on region i's pixels and 0 elsewhere, as `geo_yield.regions.rasterise` makes it.
    """
    if labels.max(initial=0) > regions:
        raise InputProblem(f"labels name region {labels.max()}, but there are {regions}")
    inside = labels[valid]
    count = np.bincount(inside, minlength=regions + 1)[1:]
    sums = np.stack([np.bincount(inside, weights=band[valid], minlength=regions + 1)[1:] for band in values], axis=1)
    means = np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], np.nan)
    return means.astype(np.float32), count.astype(np.int32)


def region_series(
    stack: Float[np.ndarray, "T C H W"],
    valid: Bool[np.ndarray, "T H W"],
    dates: Sequence[date],
    labels: Int[np.ndarray, "H W"],
    regions: gpd.GeoDataFrame,
    *,
    bands: Sequence[str],
    doy: Sequence[int],
    years: Sequence[int],
    method: Method = "median",
) -> IndexSeries:
    """Composite every period of every year, then average over each region: R x years rows, C bands, P steps.

    `regions` has the columns region_id and geometry, in the order of `labels`. A (region, period) without a valid pixel
    is NaN. For "max-ndvi" over several bands, "NDVI" must be one of `bands`.
    """
    if method == "max-ndvi" and len(bands) > 1 and "NDVI" not in bands:
        raise InputProblem(f"max-ndvi needs a band called NDVI, got {', '.join(bands)}")
    ndvi = stack[:, list(bands).index("NDVI") if "NDVI" in bands else 0]
    found = [period_of(day, doy) for day in dates]
    values = np.full((len(years), len(regions), len(bands), len(doy)), np.nan, dtype=np.float32)
    for i, year in enumerate(years):
        for step in range(len(doy)):
            looks = [t for t, period in enumerate(found) if period == (year, step)]
            if looks:
                one = composite(stack[looks], valid[looks], method=method, ndvi=ndvi[looks])
                values[i, :, :, step] = zonal_mean(one.values, one.count > 0, labels, regions=len(regions))[0]
    points = regions.geometry.representative_point().to_crs(4326)
    per_year = len(years)
    return IndexSeries(
        values=values.reshape(-1, len(bands), len(doy)),
        bands=tuple(bands),
        doy=tuple(doy),
        region_id=np.tile(regions["region_id"].to_numpy(dtype=str), per_year),
        year=np.repeat(np.array(years, dtype=np.int16), len(regions)),
        lon=np.tile(points.x.to_numpy(np.float32), per_year),
        lat=np.tile(points.y.to_numpy(np.float32), per_year),
    )
