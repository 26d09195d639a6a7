"""Protocols cut as they say, nothing of a test fold reaches a model, figures are right, runs resume."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from geo_yield.baselines import CountyHistory, CountyTrend, MeanYield, Ridge
from geo_yield.errors import InputProblem
from geo_yield.evaluation import (
    CALIBRATION,
    bootstrap_rmse,
    describe,
    evaluate,
    make_folds,
    paired_bootstrap,
    summarise,
)
from geo_yield.samples import IndexSeries, Samples
from geo_yield.yields import join_yields, read_yields

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
YEARS = (2014, 2015, 2016, 2017)


def samples(regions=14, years=YEARS, *, seed=0):
    rng = np.random.default_rng(seed)
    n = regions * len(years)
    values = rng.normal(size=(n, 2, 3)).astype(np.float32)
    year = np.repeat(np.array(years, np.int16), regions)
    region = np.tile([f"{i:03d}" for i in range(regions)], len(years))
    level = rng.normal(40, 5, regions)[np.tile(np.arange(regions), len(years))]
    target = level + 3 * values[:, 0, 1] + rng.normal(size=n)
    inputs = IndexSeries(
        values=values,
        bands=("A", "B"),
        doy=(100, 107, 114),
        region_id=region,
        year=year,
        lon=rng.normal(size=n).astype(np.float32),
        lat=rng.normal(size=n).astype(np.float32),
    )
    return Samples(
        inputs=inputs,
        target=target.astype(np.float32),
        history=(level - 1).astype(np.float32),
        trend=(level + 1).astype(np.float32),
        unit="bu/acre",
        crop="soybean",
        district=np.array([str(int(r) // 4) for r in region]),
        past="before-first-season",
    )


METHODS = {
    "mean": MeanYield,
    "county history": CountyHistory,
    "ridge": lambda: Ridge(penalties=(1.0, 10.0), history="residual"),
}


@pytest.mark.parametrize("protocol", list(CALIBRATION))
def test_folds_cut_as_the_protocol_says(protocol):
    rows = samples()
    folds = make_folds(rows, protocol=protocol, folds=3)
    tested = np.sum([fold.test for fold in folds], axis=0)
    for fold in folds:
        assert not (fold.train & fold.test).any()
        if protocol == "leave-future-out":
            assert rows.year[fold.train].max() < rows.year[fold.test].min()
        elif protocol == "leave-one-year-out":
            assert set(rows.year[fold.test]) == {int(fold.name)}
            assert (fold.train | fold.test).all()
        else:
            groups = rows.region_id if protocol == "spatial" else rows.district
            assert not set(groups[fold.train]) & set(groups[fold.test])
            assert (fold.train | fold.test).all()
    once = rows.year >= 2016 if protocol == "leave-future-out" else np.ones(len(rows), bool)
    assert (tested == once).all()


def test_spatial_folds_are_the_published_ones():
    rows = samples()
    names = [f"{i:03d}" for i in range(14)]
    np.random.RandomState(0).shuffle(names)
    folds = make_folds(rows, protocol="spatial", folds=5)
    assert [set(rows.region_id[f.test]) for f in folds] == [set(part) for part in np.array_split(names, 5)]


@pytest.mark.parametrize("protocol", list(CALIBRATION))
def test_nothing_of_a_test_fold_changes_what_is_predicted_for_it(protocol):
    """Poison the labels of a fold, then the pixels of all but one of its rows: bitwise the same predictions."""
    rows = samples()
    clean = evaluate(rows, METHODS, protocol=protocol, folds=3, members=3)
    for fold in make_folds(rows, protocol=protocol, folds=3):
        mine = clean[clean["fold"] == fold.name]
        labels = np.where(fold.test, 1e6 - 7 * rows.target, rows.target).astype(np.float32)
        years = {"test_years": [int(fold.name)]} if CALIBRATION[protocol] == "year" else {}
        poisoned = evaluate(rows.replace(target=labels), METHODS, protocol=protocol, folds=3, members=3, **years)
        poisoned = poisoned[poisoned["fold"] == fold.name]
        for column in ("prediction", "spread", "lower", "upper"):
            assert poisoned[column].to_numpy().tobytes() == mine[column].to_numpy().tobytes()
        spared = int(np.flatnonzero(fold.test)[0])
        inputs = rows.inputs.take(np.arange(len(rows)))
        others = fold.test & (np.arange(len(rows)) != spared)
        inputs.values[others] = 1e3
        pixels = evaluate(rows.replace(inputs=inputs), METHODS, protocol=protocol, folds=3, members=3, **years)
        key = {"region_id": rows.region_id[spared], "year": rows.year[spared], "fold": fold.name}
        same = [frame.loc[(frame[list(key)] == pd.Series(key)).all(axis=1), "prediction"] for frame in (mine, pixels)]
        assert same[0].to_numpy().tobytes() == same[1].to_numpy().tobytes()
        assert len(same[0]) == len(METHODS)


def test_training_labels_do_matter():
    rows = samples()
    moved = rows.replace(target=np.where(rows.year == 2014, rows.target + 9, rows.target).astype(np.float32))
    before = evaluate(rows, METHODS, protocol="leave-one-year-out", test_years=[2017])
    after = evaluate(moved, METHODS, protocol="leave-one-year-out", test_years=[2017])
    change = (after["prediction"] - before["prediction"]).groupby(before["method"]).mean()
    assert change["mean"] == pytest.approx(3, abs=1e-4)
    assert change["county history"] == 0
    assert change["ridge"] > 1


def test_a_history_that_holds_test_labels_is_refused():
    leaking = samples().replace(past="previous-years")
    assert len(evaluate(leaking, METHODS, protocol="leave-future-out")) == 3 * 28
    for protocol in ("leave-one-year-out", "spatial", "spatial-district"):
        with pytest.raises(InputProblem, match="a history of previous years holds labels of test rows"):
            evaluate(leaking, METHODS, protocol=protocol, folds=3)


def test_misfitting_protocols_are_refused():
    rows = samples()
    with pytest.raises(InputProblem, match="no protocol 'random'; there are leave-future-out"):
        make_folds(rows, protocol="random")
    with pytest.raises(
        InputProblem, match=r"no rows to test on in \[2020\]; there are rows of \[2014, 2015, 2016, 2017\]"
    ):
        make_folds(rows, protocol="leave-future-out", test_years=[2020])
    with pytest.raises(InputProblem, match="test year 2015 has fewer than 2 years before it"):
        make_folds(rows, protocol="leave-future-out", test_years=[2015])
    with pytest.raises(InputProblem, match="14 regions can be cut into 2 to 14 folds, got 15"):
        make_folds(rows, protocol="spatial", folds=15)
    with pytest.raises(InputProblem, match="takes no test years"):
        make_folds(rows, protocol="spatial", test_years=[2015])
    with pytest.raises(InputProblem, match=r"rows of \[2014, 2015\] are too few years"):
        make_folds(samples(years=(2014, 2015)), protocol="leave-one-year-out")
    with pytest.raises(InputProblem, match="no row has both imagery and a known yield"):
        evaluate(rows.replace(target=np.full(len(rows), np.nan, np.float32)), METHODS)


def table(truth, prediction, *, year=None, half=1.0, method="m", protocol="spatial"):
    n = len(truth)
    prediction = np.asarray(prediction, float)
    return pd.DataFrame(
        {
            "protocol": protocol,
            "region_id": [f"{i:03d}" for i in range(n)],
            "year": [2014] * n if year is None else year,
            "fold": "part-1",
            "method": method,
            "truth": np.asarray(truth, float),
            "prediction": prediction,
            "spread": 0.0,
            "lower": prediction - half,
            "upper": prediction + half,
        }
    )


def test_figures_by_hand():
    rows = table([10, 20, 30, 50], [13, 20, 28, 45], year=[2014, 2014, 2015, 2015], half=2.5)
    every = summarise(rows).set_index("year")
    pooled = every.loc["all"]
    assert pooled["n"] == 4
    assert pooled["rmse"] == pytest.approx(np.sqrt((9 + 0 + 4 + 25) / 4))
    assert pooled["mae"] == pytest.approx(10 / 4)
    assert pooled["me"] == pytest.approx((-3 + 0 + 2 + 5) / 4)  # truth - prediction
    assert pooled["r2"] == pytest.approx(1 - 38 / (17.5**2 + 7.5**2 + 2.5**2 + 22.5**2))
    # anomalies: truth -5 5 -10 10, prediction -3.5 3.5 -8.5 8.5
    assert pooled["r2_within"] == pytest.approx(1 - 4 * 1.5**2 / 250)
    assert pooled["coverage"] == 0.5
    assert pooled["width"] == 5
    assert every.loc["2014", "rmse"] == pytest.approx(np.sqrt(4.5))
    assert every.loc["2015", "coverage"] == 0.5
    single = summarise(rows.assign(lower=np.nan, upper=np.nan))
    assert single[["coverage", "width"]].isna().all().all()


def test_bootstrap_finds_a_real_difference_and_no_other():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=300)
    noise = rng.normal(size=(2, 300))
    year = np.repeat(np.arange(2000, 2006), 50)
    sides = {"good": 1.0 * noise[0], "bad": 2.0 * noise[1], "like good": -1.0 * noise[0]}
    rows = pd.concat([table(truth, truth + e, year=year, method=m) for m, e in sides.items()])
    rows["region_id"] = np.tile([f"{i % 60:03d}" for i in range(300)], 3)
    rows["region_id"] += rows["year"].astype(str)  # one row for each region and year
    found = paired_bootstrap(rows, "good", "bad")
    expected = np.sqrt(np.mean(sides["good"] ** 2)) - np.sqrt(np.mean(sides["bad"] ** 2))
    assert found.difference == pytest.approx(expected, abs=1e-9)
    assert found.lower < expected < found.upper < 0
    assert found.share_better == 1
    same = paired_bootstrap(rows, "good", "like good")
    assert (same.difference, same.lower, same.upper) == pytest.approx((0, 0, 0), abs=1e-12)
    low, high = bootstrap_rmse(rows, "good")
    assert low < np.sqrt(np.mean(sides["good"] ** 2)) < high
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(2 * 300), rel=0.2)  # sd of an RMSE of N(0, 1) errors


def test_bootstrap_by_cluster_is_wider_when_clusters_err_alike():
    rng = np.random.default_rng(1)
    shock = np.repeat(rng.normal(size=10), 30)
    rows = table(np.zeros(300), shock)
    rows["region_id"] = np.repeat([f"{i:03d}" for i in range(10)], 30)
    rows["year"] = np.tile(np.arange(30), 10)
    by_region = np.diff(bootstrap_rmse(rows, "m", cluster="region_id"))[0]
    by_year = np.diff(bootstrap_rmse(rows, "m", cluster="year"))[0]
    assert by_region > 0.2
    assert by_year == pytest.approx(0, abs=1e-9)  # every year holds the same ten errors


def test_bootstrap_refuses_unpaired_rows():
    rows = pd.concat([table([1, 2], [1, 2], method="a"), table([1, 2, 3], [1, 2, 3], method="b")])
    with pytest.raises(InputProblem, match="did not predict the same rows"):
        paired_bootstrap(rows, "a", "b")
    with pytest.raises(InputProblem, match=r"no rows of method 'c'; there are \['a', 'b'\]"):
        paired_bootstrap(rows, "a", "c")
    with pytest.raises(InputProblem, match="compare within one protocol"):
        paired_bootstrap(pd.concat([rows, table([1], [1], protocol="other")]), "a", "b")


class Counting(MeanYield):
    fits = 0

    def fit(self, samples, *, seed):
        type(self).fits += 1
        super().fit(samples, seed=seed)


def test_a_run_goes_on_where_it_stopped_and_starts_again_when_data_or_settings_changed(tmp_path):
    rows, options = samples(), {"protocol": "leave-one-year-out", "members": 0, "resume_dir": tmp_path}
    Counting.fits = 0
    with pytest.raises(KeyboardInterrupt):
        evaluate(rows, {"c": Counting}, on_fit=lambda fold, *_: _stop_after(fold, "2015"), **options)
    assert Counting.fits == 2
    heard = []
    resumed = evaluate(rows, {"c": Counting}, on_fit=lambda *a: heard.append(a), **options)
    assert Counting.fits == 4
    assert heard == [(str(year), "c", k + 1, 4) for k, year in enumerate(YEARS)]
    pd.testing.assert_frame_equal(resumed, evaluate(rows, {"c": Counting}, **options | {"resume_dir": None}))
    Counting.fits = 0
    evaluate(rows, {"c": Counting}, **options)
    assert Counting.fits == 0
    evaluate(rows.replace(target=rows.target + 1), {"c": Counting}, **options)
    assert Counting.fits == 4
    evaluate(rows, {"c": lambda: Counting(name="other")}, **options)
    assert Counting.fits == 8
    assert not list(tmp_path.glob(".*partial"))
    next(tmp_path.glob("*.parquet")).write_bytes(b"PAR1")
    with pytest.raises(InputProblem, match="is damaged .*: delete it and run again"):
        evaluate(rows, {"c": Counting}, **options)


def _stop_after(fold, last):
    if fold == last:
        raise KeyboardInterrupt


def test_candidates_are_chosen_among_and_need_members():
    rows = samples()
    both = {"either": [MeanYield, METHODS["ridge"]], "ridge": METHODS["ridge"]}
    found = evaluate(rows, both, protocol="spatial", folds=3, members=3).set_index("method")["prediction"]
    assert (found["either"].to_numpy() == found["ridge"].to_numpy()).all()
    with pytest.raises(InputProblem, match="choosing among candidates needs left-out rows"):
        evaluate(rows, both, protocol="spatial", folds=3, members=0)


def test_description_follows_settings_and_not_addresses():
    assert describe(Ridge()) == describe(Ridge())
    assert describe(Ridge()) != describe(Ridge(history="feature"))


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not beside the checkout")
def test_us_soybean_history_has_the_errors_that_others_measured():
    """The whole path from file to figure, against a figure made without this code: county 5-year means, 11 states."""
    table = read_yields(SHARED / "us-soybean-county-yields" / "yield_final.csv")
    states = ("05", "17", "18", "19", "20", "27", "29", "31", "38", "39", "46")
    table = table[table["region_id"].str[:2].isin(states)]
    n = len(table)
    inputs = IndexSeries(
        values=np.zeros((n, 1, 1), np.float32),
        bands=("none",),
        doy=(1,),
        region_id=table["region_id"].to_numpy(str),
        year=table["year"].to_numpy(np.int16),
        lon=np.zeros(n, np.float32),
        lat=np.zeros(n, np.float32),
    )
    joined = join_yields(inputs, table, history="previous-years", window=5)
    methods = {"history": CountyHistory, "trend": CountyTrend}
    rows = evaluate(joined, methods, protocol="leave-future-out", test_years=range(2009, 2016), members=0)
    figures = summarise(rows).set_index(["method", "year"])["rmse"].round(2)
    known = [5.80, 5.31, 6.36, 9.05, 6.21, 7.15, 7.81]
    assert figures["history"].drop("all").tolist() == pytest.approx(known, abs=0.006)
    assert figures["trend", "2012"] > figures["trend", "2013"]  # no past foretells a drought
