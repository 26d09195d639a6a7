"""MODIS to histograms: MOD09A1 reflectance, MYD11A2 land surface temperature, MCD12Q1 cropland, on the 500 m grid.

The input of You et al., "Deep Gaussian Process for Crop Yield Prediction Based on Remote Sensing Data", AAAI 2017, and
of DFYP (arXiv:2507.05849): nine bands, the 32 composites that start on day 49, 57, ..., 297, histograms of 32 bins with
edges linspace(1, 4999, 33) on the stored integers. Reflectance (1e-4) is clipped to [100, 16000]; temperature (0.02 K)
enters as DN - 11500 in uint16, so that fill and whatever is colder than 230 K wrap far above the last edge.

Decisions:
- `qa="none"` is the published treatment: only fill is dropped. `qa="default"` also drops cloud, cloud shadow, snow and
  everything but land (bits of sur_refl_state_500m), bands whose own quality says that they are no retrieval (bits of
  sur_refl_qc_500m; interpolated and noisy detectors stay, or band 5 would be full of stripes), and temperatures that
  are neither good nor "other quality" (bits 0-1 of QC_Day and QC_Night).
- Temperature pixels (1 km) are doubled to the 500 m grid: each 500 m pixel takes the 1 km pixel that holds its centre.
- Land cover is that of the same year; without one that of the nearest earlier year, else of the nearest later one.
- A composite that lacks one of the two products is kept, with the bands of that product invalid.

Shapes: C bands of the layout, H rows and W columns of the 500 m grid.
"""

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas
import numpy as np
import shapely
from affine import Affine
from jaxtyping import Bool, Shaped, UInt8, UInt16, UInt32
from pyproj import CRS

from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramLayout
from geo_yield.modis_files import Composite, describe, find_composites, resample, sinusoidal
from geo_yield.regions import project_densely
from geo_yield.scenes import Grid, Pixels

MODIS_BANDS = (*(f"b{number:02d}" for number in range(1, 8)), "lst_day", "lst_night")
MODIS_SEASON = tuple(range(49, 298, 8))
"""First days of the 32 composites, as published."""
TILE_SIZE = 1111950.519667
"""Side of a tile in metres; 18 of them are half of the equator of the sphere with radius 6371007.181 m."""

_REFLECTANCE_LIMITS = (100, 16000)
_TEMPERATURE_SHIFT = 11500
_TEMPERATURE_LAYERS = {"lst_day": ("LST_Day_1km", "QC_Day"), "lst_night": ("LST_Night_1km", "QC_Night")}
_USABLE_QUALITY = np.isin(np.arange(16), (0b0000, 0b0111, 0b1000, 0b1100))
"""4-bit quality of a band: best, noisy detector, interpolated detector, climatology used for one constant."""

log = logging.getLogger(__name__)


def modis_layout(*, qa: str = "default", mask: str = "mcd12q1:12") -> HistogramLayout:
    """The published layout. `mask` is "none" or "mcd12q1:" with IGBP classes, e.g. "mcd12q1:12,14".

    Raises InputProblem on another `qa` than "default" and "none", or on a mask that is not so written.
    """
    if qa not in ("default", "none"):
        raise InputProblem(f"qa must be 'default' or 'none', got '{qa}'")
    classes_of(mask)
    edges = tuple(float(edge) for edge in np.linspace(1, 4999, 33))
    return HistogramLayout(
        sensor="modis", bands=MODIS_BANDS, doy=MODIS_SEASON, edges=(edges,) * len(MODIS_BANDS), qa=qa, mask=mask
    )


def classes_of(mask: str) -> tuple[int, ...] | None:
    """IGBP classes that "mcd12q1:12,14" lets count; None for "none"."""
    if mask == "none":
        return None
    found = re.fullmatch(r"mcd12q1:(\d+(?:,\d+)*)", mask)
    classes = tuple(int(number) for number in found[1].split(",")) if found else ()
    if not classes or not all(1 <= number <= 17 for number in classes):
        raise InputProblem(f"mask must be 'none' or like 'mcd12q1:12,14' (IGBP classes 1 to 17), got '{mask}'")
    return classes


