"""Finding and reading MODIS files: HDF4-EOS granules, one GeoTIFF per layer, and stacks exported from Earth Engine.

| kind | file name |
|---|---|
| granule of LP DAAC | `MOD09A1.A2015049.h11v04.061.2021323021553.hdf` |
| layer of a granule (Planetary Computer, stactools) | `MOD09A1.A2015049.h11v04.061.2021323021553_sur_refl_b01.tif` |
| area sample of AppEEARS | `MOD09A1.061_sur_refl_b01_doy2015049_aid0001.tif`, or with a time behind the day |
| stack of Earth Engine | any name, in a folder named after the product (see `find_composites`) |

The rasterio wheels are built without GDAL's HDF4 driver, so granules are read with pyhdf and placed by the corners in
their `StructMetadata.0`. The position is never computed from the tile's number: granules are also cut to an area.
Of several files of one product, tile and date the one of the highest version, then of the latest production, is taken.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from jaxtyping import Bool, Shaped
from pyproj import CRS, Transformer
from rasterio.errors import RasterioError

from geo_yield.errors import InputProblem
from geo_yield.scenes import Grid

STACKED_LAYERS: Mapping[str, tuple[str, ...]] = {
    "MOD09A1": tuple(f"sur_refl_b{band:02d}" for band in range(1, 8)),
    "MYD11A2": ("LST_Day_1km", "LST_Night_1km"),
    "MCD12Q1": ("LC_Type1",),
}
"""Products that are read, with the layers that a stack holds of each date, in this order."""
FILL: Mapping[str, int] = {
    "sur_refl_b": -28672,
    "sur_refl_qc": 4294967295,
    "sur_refl_state": 65535,
    "LST_": 0,
    "LC_": 255,
}
"""Beginning of a layer's name -> its fill value (MOD09A1, MYD11A2 and MCD12Q1 file specifications)."""
COMPOSITES_PER_YEAR = 46

_PRODUCT = "|".join(STACKED_LAYERS)
_GRANULE = re.compile(
    rf"(?P<product>{_PRODUCT})\.A(?P<year>\d{{4}})(?P<doy>\d{{3}})\.(?P<tile>h\d\dv\d\d)\.(?P<version>\d{{3}})"
    r"(?:\.(?P<made>\d+))?(?:_(?P<layer>\w+))?\.(?P<kind>hdf|tiff?)",
    re.IGNORECASE,
)
_APPEEARS = re.compile(
    rf"(?P<product>{_PRODUCT})\.(?P<version>\d{{3}})_(?P<layer>\w+)_doy(?P<year>\d{{4}})(?P<doy>\d{{3}})(?P<made>\d{{6}})?"
    r"_(?P<tile>aid\d{4})\.(?P<kind>tiff?)",
    re.IGNORECASE,
)
_PIECE = re.compile(r"(?P<name>.+?)(?:-\d{10}-\d{10})?\.tiff?", re.IGNORECASE)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LayerSource:
    """Where the pixels of one layer are."""

    paths: tuple[Path, ...]
    """One file, or the pieces that an export was split into."""
    band: int = 1
    """1-based, of a GeoTIFF."""
    fill: int | None = None
    """A value that means "missing" besides the product's own."""


