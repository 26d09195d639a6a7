"""The app as its users meet it: a process with arguments, files, two streams and an exit code."""

import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from affine import Affine

from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramStore
from geo_yield.sentinel2 import DEFAULT_BANDS

APP = "yield_predict"
pytestmark = pytest.mark.xdist_group("app")  # one demonstration serves all

COMMANDS = ("simulate", "prepare", "train", "select-operator", "evaluate", "predict", "report")
TINY = ["--counties", "2x3", "--seasons", "4", "--members", "2", "--steps", "4"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, app: Any) -> tuple[Path, str]:
    """The demonstration, killed while it reads images and started again; its folder and what it printed."""
    out = tmp_path_factory.mktemp("app") / "run"
    process = app.start("--out", out, *TINY)
    deadline = time.monotonic() + 300
    while len(list(out.glob("histograms/.units/*.npy"))) < 4:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # workers that outlived it would keep its pipes open
    assert not (out / "predictions.parquet").exists()
    code, printed, said = app.run("--out", out, *TINY)
    assert code == 0, said
    return out, printed


def test_demonstration_ends_with_figures_and_pictures(demo: tuple[Path, str]) -> None:
    out, printed = demo
    assert "Simulated soybean yield 2018, not seen in training" in printed
    for name in ("map.png", "skill.png", "report.md", "predictions.parquet"):
        assert name in printed
        assert (out / name).stat().st_size > 1000
    text = (out / "report.md").read_text()
    for method in (
        "**DFYP**",
        "county history",
        "county trend",
        "mean",
        "ridge",
        "ridge + history",
        "random forest",
        "Deep GP",
    ):
        assert f"| {'**DFYP**' if method == 'DFYP' else method} | 6 |" in text
    assert "**simulated**" in text
    assert '"sensor": "modis"' in text


def test_predictions_are_a_map_with_units(demo: tuple[Path, str]) -> None:
    table = geopandas.read_parquet(demo[0] / "predictions.parquet")
    assert table["region_id"].tolist() == ["03001", "03003", "03005", "03007", "03009", "03011"]
    assert set(table["year"]) == {2018}
    assert set(table["unit"]) == {"bu/acre"}
    assert table["prediction"].between(5, 90).all()
    assert (table["lower"] < table["prediction"]).all()
    assert (table["valid_fraction"] > 0.3).all()
    assert table.crs == "EPSG:4326"
    assert set(table.geom_type) <= {"Polygon", "MultiPolygon"}
    rows = pd.read_parquet(demo[0] / "evaluation" / "evaluation.parquet").query("method == 'DFYP'")
    together = rows.merge(table, on="region_id", suffixes=("", "_file"))
    assert (together["prediction"] - together["prediction_file"]).abs().max() < 1e-3


def test_a_second_run_repeats_nothing(demo: tuple[Path, str], app: Any) -> None:
    out, printed = demo
    files = [
        out / "predictions.parquet",
        *(out / "evaluation" / "parts").iterdir(),
        *(out / "evaluation" / "training").iterdir(),
    ]
    before = {file: file.stat().st_mtime_ns for file in files}
    code, again, said = app.run("--out", out, *TINY)
    assert code == 0, said
    assert again == printed
    assert {file: file.stat().st_mtime_ns for file in files} == before


def test_the_jobs_one_by_one(demo: tuple[Path, str], app: Any, tmp_path: Path) -> None:
    places = {"run": demo[0], "region": demo[0] / "region", "tmp": tmp_path}
    histograms = tmp_path / "histograms"
    source = "--inputs {region}/imagery --regions {region}/counties.gpkg"
    printed = app.call(f"prepare {source} --years 2016-2017 --out {{tmp}}/histograms --workers 1", **places)
    assert printed.split() == [str(histograms / "2016.parquet"), str(histograms / "2017.parquet")]
    assert (histograms / "2016.parquet").read_bytes() == (demo[0] / "histograms" / "2016.parquet").read_bytes()
    learn = "--inputs {tmp}/histograms --yields {region}/yields.csv --steps 3"
    printed = app.call(f"select-operator {learn} --out {{tmp}}/operators.json", **places)
    assert all(operator in printed for operator in ("sobel", "scharr", "learnable", "bu/acre"))
    options = "--operators {tmp}/operators.json --members 2 --workers 1 --out {tmp}/model"
    assert app.call(f"train {learn} {options}", **places).strip() == str(tmp_path / "model")
    season = "--inputs {run}/histograms --yields {region}/yields.csv --year 2018"
    app.call(f"predict {season} --model {{tmp}}/model --out {{tmp}}/yields.parquet --workers 1", **places)
    assert set(geopandas.read_parquet(tmp_path / "yields.parquet").geom_type) == {"Point"}


