"""Images to histograms: count, for every scene, the pixels of each region by band and bin, then add up.

The unit of work is a scene (a tile on a date), never a region: each file is read once, whatever the number of regions,
as a national run needs (3,100 counties, 14 tiles, 32 dates). Each unit leaves one small file of integer counts in
`<out>/.units`; a second run goes on where the first stopped. Counts are added over tiles and scenes as integers and
divided at the very end: the result is the same bit for bit with any engine, number of workers, order or cut into tiles.

Memory holds one scene per worker, and 64 regions while adding up; neither grows with the number of scenes.

Shapes: C bands, T composites, K bins of the layout; H, W of a scene; Z regions in it; N regions in all.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import geopandas
import numpy as np
import torch
from jaxtyping import Int32, Shaped

from geo_yield.engine import run_units
from geo_yield.errors import InputProblem
from geo_yield.histograms import ROWS_PER_GROUP, HistogramLayout, HistogramStore, YieldTensor, write_histograms
from geo_yield.regions import rasterise, region_points
from geo_yield.scenes import Grid, Pixels, Scene
from geo_yield.whole_files import whole_file
from shared_kernels import zonal_histogram

MISSING_SHARE_TO_WARN = 0.25
"""Share of a region's (band, composite) cells without any valid pixel from which it is named in the report."""

log = logging.getLogger(__name__)


def prepare_histograms(
    scenes: Sequence[Scene],
    regions: geopandas.GeoDataFrame,
    layout: HistogramLayout,
    out: Path,
    *,
    engine: str = "local",
    workers: int | None = None,
    on_unit: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write `<out>/<year>.parquet` for every year of `scenes`, and return the files in order of years.

    A row per region, in the order of `regions` (see `read_regions`); a region without any pixel gets one too, with
    `pixel_count` 0. `<out>/prepare.json` says what was read, which share of each region was seen, and which regions are
    poorly covered. `on_unit(done, total)` is called as scenes finish, at once for those that an earlier run finished.
    Raises InputProblem if there is no scene, two scenes have one key, `out` was made with other regions or another
    layout, no region meets any scene, or a file cannot be read; finished scenes stay finished.
    """
    out = Path(out)
    _refuse_doubtful(scenes)
    folder = _open_folder(out, regions, layout)
    _count_all(scenes, layout, folder, engine, workers, on_unit)
    index = _index(scenes, folder)
    if not index:
        raise InputProblem(
            f"none of the {len(regions)} regions has a pixel in any of the {len(scenes)} scenes. "
            "Are regions and imagery of the same area, and are their coordinate systems right?"
        )
    files, coverage = [], {}
    for year in sorted({scene.year for scene in scenes}):
        files.append(out / f"{year}.parquet")
        coverage[str(year)] = Coverage()
        of_year = [entry for entry in index if entry.year == year]
        batches = coverage[str(year)].watch(_add_up(of_year, regions, layout, year))
        write_histograms(files[-1], layout, batches)
        coverage[str(year)].log(year)
    _write_report(out, scenes, layout, coverage)
    return files


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What a worker is given."""

    scene: Scene
    layout: HistogramLayout
    folder: Path
    """Holds regions.parquet, and gets label and count files."""
    regions: str
    """Digest of the regions."""


def count_unit(unit: Unit) -> str:
    """Count one scene into its file, `<folder>/<key>.npy`, and return the key.

    The file is an int32 table with a row per region that has a pixel in the scene, by row number: row number, pixels
    that the mask lets count, then C x K counts.
    """
    layout, scene = unit.layout, unit.scene
    C, _, K = layout.shape
    rows, labels = labels_of(unit.folder, unit.regions, scene.grid())
    table = np.zeros((len(rows), 2 + C * K), dtype=np.int32)
    if len(rows):
        pixels = scene.read(layout)
        _refuse_wrong_shape(pixels, labels.shape, C, scene.key)
        table[:, 0] = rows
        table[:, 1] = np.bincount(labels[pixels.counted], minlength=len(rows) + 1)[1:]
        table[:, 2:] = _count(pixels, labels, layout, len(rows)).reshape(len(rows), C * K)
    with whole_file(unit.folder / f"{scene.key}.npy") as partial, partial.open("wb") as stream:
        np.save(stream, table)
    return scene.key


def _count(
    pixels: Pixels, labels: Int32[np.ndarray, "H W"], layout: HistogramLayout, zones: int
) -> Int32[np.ndarray, "Z C K"]:
    counts = np.zeros((zones, layout.shape[0], layout.shape[2]), dtype=np.int32)
    zone = torch.from_numpy(labels)
    for band, edges in enumerate(layout.edges):  # band by band, for the memory of one
        valid = torch.from_numpy(pixels.valid[band] & pixels.counted)
        values = torch.from_numpy(np.ascontiguousarray(pixels.values[band]))[None]
        limits = torch.tensor([edges], dtype=torch.float64)
        counts[:, band] = zonal_histogram(values, zone, limits, num_zones=zones, valid=valid)[:, 0].numpy()
    return counts


def _refuse_wrong_shape(pixels: Pixels, shape: tuple[int, ...], bands: int, key: str) -> None:
    if pixels.values.shape != (bands, *shape) or pixels.valid.shape != (bands, *shape) or pixels.counted.shape != shape:
        raise InputProblem(
            f"scene {key} gave pixels of shape {pixels.values.shape}, its grid and layout say {(bands, *shape)}"
        )


@lru_cache(maxsize=1)
def labels_of(folder: Path, regions: str, grid: Grid) -> tuple[Int32[np.ndarray, "Z"], Int32[np.ndarray, "H W"]]:
    """Row numbers of the regions with a pixel on the grid, and labels 0 = none, i + 1 = the i-th of them.

    Made once per grid from `<folder>/regions.parquet`, with digest `regions`, and kept there; the last also in memory.
    """
    place = (regions, grid.crs.to_wkt(), tuple(grid.transform)[:6], grid.height, grid.width)
    path = folder / f"labels-{hashlib.sha256(repr(place).encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        found = rasterise(geopandas.read_parquet(folder / "regions.parquet"), grid)
        present = np.unique(found)
        rows = present[present > 0] - 1
        position = np.zeros(present[-1] + 1, dtype=np.int32)
        position[rows + 1] = np.arange(1, len(rows) + 1)
        with whole_file(path) as partial, partial.open("wb") as stream:
            np.savez_compressed(stream, rows=rows, labels=position[found])
    with np.load(path) as saved:
        return saved["rows"], saved["labels"]


def _refuse_doubtful(scenes: Sequence[Scene]) -> None:
    if not scenes:
        raise InputProblem("no scenes to prepare")
    key, times = Counter(scene.key for scene in scenes).most_common(1)[0]
    if times > 1:
        raise InputProblem(f"scene {key} is given {times} times; its pixels would count as often")


def _open_folder(out: Path, regions: geopandas.GeoDataFrame, layout: HistogramLayout) -> Path:
    """`<out>/.units`, made or found to belong to the same regions and layout."""
    if list(out.glob("*.parquet")):
        HistogramStore(out).layout.refuse_mismatch(
            layout, given="what is asked for", expected=f"what '{out}' holds (give another folder, or remove it)"
        )
    folder = out / ".units"
    job = folder / "job.json"
    asked = {"layout": layout.to_json(), "regions": _digest(regions)}
    if job.exists():
        held = json.loads(job.read_text())
        HistogramLayout.from_json(held["layout"]).refuse_mismatch(
            layout, given="what is asked for", expected=f"what '{out}' holds (give another folder, or remove it)"
        )
        if held["regions"] != asked["regions"]:
            raise InputProblem(f"'{out}' was begun with other regions. Give another folder, or remove it")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "regions.parquet") as partial:
        regions[["region_id", "geometry"]].to_parquet(partial)
    with whole_file(job) as partial:
        partial.write_text(json.dumps(asked))
    return folder


