"""Sentinel-2 L2A to reflectance on one grid: band names, the radiometric offset, the scene classification, scenes.

Reads SAFE folders, folders with one GeoTIFF or JPEG 2000 file per band and (through `geo_yield.stac`) catalogue items.
From processing baseline 04.00 on (January 2022, and everything reprocessed as Collection 1) reflectance is
(DN - 1000) / 10000, before it was DN / 10000: ESA, "Sentinel-2 Products Specification Document" S2-PDGS-TAS-DI-PSD,
issue 14.9. Scene classification: Louis et al., "Sentinel-2 Sen2Cor: L2A Processor for Users", ESA SP-740, 2016.

Decided here:
- All looks of a period add up in the histogram: exact, in any order, so no compositing is needed before counting.
- Bands come to the layout's pixel size from their native one (10, 20 or 60 m): coarser by the mean of the pixels
  inside, valid where all of them are; finer by repetition: interpolation would count values that nobody measured.
- Reflectance below 0 (darker than the offset allows for) counts as 0, after the shift.
- Several files of one tile and overpass (reprocessed, or cut by a data strip) are one scene: only those of the newest
  baseline are read, and where one has no data the next fills in, so that no pixel counts twice.
- Neighbouring tiles overlap by 10 km, and across UTM zones by more: what several of the given tiles cover is counted by
  the first of them by name, so that each place counts once, and a lone tile counts all it has.
- A tile is read in blocks of 1830 pixels, each a unit of work, because a whole tile of 9 bands takes over 2 GB.

Shapes: C bands, H rows, W columns.
"""

import hashlib
import logging
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import rasterio
import shapely
from affine import Affine
from jaxtyping import Bool, Float32, Shaped, UInt8
from pyproj import CRS, Transformer
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.features import geometry_mask
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from geo_yield.composites import APRIL_TO_SEPTEMBER, period_of
from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramLayout
from geo_yield.scenes import Grid, Pixels

log = logging.getLogger(__name__)

SENSOR = "sentinel2-l2a"
NODATA, SATURATED = 0, 65535
CLEAR = (4, 5, 7)
"""Scene classes kept by default: vegetation, bare soil, unclassified (mostly thin haze or mixed pixels)."""
BLOCK = 1830
"""A third of a tile at 20 m; 9 bands then take 290 MiB."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """What is fixed about a band."""

    size: int
    """Native pixel, metres."""
    aliases: tuple[str, ...]
    """Names in Earth Search v1 and stactools; Planetary Computer and Earth Search v0 use the band's own name."""
    top: float
    """Highest reflectance that a histogram covers by default; crops, soil and residue stay below."""


BANDS: Mapping[str, Band] = {
    "B01": Band(size=60, aliases=("coastal",), top=0.4),
    "B02": Band(size=10, aliases=("blue",), top=0.4),
    "B03": Band(size=10, aliases=("green",), top=0.4),
    "B04": Band(size=10, aliases=("red",), top=0.4),
    "B05": Band(size=20, aliases=("rededge1", "rededge"), top=0.5),
    "B06": Band(size=20, aliases=("rededge2",), top=0.7),
    "B07": Band(size=20, aliases=("rededge3",), top=0.7),
    "B08": Band(size=10, aliases=("nir",), top=0.7),
    "B8A": Band(size=20, aliases=("nir08",), top=0.7),
    "B09": Band(size=60, aliases=("nir09",), top=0.7),
    "B11": Band(size=20, aliases=("swir16",), top=0.6),
    "B12": Band(size=20, aliases=("swir22",), top=0.6),
    "SCL": Band(size=20, aliases=("scl",), top=12.0),
}
DEFAULT_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B8A", "B11", "B12")
_NAMES = {name: band for band, facts in BANDS.items() for name in (band, *facts.aliases)}
_TILE = re.compile(r"(?<![A-Z0-9])T?(\d{2}[C-X][A-Z]{2})(?![A-Z0-9])")
_TIME = re.compile(r"(?<!\d)(20\d{6})(?:T(\d{6}))?(?!\d)")
_BASELINE = re.compile(r"_N(\d{2})(\d{2})_")
_IMAGE = (".jp2", ".tif", ".tiff")