@dataclass(frozen=True, kw_only=True)
class Composite:
    """One product on one tile and date."""

    product: str
    tile: str
    """"h11v04", "aid0001" or the name of a stack."""
    year: int
    doy: int
    version: str
    """"061", or "stack"."""
    layers: tuple[tuple[str, LayerSource], ...]
    """Layer name -> source; empty for a granule, whose layers are known when it is opened."""
    granule: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its files, in order, each once."""
        found = [self.granule] if self.granule else [path for _, source in self.layers for path in source.paths]
        return tuple(sorted({path for path in found if path is not None}))

    def read(self, layer: str) -> "Layer":
        """One layer. Raises InputProblem if it is not there or unreadable."""
        if self.granule is not None:
            return _read_hdf(self.granule, layer)
        source = dict(self.layers).get(layer)
        if source is None:
            raise InputProblem(
                f"{self.product} of {self.year} day {self.doy}, {self.tile}, has no layer '{layer}' "
                f"(it has {', '.join(name for name, _ in self.layers)}) in '{self.paths[0].parent}'"
            )
        return _read_geotiff(source, layer)

    def grid(self) -> Grid:
        """Grid of its first layer, from the file's header."""
        if self.granule is not None:
            return _hdf_grid(self.granule, STACKED_LAYERS[self.product][0])
        return _mosaic_grid(self.layers[0][1].paths)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Pixels as they are stored."""

    pixels: Shaped[np.ndarray, "H W"]
    missing: Bool[np.ndarray, "H W"]
    """Fill."""
    grid: Grid


def find_composites(inputs: Path | Sequence[Path], *, first_year: int | None = None) -> list[Composite]:
    """All composites in a folder (and its subfolders) or in files, ordered by product, tile and date.

    `first_year` says that GeoTIFFs with other names are stacks of Earth Engine, as the pipelines after You et al.
    (2017) export them: in folders whose names hold the product (`MOD09A1`, `MYD11A2`, `MCD12Q1`), one file per area,
    named alike in all folders; all layers of the first date first (7, 2 or 1), 46 dates a year (MCD12Q1: 1) from the
    first of January of `first_year`, 0 where there is no value. Pieces (`a-0000000000-0000000768.tif`) are joined.
    Raises InputProblem if nothing is found.
    """
    files = list(_files(inputs))
    found: dict[tuple[str, str, int, int], dict[tuple[str, str, str], dict[str, Path]]] = defaultdict(dict)
    stacks: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in files:
        if match := _GRANULE.fullmatch(path.name) or _APPEEARS.fullmatch(path.name):
            part = match.groupdict()
            key = (part["product"].upper(), part["tile"].lower(), int(part["year"]), int(part["doy"]))
            # at the same version and production date, GeoTIFF goes before HDF
            edition = (part["version"], part["made"] or "", part["kind"].lower()[:3])
            found[key].setdefault(edition, {})[part["layer"] or ""] = path
        elif first_year is not None and (product := _product_of_folder(path)):
            stacks[product, _PIECE.fullmatch(path.name)["name"]].append(path)  # type: ignore[index]
    composites = [_newest(key, editions) for key, editions in found.items()]
    for (product, name), pieces in stacks.items():
        composites += _stacked(product, name, tuple(pieces), first_year or 0)
    if not composites:
        raise InputProblem(
            f"no MODIS file in {describe(inputs)} ({len(files)} .hdf or .tif files there). Names must be like "
            "'MOD09A1.A2015049.h11v04.061.2021323021553_sur_refl_b01.tif' or '...hdf', or AppEEARS names, "
            "or stacks of Earth Engine with their first year"
        )
    return sorted(composites, key=lambda c: (c.product, c.tile, c.year, c.doy))


def describe(inputs: Path | Sequence[Path]) -> str:
    """How messages name the input."""
    paths = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    named = ", ".join(f"'{path}'" for path in paths[:2])
    return named if len(paths) <= 2 else f"{named} and {len(paths) - 2} more"


def index_on(source: Grid, target: Grid) -> tuple[Shaped[np.ndarray, "H"], Shaped[np.ndarray, "W"]]:
    """For each row and column of `target` the row and column of `source` that its centre lies in, -1 outside.

    Indexing with the two is nearest-neighbour resampling; from 1 km to the 500 m grid of one tile it doubles pixels.
    Raises InputProblem if the two are not in the same coordinate system.
    """
    if not _same_crs(source, target):
        raise InputProblem(
            f"files of one tile are in two coordinate systems: {source.crs.name} and {target.crs.name}. "
            "Export all products in the same one"
        )
    a, _, c, _, e, f = tuple(target.transform)[:6]
    columns = (a * (np.arange(target.width) + 0.5) + c - source.transform.c) / source.transform.a
    rows = (e * (np.arange(target.height) + 0.5) + f - source.transform.f) / source.transform.e
    return _inside(rows, source.height), _inside(columns, source.width)


def resample(
    pixels: Shaped[np.ndarray, "h w"], source: Grid, target: Grid, *, outside: int | bool
) -> Shaped[np.ndarray, "H W"]:
    """Nearest pixel of `source` for every pixel of `target`, `outside` where there is none."""
    rows, columns = index_on(source, target)
    out = pixels[rows[:, None], columns[None, :]]
    out[rows < 0, :] = outside
    out[:, columns < 0] = outside
    return out


def _inside(position: Shaped[np.ndarray, "P"], size: int) -> Shaped[np.ndarray, "P"]:
    index = np.floor(position).astype(np.int64)
    return np.where((index >= 0) & (index < size), index, -1)


def _same_crs(one: Grid, other: Grid) -> bool:
    """By what they do to the grid's corners: the MODIS sphere has no EPSG code, and its WKT differs between writers."""
    if one.crs == other.crs:
        return True
    if one.crs.is_geographic != other.crs.is_geographic:
        return False
    t = one.transform
    x, y = np.array([t.c, t.c + t.a * one.width]), np.array([t.f, t.f + t.e * one.height])
    there = Transformer.from_crs(one.crs, other.crs, always_xy=True).transform(x, y)
    return bool(np.allclose(there, (x, y), rtol=0, atol=1e-3 * abs(t.a)))


