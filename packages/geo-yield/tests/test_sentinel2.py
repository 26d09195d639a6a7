"""Sentinel-2: offsets, classes and pixels by value, from small folders laid out as ESA lays them out."""

import pickle
from datetime import datetime
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from pyproj import CRS, Transformer

from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramStore
from geo_yield.prepare import prepare_histograms
from geo_yield.scenes import Scene
from geo_yield.sentinel2 import (
    BANDS,
    Product,
    band_of,
    clear_sky,
    find_products,
    keep_classes,
    offset_for,
    read_metadata,
    same_look,
    sentinel2_layout,
    sentinel2_scenes,
    to_reflectance,
)

METADATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "stac-items"
TILE, TIME = "15TVH", "20220604T170901"
SIZES = {10: (24, 36), 20: (12, 18), 60: (4, 6)}
LEFT, TOP = 500_000, 4_600_020


def pixels(band: str, size: int) -> np.ndarray:
    """Digital numbers that say which band, row and column they are of."""
    row, column = np.ogrid[: SIZES[size][0], : SIZES[size][1]]
    return (1200 + 4000 * list(BANDS).index(band) + 40 * row + column).astype(np.uint16)


def write_image(path: Path, values: np.ndarray, size: int, *, left: float = LEFT, crs: str = "EPSG:32615") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    jp2 = {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"} if path.suffix == ".jp2" else {}
    profile = {"driver": "GTiff", "count": 1, "dtype": values.dtype, "crs": crs} | jp2
    height, width = values.shape
    place = Affine(size, 0, left, 0, -size, TOP)
    with rasterio.open(path, "w", height=height, width=width, transform=place, **profile) as image:
        image.write(values, 1)


def metadata_xml(baseline: str, offset: int | None) -> str:
    bands = [*list(BANDS)[:10], "B10", "B11", "B12"]
    listed = "".join(f'<BOA_ADD_OFFSET band_id="{i}">{offset}</BOA_ADD_OFFSET>' for i in range(len(bands)))
    names = "".join(
        f'<Spectral_Information bandId="{i}" physicalBand="B{name[1:].lstrip("0")}"/>' for i, name in enumerate(bands)
    )
    return (
        '<n1:Level-2A_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_Level-2A.xsd">'
        f"<PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE><BOA_QUANTIFICATION_VALUE>10000</BOA_QUANTIFICATION_VALUE>"
        f"{'' if offset is None else listed}{names}</n1:Level-2A_User_Product>"
    )


def write_safe(
    folder: Path,
    *,
    baseline: str = "05.09",
    offset: int | None = -1000,
    time: str = TIME,
    made: str = "20220604T220000",
    suffix: str = ".tif",
    bands: tuple[str, ...] = ("B01", "B02", "B08", "B8A", "B11"),
    scl: np.ndarray | None = None,
    change: dict[str, np.ndarray] | None = None,
) -> Path:
    """A product of 360 x 240 m with the names and the folders of a real one, all bands at their native size."""
    safe = folder / f"S2A_MSIL2A_{time}_N{baseline.replace('.', '')}_R112_T{TILE}_{made}.SAFE"
    data = safe / "GRANULE" / f"L2A_T{TILE}_A036301_{time}" / "IMG_DATA"
    for band in bands:
        size = BANDS[band].size
        values = (change or {}).get(band, pixels(band, size))
        write_image(data / f"R{size}m" / f"T{TILE}_{time}_{band}_{size}m{suffix}", values, size)
    classes = np.full(SIZES[20], 4, dtype=np.uint8) if scl is None else scl
    write_image(data / "R20m" / f"T{TILE}_{time}_SCL_20m{suffix}", classes, 20)
    write_image(data / "R60m" / f"T{TILE}_{time}_B02_60m{suffix}", np.full(SIZES[60], 9999, dtype=np.uint16), 60)
    write_image(safe / "GRANULE" / "QI_DATA" / "MSK_QUALIT_B02.tif", np.zeros(SIZES[10], dtype=np.uint8), 10)
    (safe / "MTD_MSIL2A.xml").write_text(metadata_xml(baseline, offset))
    return safe


def reflectance(band: str, size: int) -> np.ndarray:
    return (pixels(band, size).astype(np.float64) - 1000) / 10000


def mean_of(values: np.ndarray, side: int) -> np.ndarray:
    height, width = values.shape
    return values.reshape(height // side, side, width // side, side).mean(axis=(1, 3))


def only_scene(folder: Path, layout, **options) -> Scene:
    (scene,) = sentinel2_scenes([folder], years=[2022], layout=layout, **options)
    return scene


@pytest.mark.parametrize("suffix", [".tif", ".jp2"])
def test_a_safe_folder_reads_every_band_on_the_20_m_grid(tmp_path, suffix):
    write_safe(tmp_path, suffix=suffix)
    layout = sentinel2_layout(bands=["B11", "B01", "B02"])  # another order than stored, three native sizes
    scene = only_scene(tmp_path, layout)
    got = scene.read(layout)
    np.testing.assert_allclose(got.values[0], reflectance("B11", 20), atol=1e-6)
    np.testing.assert_allclose(got.values[1], reflectance("B01", 60).repeat(3, 0).repeat(3, 1), atol=1e-6)
    np.testing.assert_allclose(got.values[2], mean_of(reflectance("B02", 10), 2), atol=1e-6)  # not the 60 m copy
    assert got.values.dtype == np.float32
    assert got.valid.all()
    assert got.counted.all()
    assert (scene.year, scene.step) == (2022, 2)
    assert scene.key.startswith(f"{TILE}-{TIME}-20m-r00000-c00000-")


def test_the_grid_is_the_images_own(tmp_path):
    write_safe(tmp_path)
    grid = only_scene(tmp_path, sentinel2_layout(bands=["B8A"])).grid()
    assert grid.crs.to_epsg() == 32615
    assert (grid.height, grid.width) == (12, 18)
    assert tuple(grid.transform)[:6] == (20, 0, LEFT, 0, -20, TOP)


@pytest.mark.parametrize("size", [10, 60])
def test_other_pixel_sizes(tmp_path, size):
    write_safe(tmp_path)
    layout = sentinel2_layout(bands=["B02", "B11"], pixel_size=size)
    got = only_scene(tmp_path, layout).read(layout)
    if size == 10:
        np.testing.assert_allclose(got.values[0], reflectance("B02", 10), atol=1e-6)
        np.testing.assert_allclose(got.values[1], reflectance("B11", 20).repeat(2, 0).repeat(2, 1), atol=1e-6)
    else:
        np.testing.assert_allclose(got.values[0], mean_of(reflectance("B02", 10), 6), atol=1e-6)
        np.testing.assert_allclose(got.values[1], mean_of(reflectance("B11", 20), 3), atol=1e-6)


def test_scene_classes_at_20_m_mask_bands_of_10_m_and_of_60_m_grids(tmp_path):
    scl = np.arange(12 * 18).reshape(12, 18) % 12
    write_safe(tmp_path, scl=scl.astype(np.uint8))
    fine = sentinel2_layout(bands=["B02"], pixel_size=10)
    np.testing.assert_array_equal(
        only_scene(tmp_path, fine).read(fine).valid[0], np.isin(scl, (4, 5, 7)).repeat(2, 0).repeat(2, 1)
    )
    coarse = sentinel2_layout(bands=["B02"], pixel_size=60, qa="scl:4,6")
    middle = scl[1::3, 1::3]
    np.testing.assert_array_equal(only_scene(tmp_path, coarse).read(coarse).valid[0], np.isin(middle, (4, 6)))
    everything = sentinel2_layout(bands=["B02"], qa="none")
    assert only_scene(tmp_path, everything).read(everything).valid.all()


def test_no_data_and_saturation_are_invalid_and_shadow_is_not_negative(tmp_path):
    values = pixels("B02", 10)
    values[0, 0], values[5, 7], values[8:10, 8:10] = 0, 65535, 900
    write_safe(tmp_path, change={"B02": values})
    layout = sentinel2_layout(bands=["B02", "B8A"])
    got = only_scene(tmp_path, layout).read(layout)
    invalid = np.argwhere(~got.valid[0])
    assert invalid.tolist() == [[0, 0], [2, 3]]
    assert got.valid[1].all()  # one band's gap is not another's
    assert got.values[0, 4, 4] == 0
    assert got.valid[0, 4, 4]


def test_blocks_tile_the_image_without_gap_or_overlap(tmp_path):
    write_safe(tmp_path)
    layout = sentinel2_layout(bands=["B01", "B02", "B11"])
    whole = only_scene(tmp_path, layout).read(layout).values
    scenes = sentinel2_scenes([tmp_path], years=[2022], layout=layout, block=7)
    joined = np.full_like(whole, np.nan)
    for scene in scenes:
        part = pickle.loads(pickle.dumps(scene)).read(layout).values
        grid = scene.grid()
        column, row = round((grid.transform.c - LEFT) / 20), round((TOP - grid.transform.f) / 20)
        joined[:, row : row + grid.height, column : column + grid.width] = part
    np.testing.assert_array_equal(joined, whole)
    assert len(scenes) == len({scene.key for scene in scenes}) == len({scene.grid_key for scene in scenes}) == 6


def test_scenes_on_one_grid_share_its_key(tmp_path):
    write_safe(tmp_path)
    write_safe(tmp_path, time="20220714T170901")
    layout = sentinel2_layout(bands=["B11"])
    june, july = sentinel2_scenes([tmp_path], years=[2022], layout=layout)
    assert (june.step, july.step) == (2, 3)
    assert june.grid_key == july.grid_key
    assert june.key != july.key


def test_a_reprocessed_overpass_is_read_once_and_its_parts_fill_each_other(tmp_path):
    old = write_safe(tmp_path, baseline="02.14", offset=None, made="20200101T000000")
    half = pixels("B11", 20)
    half[:, 9:] = 0
    cut = write_safe(tmp_path, made="20230101T000000", change={"B11": half}, scl=np.full(SIZES[20], 8, dtype=np.uint8))
    rest = write_safe(tmp_path, made="20221231T000000")
    (look,) = same_look(find_products(tmp_path))
    assert [product.name for product in look] == [cut.name, rest.name]
    assert old.exists()
    layout = sentinel2_layout(bands=["B11"])
    got = only_scene(tmp_path, layout).read(layout)
    np.testing.assert_allclose(got.values[0], reflectance("B11", 20), atol=1e-6)
    assert got.valid[0, :, 9:].all()
    assert not got.valid[0, :, :9].any()


def test_two_satellites_on_one_day_both_count(tmp_path):
    write_safe(tmp_path)
    write_safe(tmp_path, time="20220604T181501")
    assert len(sentinel2_scenes([tmp_path], years=[2022], layout=sentinel2_layout(bands=["B11"]))) == 2


def test_the_mask_counts_only_its_classes(tmp_path):
    write_safe(tmp_path)
    crops = np.where(np.arange(18) < 5, 40, 10).astype(np.uint8)[None].repeat(12, 0)
    write_image(tmp_path / "map" / "cover.tif", crops, 20)
    layout = sentinel2_layout(bands=["B11"], mask="worldcover:40,90")
    scene = only_scene(tmp_path, layout, mask_map=tmp_path / "map" / "cover.tif")
    np.testing.assert_array_equal(scene.read(layout).counted, crops == 40)
    with pytest.raises(InputProblem, match="do not go together"):
        only_scene(tmp_path, layout)
    with pytest.raises(InputProblem, match="do not go together"):
        only_scene(tmp_path, sentinel2_layout(bands=["B11"]), mask_map=tmp_path / "map" / "cover.tif")


def write_tile(folder: Path, tile: str, *, left: int, crs: str = "EPSG:32615") -> Path:
    """B11 of a tile of 360 x 240 m, the same digital number everywhere."""
    path = folder / tile / f"{tile}_20220604_B11.tif"
    write_image(path, np.full(SIZES[20], 3000, dtype=np.uint16), 20, left=left, crs=crs)
    return path.parent


def test_what_two_tiles_cover_counts_once(tmp_path):
    folders = [write_tile(tmp_path, "15TWH", left=LEFT + 300), write_tile(tmp_path, "15TVH", left=LEFT)]
    layout = sentinel2_layout(bands=["B11"], qa="none")
    west, east = sentinel2_scenes(folders, years=[2022], layout=layout, offset=0)
    assert west.read(layout).counted.all()
    assert np.argwhere(~east.read(layout).counted.any(axis=0)).ravel().tolist() == [0, 1, 2]  # 60 m of overlap
    (alone,) = sentinel2_scenes(folders[:1], years=[2022], layout=layout, offset=0)
    assert alone.read(layout).counted.all()
    assert alone.key != east.key


def test_tiles_of_two_zones_share_a_border_to_a_pixel(tmp_path):
    # The zones 15 and 16 meet at 90 degrees west; both tiles lie across it at the same place.
    to_15, to_16 = (Transformer.from_crs(4326, code, always_xy=True) for code in (32615, 32616))
    x15, y = to_15.transform(-90.0, 41.5)
    x16, _ = to_16.transform(-90.0, 41.5)
    products = []
    for tile, code, left in (("15TYH", 32615, x15 - 50_000), ("16TBN", 32616, x16 - 50_000)):
        bounds = (left, y - 40_000, left + 100_000, y + 40_000)
        facts = {"acquired": datetime(2022, 6, 4), "baseline": "04.00", "files": {}, "offsets": {}}
        products.append(Product(name=tile, tile=tile, crs=CRS.from_epsg(code), bounds=bounds, **facts))
    layout = sentinel2_layout(bands=["B11"], pixel_size=60)
    scenes = sentinel2_scenes(products, years=[2022], layout=layout)
    assert scenes[0].ceded == ()
    (outline,) = scenes[1].ceded
    back = shapely.transform(outline, Transformer.from_crs(32616, 32615, always_xy=True).transform, interleaved=False)
    assert back.symmetric_difference(shapely.box(*products[0].bounds)).area < 100  # square metres of 8e9


def test_sentinel2_histograms_end_to_end(tmp_path):
    ramp = (1010 + 40 * np.arange(12)[:, None] + 250 * np.arange(18)).astype(np.uint16)
    dark = ramp.repeat(2, 0).repeat(2, 1) // 4 + 900  # partly below the offset: counts as 0
    for time in (TIME, "20220614T170901"):
        write_safe(tmp_path / "images", time=time, change={"B11": ramp, "B02": dark.astype(np.uint16)})
    layout = sentinel2_layout(bands=["B11", "B02"], bins=8)
    shapes = [shapely.box(LEFT, TOP - 240, LEFT + 100, TOP), shapely.box(LEFT + 100, TOP - 240, LEFT + 360, TOP)]
    regions = geopandas.GeoDataFrame({"region_id": ["01", "02"]}, geometry=shapes, crs="EPSG:32615")
    results = []
    for block in (1830, 5):
        scenes = sentinel2_scenes([tmp_path / "images"], years=[2022], layout=layout, block=block)
        (file,) = prepare_histograms(scenes, regions, layout, tmp_path / f"out{block}", workers=1)
        results.append(HistogramStore(file).read())
    whole, cut = results
    np.testing.assert_array_equal(whole.image, cut.image)
    assert whole.pixel_count.tolist() == cut.pixel_count.tolist() == [5 * 12, 13 * 12]
    np.testing.assert_array_equal(whole.valid_count[:, :, 2], [[120, 120], [312, 312]])  # two looks in June add up
    assert whole.valid_count.sum() == 864
    for band, digital in ((0, ramp), (1, ramp // 4 + 900)):
        values = np.maximum(digital[:, :5].astype(np.float32) - 1000, 0) / np.float32(10000)
        expected = np.histogram(values, bins=layout.edges[band])[0]
        assert expected.sum() == 60
        np.testing.assert_allclose(whole.image[0, band, 2], expected / 60, atol=1e-6)


def test_a_folder_of_band_files_needs_to_know_its_offset(tmp_path):
    folder = tmp_path / "downloads"
    write_image(folder / f"{TILE}_20220604_nir.tif", pixels("B08", 10), 10)
    write_image(folder / f"{TILE}_20220604_scl.tif", np.full(SIZES[20], 5, dtype=np.uint8), 20)
    write_image(folder / f"{TILE}_20220714_nir.tif", pixels("B08", 10), 10)
    write_image(folder / f"{TILE}_20220714_scl.tif", np.full(SIZES[20], 5, dtype=np.uint8), 20)
    with pytest.raises(InputProblem, match="does not tell its processing baseline.*-1000"):
        find_products(folder)
    layout = sentinel2_layout(bands=["nir"], pixel_size=10)
    june, july = sentinel2_scenes([folder], years=[2022], layout=layout, offset=0)
    np.testing.assert_allclose(june.read(layout).values[0], pixels("B08", 10) / 10000, atol=1e-6)
    assert july.products[0].acquired == datetime(2022, 7, 14)


def test_band_tags_of_a_file_tell_the_offset(tmp_path):
    path = tmp_path / f"{TILE}_20220604_B8A.tif"
    write_image(path, pixels("B8A", 20), 20)
    with rasterio.open(path, "r+") as image:
        image.scales, image.offsets = (0.0001,), (-0.1,)
    (product,) = find_products(tmp_path)
    assert product.offsets == {"B8A": -1000.0}


def test_offsets_of_one_product_follow_the_order_of_trust():
    def decide(**known):
        return offset_for(source="x", **known)

    assert decide(from_xml=-1000.0, from_raster=0.0, baseline="02.12") == -1000
    assert decide(from_raster=0.0, baseline="05.09") == 0
    assert [decide(baseline=b) for b in ("02.12", "03.01", "04.00", "05.11", "99.99")] == [0, 0, -1000, -1000, -1000]
    assert decide(from_raster=-1000.0, baseline="05.09", applied=True) == 0
    assert decide(asked=-1000.0) == decide(asked=-1000.0, baseline="04.00") == -1000
    with pytest.raises(InputProblem, match="version like 05.09"):
        decide(baseline="new")


def test_the_offset_is_never_applied_twice():
    with pytest.raises(InputProblem, match="shifted already"):
        offset_for(baseline="05.09", applied=True, asked=-1000.0, source="x")
    with pytest.raises(InputProblem, match="metadata say 0"):
        offset_for(baseline="02.12", asked=-1000.0, source="x")
    once = to_reflectance(np.array([1500, 900], dtype=np.uint16), offset=-1000)
    np.testing.assert_allclose(once, [0.05, 0.0], atol=1e-7)
    with pytest.raises(InputProblem, match="float32.*reflectance already"):
        to_reflectance(once, offset=-1000)


def test_a_float_image_is_refused_when_read(tmp_path):
    write_safe(tmp_path, change={"B11": reflectance("B11", 20).astype(np.float32)})
    layout = sentinel2_layout(bands=["B11"])
    with pytest.raises(InputProblem, match="reflectance already"):
        only_scene(tmp_path, layout).read(layout)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "baseline", "offset"), [("20190212_N0212", "02.12", 0), ("20230625_N0509", "05.09", -1000)]
)
def test_real_product_metadata(name, baseline, offset):
    found = sorted(METADATA.glob(f"S2A_MSIL2A_{name}*MTD_MSIL2A.xml"))
    if not found:
        pytest.skip("the real metadata are not beside the checkout")
    facts = read_metadata(found[0])
    assert (facts.baseline, facts.scale) == (baseline, 10000)
    assert {facts.offsets.get(band, 0.0) for band in BANDS if band != "SCL"} == {offset}
    assert {offset_for(from_xml=facts.offsets.get(b), baseline=facts.baseline, source=name) for b in BANDS} == {offset}


def test_every_catalogues_names_are_known():
    earth_search = [
        "coastal",
        "blue",
        "green",
        "red",
        "rededge1",
        "rededge2",
        "rededge3",
        "nir",
        "nir08",
        "nir09",
        "swir16",
        "swir22",
        "scl",
    ]
    assert [band_of(name) for name in earth_search] == list(BANDS)
    assert [band_of(name) for name in BANDS] == list(BANDS)
    assert [band_of(name) for name in ("B10", "visual", "blue_20m", "AOT")] == [None] * 4


def test_clear_sky_defaults_to_vegetation_soil_and_unclassified():
    assert np.flatnonzero(clear_sky(np.arange(12, dtype=np.uint8))).tolist() == [4, 5, 7]
    assert keep_classes("default") == (4, 5, 7)
    assert keep_classes("scl:6,11") == (6, 11)
    assert keep_classes("none") is None


def test_a_layout_speaks_one_language(tmp_path):
    layout = sentinel2_layout(bands=["red", "B8A"], bins=5)
    assert layout.bands == ("B04", "B8A")
    assert layout.shape == (2, 6, 5)
    np.testing.assert_allclose(layout.edges, [np.linspace(0, 0.4, 6), np.linspace(0, 0.7, 6)])
    assert layout.from_json(layout.to_json()) == layout
    for wrong in (
        {"bands": ["B10"]},
        {"bands": ["SCL"]},
        {"bands": ["B04", "red"]},
        {"pixel_size": 30},
        {"qa": "cloudless"},
        {"qa": "scl:12"},
        {"mask": "crops"},
    ):
        with pytest.raises(InputProblem, match="must be|expected"):
            sentinel2_layout(**wrong)
    write_safe(tmp_path)
    with pytest.raises(InputProblem, match="at 10.0 m, the scene"):
        only_scene(tmp_path, sentinel2_layout(bands=["B02"])).read(sentinel2_layout(bands=["B02"], pixel_size=10))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputProblem, match="not a folder"):
        find_products(tmp_path / "nowhere")
    with pytest.raises(InputProblem, match="no Sentinel-2 bands"):
        find_products(tmp_path)
    write_safe(tmp_path)
    layout = sentinel2_layout(bands=["B12"])
    with pytest.raises(InputProblem, match=r"has no B12 \(it has B01, B02, B08, B11, B8A, SCL\)"):
        only_scene(tmp_path, layout).read(layout)
    with pytest.raises(InputProblem, match=r"no Sentinel-2 image of \[2021\].*2022-06-04 to 2022-06-04"):
        sentinel2_scenes([tmp_path], years=[2021], layout=layout)
    write_image(tmp_path / "loose" / "B02.tif", pixels("B02", 10), 10)
    with pytest.raises(InputProblem, match="names no tile and date"):
        find_products(tmp_path / "loose")


def test_bands_of_another_place_are_refused(tmp_path):
    safe = write_safe(tmp_path)
    layout = sentinel2_layout(bands=["B11"])
    scene = only_scene(tmp_path, layout)
    file = next(safe.rglob("*_B11_20m.tif"))
    write_image(file, pixels("B11", 20), 20, left=LEFT + 20)
    with pytest.raises(InputProblem, match="covers"):
        scene.read(layout)
    write_image(file, pixels("B11", 20), 20, crs="EPSG:32616")
    with pytest.raises(InputProblem, match="covers"):
        scene.read(layout)
    file.write_bytes(b"not an image")
    with pytest.raises(InputProblem, match="cannot be opened"):
        scene.read(layout)


@pytest.mark.parametrize("cut", [0, 1, 40, 200, 700])
def test_damaged_metadata_are_an_input_problem(tmp_path, cut):
    path = tmp_path / "MTD_MSIL2A.xml"
    path.write_text(metadata_xml("05.09", -1000)[:-cut] if cut else "<Level-1C_User_Product/>")
    with pytest.raises(InputProblem, match="readable product metadata|expected a Level-2A"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [("05.09", ""), (">-1000<", ">minus<"), ('band_id="3"', 'band_id="77"'), (">10000<", ">-1<"), (">10000<", "><")],
)
def test_metadata_that_say_nonsense_are_an_input_problem(tmp_path, old, new):
    path = tmp_path / "MTD_MSIL2A.xml"
    path.write_text(metadata_xml("05.09", -1000).replace(old, new))
    with pytest.raises(InputProblem, match="readable product metadata|lacks|expected a version"):
        read_metadata(path)
