"""STAC catalogues: items from a saved file or a live search, filtered, grouped by day, and made into scenes or a cube.

A saved search is a first-class input: everything but `search_items` and `load_cube` works offline and without extras.
Item fields: STAC 1.0 and 1.1 (stacspec.org) with the eo, projection and raster extensions; the solar day of a look is
its UTC time shifted by one hour per 15 degrees of longitude, as in odc-stac (opendatacube/odc-stac).

Where an asset is looked for: with an `assets_root`, below it at the address's own path, in a folder named after the
item, or under its file name; without one, at its address (GDAL reads https and s3), a relative one beside the JSON.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from pyproj import CRS
from pyproj.exceptions import CRSError

from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramLayout
from geo_yield.modis import ModisScene, modis_scenes
from geo_yield.sentinel2 import (
    SENSOR,
    Product,
    Sentinel2Scene,
    band_of,
    offset_for,
    open_image,
    place_of,
    read_metadata,
    sentinel2_scenes,
    tile_and_time,
    to_reflectance,
)
from geo_yield.whole_files import whole_file

if TYPE_CHECKING:
    import xarray

_METADATA_ASSETS = ("product_metadata", "product-metadata")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One catalogue item, as far as it is used."""

    id: str
    collection: str
    start: datetime
    """UTC; the start of the period where an item covers one."""
    bbox: tuple[float, ...]
    properties: Mapping[str, Any] = field(repr=False)
    assets: Mapping[str, Mapping[str, Any]] = field(repr=False)
    base: Path | None = None
    """Folder that relative addresses count from."""

    @property
    def cloud_cover(self) -> float | None:
        """Per cent, None where the catalogue does not say."""
        value = self.properties.get("eo:cloud_cover")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputProblem(f"item '{self.id}' has eo:cloud_cover {value!r}, expected per cent")
        return None if value is None else float(value)

    @property
    def solar_day(self) -> date:
        """Date by the sun at the middle of the item."""
        west, east = self.bbox[0], self.bbox[len(self.bbox) // 2]
        middle = (west + (east if east >= west else east + 360)) / 2  # west > east: across the antimeridian
        middle = (middle + 180) % 360 - 180
        return (self.start + timedelta(hours=middle / 15)).date()


def read_items(path: Path) -> list[Item]:
    """Items from a JSON file (one item, an ItemCollection, a plain list), or from every JSON file of a folder.

    Raises InputProblem on a file that is no JSON, holds something else, or an item without id, time, box or assets.
    """
    path = Path(path)
    if not path.exists():
        raise InputProblem(f"no STAC items at '{path}'")
    files = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".geojson")) if path.is_dir() else [path]
    items = [_item(raw, file) for file in files for raw in _raw_items(file)]
    if not items:
        raise InputProblem(f"'{path}' holds no STAC items")
    return items