MODIS_LAYOUT = modis_layout()


def tile_grid(tile: str, *, pixels: int = 2400) -> Grid:
    """Grid of a full tile like "h11v04": 2400 pixels of 500 m (463.31 m) or 1200 of 1 km per side."""
    found = re.fullmatch(r"h(\d\d)v(\d\d)", tile)
    if not found or int(found[1]) > 35 or int(found[2]) > 17:
        raise InputProblem(f"a MODIS tile is named h00v00 to h35v17, got '{tile}'")
    left, top = (int(found[1]) - 18) * TILE_SIZE, (9 - int(found[2])) * TILE_SIZE
    size = TILE_SIZE / pixels
    return Grid(crs=sinusoidal(), transform=Affine(size, 0, left, 0, -size, top), height=pixels, width=pixels)


def tiles_meeting(regions: geopandas.GeoDataFrame) -> list[str]:
    """Names of the tiles that regions reach into, in order: what to download."""
    shapes = project_densely(regions.geometry.to_numpy(), CRS.from_user_input(regions.crs), sinusoidal())
    shapely.prepare(shapes)
    tiles = set()
    for shape in shapes:
        left, bottom, right, top = np.floor(np.array(shape.bounds) / TILE_SIZE).astype(int)
        for column in range(left, right + 1):
            for row in range(bottom, top + 1):
                if shape.intersects(shapely.box(*(TILE_SIZE * np.array([column, row, column + 1, row + 1])))):
                    tiles.add(f"h{column + 18:02d}v{8 - row:02d}")
    return sorted(tiles)


def modis_scenes(
    inputs: Path | Sequence[Path],
    *,
    years: Iterable[int] | None = None,
    mask: Path | Sequence[Path] | None = None,
    stack_first_year: int | None = None,
) -> list["ModisScene"]:
    """One scene per tile, year and composite of the season, found by file names (see `geo_yield.modis_files`).

    `inputs` is a folder (searched with its subfolders) or files, `mask` the same for MCD12Q1 if that lies elsewhere,
    `stack_first_year` the first year of stacks exported from Earth Engine. Composites outside the season are left out;
    those without one of the two products are logged. Raises InputProblem if there is no MOD09A1 at all, or none of one
    of `years`.
    """
    composites = find_composites(inputs, first_year=stack_first_year)
    land_cover = [c for c in composites if c.product == "MCD12Q1"]
    if mask is not None:
        land_cover = [c for c in find_composites(mask, first_year=stack_first_year) if c.product == "MCD12Q1"]
        if not land_cover:
            raise InputProblem(f"no MCD12Q1 land cover in {describe(mask)}")
    wanted = None if years is None else sorted(set(years))
    _refuse_missing_years(composites, wanted, inputs)
    by_place: dict[tuple[str, int, int], dict[str, Composite]] = defaultdict(dict)
    for c in composites:
        if c.product != "MCD12Q1" and c.doy in MODIS_SEASON and (wanted is None or c.year in wanted):
            by_place[c.tile, c.year, c.doy][c.product] = c
    scenes = [
        ModisScene(
            tile=tile,
            year=year,
            doy=doy,
            reflectance=found.get("MOD09A1"),
            temperature=found.get("MYD11A2"),
            land_cover=_land_cover_of(tile, year, land_cover),
        )
        for (tile, year, doy), found in sorted(by_place.items())
    ]
    _log_incomplete(scenes)
    return scenes


def _refuse_missing_years(composites: list[Composite], wanted: list[int] | None, inputs: Path | Sequence[Path]) -> None:
    found = sorted({c.year for c in composites if c.product == "MOD09A1" and c.doy in MODIS_SEASON})
    if not found:
        products = ", ".join(sorted({c.product for c in composites}))
        raise InputProblem(
            f"no MOD09A1 image of days {MODIS_SEASON[0]}-{MODIS_SEASON[-1]} in {describe(inputs)} ({products})"
        )
    for year in wanted or []:
        if year not in found:
            spans = f"{found[0]}-{found[-1]}" if len(found) > 1 else str(found[0])
            gaps = sorted(set(range(found[0], found[-1])) - set(found))
            without = f" without {', '.join(map(str, gaps))}" if gaps else ""
            raise InputProblem(f"no MOD09A1 image of {year} in {describe(inputs)} (found {spans}{without})")