def write_sentinel2(folder: Path, day: str, level: int) -> None:
    """One small overpass, a GeoTIFF per band: 20 m pixels of 15 N, all vegetation but a cloudy left half."""
    folder.mkdir(exist_ok=True)
    profile = {"driver": "GTiff", "height": 10, "width": 16, "count": 1, "dtype": "uint16", "crs": "EPSG:32615"}
    profile["transform"] = Affine(20, 0, 400_000, 0, -20, 4_600_000)
    for number, band in enumerate(DEFAULT_BANDS):
        with rasterio.open(folder / f"T15TVH_{day}_{band}.tif", "w", **profile) as file:
            file.write(np.full((1, 10, 16), 1000 + level + 100 * number, np.uint16))
    classes = np.full((1, 10, 16), 4, np.uint8)
    classes[:, :, :8] = 9
    with rasterio.open(folder / f"T15TVH_{day}_SCL.tif", "w", **{**profile, "dtype": "uint8"}) as file:
        file.write(classes)


def test_sentinel2_images_are_prepared(app: Any, tmp_path: Path) -> None:
    """Reflectance after the offset, clear pixels only, in the month of the overpass."""
    write_sentinel2(tmp_path / "s2", "20220604", 1500)
    write_sentinel2(tmp_path / "s2", "20220714", 2500)
    shape = shapely.box(400_040, 4_599_840, 400_280, 4_599_960)  # 12 x 6 pixels, 6 columns of them clear
    parcels = geopandas.GeoDataFrame({"region_id": ["007"]}, geometry=[shape], crs=32615)
    parcels.to_file(tmp_path / "parcels.gpkg")
    given = "--sensor sentinel2 --inputs {tmp}/s2 --regions {tmp}/parcels.gpkg --year 2022 --workers 1"
    app.call(f"prepare {given} --offset -1000 --out {{tmp}}/histograms", tmp=tmp_path)
    seen = HistogramStore(tmp_path / "histograms").read()
    assert seen.layout.sensor == "sentinel2-l2a"
    assert seen.region_id.tolist() == ["007"]
    assert seen.pixel_count.tolist() == [72]
    months = [date.fromordinal(date(2022, 1, 1).toordinal() + day - 1).month for day in seen.layout.doy]
    band, june, july = DEFAULT_BANDS.index("B04"), months.index(6), months.index(7)
    assert seen.valid_count[0, band].tolist() == [36 if month in (6, 7) else 0 for month in months]
    for step, level in ((june, 0.15), (july, 0.25)):
        edges = seen.layout.edges[band]
        expected = np.histogram([level + 0.01 * band], edges)[0]
        assert seen.image[0, band, step].tolist() == expected.tolist()


def test_predictions_become_a_map(demo: tuple[Path, str], app: Any, tmp_path: Path) -> None:
    printed = app.call("report --predictions {run}/predictions.parquet --out {tmp}", run=demo[0], tmp=tmp_path)
    assert printed.strip() == str(tmp_path / "map-2018.png")
    assert (tmp_path / "map-2018.png").stat().st_size > 1000


def test_evaluation_of_histograms_is_reported(demo: tuple[Path, str], app: Any, tmp_path: Path) -> None:
    places = {"run": demo[0], "region": demo[0] / "region", "tmp": tmp_path}
    given = "--inputs {run}/histograms --yields {region}/yields.csv --methods 'mean, county history,ridge' --members 2"
    printed = app.call(f"evaluate {given} --protocol spatial --folds 3 --out {{tmp}}/spatial", **places)
    assert "soybean, spatial" in printed
    rows = pd.read_parquet(tmp_path / "spatial" / "evaluation.parquet")
    assert len(rows) == 3 * 6 * 4
    assert set(rows["method"]) == {"mean", "county history", "ridge"}
    shown = "--regions {region}/counties.gpkg --method ridge --out {tmp}/report"
    path = app.call(f"report --evaluation {{tmp}}/spatial {shown}", **places)
    text = Path(path.strip()).read_text()
    assert "**ridge**" in text
    assert "**simulated**" in text
    assert (tmp_path / "report" / "map.png").exists()


