"""Which method predicts yields how well, asked so that no answer can leak: protocols, metrics, paired comparison.

Leave-future-out trains on the years before the test year, leave-one-year-out on all others, spatial folds on other
counties or districts. Random splits of rows are not offered: rows of one season share their weather, and a model that
has seen the neighbours' harvest looks better than it is (Roberts et al., "Cross-validation strategies for data with
temporal, spatial, hierarchical, or phylogenetic structure", Ecography 40, 2017).
Two things hold by construction: test rows reach a model without their targets, and every method is fitted as the same
`CrossFit` ensemble, its calibration folds cut as the protocol cuts (years under temporal protocols, else regions).

Shapes: N rows.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float64, Shaped

from geo_yield.crossfit import CrossFit, Regressor, group_of, without_target
from geo_yield.errors import InputProblem
from geo_yield.histograms import YieldTensor
from geo_yield.samples import Samples, years_of
from geo_yield.whole_files import whole_file

CALIBRATION = {
    "leave-future-out": "year",
    "leave-one-year-out": "year",
    "spatial": "region",
    "spatial-district": "district",
}
"""Protocol -> what its calibration folds, and choices nested in the training rows, keep together."""
FEWEST_EARLIER_YEARS = 2
"""Leave-future-out starts at the first year with this many before it: fewer cannot calibrate an interval."""
_FINGERPRINT = b"geo_yield.fingerprint"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One split of N rows."""

    name: str
    train: Bool[np.ndarray, "N"]
    test: Bool[np.ndarray, "N"]


Maker = Callable[[], Regressor]


def evaluate(
    samples: Samples,
    methods: Mapping[str, Maker | Sequence[Maker]],
    *,
    protocol: str = "leave-future-out",
    test_years: Sequence[int] | None = None,
    folds: int = 5,
    members: int = 5,
    seed: int = 0,
    level: float = 0.9,
    resume_dir: Path | None = None,
    on_fit: Callable[[str, str, int, int], None] | None = None,
) -> pd.DataFrame:
    """Predict every row by every method from models that have not seen its fold.

    methods: name -> function that makes an unfitted regressor, or several functions: `CrossFit` then chooses one in the
    training rows of each fold. folds: spatial folds. members: copies in each CrossFit; 0 fits each method once on all
    training rows and gives no interval. test_years restricts temporal protocols.
    resume_dir: finished (protocol, fold, method) parts are kept there and not computed again while data and settings
    stay the same. on_fit(fold, method, done, total) is called after each part.
    Returns columns protocol, region_id, year, fold, method, truth, prediction, spread, lower, upper (in samples.unit).
    Raises InputProblem if the protocol does not fit the rows, or the rows' history would leak their test labels.
    """
    samples = samples.take(np.isfinite(samples.target))
    _refuse_leaking_history(samples, protocol)
    splits = make_folds(samples, protocol=protocol, folds=folds, seed=seed, test_years=test_years)
    total, parts = len(splits) * len(methods), []
    for fold in splits:
        for method, make in methods.items():
            settings = (protocol, fold.name, method, members, seed, level, _describe_all(make))
            path = None if resume_dir is None else Path(resume_dir) / f"{_slug(protocol, fold.name, method)}.parquet"
            fingerprint = "" if path is None else _fingerprint(samples, fold, settings)
            part = None if path is None else _read_part(path, fingerprint)
            if part is None:
                part = _predict_fold(samples, fold, make, protocol=protocol, members=members, seed=seed, level=level)
                part.insert(4, "method", method)
                if path is not None:
                    _write_part(path, part, fingerprint)
            parts.append(part)
            if on_fit is not None:
                on_fit(fold.name, method, len(parts), total)
    return pd.concat(parts, ignore_index=True)


