"""Regions: what is read, what is refused, and which pixels a polygon gets."""

import logging
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyproj import CRS

from geo_yield.errors import InputProblem
from geo_yield.modis import tile_grid
from geo_yield.modis_files import sinusoidal
from geo_yield.regions import rasterise, read_regions, region_points
from geo_yield.scenes import Grid

COUNTIES = Path(__file__).resolve().parents[4] / "shared" / "data" / "us-county-polygons" / "county_data.csv"
UTM = CRS.from_epsg(32615)
GRID = Grid(crs=UTM, transform=Affine(10, 0, 500_000, 0, -10, 4_600_000), height=7, width=12)


def pixel_box(left: float, top: float, right: float, bottom: float) -> shapely.Polygon:
    """A box in columns and rows of GRID."""
    return shapely.box(500_000 + 10 * left, 4_600_000 - 10 * bottom, 500_000 + 10 * right, 4_600_000 - 10 * top)


def table(shapes, *, ids=None, crs: CRS | None = UTM, column: str = "region_id") -> geopandas.GeoDataFrame:
    ids = [f"r{number}" for number in range(len(shapes))] if ids is None else ids
    return geopandas.GeoDataFrame({column: ids}, geometry=list(shapes), crs=crs)


def save(folder: Path, frame: geopandas.GeoDataFrame, kind: str = "gpkg") -> Path:
    path = folder / f"regions.{kind}"
    frame.to_parquet(path) if kind == "parquet" else frame.to_file(path)
    return path


@pytest.mark.parametrize("kind", ["gpkg", "geojson", "shp", "parquet"])
def test_every_format_gives_ids_as_text_and_the_same_polygons(tmp_path, kind):
    shapes = [shapely.box(-93, 41, -92, 42), shapely.MultiPolygon([shapely.box(1, 2, 3, 4), shapely.box(6, 2, 7, 5)])]
    path = save(tmp_path, table(shapes, ids=["01001", "00207"], crs=CRS.from_epsg(4326), column="GEOID"), kind)
    regions = read_regions(path)
    assert list(regions.columns) == ["region_id", "geometry"]
    assert regions["region_id"].tolist() == ["01001", "00207"]
    assert all(a.equals(b) for a, b in zip(regions.geometry, shapes, strict=True))
    assert regions.crs == CRS.from_epsg(4326)


def test_id_column_is_taken_when_told_and_fips_numbers_get_their_zero(tmp_path):
    frame = table([pixel_box(0, 0, 1, 1), pixel_box(2, 0, 3, 1)], ids=[1001, 27003], column="FIPS")
    frame["farm"] = ["x", "y"]
    path = save(tmp_path, frame)
    assert read_regions(path)["region_id"].tolist() == ["01001", "27003"]
    assert read_regions(path, id_column="farm")["region_id"].tolist() == ["x", "y"]


def test_layers_of_a_geopackage(tmp_path):
    path = tmp_path / "two.gpkg"
    table([pixel_box(0, 0, 1, 1)], ids=["a"]).to_file(path, layer="one")
    table([pixel_box(0, 0, 1, 1)], ids=["b"]).to_file(path, layer="other")
    assert read_regions(path, layer="other")["region_id"].tolist() == ["b"]
    with pytest.raises(InputProblem, match="cannot be read as polygons"):
        read_regions(path, layer="third")


SQUARE = pixel_box(0, 0, 2, 3)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (table([SQUARE, SQUARE], ids=["07", "07"]), "1 ids more than once, e.g. '07'"),
        (table([SQUARE, SQUARE], ids=["07", None]), "1 regions without an id"),
        (table([SQUARE], column="farm"), "None of region_id, .* It has: farm"),
        (table([SQUARE, None]), "region 'r1' of .* has no geometry"),
        (table([SQUARE, shapely.Polygon()]), "region 'r1' of .* has no geometry"),
        (table([SQUARE, shapely.Point(500_005, 4_599_995)]), "region 'r1' of .* has no area"),
        (table([SQUARE], crs=None), "no coordinate system"),
        (table([SQUARE]).iloc[:0], "holds no regions"),
        (table([shapely.box(-179, 50, 179, 52)], crs=CRS.from_epsg(4326)), "'r0' .* crosses the antimeridian"),
        (table([shapely.box(178, 50, 182, 52)], crs=CRS.from_epsg(4326)), "'r0' .* crosses the antimeridian"),
        (table([shapely.box(41, -93, 42, -92)], crs=CRS.from_epsg(4326)), "'r0' .* longitude and latitude exchanged"),
        (table([SQUARE], ids=[1.5]), "whole numbers or text"),
    ],
)
@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_what_is_refused(tmp_path, frame, message):
    with pytest.raises(InputProblem, match=message):
        read_regions(save(tmp_path, frame, "parquet"))


