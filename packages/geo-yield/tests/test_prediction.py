"""Predictions stream, resume, refuse what does not fit, and are the same with every engine."""

from dataclasses import replace
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from geo_yield import prediction
from geo_yield.checkpoint import save_model
from geo_yield.crossfit import CrossFit
from geo_yield.dfyp import DFYPConfig
from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramLayout, HistogramStore, YieldTensor, write_histograms
from geo_yield.prediction import predict_yields
from geo_yield.training import DFYPRegressor, TrainConfig
from geo_yield.yields import join_yields

LAYOUT = HistogramLayout(
    sensor="modis",
    bands=("red", "nir"),
    doy=(49, 57, 65, 73),
    edges=(tuple(np.linspace(0, 1, 9).tolist()), tuple(np.linspace(0, 2, 9).tolist())),
)
REGIONS = [f"{number:05d}" for number in range(1001, 1151, 2)]  # 75: more than one row group


def histograms(years: tuple[int, ...], *, seed: int = 0, layout: HistogramLayout = LAYOUT) -> YieldTensor:
    rng = np.random.default_rng(seed)
    rows = len(REGIONS) * len(years)
    image = rng.dirichlet(np.ones(8), (rows, 2, len(layout.doy))).astype(np.float32)
    valid = rng.integers(1, 40, (rows, 2, len(layout.doy)), dtype=np.int32)
    image[3, 1], valid[3, 1] = 0, 0  # the fourth region was not seen in the second band
    return YieldTensor(
        layout=layout,
        image=image,
        region_id=np.array(REGIONS * len(years)),
        year=np.repeat(np.array(years, np.int16), len(REGIONS)),
        lon=np.tile(np.linspace(-95, -90, len(REGIONS), dtype=np.float32), len(years)),
        lat=np.full(rows, 41.5, np.float32),
        valid_count=valid,
        pixel_count=np.full(rows, 40, np.int32),
    )


def yield_table(years: range) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    level = rng.uniform(35, 55, len(REGIONS))
    parts = [
        pd.DataFrame({"region_id": REGIONS, "year": year, "yield": level + rng.normal(0, 2, len(REGIONS))})
        for year in years
    ]
    return pd.concat(parts).assign(crop="soybean", unit="bu/acre", source="plain")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(DFYPConfig.small(2), steps=4, bins=8, cnn_width=4, cnn_dense=8, vit_dim=16, vit_depth=1)
    train = TrainConfig.small(history="residual", max_steps=6)
    crossfit = CrossFit(lambda: DFYPRegressor(config, train), folds=2)
    crossfit.fit(join_yields(histograms((2020, 2021)), yield_table(range(2014, 2022))), seed=0)
    return save_model(crossfit, tmp_path_factory.mktemp("model") / "soybean")


@pytest.fixture
def store(tmp_path: Path) -> HistogramStore:
    write_histograms(tmp_path / "hist" / "2021.parquet", LAYOUT, [histograms((2021,), seed=2)])
    write_histograms(tmp_path / "hist" / "2022.parquet", LAYOUT, [histograms((2022,), seed=3)])
    return HistogramStore(tmp_path / "hist")


def test_rows_are_what_the_model_says_of_them(store: HistogramStore, model: Path, tmp_path: Path) -> None:
    yields = yield_table(range(2014, 2022))
    seen: list[tuple[int, int]] = []
    out = predict_yields(
        store,
        model,
        tmp_path / "out.parquet",
        years=[2022],
        yields=yields,
        workers=1,
        on_batch=lambda *n: seen.append(n),
    )
    table = geopandas.read_parquet(out)
    assert table["region_id"].tolist() == REGIONS
    assert set(table["year"]) == {2022}
    assert set(table["crop"]) == {"soybean"}
    assert set(table["unit"]) == {"bu/acre"}
    samples = join_yields(store.read(years=[2022]), yields)
    expected = prediction.load_model(model).predict(samples)
    assert np.allclose(table["prediction"], expected.mean, atol=1e-4)
    assert np.allclose(table["spread"], expected.spread, atol=1e-4)
    assert np.allclose(table["upper"] - table["lower"], expected.upper - expected.lower, atol=1e-4)
    own = yields[yields["region_id"] == REGIONS[5]]["yield"].mean()
    assert table["history"][5] == pytest.approx(own, rel=1e-5)
    assert table["missing_share"].tolist()[:5] == [0, 0, 0, 0.5, 0]
    assert table["valid_fraction"][3] < table["valid_fraction"].drop(3).min()
    assert seen == [(1, 2), (2, 2)]
    assert list(tmp_path.glob(".*")) == []  # units and partial files are gone


def test_geometry_is_the_polygon_of_the_region_or_its_point(store: HistogramStore, model: Path, tmp_path: Path) -> None:
    boxes = [shapely.box(500_000 + 1000 * i, 4_600_000, 501_000 + 1000 * i, 4_601_000) for i in range(74)]
    frame = geopandas.GeoDataFrame({"GEOID": REGIONS[:0:-1]}, geometry=boxes, crs="EPSG:32615")
    expected = frame.set_index("GEOID").geometry.to_crs(4326)
    for name in ("counties.gpkg", "counties.geojson", "counties.parquet"):
        path = tmp_path / name
        frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_file(path)
        out = predict_yields(
            store,
            model,
            tmp_path / "out.parquet",
            years=[2022],
            yields=yield_table(range(2014, 2022)),
            regions=path,
            workers=1,
        )
        table = geopandas.read_parquet(out).set_index("region_id")
        assert table.crs == "EPSG:4326"
        assert table.geometry[REGIONS[0]].equals(shapely.Point(-95, 41.5))  # not among the polygons
        for region in (REGIONS[1], REGIONS[70]):
            assert (
                table.geometry[region].symmetric_difference(expected[region]).area
                < 1e-9 * expected[region].area + 1e-12
            )