def band_of(name: str) -> str | None:
    """The band ("B02", ..., "SCL") that an asset or file goes by in any of the known catalogues, else None."""
    return _NAMES.get(name)


def offset_for(
    *,
    from_xml: float | None = None,
    from_raster: float | None = None,
    baseline: str | None = None,
    applied: bool = False,
    asked: float | None = None,
    source: str,
) -> float:
    """Digital numbers to add before dividing: 0 or -1000, from the first of these that is known.

    The product's own XML, the catalogue's or file's band offset (already times 10000), the processing baseline
    ("05.09"). `applied` says that the pixels are shifted already, whatever is listed. `asked` is the user's word where
    none of these is known; it may repeat what they say, but not contradict them. Raises InputProblem if nothing tells.
    """
    known = next((value for value in (from_xml, from_raster) if value is not None), None)
    if known is None and baseline is not None:
        known = -1000.0 if _version(baseline, source) >= (4, 0) else 0.0
    if applied:
        known = 0.0
    if asked is not None and known is not None and asked != known:
        why = "its pixels are shifted already" if applied else f"its metadata say {known:g}"
        raise InputProblem(f"offset {asked:g} was asked for '{source}', but {why}. Leave the offset out.")
    if known is None and asked is None:
        raise InputProblem(
            f"'{source}' does not tell its processing baseline. Put MTD_MSIL2A.xml beside the bands, or give the"
            " offset: -1000 for baseline 04.00 and later, 0 for earlier ones and for harmonised exports."
        )
    return float(known if known is not None else asked)  # type: ignore[arg-type]


def _version(baseline: str, source: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,2})\.(\d{1,2})", str(baseline).strip())
    if match is None:
        raise InputProblem(f"processing baseline of '{source}' is '{baseline}', expected a version like 05.09")
    return int(match[1]), int(match[2])


def to_reflectance(
    digital: Shaped[np.ndarray, "..."], *, offset: float, scale: float = 10000.0
) -> Float32[np.ndarray, "..."]:
    """(DN + offset) / scale, not below 0. Mark digital numbers 0 (no data) and 65535 (saturated) as invalid yourself.

    Raises InputProblem for anything but integers: a floating image has been converted before, and shifting it again
    would take off 0.1 twice.
    """
    if digital.dtype.kind not in "ui":
        raise InputProblem(
            f"Sentinel-2 pixels are {digital.dtype}, expected digital numbers (uint16): they seem to be reflectance"
            " already"
        )
    return np.maximum((digital.astype(np.float32) + np.float32(offset)) / np.float32(scale), 0)


def clear_sky(scl: UInt8[np.ndarray, "H W"], keep: Sequence[int] = CLEAR) -> Bool[np.ndarray, "H W"]:
    """Pixels whose scene class is one of `keep` (add 6 for water, 2 for dark soils)."""
    return np.isin(scl, keep)


def sentinel2_layout(
    *,
    bands: Sequence[str] = DEFAULT_BANDS,
    doy: Sequence[int] = APRIL_TO_SEPTEMBER,
    bins: int = 32,
    edges: Sequence[Sequence[float]] | None = None,
    qa: str = "default",
    mask: str = "none",
    pixel_size: int = 20,
) -> HistogramLayout:
    """Histograms of reflectance; bands by any catalogue's name.

    Edges: `bins` equal ones from 0 to the band's usual top, or `edges`, one row per band; what is brighter (cloud that
    the classes missed, sand) is not counted. `qa`: "default" keeps scene
    classes 4, 5 and 7, "scl:4,5,6,7" those listed, "none" everything with data. `mask`: "none", or "<name>:<class>,..."
    for the classes of a map that is handed to `sentinel2_scenes`. `pixel_size`: 10, 20 or 60 metres.
    """
    names = [band_of(name) for name in bands]
    unknown = [given for given, name in zip(bands, names, strict=True) if name in (None, "SCL")]
    if unknown or len(set(names)) != len(names):
        allowed = ", ".join(name for name in BANDS if name != "SCL")
        raise InputProblem(f"bands must be different ones of {allowed}, got {', '.join(bands)}")
    if pixel_size not in (10, 20, 60):
        raise InputProblem(f"pixel_size must be 10, 20 or 60 metres, got {pixel_size}")
    keep_classes(qa)
    mask_classes(mask)
    chosen = tuple(name for name in names if name is not None)
    rows = edges or [np.linspace(0.0, BANDS[name].top, bins + 1).tolist() for name in chosen]
    return HistogramLayout(
        sensor=SENSOR,
        bands=chosen,
        doy=tuple(doy),
        edges=tuple(tuple(float(edge) for edge in row) for row in rows),
        unit="reflectance",
        qa=qa,
        mask=mask,
        pixel_size=float(pixel_size),
    )


