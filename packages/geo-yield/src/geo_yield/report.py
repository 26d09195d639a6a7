"""What a run is shown by: a map, a figure of skill, and a page that says what was done and how far off it is.

Everything is drawn from the rows that `geo_yield.evaluation.evaluate` returns, so no figure in a picture can differ
from the table beside it. Yields of one run share one colour scale, errors another that is symmetric around zero; errors
are prediction minus observation, so red is "too high".
Decided here: pictures are made with matplotlib's `Figure` and not through pyplot, which would keep state between runs;
maps are drawn in an equal-area projection centred on the regions, north up.

Shapes: N rows (region, year) of one method.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

import geopandas
import numpy as np
import pandas as pd
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from geo_yield.errors import InputProblem
from geo_yield.evaluation import bootstrap_rmse, paired_bootstrap, rmse, summarise
from geo_yield.whole_files import whole_file

PACKAGES = ("geo-yield", "shared-kernels", "torch", "numpy", "scikit-learn", "rasterio", "geopandas")
_YIELDS, _ERRORS, _SURE = "YlGn", "RdBu_r", "YlOrBr"
_INK, _MUTED, _ACCENT, _OTHER = "#222222", "#6b6b6b", "#1b7837", "#c2a878"
_ROWS_OF_REGIONS = 10
_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the pictures are of, in the words that go on them."""

    crop: str
    unit: str
    method: str = "DFYP"
    """Method to put on the map, as named in the rows."""
    reference: str = "county history"
    """Method to compare it with."""
    level: float = 0.9
    """Nominal coverage of the intervals."""
    simulated: bool = False
    """Says "simulated data" on everything."""


def draw_map(rows: pd.DataFrame, regions: geopandas.GeoDataFrame, subject: Subject, out: Path, *, year: int) -> Path:
    """Predicted and observed yield of one season above the errors of the method and of the reference. Returns `out`.

    `regions` has columns region_id and geometry. Raises InputProblem if a method has no rows of `year`, or no region of
    the rows is among `regions`.
    """
    mine, other = (_of(rows, method, year) for method in (subject.method, subject.reference))
    shapes = _projected(regions, mine["region_id"])
    values = _per_region(mine, shapes, ("prediction", "truth"))
    errors = {
        subject.method: _per_region(mine.assign(error=mine["prediction"] - mine["truth"]), shapes, ("error",))["error"],
        subject.reference: _per_region(other.assign(error=other["prediction"] - other["truth"]), shapes, ("error",))[
            "error"
        ],
    }
    low, high = np.nanmin([*values.values()]), np.nanmax([*values.values()])
    reach = max(np.nanmax(np.abs([*errors.values()])), 1e-6)
    figure, axes = _map_grid(shapes, 2)
    titles = (f"predicted by {subject.method}", "observed")
    for panel, title, shown in zip(axes[0], titles, (values["prediction"], values["truth"]), strict=True):
        _draw_regions(panel, shapes, shown, _YIELDS, (low, high), title)
    for panel, (method, shown) in zip(axes[1], errors.items(), strict=True):
        off = float(np.sqrt(np.nanmean(shown**2)))
        title = f"error of {method}: RMSE {off:.1f} {subject.unit}"
        _draw_regions(panel, shapes, shown, _ERRORS, (-reach, reach), title)
    _colour_bar(figure, axes[0], _YIELDS, (low, high), f"yield ({subject.unit})")
    _colour_bar(figure, axes[1], _ERRORS, (-reach, reach), f"predicted - observed ({subject.unit})")
    _scale_bar(axes[1][0], shapes)
    _headline(figure, f"{subject.crop.capitalize()} yield {year}, unseen in training", subject)
    return _save(figure, out)