def test_engines_give_the_same_bytes(store: HistogramStore, model: Path, tmp_path: Path) -> None:
    yields = yield_table(range(2014, 2022))
    one = predict_yields(store, model, tmp_path / "one.parquet", yields=yields, workers=1)
    two = predict_yields(store, model, tmp_path / "two.parquet", yields=yields, workers=2)
    assert pq.read_table(one).equals(pq.read_table(two))
    assert pq.read_table(one).num_rows == 2 * len(REGIONS)


def test_ray_gives_the_same_bytes(store: HistogramStore, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    yields = yield_table(range(2014, 2022))
    local = predict_yields(store, model, tmp_path / "local.parquet", yields=yields, workers=1)
    on_ray = predict_yields(store, model, tmp_path / "ray.parquet", yields=yields, engine="ray", workers=2)
    assert on_ray.read_bytes() == local.read_bytes()


def test_a_stopped_run_goes_on_and_a_finished_one_is_not_repeated(
    store: HistogramStore, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yields, out = yield_table(range(2014, 2022)), tmp_path / "out.parquet"
    whole = predict_yields(store, model, tmp_path / "whole.parquet", yields=yields, workers=1)
    predicted: list[str] = []
    stop_after = [3, 99]
    real = prediction._predict_unit

    def counting(job: prediction._Job, unit: prediction._Unit) -> int:
        if len(predicted) == stop_after[0]:
            raise KeyboardInterrupt
        predicted.append(unit.name)
        return real(job, unit)

    monkeypatch.setattr(prediction, "_predict_unit", counting)
    with pytest.raises(KeyboardInterrupt):
        predict_yields(store, model, out, yields=yields, workers=1)
    assert not out.exists()
    assert len(predicted) == 3
    stop_after.pop(0)
    predicted.clear()
    predict_yields(store, model, out, yields=yields, workers=1)
    assert predicted == ["2022-00001.parquet"]  # the one of four units that was missing
    assert out.read_bytes() == whole.read_bytes()
    predict_yields(store, model, out, yields=yields, workers=1)
    assert len(predicted) == 1
    predict_yields(store, model, out, yields=yields.assign(**{"yield": yields["yield"] + 1}), workers=1)
    assert len(predicted) == 5  # another table of yields is another job


def test_what_does_not_fit_is_refused(store: HistogramStore, model: Path, tmp_path: Path) -> None:
    yields, out = yield_table(range(2014, 2022)), tmp_path / "out.parquet"
    with pytest.raises(InputProblem, match=r"has no imagery of \[2030\]; it has \[2021, 2022\]"):
        predict_yields(store, model, out, years=[2022, 2030], yields=yields)
    with pytest.raises(InputProblem, match="difference to a region's history: give the table of past yields"):
        predict_yields(store, model, out)
    with pytest.raises(InputProblem, match="the model predicts soybean, the table of past yields has corn"):
        predict_yields(store, model, out, yields=yields.assign(crop="corn"))
    with pytest.raises(InputProblem, match="no region file at"):
        predict_yields(store, model, out, yields=yields, regions=tmp_path / "nowhere.gpkg")
    other = replace(LAYOUT, sensor="sentinel2-l2a")
    write_histograms(tmp_path / "s2" / "2022.parquet", other, [histograms((2022,), layout=other)])
    with pytest.raises(InputProblem, match="sensor is 'sentinel2-l2a', expected 'modis'"):
        predict_yields(HistogramStore(tmp_path / "s2"), model, out, yields=yields)
    edges = replace(LAYOUT, edges=(LAYOUT.edges[1], LAYOUT.edges[1]))
    write_histograms(tmp_path / "edges" / "2022.parquet", edges, [histograms((2022,), layout=edges)])
    with pytest.raises(InputProblem, match="edges is"):
        predict_yields(HistogramStore(tmp_path / "edges"), model, out, yields=yields)
    with pytest.raises(InputProblem, match="no model in"):
        predict_yields(store, tmp_path / "nothing", out, yields=yields)
    assert not out.exists()


def test_a_season_that_has_only_begun_is_predicted(model: Path, tmp_path: Path) -> None:
    begun = replace(LAYOUT, doy=LAYOUT.doy[:2])
    write_histograms(tmp_path / "begun" / "2022.parquet", begun, [histograms((2022,), layout=begun)])
    store = HistogramStore(tmp_path / "begun")
    out = predict_yields(store, model, tmp_path / "out.parquet", yields=yield_table(range(2014, 2022)), workers=1)
    assert np.isfinite(pq.read_table(out)["prediction"].to_numpy()).all()


def test_no_more_than_a_row_group_is_in_memory(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    years = tuple(range(2012, 2022))  # 750 rows
    write_histograms(tmp_path / "long" / "all.parquet", LAYOUT, [histograms(years)])
    rows: list[int] = []
    real = prediction.from_arrow

    def counting(batch: pa.Table, layout: HistogramLayout) -> YieldTensor:
        rows.append(batch.num_rows)
        return real(batch, layout)

    monkeypatch.setattr(prediction, "from_arrow", counting)
    monkeypatch.setattr(HistogramStore, "read", None)  # would read everything at once
    predict_yields(
        HistogramStore(tmp_path / "long"),
        model,
        tmp_path / "o.parquet",
        yields=yield_table(range(2000, 2022)),
        workers=1,
    )
    assert sum(rows) == 750
    assert max(rows) == 64
    file = pq.ParquetFile(tmp_path / "o.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == rows
