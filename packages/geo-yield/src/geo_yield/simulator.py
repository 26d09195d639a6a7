"""A small farming region that does not exist, with the files that a real one would come with. All of it is simulated.

`simulate` writes what a user of the app has: one GeoTIFF per layer, named, typed, scaled, flagged and projected as LP
DAAC ships MOD09A1, MYD11A2 and MCD12Q1 (collection 061), county polygons, and a table of yields that goes further back
than the imagery. The imagery covers both sides of the border between tiles h10v04 and h11v04, so counties cross it.

Weather, crop and yields come from `geo_yield.crop_model`; every pixel of cropland grows by itself, a county's yield is
the mean of its cropland plus survey noise. Pixels then show the crop as a satellite would see it: each band a mixture
of leaves, dry leaves and soil (darker when wet), the surface the warmer the less it transpires, with haze, clouds (most
of them flagged), snow, gaps and noise on top.
Decided here: the region is only some 50 km wide, yet its weather varies within as it would over a state, since a map
with one colour would show nothing. All cropland grows one crop. Two hot spells: a moderate one among the earlier
seasons of imagery and a stronger one, elsewhere in the region, in the last season.

Shapes: H rows, W columns of 500 m pixels over both windows; P, Q rows and columns of one window.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import shapely
from affine import Affine
from jaxtyping import Bool, Float32, Int32, Shaped
from rasterio.features import rasterize
from rasterio.io import MemoryFile

from geo_yield.crop_model import CropConstants, HotSpell, Season, draw_land, draw_weather, grow, smooth_field
from geo_yield.errors import InputProblem

SPHERE_RADIUS = 6371007.181
TILE_SIZE = 1111950.519667
"""Side of a MODIS tile in metres on the sinusoidal sphere."""
PIXEL_SIZE = TILE_SIZE / 2400
SINUSOIDAL = f"+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R={SPHERE_RADIUS} +units=m +no_defs"
KG_PER_HA_IN_BU_PER_ACRE = 67.2511
"""Soybean: 1 bu/acre in kg/ha."""

_WEST, _EAST, _ROW_OF_TILES = 10, 11, 4
_COMPOSITES = tuple(range(49, 298, 8))
_WATER, _URBAN, _FOREST, _GRASS, _CROP, _MOSAIC = 17, 13, 4, 10, 12, 14

# Reflectance of MODIS bands 1 to 7: red, near infrared, blue, green, 1240, 1640 and 2130 nm.
_SPECTRA = {
    "leaves": (0.035, 0.480, 0.020, 0.065, 0.460, 0.240, 0.110),
    "dry leaves": (0.170, 0.300, 0.080, 0.130, 0.360, 0.380, 0.270),
    "soil": (0.140, 0.200, 0.080, 0.110, 0.280, 0.330, 0.280),
    "forest": (0.030, 0.390, 0.018, 0.050, 0.340, 0.160, 0.070),
    "town": (0.140, 0.220, 0.100, 0.120, 0.250, 0.250, 0.220),
    "water": (0.030, 0.020, 0.035, 0.040, 0.015, 0.010, 0.008),
    "cloud": (0.580, 0.600, 0.590, 0.580, 0.560, 0.420, 0.330),
    "snow": (0.700, 0.640, 0.740, 0.730, 0.380, 0.090, 0.070),
}


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """How large the simulated region is and what happens in it."""

    first_year: int = 2015
    """First season with imagery."""
    seasons: int = 8
    """Seasons with imagery; the last one has the strong hot spell."""
    earlier_seasons: int = 10
    """Seasons before them, of which only yields are known."""
    county_grid: tuple[int, int] = (7, 8)
    """Rows and columns of counties."""
    height: int = 96
    """Rows of 500 m pixels of both windows, even."""
    widths: tuple[int, int] = (92, 116)
    """Columns of the window in tile h10v04 and of the one in h11v04, even."""
    crop: str = "soybean"
    trend: float = 0.35
    """Technology: bu/acre gained per year."""
    yield_noise: float = 0.035
    """Standard deviation of a county's surveyed yield around the true one, as a share of it."""
    moderate_spell: tuple[float, float] = (3.0, 0.50)
    """Warming (K) and share of rain lost in the fourth season, strongest in the north-west."""
    strong_spell: tuple[float, float] = (4.2, 0.62)
    """The same in the last season, strongest in the south-east."""
    constants: CropConstants = field(default_factory=CropConstants)

    def __post_init__(self) -> None:
        if self.seasons < 2 or self.earlier_seasons < 0 or min(self.county_grid) < 1:
            raise InputProblem(
                f"a simulated region needs 2 or more seasons, 0 or more earlier ones and a county, got {self.seasons}, "
                f"{self.earlier_seasons}, {self.county_grid}"
            )
        if self.height % 2 or any(width % 2 for width in self.widths) or min(self.height, *self.widths) < 8:
            raise InputProblem(f"windows need even sides of 8 or more pixels, got {self.height} x {self.widths}")

    @classmethod
    def of_size(cls, county_grid: tuple[int, int], *, seasons: int) -> "SimulationConfig":
        """Windows just large enough for that many counties of the usual size; (7, 8) is the default region."""
        rows, columns = max(county_grid[0], 1), max(county_grid[1], 1)
        height = 2 * max(round(6.86 * rows), 4)
        width = 2 * round(0.515 * height + 6.8 * columns)  # the windows lean by about their height
        west = 2 * max(round(0.221 * width), 4)
        return cls(county_grid=county_grid, seasons=seasons, height=height, widths=(west, width - west))

    @property
    def years(self) -> tuple[int, ...]:
        """Seasons with imagery."""
        return tuple(range(self.first_year, self.first_year + self.seasons))

    @property
    def spells(self) -> tuple[HotSpell, HotSpell]:
        moderate, strong = self.moderate_spell, self.strong_spell
        return (
            HotSpell(
                year=self.years[min(3, self.seasons - 2)],
                warming=moderate[0],
                rain_lost=moderate[1],
                centre=(0.30, 0.25),
            ),
            HotSpell(year=self.years[-1], warming=strong[0], rain_lost=strong[1], centre=(0.62, 0.66)),
        )


