"""Rows to learn from: the imagery of a (region, year) joined with its yield and with what the region yielded before.

Shapes: N rows, C bands or indices, T time steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float32, Int16, Shaped

from geo_yield.errors import InputProblem
from geo_yield.histograms import YieldTensor


@dataclass(frozen=True, kw_only=True)
class IndexSeries:
    """County-mean index values over a season, the input where only tables are at hand."""

    values: Float32[np.ndarray, "N C T"]
    """NaN where missing."""
    bands: tuple[str, ...]
    """C index names, e.g. ("NDVI", "EVI")."""
    doy: tuple[int, ...]
    """T days of year."""
    region_id: Shaped[np.ndarray, "N"]
    year: Int16[np.ndarray, "N"]
    lon: Float32[np.ndarray, "N"]
    lat: Float32[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.region_id)

    def take(self, rows: Shaped[np.ndarray, "M"]) -> "IndexSeries":
        """The rows at integer positions or where a boolean mask is true."""
        per_row = {name: getattr(self, name)[rows] for name in ("values", "region_id", "year", "lon", "lat")}
        return IndexSeries(bands=self.bands, doy=self.doy, **per_row)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """N rows of input, target and history. What a model may see of the past is decided where this is built."""

    inputs: YieldTensor | IndexSeries
    target: Float32[np.ndarray, "N"]
    """Yield in `unit`; NaN where unknown (rows to predict)."""
    history: Float32[np.ndarray, "N"]
    """Mean of the region's earlier yields in `unit`; NaN where it has none."""
    trend: Float32[np.ndarray, "N"]
    """Linear trend of the region's earlier yields, extrapolated to the row's year; NaN where it has fewer than 3."""
    unit: str
    crop: str
    district: Shaped[np.ndarray, "N"] | None = None
    """Agricultural district of the row, for spatial folds that keep neighbours together."""
    past: str = ""
    """Which yields `history` and `trend` were made of: "previous-years" or "before-first-season"; "" if not said."""

    def __post_init__(self) -> None:
        for name in ("target", "history", "trend"):
            if (shape := getattr(self, name).shape) != (len(self),):
                raise InputProblem(f"{name} must have one value for each of {len(self)} rows, got shape {shape}")

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def region_id(self) -> Shaped[np.ndarray, "N"]:
        return self.inputs.region_id

    @property
    def year(self) -> Int16[np.ndarray, "N"]:
        return self.inputs.year

    def take(self, rows: Shaped[np.ndarray, "M"]) -> "Samples":
        """The rows at integer positions or where a boolean mask is true."""
        changed = {name: getattr(self, name)[rows] for name in ("target", "history", "trend")}
        return Samples(
            inputs=self.inputs.take(rows),
            unit=self.unit,
            crop=self.crop,
            district=None if self.district is None else self.district[rows],
            past=self.past,
            **changed,
        )

    def replace(self, **changes: object) -> "Samples":
        """A copy with some fields changed."""
        return Samples(**({f.name: getattr(self, f.name) for f in fields(self)} | changes))


def years_of(samples: Samples) -> Sequence[int]:
    """The years that have rows, in order."""
    return sorted(set(samples.year.tolist()))
