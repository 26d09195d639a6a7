"""The one matched real set: Illinois soybean 2018-2021, weekly HLS indices per county, NASS yields, 330 real rows.

    uv run python packages/geo-yield/proofs/illinois.py DATA

DATA holds the CSV files of the GitHub repository BaerchenJ/Stagewise-crop-yield-prediction-with-multisource-
functional-indices (without a licence, so they are not kept here). Yields come from the NASS table alone: the authors'
own file also holds values they imputed. Writes illinois.json, illinois.md and illinois.png to `results/`; every
finished (protocol, fold, method) is kept in --parts, so a second run goes on where the first stopped.

Chosen inside the training rows of each fold, by the errors on left-out counties or seasons: DFYP's bins, batch size and
number of steps, every combination of a grid that was written down before this run; ridge penalties. Fitted to the
training rows: index limits, band means, the line through history, target scale, every interval. The same everywhere
and not searched for: `DFYPConfig.small` with Sobel, `TrainConfig.small`; the Deep GP takes 16 bins, batches of 16 and
150 steps. Copies: five under spatial folds, else one for each left-out season.
"""

import argparse
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from geo_yield.baselines import (
    CountyHistory,
    CountyTrend,
    DeepGaussianProcess,
    HistoryLine,
    MeanYield,
    RandomForest,
    Ridge,
)
from geo_yield.dfyp import DFYPConfig
from geo_yield.evaluation import CALIBRATION, Maker, bootstrap_rmse, evaluate, paired_bootstrap, summarise
from geo_yield.samples import Samples
from geo_yield.series import series_samples
from geo_yield.training import DFYPRegressor, TrainConfig

PROTOCOLS = ("spatial", "leave-one-year-out")
SERIES = ("ri", "evi", "ndvi", "savi")
BINS, BATCHES, STEPS = (16, 32), (16, 32), (60, 240)
DEEP_GP_SETTINGS = {"series_bins": 16, "batch": 16, "steps": 150}
DFYP, IMAGES_ONLY, DEEP_GP = "DFYP + history", "DFYP", "Deep GP"
RIVAL, STRONGEST = "ridge + history", "ridge on what history leaves"
SEED, LEVEL = 0, 0.9
MODEL = DFYPConfig.small(7, operator="sobel")

log = logging.getLogger("illinois")


def read_samples(data: Path) -> Samples:
    """The rows whose yield NASS published; history is the county's mean over 2008-2017, before any imagery."""
    return series_samples(
        [data / f"fundat_{name}.csv" for name in SERIES],
        data / "nass_raw_Illinois19802022.csv",
        history="before-first-season",
        crop="soybean",
        unit="bu/acre",
        centroids=data / "96points.csv",
        district_column="ADC",
    )


def methods_for(protocol: str) -> dict[str, Maker | Sequence[Maker]]:
    """Every method by the name it has in the table; ridge chooses its penalty in folds cut as the protocol cuts."""
    group = CALIBRATION[protocol]
    settings = [
        (replace(MODEL, bins=bins), replace(TrainConfig.small(max_steps=steps), batch_size=batch))
        for bins, batch, steps in itertools.product(BINS, BATCHES, STEPS)
    ]
    return {
        "mean of the training rows": MeanYield,
        "county history, as it is": CountyHistory,
        "county trend": CountyTrend,
        "line through county history": HistoryLine,
        "ridge": lambda: Ridge(group=group),
        RIVAL: lambda: Ridge(history="feature", group=group),
        STRONGEST: lambda: Ridge(history="residual", group=group),
        "random forest": RandomForest,
        "random forest + history": lambda: RandomForest(history="feature"),
        DFYP: [partial(DFYPRegressor, m, replace(t, history="residual"), name=DFYP) for m, t in settings],
        IMAGES_ONLY: [partial(DFYPRegressor, m, t, name=IMAGES_ONLY) for m, t in settings],
        DEEP_GP: lambda: DeepGaussianProcess(**DEEP_GP_SETTINGS),
    }