def keep_classes(qa: str) -> tuple[int, ...] | None:
    """Scene classes that a layout's `qa` keeps, None for all. Raises InputProblem if it is none of the three forms."""
    if qa in ("default", "none"):
        return CLEAR if qa == "default" else None
    if re.fullmatch(r"scl:\d{1,2}(,\d{1,2})*", qa) is None or max(map(int, qa[4:].split(","))) > 11:
        raise InputProblem(f"qa is '{qa}', expected default, none, or scl: and classes 0 to 11, e.g. scl:4,5,6,7")
    return tuple(map(int, qa[4:].split(",")))


def mask_classes(mask: str) -> tuple[int, ...] | None:
    """Classes that a layout's `mask` counts, None without a mask. Raises InputProblem on another form."""
    if mask == "none":
        return None
    if re.fullmatch(r"[\w.-]+:\d+(,\d+)*", mask) is None:
        raise InputProblem(f"mask is '{mask}', expected none, or a map's name and its classes, e.g. worldcover:40")
    return tuple(map(int, mask.split(":")[1].split(",")))


@dataclass(frozen=True, kw_only=True)
class Product:
    """One file set of one tile and overpass, described without its pixels."""

    name: str
    tile: str
    """MGRS tile, e.g. "15TVH"."""
    acquired: datetime
    baseline: str | None
    files: Mapping[str, str]
    """Band to path or address."""
    offsets: Mapping[str, float]
    """Per reflectance band, in digital numbers."""
    scale: float = 10000.0
    crs: CRS = field(repr=False)
    bounds: tuple[float, float, float, float]
    """Left, bottom, right, top in metres of the CRS."""
    cloud_cover: float | None = None
    """Per cent, where the metadata have it."""