def draw_predictions(
    table: geopandas.GeoDataFrame, out: Path, *, year: int, level: float = 0.9, simulated: bool = False
) -> Path:
    """Predicted yield of one season beside half the width of its interval, where no harvest is known yet.

    `table` is what `geo_yield.prediction.predict_yields` writes. Raises InputProblem if it has no polygons of `year`.
    """
    mine = table[table["year"] == year]
    if mine.empty:
        raise InputProblem(f"no predictions of {year} to draw (there are {sorted(set(table['year']))})")
    subject = Subject(crop=mine["crop"].iloc[0], unit=mine["unit"].iloc[0], level=level, simulated=simulated)
    shapes = _projected(mine[["region_id", mine.geometry.name]], mine["region_id"])
    mine = mine.assign(half_width=(mine["upper"] - mine["lower"]) / 2)
    values = _per_region(mine, shapes, ("prediction", "half_width", "spread"))
    margin = float(np.nanmedian(values["half_width"]))
    panels = (
        ("prediction", "predicted yield", _YIELDS, f"yield ({subject.unit})"),
        ("spread", "spread of the ensemble", _SURE, f"standard deviation ({subject.unit})"),
    )
    figure, axes = _map_grid(shapes, 1)
    for panel, (column, title, colours, label) in zip(axes[0], panels, strict=True):
        limits = (float(np.nanmin(values[column])), float(np.nanmax(values[column])))
        _draw_regions(panel, shapes, values[column], colours, limits, title)
        _colour_bar(figure, [panel], colours, limits, label)
    _scale_bar(axes[0][0], shapes)
    interval = (
        f"{level:.0%} interval: prediction ± {margin:.1f} {subject.unit}" if np.isfinite(margin) else "no interval"
    )
    _headline(figure, f"{subject.crop.capitalize()} yield {year}: {interval}", subject)
    return _save(figure, out)


def draw_skill(rows: pd.DataFrame, subject: Subject, out: Path) -> Path:
    """Predicted against observed with intervals, and the RMSE of every method, pooled and by season. Returns `out`."""
    figure = Figure(figsize=(12.5, 5.6), dpi=150, layout="constrained")
    scatter, bars = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _scatter(scatter, rows, subject)
    _bars(bars, rows, subject)
    years = _span(rows["year"])
    _headline(figure, f"{subject.crop.capitalize()} yield {years}: how far off is each method?", subject)
    return _save(figure, out)


def write_report(
    rows: pd.DataFrame,
    subject: Subject,
    out: Path,
    *,
    regions: geopandas.GeoDataFrame | None = None,
    done: Sequence[str] = (),
    settings: Mapping[str, object] | None = None,
    seen: pd.DataFrame | None = None,
) -> Path:
    """Write skill.png, map.png (if `regions` are given) and report.md into folder `out`; returns the path of report.md.

    `done` says in sentences what was done; `settings` (JSON values) is put under provenance; `seen` has columns
    region_id, valid_fraction and missing_share for the list of regions that were seen worst.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictures = [draw_skill(rows, subject, out / "skill.png")]
    if regions is not None:
        latest = int(rows["year"].max())
        pictures.insert(0, draw_map(rows, regions, subject, out / "map.png", year=latest))
    sections = [
        _opening(rows, subject),
        "\n\n".join(f"![{_CAPTIONS[picture.name]}]({picture.name})" for picture in pictures),
        _what_was_done(done),
        "## Figures\n\n" + _explanation(subject) + "\n\n" + _table(_pooled(rows), subject),
        "### By season\n\n" + _by_year(rows, subject),
        _worst_seen(seen),
        _provenance(settings or {}),
    ]
    return _write_text(out / "report.md", "\n\n".join(section for section in sections if section) + "\n")


def skill_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Pooled figures of every method, best first: method, n, rmse, mae, r2, me, coverage, width (see `summarise`)."""
    return _pooled(rows)[["method", "n", "rmse", "mae", "r2", "me", "coverage", "width"]]


_CAPTIONS = {
    "map.png": "Map: predicted and observed yield, errors of the method and of the reference",
    "skill.png": "Predicted against observed yield, and RMSE of every method",
}


def _of(rows: pd.DataFrame, method: str, year: int | None = None) -> pd.DataFrame:
    mine = rows[rows["method"] == method]
    if mine.empty:
        raise InputProblem(f"no rows of method '{method}'; there are {sorted(rows['method'].unique())}")
    if year is None:
        return mine
    if mine[mine["year"] == year].empty:
        raise InputProblem(f"no rows of {year} by '{method}'; there are {sorted(set(mine['year'].tolist()))}")
    return mine[mine["year"] == year]