def make_folds(
    samples: Samples, *, protocol: str, folds: int = 5, seed: int = 0, test_years: Sequence[int] | None = None
) -> list[Fold]:
    """The splits of a protocol. Spatial folds: sorted names, shuffled by RandomState(seed), cut into equal parts.

    Raises InputProblem for an unknown protocol, too few regions, or a test year that lacks rows or years to learn from.
    """
    if protocol not in CALIBRATION:
        raise InputProblem(f"no protocol '{protocol}'; there are {', '.join(CALIBRATION)}")
    if not len(samples):
        raise InputProblem("no row has both imagery and a known yield: check that region ids and years agree")
    if CALIBRATION[protocol] != "year":
        if test_years is not None:
            raise InputProblem(f"protocol '{protocol}' leaves out regions, so it takes no test years")
        return _spatial_folds(group_of(samples, CALIBRATION[protocol]), folds, seed)
    if test_years is not None and (unknown := sorted(set(test_years) - set(years_of(samples)))):
        raise InputProblem(f"no rows to test on in {unknown}; there are rows of {years_of(samples)}")
    future = protocol == "leave-future-out"
    return list(_temporal_folds(samples, test_years, future=future))


def _temporal_folds(samples: Samples, test_years: Sequence[int] | None, *, future: bool) -> Iterator[Fold]:
    years = years_of(samples)
    if len(years) <= FEWEST_EARLIER_YEARS:
        raise InputProblem(f"rows of {years} are too few years to leave one out: at least 3 are needed")
    for year in sorted(test_years) if test_years is not None else years[FEWEST_EARLIER_YEARS if future else 0 :]:
        train = samples.year < year if future else samples.year != year
        if len(set(samples.year[train].tolist())) < FEWEST_EARLIER_YEARS:
            raise InputProblem(f"test year {year} has fewer than {FEWEST_EARLIER_YEARS} years before it to learn from")
        yield Fold(name=str(year), train=train, test=samples.year == year)


def _spatial_folds(groups: Shaped[np.ndarray, "N"], folds: int, seed: int) -> list[Fold]:
    names = np.array(sorted(set(groups.tolist())))
    if not 2 <= folds <= len(names):
        raise InputProblem(f"{len(names)} regions can be cut into 2 to {len(names)} folds, got {folds}")
    np.random.RandomState(seed).shuffle(names)  # the legacy generator: published folds of seed 0 stay the same
    tests = [np.isin(groups, part) for part in np.array_split(names, folds)]
    return [Fold(name=f"part-{k + 1}", train=~test, test=test) for k, test in enumerate(tests)]


def history_for(protocol: str) -> str:
    """The `history` of `join_yields` that cannot hold a label under test in this protocol."""
    return "previous-years" if protocol == "leave-future-out" else "before-first-season"


def _refuse_leaking_history(samples: Samples, protocol: str) -> None:
    if samples.past == "previous-years" and history_for(protocol) != "previous-years":
        raise InputProblem(
            f"a history of previous years holds labels of test rows under '{protocol}': "
            "join yields with history='before-first-season'"
        )


