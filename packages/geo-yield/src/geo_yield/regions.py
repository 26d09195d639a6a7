"""Region polygons (counties, parcels): reading them, and burning their row numbers into a grid of pixels.

Decisions:
- A pixel belongs to the region that its centre lies in, so regions that share a border share no pixel. Where regions
  overlap the pixel goes to the first of them in the file, and the overlap is logged: a pixel counts once.
- Edges are cut to at most 1 km before they are projected. The long side of a county drawn with two vertices along a
  parallel is a curve on the MODIS sphere; projecting only its ends would move the border by several pixels.
- A polygon that spans more than half of the globe is taken for one that crosses the antimeridian unsplit, and refused:
  everything computed from it would be silently wrong. Split at 180 degrees (RFC 7946) it is fine.

The county table that earlier pipelines share (a CSV whose `geometry` column holds KML text) is read as well; its
`Latitude` and `Longitude` have lost signs, so points are computed from the polygons.
"""

import csv
import logging
from pathlib import Path
from xml.etree import ElementTree

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import rasterio.features
import shapely
from jaxtyping import Float32, Int32
from pyogrio.errors import DataLayerError, DataSourceError
from pyproj import CRS, Transformer
from shapely.errors import ShapelyError
from shapely.geometry.base import BaseGeometry

from geo_yield.errors import InputProblem
from geo_yield.scenes import Grid

ID_COLUMNS = ("region_id", "GEOID", "geoid", "GEOID10", "GEOID20", "FIPS", "fips", "adm_id", "id", "ID")
"""Names under which an id column is found without being told, in this order."""
WGS84 = CRS.from_epsg(4326)
_LONGEST_EDGE = 1000.0
"""Metres between vertices before projection."""
_METRES_PER_DEGREE = 111_320.0

log = logging.getLogger(__name__)


def read_regions(path: Path, *, id_column: str | None = None, layer: str | None = None) -> geopandas.GeoDataFrame:
    """Polygons with columns `region_id` (text, leading zeros kept) and `geometry`, in file order and the file's CRS.

    Reads GeoPackage, GeoJSON, Shapefile (also zipped), GeoParquet, and CSV with KML text (degrees) in a column
    `geometry`, of which rows without an id are left out and logged. FIPS codes that lost their zero are padded to five
    digits. `id_column` may be left out where one of `ID_COLUMNS` exists. Invalid polygons are repaired and logged.
    Raises InputProblem if the file is missing or unreadable, has no CRS, no id column, an empty or repeated id, a
    region without an area, or a polygon that crosses the antimeridian.
    """
    path = Path(path)
    if not path.exists():
        raise InputProblem(f"no region file at '{path}'")
    table = _read_kml_table(path) if path.suffix.lower() == ".csv" else _read_vector(path, layer)
    if not len(table):
        raise InputProblem(f"'{path}' holds no regions")
    column = _id_column(table, id_column, path)
    ids = _text_ids(table[column], column, path)
    if table.crs is None:
        raise InputProblem(f"'{path}' has no coordinate system (CRS). Save it with one, e.g. EPSG:4326")
    regions = geopandas.GeoDataFrame({"region_id": ids}, geometry=table.geometry.to_numpy(), crs=table.crs)
    if path.suffix.lower() == ".csv":
        regions = _with_ids_only(regions, path)
    _refuse_repeated(regions["region_id"], path)
    regions.geometry = _repaired(regions, path)
    _refuse_off_the_globe(regions, path)
    return regions


def rasterise(regions: geopandas.GeoDataFrame, grid: Grid) -> Int32[np.ndarray, "H W"]:
    """Row number + 1 of the region that each pixel's centre lies in, 0 where there is none.

    Only regions near the grid are projected. Where regions overlap the first row wins, and the overlap is logged.
    Raises InputProblem if `regions` has no CRS.
    """
    if regions.crs is None:
        raise InputProblem("regions need a coordinate system (CRS)")
    rows, shapes = _on_grid(regions, grid)
    labels = np.zeros((grid.height, grid.width), dtype=np.int32)
    if not len(rows):
        return labels
    options = {"out_shape": labels.shape, "transform": grid.transform}
    # a later shape overwrites an earlier one, hence backwards
    last_first = list(zip(shapes[::-1], (rows[::-1] + 1).tolist(), strict=True))
    rasterio.features.rasterize(last_first, out=labels, transform=grid.transform)
    times = rasterio.features.rasterize(
        shapes, default_value=1, merge_alg=rasterio.enums.MergeAlg.add, dtype="uint8", **options
    )
    if overlapping := int((times > 1).sum()):
        log.warning("%d pixels lie in more than one region; each counts for the first of them in the file", overlapping)
    return labels


