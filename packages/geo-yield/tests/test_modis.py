"""MODIS readers by value: every synthetic pixel says which band, row and column it is; real files by their QA bits."""

import json
import logging
import pickle
import zipfile
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geo_yield.errors import InputProblem
from geo_yield.modis import (
    MODIS_BANDS,
    MODIS_LAYOUT,
    MODIS_SEASON,
    TILE_SIZE,
    band_quality,
    clear_land,
    decode_reflectance,
    decode_temperature,
    modis_layout,
    modis_scenes,
    tile_grid,
    tiles_meeting,
    usable_temperature,
)
from geo_yield.modis_files import Composite, LayerSource, find_composites, resample, sinusoidal
from geo_yield.regions import read_regions
from geo_yield.scenes import Grid

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
PIXEL = TILE_SIZE / 2400
HEIGHT, WIDTH = 6, 10
GOOD_STATE, GOOD_QC = 1 << 3, 1 << 30
PLAIN = modis_layout(qa="none", mask="none")


def numbers(band: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Band 2, row 3, column 8 reads 2038 wherever it turns up."""
    return (1000 * band + 10 * np.arange(height)[:, None] + np.arange(width)).astype(np.int16)


def temperatures(band: int) -> np.ndarray:
    return (11500 + numbers(band, HEIGHT // 2, WIDTH // 2)).astype(np.uint16)


def write(
    path: Path, pixels: np.ndarray, *, size: float = PIXEL, corner=(-7 * TILE_SIZE, 5 * TILE_SIZE), crs=None
) -> Path:
    """One GeoTIFF, by default in the upper left corner of tile h11v04."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = pixels if pixels.ndim == 3 else pixels[None]
    place = Affine(size, 0, corner[0], 0, -size, corner[1])
    profile = {"driver": "GTiff", "count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
    crs = sinusoidal() if crs is None else crs
    with rasterio.open(path, "w", dtype=bands.dtype, crs=crs or None, transform=place, **profile) as file:
        file.write(bands)
    return path


def name(product: str, layer: str, *, year: int = 2015, doy: int = 49, made: str = "2021323021553") -> str:
    return f"{product}.A{year}{doy:03d}.h11v04.061.{made}_{layer}.tif"


def write_terra(folder: Path, *, year: int = 2015, doy: int = 49, **changed: np.ndarray) -> None:
    layers = {f"sur_refl_b{band:02d}": numbers(band) for band in range(1, 8)}
    layers["sur_refl_state_500m"] = np.full((HEIGHT, WIDTH), GOOD_STATE, dtype=np.uint16)
    layers["sur_refl_qc_500m"] = np.full((HEIGHT, WIDTH), GOOD_QC, dtype=np.uint32)
    for layer, pixels in (layers | changed).items():
        write(folder / name("MOD09A1", layer, year=year, doy=doy), pixels)


def write_aqua(folder: Path, *, year: int = 2015, doy: int = 49, **changed: np.ndarray) -> None:
    good = np.zeros((HEIGHT // 2, WIDTH // 2), dtype=np.uint8)
    layers = {"LST_Day_1km": temperatures(1), "LST_Night_1km": temperatures(2), "QC_Day": good, "QC_Night": good}
    for layer, pixels in (layers | changed).items():
        write(folder / name("MYD11A2", layer, year=year, doy=doy), pixels, size=2 * PIXEL)


def write_cover(folder: Path, cover: np.ndarray, year: int = 2015) -> None:
    write(folder / name("MCD12Q1", "LC_Type1", year=year, doy=1), cover.astype(np.uint8))


def test_every_band_pixel_and_place_is_where_it_belongs(tmp_path):
    write_terra(tmp_path, doy=57)
    write_aqua(tmp_path, doy=57)
    (scene,) = modis_scenes(tmp_path)
    pixels = pickle.loads(pickle.dumps(scene)).read(PLAIN)
    assert (scene.tile, scene.year, scene.step, scene.grid_key) == ("h11v04", 2015, 1, ("modis", "h11v04"))
    assert pixels.values.dtype == np.uint16
    assert pixels.values[:7, 3, 8].tolist() == [1038, 2038, 3038, 4038, 5038, 6038, 7038]
    assert pixels.values[7:, 3, 8].tolist() == [1014, 2014]  # the 1 km pixel in row 1, column 4
    assert np.array_equal(pixels.values[7], np.repeat(np.repeat(temperatures(1) - 11500, 2, 0), 2, 1))
    assert pixels.valid.all()
    assert pixels.counted.all()
    assert scene.grid().transform.almost_equals(tile_grid("h11v04").transform, 1e-6)
    assert (scene.grid().height, scene.grid().width) == (HEIGHT, WIDTH)


def test_bands_come_in_the_order_of_the_layout(tmp_path):
    write_terra(tmp_path)
    write_aqua(tmp_path)
    edges = PLAIN.edges[:3]
    layout = type(PLAIN)(sensor="modis", bands=("lst_night", "b05", "b01"), doy=MODIS_SEASON, edges=edges, qa="none")
    assert modis_scenes(tmp_path)[0].read(layout).values[:, 2, 7].tolist() == [2013, 5027, 1027]


def test_fill_is_never_valid_and_reflectance_is_clipped(tmp_path):
    red = numbers(1)
    red[0, 0], red[1, 2], red[2, 3], red[4, 9] = -28672, -100, 16001, 0
    hot = temperatures(1)
    hot[1, 1] = 0
    write_terra(tmp_path, sur_refl_b01=red)
    write_aqua(tmp_path, LST_Day_1km=hot)
    pixels = modis_scenes(tmp_path)[0].read(PLAIN)
    assert np.argwhere(~pixels.valid[0]).tolist() == [[0, 0]]
    assert pixels.values[0, [0, 1, 2, 4], [0, 2, 3, 9]].tolist() == [0, 100, 16000, 100]
    assert np.argwhere(~pixels.valid[7]).tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    assert pixels.values[7, 2, 2] == 54036
    assert pixels.valid[[1, 8]].all()


STATES = {  # one flag at a time
    "cloudy": GOOD_STATE | 1,
    "mixed": GOOD_STATE | 2,
    "shadow": GOOD_STATE | 1 << 2,
    "ocean": 0,
    "shore": 2 << 3,
    "internal cloud": GOOD_STATE | 1 << 10,
    "snow": GOOD_STATE | 1 << 12,
    "fill": 65535,
}
KEPT_STATES = {
    "clear": GOOD_STATE,
    "assumed clear": GOOD_STATE | 3,
    "aerosol": GOOD_STATE | 3 << 6,
    "beside a cloud": GOOD_STATE | 1 << 13,
}


def test_quality_flags_drop_what_they_say_and_nothing_else(tmp_path):
    state = np.full((HEIGHT, WIDTH), GOOD_STATE, dtype=np.uint16)
    state[0, : len(STATES)] = list(STATES.values())
    state[1, : len(KEPT_STATES)] = list(KEPT_STATES.values())
    qc = np.full((HEIGHT, WIDTH), GOOD_QC, dtype=np.uint32)
    qc[2, 0], qc[2, 1], qc[2, 2] = GOOD_QC | 0b1011 << 6, GOOD_QC | 0b1000 << 6, 4294967295  # band 2: bits 6-9
    flags = np.array([0, 1, 2, 3, 0b11000001], dtype=np.uint8)
    write_terra(tmp_path, sur_refl_state_500m=state, sur_refl_qc_500m=qc)
    write_aqua(tmp_path, QC_Night=np.repeat(flags[None], HEIGHT // 2, 0))
    pixels = modis_scenes(tmp_path)[0].read(modis_layout(mask="none"))
    dropped = [[0, column] for column in range(len(STATES))]
    assert np.argwhere(~pixels.valid[0]).tolist() == [*dropped, [2, 2]]
    assert np.argwhere(~pixels.valid[1]).tolist() == [*dropped, [2, 0], [2, 2]]
    assert pixels.valid[7].all()
    assert pixels.valid[8, 4].tolist() == [True] * 4 + [False] * 4 + [True] * 2
    assert modis_scenes(tmp_path)[0].read(PLAIN).valid.all()


def test_the_mask_counts_the_classes_it_names(tmp_path):
    cover = np.full((HEIGHT, WIDTH), 12)
    cover[0, :4] = 10, 14, 255, 12
    write_terra(tmp_path)
    write_cover(tmp_path / "cover", cover)
    bare = modis_scenes(tmp_path / "..", mask=tmp_path / "cover")[0]
    assert np.argwhere(~bare.read(MODIS_LAYOUT).counted).tolist() == [[0, 0], [0, 1], [0, 2]]
    assert np.argwhere(~bare.read(modis_layout(mask="mcd12q1:12,14")).counted).tolist() == [[0, 0], [0, 2]]
    assert bare.read(modis_layout(mask="none")).counted.all()


def test_land_cover_of_the_year_or_the_nearest_earlier_one(tmp_path):
    for year in (2012, 2015, 2016):
        write_terra(tmp_path, year=year)
    for year in (2013, 2015):
        write_cover(tmp_path, np.full((HEIGHT, WIDTH), 12), year)
    assert [scene.land_cover.year for scene in modis_scenes(tmp_path)] == [2013, 2015, 2015]


def test_a_missing_product_leaves_its_bands_invalid_and_is_told(tmp_path, caplog):
    write_terra(tmp_path)
    write_terra(tmp_path, doy=57)
    write_aqua(tmp_path, doy=57)
    write_aqua(tmp_path, doy=65)
    with caplog.at_level(logging.WARNING):
        scenes = modis_scenes(tmp_path)
    assert [scene.step for scene in scenes] == [0, 1, 2]
    valid = [scene.read(PLAIN).valid.all(axis=(1, 2)).tolist() for scene in scenes]
    assert valid == [[True] * 7 + [False] * 2, [True] * 9, [False] * 7 + [True] * 2]
    assert scenes[2].grid().transform.almost_equals(scenes[0].grid().transform, 1e-6)
    assert "1 of 3 composites have no MOD09A1" in caplog.text
    assert "1 of 3 composites have no MYD11A2" in caplog.text


def test_the_key_changes_with_the_files_and_not_with_the_folder(tmp_path):
    write_terra(tmp_path / "a")
    write_terra(tmp_path / "b")
    keys = [modis_scenes(tmp_path / folder)[0].key for folder in "ab"]
    write_aqua(tmp_path / "b")
    assert keys[0] == keys[1] != modis_scenes(tmp_path / "b")[0].key
    assert keys[0].startswith("h11v04-2015-049-")


def test_the_newest_production_is_taken_and_other_seasons_are_left_out(tmp_path):
    write_terra(tmp_path)
    write_terra(tmp_path, doy=41)
    for band in range(1, 8):
        write(tmp_path / name("MOD09A1", f"sur_refl_b{band:02d}", made="2023000000000"), numbers(band) + np.int16(500))
    (scene,) = modis_scenes(tmp_path)
    assert scene.read(PLAIN).values[2, 0, 0] == 3500


def test_appeears_names_and_another_coordinate_system(tmp_path):
    for band in range(1, 8):
        file = tmp_path / f"MOD09A1.061_sur_refl_b{band:02d}_doy2015065000000_aid0001.tif"
        write(file, numbers(band), size=0.004, corner=(-95, 42), crs="EPSG:4326")
    for layer, band in (("LST_Day_1km", 1), ("LST_Night_1km", 2)):
        # its first pixel begins one fine pixel further west, so its last one ends before the last fine pixel
        file = tmp_path / f"MYD11A2.061_{layer}_doy2015065_aid0001.tif"
        write(file, temperatures(band), size=0.008, corner=(-95.004, 42), crs="EPSG:4326")
    (scene,) = modis_scenes(tmp_path)
    pixels = scene.read(PLAIN)
    assert (scene.tile, scene.step) == ("aid0001", 2)
    assert pixels.values[:, 5, 8].tolist() == [1058, 2058, 3058, 4058, 5058, 6058, 7058, 1024, 2024]
    assert pixels.values[7, 0].tolist() == [1000, 1001, 1001, 1002, 1002, 1003, 1003, 1004, 1004, 0]
    assert pixels.valid[8].all(axis=0).tolist() == [True] * 9 + [False]


def test_stacks_of_earth_engine_in_pieces(tmp_path):
    dates = 48  # a year and two dates
    image = np.concatenate(
        [numbers(band) + np.int16(20 * (date % 40)) for date in range(dates) for band in range(1, 8)]
    )
    image = image.reshape(7 * dates, HEIGHT, WIDTH)
    image[6 * 7 + 1, 5, 9] = 0
    heat = np.stack([temperatures(band) for _ in range(dates) for band in (1, 2)])
    folder = tmp_path / "MOD09A1"
    write(folder / "17_19-0000000000-0000000000.tif", image[:, :, :7])
    write(
        folder / "17_19-0000000000-0000000007.tif", image[:, :, 7:], corner=(-7 * TILE_SIZE + 7 * PIXEL, 5 * TILE_SIZE)
    )
    write(tmp_path / "MYD11A2" / "17_19.tif", heat, size=2 * PIXEL)
    scenes = modis_scenes(tmp_path, stack_first_year=2003)
    assert [(s.year, s.doy) for s in scenes] == [(2003, doy) for doy in MODIS_SEASON]
    pixels = scenes[0].read(PLAIN)
    assert pixels.values.shape == (9, HEIGHT, WIDTH)
    assert pixels.values[:, 4, 8].tolist() == [
        1168,
        2168,
        3168,
        4168,
        5168,
        6168,
        7168,
        1024,
        2024,
    ]  # date 6: 6 x 20 more
    assert np.argwhere(~pixels.valid[1]).tolist() == [[5, 9]]
    with pytest.raises(InputProblem, match="has no layer 'sur_refl_state_500m'"):
        scenes[0].read(modis_layout(mask="none"))


def test_nearest_pixels_of_a_coarser_grid_that_runs_south_up():
    target = Grid(crs=sinusoidal(), transform=Affine(1, 0, 100, 0, -1, 50), height=4, width=6)
    source = Grid(crs=sinusoidal(), transform=Affine(2, 0, 101, 0, 2, 46), height=2, width=2)
    values = np.array([[1, 2], [3, 4]])
    expected = [[-9, 3, 3, 4, 4, -9]] * 2 + [[-9, 1, 1, 2, 2, -9]] * 2
    assert resample(values, source, target, outside=-9).tolist() == expected


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: [p.unlink() for p in f.glob("*b03.tif")], "has no layer 'sur_refl_b03'"),
        (lambda f: [p.write_bytes(p.read_bytes()[:90]) for p in f.glob("*b04.tif")], "b04.tif' is damaged"),
        (lambda f: [p.write_bytes(b"") for p in f.glob("*b01.tif")], "is damaged or no GeoTIFF"),
        (lambda f: write(f / name("MOD09A1", "sur_refl_b01"), numbers(1), crs=False), "no coordinate system"),
        (lambda f: write(f / name("MOD09A1", "sur_refl_b02"), numbers(2, 4)), "lie on different grids"),
        (lambda f: write(f / name("MOD09A1", "sur_refl_b02"), numbers(2) * 0.1), "holds float64 values"),
        (
            lambda f: write(f / name("MYD11A2", "LST_Day_1km"), temperatures(1), crs="EPSG:32615"),
            "two coordinate systems",
        ),
        (
            lambda f: write_aqua(f, LST_Night_1km=temperatures(2)) or (f / name("MYD11A2", "QC_Day")).unlink(),
            "'QC_Day'",
        ),
    ],
)
def test_damaged_files_are_named_in_one_sentence(tmp_path, break_it, message):
    write_terra(tmp_path)
    write_aqua(tmp_path)
    break_it(tmp_path)
    with pytest.raises(InputProblem, match=message):
        modis_scenes(tmp_path)[0].read(modis_layout(mask="none"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), changed=st.binary(min_size=1, max_size=24))
def test_a_geotiff_with_overwritten_bytes_is_read_or_refused(tmp_path, place, changed):
    path = tmp_path / name("MOD09A1", "sur_refl_b01")
    path.unlink(missing_ok=True)
    held = write(path, numbers(1)).read_bytes()
    path.write_bytes((held[:place] + changed + held[place + len(changed) :])[: len(held)])
    composite = find_composites(path)[0]
    try:
        layer = composite.read("sur_refl_b01")
    except InputProblem as problem:
        said = str(problem)
    else:
        said = str(path)
        assert layer.pixels.shape == (layer.grid.height, layer.grid.width)
    assert str(path) in said


def test_missing_years_files_and_masks_are_told(tmp_path):
    with pytest.raises(InputProblem, match="no MODIS file in"):
        modis_scenes(tmp_path)
    with pytest.raises(InputProblem, match="no file or folder"):
        modis_scenes(tmp_path / "nowhere")
    for year in (2009, 2011, 2012):
        write_terra(tmp_path, year=year)
    write_aqua(tmp_path / "aqua")
    with pytest.raises(InputProblem, match=r"no MOD09A1 image of 2013 in '.*' \(found 2009-2012 without 2010\)"):
        modis_scenes(tmp_path, years=[2012, 2013])
    with pytest.raises(InputProblem, match="no MOD09A1 image of days 49-297 in '.*aqua' .MYD11A2."):
        modis_scenes([tmp_path / "aqua"])
    with pytest.raises(InputProblem, match="no MOD09A1 image of 1999 in '.*aqua', '.*' and 1 more"):
        modis_scenes([tmp_path / "aqua", tmp_path, tmp_path], years=[1999])
    with pytest.raises(InputProblem, match="no MCD12Q1 land cover in"):
        modis_scenes(tmp_path, mask=tmp_path / "aqua")
    assert [scene.year for scene in modis_scenes(tmp_path, years=[2011])] == [2011]
    with pytest.raises(InputProblem, match="needs MCD12Q1 land cover of h11v04"):
        modis_scenes(tmp_path)[0].read(MODIS_LAYOUT)


@pytest.mark.parametrize("options", [{"qa": "best"}, {"mask": "cdl:5"}, {"mask": "mcd12q1:"}, {"mask": "mcd12q1:18"}])
def test_layout_refuses_unknown_options(options):
    with pytest.raises(InputProblem, match=next(iter(options))):
        modis_layout(**options)


def test_layout_is_the_published_one():
    assert MODIS_LAYOUT.shape == (9, 32, 32)
    assert MODIS_LAYOUT.bands == MODIS_BANDS
    assert MODIS_LAYOUT.doy[:2] + MODIS_LAYOUT.doy[-1:] == (49, 57, 297)
    assert MODIS_LAYOUT.edges[8] == tuple(np.linspace(1, 4999, 33))


def test_tile_names_are_checked():
    for tile in ("h36v04", "11v04", "h11v18"):
        with pytest.raises(InputProblem, match="h00v00 to h35v17"):
            tile_grid(tile)


def test_bits_by_hand():
    quality = np.array([0b1011 << 26, 0b0101 << 2], dtype=np.uint32)
    assert band_quality(quality, 7).tolist() == [11, 0]
    assert band_quality(quality, 1).tolist() == [0, 5]
    assert clear_land(np.array(list(STATES.values()), dtype=np.uint16)).tolist() == [False] * len(STATES)
    assert clear_land(np.array(list(KEPT_STATES.values()), dtype=np.uint16)).tolist() == [True] * len(KEPT_STATES)
    assert usable_temperature(np.array([0, 1, 2, 3, 193], dtype=np.uint8)).tolist() == [True, True, False, False, True]
    assert decode_temperature(np.array([0, 11499, 11500, 16499], dtype=np.uint16)).tolist() == [54036, 65535, 0, 4999]
    assert decode_reflectance(np.array([-100, 99, 101, 16000], dtype=np.int16)).tolist() == [100, 100, 101, 16000]


@pytest.fixture
def granules(tmp_path):
    pytest.importorskip("pyhdf", reason="reading HDF needs the extra geo-yield[hdf]")
    if not (DATA / "modis-hdf-samples").exists():
        pytest.skip("the real MODIS samples are not beside the checkout")
    for archive in sorted((DATA / "modis-hdf-samples").glob("*.hdf.zip")):
        zipfile.ZipFile(archive).extractall(tmp_path)
    return {file.name[:7]: file for file in tmp_path.rglob("*.hdf")}


@pytest.mark.real
def test_genuine_granule_and_its_layers_as_geotiff_agree(granules, tmp_path):
    (granule,) = find_composites(granules["MOD09A1"])
    layers = [*(f"sur_refl_b{band:02d}" for band in range(1, 8)), "sur_refl_qc_500m", "sur_refl_state_500m"]
    for layer in layers:
        stored = granule.read(layer)
        path = tmp_path / "tif" / granules["MOD09A1"].name.replace(".hdf", f"_{layer}.tif")
        path.parent.mkdir(exist_ok=True)
        profile = {"count": 1, "height": 73, "width": 66, "transform": stored.grid.transform, "crs": sinusoidal()}
        with rasterio.open(path, "w", driver="GTiff", dtype=stored.pixels.dtype, **profile) as file:
            file.write(stored.pixels, 1)
    (layered,) = find_composites(tmp_path / "tif")
    for layer in layers:
        one, other = granule.read(layer), layered.read(layer)
        assert np.array_equal(one.pixels, other.pixels)
        assert one.pixels.dtype == other.pixels.dtype
        assert one.grid.transform.almost_equals(other.grid.transform, 1e-9)
    assert granule.grid().transform.almost_equals(Affine(PIXEL, 0, 753346.477074, 0, -PIXEL, 5132114.960978), 1e-3)
    hdf, tif = (
        modis_scenes(source)[0].read(modis_layout(mask="none")) for source in (granules["MOD09A1"], tmp_path / "tif")
    )
    assert np.array_equal(hdf.values, tif.values)
    assert np.array_equal(hdf.valid, tif.valid)
    assert 0.5 < hdf.valid[0].mean() < 1


@pytest.mark.real
def test_quality_of_the_genuine_granule(granules):
    (granule,) = find_composites(granules["MOD09A1"])
    quality = granule.read("sur_refl_qc_500m").pixels
    assert set(np.unique(quality).tolist()) == {1073741824, 1075838976}
    assert (quality >> 30 & 1).all()  # atmospheric correction was done
    assert [np.unique(band_quality(quality, band)).tolist() for band in range(1, 8)] == [[0]] * 4 + [[0, 8]] + [[0]] * 2


@pytest.mark.real
def test_granules_without_the_layers_cut_off_or_of_another_kind(granules, tmp_path):
    other = granules["MOD11B2"]
    with pytest.raises(InputProblem, match="no layer 'LST_Day_1km' in its HDF-EOS grids .it has LST_Day_6km"):
        Composite(product="MYD11A2", tile="h14v04", year=2017, doy=1, version="006", layers=(), granule=other).grid()
    real = granules["MOD09A1"]
    for share in (0, 0.3, 0.9999):
        cut = tmp_path / real.name
        cut.write_bytes(real.read_bytes()[: int(share * real.stat().st_size)])
        (scene,) = modis_scenes(cut)
        with pytest.raises(InputProblem, match="is damaged"):
            scene.read(PLAIN)


@pytest.mark.real
@pytest.mark.skipif(not DATA.exists(), reason="the real data are not beside the checkout")
def test_cog_crop_is_read_as_it_is():
    path = next((DATA / "modis-hdf-samples").glob("MOD11A1*CDC*.TIF"))
    source = Composite(
        product="MYD11A2", tile="h09v05", year=2022, doy=103, version="006",
        layers=(("LST_Day_1km", LayerSource(paths=(path,))),),
    )  # fmt: skip
    layer = source.read("LST_Day_1km")
    with rasterio.open(path) as file:
        assert np.array_equal(layer.pixels, file.read(1))
    grid = tile_grid("h09v05", pixels=1200)
    here, tile = layer.grid.transform, grid.transform
    steps = np.array([(here.c - tile.c) / tile.a, (here.f - tile.f) / tile.e])
    assert np.abs(steps - np.round(steps)).max() < 1e-4  # on the grid computed from the tile's number
    assert np.array_equal(resample(layer.pixels, layer.grid, layer.grid, outside=0), layer.pixels)


@pytest.mark.real
@pytest.mark.skipif(not DATA.exists(), reason="the real data are not beside the checkout")
@pytest.mark.parametrize(
    ("file", "tile", "error"),
    [
        ("MOD09A1.A2022033.h19v10.061.json", "h19v10", 1e-6),
        ("MYD11A2.A2022025.h17v00.061.json", "h17v00", 1e-3),  # this product rounds its corners to millimetres
    ],
)
def test_grid_from_the_tile_number_equals_the_catalogue(file, tile, error):
    item = json.loads((DATA / "stac-items" / file).read_text())["properties"]
    grid = tile_grid(tile, pixels=item["proj:shape"][0])
    assert np.abs(np.array(grid.transform[:6]) - item["proj:transform"][:6]).max() < error


@pytest.mark.real
@pytest.mark.skipif(not DATA.exists(), reason="the real data are not beside the checkout")
def test_temperature_histograms_of_a_real_county():
    stored = np.load(DATA / "modis-lst-county-crops" / "raw_temp_2013_31_65.npz")
    edges = np.array(MODIS_LAYOUT.edges[7])

    def shares(step, band):
        pixels = stored[f"raw_2013_t{step}_b{band}"]
        counts = np.histogram(decode_temperature(pixels)[pixels > 0], edges)[0]
        return counts / counts.sum()

    day, night = shares(16, 0), shares(16, 1)
    assert day.argmax() == 27
    assert abs(day[27] - 0.3687) < 1e-4
    assert night.argmax() == 18
    mean_bin = [round(float(shares(step, 0) @ np.arange(32)), 1) for step in range(0, 32, 4)]
    assert mean_bin == [15.5, 21.6, 23.9, 24.9, 27.4, 25.7, 27.4, 22.1]


@pytest.mark.real
@pytest.mark.skipif(not DATA.exists(), reason="the real data are not beside the checkout")
def test_tiles_met_by_counties():
    counties = read_regions(DATA / "us-county-polygons" / "county_data.csv")
    state = counties["region_id"].str[:2]
    soybean = counties[state.isin(["05", "17", "18", "19", "20", "27", "29", "31", "38", "39", "46"])]
    assert tiles_meeting(soybean) == ["h09v05", "h10v04", "h10v05", "h11v04", "h11v05", "h12v04"]
    four = tiles_meeting(counties[state.isin(["19", "17", "22", "28"])])
    assert four == ["h09v05", "h09v06", "h10v04", "h10v05", "h10v06", "h11v04", "h11v05"]


def test_tiles_met_by_a_region_on_their_corner():
    corner = shapely.box(-7 * TILE_SIZE - 5, 4 * TILE_SIZE - 3, -7 * TILE_SIZE + 4, 4 * TILE_SIZE + 2)
    regions = geopandas.GeoDataFrame({"region_id": ["a"]}, geometry=[corner], crs=sinusoidal())
    assert tiles_meeting(regions) == ["h10v04", "h10v05", "h11v04", "h11v05"]