def _land_cover_of(tile: str, year: int, land_cover: list[Composite]) -> Composite | None:
    here = [c for c in land_cover if c.tile == tile]
    earlier = [c for c in here if c.year <= year]
    return max(earlier, key=lambda c: c.year) if earlier else min(here, key=lambda c: c.year, default=None)


def _log_incomplete(scenes: list["ModisScene"]) -> None:
    for product, count in (
        ("MOD09A1", sum(scene.reflectance is None for scene in scenes)),
        ("MYD11A2", sum(scene.temperature is None for scene in scenes)),
    ):
        if count:
            log.warning("%d of %d composites have no %s; its bands are missing there", count, len(scenes), product)
    aged = {(s.land_cover.year, s.year) for s in scenes if s.land_cover and s.land_cover.year != s.year}
    for cover, year in sorted(aged):
        log.info("land cover of %d stands in for %d", cover, year)


@dataclass(frozen=True, kw_only=True)
class ModisScene:
    """A `Scene`: MOD09A1 and MYD11A2 of one tile and composite, and the land cover that masks them."""

    tile: str
    year: int
    doy: int
    """First day of the composite, one of `MODIS_SEASON`."""
    reflectance: Composite | None
    temperature: Composite | None
    land_cover: Composite | None

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        return tuple(path for composite in self._composites for path in composite.paths)

    @property
    def versions(self) -> tuple[str, ...]:
        """Products and versions, e.g. ("MOD09A1.061", "MYD11A2.061")."""
        return tuple(f"{composite.product}.{composite.version}" for composite in self._composites)

    @property
    def key(self) -> str:
        """Place, date, and a digest of the file names: a reprocessed or added file makes another unit of work."""
        digest = hashlib.sha256("|".join(path.name for path in self.files).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9_-]', '_', self.tile)}-{self.year}-{self.doy:03d}-{digest}"

    @property
    def step(self) -> int:
        return MODIS_SEASON.index(self.doy)

    @property
    def grid_key(self) -> Hashable:
        return "modis", self.tile

    @property
    def _composites(self) -> list[Composite]:
        return [c for c in (self.reflectance, self.temperature, self.land_cover) if c is not None]

    def grid(self) -> Grid:
        """The 500 m grid, from the georeference of the files."""
        if self.reflectance is not None:
            return self.reflectance.grid()
        coarse = self._composites[0].grid()
        a, _, c, _, e, f = tuple(coarse.transform)[:6]
        finer = Affine(a / 2, 0, c, 0, e / 2, f)
        return Grid(crs=coarse.crs, transform=finer, height=2 * coarse.height, width=2 * coarse.width)

    def read(self, layout: HistogramLayout) -> Pixels:
        """Stored integers of the layout's bands in uint16, masked by its `qa` and `mask`.

        Raises InputProblem if the layout is not MODIS, or a file or layer that it needs is missing or damaged.
        """
        if layout.sensor != "modis" or not set(layout.bands) <= set(MODIS_BANDS):
            raise InputProblem(f"a MODIS scene has bands {', '.join(MODIS_BANDS)}, not {', '.join(layout.bands)}")
        grid = self.grid()
        values = np.zeros((len(layout.bands), grid.height, grid.width), dtype=np.uint16)
        valid = np.zeros(values.shape, dtype=bool)
        for bands, composite, fill_in in (
            (MODIS_BANDS[:7], self.reflectance, _read_reflectance),
            (MODIS_BANDS[7:], self.temperature, _read_temperature),
        ):
            if composite is not None:
                places = {band: place for place, band in enumerate(layout.bands) if band in bands}
                fill_in(composite, places, grid, layout.qa, values, valid)
        return Pixels(values=values, valid=valid, counted=self._counted(layout.mask, grid))

    def _counted(self, mask: str, grid: Grid) -> Bool[np.ndarray, "H W"]:
        classes = classes_of(mask)
        if classes is None:
            return np.ones((grid.height, grid.width), dtype=bool)
        if self.land_cover is None:
            raise InputProblem(
                f"mask '{mask}' needs MCD12Q1 land cover of {self.tile}, and there is none. "
                "Give its folder as the mask, or choose mask 'none' to count all land"
            )
        cover = self.land_cover.read("LC_Type1")
        allowed = np.isin(cover.pixels, classes) & ~cover.missing
        return resample(allowed, cover.grid, grid, outside=False)