def _files(inputs: Path | Sequence[Path]) -> Iterable[Path]:
    for path in [Path(inputs)] if isinstance(inputs, (str, Path)) else map(Path, inputs):
        if not path.exists():
            raise InputProblem(f"no file or folder '{path}'")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix.lower() in (".hdf", ".tif", ".tiff") and not file.name.startswith("."):
                yield file


def _newest(key: tuple[str, str, int, int], editions: dict[tuple[str, str, str], dict[str, Path]]) -> Composite:
    product, tile, year, doy = key
    version, made, kind = max(editions)
    if len(editions) > 1:
        log.info("%s %s %d day %d is there %d times; %s %s is taken", *key, len(editions), version, made)
    files = editions[version, made, kind]
    layers = () if kind == "hdf" else tuple((name, LayerSource(paths=(path,))) for name, path in sorted(files.items()))
    granule = files[""] if kind == "hdf" else None
    return Composite(product=product, tile=tile, year=year, doy=doy, version=version, layers=layers, granule=granule)


def _product_of_folder(path: Path) -> str | None:
    return next((product for product in STACKED_LAYERS if product in path.parent.name.upper()), None)


def _stacked(product: str, name: str, pieces: tuple[Path, ...], first_year: int) -> list[Composite]:
    names = STACKED_LAYERS[product]
    per_year = 1 if product == "MCD12Q1" else COMPOSITES_PER_YEAR
    with _open(pieces[0]) as file:
        count = file.count
    if count % len(names):
        raise InputProblem(f"'{pieces[0]}' has {count} bands; a stack of {product} has {len(names)} for each date")
    return [
        Composite(
            product=product,
            tile=name,
            year=first_year + date // per_year,
            doy=1 + 8 * (date % per_year),
            version="stack",
            layers=tuple(
                (layer, LayerSource(paths=pieces, band=date * len(names) + position + 1, fill=0))
                for position, layer in enumerate(names)
            ),
        )
        for date in range(count // len(names))
    ]


def _open(path: Path) -> rasterio.DatasetReader:
    try:
        # GDAL would list the folder at each opening, and folders of layers are long
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="TRUE"):
            return rasterio.open(path)
    except (RasterioError, UnicodeDecodeError) as problem:
        raise InputProblem(f"'{path}' is damaged or no GeoTIFF: {str(problem).splitlines()[0]}") from None


