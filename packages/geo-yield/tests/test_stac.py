"""Catalogue items: the real ones of four catalogues, and small local files behind items of the same fields."""

import json
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from geo_yield.errors import InputProblem
from geo_yield.modis import modis_layout
from geo_yield.sentinel2 import BANDS, sentinel2_layout
from geo_yield.stac import (
    asset_file,
    by_solar_day,
    cloud_below,
    item_offsets,
    load_cube,
    modis_files,
    read_items,
    search_items,
    sentinel2_products,
    stac_scenes,
    write_items,
)

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "stac-items"
EARTH_SEARCH_V0 = "S2A_28QCH_20200714_0_L2A.json"
PLANETARY = "S2B_MSIL2A_20190629T212529_R043_T06VVN_20201006T080531.json"
PLANETARY_RASTER = "S2B_MSIL2A_20190629T212529_R043_T06VVN_20201006T080531_raster_ext.json"
STACTOOLS = "S2A_MSIL2A_20230625_N0509_T01WCP_stactools.json"
SEARCH = "site2-2020_jun_jul-35MNM.geojson"
LEFT, TOP = 500_000, 4_600_020


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip("the real STAC items are not beside the checkout")
    return REAL / name


def raw_item(name: str = "S2A_15TVH_20220604_0_L2A", **properties) -> dict:
    """An item in the style of Earth Search v1: common names, band offset listed, tile in three fields."""
    scales = [{"nodata": 0, "data_type": "uint16", "scale": 0.0001, "offset": -0.1}]
    return {
        "type": "Feature",
        "id": name,
        "collection": "sentinel-2-l2a",
        "bbox": [-93.0, 41.54968, -92.99568, 41.55185],
        "geometry": None,
        "properties": {
            "datetime": "2022-06-04T17:09:01.024Z",
            "proj:epsg": 32615,
            "eo:cloud_cover": 12.5,
            "mgrs:utm_zone": 15,
            "mgrs:latitude_band": "T",
            "mgrs:grid_square": "VH",
            "s2:processing_baseline": "04.00",
        }
        | properties,
        "assets": {
            asset: {
                "href": f"https://example.com/cogs/{name}/{file}.tif",
                "proj:shape": [240 // size, 360 // size],
                "proj:transform": [size, 0, LEFT, 0, -size, TOP],
                "raster:bands": scales if asset != "scl" else [{"nodata": 0}],
            }
            for asset, file, size in (("blue", "B02", 10), ("swir16", "B11", 20), ("scl", "SCL", 20))
        },
    }


def pixels(band: str) -> np.ndarray:
    size = BANDS[band].size
    row, column = np.ogrid[: 240 // size, : 360 // size]
    return (2000 * list(BANDS).index(band) + 40 * row + column).astype(np.uint16)


def write_assets(folder: Path, *, shift: int = 0) -> None:
    folder.mkdir(parents=True)
    for band in ("B02", "B11", "SCL"):
        size = BANDS[band].size
        values = np.full((12, 18), 4, dtype=np.uint8) if band == "SCL" else (pixels(band) + shift).astype(np.uint16)
        profile = {"driver": "GTiff", "count": 1, "dtype": values.dtype, "crs": "EPSG:32615", "nodata": 0}
        height, width = values.shape
        place = Affine(size, 0, LEFT, 0, -size, TOP)
        with rasterio.open(
            folder / f"{band}.tif", "w", height=height, width=width, transform=place, **profile
        ) as image:
            image.write(values, 1)


def saved(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.real
def test_every_kind_of_file_reads():
    counts = {name: len(read_items(real(name))) for name in (PLANETARY, SEARCH, "HLS_IL_ADAMS_2018_items.json")}
    assert list(counts.values()) == [1, 13, 10]
    with pytest.raises(InputProblem, match="is Collection, expected STAC items"):
        read_items(real("sentinel-2-l2a.collection.json"))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "offset", "tile", "seen"),
    [
        (EARTH_SEARCH_V0, 0, "28QCH", datetime(2020, 7, 14, 11, 52, 21)),
        (PLANETARY, 0, "06VVN", datetime(2019, 6, 29, 21, 25, 29)),
        (PLANETARY_RASTER, 0, "06VVN", datetime(2019, 6, 29, 21, 25, 29)),
        (STACTOOLS, -1000, "01WCP", datetime(2023, 6, 25, 23, 46, 21)),
    ],
)
def test_items_of_every_catalogue_give_the_right_offset_tile_and_place(name, offset, tile, seen, tmp_path):
    (item,) = read_items(real(name))
    assert set(item_offsets(item)) == {band for band in BANDS if band != "SCL"}
    assert set(item_offsets(item).values()) == {offset}
    for asset in item.assets.values():
        place = tmp_path / item.id / Path(asset["href"]).name
        place.parent.mkdir(exist_ok=True)
        place.touch()
    (product,) = sentinel2_products([item], assets_root=tmp_path)
    assert (product.tile, product.acquired) == (tile, seen)
    left, top = {"28QCH": (300000, 2300040), "06VVN": (399960, 6800040), "01WCP": (300000, 7400040)}[tile]
    assert product.bounds == (left, top - 109800, left + 109800, top)
    zone = int(tile[:2])
    assert product.crs.to_epsg() == 32600 + zone
    assert product.files["B05"].endswith(("B05.tif", "B05_20m.tif", "B05_20m.jp2"))


@pytest.mark.real
def test_a_new_baseline_without_band_offsets_is_decided_by_the_baseline():
    (item,) = read_items(real(PLANETARY))
    newer = replace(item, properties={**item.properties, "s2:processing_baseline": "05.00"})
    assert set(item_offsets(newer).values()) == {-1000}


@pytest.mark.real
def test_a_shifted_item_is_never_shifted_again():
    (item,) = read_items(real(STACTOOLS))
    item = replace(item, properties={**item.properties, "earthsearch:boa_offset_applied": True})
    assert set(item_offsets(item).values()) == {0}
    with pytest.raises(InputProblem, match="shifted already"):
        item_offsets(item, asked=-1000.0)


@pytest.mark.real
def test_the_xml_beside_an_item_goes_before_its_fields(tmp_path):
    (item,) = read_items(real(STACTOOLS))
    xml = (REAL / "S2A_MSIL2A_20190212_N0212_T07HFE_MTD_MSIL2A.xml").read_text()
    (tmp_path / "MTD_MSIL2A.xml").write_text(xml.replace("</QUANTIFICATION_VALUES_LIST>", _OFFSETS))
    assert set(item_offsets(item, assets_root=tmp_path).values()) == {-777}


_OFFSETS = "</QUANTIFICATION_VALUES_LIST>" + "".join(
    f'<BOA_ADD_OFFSET band_id="{i}">-777</BOA_ADD_OFFSET>' for i in range(13)
)


@pytest.mark.real
def test_days_and_clouds_of_a_real_search():
    items = read_items(real(SEARCH))
    days = by_solar_day(items)
    assert len(days) == 13
    assert next(iter(days)) == date(2020, 6, 1)
    assert [item.cloud_cover for item in cloud_below(items, 26.800215)].count(26.800215) == 1
    assert len(cloud_below(items, 5.0)) == 9


@pytest.mark.real
def test_modis_and_hls_items_are_not_taken_for_sentinel2():
    for name in ("MOD09A1.A2022033.h19v10.061.json", "HLS_IL_PIATT_2018_items.json"):
        with pytest.raises(InputProblem, match="expected Sentinel-2 Level-2A"):
            sentinel2_products(read_items(real(name)))


@pytest.mark.real
def test_modis_items_lead_to_their_files_and_scenes(tmp_path):
    items = read_items(real("MOD09A1.A2022033.h19v10.061.json"))
    raw = json.loads((REAL / "MOD09A1.A2022033.h19v10.061.json").read_text().replace("A2022033", "A2022049"))
    (item,) = read_items(saved(tmp_path / "item.json", raw))
    transform, shape = item.properties["proj:transform"], (6, 9)
    for name, asset in item.assets.items():
        if name.startswith("sur_refl_b0"):
            values = np.full(shape, 1000 * int(name[-1]), dtype=np.int16)
            profile = {"driver": "GTiff", "count": 1, "dtype": "int16", "crs": item.properties["proj:wkt2"]}
            path = tmp_path / Path(asset["href"]).name
            with rasterio.open(
                path, "w", height=shape[0], width=shape[1], transform=Affine(*transform[:6]), **profile
            ) as image:
                image.write(values, 1)
    layout = modis_layout(qa="none", mask="none")
    (scene,) = stac_scenes([item], years=[2022], layout=layout, assets_root=tmp_path)
    assert (scene.year, layout.doy[scene.step]) == (2022, 49)
    got = scene.read(layout)
    assert got.values[:7, 3, 4].tolist() == [1000, 2000, 3000, 4000, 5000, 6000, 7000]
    assert got.valid[:7].all()
    assert not got.valid[7:].any()
    with pytest.raises(InputProblem, match="no file of the MODIS items"):
        modis_files(items, assets_root=tmp_path / "elsewhere")


def test_the_solar_day_follows_the_sun_not_utc(tmp_path):
    raw = raw_item(datetime="2022-06-04T00:30:00Z")
    raw["bbox"] = [-120.5, 40.0, -119.5, 41.0]  # 8 hours behind
    west = read_items(saved(tmp_path / "west.json", raw))[0]
    raw["bbox"] = [179.0, -20.0, -178.0, -19.0]  # across the antimeridian, middle at -179.5
    crossing = read_items(saved(tmp_path / "crossing.json", raw))[0]
    raw["bbox"] = [150.0, -20.0, 0.0, 151.0, -19.0, 100.0]  # three dimensions
    raw["properties"]["datetime"] = "2022-06-04T23:30:00Z"
    east = read_items(saved(tmp_path / "east.json", raw))[0]
    assert [item.solar_day for item in (west, crossing, east)] == [date(2022, 6, 3), date(2022, 6, 3), date(2022, 6, 5)]
    assert [len(group) for group in by_solar_day([east, west, crossing]).values()] == [2, 1]


def test_items_with_local_assets_become_scenes_with_the_right_values(tmp_path):
    raw = [raw_item(), raw_item("S2A_15TVH_20220714_0_L2A", datetime="2022-07-14T17:09:01Z", **{"eo:cloud_cover": 80})]
    for item in raw:
        write_assets(tmp_path / "cogs" / item["id"], shift=1000)
    items = read_items(saved(tmp_path / "search.json", raw))
    layout = sentinel2_layout(bands=["B11", "B02"], pixel_size=20)
    (scene,) = stac_scenes(items, years=[2022], layout=layout, assets_root=tmp_path, max_cloud=50)
    got = scene.read(layout)
    np.testing.assert_allclose(got.values[0], pixels("B11") / 10000, atol=1e-6)
    blue = pixels("B02").reshape(12, 2, 18, 2).mean(axis=(1, 3)) / 10000
    np.testing.assert_allclose(got.values[1], blue, atol=1e-6)
    assert got.valid.all()
    assert len(stac_scenes(items, years=[2022], layout=layout, assets_root=tmp_path)) == 2


def test_the_header_stands_in_for_missing_projection_fields(tmp_path):
    raw = raw_item()
    del raw["properties"]["proj:epsg"]
    write_assets(tmp_path / raw["id"])
    (product,) = sentinel2_products(read_items(saved(tmp_path / "i.json", raw)), assets_root=tmp_path)
    assert product.bounds == (LEFT, TOP - 240, LEFT + 360, TOP)
    assert product.crs.to_epsg() == 32615


def test_where_assets_are_looked_for(tmp_path):
    raw = raw_item()
    (item,) = read_items(saved(tmp_path / "i.json", raw))
    assert asset_file(item, "blue") == raw["assets"]["blue"]["href"]
    with pytest.raises(InputProblem, match="asset blue of .* is in none of"):
        asset_file(item, "blue", tmp_path)
    for place in (tmp_path / "B02.tif", tmp_path / item.id / "B02.tif", tmp_path / "cogs" / item.id / "B02.tif"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        assert asset_file(item, "blue", tmp_path) == str(place)  # the more telling place wins over the ones before
    raw["assets"]["blue"]["href"] = "./cogs/../B02.tif"
    (relative,) = read_items(saved(tmp_path / "i.json", raw))
    assert Path(asset_file(relative, "blue")).samefile(tmp_path / "B02.tif")


def test_one_file_cannot_serve_two_items(tmp_path):
    write_assets(tmp_path / "flat")
    raw = [raw_item(), raw_item("S2A_15TVH_20220714_0_L2A", datetime="2022-07-14T17:09:01Z")]
    items = read_items(saved(tmp_path / "search.json", raw))
    with pytest.raises(InputProblem, match="would serve both"):
        sentinel2_products(items, assets_root=tmp_path / "flat")


def test_a_search_is_saved_and_read_again(tmp_path):
    items = read_items(saved(tmp_path / "a.json", [raw_item(), raw_item("another")]))
    write_items(tmp_path / "b.json", items)
    again = read_items(tmp_path / "b.json")
    assert again == items
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_a_cube_has_the_values_of_the_files(tmp_path):
    pytest.importorskip("odc.stac")
    raw = [raw_item(), raw_item("S2A_15TVH_20220714_0_L2A", datetime="2022-07-14T17:09:01Z")]
    for item in raw:
        write_assets(tmp_path / item["id"], shift=1000)
    items = read_items(saved(tmp_path / "search.json", raw))
    place = {"crs": "EPSG:32615", "resolution": 20, "assets_root": tmp_path}
    cube = load_cube(items, bands=["swir16", "B02", "SCL"], bbox=(-92.9994, 41.5502, -92.9963, 41.5513), **place)
    assert cube.sizes["time"] == 2
    rows = ((TOP - cube.y.values) // 20).astype(int)
    columns = ((cube.x.values - LEFT) // 20).astype(int)
    assert 5 <= len(rows) < 12
    assert 9 <= len(columns) < 18
    np.testing.assert_allclose(cube["B11"].values[1], pixels("B11")[np.ix_(rows, columns)] / 10000, atol=1e-6)
    blue = pixels("B02").reshape(12, 2, 18, 2).mean(axis=(1, 3))[np.ix_(rows, columns)]
    np.testing.assert_allclose(cube["B02"].values[0], blue / 10000, atol=1e-4)  # averaged as integers: half a DN
    assert (cube["SCL"].values == 4).all()
    items[0].properties["s2:processing_baseline"] = "02.14"
    for asset in items[0].assets.values():
        del asset["raster:bands"]
    with pytest.raises(InputProblem, match="differ in offset"):
        load_cube(items, bands=["B02"], **place)


def test_an_unreachable_catalogue_is_named():
    pytest.importorskip("pystac_client")
    with pytest.raises(InputProblem, match="127.0.0.1:9.*gave no answer"):
        search_items(
            "http://127.0.0.1:9/",
            collections=["sentinel-2-l2a"],
            geometry={"type": "Point", "coordinates": [-93, 41]},
            dates="2022-04-01/2022-09-30",
            max_cloud=60,
        )


def test_unknown_sensors_and_empty_places_are_refused(tmp_path):
    items = read_items(saved(tmp_path / "i.json", raw_item()))
    series = replace(sentinel2_layout(bands=["B02"]), sensor="series")
    with pytest.raises(InputProblem, match="no catalogue has 'series' scenes"):
        stac_scenes(items, years=[2022], layout=series)
    with pytest.raises(InputProblem, match="no Sentinel-2 band of"):
        sentinel2_products(items, assets_root=tmp_path)
    with pytest.raises(InputProblem, match="no STAC items at"):
        read_items(tmp_path / "nowhere")


def without(path: str) -> dict:
    raw = raw_item()
    *parents, last = path.split("/")
    inner = raw
    for key in parents:
        inner = inner[key]
    del inner[last]
    return raw


@pytest.mark.parametrize(
    "content",
    [
        3,
        None,
        "text",
        {},
        [],
        [3],
        {"type": "FeatureCollection"},
        {"type": "FeatureCollection", "features": "none"},
        without("id"),
        without("bbox"),
        without("assets"),
        without("properties"),
        without("properties/datetime"),
        without("assets/blue/href"),
        raw_item(datetime="yesterday"),
        raw_item() | {"bbox": ["west", 0, 1, 2]},
        raw_item() | {"bbox": [1, 2, 3]},
    ],
)
def test_malformed_items_are_an_input_problem(tmp_path, content):
    with pytest.raises(InputProblem, match="holds|expected|lacks|needs a bbox|datetime"):
        read_items(saved(tmp_path / "x.json", content))


@pytest.mark.parametrize("text", ["", "{", '{"type": ', "[" * 100_000, "\x00\xff"])
def test_text_that_is_no_json_is_an_input_problem(tmp_path, text):
    (tmp_path / "x.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputProblem, match="no readable JSON"):
        read_items(tmp_path / "x.json")


def test_a_time_with_another_offset_is_turned_to_utc(tmp_path):
    raw = raw_item(datetime="2022-06-05T01:09:01+08:00")
    assert read_items(saved(tmp_path / "i.json", raw))[0].start == datetime(2022, 6, 4, 17, 9, 1)


@pytest.mark.parametrize(
    ("change", "bands", "message"),
    [
        ({"proj:epsg": "nowhere"}, "keep", "projection fields"),
        ({"s2:processing_baseline": "new"}, None, "version like"),
        ({"eo:cloud_cover": "cloudy"}, "keep", "expected per cent"),
        ({}, [{"offset": "low"}], "no number"),
        ({}, [{"offset": -0.1, "scale": 0}], "no number"),
        ({"s2:processing_baseline": None}, [], "does not tell its processing baseline"),
    ],
)
def test_malformed_fields_are_an_input_problem(tmp_path, change, bands, message):
    raw = raw_item(**change)
    for asset in raw["assets"].values():
        asset["raster:bands"] = asset["raster:bands"] if bands == "keep" else bands
    write_assets(tmp_path / raw["id"])
    with pytest.raises(InputProblem, match=message):
        sentinel2_products(read_items(saved(tmp_path / "i.json", raw)), assets_root=tmp_path)