def single_fits(samples: Samples) -> pd.DataFrame:
    """Linear models fitted once on all training rows, since an ensemble may cost them: the set's earlier anchors
    (penalty 300, history as one more column), and ours with the penalty chosen in the training rows."""
    rows = []
    for protocol in PROTOCOLS:
        group = CALIBRATION[protocol]
        methods: dict[str, Maker] = {
            "mean": MeanYield,
            "line through history": HistoryLine,
            "ridge, penalty 300": lambda: Ridge(penalties=(300.0,)),
            "ridge, penalty 300, + history": lambda: Ridge(penalties=(300.0,), history="feature"),
            "ridge": partial(Ridge, group=group),
            RIVAL: partial(Ridge, group=group, history="feature"),
            STRONGEST: partial(Ridge, group=group, history="residual"),
        }
        rows.append(evaluate(samples, methods, protocol=protocol, members=0, seed=SEED))
    return pooled(pd.concat(rows))


def pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """The figures over all years of each protocol and method."""
    figures = summarise(rows)
    return figures[figures["year"] == "all"].drop(columns="year").reset_index(drop=True)


def compare(rows: pd.DataFrame) -> list[dict[str, object]]:
    """DFYP with history against each method, over other counties and over other seasons."""
    found = []
    for protocol, mine in rows.groupby("protocol", sort=False):
        for other in mine["method"].unique():
            if other == DFYP:
                continue
            for cluster in ("region_id", "year"):
                result = paired_bootstrap(mine, DFYP, other, cluster=cluster, seed=SEED)
                found.append({"protocol": protocol, "than": other, "cluster": cluster, **asdict(result)})
    return found


def write_results(samples: Samples, rows: pd.DataFrame, singles: pd.DataFrame, out: Path) -> None:
    """JSON with every figure, the README's table, and the picture; each whole or not at all."""
    table = pooled(rows)
    intervals = [
        bootstrap_rmse(rows[rows["protocol"] == p], m, seed=SEED)
        for p, m in zip(table["protocol"], table["method"], strict=True)
    ]
    table[["rmse_low", "rmse_high"]] = intervals
    comparisons = compare(rows)
    document = {
        "rows": len(samples),
        "rows_by_year": {str(y): int((samples.year == y).sum()) for y in np.unique(samples.year)},
        "unit": samples.unit,
        "settings": {
            "seed": SEED,
            "level": LEVEL,
            "bins": BINS,
            "batches": BATCHES,
            "steps": STEPS,
            "deep_gp": DEEP_GP_SETTINGS,
            "folds": 5,
            "members": 5,
        },
        "model": asdict(MODEL),
        "pooled": table.round(4).to_dict("records"),
        "by_year": summarise(rows).query("year != 'all'").round(4).to_dict("records"),
        "linear_single_fits": singles.round(4).drop(columns=["coverage", "width"]).to_dict("records"),
        "rmse_difference_of_dfyp_with_history": comparisons,
    }
    write_text(out / "illinois.json", json.dumps(document, indent=1) + "\n")
    write_text(out / "illinois.md", markdown(table, comparisons))
    draw(rows, table, out / "illinois.png")


def markdown(table: pd.DataFrame, comparisons: list[dict[str, object]]) -> str:
    """The table of the README: a line for each method, both protocols side by side."""
    spatial, temporal = (table[table["protocol"] == p].set_index("method") for p in PROTOCOLS)
    head = (
        "| method | RMSE, 95 % interval | R² | covered | RMSE, 95 % interval | R² | covered |\n"
        "|---|---|---|---|---|---|---|\n"
        "| | **unseen counties** (5 folds) | | | **unseen season** (leave one year out) | | |\n"
    )
    lines = []
    for method in spatial.index:
        cells = []
        for side in (spatial, temporal):
            row = side.loc[method]
            cells.append(
                f"{row['rmse']:.2f} ({row['rmse_low']:.2f}-{row['rmse_high']:.2f}) | "
                f"{row['r2']:.2f} | {row['coverage']:.0%}"
            )
        bold = "**" if method == DFYP else ""
        lines.append(f"| {bold}{method}{bold} | {' | '.join(cells)} |")
    said = [
        f"- {c['protocol']}, {DFYP} minus {c['than']}, redrawing "
        f"{'counties' if c['cluster'] == 'region_id' else 'seasons'}: "
        f"{c['difference']:+.2f} bu/acre (95 %: {c['lower']:+.2f} to {c['upper']:+.2f})"
        for c in comparisons
        if c["than"] in (RIVAL, STRONGEST, DEEP_GP)
    ]
    return head + "\n".join(lines) + "\n\n" + "\n".join(said) + "\n"


