"""Periods, composites and means per region, the last two also against reference answers of a Slovenian patch."""

import json
from datetime import date, datetime
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
from shapely.geometry import box

from geo_yield.composites import (
    APRIL_TO_SEPTEMBER,
    composite,
    every,
    period_of,
    periods,
    region_series,
    zonal_mean,
)
from geo_yield.errors import InputProblem

PATCH = Path(__file__).resolve().parents[4] / "shared" / "data" / "sentinel2-slovenia-eopatch"


def test_months_are_calendar_months_in_leap_years_too():
    assert APRIL_TO_SEPTEMBER == (91, 121, 152, 182, 213, 244)
    assert period_of(date(2020, 4, 1), APRIL_TO_SEPTEMBER) == (2020, 0)  # day 92 of a leap year
    assert period_of(date(2020, 3, 31), APRIL_TO_SEPTEMBER) is None  # day 91 of a leap year
    assert period_of(date(2021, 9, 30), APRIL_TO_SEPTEMBER) == (2021, 5)
    assert period_of(date(2021, 10, 1), APRIL_TO_SEPTEMBER) is None
    assert period_of(date(2021, 5, 15), (91, 152)) is None  # April and June only


def test_sixteen_day_periods_end_where_the_next_begins():
    doy = every(16, first=97, last=140)
    assert doy == (97, 113, 129)
    assert periods(doy, 2021)[-1] == (date(2021, 5, 9), date(2021, 5, 25))
    assert period_of(date(2021, 4, 22), doy) == (2021, 0)  # day 112
    assert period_of(date(2021, 4, 23), doy) == (2021, 1)  # day 113
    assert period_of(date(2021, 5, 25), doy) is None


def test_a_season_over_new_year_counts_for_the_year_it_ends_in():
    doy = (274, 305, 335, 1, 32)
    assert period_of(date(2019, 10, 31), doy) == (2020, 0)
    assert period_of(date(2020, 2, 29), doy) == (2020, 4)
    assert period_of(date(2020, 12, 1), doy) == (2021, 2)
    assert period_of(date(2020, 3, 1), doy) is None
    uneven = (353, 4)
    assert periods(uneven, 2021) == [(date(2020, 12, 18), date(2021, 1, 4)), (date(2021, 1, 4), date(2021, 1, 21))]


@pytest.mark.parametrize(("days", "first", "last"), [(0, 1, 9), (8, 0, 9), (8, 9, 1), (8, 1, 367)])
def test_impossible_seasons_are_refused(days, first, last):
    with pytest.raises(InputProblem, match="a season needs"):
        every(days, first=first, last=last)
    with pytest.raises(InputProblem, match="at least one period"):
        periods((), 2020)


def test_median_agrees_with_numpy_and_counts_what_was_valid():
    rng = np.random.default_rng(3)
    stack = rng.normal(size=(7, 2, 5, 4)).astype(np.float32)
    valid = rng.random((7, 5, 4)) < 0.5
    valid[:, 2, 3] = False
    got = composite(stack, valid, method="median")
    for row, column in np.ndindex(5, 4):
        looks = stack[valid[:, row, column], :, row, column]
        assert got.count[row, column] == len(looks)
        if len(looks):
            np.testing.assert_allclose(got.values[:, row, column], np.median(looks, axis=0), rtol=1e-6)
        else:
            assert np.isnan(got.values[:, row, column]).all()
    assert set(np.unique(got.count)) >= {0, 2, 3}  # even and odd counts both occurred


def test_an_invalid_look_never_enters_even_where_it_is_not_a_number():
    stack = np.array([3.0, np.nan, 5.0, 100.0], dtype=np.float32).reshape(4, 1, 1, 1)
    valid = np.array([True, False, True, False]).reshape(4, 1, 1)
    assert composite(stack, valid, method="median").values.item() == 4.0
    assert composite(stack, valid, method="max-ndvi").values.item() == 5.0


def test_max_ndvi_takes_all_bands_from_one_look():
    stack = np.arange(24, dtype=np.float32).reshape(3, 4, 1, 2)
    ndvi = np.array([[[0.3, 0.9]], [[0.8, 0.1]], [[0.9, 0.9]]], dtype=np.float32)
    valid = np.array([[[True, True]], [[True, True]], [[False, True]]])
    got = composite(stack, valid, method="max-ndvi", ndvi=ndvi)
    np.testing.assert_array_equal(got.values[:, 0, 0], stack[1, :, 0, 0])
    np.testing.assert_array_equal(got.values[:, 0, 1], stack[0, :, 0, 1])  # a tie goes to the earlier look
    np.testing.assert_array_equal(got.count, [[2, 3]])