def test_files_that_are_no_regions(tmp_path):
    with pytest.raises(InputProblem, match="no region file at"):
        read_regions(tmp_path / "none.gpkg")
    for kind in ("gpkg", "geojson", "parquet", "shp"):
        path = tmp_path / f"broken.{kind}"
        path.write_bytes(b"no polygons in here")
        with pytest.raises(InputProblem, match="cannot be read as polygons"):
            read_regions(path)
    with pytest.raises(InputProblem, match="no column 'name'"):
        read_regions(save(tmp_path, table([SQUARE])), id_column="name")


def test_split_at_the_antimeridian_is_fine(tmp_path):
    halves = shapely.MultiPolygon([shapely.box(178, 50, 180, 52), shapely.box(-180, 50, -179, 52)])
    regions = read_regions(save(tmp_path, table([halves], crs=CRS.from_epsg(4326))))
    assert len(regions) == 1


def test_invalid_polygons_are_repaired_and_told(tmp_path, caplog):
    bow = shapely.Polygon([(500_000, 4_600_000), (500_020, 4_599_980), (500_020, 4_600_000), (500_000, 4_599_980)])
    with caplog.at_level(logging.WARNING):
        regions = read_regions(save(tmp_path, table([bow, SQUARE])))
    assert regions.geometry.is_valid.all()
    assert regions.geometry[0].area == pytest.approx(200)
    assert "1 regions of" in caplog.text


KML = "<Polygon><outerBoundaryIs><LinearRing><coordinates>{}</coordinates></LinearRing></outerBoundaryIs>{}</Polygon>"
HOLE = "<innerBoundaryIs><LinearRing><coordinates>{}</coordinates></LinearRing></innerBoundaryIs>"


def ring(left: float, bottom: float, right: float, top: float) -> str:
    corners = [(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)]
    return " ".join(f"{x},{y}" for x, y in corners)


def test_kml_in_a_csv(tmp_path, caplog):
    shapes = [
        KML.format(ring(-93, 41, -89, 44), HOLE.format(ring(-92, 42, -91, 43))),
        f"<MultiGeometry>{KML.format(ring(0, 0, 1, 2), '')}{KML.format(ring(3, 0, 4, 2), '')}</MultiGeometry>",
        KML.format(ring(5, 5, 6, 6), ""),
    ]
    path = tmp_path / "counties.csv"
    pd.DataFrame({"FIPS": ["1001", "27003", ""], "geometry": shapes}).to_csv(path, index=False)
    with caplog.at_level(logging.WARNING):
        regions = read_regions(path)
    assert regions["region_id"].tolist() == ["01001", "27003"]
    assert shapely.area(regions.geometry.to_numpy()).tolist() == [11.0, 4.0]
    assert regions.crs == CRS.from_epsg(4326)
    assert "1 of 3 rows" in caplog.text
    for broken in ("<Polygon></Polygon>", "<Polygon", KML.format("1,2 3", "")):
        pd.DataFrame({"FIPS": ["1"], "geometry": [broken]}).to_csv(path, index=False)
        with pytest.raises(InputProblem, match="no KML polygon in row 2"):
            read_regions(path)


def test_pixels_by_their_centres(caplog):
    shapes = [
        shapely.difference(pixel_box(0, 0, 5, 5), pixel_box(1, 1, 3, 4)),  # with a hole
        shapely.MultiPolygon([pixel_box(6, 0, 7, 2), pixel_box(9, 3, 11, 4)]),  # two parts
        pixel_box(8.1, 5.1, 8.4, 5.4),  # smaller than a pixel, off its centre
        pixel_box(8.4, 6.4, 8.6, 6.6),  # smaller than a pixel, on its centre
        pixel_box(40, 0, 42, 2),  # outside
        pixel_box(3.4, 5.4, 4.6, 6.6),  # centres of columns 3, 4 and rows 5, 6
    ]
    expected = np.zeros((7, 12), dtype=int)
    expected[0:5, 0:5] = 1
    expected[1:4, 1:3] = 0
    expected[0:2, 6] = 2
    expected[3, 9:11] = 2
    expected[6, 8] = 4
    expected[5:7, 3:5] = 6
    with caplog.at_level(logging.WARNING):
        labels = rasterise(table(shapes), GRID)
    assert labels.dtype == np.int32
    assert labels.tolist() == expected.tolist()
    assert not caplog.text


