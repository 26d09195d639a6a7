"""Preparation: exact counts, regions over two tiles, resuming, engines that agree to the last byte."""

import json
import logging
import os
import signal
import sys
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely
from affine import Affine
from pyproj import CRS

from geo_yield import prepare
from geo_yield.engine import run_units
from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramLayout, HistogramStore
from geo_yield.prepare import count_unit, prepare_histograms
from geo_yield.scenes import Grid, Pixels

UTM = CRS.from_epsg(32615)
HEIGHT, WIDTH = 11, 17
LAYOUT = HistogramLayout(
    sensor="test", bands=("low", "high", "flat"), doy=(49, 57), edges=((1, 20, 40, 60, 99),) * 3, qa="none", mask="half"
)


@dataclass(frozen=True, kw_only=True)
class FakeScene:
    """Values of a seed; the grid is tile 0 or 1, side by side. The first read leaves `deadly` and kills its process."""

    tile: int
    year: int
    step: int
    deadly: Path | None = None

    @property
    def key(self) -> str:
        return f"t{self.tile}-{self.year}-{self.step}"

    @property
    def grid_key(self) -> int:
        return self.tile

    def grid(self) -> Grid:
        left = 500_000 + 10 * WIDTH * self.tile
        return Grid(crs=UTM, transform=Affine(10, 0, left, 0, -10, 4_600_000), height=HEIGHT, width=WIDTH)

    def read(self, layout: HistogramLayout) -> Pixels:
        if self.deadly is not None and not self.deadly.exists():
            self.deadly.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        rng = np.random.default_rng([self.tile, self.year, self.step])
        values = rng.integers(0, 120, (len(layout.bands), HEIGHT, WIDTH)).astype(np.uint16)
        values[2] = 40
        valid = rng.random(values.shape) < 0.7
        if self.step == 1:
            valid[1] = False
        return Pixels(values=values, valid=valid, counted=np.arange(WIDTH)[None, :] + np.zeros((HEIGHT, 1)) > 2)


SCENES = [FakeScene(tile=tile, year=year, step=step) for year in (2015, 2016) for tile in (0, 1) for step in (0, 1)]


def box(left: float, top: float, right: float, bottom: float) -> shapely.Polygon:
    """In columns and rows; tile 1 begins at column 17."""
    return shapely.box(500_000 + 10 * left, 4_600_000 - 10 * bottom, 500_000 + 10 * right, 4_600_000 - 10 * top)


