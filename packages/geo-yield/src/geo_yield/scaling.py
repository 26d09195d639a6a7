"""From samples to the numbers a network sees and back: everything here is fitted on training rows and nothing else.

Images are centred by the training rows' mean of each band and not divided (DFYP, arXiv:2507.05849, as in You et al.,
AAAI 2017). The target is the yield as it is (the paper's), standardised, or what a county's history leaves unexplained.
Decided here: "residual" means the remainder of a linear fit of yield on the county's history over the training rows; a
row without history is taken to be an average one. A season that has only begun is padded with zeros.

Shapes: N rows, C bands, T composites, K bins.
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from geo_yield.dfyp import pad_season
from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramLayout, YieldTensor
from geo_yield.samples import IndexSeries, Samples
from geo_yield.series import fit_limits, series_to_histograms

History = Literal["none", "residual"]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How samples become images and targets. Made by `fit_scaling`, kept in checkpoints."""

    layout: HistogramLayout
    """Of the training histograms; others are refused."""
    steps: int
    """Composites that the network takes; shorter seasons are padded."""
    limits: tuple[tuple[float, float], ...] | None
    """C low and high ends of index values, if the inputs were series."""
    centre: tuple[float, ...]
    """C band means."""
    offset: float
    """Subtracted from the target, in `unit`."""
    scale: float
    """The target is divided by this, in `unit`."""
    history: tuple[float, float] | None
    """Intercept and slope of yield on history, or None if history is not used."""
    mean: float
    """Mean yield of the training rows, in `unit`: what a row without history starts from."""
    unit: str
    crop: str

    def images(self, inputs: YieldTensor | IndexSeries) -> Float[Tensor, "N C T K"]:
        """Centred images. Raises InputProblem if the layout is not the fitted one, or not its beginning (in-season)."""
        tensor = self._histograms(inputs)
        expected = self.layout
        if tensor.layout.doy != expected.doy and tensor.layout.doy == expected.doy[: len(tensor.layout.doy)]:
            expected = replace(expected, doy=tensor.layout.doy)
        expected.refuse_mismatch(tensor.layout, given="the input", expected="what the model was trained on")
        image = pad_season(tensor.image, self.steps) - np.array(self.centre, np.float32)[:, None, None]
        return torch.from_numpy(image)

    def targets(self, samples: Samples) -> Float[Tensor, "N"]:
        """What the network is to predict."""
        return torch.from_numpy(((samples.target - self._base(samples) - self.offset) / self.scale).astype(np.float32))

    def yields(self, outputs: Float[Tensor, "N"], samples: Samples) -> Float32[np.ndarray, "N"]:
        """Outputs of the network as yields in `unit`."""
        return (outputs.double().numpy() * self.scale + self.offset + self._base(samples)).astype(np.float32)

    def to_json(self) -> dict[str, object]:
        """Plain lists, numbers and text."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict) -> "Scaling":
        """The inverse of `to_json`. Raises KeyError or TypeError if a field is missing or unknown."""
        layout = {**raw["layout"], **{name: tuple(raw["layout"][name]) for name in ("bands", "doy")}}
        layout["edges"] = tuple(tuple(row) for row in layout["edges"])
        limits, history = raw["limits"], raw["history"]
        changed = {
            "layout": HistogramLayout(**layout),
            "limits": None if limits is None else tuple((low, high) for low, high in limits),
            "centre": tuple(raw["centre"]),
            "history": None if history is None else (history[0], history[1]),
        }
        return cls(**{**raw, **changed})

    def _histograms(self, inputs: YieldTensor | IndexSeries) -> YieldTensor:
        if isinstance(inputs, YieldTensor):
            return inputs
        if self.limits is None or inputs.bands != self.layout.bands:
            raise InputProblem(
                f"a series of {', '.join(inputs.bands)} does not fit a model for {self.layout.sensor} with bands "
                f"{', '.join(self.layout.bands)}"
            )
        return series_to_histograms(
            inputs, np.array(self.limits, np.float32), steps=self.steps, bins=self.layout.shape[2]
        )

    def _base(self, samples: Samples) -> np.ndarray:
        """Yield that the history explains, float64 (N,); 0 if history is not used."""
        if self.history is None:
            return np.zeros(len(samples))
        known = np.isfinite(samples.history)
        intercept, slope = self.history
        return np.where(known, intercept + slope * np.where(known, samples.history, 0.0).astype(np.float64), self.mean)


def fit_scaling(samples: Samples, *, steps: int, bins: int, standardise: bool, history: History) -> Scaling:
    """Measure limits, band means and target scale on `samples`, which must be training rows only.

    Raises InputProblem if a target is not finite, all targets are equal, or `history="residual"` and fewer than three
    rows have a history.
    """
    if len(samples) == 0 or not np.isfinite(samples.target).all():
        missing = int((~np.isfinite(samples.target)).sum())
        raise InputProblem(f"every row to learn from needs a yield; {missing} of {len(samples)} have none")
    limits, tensor = None, samples.inputs
    if isinstance(tensor, IndexSeries):
        limits = fit_limits(tensor)
        tensor = series_to_histograms(tensor, limits, steps=steps, bins=bins)
    target = samples.target.astype(np.float64)
    scaling = Scaling(
        layout=tensor.layout,
        steps=steps,
        limits=None if limits is None else tuple((float(low), float(high)) for low, high in limits),
        centre=tuple(pad_season(tensor.image, steps).mean(axis=(0, 2, 3), dtype=np.float64).tolist()),
        offset=0.0,
        scale=1.0,
        history=_history_fit(samples, target) if history == "residual" else None,
        mean=float(target.mean()),
        unit=samples.unit,
        crop=samples.crop,
    )
    if not standardise:
        return scaling
    rest = target - scaling._base(samples)
    if not rest.std() > 0:
        raise InputProblem(f"all {len(samples)} yields to learn from are equal: there is nothing to learn")
    return replace(scaling, offset=float(rest.mean()), scale=float(rest.std()))


def _history_fit(samples: Samples, target: np.ndarray) -> tuple[float, float]:
    known = np.isfinite(samples.history)
    past = samples.history[known].astype(np.float64)
    if known.sum() < 3 or past.std() == 0:
        raise InputProblem(
            f"history='residual' needs at least 3 training rows with different histories, got {int(known.sum())} rows; "
            "use history='none' or give yields of earlier years"
        )
    slope, intercept = np.polyfit(past, target[known], 1)
    return float(intercept), float(slope)