def _projected(regions: geopandas.GeoDataFrame, wanted: pd.Series) -> geopandas.GeoDataFrame:
    """The wanted regions in an equal-area projection around their middle, so that the map keeps their shape."""
    shown = regions[regions["region_id"].isin(set(wanted))]
    if shown.empty:
        raise InputProblem(f"none of the {wanted.nunique()} predicted regions (e.g. '{wanted.iloc[0]}') has a polygon")
    shown = shown.to_crs(4326)
    west, south, east, north = shown.total_bounds
    centred = f"+proj=laea +lat_0={(south + north) / 2:.4f} +lon_0={(west + east) / 2:.4f} +units=m"
    return shown.to_crs(centred).reset_index(drop=True)


def _per_region(
    mine: pd.DataFrame, shapes: geopandas.GeoDataFrame, columns: Sequence[str]
) -> dict[str, Float64[np.ndarray, "N"]]:
    """Columns of `mine` in the order of `shapes`; NaN where a region has no row."""
    indexed = pd.DataFrame(mine).set_index("region_id")
    return {column: indexed[column].reindex(shapes["region_id"]).to_numpy(np.float64) for column in columns}


def _map_grid(shapes: geopandas.GeoDataFrame, rows: int) -> tuple[Figure, list[list[Axes]]]:
    """A figure whose panels have the regions' own proportions, so that no white is left over."""
    west, south, east, north = shapes.total_bounds
    tall = float(np.clip((north - south) / (east - west), 0.3, 1.6))
    width = 4.8
    figure = Figure(figsize=(2 * width + 1.6, rows * (width * tall + 0.45) + 0.8), dpi=150, layout="constrained")
    return figure, figure.subplots(rows, 2, squeeze=False).tolist()


def _draw_regions(
    panel: Axes,
    shapes: geopandas.GeoDataFrame,
    values: Float64[np.ndarray, "N"],
    colours: str,
    limits: tuple[float, float],
    title: str,
) -> None:
    missing = {"color": "#e4e4e4", "hatch": "////", "edgecolor": "#b0b0b0"}
    shapes.assign(shown=values).plot(
        "shown",
        ax=panel,
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        edgecolor=_INK,
        linewidth=0.45,
        missing_kwds=missing,
    )
    west, south, east, north = shapes.total_bounds
    panel.set_xlim(west - 0.02 * (east - west), east + 0.02 * (east - west))
    panel.set_ylim(south - 0.09 * (north - south), north + 0.02 * (north - south))
    panel.set_axis_off()
    panel.set_title(title, fontsize=11, color=_INK, loc="left")


def _colour_bar(figure: Figure, panels: Sequence[Axes], colours: str, limits: tuple[float, float], label: str) -> None:
    mapped = ScalarMappable(Normalize(*limits), colours)
    bar = figure.colorbar(mapped, ax=list(panels), shrink=0.85, pad=0.015, aspect=22)
    bar.set_label(label, fontsize=10)
    bar.outline.set_visible(False)


def _scale_bar(panel: Axes, shapes: geopandas.GeoDataFrame) -> None:
    """A bar of a round number of kilometres under the regions, and which way is north."""
    west, south, east, north = shapes.total_bounds
    rounded = 10.0 ** np.floor(np.log10((east - west) / 4))
    length = max(step * rounded for step in (1, 2, 5) if step * rounded <= (east - west) / 4)
    base = south - 0.05 * (north - south)
    panel.plot([west, west + length], [base, base], color=_INK, linewidth=2, solid_capstyle="butt")
    label = f" {length / 1000:g} km, north is up"
    panel.text(west + length, base, label, va="center", ha="left", fontsize=9, color=_MUTED)


def _scatter(panel: Axes, rows: pd.DataFrame, subject: Subject) -> None:
    mine, other = _of(rows, subject.method), _of(rows, subject.reference)
    shown = pd.concat([mine[["truth", "prediction", "lower", "upper"]], other[["truth", "prediction"]]]).to_numpy()
    low, high = np.min(shown[np.isfinite(shown)]), np.max(shown[np.isfinite(shown)])
    margin = 0.03 * (high - low)
    limits = (low - margin, high + margin)
    panel.plot(limits, limits, color=_INK, linewidth=1, linestyle="--", zorder=1)
    panel.text(limits[1] - margin, limits[1] - margin, "1:1 ", ha="right", va="bottom", fontsize=9, color=_INK)
    panel.scatter(other["truth"], other["prediction"], s=16, color=_OTHER, alpha=0.8, label=subject.reference, zorder=2)
    bounded = mine[np.isfinite(mine["lower"]) & np.isfinite(mine["upper"])]
    if len(bounded):
        inside = ((bounded["lower"] <= bounded["truth"]) & (bounded["truth"] <= bounded["upper"])).mean()
        label = f"{subject.level:.0%} interval, holds {inside:.0%} of the observed"
        panel.vlines(bounded["truth"], bounded["lower"], bounded["upper"], _ACCENT, alpha=0.25, lw=1.2, label=label)
    panel.scatter(mine["truth"], mine["prediction"], s=24, color=_ACCENT, label=subject.method, zorder=3)
    panel.set(xlim=limits, ylim=limits, aspect="equal")
    panel.set_xlabel(f"observed yield ({subject.unit})")
    panel.set_ylabel(f"predicted yield ({subject.unit})")
    panel.legend(loc="upper left", frameon=False, fontsize=9)
    _bare(panel)