def test_overlaps_go_to_the_first_region_and_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        labels = rasterise(table([pixel_box(2, 1, 5, 3), pixel_box(4, 0, 8, 4)]), GRID)
    assert labels[:4, 2:8].tolist() == [[0, 0, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2], [0, 0, 2, 2, 2, 2]]
    assert "2 pixels lie in more than one region" in caplog.text


def test_south_up_grid_is_the_mirror_image():
    regions = table([pixel_box(2, 1, 5, 3), pixel_box(6, 0, 8, 4)])
    up = Grid(crs=UTM, transform=Affine(10, 0, 500_000, 0, 10, 4_600_000 - 70), height=7, width=12)
    assert np.array_equal(rasterise(regions, up), rasterise(regions, GRID)[::-1])


def test_a_long_edge_along_a_parallel_is_a_curve_in_utm():
    """44 N from 96 to 90 W: in UTM zone 15 its middle lies 2.9 km south of the straight line between its ends."""
    regions = table([shapely.box(-96, 43, -90, 44)], crs=CRS.from_epsg(4326))
    dense = geopandas.GeoSeries([shapely.Point(-93, 43.999), shapely.Point(-93, 44.001)], crs=4326).to_crs(UTM)
    grid = Grid(crs=UTM, transform=Affine(50, 0, 499_975, 0, -50, dense.y.max() + 400), height=20, width=2)
    inside = rasterise(regions, grid)[:, 0]
    border = grid.transform.f - 50 * int(np.argmax(inside))
    assert dense.y[0] - 50 <= border <= dense.y[1] + 50
    assert inside[0] == 0
    assert inside[-1] == 1


def test_five_thousand_regions_and_their_points():
    row, column = (index.ravel() for index in np.mgrid[0:50, 0:100])
    shapes = shapely.box(
        500_000 + 20 * column, 4_600_000 - 20 * (row + 1), 500_000 + 20 * (column + 1), 4_600_000 - 20 * row
    )
    regions = table(shapes)
    grid = Grid(crs=UTM, transform=GRID.transform, height=103, width=210)
    labels = rasterise(regions, grid)
    assert np.array_equal(labels[:100, :200], np.repeat(np.repeat(np.arange(1, 5001).reshape(50, 100), 2, 0), 2, 1))
    assert not labels[100:].any()
    assert not labels[:, 200:].any()
    lon, lat = region_points(regions)
    assert lon.dtype == np.float32
    assert lon[0] == pytest.approx(-92.99988, abs=1e-4)  # ten metres east of the central meridian
    assert lat[4999] < lat[0] == pytest.approx(41.5508, abs=1e-3)


@pytest.mark.real
@pytest.mark.skipif(not COUNTIES.exists(), reason="the real data are not beside the checkout")
def test_real_counties_on_a_real_tile():
    counties = read_regions(COUNTIES)
    assert len(counties) == 3136
    assert counties["region_id"].str.fullmatch(r"\d{5}").all()
    assert {"01001", "31065", "46113"} <= set(counties["region_id"])
    coarse = tile_grid("h10v04", pixels=1200)
    labels = rasterise(counties, coarse)
    lon, lat = region_points(counties)
    furnas = counties["region_id"].tolist().index("31065")
    assert (lon[furnas], lat[furnas]) == pytest.approx((-99.9, 40.2), abs=0.15)
    area = (labels == furnas + 1).sum() * coarse.transform.a**2 / 1e6
    assert area == pytest.approx(721 * 2.59, rel=0.05)  # km2; US Census, and the outline is simplified
    assert area == pytest.approx(counties.to_crs(sinusoidal()).geometry[furnas].area / 1e6, rel=0.01)


NASTY = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", "-", "<Polygon>", KML.format("", ""), KML.format("nan,nan 1,2 3,4", ""), KML.format("1,2", "")]
    ),
    st.builds(KML.format, st.lists(st.floats().map(lambda x: f"{x},{x}"), max_size=5).map(" ".join), st.just("")),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(NASTY, NASTY), max_size=4), header=st.sampled_from(["FIPS,geometry", "a,b", "", "geometry"])
)
@pytest.mark.filterwarnings("ignore")
def test_any_csv_is_read_or_refused_in_one_sentence(tmp_path, rows, header):
    path = tmp_path / "nasty.csv"
    frame = pd.DataFrame(rows, columns=["x", "y"])
    path.write_text(header + "\n" + frame.to_csv(index=False, header=False), encoding="utf-8", errors="replace")
    try:
        regions = read_regions(path)
    except InputProblem as problem:
        said = str(problem)
    else:
        said = str(path)
        assert regions["region_id"].is_unique
        assert regions.geometry.area.min() > 0
    assert str(path) in said