def _geotiff_grid(file: rasterio.DatasetReader) -> Grid:
    if file.crs is None:
        raise InputProblem(f"'{file.name}' has no coordinate system (CRS), so its pixels have no place")
    if file.transform.b or file.transform.d or file.transform.is_identity:
        raise InputProblem(f"'{file.name}' has no upright georeference (transform {tuple(file.transform)[:6]})")
    return Grid(crs=_crs(file.crs.to_wkt()), transform=file.transform, height=file.height, width=file.width)


@lru_cache(maxsize=32)
def _crs(wkt: str) -> CRS:
    return CRS.from_wkt(wkt)


def _mosaic_grid(paths: tuple[Path, ...]) -> Grid:
    grids = []
    for path in paths:
        with _open(path) as file:
            grids.append(_geotiff_grid(file))
    return grids[0] if len(grids) == 1 else _union(grids, paths)


def _union(grids: list[Grid], paths: tuple[Path, ...]) -> Grid:
    """The smallest grid that holds all pieces. Raises InputProblem if they do not fit into one raster."""
    first = grids[0].transform
    offsets = np.array([_offset(first, grid.transform) for grid in grids])
    same = all(
        _same_crs(grids[0], g) and np.allclose((g.transform.a, g.transform.e), (first.a, first.e)) for g in grids
    )
    if not same or np.abs(offsets - np.rint(offsets)).max() > 1e-2:
        raise InputProblem(
            f"'{paths[0]}' and '{paths[-1]}' are named like pieces of one export, but do not fit together"
        )
    row, column = np.rint(offsets).astype(int).T
    top, left = int(row.min()), int(column.min())
    height = max(int(r) + grid.height for r, grid in zip(row, grids, strict=True)) - top
    width = max(int(c) + grid.width for c, grid in zip(column, grids, strict=True)) - left
    transform = Affine(first.a, 0, first.c + left * first.a, 0, first.e, first.f + top * first.e)
    return Grid(crs=grids[0].crs, transform=transform, height=height, width=width)


def _offset(origin: Affine, other: Affine) -> tuple[float, float]:
    """Rows and columns from one upper left corner to another."""
    return (other.f - origin.f) / origin.e, (other.c - origin.c) / origin.a


def _read_geotiff(source: LayerSource, layer: str) -> Layer:
    parts = [_read_piece(path, source, layer) for path in source.paths]
    if len(parts) == 1:
        return parts[0]
    grid = _union([part.grid for part in parts], source.paths)
    missing = np.ones((grid.height, grid.width), dtype=bool)
    pixels = np.zeros(missing.shape, dtype=parts[0].pixels.dtype)
    for part in parts:
        row, column = (round(steps) for steps in _offset(grid.transform, part.grid.transform))
        place = slice(row, row + part.grid.height), slice(column, column + part.grid.width)
        pixels[place], missing[place] = part.pixels, part.missing
    return Layer(pixels=pixels, missing=missing, grid=grid)


def _read_piece(path: Path, source: LayerSource, layer: str) -> Layer:
    with _open(path) as file:
        if source.band > file.count:
            raise InputProblem(f"'{path}' has {file.count} bands, and band {source.band} is needed")
        grid, nodata = _geotiff_grid(file), file.nodata
        try:
            pixels = file.read(source.band)
        except (RasterioError, UnicodeDecodeError) as problem:
            raise InputProblem(f"'{path}' is damaged: {str(problem).splitlines()[0]}") from None
    _refuse_floats(pixels, path)
    return Layer(pixels=pixels, missing=_is_any(pixels, {fill_of(layer), source.fill, nodata}), grid=grid)


def fill_of(layer: str) -> int | None:
    """Fill value of a layer by the product's specification; None where there is none (LST quality flags)."""
    return next((fill for start, fill in FILL.items() if layer.startswith(start)), None)


def _is_any(pixels: Shaped[np.ndarray, "H W"], fills: Iterable[float | None]) -> Bool[np.ndarray, "H W"]:
    missing = np.zeros(pixels.shape, dtype=bool)
    limits = np.iinfo(pixels.dtype)
    for fill in fills:
        if fill is not None and limits.min <= fill <= limits.max:
            missing |= pixels == int(fill)
    return missing


