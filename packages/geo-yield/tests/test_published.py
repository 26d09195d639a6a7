"""Readers of public data sets, on small files in their layouts. The sets themselves are too large to keep."""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from geo_yield.errors import InputProblem
from geo_yield.published import (
    PYCROP_LAYOUT,
    SUSTAINBENCH_LAYOUT,
    CropNetChips,
    from_torchgeo,
    histograms_in,
    read_cropnet_yields,
    read_cybench,
    read_pycrop,
    read_sustainbench,
)


def shares(rows: int, seed: int = 0) -> np.ndarray:
    """Histograms (N, band, time, bin) of 9, 32, 32, with one that is empty."""
    counts = np.random.default_rng(seed).integers(1, 50, size=(rows, 9, 32, 32)).astype(np.float64)
    counts[0, 4, 7] = 0
    return counts / np.maximum(counts.sum(axis=3, keepdims=True), 1)


def write_pycrop(path: Path, image: np.ndarray, **changes: object) -> Path:
    arrays = {
        "output_image": image,
        "output_yield": np.array([41.5, np.nan, 55.25]),
        "output_year": np.array([2003, 2004, 2005]),
        "output_locations": np.array([[-93.5, 42.0], [-89.25, 40.5], [-91.0, 33.0]]),
        "output_index": np.array([[19, 1], [17, 113], [5, 3]]),
    } | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def write_sustainbench(root: Path, image: np.ndarray, *, country: str = "usa", split: str = "dev") -> None:
    folder = root / "soybeans" / country
    folder.mkdir(parents=True)
    rows = len(image)
    data = {
        "hists": image.transpose(0, 3, 2, 1),
        "yields": np.linspace(1.5, 3.5, rows),
        "years": np.arange(2010, 2010 + rows),
        "ndvi": np.zeros((rows, 32)),
    }
    for name, values in data.items():
        np.savez(folder / f"{split}_{name}.npz", data=values)


def test_pycrop_keeps_its_axes_ids_and_yields(tmp_path):
    image = shares(3)
    tensor, yields = read_pycrop(write_pycrop(tmp_path / "h.npz", image))
    np.testing.assert_allclose(tensor.image, image, atol=1e-7)
    assert tensor.layout.refuse_mismatch(PYCROP_LAYOUT, given="a", expected="b") is None
    assert tensor.region_id.tolist() == ["19001", "17113", "05003"]
    assert tensor.year.tolist() == [2003, 2004, 2005]
    np.testing.assert_allclose(tensor.lon, [-93.5, -89.25, -91.0])
    np.testing.assert_allclose(tensor.lat, [42.0, 40.5, 33.0])
    assert np.argwhere(tensor.valid_count == 0).tolist() == [[0, 4, 7]]
    assert yields.values.tolist() == [
        ["19001", 2003, "soybean", 41.5, "bu/acre", "pycrop"],
        ["05003", 2005, "soybean", 55.25, "bu/acre", "pycrop"],
    ]


def test_the_edges_are_the_published_ones():
    np.testing.assert_allclose(PYCROP_LAYOUT.edges, [np.linspace(1, 4999, 33)] * 9)
    ends = [(row[0], row[-1], len(row)) for row in SUSTAINBENCH_LAYOUT.edges]
    assert ends[:3] == [(1, 2200, 33), (900, 4999, 33), (1, 1250, 33)]
    assert ends[7:] == [(13000, 16500, 33), (13000, 15500, 33)]
    assert PYCROP_LAYOUT.qa == SUSTAINBENCH_LAYOUT.qa == "none"


def test_wrong_axes_are_noticed_by_where_the_mass_sums_to_one():
    image = shares(4)
    assert np.array_equal(
        histograms_in(image, axes="band,time,bin", layout=PYCROP_LAYOUT, source="x"), image.astype("f4")
    )
    turned = histograms_in(image.transpose(0, 3, 1, 2), axes="bin,band,time", layout=PYCROP_LAYOUT, source="x")
    np.testing.assert_array_equal(turned, image.astype(np.float32))
    for axes in ("band,bin,time", "bin,time,band", "band,time", "time,band,bin"):
        with pytest.raises(InputProblem, match="along time, not along the bins|expected numbers|must be an order"):
            histograms_in(image, axes=axes, layout=PYCROP_LAYOUT, source="x")


def test_counts_become_shares_and_say_so(caplog):
    image = shares(2)
    with caplog.at_level(logging.WARNING):
        got = histograms_in(image * 640, axes="band,time,bin", layout=PYCROP_LAYOUT, source="x")
    np.testing.assert_allclose(got, image, atol=1e-6)
    assert "holds counts" in caplog.text
    with pytest.raises(InputProblem, match="negative"):
        histograms_in(-image, axes="band,time,bin", layout=PYCROP_LAYOUT, source="x")


