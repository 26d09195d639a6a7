"""Proof on real Sentinel-2 data: composites and parcel means of a 1 x 1 km farmland patch in Slovenia, 2015-2017.

Compares our composites with the reference answers that come with the patch, draws what masking and compositing do to
the NDVI curves of parcels, and writes slovenia.json and slovenia.png beside this file.
Data: eo-learn's example patch (sentinel-hub/eo-learn, MIT; contains modified Copernicus Sentinel data 2015-2017).

    python proofs/slovenia.py FOLDER_OF_THE_PATCH
"""

import json
import sys
from datetime import date, datetime
from pathlib import Path

import geopandas as gpd
import matplotlib
import numpy as np
from affine import Affine
from pyproj import CRS

from geo_yield.composites import MONTH_STARTS, composite, region_series, zonal_mean
from geo_yield.regions import rasterise
from geo_yield.scenes import Grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.dates import DateFormatter

HERE = Path(__file__).parent
YEARS = (2016, 2017)
MIN_PIXELS = 12
"""Parcels with fewer pixels inside the patch are not drawn."""


def load(folder: Path, name: str) -> np.ndarray:
    return np.load(folder / f"{name}.npy")[..., 0]


def patch_grid(folder: Path, height: int, width: int) -> Grid:
    corners = np.array(json.loads((folder / "bbox.geojson").read_text())["coordinates"][0])
    (left, bottom), (right, top) = corners.min(axis=0), corners.max(axis=0)
    place = Affine((right - left) / width, 0, left, 0, (bottom - top) / height, top)
    return Grid(crs=CRS.from_epsg(32633), transform=place, height=height, width=width)


def read_parcels(folder: Path) -> gpd.GeoDataFrame:
    parcels = gpd.read_file(folder / "vector_timeless_LULC.gpkg")
    parcels["region_id"] = parcels["index"].astype(str)
    return parcels


def compare(folder: Path, ndvi: np.ndarray, valid: np.ndarray, labels: np.ndarray, parcels: gpd.GeoDataFrame) -> dict:
    """Our answers against those stored with the patch."""
    everything = composite(ndvi[:, None], np.ones_like(valid), method="max-ndvi")
    seen = composite(ndvi[:, None], valid, method="median")
    reference = load(folder, "mask_timeless_LULC")
    ours = np.concatenate([[0], parcels["LULC_ID"].to_numpy(dtype=int)])[labels]
    inside = (labels > 0) & (reference > 0)
    return {
        "max_ndvi_differs_at_pixels": int(
            (everything.values[0] != load(folder, "data_timeless_MAX_NDVI").astype("f4")).sum()
        ),
        "valid_count_differs_at_pixels": int((seen.count != load(folder, "mask_timeless_VALID_COUNT")).sum()),
        "pixels": int(labels.size),
        "parcels": len(parcels),
        "parcels_with_a_pixel": len(np.unique(labels[labels > 0])),
        "land_use_agrees_share": round(float((ours == reference)[inside].mean()), 4),
        "land_use_compared_pixels": int(inside.sum()),
    }


def curves(
    ndvi: np.ndarray, valid: np.ndarray, labels: np.ndarray, parcels: gpd.GeoDataFrame, dates: list[date]
) -> dict:
    """Parcel means per look without and with the mask (NaN below half of the parcel), and of monthly composites."""
    pixels = np.bincount(labels.ravel(), minlength=len(parcels) + 1)[1:]
    raw, masked = [], []
    for look, clear in zip(ndvi, valid, strict=True):
        raw.append(zonal_mean(look[None], np.ones_like(clear), labels, regions=len(parcels))[0][:, 0])
        means, count = zonal_mean(look[None], clear, labels, regions=len(parcels))
        masked.append(np.where(count * 2 >= np.maximum(pixels, 1), means[:, 0], np.nan))
    options = {"bands": ("NDVI",), "doy": MONTH_STARTS, "years": YEARS}
    monthly = {
        method: region_series(ndvi[:, None], valid, dates, labels, parcels, method=method, **options)
        .values[:, 0]
        .reshape(len(YEARS), len(parcels), len(MONTH_STARTS))
        for method in ("median", "max-ndvi")
    }
    return {"raw": np.array(raw), "masked": np.array(masked), "pixels": pixels, **monthly}


