"""The matched real set: DFYP on Illinois soybean 2018-2021 keeps the accuracy that its proof claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from geo_yield.baselines import Ridge
from geo_yield.dfyp import DFYPConfig
from geo_yield.evaluation import evaluate, summarise
from geo_yield.series import series_samples
from geo_yield.training import DFYPRegressor, TrainConfig

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "illinois-hls-soybean"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not DATA.exists(), reason="the Illinois data set is not beside the checkout"),
]


@pytest.fixture(scope="module")
def samples():
    return series_samples(
        [DATA / f"fundat_{name}.csv" for name in ("ri", "evi", "ndvi", "savi")],
        DATA / "nass_raw_Illinois19802022.csv",
        history="before-first-season",
        crop="soybean",
        unit="bu/acre",
        centroids=DATA / "96points.csv",
        district_column="ADC",
    )


def errors(samples, methods, protocol):
    rows = evaluate(samples, methods, protocol=protocol, members=0)
    return summarise(rows).query("year == 'all'").set_index("method")["rmse"]


def test_only_real_yields_are_joined_and_ridge_has_its_known_errors(samples):
    assert len(samples) == 330
    assert [int((samples.year == year).sum()) for year in (2018, 2019, 2020, 2021)] == [87, 74, 95, 74]
    assert len(set(samples.district.tolist())) == 9
    found = errors(samples, {"ridge": lambda: Ridge(penalties=(300.0,), history="feature")}, "spatial")
    assert found["ridge"] == pytest.approx(4.745, abs=0.01)  # the penalty of the set's published anchors


@pytest.mark.slow
def test_dfyp_beats_ridge_with_history_in_counties_never_seen(samples):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = replace(DFYPConfig.small(7, operator="sobel"), bins=16)
    images = replace(TrainConfig.small(max_steps=120), batch_size=16)
    methods = {
        "DFYP": lambda: DFYPRegressor(model, images),
        "DFYP + history": lambda: DFYPRegressor(model, replace(images, history="residual")),
        "ridge + history": lambda: Ridge(history="feature"),
    }
    try:
        found = errors(samples, methods, "spatial")
    finally:
        torch.set_num_threads(threads)
    assert found["DFYP"] <= 5.8
    assert found["DFYP + history"] <= min(4.6, found["ridge + history"] - 0.1)