def _bars(panel: Axes, rows: pd.DataFrame, subject: Subject) -> None:
    """RMSE of every method: a bar for everything pooled, whiskers for other counties, a dot for every season."""
    pooled = _pooled(rows)[::-1].reset_index(drop=True)
    colours = {subject.method: _ACCENT, subject.reference: _OTHER}
    places = range(len(pooled))
    shades = [colours.get(name, "#c9ced6") for name in pooled["method"]]
    panel.barh(places, pooled["rmse"], color=shades, height=0.7)
    for place, method, off in zip(places, pooled["method"], pooled["rmse"], strict=True):
        low, high = bootstrap_rmse(rows, method, draws=_DRAWS)
        panel.plot([low, high], [place, place], color=_INK, linewidth=1.2)
        weight = "bold" if method == subject.method else "normal"
        panel.text(max(high, off), place, f"  {off:.1f}", va="center", fontsize=10, weight=weight)
    seasons = sorted(set(rows["year"].tolist()))
    if len(seasons) > 1:
        _season_dots(panel, rows, pooled, seasons)
    panel.set_yticks(np.arange(len(pooled)), pooled["method"].tolist())
    panel.set_xlabel(f"RMSE ({subject.unit}), lower is better; line: 95 % over other regions")
    panel.set_xlim(0, panel.get_xlim()[1] * 1.08)
    _bare(panel)
    panel.tick_params(axis="y", length=0)


def _season_dots(panel: Axes, rows: pd.DataFrame, pooled: pd.DataFrame, seasons: Sequence[int]) -> None:
    by_year = summarise(rows).set_index(["method", "year"])["rmse"]
    shades = ("#08306b", "#4292c6", "#c6dbef", "#fdae6b", "#d94801", "#7f2704")
    for index, season in enumerate(seasons):
        shade = shades[index * (len(shades) - 1) // max(len(seasons) - 1, 1)]
        errors = [by_year.get((method, str(season)), np.nan) for method in pooled["method"]]
        panel.scatter(
            errors, pooled.index - 0.2, s=16, color=shade, edgecolor="white", lw=0.4, label=str(season), zorder=4
        )
    panel.legend(title="season", loc="upper right", frameon=False, fontsize=9, title_fontsize=9)


def _bare(panel: Axes) -> None:
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _headline(figure: Figure, text: str, subject: Subject) -> None:
    note = "  ·  simulated data" if subject.simulated else ""
    figure.suptitle(f"{text}{note}", fontsize=14, color=_INK, x=0.012, ha="left", weight="bold")


def _pooled(rows: pd.DataFrame) -> pd.DataFrame:
    if rows["protocol"].nunique() != 1:
        raise InputProblem(f"a report is about one protocol, got rows of {sorted(rows['protocol'].unique())}")
    figures = summarise(rows)
    return figures[figures["year"] == "all"].sort_values("rmse", ignore_index=True)


def _opening(rows: pd.DataFrame, subject: Subject) -> str:
    compared = paired_bootstrap(rows, subject.method, subject.reference, draws=_DRAWS)
    mine, other = _of(rows, subject.method), _of(rows, subject.reference)
    off, usual = (rmse(part["truth"].to_numpy(), part["prediction"].to_numpy()) for part in (mine, other))
    best = _pooled(rows)["method"].iloc[0]
    lines = [
        f"# {subject.crop.capitalize()} yield {_span(rows['year'])}"
        + (": simulated data" if subject.simulated else ""),
        f"{subject.method} is off by {off:.2f} {subject.unit} (RMSE, {len(mine)} region-seasons, "
        f"{rows['protocol'].iloc[0].replace('-', ' ')}); {subject.reference} by {usual:.2f}. "
        f"The difference is {compared.difference:+.2f} {subject.unit} (95 % from {compared.lower:+.2f} to "
        f"{compared.upper:+.2f}, redrawing regions).",
        f"Lowest RMSE of all methods: **{best}**.",
    ]
    if subject.simulated:
        lines.append(
            "Imagery, weather and yields are **simulated**: these figures show that the program works, not how well it "
            "predicts real harvests."
        )
    return "\n\n".join(lines)


def _what_was_done(done: Sequence[str]) -> str:
    return (
        "## What was done\n\n" + "\n".join(f"{number}. {step}" for number, step in enumerate(done, 1)) if done else ""
    )


def _explanation(subject: Subject) -> str:
    return (
        f"RMSE, MAE, ME and width in {subject.unit}. ME is the mean of observed minus predicted: above 0, predictions "
        "are too low. R2 is 1 - SSE/SST on the rows tested, so the mean of the training years can fall below 0. "
        f"Coverage is the share of observed yields inside the interval, which is meant to hold {subject.level:.0%}; "
        "width is the interval's mean width. No method saw a yield of the rows it is tested on."
    )


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("n", "n", lambda value: f"{value:.0f}"),
    ("rmse", "RMSE", lambda value: f"{value:.2f}"),
    ("mae", "MAE", lambda value: f"{value:.2f}"),
    ("r2", "R2", lambda value: f"{value:.2f}"),
    ("me", "ME", lambda value: f"{value:+.2f}"),
    ("coverage", "coverage", lambda value: "-" if np.isnan(value) else f"{value:.0%}"),
    ("width", "width", lambda value: "-" if not np.isfinite(value) else f"{value:.1f}"),
)