def region_points(regions: geopandas.GeoDataFrame) -> tuple[Float32[np.ndarray, "N"], Float32[np.ndarray, "N"]]:
    """Longitude and latitude (WGS 84, degrees) of a point inside each region."""
    points = geopandas.GeoSeries(regions.geometry.representative_point(), crs=regions.crs).to_crs(WGS84)
    return points.x.to_numpy(dtype=np.float32), points.y.to_numpy(dtype=np.float32)


def project_densely(
    shapes: "np.ndarray[tuple[int], np.dtype[np.object_]]", source: CRS, target: CRS
) -> "np.ndarray[tuple[int], np.dtype[np.object_]]":
    """Geometries in another CRS, after their edges were cut to at most 1 km."""
    step = _LONGEST_EDGE / (_METRES_PER_DEGREE if source.is_geographic else source.axis_info[0].unit_conversion_factor)
    transformer = Transformer.from_crs(source, target, always_xy=True)
    dense = shapely.segmentize(shapely.force_2d(shapes), step)
    return shapely.transform(dense, lambda xy: np.column_stack(transformer.transform(xy[:, 0], xy[:, 1])))


def _read_vector(path: Path, layer: str | None) -> geopandas.GeoDataFrame:
    try:
        if path.suffix.lower() in (".parquet", ".geoparquet"):
            return geopandas.read_parquet(path)
        return geopandas.read_file(path, layer=layer) if layer else geopandas.read_file(path)
    except (DataSourceError, DataLayerError, ShapelyError, pa.ArrowException, ValueError, OSError) as problem:
        raise InputProblem(f"'{path}' cannot be read as polygons: {str(problem).splitlines()[0]}") from None


def _read_kml_table(path: Path) -> geopandas.GeoDataFrame:
    csv.field_size_limit(1 << 30)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, engine="c")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as problem:
        raise InputProblem(f"'{path}' is no readable CSV: {problem}") from None
    if "geometry" not in table:
        raise InputProblem(f"'{path}' needs a column 'geometry' with KML polygons, found {', '.join(table.columns)}")
    shapes = []
    for row, text in enumerate(table["geometry"]):
        try:
            shapes.append(_polygon_of_kml(text))
        except (ElementTree.ParseError, ValueError, ShapelyError) as problem:
            raise InputProblem(f"'{path}' has no KML polygon in row {row + 2}: {problem}") from None
    return geopandas.GeoDataFrame(table.drop(columns="geometry"), geometry=shapes, crs=WGS84)


def _polygon_of_kml(text: str) -> BaseGeometry:
    polygons = []
    for node in ElementTree.fromstring(text).iter("Polygon"):
        outer = _ring_of_kml(node.find("outerBoundaryIs"))
        holes = [_ring_of_kml(hole) for hole in node.findall("innerBoundaryIs")]
        polygons.append(shapely.Polygon(outer, holes))
    if not polygons:
        raise ValueError("no <Polygon> in it")
    return polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)


def _ring_of_kml(boundary: ElementTree.Element | None) -> list[tuple[float, float]]:
    text = None if boundary is None else boundary.findtext("LinearRing/coordinates")
    if not text:
        raise ValueError("a boundary without coordinates")
    points = [point.split(",") for point in text.split()]
    return [(float(point[0]), float(point[1])) for point in points if len(point) >= 2]


def _id_column(table: geopandas.GeoDataFrame, asked: str | None, path: Path) -> str:
    columns = [str(name) for name in table.columns if name != table.geometry.name]
    if asked is not None and asked not in columns:
        raise InputProblem(f"'{path}' has no column '{asked}'. It has: {', '.join(columns) or 'none'}")
    found = [asked] if asked is not None else [name for name in ID_COLUMNS if name in columns]
    if not found:
        raise InputProblem(
            f"which column of '{path}' names the regions? None of {', '.join(ID_COLUMNS)} is there. "
            f"It has: {', '.join(columns) or 'none'}. Say which one holds the ids"
        )
    return found[0]


def _text_ids(values: pd.Series, column: str, path: Path) -> list[str]:
    """Ids as text. FIPS codes get their leading zeros back, which tables lose on the way through a spreadsheet."""
    numbers = pd.api.types.is_numeric_dtype(values)
    if numbers and not (values.notna().all() and (values == values.round()).all()):
        raise InputProblem(f"column '{column}' of '{path}' must hold whole numbers or text as ids")
    ids = [str(int(value)) if numbers else ("" if pd.isna(value) else str(value).strip()) for value in values]
    if column.upper().startswith(("FIPS", "GEOID")) and all(
        len(text) in (0, 4, 5) and text.isdigit() for text in ids if text
    ):
        return [text.zfill(5) if text else text for text in ids]
    return ids


def _with_ids_only(regions: geopandas.GeoDataFrame, path: Path) -> geopandas.GeoDataFrame:
    named = regions["region_id"] != ""
    if not named.any():
        raise InputProblem(f"none of the {len(regions)} rows of '{path}' has an id")
    if not named.all():
        log.warning("%d of %d rows of '%s' have no id and are left out", (~named).sum(), len(regions), path)
    return regions[named].reset_index(drop=True)


