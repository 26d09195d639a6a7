"""Index tables become series by value, whatever the order of columns and files; series become one-pixel histograms."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geo_yield.errors import InputProblem
from geo_yield.samples import IndexSeries
from geo_yield.series import fit_limits, read_districts, read_series, series_samples, series_to_histograms

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def series(values, **changes):
    n, c, t = np.shape(values)
    fields = {
        "values": np.asarray(values, np.float32),
        "bands": tuple("ABCDEF"[:c]),
        "doy": tuple(91 + 7 * k for k in range(t)),
        "region_id": np.array([f"{i:05d}" for i in range(n)]),
        "year": np.full(n, 2019, np.int16),
        "lon": np.full(n, -89, np.float32),
        "lat": np.full(n, 40, np.float32),
    }
    return IndexSeries(**fields | changes)


def test_files_are_joined_on_region_and_year_and_columns_by_their_number(tmp_path, caplog):
    vegetation = write(
        tmp_path / "vi.csv",
        "County,Year,ADC,NDVI2,NDVI1,NDVI10",
        "LA SALLE,2019,20,0.2,0.1,0.9",
        "ADAMS,2018,30,0.5,0.4,",
        "ADAMS,2019,30,0.8,0.7,0.6",
    )
    water = write(tmp_path / "w.csv", "Year,County,LSWI1,LSWI2,LSWI10", "2018,ADAMS,-1,-2,-3", "2019,LA SALLE,1,2,3")
    places = write(tmp_path / "c.csv", "location,longitude,latitude", "Adams,-91,40", "LASALLE,-88.5,41.25")
    with caplog.at_level("WARNING"):
        both = read_series([vegetation, water], centroids=places, first_day=100, every=8)
    assert "1 (region, year) rows are not in every series file" in caplog.text
    assert (both.bands, both.doy) == (("NDVI", "LSWI"), (100, 108, 172))
    assert list(zip(both.region_id, both.year, strict=True)) == [("ADAMS", 2018), ("LA SALLE", 2019)]
    expected = np.array([[[0.4, 0.5, np.nan], [-1, -2, -3]], [[0.1, 0.2, 0.9], [1, 2, 3]]], np.float32)
    np.testing.assert_array_equal(both.values, expected)
    assert both.lon.tolist() == [-91, -88.5]
    assert both.lat.tolist() == [40, 41.25]
    assert read_series([vegetation, water], indices=["LSWI"]).values[0].tolist() == [[-1, -2, -3]]
    assert read_districts(vegetation, both.region_id, column="ADC").tolist() == ["30", "20"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["County,Year,NDVI1", "A,2019,x"], "row 2, column 'NDVI1': 'x' is not a number"),
        (["County,Year,NDVI1", "A,2019,inf"], "'inf' is not a number"),
        (["County,Year,NDVI1", "A,2019,1", "A,2019,2"], "region 'A' in 2019 twice"),
        (["County,Year,NDVI1", "A,19,1"], "'19' is no year"),
        (["County,Year,NDVI1", ",2019,1"], "row 2 has no region in column 'County'"),
        (["Region,Year,NDVI1", "A,2019,1"], "no column 'County'; it has Region, Year, NDVI1"),
        (["County,Year,yield", "A,2019,1"], "no index columns like NDVI1"),
        (["County,Year,NDVI1,EVI1,EVI2", "A,2019,1,2,3"], "'EVI' and 'NDVI' have different week numbers"),
        (["County,Year,NDVI1"], "has no rows"),
    ],
)
def test_bad_tables_are_refused(tmp_path, lines, message):
    with pytest.raises(InputProblem, match=message):
        read_series([write(tmp_path / "bad.csv", *lines)])


def test_bad_sets_of_tables_are_refused(tmp_path):
    one = write(tmp_path / "a.csv", "County,Year,NDVI1", "A,2019,1", "B,2019,2")
    other = write(tmp_path / "b.csv", "County,Year,EVI1", "A,2020,1")
    with pytest.raises(InputProblem, match="no series file was given"):
        read_series([])
    with pytest.raises(InputProblem, match="no \\(region, year\\) in common"):
        read_series([one, other])
    with pytest.raises(InputProblem, match="'NDVI1' of .* is also in an earlier file"):
        read_series([one, one])
    with pytest.raises(InputProblem, match="no index 'SAVI' in the series files; there are NDVI"):
        read_series([one], indices=["SAVI"])
    with pytest.raises(InputProblem, match="lacks 1 regions of the series, first 'B'"):
        read_series([one], centroids=write(tmp_path / "c.csv", "id,lon,lat", "A,1,2"))
    with pytest.raises(InputProblem, match="needs columns longitude and latitude"):
        read_series([one], centroids=write(tmp_path / "d.csv", "id,x,y", "A,1,2"))
    districts = write(tmp_path / "e.csv", "County,D", "A,1", "A,2")
    with pytest.raises(InputProblem, match="puts region 'A' into two districts"):
        read_districts(districts, np.array(["A"]), column="D")
    with pytest.raises(InputProblem, match="no district for 1 regions, first 'B'"):
        read_districts(write(tmp_path / "f.csv", "County,D", "A,1"), np.array(["A", "B"]), column="D")


def test_samples_from_files(tmp_path):
    vi = write(
        tmp_path / "vi.csv", "County,Year,D,NDVI1", "LA SALLE,2019,20,0.5", "ADAMS,2019,30,0.7", "ADAMS,2020,30,0.8"
    )
    past = write(
        tmp_path / "y.csv",
        "region_id,year,yield",
        "LaSalle,2019,60",
        "LaSalle,2018,50",
        "Adams,2020,44",
        "Adams,2019,40",
    )
    options = {"crop": "soybean", "unit": "bu/acre", "district_column": "D"}
    rows = series_samples([vi], past, history="previous-years", **options)
    assert list(zip(rows.region_id, rows.year, rows.target, rows.district, strict=True)) == [
        ("ADAMS", 2019, 40, "30"),
        ("ADAMS", 2020, 44, "30"),
        ("LA SALLE", 2019, 60, "20"),
    ]
    np.testing.assert_array_equal(rows.history, [np.nan, 40, 50])
    before = series_samples([vi], past, history="before-first-season", **options)
    np.testing.assert_array_equal(before.history, [np.nan, np.nan, 50])
    with pytest.raises(InputProblem, match="no series file has the district column 'ADC'"):
        series_samples([vi], past, history="previous-years", **options | {"district_column": "ADC"})


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.sampled_from(["County,Year,NDVI1", "County,Year,NDVI1,NDVI1", "County;Year;EVI_3", "Year", ""]),
    cells=st.lists(
        st.lists(
            st.one_of(st.sampled_from(["A", "2019", "0.5", "", "nan", "1e99"]), st.text(max_size=5)),
            min_size=1,
            max_size=4,
        ),
        max_size=4,
    ),
    tail=st.binary(max_size=8),
)
def test_no_file_crashes_the_reader(tmp_path, header, cells, tail):
    path = tmp_path / "fuzz.csv"
    path.write_bytes("\n".join([header, *(",".join(row) for row in cells)]).encode("utf-8", "surrogatepass") + tail)
    try:
        read = read_series([path])
    except InputProblem:
        return
    assert read.values.shape == (len(read), len(read.bands), len(read.doy))
    assert ((read.year >= 1900) & (read.year <= 2100)).all()


def test_limits_are_the_quantiles_of_each_index():
    rng = np.random.default_rng(0)
    values = np.stack([rng.permutation(303), 5 - 2 * rng.permutation(303)]).reshape(2, 101, 3).transpose(1, 0, 2)
    assert fit_limits(series(values)) == pytest.approx(np.array([[3.02, 298.98], [-592.96, -1.04]]), rel=1e-5)
    flat = fit_limits(series(np.full((3, 1, 2), 0.25)))
    assert flat[0, 1] - flat[0, 0] == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(InputProblem, match="index 'B' has no value in the 2 rows"):
        fit_limits(series(np.array([[[1.0], [np.nan]], [[2.0], [np.nan]]])))


def test_a_value_is_spread_over_its_two_nearest_bins_and_weeks_are_centred():
    values = np.array([[[0.0, 0.25, 0.9, np.nan, 7.0]], [[-3.0, 1.0, 0.5, 0.6, 0.1]]])
    tensor = series_to_histograms(series(values), np.array([[0.0, 1.0]], np.float32), steps=8, bins=5)
    assert tensor.image.shape == (2, 1, 8, 5)
    weeks = tensor.image[0, 0, 1:6]  # 5 weeks in 8 steps: 1 before, 2 after
    expected = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0.4, 0.6], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_allclose(weeks, expected, atol=1e-6)
    assert not tensor.image[:, :, [0, 6, 7]].any()
    assert tensor.valid_count[0, 0].tolist() == [0, 1, 1, 1, 0, 1, 0, 0]
    assert tensor.layout.doy == (84, 91, 98, 105, 112, 119, 126, 133)
    assert (tensor.layout.sensor, tensor.layout.unit) == ("series", "index")
    assert tensor.layout.edges[0] == pytest.approx((-0.125, 0.125, 0.375, 0.625, 0.875, 1.125))
    centres = np.convolve(tensor.layout.edges[0], [0.5, 0.5], "valid")
    inside = np.clip(values[1, 0], 0, 1)
    np.testing.assert_allclose(tensor.image[1, 0, 1:6] @ centres, inside, atol=1e-6)  # the mean bin is the value


def test_histograms_of_some_weeks_stand_where_the_paper_has_them():
    tensor = series_to_histograms(series(np.full((1, 2, 26), 0.5)), np.array([[0, 1], [0, 1]], np.float32))
    assert np.flatnonzero(tensor.valid_count[0, 0]).tolist() == list(range(3, 29))
    with pytest.raises(InputProblem, match="26 weeks need at least 26 steps"):
        series_to_histograms(series(np.full((1, 1, 26), 0.5)), np.array([[0, 1]], np.float32), steps=25)


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not beside the checkout")
def test_illinois_series():
    folder = SHARED / "illinois-hls-soybean"
    paths = [folder / f"fundat_{name}.csv" for name in ("ri", "evi", "ndvi", "savi")]
    read = read_series(paths, centroids=folder / "96points.csv")
    assert read.values.shape == (384, 7, 26)
    assert read.bands == ("SATVI", "GNDVI", "LSWI", "WDVI", "EVI", "NDVI", "SAVI")
    adams = (read.region_id == "ADAMS") & (read.year == 2018)
    assert read.values[adams][0, 5, :2].tolist() == pytest.approx([0.698585, 0.576137])
    assert read.lat[adams][0] == pytest.approx(39.98784, abs=1e-4)
    assert np.unique(read_districts(folder / "fundat_ndvi.csv", read.region_id, column="ADC")).size == 9