def _table(figures: pd.DataFrame, subject: Subject) -> str:
    names = [
        f"{title} ({subject.unit})" if title in ("RMSE", "MAE", "ME", "width") else title for _, title, _ in _COLUMNS
    ]
    rows = [
        [_strong(row["method"], subject), *(show(row[column]) for column, _, show in _COLUMNS)]
        for _, row in figures.iterrows()
    ]
    return _markdown(["method", *names], rows)


def _by_year(rows: pd.DataFrame, subject: Subject) -> str:
    """RMSE of every method (down) in every season (across)."""
    figures = summarise(rows)
    figures = figures[figures["year"] != "all"]
    wide = figures.pivot(index="method", columns="year", values="rmse").reindex(_pooled(rows)["method"])
    body = [[_strong(str(method), subject), *(f"{value:.2f}" for value in wide.loc[method])] for method in wide.index]
    return _markdown([f"RMSE ({subject.unit})", *map(str, wide.columns)], body)


def _strong(method: str, subject: Subject) -> str:
    return f"**{method}**" if method == subject.method else method


def _worst_seen(seen: pd.DataFrame | None) -> str:
    if seen is None or seen.empty:
        return ""
    per_region = seen.groupby("region_id")[["valid_fraction", "missing_share"]].mean()
    worst = per_region.sort_values("valid_fraction").head(_ROWS_OF_REGIONS)
    body = [
        [str(region), f"{row['valid_fraction']:.0%}", f"{row['missing_share']:.0%}"] for region, row in worst.iterrows()
    ]
    heading = (
        f"## Regions that were seen worst\n\nOf {len(per_region)} regions, mean over all seasons: share of pixels x "
        "composites that were valid, and share of (band, composite) cells without any valid pixel."
    )
    return heading + "\n\n" + _markdown(["region", "valid pixels", "empty cells"], body)


def _provenance(settings: Mapping[str, object]) -> str:
    versions = {"python": python_version()} | {name: _version(name) for name in PACKAGES}
    text = json.dumps({"versions": versions, **settings}, indent=2, default=str)
    return f"## Provenance\n\n```json\n{text}\n```"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *body))


def _span(years: pd.Series) -> str:
    first, last = int(years.min()), int(years.max())
    return str(first) if first == last else f"{first}-{last}"


def _save(figure: Figure, out: Path) -> Path:
    with whole_file(out) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})  # no version inside: same rows, same bytes
    return out


def _write_text(out: Path, text: str) -> Path:
    with whole_file(out) as partial:
        partial.write_text(text)
    return out