def _refuse_repeated(ids: pd.Series, path: Path) -> None:
    if (ids == "").any():
        raise InputProblem(f"'{path}' has {(ids == '').sum()} regions without an id. Fill or remove them")
    repeated = ids[ids.duplicated()].unique()
    if len(repeated):
        raise InputProblem(
            f"'{path}' has {len(repeated)} ids more than once, e.g. '{repeated[0]}'. Merge their parts or rename"
        )


def _repaired(regions: geopandas.GeoDataFrame, path: Path) -> geopandas.GeoSeries:
    shapes = regions.geometry
    empty = shapes.isna() | shapes.is_empty
    if empty.any():
        raise InputProblem(
            f"region '{regions['region_id'][empty].iloc[0]}' of '{path}' has no geometry ({empty.sum()} in all)"
        )
    endless = ~np.isfinite([shapely.get_coordinates(shape).sum() for shape in shapes])
    if endless.any():
        raise InputProblem(f"region '{regions['region_id'][endless].iloc[0]}' of '{path}' has infinite coordinates")
    invalid = ~shapes.is_valid
    if invalid.any():
        log.warning("%d regions of '%s' had invalid polygons, which were repaired", invalid.sum(), path)
        shapes = shapes.where(
            ~invalid, geopandas.GeoSeries([_areas_of(s) for s in shapes.make_valid()], crs=shapes.crs)
        )
    flat = shapely.area(shapes.to_numpy()) <= 0
    if flat.any():
        raise InputProblem(
            f"region '{regions['region_id'][flat].iloc[0]}' of '{path}' has no area ({flat.sum()} such regions)"
        )
    return shapes


def _areas_of(shape: BaseGeometry) -> BaseGeometry:
    """Without the stray lines and points that a repair leaves."""
    parts = [part for part in shapely.get_parts(shape) if part.geom_type in ("Polygon", "MultiPolygon")]
    return shape if not parts or len(parts) == shapely.get_num_geometries(shape) else shapely.union_all(parts)


def _refuse_off_the_globe(regions: geopandas.GeoDataFrame, path: Path) -> None:
    if not regions.crs.is_geographic:
        return
    parts, owner = shapely.get_parts(regions.geometry.to_numpy(), return_index=True)
    bounds = shapely.bounds(parts)
    beyond = (bounds[:, 1] < -90.001) | (bounds[:, 3] > 90.001)
    if beyond.any():
        name = regions["region_id"].iloc[owner[beyond][0]]
        raise InputProblem(f"region '{name}' of '{path}' lies beyond a pole. Are longitude and latitude exchanged?")
    crossing = (bounds[:, 2] - bounds[:, 0] > 180) | (bounds[:, 0] < -180.001) | (bounds[:, 2] > 180.001)
    if crossing.any():
        name = regions["region_id"].iloc[owner[crossing][0]]
        raise InputProblem(
            f"region '{name}' of '{path}' crosses the antimeridian. Split it at 180 degrees into two parts"
        )


def _on_grid(
    regions: geopandas.GeoDataFrame, grid: Grid
) -> tuple[Int32[np.ndarray, "M"], "np.ndarray[tuple[int], np.dtype[np.object_]]"]:
    """Rows and projected shapes of the regions that may touch the grid."""
    source = CRS.from_user_input(regions.crs)
    near = _area_around(grid, source)
    everything = regions.geometry.to_numpy()
    rows = np.flatnonzero(shapely.intersects(everything, near))
    # cut first: the grid's projection may not reach the far end of a large region
    shapes = project_densely(shapely.intersection(everything[rows], near), source, grid.crs)
    defined = np.isfinite(shapely.bounds(shapes)).all(axis=1)
    for row in rows[~defined]:
        log.warning("region '%s' lies where the projection of the grid is undefined", regions["region_id"].iloc[row])
    return rows[defined].astype(np.int32), shapes[defined]


def _area_around(grid: Grid, target: CRS) -> BaseGeometry:
    """A box in `target` that holds the whole grid and some more. Empty if none of the grid lies on the globe."""
    steps = 32
    column, row = np.meshgrid(np.linspace(0, grid.width, steps + 1), np.linspace(0, grid.height, steps + 1))
    a, b, c, d, e, f = tuple(grid.transform)[:6]
    x, y = a * column + b * row + c, d * column + e * row + f
    points = np.stack(Transformer.from_crs(grid.crs, target, always_xy=True).transform(x.ravel(), y.ravel()))
    points = points[:, np.isfinite(points).all(axis=0)]
    if not points.size:
        return shapely.Polygon()
    low, high = points.min(axis=1), points.max(axis=1)
    margin = 2 * (high - low) / steps
    return shapely.box(*(low - margin), *(high + margin))