@dataclass(frozen=True, kw_only=True)
class SimulatedRegion:
    """Where the files of a simulated region are."""

    folder: Path
    years: tuple[int, ...]
    """Seasons with imagery."""
    crop: str

    @property
    def imagery(self) -> Path:
        """Folder of GeoTIFFs in LP DAAC naming."""
        return self.folder / "imagery"

    @property
    def regions(self) -> Path:
        """GeoPackage of county polygons: region_id, name, geometry in EPSG:4326."""
        return self.folder / "counties.gpkg"

    @property
    def yields(self) -> Path:
        """CSV: region_id, year, crop, yield, unit, source."""
        return self.folder / "yields.csv"


def simulate(
    out: Path,
    *,
    seed: int = 0,
    config: SimulationConfig | None = None,
    on_season: Callable[[int], None] | None = None,
) -> SimulatedRegion:
    """Write a simulated region into the new folder `out`; the same seed and config give the same files.

    A folder that holds the same simulation already is left as it is. Raises InputProblem if `out` holds something else.
    `on_season` is called with the year after each season of imagery. The folder appears whole or not at all.
    """
    config = config or SimulationConfig()
    region = SimulatedRegion(folder=out, years=config.years, crop=config.crop)
    stamp = json.dumps({"simulated": True, "seed": seed, "config": asdict(config)}, indent=1)
    record = out / "simulation.json"
    if record.exists() and record.read_text() == stamp:
        return region
    if out.exists():
        raise InputProblem(f"'{out}' holds something else than this simulation. Give another folder or remove it")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "imagery").mkdir(parents=True)
    world = _World(config, seed)
    world.counties.to_file(partial / "counties.gpkg", layer="counties", driver="GPKG")
    _write_land_cover(partial / "imagery", world)
    grain = {year: _season(world, year, partial / "imagery", on_season) for year in _all_years(config)}
    _yield_table(world, grain).to_csv(partial / "yields.csv", index=False)
    (partial / "simulation.json").write_text(stamp)
    partial.rename(out)
    return region


def _all_years(config: SimulationConfig) -> range:
    return range(config.first_year - config.earlier_seasons, config.first_year + config.seasons)