def _read_reflectance(
    composite: Composite,
    places: dict[str, int],
    grid: Grid,
    qa: str,
    values: UInt16[np.ndarray, "C H W"],
    valid: Bool[np.ndarray, "C H W"],
) -> None:
    """Write bands b01..b07 into their places of `values` and `valid`."""
    if qa == "default" and places:
        state, quality = composite.read("sur_refl_state_500m"), composite.read("sur_refl_qc_500m")
        usable = clear_land(state.pixels) & ~state.missing & ~quality.missing
    for band, place in places.items():
        layer = composite.read(f"sur_refl_{band}")
        _refuse_other_grid(layer.grid, grid, composite)
        values[place], valid[place] = decode_reflectance(layer.pixels), ~layer.missing
        if qa == "default":
            valid[place] &= usable & _USABLE_QUALITY[band_quality(quality.pixels, int(band[1:]))]
        values[place][layer.missing] = 0


def _refuse_other_grid(found: Grid, grid: Grid, composite: Composite) -> None:
    same_size = (found.height, found.width) == (grid.height, grid.width)
    if not same_size or not found.transform.almost_equals(grid.transform, 1e-3 * abs(grid.transform.a)):
        raise InputProblem(
            f"layers of {composite.product} {composite.tile}, {composite.year} day {composite.doy}, lie on different "
            f"grids ({found.height} x {found.width} and {grid.height} x {grid.width} pixels)"
        )


def _read_temperature(
    composite: Composite,
    places: dict[str, int],
    grid: Grid,
    qa: str,
    values: UInt16[np.ndarray, "C H W"],
    valid: Bool[np.ndarray, "C H W"],
) -> None:
    """Write lst_day and lst_night into their places of `values` and `valid`."""
    for band, place in places.items():
        temperature, flags = _TEMPERATURE_LAYERS[band]
        layer = composite.read(temperature)
        good = ~layer.missing
        if qa == "default":
            good &= usable_temperature(composite.read(flags).pixels)
        values[place] = resample(decode_temperature(layer.pixels), layer.grid, grid, outside=0)
        valid[place] = resample(good, layer.grid, grid, outside=False)


def decode_reflectance(stored: Shaped[np.ndarray, "H W"]) -> UInt16[np.ndarray, "H W"]:
    """sur_refl_b01..07 (scale 1e-4), clipped to [100, 16000] as published."""
    return np.clip(stored, *_REFLECTANCE_LIMITS).astype(np.uint16)


def decode_temperature(stored: UInt16[np.ndarray, "H W"]) -> UInt16[np.ndarray, "H W"]:
    """LST (scale 0.02 K) - 11500 in uint16: what is below 11500, fill (0) included, wraps to 54036 and more."""
    return stored.astype(np.uint16) - np.uint16(_TEMPERATURE_SHIFT)


def clear_land(state: UInt16[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """sur_refl_state_500m: clear or assumed clear, no shadow, land, no cloud by the internal algorithm, no snow."""
    cloud, land = state & 3, (state >> 3) & 7
    flagged = state & ((1 << 2) | (1 << 10) | (1 << 12))
    return ((cloud == 0) | (cloud == 3)) & (land == 1) & (flagged == 0)


def band_quality(quality: UInt32[np.ndarray, "H W"], band: int) -> UInt8[np.ndarray, "H W"]:
    """The four bits of sur_refl_qc_500m that belong to band 1..7; 0 is best."""
    return ((quality >> (2 + 4 * (band - 1))) & 15).astype(np.uint8)


def usable_temperature(flags: UInt8[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """QC_Day or QC_Night: produced, quality good (0) or to be checked (1). Their fill is 0 too: go by that of LST."""
    return (flags & 3) <= 1