def _predict_fold(
    samples: Samples,
    fold: Fold,
    make: Maker | Sequence[Maker],
    *,
    protocol: str,
    members: int,
    seed: int,
    level: float,
) -> pd.DataFrame:
    # the targets of test rows end here: what a model cannot see it cannot leak
    train, test = samples.take(fold.train), without_target(samples.take(fold.test))
    columns = {
        "protocol": protocol,
        "region_id": test.region_id,
        "year": test.year,
        "fold": fold.name,
        "truth": samples.target[fold.test],
    }
    if members:
        model = CrossFit(make, folds=members, group=CALIBRATION[protocol], level=level)
        model.fit(train, seed=seed)
        said = model.predict(test)
        columns |= {"prediction": said.mean, "spread": said.spread, "lower": said.lower, "upper": said.upper}
    else:
        if not callable(make):
            raise InputProblem("choosing among candidates needs left-out rows: set members to 1 or more")
        single = make()
        single.fit(train, seed=seed)
        columns |= {"prediction": single.predict(test)} | dict.fromkeys(
            ("spread", "lower", "upper"), np.float32(np.nan)
        )
    return pd.DataFrame(columns)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Figures per protocol and method: pooled over everything (year "all"), then for each year.

    Columns n, rmse, mae, r2 = 1 - SSE/SST, r2_within (the same on anomalies from each year's mean: skill in space),
    me = mean(truth - prediction), coverage (share of truths inside the interval) and width of the interval.
    """
    out = []
    for (protocol, method), mine in rows.groupby(["protocol", "method"], sort=False):
        for year, part in [("all", mine), *mine.groupby("year")]:
            out.append({"protocol": protocol, "method": method, "year": str(year), **_figures(part)})
    return pd.DataFrame(out)


def _figures(part: pd.DataFrame) -> dict[str, float]:
    truth, prediction = part["truth"].to_numpy(np.float64), part["prediction"].to_numpy(np.float64)
    year = part["year"].to_numpy()
    inside = (part["lower"] <= part["truth"]) & (part["truth"] <= part["upper"])
    bounded = part["lower"].notna().all()
    return {
        "n": len(part),
        "rmse": rmse(truth, prediction),
        "mae": float(np.abs(truth - prediction).mean()),
        "r2": r_squared(truth, prediction),
        "r2_within": r_squared(_anomaly(truth, year), _anomaly(prediction, year)),
        "me": float((truth - prediction).mean()),
        "coverage": float(inside.mean()) if bounded else float("nan"),
        "width": float((part["upper"] - part["lower"]).mean()) if bounded else float("nan"),
    }


def rmse(truth: Float64[np.ndarray, "N"], prediction: Float64[np.ndarray, "N"]) -> float:
    """Root mean square error, in the unit of the yields."""
    return float(np.sqrt(np.mean((truth - prediction) ** 2)))


def r_squared(truth: Float64[np.ndarray, "N"], prediction: Float64[np.ndarray, "N"]) -> float:
    """1 - SSE/SST; NaN where the truth does not vary. Below 0: worse than the mean of these very rows."""
    total = np.sum((truth - truth.mean()) ** 2)
    return float(1 - np.sum((truth - prediction) ** 2) / total) if total > 0 else float("nan")


def _anomaly(values: Float64[np.ndarray, "N"], year: Shaped[np.ndarray, "N"]) -> Float64[np.ndarray, "N"]:
    return values - pd.Series(values).groupby(year).transform("mean").to_numpy()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """RMSE of a minus RMSE of b on the same rows: below 0, a is better."""

    difference: float
    lower: float
    upper: float
    share_better: float
    """Share of the draws in which a is the better one."""


def paired_bootstrap(
    rows: pd.DataFrame,
    a: str,
    b: str,
    *,
    cluster: str = "region_id",
    draws: int = 4000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """How sure the difference of two methods' RMSE is, redrawing whole clusters of the rows of one protocol.

    Rows of one county, or of one season, err alike, so clusters ("region_id" or "year") are drawn, not rows (Davison &
    Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). The two kinds answer different questions:
    other counties in these seasons, or other seasons. With four seasons the second is a rough guess, and stays one.
    Raises InputProblem if a method is missing or the two did not predict the same rows.
    """
    error_a, error_b, clusters = _paired_errors(rows, a, b, cluster)
    names, index = np.unique(clusters, return_inverse=True)
    sums = np.stack([np.bincount(index, weights) for weights in (error_a, error_b, np.ones(len(index)))])
    # sums per cluster are all that a draw needs, so no rows are copied
    drawn = np.random.default_rng(seed).integers(0, len(names), (draws, len(names)))
    totals = sums[:, drawn].sum(axis=-1)
    differences = np.sqrt(totals[0] / totals[2]) - np.sqrt(totals[1] / totals[2])
    tail = (1 - level) / 2
    lower, upper = np.quantile(differences, [tail, 1 - tail])
    return Comparison(
        difference=float(np.sqrt(error_a.mean()) - np.sqrt(error_b.mean())),
        lower=float(lower),
        upper=float(upper),
        share_better=float((differences < 0).mean()),
    )


def bootstrap_rmse(
    rows: pd.DataFrame,
    method: str,
    *,
    cluster: str = "region_id",
    draws: int = 4000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of one method's RMSE, redrawing whole clusters; see `paired_bootstrap`."""
    errors, _, clusters = _paired_errors(rows, method, method, cluster)
    names, index = np.unique(clusters, return_inverse=True)
    sums = np.stack([np.bincount(index, errors), np.bincount(index)])
    totals = sums[:, np.random.default_rng(seed).integers(0, len(names), (draws, len(names)))].sum(axis=-1)
    lower, upper = np.quantile(np.sqrt(totals[0] / totals[1]), [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)


def _paired_errors(
    rows: pd.DataFrame, a: str, b: str, cluster: str
) -> tuple[Float64[np.ndarray, "N"], Float64[np.ndarray, "N"], Shaped[np.ndarray, "N"]]:
    """Squared errors of both methods in one order of rows, and each row's cluster."""
    if rows["protocol"].nunique() != 1:
        raise InputProblem(f"compare within one protocol, got rows of {sorted(rows['protocol'].unique())}")
    keys = ["region_id", "year"]
    sides = []
    for method in (a, b):
        side = rows[rows["method"] == method].sort_values(keys, ignore_index=True)
        if side.empty:
            raise InputProblem(f"no rows of method '{method}'; there are {sorted(rows['method'].unique())}")
        sides.append(side)
    if not sides[0][keys].equals(sides[1][keys]):
        raise InputProblem(f"'{a}' and '{b}' did not predict the same rows, so they cannot be compared in pairs")
    errors = [((side["truth"] - side["prediction"]) ** 2).to_numpy(np.float64) for side in sides]
    return errors[0], errors[1], sides[0][cluster].to_numpy()


def describe(regressor: Regressor) -> str:
    """A text that changes when the settings of an unfitted regressor change; callbacks and folders are no settings."""
    settings = sorted(getattr(regressor, "__dict__", {}).items())
    kept = [(name, repr(value)) for name, value in settings if not callable(value) and not isinstance(value, Path)]
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(regressor).__qualname__} {regressor.name} {kept}")


def _describe_all(make: Maker | Sequence[Maker]) -> str:
    return describe(make()) if callable(make) else " | ".join(describe(candidate()) for candidate in make)


def _fingerprint(samples: Samples, fold: Fold, settings: tuple[object, ...]) -> str:
    """Digest of everything a part depends on, so that a changed file or setting is never answered from an old part."""
    inputs = samples.inputs
    pixels = inputs.image if isinstance(inputs, YieldTensor) else inputs.values
    digest = hashlib.sha256(repr((settings, samples.unit, samples.crop)).encode())
    for array in (pixels, samples.target, samples.history, samples.trend, samples.year, fold.train, fold.test):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update("\n".join(samples.region_id.tolist()).encode())
    return digest.hexdigest()


def _read_part(path: Path, fingerprint: str) -> pd.DataFrame | None:
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as problem:
        raise InputProblem(f"'{path}' is damaged ({type(problem).__name__}): delete it and run again") from None
    if (table.schema.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
        _log.info("'%s' was made from other data or settings and is computed again", path)
        return None
    return table.to_pandas()


def _write_part(path: Path, part: pd.DataFrame, fingerprint: str) -> None:
    table = pa.Table.from_pandas(part, preserve_index=False)
    metadata = (table.schema.metadata or {}) | {_FINGERPRINT: fingerprint}
    with whole_file(path) as partial:
        pq.write_table(table.replace_schema_metadata(metadata), partial)


def _slug(*parts: str) -> str:
    return "--".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in parts)