class _World:
    """What stays the same over the years: soils, land cover, counties.

    Every purpose has a random stream of its own, so that no draw shifts another.
    """

    def __init__(self, config: SimulationConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.shape = (config.height, sum(config.widths))
        self.land = draw_land(self.random("land"), self.shape)
        self.late_sowing = 2.5 * smooth_field(self.random("farmers"), self.shape, 4.0)

    def random(self, purpose: str, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *purpose.encode(), *numbers])

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north in metres. The windows meet at the tiles' border and touch their south edge."""
        border, south = (_EAST - 18) * TILE_SIZE, (9 - _ROW_OF_TILES - 1) * TILE_SIZE
        west, east = self.config.widths
        return border - west * PIXEL_SIZE, south, border + east * PIXEL_SIZE, south + self.config.height * PIXEL_SIZE

    @cached_property
    def cover(self) -> Shaped[np.ndarray, "H W"]:
        """IGBP class of every pixel: mostly cropland, some mosaic, grass, forest, a river and a few towns."""
        rng = self.random("cover")
        wild, rough = smooth_field(rng, self.shape, 5.0), smooth_field(rng, self.shape, 1.0)
        cover = np.full(self.shape, _CROP, dtype=np.uint8)
        cover[wild + 0.6 * rough > 0.55] = _MOSAIC
        cover[wild + 0.4 * rough > 0.75] = _GRASS
        cover[wild + 0.3 * rough > 1.25] = _FOREST
        cover[smooth_field(rng, self.shape, 1.6) > 2.6] = _URBAN
        column = np.arange(self.shape[1])
        river = self.shape[0] * 0.45 + 9 * np.sin(column / 17) + 4 * np.sin(column / 7 + 1)
        cover[np.abs(np.arange(self.shape[0])[:, None] - river) < 0.8] = _WATER
        return cover

    @cached_property
    def counties(self) -> geopandas.GeoDataFrame:
        """Counties with crooked borders: small Voronoi cells, each given to the nearest seat of a county.

        They fill the upright rectangle that fits into the windows, which lean: meridians are slanted on this sphere.
        """
        rng, (rows, columns) = self.random("counties"), self.config.county_grid
        frame = _upright(self.bounds)
        west, south, east, north = frame.bounds
        row, column = (index.ravel() for index in np.mgrid[0:rows, 0:columns])
        place = np.stack([column + rng.uniform(0.2, 0.8, len(column)), row + rng.uniform(0.2, 0.8, len(row))], axis=1)
        stretch = np.array([(east - west) / columns, (north - south) / rows])  # one county
        spots = rng.uniform((0, 0), (columns, rows), (12 * len(row), 2))
        cells = shapely.get_parts(shapely.voronoi_polygons(shapely.multipoints(spots)))
        centres = shapely.get_coordinates(shapely.centroid(cells))
        owner = np.argmin(((centres[:, None, :] - place) ** 2).sum(axis=2), axis=1)
        owner[
            np.any((centres < 0.12) | (centres > np.array([columns, rows]) - 0.12), axis=1)
        ] = -1  # crooked outside, too
        owned = [(seat, shapely.union_all(cells[owner == seat])) for seat in range(len(row)) if np.any(owner == seat)]
        shapes = [shapely.transform(shape, lambda xy: xy * stretch + [west, south]) for _, shape in owned]
        return geopandas.GeoDataFrame(
            {
                "region_id": [f"03{2 * seat + 1:03d}" for seat, _ in owned],  # no state has FIPS code 03
                "name": [f"Simulated county {seat + 1}" for seat, _ in owned],
            },
            geometry=[shapely.intersection(shape, frame) for shape in shapes],
            crs=4326,
        )

    @cached_property
    def labels(self) -> Int32[np.ndarray, "H W"]:
        """0 outside, i + 1 in the i-th county."""
        shapes = self.counties.to_crs(SINUSOIDAL).geometry
        numbered = ((shape, index + 1) for index, shape in enumerate(shapes))
        return rasterize(
            numbered, out_shape=self.shape, transform=_transform(self.bounds[0], self.bounds[3]), dtype="int32"
        )

    @cached_property
    def writers(self) -> dict[int, "_TileWriter"]:
        """Tile number h -> writer of its window."""
        west, east = self.config.widths
        corner, border, top = self.bounds[0], (_EAST - 18) * TILE_SIZE, self.bounds[3]
        return {
            _WEST: _TileWriter(_WEST, slice(0, west), (corner, top)),
            _EAST: _TileWriter(_EAST, slice(west, west + east), (border, top)),
        }


