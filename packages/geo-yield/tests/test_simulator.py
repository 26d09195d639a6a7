"""The simulated region looks to a reader like the real products, and its yields follow its weather."""

from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
from pyproj import CRS

from geo_yield.errors import InputProblem
from geo_yield.simulator import (
    PIXEL_SIZE,
    SINUSOIDAL,
    TILE_SIZE,
    SimulatedRegion,
    SimulationConfig,
    simulate,
)

TINY = SimulationConfig(seasons=2, earlier_seasons=3, county_grid=(2, 3), height=18, widths=(16, 22))
BORDER = -7 * TILE_SIZE


@pytest.fixture(scope="module")
def region(tmp_path_factory: pytest.TempPathFactory) -> SimulatedRegion:
    return simulate(tmp_path_factory.mktemp("sim") / "region", seed=5, config=TINY)


def files(region: SimulatedRegion, product: str, layer: str, *, h: int = 11, year: int = 2015) -> list[Path]:
    return sorted(region.imagery.glob(f"{product}.A{year}*.h{h}v04.061.*_{layer}.tif"))


def stack(region: SimulatedRegion, product: str, layer: str, *, h: int = 11, year: int = 2015) -> np.ndarray:
    def read(path: Path) -> np.ndarray:
        with rasterio.open(path) as file:
            return file.read(1)

    return np.stack([read(path) for path in files(region, product, layer, h=h, year=year)])


def test_every_layer_of_every_composite_is_there_in_lp_daac_naming(region: SimulatedRegion) -> None:
    names = [path.name for path in region.imagery.iterdir()]
    assert len(names) == 2 * 2 * (32 * 13 + 1)  # tiles x years x (composites x layers + land cover)
    assert "MOD09A1.A2015049.h11v04.061.2016032000000_sur_refl_b01.tif" in names
    assert "MYD11A2.A2016297.h10v04.061.2017032000000_QC_Night.tif" in names
    assert "MCD12Q1.A2015001.h10v04.061.2016032000000_LC_Type1.tif" in names


