"""Each baseline against a result by hand or scikit-learn's; the Deep GP on rows where it has something to find."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge as SklearnRidge

from geo_yield.baselines import (
    CountyHistory,
    CountyTrend,
    DeepGaussianProcess,
    HistoryLine,
    MeanYield,
    Past,
    RandomForest,
    Ridge,
    flat_inputs,
)
from geo_yield.errors import InputProblem
from geo_yield.evaluation import r_squared
from geo_yield.samples import IndexSeries, Samples
from geo_yield.series import series_to_histograms


def samples(n=90, *, seed=0, weeks=5):
    """Two indices; yield follows week 2 of the first, the place, and the region's level, which its history tells."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(0, 1, (n, 2, weeks)).astype(np.float32)
    level = rng.normal(40, 6, n)
    lon, lat = rng.uniform(-91, -88, n), rng.uniform(37, 42, n)
    target = level + 12 * values[:, 0, 2] + rng.normal(scale=0.5, size=n)
    inputs = IndexSeries(
        values=values,
        bands=("A", "B"),
        doy=tuple(91 + 7 * k for k in range(weeks)),
        region_id=np.array([f"{i % 30:03d}" for i in range(n)]),
        year=np.repeat(np.arange(2015, 2018, dtype=np.int16), n // 3),
        lon=lon.astype(np.float32),
        lat=lat.astype(np.float32),
    )
    return Samples(
        inputs=inputs,
        target=target.astype(np.float32),
        history=level.astype(np.float32),
        trend=(level + 2).astype(np.float32),
        unit="bu/acre",
        crop="soybean",
    )


def without(values, *rows):
    changed = values.copy()
    changed[list(rows)] = np.nan
    return changed


def fitted(method, rows):
    method.fit(rows, seed=0)
    return method


def test_naive_methods_by_hand():
    rows = samples()
    mean = float(rows.target.mean())
    new = rows.replace(history=without(rows.history, 0, 1), trend=without(rows.trend, 1, 2))
    assert fitted(MeanYield(), rows).predict(new) == pytest.approx(np.full(90, mean), rel=1e-6)
    assert fitted(CountyHistory(), rows).predict(new)[:3].tolist() == pytest.approx(
        [mean, mean, rows.history[2]], rel=1e-6
    )
    trend = fitted(CountyTrend(), rows).predict(new)
    assert trend[:4].tolist() == pytest.approx([rows.trend[0], mean, rows.history[2], rows.trend[3]], rel=1e-6)


def test_history_line_is_least_squares():
    rows = samples()
    slope, intercept = np.polyfit(rows.history.astype(float), rows.target.astype(float), 1)
    past = Past.fit(rows)
    assert (past.slope, past.intercept) == pytest.approx((slope, intercept), rel=1e-6)
    said = fitted(HistoryLine(), rows).predict(rows.replace(history=without(rows.history, 4)))
    assert said[5] == pytest.approx(intercept + slope * rows.history[5], rel=1e-5)
    assert said[4] == pytest.approx(rows.target.mean(), rel=1e-5)
    nothing = rows.replace(history=np.full(90, np.nan, np.float32))
    assert fitted(HistoryLine(), nothing).predict(rows) == pytest.approx(np.full(90, rows.target.mean()), rel=1e-5)


def test_flat_inputs_of_a_series_and_of_its_histograms_agree():
    rows = samples()
    rows.inputs.values[3, 1, 2] = np.nan
    limits = np.array([[0, 1], [0, 1]], np.float32)
    tensor = series_to_histograms(rows.inputs, limits, steps=8, bins=6)
    flat, binned = flat_inputs(rows), flat_inputs(rows.replace(inputs=tensor))
    weeks = np.arange(16).reshape(2, 8)[:, 1:6].ravel()  # 5 weeks in 8 steps
    np.testing.assert_allclose(binned[:, weeks] / 5, flat, atol=1e-6)
    assert np.isnan(flat[3, 7])
    assert np.isnan(binned[:, 0]).all()


@pytest.mark.parametrize("history", ["none", "feature", "residual"])
def test_ridge_is_scikit_learns(history):
    rows, new = samples(), samples(seed=1)
    said = fitted(Ridge(history=history, penalties=(7.0,)), rows).predict(new)

    def columns(s):
        return np.column_stack([flat_inputs(s), s.history]) if history == "feature" else flat_inputs(s)

    x = columns(rows)
    mean, sd = x.mean(axis=0), x.std(axis=0)
    past = Past.fit(rows)
    base = (past.line(rows), past.line(new)) if history == "residual" else (0, 0)
    model = SklearnRidge(7.0).fit((x - mean) / sd, rows.target - base[0])
    np.testing.assert_allclose(said, model.predict((columns(new) - mean) / sd) + base[1], rtol=1e-5)


def test_ridge_chooses_its_penalty_on_the_training_rows():
    rows = samples()
    noise = rows.replace(target=np.random.default_rng(3).normal(40, 5, 90).astype(np.float32))
    penalties = (1e-2, 1.0, 1e4)
    assert fitted(Ridge(history="residual", penalties=penalties), rows).penalty < 1e4
    assert fitted(Ridge(penalties=penalties), noise).penalty == 1e4
    assert fitted(Ridge(penalties=penalties, group="year"), noise).penalty == 1e4


def test_missing_and_constant_columns_do_no_harm():
    rows = samples()
    rows.inputs.values[:, 1, 0] = 0.5
    rows.inputs.values[7, 0, 2] = np.nan
    for method in (Ridge(history="residual"), RandomForest(history="feature", trees=9)):
        said = fitted(method, rows).predict(rows)
        assert np.isfinite(said).all()
        assert r_squared(rows.target.astype(float), said.astype(float)) > 0.5


def test_forest_learns_and_repeats():
    rows, new = samples(180), samples(180, seed=1)
    said = [fitted(RandomForest(history="feature", trees=40), rows).predict(new) for _ in range(2)]
    assert (said[0] == said[1]).all()
    with_history = r_squared(new.target.astype(float), said[0].astype(float))
    without_history = fitted(RandomForest(trees=40), rows).predict(new)
    assert with_history > 0.6
    assert with_history > r_squared(new.target.astype(float), without_history.astype(float)) + 0.3


def place_rows(n, seed):
    """Yield = 40 + 10 x (mean index) + 6 sin(3 lon) cos(lat): imagery does not tell the second part, the place does."""
    rows = samples(n, seed=seed, weeks=6)
    lift = np.random.default_rng(seed + 50).uniform(-0.4, 0.4, n).astype(np.float32)
    values = np.clip(0.5 + lift[:, None, None] + 0.02 * (rows.inputs.values - 0.5), 0, 1)
    inputs = IndexSeries(**{**vars(rows.inputs), "values": values})
    place = 6 * np.sin(3 * inputs.lon.astype(float)) * np.cos(inputs.lat.astype(float))
    return rows.replace(inputs=inputs, target=(40 + 10 * lift + place).astype(np.float32))


def test_deep_gp_adds_to_its_cnn_what_the_place_explains():
    rows, new = place_rows(159, 0), place_rows(90, 1)
    scores = {}
    for process in (False, True):
        method = DeepGaussianProcess(width=4, steps=40, batch=32, dropout=0.1, series_bins=16, gaussian_process=process)
        said = fitted(method, rows).predict(new)
        scores[process] = r_squared(new.target.astype(float), said.astype(float))
    assert 0.15 < scores[False] < 0.8  # the index alone cannot do better
    assert scores[True] > 0.85


def test_deep_gp_repeats_and_leaves_the_operator_out():
    rows = place_rows(60, 0)
    methods = [fitted(DeepGaussianProcess(width=4, steps=5, series_bins=16), rows) for _ in range(2)]
    first, second = (method.predict(rows) for method in methods)
    assert (first == second).all()
    assert methods[0].cnn.operators.weight.item() == 0


def test_misuse_is_refused():
    with pytest.raises(InputProblem, match="history can be 'none', 'feature' or 'residual', got 'past'"):
        Ridge(history="past")
    with pytest.raises(InputProblem, match="history can be 'none' or 'feature', got 'residual'"):
        RandomForest(history="residual").fit(samples(), seed=0)
    rows = samples()
    rows.inputs.lon[3] = np.nan
    with pytest.raises(InputProblem, match="needs longitude and latitude of every region"):
        DeepGaussianProcess(width=4, steps=1, series_bins=16).fit(rows, seed=0)