def regions_of(count: int = 70) -> geopandas.GeoDataFrame:
    """More than a block of rows: over both tiles, in tile 1, outside, without a pixel, and small ones."""
    shapes = [box(4, 1, 25, 6), box(20, 7, 30, 11), box(900, 0, 910, 5), box(5.6, 7.6, 5.9, 7.9)]
    shapes += [box(3 + i % 10, 6 + i // 10 % 5, 4 + i % 10, 7 + i // 10 % 5) for i in range(50)][: count - 4]
    shapes += [box(18 + i, 0, 19 + i, 1) for i in range(count - len(shapes))]
    ids = [f"{number:05d}" for number in range(len(shapes))]
    return geopandas.GeoDataFrame({"region_id": ids}, geometry=shapes, crs=UTM)


def by_hand(regions: geopandas.GeoDataFrame, year: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts (N, C, T, K) and countable pixels (N,), pixel by pixel with numpy alone."""
    counts = np.zeros((len(regions), 3, 2, 4), dtype=np.int64)
    countable = np.zeros(len(regions), dtype=np.int64)
    for scene in (s for s in SCENES if s.year == year):
        pixels, t = scene.read(LAYOUT), scene.grid().transform
        x, y = t.c + 10 * (np.arange(WIDTH) + 0.5), t.f - 10 * (np.arange(HEIGHT) + 0.5)
        for number, shape in enumerate(regions.geometry):
            inside = shapely.contains_xy(shape, *np.meshgrid(x, y)) & pixels.counted
            countable[number] += inside.sum() * (scene.step == 0)
            for band in range(3):
                seen = pixels.values[band][inside & pixels.valid[band]]
                counts[number, band, scene.step] += np.histogram(seen, LAYOUT.edges[band])[0]
    return counts, countable


def test_histograms_equal_numpy_pixel_by_pixel(tmp_path, caplog):
    regions = regions_of()
    with caplog.at_level(logging.WARNING):
        files = prepare_histograms(SCENES, regions, LAYOUT, tmp_path, workers=1)
    assert [file.name for file in files] == ["2015.parquet", "2016.parquet"]
    for year in (2015, 2016):
        rows = HistogramStore(tmp_path).read(years=[year])
        counts, countable = by_hand(regions, year)
        assert rows.region_id.tolist() == regions["region_id"].tolist()
        assert np.array_equal(rows.valid_count, counts.sum(-1))
        assert np.array_equal(rows.pixel_count, countable)
        assert np.array_equal(rows.image, (counts / np.maximum(counts.sum(-1, keepdims=True), 1)).astype(np.float32))
    assert countable[0] > countable[1] > 0 == countable[2] == countable[3]
    assert rows.valid_count[0, :, 0].min() > 20
    assert rows.lon[0] == pytest.approx(-92.9983, abs=1e-3)
    assert rows.lat[0] == pytest.approx(41.5505, abs=1e-3)
    assert "2015: 4 regions have no pixel, e.g. 00002" in caplog.text


def test_report_tells_what_was_seen_of_each_region(tmp_path):
    prepare_histograms(SCENES[:4], regions_of(), LAYOUT, tmp_path, workers=1)
    prepare_histograms(SCENES, regions_of(), LAYOUT, tmp_path, workers=1)
    report = json.loads((tmp_path / "prepare.json").read_text())
    year, rows = report["years"]["2015"], HistogramStore(tmp_path).read(years=[2015])
    assert sorted(report["years"]) == ["2015", "2016"]
    empty = ["00002", "00003", "00054", "00055"]  # outside, too small, and two in columns that the mask drops
    assert (year["scenes"], year["regions"], year["without_pixels"]) == (4, 70, empty)
    assert year["valid_fraction"]["00000"] == pytest.approx(rows.valid_fraction[0], abs=1e-4)
    assert 0.2 < year["valid_fraction"]["00000"] < 0.7
    small = [name for name, share in zip(rows.region_id, rows.missing_share, strict=True) if share > 0.25]
    assert year["more_than_25_percent_missing"] == [name for name in small if name not in empty]
    assert HistogramLayout.from_json(json.dumps(report["layout"])) == LAYOUT


def test_order_of_scenes_does_not_matter(tmp_path):
    prepare_histograms(SCENES, regions_of(), LAYOUT, tmp_path / "a", workers=1)
    prepare_histograms(SCENES[::-1], regions_of(), LAYOUT, tmp_path / "b", workers=1)
    for year in ("2015.parquet", "2016.parquet"):
        assert (tmp_path / "a" / year).read_bytes() == (tmp_path / "b" / year).read_bytes()


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, monkeypatch):
    whole = prepare_histograms(SCENES, regions_of(), LAYOUT, tmp_path / "whole", workers=1)

    @dataclass(frozen=True, kw_only=True)
    class Broken(FakeScene):
        def read(self, layout: HistogramLayout) -> Pixels:
            raise InputProblem("'tile.hdf' is damaged")

    third = Broken(tile=1, year=2015, step=0)
    with pytest.raises(InputProblem, match=r"tile\.hdf"):
        prepare_histograms([*SCENES[:2], third, *SCENES[3:]], regions_of(), LAYOUT, tmp_path / "cut", workers=1)
    assert not list((tmp_path / "cut").glob("*.parquet"))
    assert not list((tmp_path / "cut" / ".units").glob("*.partial"))
    (tmp_path / "cut" / ".units" / f"{SCENES[0].key}.npy").write_bytes(b"half a file")  # is made again
    counted, progress = [], []
    monkeypatch.setattr(prepare, "count_unit", lambda unit: (counted.append(unit.scene.key), count_unit(unit))[1])
    files = prepare_histograms(
        SCENES, regions_of(), LAYOUT, tmp_path / "cut", workers=1, on_unit=lambda *done: progress.append(done)
    )
    assert counted == [scene.key for scene in [SCENES[0], *SCENES[2:]]]
    assert progress == [(done, 8) for done in range(1, 9)]
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in whole]


def test_other_options_do_not_mix_with_what_is_there(tmp_path):
    prepare_histograms(SCENES[:1], regions_of(), LAYOUT, tmp_path, workers=1)
    with pytest.raises(InputProblem, match="mask is 'none', expected 'half'"):
        prepare_histograms(SCENES[:1], regions_of(), replace(LAYOUT, mask="none"), tmp_path, workers=1)
    with pytest.raises(InputProblem, match="was begun with other regions"):
        prepare_histograms(SCENES[:1], regions_of(60), LAYOUT, tmp_path, workers=1)


def test_a_folder_made_anew_with_other_regions_is_not_served_from_memory(tmp_path):
    import shutil

    first, second = regions_of(60), regions_of(60).iloc[::-1].reset_index(drop=True)
    prepare_histograms(SCENES[:2], first, LAYOUT, tmp_path / "out", workers=1)
    shutil.rmtree(tmp_path / "out")
    prepare_histograms(SCENES[:2], second, LAYOUT, tmp_path / "out", workers=1)
    rows = HistogramStore(tmp_path / "out").read()
    assert rows.region_id[-1] == "00000"
    assert rows.pixel_count[-1] == 65  # columns 4 to 16 of rows 1 to 5


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(InputProblem, match="no scenes"):
        prepare_histograms([], regions_of(), LAYOUT, tmp_path)
    with pytest.raises(InputProblem, match="scene t0-2015-0 is given 2 times"):
        prepare_histograms([SCENES[0], SCENES[0]], regions_of(), LAYOUT, tmp_path)
    with pytest.raises(InputProblem, match="none of the 1 regions has a pixel in any of the 8 scenes"):
        prepare_histograms(SCENES, regions_of().iloc[2:3], LAYOUT, tmp_path / "far", workers=1)
    assert not list((tmp_path / "far").glob("*.parquet"))
    with pytest.raises(InputProblem, match="engine must be one of local, ray, got 'dask'"):
        run_units(len, ["a"], engine="dask")
    with pytest.raises(InputProblem, match="workers must be at least 1, got 0"):
        run_units(len, ["a"], workers=0)


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """This file as a module that workers can import by name."""
    (tmp_path / "fake_scenes.py").write_text(Path(__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import fake_scenes

    yield fake_scenes
    sys.modules.pop("fake_scenes")


@pytest.mark.parametrize(
    ("engine", "killed"), [("local", True), ("ray", False), pytest.param("ray", True, marks=pytest.mark.slow)]
)
def test_two_workers_one_of_them_killed_give_the_same_bytes(tmp_path, importable, engine, killed):
    pytest.importorskip("ray" if engine == "ray" else "geo_yield", reason="engine 'ray' needs the extra geo-yield[ray]")
    expected = prepare_histograms(SCENES, regions_of(), LAYOUT, tmp_path / "one", workers=1)
    deadly = tmp_path / "died" if killed else None
    scenes = [importable.FakeScene(tile=s.tile, year=s.year, step=s.step, deadly=deadly) for s in SCENES]
    files = prepare_histograms(scenes, regions_of(), LAYOUT, tmp_path / "two", engine=engine, workers=2)
    assert (tmp_path / "died").exists() == killed
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in expected]


def test_units_in_processes_come_back_with_their_place():
    assert dict(run_units(len, ["a", "bcd", "", "ef"], workers=2)) == {0: 1, 1: 3, 2: 0, 3: 2}


@dataclass(frozen=True, kw_only=True)
class LargeScene(FakeScene):
    def grid(self) -> Grid:
        return Grid(crs=UTM, transform=Affine(10, 0, 500_000, 0, -10, 4_600_000), height=500, width=700)

    def read(self, layout: HistogramLayout) -> Pixels:
        values = np.full((3, 500, 700), 30 + self.step, dtype=np.uint16)
        return Pixels(values=values, valid=values > 0, counted=values[0] > 0)


def test_memory_does_not_grow_with_the_number_of_scenes(tmp_path):
    regions, peaks = regions_of(), []
    layout = replace(LAYOUT, doy=tuple(range(1, 25)))
    for name, count in (("few", 3), ("many", 24)):
        tracemalloc.start()
        scenes = [LargeScene(tile=0, year=2015, step=step) for step in range(count)]
        prepare_histograms(scenes, regions, layout, tmp_path / name, workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    scene = 3 * 500 * 700 * 3  # bytes of values and of valid
    assert scene < peaks[0]  # so pixels are seen by this measure
    assert peaks[1] - peaks[0] < scene / 2
