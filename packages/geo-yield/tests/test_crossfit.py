"""The interval covers what it promises on simulated rows; members never see their own fold."""

import numpy as np
import pytest

from geo_yield.baselines import MeanYield, Ridge
from geo_yield.crossfit import CrossFit, conformal_quantile, held_out_parts
from geo_yield.errors import InputProblem
from geo_yield.samples import IndexSeries, Samples


def samples(regions=40, years=(2015, 2016, 2017), *, seed=0, noise=2.0, year_sd=0.0):
    """Yield = 30 + 4 x + shock of the year + noise; x is the one index value."""
    rng = np.random.default_rng(seed)
    n = regions * len(years)
    x = rng.normal(size=n)
    year = np.repeat(np.array(years, np.int16), regions)
    shock = dict(zip(years, rng.normal(scale=year_sd, size=len(years)), strict=True))
    target = 30 + 4 * x + rng.normal(scale=noise, size=n) + np.array([shock[y] for y in year.tolist()])
    region = np.tile([f"{i:03d}" for i in range(regions)], len(years))
    inputs = IndexSeries(
        values=x[:, None, None].astype(np.float32),
        bands=("X",),
        doy=(150,),
        region_id=region,
        year=year,
        lon=np.zeros(n, np.float32),
        lat=np.zeros(n, np.float32),
    )
    nan = np.full(n, np.nan, np.float32)
    district = np.array([r[:2] for r in region])
    return Samples(
        inputs=inputs,
        target=target.astype(np.float32),
        history=nan,
        trend=nan,
        unit="bu/acre",
        crop="soybean",
        district=district,
    )


def ridge():
    return Ridge(penalties=(1.0,))


class Recorder(MeanYield):
    """Remembers which rows it was shown, and says a different constant for each seed."""

    def fit(self, samples, *, seed):
        self.seen = set(zip(samples.region_id.tolist(), samples.year.tolist(), strict=True))
        self.mean = float(seed)

    def predict(self, samples):
        assert np.isnan(samples.target).all(), "a target reached a model at prediction time"
        return super().predict(samples)


@pytest.mark.parametrize(
    ("count", "level", "rank"), [(99, 0.9, 90), (10, 0.9, 10), (9, 0.9, 9), (19, 0.5, 10), (20, 0.95, 20)]
)
def test_quantile_is_the_finite_sample_rank(count, level, rank):
    scores = np.random.default_rng(1).permutation(np.arange(1, count + 1)).astype(np.float32)
    assert conformal_quantile(scores, level) == rank


def test_too_few_scores_give_an_endless_interval():
    assert conformal_quantile(np.arange(8.0), 0.9) == np.inf
    model = CrossFit(ridge, folds=1, level=0.99)
    model.fit(samples(10), seed=0)
    said = model.predict(samples(3))
    assert np.isposinf(said.upper).all()
    assert np.isneginf(said.lower).all()
    assert np.isfinite(said.mean).all()


@pytest.mark.parametrize("group", ["random", "year", "region", "district"])
def test_each_member_leaves_out_whole_groups_and_every_row_is_left_out_once(group):
    rows = samples(30)
    model = CrossFit(Recorder, folds=3, group=group)
    heard = []
    model.fit(rows, seed=7, on_member=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 3), (2, 3), (3, 3)]
    keys = list(zip(rows.region_id.tolist(), rows.year.tolist(), strict=True))
    unseen = [[key not in member.seen for key in keys] for member in model.members]
    assert np.sum(unseen, axis=0).tolist() == [1] * len(rows)
    if group != "random":
        of = {"year": rows.year, "region": rows.region_id, "district": rows.district}[group]
        for mask in unseen:
            assert not set(of[np.array(mask)].tolist()) & set(of[~np.array(mask)].tolist())
    said = model.predict(rows)
    assert (said.mean == 8).all()  # members say 7, 8, 9
    assert said.spread == pytest.approx(np.full(len(rows), np.sqrt(2 / 3)), rel=1e-6)
    assert len(model.scores) == len(rows)