def test_evaluation_of_series(demo: tuple[Path, str], app: Any, tmp_path: Path) -> None:
    yields = pd.read_csv(demo[0] / "region" / "yields.csv", dtype={"region_id": str})
    series = yields[yields["year"] >= 2015].rename(columns={"region_id": "County", "year": "Year"})
    for week in range(1, 6):
        series[f"NDVI{week}"] = series["yield"] / 100 + 0.01 * week
    series.drop(columns=["crop", "yield", "unit", "source"]).to_csv(tmp_path / "ndvi.csv", index=False)
    given = "--series {tmp}/ndvi.csv --yields {region}/yields.csv --methods mean,ridge --members 2"
    places = {"region": demo[0] / "region", "tmp": tmp_path}
    app.call(f"evaluate {given} --protocol leave-one-year-out --out {{tmp}}/series", **places)
    rows = pd.read_parquet(tmp_path / "series" / "evaluation.parquet")
    error = (rows["truth"] - rows["prediction"]).abs().groupby(rows["method"]).mean()
    assert error["ridge"] < 0.5 * error["mean"]  # these series give the yield away


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_teaches_by_example(app: Any, command: str) -> None:
    text = " ".join(app.call(f"{command} --help").split())
    assert "Example: " in text
    assert f"yield_predict.py {command}".strip() in text


def test_help_imports_nothing_heavy(app: Any) -> None:
    code = (
        "import runpy, sys\nsys.argv = ['yield_predict.py', 'train', '--help']\n"
        f"try: runpy.run_path({str(app.path)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'rasterio', 'geopandas', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_mistake_is_one_red_line_and_exit_2(tmp_path: Path, app: Any) -> None:
    code, out, err = app.run("train", "--inputs", tmp_path / "nothing", "--yields", tmp_path / "none.csv")
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "none.csv" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_ours_keeps_its_traceback(app: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("geo_yield.simulator.simulate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        app.call("simulate --out {tmp}/region", tmp=tmp_path)


MISTAKES = {
    "no images": (
        "prepare --inputs {region} --regions {region}/counties.gpkg --year 1999",
        r"no MOD09A1 image of 1999 in .* \(found 2015-2018\)",
    ),
    "no folder": ("prepare --inputs {tmp}/none --regions {region}/counties.gpkg --year 2016", "none' does not exist"),
    "two sources": (
        "prepare --inputs {tmp} --stac {tmp} --regions {region}/counties.gpkg --year 2016",
        "give either folders of images",
    ),
    "no source": ("prepare --regions {region}/counties.gpkg --year 2016", "give either folders of images"),
    "no regions": ("prepare --inputs {region} --regions {tmp}/none.gpkg --year 2016", "no region file"),
    "years": ("prepare --inputs {region} --regions {region}/counties.gpkg --years 2016..2018", "years must be like"),
    "mask": (
        "prepare --inputs {region} --regions {region}/counties.gpkg --year 2016 --mask cdl:5",
        "mask must be 'none' or like",
    ),
    "no histograms": ("train --inputs {tmp}/none --yields {region}/yields.csv", "no histograms at"),
    "no yields": ("train --inputs {run}/histograms --yields {tmp}/none.csv", "none.csv"),
    "other crop": ("train --inputs {run}/histograms --yields {region}/yields.csv --crop corn", "corn"),
    "no model": ("predict --inputs {run}/histograms --model {tmp}/none", "no model in"),
    "no history": ("predict --inputs {run}/histograms --model {run}/model", "give the table of past yields"),
    "year without images": (
        "predict --inputs {run}/histograms --model {run}/model --year 2031 --yields {region}/yields.csv",
        r"has no imagery of \[2031\]",
    ),
    "no inputs": ("evaluate --yields {region}/yields.csv", "give either --inputs"),
    "method": (
        "evaluate --inputs {run}/histograms --yields {region}/yields.csv --methods lasso",
        "no method 'lasso'; there are mean, county history",
    ),
    "no evaluation": ("report --evaluation {tmp}/none", "no evaluation in"),
    "no predictions": ("report --predictions {tmp}/none", "is no file of predictions"),
    "counties": ("simulate --counties many", "--counties must be rows x columns"),
    "occupied": ("simulate --counties 1x1 --seasons 2 --out {region}", "holds something else"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained_and_leave_nothing(
    demo: tuple[Path, str], app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where the default outputs would go
    line, sentence = MISTAKES[mistake]
    with pytest.raises(InputProblem, match=sentence) as caught:
        app.call(line, run=demo[0], region=demo[0] / "region", tmp=tmp_path)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
