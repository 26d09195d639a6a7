"""Preparing one MODIS tile and date: each file read once for all regions, against a window read per region.

Labels are made before the clock, as they serve all dates of a tile; both read deflated GeoTIFFs without QA.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import geopandas
import numpy as np
import rasterio
import shapely
from rasterio.features import geometry_mask, geometry_window

from geo_yield.modis import ModisScene, decode_reflectance, decode_temperature, modis_layout, modis_scenes, tile_grid
from geo_yield.prepare import Unit, count_unit
from geo_yield.scenes import Grid

CLAIM = "Counting a tile and date costs the same for 100 regions and for 3,136; a window per region costs ever more."
SWEEP = {"side": (240, 2400), "regions": (100, 900, 3136)}
ROUNDS = 3  # a turn of the largest takes ten seconds
BASELINE = "a window per region"
TARGET = 4
TARGET_AT = {"side": (2400,), "regions": (3136,)}
DEVICES = ("cpu",)
LAYOUT = modis_layout(qa="none", mask="none")
STEM = "A2015049.h11v04.061.2021323021553"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    scene: ModisScene
    grid: Grid
    regions: geopandas.GeoDataFrame
    folder: Path
    owner: tempfile.TemporaryDirectory
    """Removes the files with the inputs."""


def make(side: int, regions: int) -> Inputs:
    """Nine bands of a tile as tiled GeoTIFFs, and wavy regions that fill it."""
    owner = tempfile.TemporaryDirectory(prefix="prepare-")
    folder = Path(owner.name)
    rng = np.random.default_rng(0)
    base = rng.normal(2500, 600, (side, side))
    for band in range(1, 8):
        pixels = (base + 40 * band).clip(100, 16000).astype(np.int16)
        _write(folder / f"MOD09A1.{STEM}_sur_refl_b{band:02d}.tif", pixels)
    for layer in ("LST_Day_1km", "LST_Night_1km"):
        _write(folder / f"MYD11A2.{STEM}_{layer}.tif", rng.normal(14500, 300, (side // 2, side // 2)).astype(np.uint16))
    grid = tile_grid("h11v04", pixels=side)
    frame = _regions(grid, round(regions**0.5))
    (folder / "units").mkdir()
    frame.to_parquet(folder / "units" / "regions.parquet")
    return Inputs(scene=modis_scenes(folder)[0], grid=grid, regions=frame, folder=folder / "units", owner=owner)


def _write(path: Path, pixels: np.ndarray) -> None:
    height, width = pixels.shape
    grid = tile_grid("h11v04", pixels=height)
    profile = {"driver": "GTiff", "count": 1, "height": height, "width": width, "compress": "deflate", "tiled": True}
    with rasterio.open(path, "w", dtype=pixels.dtype, crs=grid.crs, transform=grid.transform, **profile) as file:
        file.write(pixels, 1)


def _regions(grid: Grid, across: int) -> geopandas.GeoDataFrame:
    """across x across cells between meridian-like waves; neighbours share their borders vertex by vertex."""
    size = grid.width * grid.transform.a / across
    y = np.linspace(0, 1, 41) * size
    shapes = []
    for row in range(across):
        down = row * size + y
        shift = 0.1 * size * np.sin(2 * np.pi * down / size * 1.3)
        for column in range(across):
            left = np.column_stack([column * size + shift * (column > 0), down])
            right = np.column_stack([(column + 1) * size + shift * (column < across - 1), down])
            ring = np.concatenate([left, right[::-1]])
            shapes.append(
                shapely.Polygon(np.column_stack([grid.transform.c + ring[:, 0], grid.transform.f - ring[:, 1]]))
            )
    ids = [f"{number:05d}" for number in range(len(shapes))]
    return geopandas.GeoDataFrame({"region_id": ids}, geometry=shapes, crs=grid.crs)


def ours(inputs: Inputs) -> np.ndarray:
    unit = Unit(scene=inputs.scene, layout=LAYOUT, folder=inputs.folder, regions="benchmark")
    return np.load(inputs.folder / f"{count_unit(unit)}.npy")[:, 2:].reshape(len(inputs.regions), 9, 32)


def window_per_region(inputs: Inputs) -> np.ndarray:
    """As the pipelines do that export one image per county, without the export."""
    files = [*(path for _, s in inputs.scene.reflectance.layers for path in s.paths)]
    heat = [*(path for _, s in inputs.scene.temperature.layers for path in s.paths)]
    opened = [rasterio.open(path) for path in files + heat]
    counts = np.zeros((len(inputs.regions), 9, 32), dtype=np.int64)
    for number, shape in enumerate(inputs.regions.geometry):
        window = geometry_window(opened[0], [shape]).intersection(
            rasterio.windows.Window(0, 0, opened[0].width, opened[0].height)
        )
        place = opened[0].window_transform(window)
        inside = geometry_mask([shape], (window.height, window.width), place, invert=True)
        rows, columns = (
            np.arange(start, start + size)
            for start, size in ((window.row_off, window.height), (window.col_off, window.width))
        )
        for band, file in enumerate(opened):
            if band < 7:
                pixels = decode_reflectance(file.read(1, window=window))
            else:
                top, left = rows[0] // 2, columns[0] // 2
                coarse = rasterio.windows.Window(left, top, columns[-1] // 2 - left + 1, rows[-1] // 2 - top + 1)
                stored = decode_temperature(file.read(1, window=coarse))
                pixels = stored[(rows // 2 - top)[:, None], (columns // 2 - left)[None, :]]
            counts[number, band] = np.histogram(pixels[inside], LAYOUT.edges[band])[0]
    for file in opened:
        file.close()
    return counts


RIVALS = {"a window per region": window_per_region, "ours": ours}


def check(out):
    assert out["ours"].sum() > 0
    assert np.array_equal(out["ours"], out["a window per region"])


def work(inputs):
    return 9 * inputs.grid.height * inputs.grid.width, "values"