def test_sustainbench_agrees_with_torchgeos_class(tmp_path):
    datasets = pytest.importorskip("torchgeo.datasets")
    image = shares(5, seed=1)
    write_sustainbench(tmp_path, image, country="brazil", split="test")
    ours, yields = read_sustainbench(tmp_path, country="brazil", split="test")
    np.testing.assert_allclose(ours.image, image, atol=1e-7)
    theirs = datasets.SustainBenchCropYield(tmp_path, split="test", countries=["brazil"])
    np.testing.assert_array_equal(theirs[3]["image"].numpy().transpose(0, 2, 1), ours.image[3])
    again, same_yields = from_torchgeo(theirs)
    np.testing.assert_array_equal(again.image, ours.image)
    assert again.region_id.tolist() == ours.region_id.tolist() == [f"brazil-test-{row:05d}" for row in range(5)]
    assert again.year.tolist() == [2010, 2011, 2012, 2013, 2014]
    pd.testing.assert_frame_equal(same_yields, yields, rtol=1e-6)
    assert yields["yield"].tolist() == [1.5, 2.0, 2.5, 3.0, 3.5]
    assert set(yields["unit"]) == {"t/ha"}


def test_sustainbench_read_with_pycrops_axes_is_refused(tmp_path):
    write_sustainbench(tmp_path, shares(3))
    with pytest.raises(InputProblem, match="expected numbers"):
        read_sustainbench(tmp_path, country="usa", split="dev", axes="band,time,bin")
    with pytest.raises(InputProblem, match="along time"):
        read_sustainbench(tmp_path, country="usa", split="dev", axes="time,bin,band")
    with pytest.raises(InputProblem, match="no folder .*chile"):
        read_sustainbench(tmp_path, country="chile", split="dev")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_index": None}, "lacks output_index"),
        ({"output_year": np.array([2003, 2004])}, "year must be"),
        ({"output_locations": np.zeros((3, 3))}, "locations must be"),
        ({"output_image": np.zeros((3, 9, 32))}, "expected numbers"),
        ({"output_image": np.array(["a"] * 3)}, "expected numbers"),
        ({"output_image": np.array([None] * 3, dtype=object)}, "pickle"),
    ],
)
def test_malformed_npz_files_are_an_input_problem(tmp_path, changes, message):
    path = write_pycrop(tmp_path / "h.npz", shares(3), **changes)
    with pytest.raises(InputProblem, match=message):
        read_pycrop(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04junk", b"\x93NUMPY\x01\x00", b"text"])
def test_files_that_are_no_npz_are_an_input_problem(tmp_path, content):
    (tmp_path / "h.npz").write_bytes(content)
    with pytest.raises(InputProblem, match=r"h\.npz'"):
        read_pycrop(tmp_path / "h.npz")
    with pytest.raises(InputProblem, match="no file"):
        read_pycrop(tmp_path / "none.npz")


def write_cropnet(root: Path) -> Path:
    """Two counties with 2 and 3 chips, each pixel telling county, date, chip and channel; the third has no yield."""
    h5py = pytest.importorskip("h5py")
    usda = "USDA/data/Soybean/2021/USDA_Soybean_County_2021.csv"
    (root / usda).parent.mkdir(parents=True)
    (root / usda).write_text(
        "commodity_desc,reference_period_desc,year,state_ansi,state_name,county_ansi,county_name,"
        '"PRODUCTION, MEASURED IN BU","YIELD, MEASURED IN BU / ACRE"\n'
        'SOYBEANS,YEAR,2021,5,ARKANSAS,3,ASHLEY,"1,234,000",51.5\nSOYBEANS,YEAR,2021,19,IOWA,001,ADAIR,5000000,60.2\n'
        "SOYBEANS,YEAR,2021,19,IOWA,003,ADAMS,,\n"
    )
    index, seasons = [], {"04-01_2021-06-30": (4, 5), "07-01_2021-09-30": (7, 8, 9)}
    for county, state, chips in (("05003", "AR", 2), ("19001", "IA", 3), ("19003", "IA", 1)):
        files = []
        for season, months in seasons.items():
            name = f"Sentinel-2 Imagery/data/2021/{state}/Agriculture_{county[:2]}_{state}_2021-{season}.h5"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(root / name, "a") as stored:
                for month in months:
                    for day in (1, 15):
                        data = np.zeros((chips, 224, 224, 3), dtype=np.uint8)
                        data += np.arange(chips, dtype=np.uint8).reshape(-1, 1, 1, 1) * 10 + np.arange(
                            3, dtype=np.uint8
                        )
                        stored[f"{county}/2021-{month:02d}-{day:02d}/data"] = data + month * 20 + (day == 15)
            files.append(name)
        index.append({"FIPS": county, "year": "2021", "data": {"USDA": usda, "sentinel": files}})
    (root / "index.json").write_text(json.dumps(index))
    return root / "index.json"


def test_cropnet_chips_in_order_of_time_with_log_targets(tmp_path, caplog):
    data = CropNetChips(tmp_path, write_cropnet(tmp_path))
    assert len(data) == 2
    assert "1 of 3 index rows have no yield" in caplog.text
    sample = data[1]
    assert sample["chips"].shape == (5, 3, 224, 224, 3)
    assert sample["chips"][:, 0, 100, 7, 0].tolist() == [80, 100, 140, 160, 180]  # firsts of months only
    assert sample["chips"][3, 2, 0, 223].tolist() == [180, 181, 182]
    np.testing.assert_allclose(sample["target"].numpy(), np.log([5_000_000, 60.2]), rtol=1e-6)
    assert (sample["region_id"], sample["year"]) == ("19001", 2021)
    assert data[0]["chips"].shape[1] == 2
    both = CropNetChips(tmp_path, tmp_path / "index.json", days=(1, 15), transform=lambda chips: chips[..., :1] + 0)
    assert both[0]["chips"][:4, 0, 0, 0, 0].tolist() == [80, 81, 100, 101]


def test_cropnet_yields_are_numbers_by_five_digit_county(tmp_path):
    write_cropnet(tmp_path)
    table = read_cropnet_yields(tmp_path / "USDA")
    assert table["region_id"].tolist() == ["05003", "19001"]
    assert table["production"].tolist() == [1_234_000, 5_000_000]
    assert table[["crop", "unit", "source"]].drop_duplicates().values.tolist() == [["soybean", "bu/acre", "cropnet"]]
    with pytest.raises(InputProblem, match="no USDA_"):
        read_cropnet_yields(tmp_path / "Sentinel-2 Imagery")
    (tmp_path / "USDA_x_County_1.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputProblem, match="lacks one of"):
        read_cropnet_yields(tmp_path / "USDA_x_County_1.csv")


def test_cropnet_files_that_are_damaged_or_missing_are_named(tmp_path):
    index = write_cropnet(tmp_path)
    data = CropNetChips(tmp_path, index)
    broken = next(path for path in tmp_path.rglob("*.h5") if "19_IA" in path.name)
    broken.write_bytes(b"junk")
    with pytest.raises(InputProblem, match="19_IA.*no readable CropNet file"):
        data[1]
    for text in (
        "{",
        "[]",
        '[{"FIPS": 1}]',
        '{"a": 1}',
        '[{"FIPS": 1, "year": "x", "data": {"USDA": "u", "sentinel": ["s"]}}]',
    ):
        index.write_text(text)
        with pytest.raises(InputProblem, match="CropNet index|no rows"):
            CropNetChips(tmp_path, index)


def write_cybench(root: Path) -> Path:
    folder = root / "maize" / "US"
    folder.mkdir(parents=True)
    (folder / "yield_maize_US.csv").write_text(
        "crop_name,country_code,adm_id,harvest_year,yield,harvest_area\n"
        "maize,US,US-17-001,2020,11.5,3\nmaize,US,US-19-003,2020,,3\nmaize,US,US-19-003,2021,12.5,3\n"
    )
    (folder / "ndvi_maize_US.csv").write_text(
        "crop_name,country_code,adm_id,date,ndvi\n"
        "maize,US,US-17-001,20200401,0.2\nmaize,US,US-17-001,20200430,0.4\nmaize,US,US-17-001,20200501,0.8\n"
        "maize,US,US-19-003,20210515,0.7\nmaize,US,US-19-003,20211231,0.1\n"
    )
    (folder / "fpar_maize_US.csv").write_text(
        "crop_name,country_code,adm_id,date,fpar\nmaize,US,US-19-003,20210411,0.25\n"
    )
    return folder


def test_cybench_means_per_period_beside_yields(tmp_path):
    folder = write_cybench(tmp_path)
    options = {"crop": "maize", "country": "US", "doy": (91, 121)}
    series, yields = read_cybench(tmp_path, inputs=("ndvi", "fpar"), **options)
    nan = np.nan
    np.testing.assert_allclose(series.values, [[[0.3, 0.8], [nan, nan]], [[nan, 0.7], [0.25, nan]]])
    assert series.bands == ("ndvi", "fpar")
    assert series.region_id.tolist() == ["US-17-001", "US-19-003"]
    assert series.year.tolist() == [2020, 2021]
    assert np.isnan(series.lon).all()
    assert yields["yield"].tolist() == [11.5, 12.5]
    assert yields["crop"].tolist() == ["corn", "corn"]
    (folder / "location_maize_US.csv").write_text("adm_id,longitude,latitude\nUS-19-003,-94.5,41.0\n")
    placed, _ = read_cybench(tmp_path, inputs=("ndvi",), **options)
    np.testing.assert_allclose(placed.lon, [nan, -94.5])
    np.testing.assert_allclose(placed.lat, [nan, 41.0])


def test_cybench_says_what_is_missing(tmp_path):
    folder = write_cybench(tmp_path)
    with pytest.raises(InputProblem, match="meteo_maize_US.csv"):
        read_cybench(tmp_path, crop="maize", country="US")
    with pytest.raises(InputProblem, match="not evi"):
        read_cybench(tmp_path, crop="maize", country="US", inputs=("evi",))
    (folder / "ndvi_maize_US.csv").write_text("adm_id,date,ndvi\nUS-17-001,2020-04-01,0.2\n")
    with pytest.raises(InputProblem, match="'2020-04-01' is not written YYYYMMDD"):
        read_cybench(tmp_path, crop="maize", country="US", inputs=("ndvi",))