@dataclass(frozen=True, kw_only=True)
class Sentinel2Scene:
    """One block of one tile and overpass; implements `geo_yield.scenes.Scene`."""

    products: tuple[Product, ...]
    """The newest first; the others fill in where it has no data."""
    year: int
    step: int
    pixel_size: int
    row: int
    """First row of the block, in pixels of `pixel_size`."""
    column: int
    height: int
    width: int
    mask_map: str | None = None
    ceded: tuple[shapely.Polygon, ...] = ()
    """What other tiles count, in metres of this tile's zone."""

    @property
    def key(self) -> str:
        """Place, time, and a digest of products and neighbours: an added file or tile makes another unit of work."""
        first = self.products[0]
        told = [*(product.name for product in self.products), *(shape.wkt for shape in self.ceded)]
        digest = hashlib.sha256("|".join(told).encode()).hexdigest()[:8]
        place = f"{self.pixel_size}m-r{self.row:05d}-c{self.column:05d}"
        return f"{first.tile}-{first.acquired:%Y%m%dT%H%M%S}-{place}-{digest}"

    @property
    def grid_key(self) -> Hashable:
        first = self.products[0]
        return first.tile, first.bounds, self.pixel_size, self.row, self.column, self.height, self.width

    def grid(self) -> Grid:
        """The block's pixels in the tile's UTM zone."""
        left, _, _, top = self.products[0].bounds
        size = self.pixel_size
        transform = Affine(size, 0.0, left + self.column * size, 0.0, -size, top - self.row * size)
        return Grid(crs=self.products[0].crs, transform=transform, height=self.height, width=self.width)

    def read(self, layout: HistogramLayout) -> Pixels:
        """Reflectance, clear where the layout's `qa` says so, counted where its mask does."""
        if layout.sensor != SENSOR or layout.pixel_size != self.pixel_size:
            raise InputProblem(
                f"layout is of {layout.sensor} at {layout.pixel_size} m, the scene of {SENSOR} at {self.pixel_size} m"
            )
        looks = [self._look(product, layout) for product in self.products]
        values, seen, valid = looks[0]
        for more, more_seen, more_valid in looks[1:]:
            fill = more_seen & ~seen
            values[fill], valid[fill] = more[fill], more_valid[fill]
            seen |= more_seen
        return Pixels(values=values, valid=valid, counted=self._counted(layout))

    def reflectance(self, product: Product, band: str) -> tuple[Float32[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]:
        """One band of one product on the block's grid, and where it has data that is not saturated."""
        digital, ratio = self._window(product, band)
        usable = (digital != NODATA) & (digital != SATURATED)
        values = to_reflectance(digital, offset=product.offsets[band], scale=product.scale)
        if ratio >= 1:
            whole: Bool[np.ndarray, "H W"] = np.all(_blocks(usable, ratio), axis=(1, 3))
            return _blocks(values, ratio).mean(axis=(1, 3), dtype=np.float32), whole
        return self._repeat(values, ratio), self._repeat(usable, ratio)

    def _look(
        self, product: Product, layout: HistogramLayout
    ) -> tuple[Float32[np.ndarray, "C H W"], Bool[np.ndarray, "C H W"], Bool[np.ndarray, "C H W"]]:
        keep = keep_classes(layout.qa)
        values = np.empty((len(layout.bands), self.height, self.width), dtype=np.float32)
        seen = np.empty(values.shape, dtype=bool)
        for i, band in enumerate(layout.bands):
            values[i], seen[i] = self.reflectance(product, band)
        valid = seen.copy()
        if keep is not None:
            valid &= clear_sky(self._classes(product), keep)
        return values, seen, valid

    def _classes(self, product: Product) -> UInt8[np.ndarray, "H W"]:
        classes, ratio = self._window(product, "SCL")
        if ratio >= 1:
            middle = int(ratio) // 2  # nearest: the class of the pixel in the middle, classes have no mean
            return classes[middle :: int(ratio), middle :: int(ratio)]
        return self._repeat(classes, ratio)

    def _window(self, product: Product, band: str) -> tuple[Shaped[np.ndarray, "h w"], float]:
        """The block's stored pixels and how many of them (per side) make one of ours."""
        if band not in product.files:
            raise InputProblem(f"'{product.name}' has no {band} (it has {', '.join(sorted(product.files))})")
        href = product.files[band]
        with open_image(href) as image:
            _refuse_other_place(image, product, href)
            ratio = self.pixel_size / image.res[0]
            if not (ratio.is_integer() or (1 / ratio).is_integer()):
                raise InputProblem(f"'{href}' has pixels of {image.res[0]:g} m, which do not fit {self.pixel_size} m")
            top, left = math.floor(self.row * ratio), math.floor(self.column * ratio)
            bottom, right = math.ceil((self.row + self.height) * ratio), math.ceil((self.column + self.width) * ratio)
            try:
                return image.read(1, window=Window(left, top, right - left, bottom - top)), ratio
            except (RasterioError, UnicodeDecodeError) as problem:
                raise InputProblem(f"'{href}' cannot be read: {problem}. Download it again.") from None

    def _repeat(self, coarse: Shaped[np.ndarray, "h w"], ratio: float) -> Shaped[np.ndarray, "H W"]:
        times = round(1 / ratio)
        rows = (self.row + np.arange(self.height)) // times - self.row // times
        columns = (self.column + np.arange(self.width)) // times - self.column // times
        return coarse[np.ix_(rows, columns)]

    def _counted(self, layout: HistogramLayout) -> Bool[np.ndarray, "H W"]:
        grid = self.grid()
        ours = np.ones((self.height, self.width), dtype=bool)
        if self.ceded:
            ours = geometry_mask(self.ceded, out_shape=ours.shape, transform=grid.transform)
        classes = mask_classes(layout.mask)
        if classes is None:
            return ours
        if self.mask_map is None:
            raise InputProblem(f"the layout counts only '{layout.mask}', but no map was given: pass mask_map=")
        onto = {"crs": grid.crs.to_wkt(), "transform": grid.transform, "height": grid.height, "width": grid.width}
        with open_image(self.mask_map) as source, WarpedVRT(source, resampling=Resampling.nearest, **onto) as warped:
            return ours & np.isin(warped.read(1), classes)


def _blocks(values: Shaped[np.ndarray, "h w"], ratio: float) -> Shaped[np.ndarray, "H r W r"]:
    side = int(ratio)
    return values.reshape(values.shape[0] // side, side, values.shape[1] // side, side)


def open_image(href: str) -> rasterio.DatasetReader:
    """Open a path or address. Raises InputProblem if that does not work."""
    try:
        return rasterio.open(href)
    except (RasterioError, UnicodeDecodeError) as problem:
        raise InputProblem(f"'{href}' cannot be opened as an image: {str(problem).splitlines()[0]}") from None


def _refuse_other_place(image: rasterio.DatasetReader, product: Product, href: str) -> None:
    crs, bounds = place_of(image, href)
    if crs != product.crs or any(abs(a - b) > 1e-3 for a, b in zip(bounds, product.bounds, strict=True)):
        raise InputProblem(
            f"'{href}' covers {bounds} of {crs.name}, but '{product.name}' {product.bounds} of {product.crs.name}"
        )


def place_of(image: rasterio.DatasetReader, href: str) -> tuple[CRS, tuple[float, float, float, float]]:
    """Coordinate system and bounds. Raises InputProblem unless pixels are square and north is up, as in every tile."""
    turned = image.transform.b or image.transform.d or image.transform.e >= 0
    if image.crs is None or turned or abs(image.res[0] - image.res[1]) > 1e-6:
        raise InputProblem(
            f"'{href}' needs a coordinate system and square pixels with north up, as Sentinel-2 tiles have"
        )
    return CRS.from_wkt(image.crs.to_wkt()), tuple(image.bounds)


def find_products(path: Path, *, offset: float | None = None) -> list[Product]:
    """Every product at or below a folder: SAFE folders, and folders that hold one image per band.

    `offset` as in `offset_for`, for band folders that do not tell. Raises InputProblem if there is nothing.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputProblem(f"'{path}' is not a folder of Sentinel-2 products")
    found: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in _IMAGE and _band_in(file.stem) is not None:
            root = _root_of(file, path)
            found[root, "" if root.suffix == ".SAFE" else _look_in(file.stem)].append(file)
    products = [_product(root, files, offset) for (root, _), files in found.items()]
    if not products:
        raise InputProblem(
            f"no Sentinel-2 bands in '{path}'. Expected .SAFE folders, or files like T15TVH_20220604_B02.tif"
        )
    log.info("%s: %d products", path, len(products))
    return products


def _root_of(file: Path, top: Path) -> Path:
    """The SAFE folder that a file belongs to, else the folder that it lies in."""
    within = [parent for parent in file.parents if parent == top or top in parent.parents]
    safe = [p for p in within if p.suffix == ".SAFE" or (p / "MTD_MSIL2A.xml").exists()]
    return safe[0] if safe else file.parent


def _band_in(stem: str) -> str | None:
    if stem.startswith("MSK_"):  # quality masks carry a band's name too
        return None
    return next((band for part in re.split(r"[_.-]", stem) if (band := band_of(part)) is not None), None)


def _look_in(stem: str) -> str:
    """Tile and time that a file's own name carries, so that one folder may hold many dates."""
    tile, time = _TILE.search(_spaced(stem)), _TIME.search(stem)
    return f"{tile[1] if tile else ''} {time[0] if time else ''}"


def _spaced(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")


def _product(root: Path, files: Sequence[Path], offset: float | None) -> Product:
    chosen = _native_files(files)
    xml = root / "MTD_MSIL2A.xml"
    facts = read_metadata(xml) if xml.exists() else ProductMetadata()
    named = _BASELINE.search(f"{root.name}_")
    baseline = facts.baseline or (f"{named[1]}.{named[2]}" if named else None)
    first = next(iter(chosen.values()))
    tile, acquired = tile_and_time(f"{first.stem} {root.name}", str(first))
    headers = {band: _header(file) for band, file in chosen.items()}
    offsets = {}
    for band in [band for band in chosen if band != "SCL"]:
        offsets[band] = offset_for(
            from_xml=facts.offsets.get(band),
            from_raster=headers[band][2],
            baseline=baseline,
            asked=offset,
            source=root.name,
        )
    crs, bounds, _ = next(iter(headers.values()))
    return Product(
        name=root.name,
        tile=tile,
        acquired=acquired,
        baseline=baseline,
        files={band: str(file) for band, file in chosen.items()},
        offsets=offsets,
        scale=facts.scale,
        crs=crs,
        bounds=bounds,
    )


def tile_and_time(text: str, source: str) -> tuple[str, datetime]:
    """MGRS tile and first date or time that a name carries, e.g. "15TVH" and 2022-06-04 17:09:01."""
    tile, time = _TILE.search(_spaced(text)), _TIME.search(text)
    if tile is None or time is None:
        raise InputProblem(f"'{source}' names no tile and date. Rename it like T15TVH_20220604T170901_B02_10m.tif")
    try:
        return tile[1], datetime.strptime(time[1] + (time[2] or "000000"), "%Y%m%d%H%M%S")
    except ValueError:
        raise InputProblem(f"'{source}': '{time[0]}' is not a date, expected YYYYMMDD or YYYYMMDDTHHMMSS") from None


def _native_files(files: Sequence[Path]) -> dict[str, Path]:
    """One file per band: of the native pixel size, else of the nearest one that is there."""
    chosen: dict[str, tuple[float, Path]] = {}
    for file in files:
        band = _band_in(file.stem)
        if band is None:
            continue
        size = re.search(r"(\d{2})m$", file.stem)
        away = abs(math.log((int(size[1]) if size else BANDS[band].size) / BANDS[band].size))
        if band not in chosen or away < chosen[band][0]:
            chosen[band] = (away, file)
    return {band: file for band, (_, file) in sorted(chosen.items())}


def _header(file: Path) -> tuple[CRS, tuple[float, float, float, float], float | None]:
    """Place of an image and the offset in digital numbers that its band tags list, if they do."""
    with open_image(str(file)) as image:
        crs, bounds = place_of(image, str(file))
        tagged = image.scales[0] != 1  # without tags GDAL answers scale 1, offset 0
        return crs, bounds, round(image.offsets[0] / image.scales[0], 3) if tagged else None


@dataclass(frozen=True, kw_only=True)
class ProductMetadata:
    """What MTD_MSIL2A.xml says about the numbers."""

    baseline: str | None = None
    offsets: Mapping[str, float] = field(default_factory=dict)
    """Per band, in digital numbers; empty before baseline 04.00."""
    scale: float = 10000.0


def read_metadata(path: Path) -> ProductMetadata:
    """Baseline, offsets and scale from MTD_MSIL2A.xml. Raises InputProblem if it is damaged or of another level."""
    try:
        root = ElementTree.parse(path).getroot()
        names = {e.get("bandId"): _padded(e.get("physicalBand", "")) for e in root.iter("Spectral_Information")}
        offsets = {names[e.get("band_id")]: float(e.text or "") for e in root.iter("BOA_ADD_OFFSET")}
        scale = float(root.findtext(".//BOA_QUANTIFICATION_VALUE") or "nan")
        baseline = root.findtext(".//PROCESSING_BASELINE")
    except (ElementTree.ParseError, OSError, KeyError, ValueError) as problem:
        raise InputProblem(f"'{path}' is not readable product metadata: {problem!r}. Download it again.") from None
    if "Level-2A" not in root.tag:
        raise InputProblem(f"'{path}' is {root.tag.split('}')[-1]}, expected a Level-2A product (surface reflectance)")
    if baseline is None or not scale > 0:
        raise InputProblem(f"'{path}' lacks PROCESSING_BASELINE or a positive BOA_QUANTIFICATION_VALUE")
    _version(baseline, str(path))
    return ProductMetadata(baseline=baseline, offsets=offsets, scale=scale)


def _padded(band: str) -> str:
    return f"B{band[1:].zfill(2)}"


def sentinel2_scenes(
    inputs: Iterable[Path | Product],
    *,
    years: Iterable[int],
    layout: HistogramLayout,
    offset: float | None = None,
    max_cloud: float = 100.0,
    mask_map: Path | None = None,
    block: int = BLOCK,
) -> list[Sentinel2Scene]:
    """All blocks of all overpasses that fall in the layout's periods of the harvest `years`, in stable order.

    `inputs` are folders (see `find_products`) or products. Products cloudier than `max_cloud` per cent are left out
    where their metadata tell. Raises InputProblem if nothing is left, or if only one of the layout's mask and
    `mask_map` is given.
    """
    if (mask_classes(layout.mask) is None) != (mask_map is None):
        raise InputProblem(f"mask '{layout.mask}' and mask_map {mask_map} do not go together: give both or none")
    products: list[Product] = []
    for given in inputs:
        products += [given] if isinstance(given, Product) else find_products(given, offset=offset)
    wanted = set(years)
    scenes: list[Sentinel2Scene] = []
    looks = same_look([p for p in products if p.cloud_cover is None or p.cloud_cover <= max_cloud])
    ceded = ceded_to_others([group[0] for group in looks])
    for group in looks:
        period = period_of(group[0].acquired.date(), layout.doy)
        if period is not None and period[0] in wanted:
            whole = Sentinel2Scene(
                products=group,
                year=period[0],
                step=period[1],
                pixel_size=int(layout.pixel_size or 20),
                row=0,
                column=0,
                height=0,
                width=0,
                mask_map=None if mask_map is None else str(mask_map),
                ceded=ceded[group[0].tile, group[0].bounds],
            )
            scenes += _blocks_of(whole, block)
    if not scenes:
        dates = sorted({f"{p.acquired:%Y-%m-%d}" for p in products})
        seen = f"{dates[0]} to {dates[-1]}" if dates else "none"
        raise InputProblem(f"no Sentinel-2 image of {sorted(wanted)} in the season {layout.doy} (images: {seen})")
    return scenes


def same_look(products: Sequence[Product]) -> list[tuple[Product, ...]]:
    """Products of one tile and overpass together, newest baseline only, in order of tile and time."""
    groups: dict[tuple[str, datetime], list[Product]] = defaultdict(list)
    for product in products:
        groups[product.tile, product.acquired].append(product)
    looks = []
    for _, group in sorted(groups.items()):
        newest = max(_baseline_or_zero(product) for product in group)
        same = sorted((p for p in group if _baseline_or_zero(p) == newest), key=lambda p: p.name, reverse=True)
        if any(p.crs != same[0].crs or p.bounds != same[0].bounds for p in same):
            raise InputProblem(f"products of one overpass lie on different grids: {', '.join(p.name for p in same)}")
        looks.append(tuple(same))
    return looks


def _baseline_or_zero(product: Product) -> tuple[int, int]:
    return (0, 0) if product.baseline is None else _version(product.baseline, product.name)


def ceded_to_others(
    products: Sequence[Product],
) -> dict[tuple[str, tuple[float, float, float, float]], tuple[shapely.Polygon, ...]]:
    """(tile, bounds) -> the parts of it, in its own zone, that tiles with an earlier name cover too."""
    tiles = {(product.tile, product.bounds): product.crs for product in products}
    ceded: dict[tuple[str, tuple[float, float, float, float]], tuple[shapely.Polygon, ...]] = {}
    for place, crs in sorted(tiles.items(), key=lambda item: item[0]):
        own = shapely.box(*place[1])
        others = [_outline(other[1], tiles[other], crs) for other in ceded]
        ceded[place] = tuple(shape for shape in others if shape.intersection(own).area > 0)
    return ceded


def _outline(bounds: tuple[float, float, float, float], crs: CRS, onto: CRS) -> shapely.Polygon:
    shape = shapely.box(*bounds)
    if crs == onto:
        return shape
    # Edges bend between zones: with a vertex per kilometre the border is right to a few centimetres.
    project = Transformer.from_crs(crs, onto, always_xy=True).transform
    return shapely.transform(shapely.segmentize(shape, 1000.0), project, interleaved=False)


def _blocks_of(whole: Sentinel2Scene, block: int) -> list[Sentinel2Scene]:
    left, bottom, right, top = whole.products[0].bounds
    size = whole.pixel_size
    rows, columns = int((top - bottom + 1e-6) // size), int((right - left + 1e-6) // size)
    return [
        replace(whole, row=row, column=column, height=min(block, rows - row), width=min(block, columns - column))
        for row in range(0, rows, block)
        for column in range(0, columns, block)
    ]