def draw(rows: pd.DataFrame, table: pd.DataFrame, out: Path) -> None:
    """Above: predicted against reported yield, by season. Below: RMSE of every method with its interval."""
    figure = Figure(figsize=(12, 10.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    panels = np.stack([part.subplots(1, 2) for part in (above, below)])
    titles = {"spatial": "counties never seen (5 folds)", "leave-one-year-out": "a season never seen"}
    for column, protocol in enumerate(PROTOCOLS):
        mine = rows[(rows["protocol"] == protocol) & (rows["method"] == DFYP)]
        scatter(panels[0, column], mine, f"{DFYP}, {titles[protocol]}")
        bars(panels[1, column], table[table["protocol"] == protocol])
    figure.suptitle("Soybean yield of Illinois counties, 2018-2021, from weekly HLS indices", weight="bold")
    unfinished = out.with_suffix(".partial.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(unfinished, dpi=130)
    unfinished.replace(out)


def scatter(panel, rows: pd.DataFrame, title: str) -> None:
    for (year, mine), colour in zip(rows.groupby("year"), ("#1b7837", "#d95f02", "#7570b3", "#1f78b4"), strict=True):
        panel.errorbar(
            mine["truth"],
            mine["prediction"],
            yerr=(mine["upper"] - mine["lower"]) / 2,
            fmt="none",
            ecolor=colour,
            alpha=0.08,
        )
        panel.scatter(mine["truth"], mine["prediction"], s=16, color=colour, alpha=0.8, linewidths=0, label=str(year))
    low, high = (f(rows[["truth", "prediction"]].to_numpy()) for f in (np.min, np.max))
    panel.plot([low, high], [low, high], color="#444444", linewidth=0.8)
    figures = pooled(rows).iloc[0]
    panel.set(
        title=title,
        xlabel="reported yield, bu/acre",
        ylabel="predicted yield, bu/acre",
        xlim=(low - 2, high + 2),
        ylim=(low - 6, high + 6),
    )
    text = f"RMSE {figures['rmse']:.2f} bu/acre\nR² {figures['r2']:.2f}\n"
    text += f"{figures['coverage']:.0%} inside the {LEVEL:.0%} interval"
    panel.text(0.03, 0.97, text, transform=panel.transAxes, va="top")
    panel.legend(loc="lower right", frameon=False, title="season")


def bars(panel, table: pd.DataFrame) -> None:
    table = table.sort_values("rmse", ascending=False)
    colours = ["#1b7837" if "DFYP" in method else "#c2a878" for method in table["method"]]
    panel.barh(table["method"], table["rmse"], color=colours)
    margins = [table["rmse"] - table["rmse_low"], table["rmse_high"] - table["rmse"]]
    panel.errorbar(table["rmse"], table["method"], xerr=margins, fmt="none", ecolor="#222222", capsize=2, linewidth=1)
    for method, value, high in zip(table["method"], table["rmse"], table["rmse_high"], strict=True):
        panel.text(high + 0.1, method, f"{value:.2f}", va="center", fontsize=9)
    panel.set(
        xlabel="RMSE, bu/acre (whiskers: 95 %)",
        xlim=(0, table["rmse_high"].max() * 1.12),
    )
    panel.spines[["top", "right"]].set_visible(False)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--parts", type=Path, default=Path("runs/illinois"), help="where finished parts are kept")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)  # small batches: a second thread costs more than it brings
    samples = read_samples(arguments.data)
    parts = []
    for protocol in PROTOCOLS:
        part = evaluate(
            samples,
            methods_for(protocol),
            protocol=protocol,
            seed=SEED,
            level=LEVEL,
            resume_dir=arguments.parts,
            on_fit=lambda fold, method, done, total: log.info("%s: %s, %d of %d", fold, method, done, total),
        )
        parts.append(part)
    write_results(samples, pd.concat(parts), single_fits(samples), arguments.out)


if __name__ == "__main__":
    main()