def roughness(series: np.ndarray) -> float:
    """Median over parcels of the mean step between successive values, gaps skipped: clouds make it large."""
    steps = [np.abs(np.diff(one[np.isfinite(one)])).mean() for one in series.T if np.isfinite(one).sum() > 5]
    return round(float(np.median(steps)), 4)


def summary(found: dict) -> dict:
    big = found["pixels"] >= MIN_PIXELS
    joined = {m: np.concatenate(list(found[m]), axis=1).T[:, big] for m in ("median", "max-ndvi")}
    return {
        "parcels_drawn_from": int(big.sum()),
        "mean_step_of_ndvi_unmasked": roughness(found["raw"][:, big]),
        "mean_step_of_ndvi_masked": roughness(found["masked"][:, big]),
        "mean_step_of_ndvi_monthly_median": roughness(joined["median"]),
        "months_without_a_clear_look_share": round(float(np.isnan(joined["median"]).mean()), 4),
        "looks_below_ndvi_0.2_unmasked_share": round(float((found["raw"][:, big] < 0.2).mean()), 4),
        "looks_below_ndvi_0.2_masked_share": round(
            float((found["masked"][:, big] < 0.2).sum() / np.isfinite(found["masked"][:, big]).sum()), 4
        ),
    }


def draw(
    found: dict, parcels: gpd.GeoDataFrame, grid: Grid, labels: np.ndarray, dates: list[date], top: np.ndarray
) -> None:
    figure, axes = plt.subplot_mosaic([["a", "m"], ["b", "m"], ["c", "m"]], figsize=(11, 6.2), width_ratios=(1.7, 1))
    months = [date(year, month + 1, 15) for year in YEARS for month in range(12)]
    classes = parcels.loc[found["pixels"] >= MIN_PIXELS, "LULC_NAME"].value_counts().index[:3]
    for key, name in zip("abc", classes, strict=True):
        here = parcels.index[(parcels["LULC_NAME"] == name)]
        parcel = here[np.argmax(found["pixels"][here])]
        axis = axes[key]
        axis.plot(dates, found["raw"][:, parcel], ".-", color="0.75", lw=0.8, ms=3, label="every look")
        axis.plot(dates, found["masked"][:, parcel], "o", color="tab:green", ms=3, label="clear looks")
        for method, color in (("median", "tab:blue"), ("max-ndvi", "tab:orange")):
            values = np.concatenate(list(found[method]), axis=1)[parcel]
            axis.plot(months, values, ".-", color=color, lw=1.4, ms=4, label=f"monthly {method}")
        axis.set_title(f"{name}, parcel of {found['pixels'][parcel]} pixels", fontsize=9, loc="left")
        axis.set(ylim=(-0.3, 1), ylabel="NDVI", xticks=[date(y, m, 1) for y in (2016, 2017) for m in (1, 7)])
        axis.xaxis.set_major_formatter(DateFormatter("%b %Y"))
    axes["a"].legend(fontsize=7, ncols=4, loc="lower right")
    means, _ = zonal_mean(top[None], np.ones(labels.shape, dtype=bool), labels, regions=len(parcels))
    coloured = parcels.assign(top=means[:, 0])
    west, north = grid.transform.c, grid.transform.f
    coloured.plot("top", ax=axes["m"], cmap="YlGn", edgecolor="0.3", lw=0.3, legend=True, missing_kwds={"color": "0.9"})
    axes["m"].set(
        xlim=(west, west + grid.transform.a * grid.width), ylim=(north + grid.transform.e * grid.height, north)
    )
    axes["m"].set_title("highest clear NDVI, mean per parcel", fontsize=9)
    axes["m"].set(xticks=[], yticks=[], xlabel="1.0 km", ylabel="1.0 km")
    figure.tight_layout()
    figure.savefig(HERE / "slovenia.png", dpi=95)


def main(folder: Path) -> None:
    ndvi, valid = load(folder, "data_NDVI"), load(folder, "mask_IS_VALID")
    dates = [datetime.fromisoformat(text).date() for text in json.loads((folder / "timestamps.json").read_text())]
    parcels, grid = read_parcels(folder), patch_grid(folder, *ndvi.shape[1:])
    labels = rasterise(parcels, grid)
    found = curves(ndvi, valid, labels, parcels, dates)
    results = compare(folder, ndvi, valid, labels, parcels) | {"looks": len(dates)} | summary(found)
    (HERE / "slovenia.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(found, parcels, grid, labels, dates, composite(ndvi[:, None], valid, method="max-ndvi").values[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
