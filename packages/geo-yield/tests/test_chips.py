"""Chips from Sentinel-2: which cells, which pixels, which tone, and the way back through CropNet's layout."""

from datetime import date
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from affine import Affine
from shapely.geometry import Polygon, box

from geo_yield.chips import DOMAIN_SHIFT, cells_of, chips_from_products, write_chips
from geo_yield.errors import InputProblem
from geo_yield.published import CropNetChips
from geo_yield.sentinel2 import BANDS, find_products

LEFT, TOP = 500_000, 4_600_020
WIDTH, HEIGHT = 360, 240


def pixels(band: str, left: int = LEFT) -> np.ndarray:
    """Digital numbers between 100 and 3400 that say which band, row and column (from LEFT) they are of."""
    size = BANDS[band].size
    row, column = np.ogrid[: HEIGHT // size, : WIDTH // size]
    first = (left - LEFT) // size
    return (100 + 1000 * ["B11", "B08", "B02"].index(band) + 20 * row + 3 * (column + first)).astype(np.uint16)


def write_product(
    folder: Path, *, tile: str = "15TVH", left: int = LEFT, crs: str = "EPSG:32615", **changes: np.ndarray
):
    folder.mkdir(parents=True)
    for band in ("B02", "B08", "B11"):
        values = changes.get(band, pixels(band, left))
        size, (height, width) = BANDS[band].size, values.shape
        profile = {"driver": "GTiff", "count": 1, "dtype": "uint16", "crs": crs, "height": height, "width": width}
        place = Affine(size, 0, left, 0, -size, TOP)
        with rasterio.open(folder / f"{tile}_20220604_{band}.tif", "w", transform=place, **profile) as image:
            image.write(values, 1)
    return find_products(folder, offset=0)


def region(*shapes, crs: str = "EPSG:32615") -> gpd.GeoDataFrame:
    ids = [f"1900{i}" for i in range(1, len(shapes) + 1)]
    return gpd.GeoDataFrame({"region_id": ids}, geometry=list(shapes), crs=crs)


def expected(band: str, row: int, column: int, side: int) -> np.ndarray:
    """8-bit tone of the 20 m pixels from row and column on, `side` of them each way."""
    values = pixels(band).astype(np.float64)
    fine = values.reshape(12, 20 // BANDS[band].size, 18, 20 // BANDS[band].size).mean(axis=(1, 3))
    return np.rint(np.clip(fine[row : row + side, column : column + side] / 10000 * 2.5, 0, 1) * 255)


def test_a_chip_shows_its_cell_in_false_colour(tmp_path):
    products = write_product(tmp_path / "a")
    south_west = (LEFT + 40, TOP - 200)
    (made,) = chips_from_products(products, region(box(*south_west, LEFT + 130, TOP - 100)), size=6, metres=120)
    assert made.region_id == "19001"
    assert made.chips.shape == (1, 6, 6, 3)
    for channel, band in enumerate(("B11", "B08", "B02")):
        np.testing.assert_array_equal(made.chips[0, :, :, channel], expected(band, 4, 2, 6))
    assert made.covered.tolist() == [1.0]
    assert made.coordinates[0, 0] == pytest.approx([41.5500, -92.9995], abs=1e-3)
    assert made.coordinates[0, 1] - made.coordinates[0, 0] == pytest.approx([0.00108, 0.00144], abs=2e-5)


def test_fewer_pixels_are_means(tmp_path):
    products = write_product(tmp_path / "a")
    (made,) = chips_from_products(products, region(box(LEFT, TOP - 240, LEFT + 100, TOP - 130)), size=3, metres=120)
    tone = pixels("B11")[6:12, :6].reshape(3, 2, 3, 2).mean(axis=(1, 3)) / 10000 * 2.5 * 255
    np.testing.assert_array_equal(made.chips[0, :, :, 0], np.rint(tone))


def test_bright_pixels_saturate(tmp_path):
    products = write_product(tmp_path / "a", B11=np.full((12, 18), 4001, dtype=np.uint16))
    (made,) = chips_from_products(products, region(box(LEFT, TOP - 240, LEFT + 100, TOP - 130)), size=6, metres=120)
    assert (made.chips[..., 0] == 255).all()
    assert (made.chips[..., 1] < 255).all()


def test_cells_cover_the_region_row_by_row_and_leave_out_what_it_does_not_meet():
    triangle = Polygon([(1007, 2003), (1250, 2003), (1007, 2250)])
    assert cells_of(triangle, 100) == [
        (1000, 2000),
        (1100, 2000),
        (1200, 2000),
        (1000, 2100),
        (1100, 2100),
        (1000, 2200),
    ]


def test_two_tiles_join_and_what_no_image_reaches_is_black(tmp_path):
    west, east = write_product(tmp_path / "a"), write_product(tmp_path / "b", tile="15TWH", left=LEFT + 300)
    cell = box(LEFT + 240, TOP - 240, LEFT + 300, TOP - 150)
    (joined,) = chips_from_products(west + east, region(cell), size=6, metres=120)
    assert joined.covered.tolist() == [1.0]
    (alone,) = chips_from_products(west, region(cell), size=6, metres=120)
    np.testing.assert_array_equal(alone.chips[0], joined.chips[0])
    far = box(LEFT + 300, TOP - 240, LEFT + 400, TOP - 150)
    (cut,) = chips_from_products(west, region(far), size=6, metres=120)
    assert cut.covered == pytest.approx([0.5])
    assert (cut.chips[0, :, 3:] == 0).all()
    (whole,) = chips_from_products(west + east, region(far), size=6, metres=120)
    np.testing.assert_array_equal(whole.chips[0, :, :3], cut.chips[0, :, :3])
    tone = (pixels("B11", LEFT + 300)[6:12, :6] / 10000 * 2.5) * 255
    np.testing.assert_array_equal(whole.chips[0, :, :, 0], np.rint(tone))


def test_regions_in_degrees_and_regions_outside(tmp_path):
    products = write_product(tmp_path / "a")
    inside, outside = box(LEFT + 100, TOP - 200, LEFT + 150, TOP - 150), box(LEFT, TOP + 9000, LEFT + 50, TOP + 9050)
    made = chips_from_products(products, region(outside, inside).to_crs(4326), size=6, metres=120)
    assert [one.region_id for one in made] == ["19002"]
    with pytest.raises(InputProblem, match="no region lies in the images of 15TVH"):
        chips_from_products(products, region(outside), size=6, metres=120)


def test_what_cannot_be_cut_is_refused(tmp_path):
    somewhere = region(box(LEFT, TOP - 100, LEFT + 50, TOP - 50))
    with pytest.raises(InputProblem, match="at least one"):
        chips_from_products([], somewhere)
    products = write_product(tmp_path / "a") + write_product(tmp_path / "b", tile="16TCN", crs="EPSG:32616")
    with pytest.raises(InputProblem, match="one UTM zone, got .*15N, .*16N"):
        chips_from_products(products, somewhere)
    with pytest.raises(InputProblem, match="multiple of 20 m, got 90"):
        chips_from_products(products[:1], somewhere, metres=90)


def test_written_chips_are_read_as_cropnet_is(tmp_path):
    h5py = pytest.importorskip("h5py")
    products = write_product(tmp_path / "a")
    made = chips_from_products(products, region(box(LEFT + 5, TOP - 200, LEFT + 250, TOP - 150)), size=6, metres=120)
    write_chips(tmp_path / "chips.h5", {date(2022, 6, 1): made, date(2022, 6, 15): made, date(2022, 7, 1): made})
    with h5py.File(tmp_path / "chips.h5") as stored:
        assert stored.attrs["domain_shift"] == DOMAIN_SHIFT
        np.testing.assert_array_equal(stored["19001/2022-06-15/coordinates"][:], made[0].coordinates)
    (tmp_path / "USDA.csv").write_text(
        'commodity_desc,year,state_ansi,county_ansi,"PRODUCTION, MEASURED IN BU","YIELD, MEASURED IN BU / ACRE"\n'
        "CORN,2022,19,001,100,200\n"
    )
    (tmp_path / "index.json").write_text(
        '[{"FIPS": "19001", "year": 2022, "data": {"USDA": "USDA.csv", "sentinel": ["chips.h5"]}}]'
    )
    sample = CropNetChips(tmp_path, tmp_path / "index.json")[0]
    assert sample["chips"].shape == (2, 3, 6, 6, 3)
    np.testing.assert_array_equal(sample["chips"][1].numpy(), made[0].chips)
    assert not list(tmp_path.glob(".*partial"))
