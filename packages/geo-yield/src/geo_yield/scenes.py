"""What every image source is to the histogram job: scenes, one per tile and acquisition, that can read their pixels."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from affine import Affine
from jaxtyping import Bool, Shaped
from pyproj import CRS

from geo_yield.histograms import HistogramLayout


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """One scene on one grid. C bands in the layout's order, H rows, W columns."""

    values: Shaped[np.ndarray, "C H W"]
    """Numbers in the layout's unit, ready to be binned."""
    valid: Bool[np.ndarray, "C H W"]
    """Retrieved and passed by the QA choice of the layout. Fill is never valid."""
    counted: Bool[np.ndarray, "H W"]
    """Pixels that the mask (e.g. cropland) lets count; all true without a mask."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the pixels of a tile lie; scenes of one grid share one rasterisation of the regions."""

    crs: CRS
    transform: Affine
    height: int
    width: int


class Scene(Protocol):
    """One unit of work: one tile and one acquisition or composite. Must be picklable and cheap until `read`."""

    @property
    def key(self) -> str:
        """Unique, stable over runs and safe as a file name: finished units are skipped by it."""

    @property
    def year(self) -> int:
        """Harvest year that the scene counts for."""

    @property
    def step(self) -> int:
        """Index into `layout.doy`; several scenes of one step add up."""

    @property
    def grid_key(self) -> Hashable:
        """Equal for scenes that lie on the same grid, known without opening pixels where the source allows."""

    def grid(self) -> Grid:
        """The scene's grid, read from its own georeference. Raises InputProblem if it has none."""

    def read(self, layout: HistogramLayout) -> Pixels:
        """Decode: fill, scale or shift, QA and mask as `layout` says. Raises InputProblem on unreadable files."""