def _upright(bounds: tuple[float, float, float, float]) -> shapely.Polygon:
    """The largest rectangle in degrees that lies inside sinusoidal bounds, 1.5 pixels away from them."""
    west, south, east, north = np.array(bounds) + 1.5 * PIXEL_SIZE * np.array([1, 1, -1, -1])
    lat_south, lat_north = south / SPHERE_RADIUS, north / SPHERE_RADIUS
    # west of the central meridian lines of equal easting drift west going north
    lon_west, lon_east = west / (SPHERE_RADIUS * np.cos(lat_south)), east / (SPHERE_RADIUS * np.cos(lat_north))
    return shapely.box(*np.degrees([lon_west, lat_south, lon_east, lat_north]))


def _transform(left: float, top: float, coarse: int = 1) -> Affine:
    return Affine(coarse * PIXEL_SIZE, 0, left, 0, -coarse * PIXEL_SIZE, top)


def _season(
    world: _World, year: int, imagery: Path, on_season: Callable[[int], None] | None
) -> Float32[np.ndarray, "H W"]:
    """Grow one season, write its imagery if the satellite was up, and return the grain of every pixel in g/m2."""
    config = world.config
    weather = draw_weather(world.random("weather", year), world.shape, year, config.spells)
    rng = world.random("sowing", year)
    sowing = 131 + rng.normal(0, 4) + world.late_sowing + rng.normal(0, 2.5, world.shape)
    season = grow(weather, world.land, sowing.astype(np.float32), config.constants)
    if year in config.years:
        for step, doy in enumerate(_COMPOSITES):
            layers = _composite(world, season, step, world.random("image", year, step))
            for name, pixels in layers.items():
                for writer in world.writers.values():
                    writer.write(imagery, name, year, doy, pixels)
        if on_season:
            on_season(year)
    return season.grain


def _yield_table(world: _World, grain: dict[int, Float32[np.ndarray, "H W"]]) -> pd.DataFrame:
    """Surveyed yield of every county and year: mean over its cropland, technology trend and survey noise added."""
    counted = np.where(world.cover == _CROP, world.labels, 0)
    rows = []
    for year, values in grain.items():
        total = np.bincount(counted.ravel(), weights=values.ravel(), minlength=len(world.counties) + 1)[1:]
        pixels = np.bincount(counted.ravel(), minlength=len(world.counties) + 1)[1:]
        harvest = 10 * total / np.maximum(pixels, 1) / KG_PER_HA_IN_BU_PER_ACRE
        harvest += world.config.trend * (year - world.config.first_year)
        noise = 1 + world.config.yield_noise * world.random("survey", year).standard_normal(len(harvest))
        rows += [
            (region, year, world.config.crop, round(value, 1), "bu/acre", "simulated")
            for region, value, count in zip(world.counties["region_id"], harvest * noise, pixels, strict=True)
            if count
        ]
    return pd.DataFrame(rows, columns=["region_id", "year", "crop", "yield", "unit", "source"])


def _composite(
    world: _World, season: Season, step: int, rng: np.random.Generator
) -> dict[str, Shaped[np.ndarray, "H W"]]:
    """All layers of one 8-day composite, encoded as the products do; 1 km layers have H/2 rows, W/2 columns."""
    cloudy, shadow = _clouds(rng, world.shape)
    snow = (season.maximum[step] + season.minimum[step]) / 2 < -1.5
    reflectance = _reflectance(world, season, step, snow, rng)
    thick = np.where(cloudy, rng.uniform(0.5, 1.0, world.shape), 0) + np.where(shadow, 0.05, 0)
    haze = np.where(
        rng.random(world.shape) < 0.03, rng.uniform(0.03, 0.15, world.shape), 0
    )  # thin, and nobody flagged it
    veil = np.maximum(thick, haze)[..., None].astype(np.float32)
    reflectance = (1 - veil) * reflectance * np.where(shadow, 0.6, 1.0)[..., None] + veil * np.array(_SPECTRA["cloud"])
    reflectance += rng.normal(0, 0.006, reflectance.shape)
    gap = _gap(rng, world.shape)
    numbers = np.where(gap[..., None], -28672, np.clip(np.rint(reflectance * 1e4), -100, 16000)).astype(np.int16)
    layers = {f"sur_refl_b{band + 1:02d}": numbers[..., band] for band in range(7)}
    layers["sur_refl_state_500m"] = _state(world, cloudy, shadow, snow, gap, rng)
    layers["sur_refl_qc_500m"] = np.where(gap, 4294967295, np.where(cloudy, (1 << 30) | 1, 1 << 30)).astype(np.uint32)
    return layers | _temperatures(world, season, step, cloudy, rng)