def _digest(regions: geopandas.GeoDataFrame) -> str:
    parts = hashlib.sha256(str(regions.crs).encode())
    for name, shape in zip(regions["region_id"], regions.geometry.to_wkb(), strict=True):
        parts.update(name.encode())
        parts.update(shape)
    return parts.hexdigest()


def _count_all(
    scenes: Sequence[Scene],
    layout: HistogramLayout,
    folder: Path,
    engine: str,
    workers: int | None,
    on_unit: Callable[[int, int], None] | None,
) -> None:
    width = 2 + layout.shape[0] * layout.shape[2]
    left = [scene for scene in scenes if not _is_finished(folder / f"{scene.key}.npy", width)]
    done = len(scenes) - len(left)
    if done:
        log.info("%d of %d scenes were counted by an earlier run", done, len(scenes))
        if on_unit:
            on_unit(done, len(scenes))
    digest = json.loads((folder / "job.json").read_text())["regions"]
    units = [Unit(scene=scene, layout=layout, folder=folder, regions=digest) for scene in left]
    for _ in run_units(count_unit, units, engine=engine, workers=workers):
        done += 1
        if on_unit:
            on_unit(done, len(scenes))


def _is_finished(path: Path, width: int) -> bool:
    if not path.exists():
        return False
    try:
        table = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError):
        log.warning("'%s' is damaged and is made again", path)
        return False
    return table.ndim == 2 and table.shape[1] == width


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A finished unit that has regions."""

    path: Path
    year: int
    step: int
    grid_key: Hashable
    first: int
    """Lowest and highest row number of its regions."""
    last: int


def _index(scenes: Sequence[Scene], folder: Path) -> list[Counted]:
    found = []
    for scene in scenes:
        path = folder / f"{scene.key}.npy"
        rows = np.load(path, mmap_mode="r")[:, 0]
        if len(rows):
            span = {"first": int(rows[0]), "last": int(rows[-1])}
            found.append(Counted(path=path, year=scene.year, step=scene.step, grid_key=scene.grid_key, **span))
    return found


def _add_up(
    index: list[Counted], regions: geopandas.GeoDataFrame, layout: HistogramLayout, year: int
) -> Iterator[YieldTensor]:
    """All regions in blocks, so that memory does not depend on how many there are."""
    lon, lat = region_points(regions)
    for start in range(0, len(regions), ROWS_PER_GROUP):
        block = slice(start, min(start + ROWS_PER_GROUP, len(regions)))
        counts, pixels = _add_up_block([c for c in index if c.first < block.stop and c.last >= start], block, layout)
        total = counts.sum(axis=-1)
        yield YieldTensor(
            layout=layout,
            image=(counts / np.maximum(total, 1)[..., None]).astype(np.float32),
            region_id=regions["region_id"].to_numpy()[block].astype(str),
            year=np.full(len(total), year, dtype=np.int16),
            lon=lon[block],
            lat=lat[block],
            valid_count=total.astype(np.int32),
            pixel_count=pixels.astype(np.int32),
        )


def _add_up_block(
    index: list[Counted], block: slice, layout: HistogramLayout
) -> tuple[Shaped[np.ndarray, "R C T K"], Shaped[np.ndarray, "R"]]:
    C, T, K = layout.shape
    size = block.stop - block.start
    counts = np.zeros((size, C, T, K), dtype=np.int64)
    pixels: dict[Hashable, Shaped[np.ndarray, R]] = {}
    for unit in index:
        table = np.load(unit.path, mmap_mode="r")
        part = table[slice(*np.searchsorted(table[:, 0], [block.start, block.stop]))]
        rows = part[:, 0] - block.start
        counts[rows, :, unit.step] += part[:, 2:].reshape(len(part), C, K)
        # scenes of one grid see the same pixels of a region again; other grids see others
        here = pixels.setdefault(unit.grid_key, np.zeros(size, dtype=np.int64))
        here[rows] = np.maximum(here[rows], part[:, 1])
    return counts, np.sum(list(pixels.values()), axis=0) if pixels else np.zeros(size, dtype=np.int64)


class Coverage:
    """What of each region was seen in one year, gathered while its rows stream by."""

    def __init__(self) -> None:
        self.valid_fraction: dict[str, float] = {}
        self.without_pixels: list[str] = []
        self.poorly_seen: list[str] = []

    def watch(self, batches: Iterator[YieldTensor]) -> Iterator[YieldTensor]:
        """The same batches."""
        for batch in batches:
            seen, missing = batch.valid_fraction, batch.missing_share
            for row, name in enumerate(batch.region_id.tolist()):
                self.valid_fraction[name] = round(float(seen[row]), 4)
                if batch.pixel_count[row] == 0:
                    self.without_pixels.append(name)
                elif missing[row] > MISSING_SHARE_TO_WARN:
                    self.poorly_seen.append(name)
            yield batch

    def log(self, year: int) -> None:
        """Warn of regions without pixels and of those that were hardly seen."""
        if self.without_pixels:
            log.warning("%d: %d regions have no pixel, e.g. %s", year, len(self.without_pixels), self.without_pixels[0])
        if self.poorly_seen:
            log.warning(
                "%d: %d regions miss more than %.0f %% of bands and composites, e.g. %s",
                *(year, len(self.poorly_seen), 100 * MISSING_SHARE_TO_WARN, self.poorly_seen[0]),
            )


def _write_report(out: Path, scenes: Sequence[Scene], layout: HistogramLayout, coverage: dict[str, Coverage]) -> None:
    """prepare.json; years of earlier runs stay in it."""
    path = out / "prepare.json"
    years = json.loads(path.read_text())["years"] if path.exists() else {}
    for year, seen in coverage.items():
        of_year = [scene for scene in scenes if scene.year == int(year)]
        years[year] = {
            "scenes": len(of_year),
            # files and versions are told by sources that are made of files
            "files": len({file for scene in of_year for file in getattr(scene, "files", ())}),
            "versions": sorted({version for scene in of_year for version in getattr(scene, "versions", ())}),
            "regions": len(seen.valid_fraction),
            "without_pixels": seen.without_pixels,
            "more_than_25_percent_missing": seen.poorly_seen,
            "valid_fraction": seen.valid_fraction,
        }
    report = {"layout": json.loads(layout.to_json()), "years": dict(sorted(years.items()))}
    with whole_file(path) as partial:
        partial.write_text(json.dumps(report, indent=1))