def test_one_fold_is_split_conformal_on_a_fifth():
    rows = samples(50, years=(2015, 2016))
    model = CrossFit(Recorder, folds=1)
    model.fit(rows, seed=3)
    assert len(model.members) == 1
    assert len(model.members[0].seen) == 80
    assert len(model.scores) == 20
    assert model.predict(rows).spread.max() == 0


def test_rows_without_a_yield_are_not_learned_from():
    rows = samples(20)
    holes = rows.replace(target=np.where(rows.year == 2016, np.nan, rows.target).astype(np.float32))
    model = CrossFit(Recorder, folds=4)
    model.fit(holes, seed=0)
    assert {year for member in model.members for _, year in member.seen} == {2015, 2017}


@pytest.mark.parametrize("folds", [1, 5])
def test_coverage_on_exchangeable_rows(folds):
    covered, widths = [], []
    for seed in range(30):
        model = CrossFit(ridge, folds=folds, level=0.8)
        model.fit(samples(40, seed=seed), seed=seed)
        new = samples(60, seed=1000 + seed)
        said = model.predict(new)
        covered.append(((said.lower <= new.target) & (new.target <= said.upper)).mean())
        widths.append((said.upper - said.lower).mean())
    assert np.mean(covered) == pytest.approx(0.8, abs=0.04)
    assert np.mean(widths) == pytest.approx(2 * 1.2816 * 2.0, rel=0.1)  # 80 % of N(0, 2)


def test_an_interval_for_new_seasons_needs_left_out_seasons():
    """With shocks per year, folds by year cover rows of unseen years; random folds, which saw each year, do not."""
    coverage = {}
    for group in ("random", "year"):
        hits = []
        for seed in range(12):
            rows = samples(20, years=tuple(range(2000, 2012)), seed=seed, year_sd=5.0)
            new = rows.take(rows.year >= 2009)
            model = CrossFit(ridge, folds=9, group=group, level=0.8)
            model.fit(rows.take(rows.year < 2009), seed=seed)
            said = model.predict(new)
            hits.append(((said.lower <= new.target) & (new.target <= said.upper)).mean())
        coverage[group] = np.mean(hits)
    assert coverage["year"] > 0.74
    assert coverage["year"] > coverage["random"]


def test_fewer_groups_than_folds_give_one_fold_each():
    masks = held_out_parts(samples(6), folds=5, group="year", seed=0)
    assert [int(mask.sum()) for mask in masks] == [6, 6, 6]


def test_of_several_candidates_the_one_that_errs_least_on_left_out_rows_is_kept():
    rows = samples()
    makers = [MeanYield, ridge, lambda: Ridge(penalties=(1e6,))]
    heard = []
    model = CrossFit(makers, folds=3)
    model.fit(rows, seed=0, on_member=lambda done, total: heard.append((done, total)))
    assert heard == [(i + 1, 9) for i in range(9)]
    alone = CrossFit(ridge, folds=3)
    alone.fit(rows, seed=0)
    assert model.chosen == 1
    assert (model.predict(rows).mean == alone.predict(rows).mean).all()
    assert (model.scores == alone.scores).all()
    noise = rows.replace(target=np.random.default_rng(5).normal(30, 3, len(rows)).astype(np.float32))
    model.fit(noise, seed=0)
    assert model.chosen != 1  # nothing to learn: the mean, or the penalty that makes it one
    with pytest.raises(InputProblem, match="got no candidate"):
        CrossFit([])


def test_misuse_is_refused():
    rows = samples(5, years=(2015,))
    with pytest.raises(InputProblem, match="at least 1 fold, got 0"):
        CrossFit(ridge, folds=0)
    with pytest.raises(InputProblem, match="folds can be made by random, year, region, district, got 'county'"):
        CrossFit(ridge, group="county")
    with pytest.raises(InputProblem, match="an interval's level lies between 0 and 1"):
        CrossFit(ridge, level=90)
    with pytest.raises(InputProblem, match=r"5 rows with a known yield in 1 year group\(s\) cannot be split"):
        CrossFit(ridge, group="year").fit(rows, seed=0)
    with pytest.raises(InputProblem, match="no members yet"):
        CrossFit(ridge).predict(rows)
    with pytest.raises(InputProblem, match="folds by district need a district"):
        CrossFit(ridge, group="district").fit(rows.replace(district=None), seed=0)