def _reflectance(
    world: _World, season: Season, step: int, snow: Bool[np.ndarray, "H W"], rng: np.random.Generator
) -> Float32[np.ndarray, "H W 7"]:
    """Clear-sky surface reflectance, 0..1: every land cover a mixture of leaves, dry leaves and soil."""
    leaves, dry, water = season.absorbed[step], season.withered[step], season.soil_water[step]
    day = _COMPOSITES[step] + 4
    green_up = 1 / (1 + np.exp(-(day - 115) / 9)) - 1 / (1 + np.exp(-(day - 282) / 9))
    pasture = np.clip(0.25 + 0.55 * green_up * (1 - 0.5 * season.thirst[step]), 0, 1)
    leaves = np.where(
        np.isin(world.cover, (_CROP,)), leaves, np.where(world.cover == _MOSAIC, (leaves + pasture) / 2, pasture)
    )
    dry = np.where(world.cover == _CROP, dry, 0.4) * (1 - leaves)
    soil = (1 - leaves - dry) * (1 - 0.25 * water)
    mixed = leaves[..., None] * np.array(_SPECTRA["leaves"]) + dry[..., None] * np.array(_SPECTRA["dry leaves"])
    mixed += soil[..., None] * np.array(_SPECTRA["soil"])
    wood = green_up * np.array(_SPECTRA["forest"]) + (1 - green_up) * np.array(_SPECTRA["dry leaves"]) * 0.6
    mixed[world.cover == _FOREST] = wood
    mixed[world.cover == _URBAN] = _SPECTRA["town"]
    mixed[world.cover == _WATER] = _SPECTRA["water"]
    mixed[snow & (world.cover != _WATER)] = _SPECTRA["snow"]
    return (mixed * (1 + rng.normal(0, 0.03, world.shape))[..., None]).astype(np.float32)


def _temperatures(
    world: _World, season: Season, step: int, cloudy: Bool[np.ndarray, "H W"], rng: np.random.Generator
) -> dict[str, Shaped[np.ndarray, "H2 W2"]]:
    """Land surface temperature by day and night on the 1 km grid: bare ground and thirsty leaves get hot by day."""
    leaves, thirst = season.absorbed[step], season.thirst[step]
    leaves = np.where(world.cover == _CROP, leaves, 0.5)
    day = season.maximum[step] + 9.0 * (1 - leaves) + 5.0 * leaves * thirst - np.where(world.cover == _WATER, 6.0, 0)
    night = season.minimum[step] + 0.5 * (1 - leaves) + np.where(world.cover == _URBAN, 1.5, 0)
    overcast = _halve(cloudy) > 0.5
    layers: dict[str, Shaped[np.ndarray, "H2 W2"]] = {}
    for name, surface in (("Day", day), ("Night", night)):
        kelvin = _halve(surface) + 273.15 + rng.normal(0, 0.5, overcast.shape)
        lost = overcast | (rng.random(overcast.shape) < 0.01)
        numbers = np.where(lost, 0, np.clip(np.rint(kelvin / 0.02), 7500, 65535))
        rough = rng.random(overcast.shape) < 0.15
        quality = np.where(lost, 2, np.where(rough, 0b01_00_00_01, 0))  # rough: other quality, error up to 2 K
        layers[f"LST_{name}_1km"] = numbers.astype(np.uint16)
        layers[f"QC_{name}"] = quality.astype(np.uint8)
    return layers