def _refuse_floats(pixels: Shaped[np.ndarray, "H W"], path: Path) -> None:
    if pixels.dtype.kind not in "iu":
        raise InputProblem(f"'{path}' holds {pixels.dtype} values; stored integers (DN, not scaled) are needed")


def _open_hdf(path: Path) -> "pyhdf.SD.SD":  # type: ignore[name-defined]
    try:
        from pyhdf.error import HDF4Error
        from pyhdf.SD import SD
    except ImportError:
        raise InputProblem("reading HDF needs geo-yield[hdf]: uv add 'geo-yield[hdf]'") from None
    try:
        return SD(str(path))
    except HDF4Error as problem:
        raise InputProblem(f"'{path}' is damaged or no HDF4 file: {problem}. Download it again") from None


def _read_hdf(path: Path, layer: str) -> Layer:
    from pyhdf.error import HDF4Error  # _open_hdf has explained its absence

    grid = _hdf_grid(path, layer)
    file = _open_hdf(path)
    try:
        if layer not in file.datasets():
            raise InputProblem(f"'{path}' has no layer '{layer}' (it has {', '.join(file.datasets())})")
        stored = file.select(layer)
        pixels = np.asarray(stored.get())
        fills = {fill_of(layer), stored.attributes().get("_FillValue")}
    except HDF4Error as problem:
        raise InputProblem(f"'{path}' is damaged: {problem}. Download it again") from None
    finally:
        file.end()
    _refuse_floats(pixels, path)
    if pixels.shape != (grid.height, grid.width):
        raise InputProblem(f"layer '{layer}' of '{path}' is {pixels.shape}, its grid ({grid.height}, {grid.width})")
    return Layer(pixels=pixels, missing=_is_any(pixels, fills), grid=grid)


def _hdf_grid(path: Path, layer: str) -> Grid:
    """Grid of the HDF-EOS grid that holds `layer`, by the corners in `StructMetadata.0`."""
    file = _open_hdf(path)
    text = file.attributes().get("StructMetadata.0", "")
    file.end()
    groups = re.findall(r"GROUP=(GRID_\d+)\s(.*?)END_GROUP=\1\s", text, re.DOTALL)
    group = next((body for _, body in groups if f'"{layer}"' in body), None)
    if group is None:
        held = ", ".join(re.findall(r'DataFieldName="(.+?)"', text))
        raise InputProblem(f"'{path}' has no layer '{layer}' in its HDF-EOS grids (it has {held or 'no grid at all'})")
    if "Projection=GCTP_SNSOID" not in group:
        raise InputProblem(f"'{path}' is not on the sinusoidal grid of MODIS")
    width, height = (int(_numbers(group, f"{side}Dim", path)[0]) for side in "XY")
    left, top = _numbers(group, "UpperLeftPointMtrs", path)
    right, bottom = _numbers(group, "LowerRightMtrs", path)
    transform = Affine((right - left) / width, 0, left, 0, (bottom - top) / height, top)
    return Grid(crs=sinusoidal(_numbers(group, "ProjParams", path)[0]), transform=transform, height=height, width=width)


def _numbers(group: str, name: str, path: Path) -> list[float]:
    """The numbers of `name=5` or `name=(1.5,2,...)` in StructMetadata."""
    found = re.search(rf"\b{name}=\(?([-+.,\deE]+)", group)
    try:
        numbers = [float(number) for number in found[1].split(",")] if found else []
    except ValueError:
        numbers = []
    if not numbers:
        raise InputProblem(f"'{path}' has no readable {name} in StructMetadata.0")
    return numbers


def sinusoidal(radius: float = 6371007.181) -> CRS:
    """The MODIS projection; it has no EPSG code."""
    return CRS.from_proj4(f"+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R={radius} +units=m +no_defs")