def _raw_items(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as problem:
        raise InputProblem(f"'{file}' is no readable JSON: {problem}") from None
    if isinstance(content, list):
        return content
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "FeatureCollection" and isinstance(content.get("features"), list):
        return content["features"]
    if kind == "Feature":
        return [content]
    raise InputProblem(
        f"'{file}' is {kind or type(content).__name__}, expected STAC items: Feature or FeatureCollection"
    )


def _item(raw: Any, file: Path | None) -> Item:
    where = f"'{file}'" if file else "the catalogue's answer"
    name = raw.get("id") if isinstance(raw, dict) else None
    if not isinstance(name, str) or not name:
        raise InputProblem(f"{where} holds something that is no STAC item: it has no id")
    properties, assets, bbox = raw.get("properties"), raw.get("assets"), raw.get("bbox")
    if not isinstance(properties, dict) or not _are_assets(assets):
        raise InputProblem(f"item '{name}' in {where} lacks properties, or assets with an href each")
    if not isinstance(bbox, list) or len(bbox) not in (4, 6) or not all(isinstance(v, int | float) for v in bbox):
        raise InputProblem(f"item '{name}' in {where} needs a bbox of 4 or 6 numbers, got {bbox}")
    time = str(properties.get("datetime") or properties.get("start_datetime"))
    try:
        start = datetime.fromisoformat(time)
    except ValueError:
        raise InputProblem(
            f"item '{name}' in {where} has datetime '{time}', expected one like 2022-06-04T17:09:01Z"
        ) from None
    return Item(
        id=name,
        collection=raw.get("collection") or "",
        start=(start.astimezone(UTC) if start.tzinfo else start).replace(tzinfo=None),
        bbox=tuple(map(float, bbox)),
        properties=properties,
        assets=assets,
        base=file.parent if file else None,
    )


def _are_assets(assets: Any) -> bool:
    return isinstance(assets, dict) and all(
        isinstance(a, dict) and isinstance(a.get("href"), str) for a in assets.values()
    )


def search_items(
    url: str,
    *,
    collections: Sequence[str],
    geometry: Mapping[str, Any],
    dates: str,
    max_cloud: float | None = None,
) -> list[Item]:
    """Ask a live STAC API. `geometry` is GeoJSON in degrees, `dates` like "2022-04-01/2022-09-30".

    Addresses of the Planetary Computer are signed, and good for about an hour. Raises InputProblem if the extra `stac`
    is missing, the catalogue does not answer, or nothing fits.
    """
    try:
        import planetary_computer
        import pystac_client
        from pystac_client.exceptions import APIError
    except ImportError:
        raise InputProblem("searching a catalogue needs geo-yield[stac]: uv add 'geo-yield[stac]'") from None
    sign = planetary_computer.sign_inplace if "planetarycomputer" in url else None
    query = None if max_cloud is None else {"eo:cloud_cover": {"lte": max_cloud}}
    try:
        client = pystac_client.Client.open(url, modifier=sign)
        search = client.search(collections=list(collections), intersects=dict(geometry), datetime=dates, query=query)
        found = search.item_collection_as_dict()["features"]
    except (APIError, OSError, ValueError) as problem:
        raise InputProblem(f"'{url}' gave no answer: {problem}. Check the address and the network.") from None
    if not found:
        raise InputProblem(f"'{url}' has nothing of {', '.join(collections)} there in {dates}")
    return [_item(raw, None) for raw in found]


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Save a search as an ItemCollection that `read_items` and other STAC programs read."""
    features = [
        {
            "type": "Feature",
            "stac_version": "1.0.0",
            "id": item.id,
            "collection": item.collection,
            "bbox": list(item.bbox),
            "geometry": None,
            "links": [],
            "properties": dict(item.properties),
            "assets": {name: dict(asset) for name, asset in item.assets.items()},
        }
        for item in items
    ]
    with whole_file(path) as partial:
        partial.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def cloud_below(items: Iterable[Item], max_cloud: float) -> list[Item]:
    """Items with at most `max_cloud` per cent of cloud. One without the figure stays: pixels are masked anyway."""
    return [item for item in items if item.cloud_cover is None or item.cloud_cover <= max_cloud]


def by_solar_day(items: Iterable[Item]) -> dict[date, list[Item]]:
    """Items of one day by the sun together, days in order: the tiles of one pass, whatever UTC date it crosses."""
    days: dict[date, list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: (item.start, item.id)):
        days[item.solar_day].append(item)
    return dict(sorted(days.items()))


def asset_file(item: Item, name: str, assets_root: Path | None = None) -> str:
    """Path or address of an asset. Raises InputProblem if it is to be on disk and is not there."""
    href = item.assets[name]["href"]
    remote = "://" in href and not href.startswith("file://")
    local = Path(urlparse(href).path if "://" in href else href)
    if assets_root is not None:
        inside = Path(*[part for part in local.parts if part not in ("/", "..", ".")])
        places = [assets_root / inside, assets_root / item.id / inside.name, assets_root / inside.name]
    elif remote:
        return href
    else:
        places = [(item.base or Path()) / local]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise InputProblem(f"asset {name} of '{item.id}' is in none of {', '.join(map(str, places))}")
    return str(found)


def sentinel2_products(
    items: Iterable[Item], *, assets_root: Path | None = None, offset: float | None = None
) -> list[Product]:
    """Sentinel-2 L2A items of any catalogue as products. Bands that are not on disk under `assets_root` are left out.

    Raises InputProblem on items of other products, without tile or offset, and on files that two items would share.
    """
    products = [_sentinel2_product(item, assets_root, offset) for item in items]
    owner: dict[str, str] = {}
    for product in products:
        for file in product.files.values():
            if owner.setdefault(file, product.name) != product.name:
                raise InputProblem(
                    f"'{file}' would serve both '{owner[file]}' and '{product.name}': give each item a folder of its id"
                )
    return products


def _sentinel2_product(item: Item, assets_root: Path | None, offset: float | None) -> Product:
    _refuse_other_products(item)
    assets = {band: name for name in item.assets if (band := band_of(name)) is not None}
    files = {}
    for band, name in sorted(assets.items()):
        try:
            files[band] = asset_file(item, name, assets_root)
        except InputProblem:
            if assets_root is None:
                raise
    if not files:
        raise InputProblem(
            f"no Sentinel-2 band of '{item.id}' is in '{assets_root}' (assets: {', '.join(item.assets)})"
        )
    tile, acquired = tile_and_time(f"{_product_title(item)} {item.start:%Y%m%dT%H%M%S} {_tile(item)}", item.id)
    crs, bounds = _place(item, assets, files)
    return Product(
        name=item.id,
        tile=tile,
        acquired=acquired,
        baseline=_baseline(item),
        files=files,
        offsets=item_offsets(item, assets_root=assets_root, asked=offset),
        crs=crs,
        bounds=bounds,
        cloud_cover=item.cloud_cover,
    )


def _refuse_other_products(item: Item) -> None:
    text = f"{item.collection} {item.id}".lower()
    for mark, what in (("hls", "HLS, whose bands are numbered otherwise"), ("l1c", "Level-1C"), ("modis", "MODIS")):
        if mark in text:
            raise InputProblem(f"item '{item.id}' of '{item.collection}' is {what}; expected Sentinel-2 Level-2A")


def _tile(item: Item) -> str:
    known = item.properties
    if text := known.get("s2:mgrs_tile") or str(known.get("grid:code", "")).removeprefix("MGRS-"):
        return str(text)
    for prefix, zone in (("mgrs", "mgrs:utm_zone"), ("sentinel", "sentinel:utm_zone")):
        if zone in known:
            square = f"{known.get(f'{prefix}:latitude_band')}{known.get(f'{prefix}:grid_square')}"
            return f"{str(known[zone]).zfill(2)}{square}"
    return item.id


def _product_title(item: Item) -> str:
    """ESA's name of the product, whose time is the same for all parts of an overpass; empty if the item lacks it."""
    known = item.properties
    return str(known.get("s2:product_uri") or known.get("sentinel:product_id") or "")


def _baseline(item: Item) -> str | None:
    if (known := item.properties.get("s2:processing_baseline")) is not None:
        return str(known)
    part = next((part for part in _product_title(item).split("_") if len(part) == 5 and part[1:].isdigit()), None)
    return f"{part[1:3]}.{part[3:]}" if part and part[0] == "N" else None


def item_offsets(item: Item, *, assets_root: Path | None = None, asked: float | None = None) -> dict[str, float]:
    """Offset in digital numbers of every reflectance band of an item, decided by `geo_yield.sentinel2.offset_for`.

    The product's XML is asked where it is on disk.
    """
    from_xml: Mapping[str, float] = {}
    for name in _METADATA_ASSETS:
        if name in item.assets:
            try:
                from_xml = read_metadata(Path(asset_file(item, name, assets_root))).offsets
            except InputProblem:
                continue  # the XML is usually left behind; the catalogue's own fields come next
    applied = item.properties.get("earthsearch:boa_offset_applied") is True
    bands = {band: name for name in item.assets if (band := band_of(name)) not in (None, "SCL")}
    return {
        band: offset_for(
            from_xml=from_xml.get(band),
            from_raster=_raster_offset(item.assets[name]),
            baseline=_baseline(item),
            applied=applied,
            asked=asked,
            source=item.id,
        )
        for band, name in bands.items()
        if band is not None
    }


def _raster_offset(asset: Mapping[str, Any]) -> float | None:
    """The listed offset in digital numbers: raster:bands of STAC 1.0, raster:offset of 1.1."""
    described = [*(asset.get("raster:bands") or []), *(asset.get("bands") or []), asset]
    for band in described:
        for prefix in ("", "raster:"):
            if f"{prefix}offset" in band:
                try:
                    return round(float(band[f"{prefix}offset"]) / float(band.get(f"{prefix}scale", 1e-4)), 3)
                except (TypeError, ValueError, ZeroDivisionError):
                    raise InputProblem(f"asset '{asset['href']}' lists an offset or scale that is no number") from None
    return None


def _place(
    item: Item, assets: Mapping[str, str], files: Mapping[str, str]
) -> tuple[CRS, tuple[float, float, float, float]]:
    band = next(iter(files))
    asset = item.assets[assets[band]]
    code = item.properties.get("proj:code") or item.properties.get("proj:epsg")
    transform, shape = (asset.get(f"proj:{key}", item.properties.get(f"proj:{key}")) for key in ("transform", "shape"))
    if code is None or transform is None or shape is None:
        with open_image(files[band]) as image:
            return place_of(image, files[band])
    try:
        width, _, left, _, height, top = map(float, transform[:6])
        return CRS.from_user_input(code), (left, top + height * shape[0], left + width * shape[1], top)
    except (CRSError, TypeError, ValueError, IndexError) as problem:
        raise InputProblem(f"item '{item.id}' has unreadable projection fields: {problem}") from None


def stac_scenes(
    items: Sequence[Item],
    *,
    years: Iterable[int],
    layout: HistogramLayout,
    assets_root: Path | None = None,
    offset: float | None = None,
    max_cloud: float = 100.0,
    mask_map: Path | None = None,
) -> list[Sentinel2Scene] | list[ModisScene]:
    """Scenes of the layout's sensor. Sentinel-2 may lie anywhere GDAL reads, MODIS must be on disk.

    `offset`, `max_cloud`, `mask_map` are those of `sentinel2_scenes`. Raises InputProblem as the readers do.
    """
    if layout.sensor == SENSOR:
        products = sentinel2_products(cloud_below(items, max_cloud), assets_root=assets_root, offset=offset)
        return sentinel2_scenes(products, years=years, layout=layout, mask_map=mask_map)
    if layout.sensor == "modis":
        return modis_scenes(modis_files(items, assets_root=assets_root), years=years)
    raise InputProblem(f"no catalogue has '{layout.sensor}' scenes, expected {SENSOR} or modis")


def modis_files(items: Iterable[Item], *, assets_root: Path | None = None) -> list[Path]:
    """Files on disk of MODIS items: every layer or granule that is there. Raises InputProblem if none is."""
    files: list[Path] = []
    for item in items:
        for name, asset in item.assets.items():
            if Path(urlparse(asset["href"]).path).suffix.lower() not in (".tif", ".tiff", ".hdf"):
                continue
            try:
                files.append(Path(asset_file(item, name, assets_root)))
            except InputProblem:
                continue  # catalogues list a dozen layers that nobody downloads; modis_scenes names what it misses
    files = [file for file in files if file.exists()]
    if not files:
        raise InputProblem(
            f"no file of the MODIS items is in '{assets_root or '.'}'. Download them, give their folder."
        )
    return sorted(set(files))


def load_cube(
    items: Sequence[Item],
    *,
    bands: Sequence[str],
    crs: str,
    resolution: float,
    bbox: tuple[float, float, float, float] | None = None,
    assets_root: Path | None = None,
    offset: float | None = None,
    chunks: Mapping[str, int] | None = None,
) -> "xarray.Dataset":
    """Sentinel-2 reflectance (and SCL) as a cube with dimensions time, y, x; one time per solar day.

    For people who want arrays rather than histograms: bands by averaging, SCL by nearest neighbour, NaN without data.
    `bbox` is in degrees; `chunks` makes it lazy (dask). Raises InputProblem without geo-yield[stac], or if the items
    mix offsets, since tiles of one day are merged before they can be shifted.
    """
    try:
        import odc.stac
        import pystac
    except ImportError:
        raise InputProblem("loading a cube needs geo-yield[stac]: uv add 'geo-yield[stac]'") from None
    names = [name for band in bands if (name := band_of(band)) is not None]
    if len(names) != len(bands):
        raise InputProblem(f"unknown band among {', '.join(bands)}")
    offsets = [item_offsets(item, assets_root=assets_root, asked=offset) for item in items]
    wanted = {name: {each[name] for each in offsets} for name in names if name != "SCL"}
    if any(len(values) > 1 for values in wanted.values()):
        raise InputProblem("items of before and after baseline 04.00 differ in offset: load them apart and concatenate")
    cube = odc.stac.load(
        [pystac.Item.from_dict(_with_canonical_assets(item, assets_root)) for item in items],
        bands=names,
        crs=crs,
        resolution=resolution,
        bbox=bbox,
        groupby="solar_day",
        chunks=None if chunks is None else dict(chunks),
        nodata=0,
        resampling={"SCL": "nearest", "*": "average"},
    )
    for name, values in wanted.items():
        digital = cube[name]
        shifted = digital.copy(data=to_reflectance(digital.data, offset=values.pop()))
        cube[name] = shifted.where((digital != 0) & (digital != 65535))
    return cube


def _with_canonical_assets(item: Item, assets_root: Path | None) -> dict[str, Any]:
    """The item as STAC, its band assets under ESA's names and where they are."""
    west, south, east, north = (*item.bbox[:2], *item.bbox[len(item.bbox) // 2 :][:2])
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    assets = {
        band: {**item.assets[name], "href": asset_file(item, name, assets_root)}
        for name in item.assets
        if (band := band_of(name)) is not None and _is_there(item, name, assets_root)
    }
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [
            "https://stac-extensions.github.io/projection/v1.1.0/schema.json",
            "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
        ],
        "id": item.id,
        "collection": item.collection or "sentinel-2-l2a",
        "bbox": list(item.bbox),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "links": [],
        "properties": {**item.properties, "datetime": item.start.isoformat() + "Z"},
        "assets": {band: {key: v for key, v in asset.items() if key != "eo:bands"} for band, asset in assets.items()},
    }


def _is_there(item: Item, name: str, assets_root: Path | None) -> bool:
    try:
        asset_file(item, name, assets_root)
    except InputProblem:
        return False
    return True