def _clouds(
    rng: np.random.Generator, shape: tuple[int, int]
) -> tuple[Bool[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]:
    """Clouds that survived the 8-day composite, in patches, and their shadows two pixels north-west of them."""
    share = rng.beta(1.3, 6.0)  # 18 % on average
    field = smooth_field(rng, shape, 6.0) + 0.5 * smooth_field(rng, shape, 1.5)
    cloudy = field > np.quantile(field, 1 - share)
    shadow = np.roll(cloudy, (-2, -2), axis=(0, 1)) & ~cloudy
    return cloudy, shadow


def _gap(rng: np.random.Generator, shape: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Pixels that were never seen: single ones, and in every tenth composite a slanted strip."""
    gap = rng.random(shape) < 0.002
    if rng.random() < 0.1:
        row, column = np.ogrid[0 : shape[0], 0 : shape[1]]
        gap |= np.abs(column - rng.uniform(0, shape[1]) - 0.3 * row) < 4
    return gap


def _state(
    world: _World,
    cloudy: Bool[np.ndarray, "H W"],
    shadow: Bool[np.ndarray, "H W"],
    snow: Bool[np.ndarray, "H W"],
    gap: Bool[np.ndarray, "H W"],
    rng: np.random.Generator,
) -> Shaped[np.ndarray, "H W"]:
    """sur_refl_state_500m: cloud state, shadow, land or water, aerosol, internal cloud flag, snow, beside a cloud."""
    clear = np.where(rng.random(world.shape) < 0.1, 3, 0)  # 3: not set, assumed clear
    kind = np.where(cloudy, np.where(rng.random(world.shape) < 0.3, 2, 1), clear)
    beside = cloudy.copy()
    for shift in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        beside |= np.roll(cloudy, shift, axis=(0, 1))
    flags = kind | (shadow.astype(np.int64) << 2) | (np.where(world.cover == _WATER, 3, 1) << 3)
    flags |= (1 << 6) | (cloudy.astype(np.int64) << 10) | (snow.astype(np.int64) << 12)
    flags |= (beside & ~cloudy).astype(np.int64) << 13
    return np.where(gap, 65535, flags).astype(np.uint16)


def _halve(values: Shaped[np.ndarray, "H W"]) -> Float32[np.ndarray, "H2 W2"]:
    """Mean of 2 x 2 pixels: 500 m to 1 km."""
    return values.reshape(values.shape[0] // 2, 2, values.shape[1] // 2, 2).mean(axis=(1, 3))


def _write_land_cover(imagery: Path, world: _World) -> None:
    for year in world.config.years:
        for writer in world.writers.values():
            writer.write(imagery, "LC_Type1", year, 1, world.cover)


_PRODUCTS = {"sur": "MOD09A1", "LST": "MYD11A2", "QC_": "MYD11A2", "LC_": "MCD12Q1"}
_FILL = {"int16": -28672, "uint32": 4294967295, "LC_Type1": 255, "sur_refl_state_500m": 65535, "LST": 0}


class _TileWriter:
    """Writes layers of one tile's window as GeoTIFF.

    Thousands of files differ in nothing but their pixels, so the header is made once per layer by GDAL and the pixels,
    one uncompressed strip, are put into its place: ten times as fast as letting GDAL describe the projection each time.
    """

    def __init__(self, h: int, columns: slice, corner: tuple[float, float]) -> None:
        self.h, self.columns, self.corner = h, columns, corner
        self.templates: dict[str, tuple[bytes, bytes]] = {}

    def write(self, folder: Path, layer: str, year: int, doy: int, pixels: Shaped[np.ndarray, "H W"]) -> None:
        """Write the window's part of `pixels`, given over both windows on the layer's own grid (500 m or 1 km)."""
        coarse = 2 if layer.startswith(("LST", "QC_")) else 1
        window = pixels[:, self.columns.start // coarse : self.columns.stop // coarse]
        if layer not in self.templates:
            self.templates[layer] = self._template(layer, window, coarse)
        head, tail = self.templates[layer]
        granule = f"{_PRODUCTS[layer[:3]]}.A{year}{doy:03d}.h{self.h}v{_ROW_OF_TILES:02d}.061.{year + 1}032000000"
        body = np.ascontiguousarray(window).astype(window.dtype.newbyteorder("<")).tobytes()
        (folder / f"{granule}_{layer}.tif").write_bytes(head + body + tail)

    def _template(self, layer: str, window: Shaped[np.ndarray, "P Q"], coarse: int) -> tuple[bytes, bytes]:
        """What stands before and after the pixels in a GeoTIFF of this layer."""
        profile = {
            "driver": "GTiff",
            "height": window.shape[0],
            "width": window.shape[1],
            "count": 1,
            "dtype": window.dtype.name,
            "crs": SINUSOIDAL,
            "transform": _transform(*self.corner, coarse),
            "nodata": _FILL.get(layer, _FILL.get(layer[:3], _FILL.get(window.dtype.name))),
            "blockysize": window.shape[0],
            "endianness": "LITTLE",
        }
        with MemoryFile() as memory:
            with memory.open(**profile) as file:
                file.write(np.ones_like(window), 1)  # GDAL leaves out a strip of zeros
                file.update_tags(SIMULATED="yes, by geo_yield.simulator")
            content = bytes(memory.getbuffer())
            with memory.open() as file:
                start = int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
        return content[:start], content[start + window.nbytes :]