def test_what_cannot_be_composited_is_refused():
    stack, valid = np.zeros((3, 2, 4, 5), dtype=np.float32), np.ones((3, 4, 5), dtype=bool)
    with pytest.raises(InputProblem, match="pass ndvi="):
        composite(stack, valid, method="max-ndvi")
    with pytest.raises(InputProblem, match=r"must be \(3, 4, 5\)"):
        composite(stack, valid[:2])
    with pytest.raises(InputProblem, match="Choose median or max-ndvi"):
        composite(stack, valid, method="mean")


def test_zonal_mean_leaves_out_invalid_pixels_and_other_regions():
    values = np.array([[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]], dtype=np.float32)
    labels = np.array([[1, 1, 3], [3, 0, 3]], dtype=np.int32)
    valid = np.array([[True, False, True], [True, True, False]])
    means, count = zonal_mean(values, valid, labels, regions=4)
    np.testing.assert_array_equal(count, [1, 0, 2, 0])
    np.testing.assert_array_equal(means[[0, 2], 0], [1.0, 6.0])
    assert np.isnan(means[[1, 3]]).all()
    with pytest.raises(InputProblem, match="labels name region 3, but there are 2"):
        zonal_mean(values, valid, labels, regions=2)


def test_region_series_has_a_row_per_region_and_year():
    regions = gpd.GeoDataFrame(
        {"region_id": ["007", "12"]}, geometry=[box(500000, 5000000, 500020, 5000020)] * 2, crs="EPSG:32615"
    )
    dates = [date(2020, 4, 3), date(2020, 4, 20), date(2021, 5, 9)]
    stack = np.array([[[[1.0, 10.0]]], [[[3.0, 30.0]]], [[[5.0, 50.0]]]], dtype=np.float32)
    valid = np.array([[[True, True]], [[True, False]], [[True, True]]])
    got = region_series(
        stack,
        valid,
        dates,
        np.array([[1, 2]], dtype=np.int32),
        regions,
        bands=["NDVI"],
        doy=(91, 121),
        years=[2020, 2021],
    )
    nan = np.nan
    np.testing.assert_array_equal(got.values[:, 0], [[2, nan], [10, nan], [nan, 5], [nan, 50]])
    assert got.region_id.tolist() == ["007", "12", "007", "12"]
    assert got.year.tolist() == [2020, 2020, 2021, 2021]
    np.testing.assert_allclose(got.lon, -93.0, atol=1e-3)  # the central meridian of zone 15
    np.testing.assert_allclose(got.lat, 45.15, atol=0.01)


def load(name: str) -> np.ndarray:
    if not PATCH.exists():
        pytest.skip("the Slovenian patch is not beside the checkout")
    return np.load(PATCH / f"{name}.npy")[..., 0]


@pytest.mark.real
def test_the_patch_gives_its_own_maximum_ndvi_and_valid_count_exactly():
    ndvi, valid = load("data_NDVI"), load("mask_IS_VALID")
    everything = composite(ndvi[:, None], np.ones_like(valid), method="max-ndvi")
    np.testing.assert_array_equal(everything.values[0], load("data_timeless_MAX_NDVI").astype(np.float32))
    np.testing.assert_array_equal(composite(ndvi[:, None], valid).count, load("mask_timeless_VALID_COUNT"))


@pytest.mark.real
def test_masked_monthly_medians_of_the_patch_follow_the_season():
    ndvi, valid = load("data_NDVI"), load("mask_IS_VALID")
    dates = [datetime.fromisoformat(text).date() for text in json.loads((PATCH / "timestamps.json").read_text())]
    steps = [period_of(day, (1, 121, 152, 182, 213)) for day in dates]
    means = {}
    for step in (0, 2):
        looks = [t for t, found in enumerate(steps) if found == (2017, step)]
        means[step] = np.nanmean(composite(ndvi[looks, None], valid[looks]).values)
    assert means[2] - means[0] > 0.2  # June is far greener than January