@pytest.mark.parametrize(
    ("product", "layer", "dtype", "nodata", "size"),
    [
        ("MOD09A1", "sur_refl_b02", "int16", -28672, 1),
        ("MOD09A1", "sur_refl_qc_500m", "uint32", 4294967295, 1),
        ("MOD09A1", "sur_refl_state_500m", "uint16", 65535, 1),
        ("MYD11A2", "LST_Day_1km", "uint16", 0, 2),
        ("MCD12Q1", "LC_Type1", "uint8", 255, 1),
    ],
)
def test_georeference_lies_on_the_modis_grid(
    region: SimulatedRegion, product: str, layer: str, dtype: str, nodata: int, size: int
) -> None:
    with rasterio.open(files(region, product, layer, h=10)[0]) as west:
        assert west.profile["dtype"] == dtype
        assert west.nodata == nodata
        assert CRS.from_wkt(west.crs.to_wkt()) == CRS.from_proj4(SINUSOIDAL)
        assert west.transform.a == -west.transform.e == size * PIXEL_SIZE
        pixels = (
            (west.transform.c - (10 - 18) * TILE_SIZE) / west.transform.a,
            (5 * TILE_SIZE - west.transform.f) / (size * PIXEL_SIZE),
        )
        assert pixels == pytest.approx((2400 / size - 16 / size, 2400 / size - 18 / size), abs=1e-6)
        assert west.bounds.right == pytest.approx(BORDER, abs=1e-6)
        assert west.bounds.bottom == pytest.approx(4 * TILE_SIZE, abs=1e-6)
        assert west.shape == (18 // size, 16 // size)
        assert west.tags()["SIMULATED"].startswith("yes")
    with rasterio.open(files(region, product, layer, h=11)[0]) as east:
        assert east.bounds.left == pytest.approx(BORDER, abs=1e-6)
        assert east.shape == (18 // size, 22 // size)


def test_crop_greens_up_peaks_in_july_and_ripens(region: SimulatedRegion) -> None:
    red, infrared = (stack(region, "MOD09A1", f"sur_refl_b0{band}").astype(float) for band in (1, 2))
    state = stack(region, "MOD09A1", "sur_refl_state_500m")
    crop = stack(region, "MCD12Q1", "LC_Type1")[0] == 12
    clear = ((state & 0b111) == 0) & (state & (1 << 12) == 0) & crop
    ndvi = (infrared - red) / (infrared + red)
    season = np.array(
        [np.median(image[seen]) if seen.any() else np.nan for image, seen in zip(ndvi, clear, strict=True)]
    )
    assert 177 <= 49 + 8 * np.nanargmax(season) <= 217
    assert np.nanmax(season) > 0.75
    assert season[7] < 0.35  # early April, bare
    assert season[-1] < 0.45  # late October, ripe


def test_clouds_gaps_and_snow_are_flagged_as_in_the_product(region: SimulatedRegion) -> None:
    blue, state, qc = (stack(region, "MOD09A1", f"sur_refl_{layer}") for layer in ("b03", "state_500m", "qc_500m"))
    gap = blue == -28672
    assert 0.001 < gap.mean() < 0.1
    assert np.array_equal(gap, state == 65535)
    assert np.array_equal(gap, qc == 4294967295)
    cloudy = np.isin(state & 3, (1, 2)) & ~gap
    assert 0.05 < cloudy.mean() < 0.4
    assert np.median(blue[cloudy]) > 2000 > 3 * np.median(blue[~cloudy & ~gap & (state & (1 << 12) == 0)])
    assert np.array_equal(cloudy, (state & (1 << 10) > 0) & ~gap)
    assert np.all(qc[~gap] & (1 << 30) > 0)
    snow = (state & (1 << 12) > 0) & ~gap
    assert not snow[8:].any()  # none after April
    land = stack(region, "MCD12Q1", "LC_Type1")[0] != 17
    assert np.array_equal((state >> 3) & 7, np.where(gap, 7, np.where(land, 1, 3)))


def test_land_surface_temperature_is_scaled_and_lost_under_clouds(region: SimulatedRegion) -> None:
    day, night = (stack(region, "MYD11A2", f"LST_{time}_1km") for time in ("Day", "Night"))
    for numbers, name in ((day, "QC_Day"), (night, "QC_Night")):
        quality = stack(region, "MYD11A2", name)
        assert np.array_equal(numbers == 0, quality & 3 == 2)
        assert set(np.unique(quality)) == {0, 2, 0b01000001}
    july = day[18].astype(float)[day[18] > 0] * 0.02 - 273.15
    assert 24 < np.median(july) < 40
    seen = (day > 0) & (night > 0)
    assert np.median((day.astype(float) - night)[seen]) * 0.02 > 8  # K between afternoon and night


def test_counties_cross_the_tile_border_and_keep_leading_zeros(region: SimulatedRegion) -> None:
    counties = geopandas.read_file(region.regions)
    assert counties.crs == CRS.from_epsg(4326)
    assert counties["region_id"].tolist() == ["03001", "03003", "03005", "03007", "03009", "03011"]
    bounds = counties.to_crs(SINUSOIDAL).bounds
    assert ((bounds["minx"] < BORDER) & (bounds["maxx"] > BORDER)).any()
    assert counties.is_valid.all()
    overlap = counties.to_crs(SINUSOIDAL).area.sum() - counties.to_crs(SINUSOIDAL).union_all().area
    assert abs(overlap) < PIXEL_SIZE**2


def test_yields_reach_back_before_the_imagery(region: SimulatedRegion) -> None:
    table = pd.read_csv(region.yields, dtype={"region_id": str})
    assert list(table.columns) == ["region_id", "year", "crop", "yield", "unit", "source"]
    assert sorted(table["year"].unique()) == [2012, 2013, 2014, 2015, 2016]
    assert len(table) == 5 * 6
    assert set(table["unit"]) == {"bu/acre"}
    assert set(table["source"]) == {"simulated"}
    assert table["yield"].between(8, 80).all()


def test_a_seed_fixes_every_byte_and_heat_costs_yield(region: SimulatedRegion, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (folder / "imagery").iterdir()}

    again = simulate(tmp_path / "again", seed=5, config=TINY)
    assert content(again.folder) == content(region.folder)
    assert again.yields.read_bytes() == region.yields.read_bytes()
    calm_config = SimulationConfig(
        seasons=2, earlier_seasons=3, county_grid=(2, 3), height=18, widths=(16, 22), strong_spell=(0.0, 0.0)
    )
    calm = simulate(tmp_path / "calm", seed=5, config=calm_config)
    hot_yields, calm_yields = (
        pd.read_csv(path, dtype={"region_id": str}).pivot(index="region_id", columns="year", values="yield")
        for path in (region.yields, calm.yields)
    )
    assert np.array_equal(hot_yields.drop(columns=2016), calm_yields.drop(columns=2016))
    assert (hot_yields[2016] < 0.95 * calm_yields[2016]).all()
    assert simulate(tmp_path / "other", seed=6, config=TINY).yields.read_bytes() != region.yields.read_bytes()


def test_a_second_call_leaves_the_files_and_another_simulation_is_not_overwritten(region: SimulatedRegion) -> None:
    seasons: list[int] = []
    before = region.yields.stat().st_mtime_ns
    assert simulate(region.folder, seed=5, config=TINY, on_season=seasons.append) == region
    assert seasons == []
    assert region.yields.stat().st_mtime_ns == before
    with pytest.raises(InputProblem, match="holds something else than this simulation"):
        simulate(region.folder, seed=7, config=TINY)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(InputProblem, match="even sides of 8 or more pixels, got 18 x"):
        SimulationConfig(height=18, widths=(15, 22))
    with pytest.raises(InputProblem, match="2 or more seasons"):
        SimulationConfig(seasons=1)
