"""What any model of yields has to beat: means, county history, ridge, random forest, and the Deep GP of You et al.

A county's own past is a strong predictor, and a linear model on the same inputs is often as good as a network; a figure
without them says nothing (Paudel et al., "CY-Bench", 2024, finds the same across countries). All of them implement
`Regressor`, and all make their choices on the rows they are fitted to.

You et al., "Deep Gaussian Process for Crop Yield Prediction Based on Remote Sensing Data", AAAI 2017: a CNN on the
histograms, then a Gaussian process whose linear part acts on the CNN's last hidden features and whose RBF part acts on
place and season. Left open here: the RBF of a region without coordinates cannot be computed and is refused.

Shapes: N rows, D flat features, C bands, T composites, K bins, H hidden features.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Float64
from sklearn.ensemble import RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, Exponentiation, Kernel, WhiteKernel

from geo_yield.crossfit import held_out_parts
from geo_yield.dfyp import CNN, DFYPConfig
from geo_yield.errors import InputProblem
from geo_yield.histograms import YieldTensor
from geo_yield.samples import IndexSeries, Samples
from geo_yield.series import fit_limits, series_to_histograms

PENALTIES = (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
INNER_FOLDS = 5
"""Folds in which a penalty is chosen, inside the training rows."""


@dataclass(kw_only=True)
class MeanYield:
    """The mean of the training yields, everywhere."""

    name: str = "mean"

    def fit(self, samples: Samples, *, seed: int) -> None:  # noqa: ARG002
        self.mean = float(samples.target.mean())

    def predict(self, samples: Samples) -> Float32[np.ndarray, "N"]:
        return np.full(len(samples), self.mean, np.float32)


@dataclass(kw_only=True)
class CountyHistory:
    """The mean of the region's earlier yields; without any, the mean of the training yields."""

    name: str = "county history"

    def fit(self, samples: Samples, *, seed: int) -> None:  # noqa: ARG002
        self.mean = float(samples.target.mean())

    def predict(self, samples: Samples) -> Float32[np.ndarray, "N"]:
        return np.where(np.isfinite(samples.history), samples.history, self.mean).astype(np.float32)


@dataclass(kw_only=True)
class CountyTrend:
    """The line through the region's earlier yields; with fewer than 3 its history, without any the training mean."""

    name: str = "county trend"

    def fit(self, samples: Samples, *, seed: int) -> None:  # noqa: ARG002
        self.mean = float(samples.target.mean())

    def predict(self, samples: Samples) -> Float32[np.ndarray, "N"]:
        known = np.where(np.isfinite(samples.trend), samples.trend, samples.history)
        return np.where(np.isfinite(known), known, self.mean).astype(np.float32)


@dataclass(kw_only=True)
class HistoryLine:
    """Yield as a line in the region's history: the level of the seasons seen, without imagery."""

    name: str = "history, fitted"

    def fit(self, samples: Samples, *, seed: int) -> None:  # noqa: ARG002
        self.past = Past.fit(samples)

    def predict(self, samples: Samples) -> Float32[np.ndarray, "N"]:
        return self.past.line(samples).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Past:
    """A least-squares line from history to yield; rows without a history take the training rows' mean history."""

    mean: float
    slope: float
    intercept: float

    @classmethod
    def fit(cls, samples: Samples) -> "Past":
        known = samples.history[np.isfinite(samples.history)].astype(np.float64)
        mean = float(known.mean()) if len(known) else 0.0
        history = np.where(np.isfinite(samples.history), samples.history, mean).astype(np.float64)
        target = samples.target.astype(np.float64)
        variance = float(((history - mean) ** 2).mean())
        slope = float(((history - history.mean()) * target).mean() / variance) if variance > 0 else 0.0
        return cls(mean=mean, slope=slope, intercept=float(target.mean() - slope * history.mean()))

    def filled(self, samples: Samples) -> Float64[np.ndarray, "N"]:
        """History of every row, the training mean where it has none."""
        return np.where(np.isfinite(samples.history), samples.history, self.mean).astype(np.float64)

    def line(self, samples: Samples) -> Float64[np.ndarray, "N"]:
        """The yield that the past alone lets expect."""
        return self.intercept + self.slope * self.filled(samples)


def flat_inputs(samples: Samples) -> Float64[np.ndarray, "N D"]:
    """One number per band and composite: the index value, or the histogram's mean bin; NaN where nothing was seen."""
    inputs = samples.inputs
    if isinstance(inputs, IndexSeries):
        return inputs.values.reshape(len(samples), -1).astype(np.float64)
    total = inputs.image.sum(axis=-1, dtype=np.float64)
    weighted = inputs.image @ np.arange(inputs.image.shape[-1], dtype=np.float64)
    mean_bin = np.divide(weighted, total, out=np.full_like(total, np.nan), where=total > 0)
    return mean_bin.reshape(len(samples), -1)


@dataclass(frozen=True, kw_only=True)
class Scaler:
    """Standardises columns by the training rows; a missing value becomes the training mean, a constant column 0."""

    mean: Float64[np.ndarray, "D"]
    scale: Float64[np.ndarray, "D"]

    @classmethod
    def fit(cls, values: Float64[np.ndarray, "N D"]) -> "Scaler":
        seen = np.isfinite(values)
        count = np.maximum(seen.sum(axis=0), 1)
        mean = np.where(seen, values, 0).sum(axis=0) / count
        scale = np.sqrt((np.where(seen, values - mean, 0) ** 2).sum(axis=0) / count)
        return cls(mean=mean, scale=np.where(scale > 1e-12, scale, np.inf))

    def apply(self, values: Float64[np.ndarray, "N D"]) -> Float64[np.ndarray, "N D"]:
        return np.where(np.isfinite(values), (values - self.mean) / self.scale, 0.0)


@dataclass(kw_only=True)
class Ridge:
    """Linear model on the flat inputs with a squared penalty, in closed form."""

    name: str = "ridge"
    history: str = "none"
    """"none", "feature" (one more standardised column, under the same penalty) or "residual" (the inputs explain what
    the line through history leaves over)."""
    penalties: tuple[float, ...] = PENALTIES
    """Candidates; more than one are compared in folds of the training rows."""
    group: str = "region"
    """What the folds that choose the penalty keep together: "year", "region", "district" or "random"."""

    def __post_init__(self) -> None:
        if self.history not in ("none", "feature", "residual"):
            raise InputProblem(f"history can be 'none', 'feature' or 'residual', got '{self.history}'")

    def fit(self, samples: Samples, *, seed: int) -> None:
        self.penalty = self.penalties[0]
        if len(self.penalties) > 1:
            errors = np.zeros(len(self.penalties))
            for part in held_out_parts(samples, folds=INNER_FOLDS, group=self.group, seed=seed):
                inside, outside = samples.take(~part), samples.take(part)
                self._prepare(inside)
                for i, penalty in enumerate(self.penalties):
                    self._solve(penalty)
                    errors[i] += ((outside.target - self.predict(outside)) ** 2).sum()
            self.penalty = self.penalties[int(errors.argmin())]
        self._prepare(samples)
        self._solve(self.penalty)

    def _prepare(self, samples: Samples) -> None:
        """Scaling and eigenvectors of the rows, shared by all penalties."""
        self.past = Past.fit(samples)
        self.scaler = Scaler.fit(self._columns(samples))
        x = self.scaler.apply(self._columns(samples))
        y = samples.target.astype(np.float64) - (self.past.line(samples) if self.history == "residual" else 0.0)
        self.offset = float(y.mean())
        # one decomposition serves every penalty
        u, self._s, self._vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
        self._uy, self._centre = u.T @ (y - self.offset), x.mean(axis=0)

    def _solve(self, penalty: float) -> None:
        self.weights = self._vt.T @ (self._s / (self._s**2 + penalty) * self._uy)

    def _columns(self, samples: Samples) -> Float64[np.ndarray, "N D"]:
        flat = flat_inputs(samples)
        return np.column_stack([flat, self.past.filled(samples)]) if self.history == "feature" else flat

    def predict(self, samples: Samples) -> Float32[np.ndarray, "N"]:
        x = self.scaler.apply(self._columns(samples)) - self._centre
        base = self.past.line(samples) if self.history == "residual" else 0.0
        return (x @ self.weights + self.offset + base).astype(np.float32)


@dataclass(kw_only=True)
class RandomForest:
    """scikit-learn's forest on the flat inputs, one job, so that results do not depend on the machine."""

    name: str = "random forest"
    history: str = "none"
    """"none" or "feature" (one more column)."""
    trees: int = 300
    smallest_leaf: int = 3

    def _columns(self, samples: Samples) -> Float64[np.ndarray, "N D"]:
        flat = flat_inputs(samples)
        return np.column_stack([flat, self.past.filled(samples)]) if self.history == "feature" else flat

    def fit(self, samples: Samples, *, seed: int) -> None:
        if self.history not in ("none", "feature"):
            raise InputProblem(f"history can be 'none' or 'feature', got '{self.history}'")
        self.past = Past.fit(samples)
        self.scaler = Scaler.fit(self._columns(samples))
        self.forest = RandomForestRegressor(
            self.trees, min_samples_leaf=self.smallest_leaf, max_features=1 / 3, random_state=seed, n_jobs=1
        )
        self.forest.fit(self.scaler.apply(self._columns(samples)), samples.target)

    def predict(self, samples: Samples) -> Float32[np.ndarray, "N"]:
        return self.forest.predict(self.scaler.apply(self._columns(samples))).astype(np.float32)


def histograms_of(samples: Samples, limits: Float32[np.ndarray, "C 2"] | None, *, bins: int) -> YieldTensor:
    """The rows' histograms; series get `bins` bins within `limits`, which `series_limits` took from training rows."""
    if isinstance(samples.inputs, YieldTensor):
        return samples.inputs
    if limits is None:
        raise InputProblem("series need limits that were fitted on training rows of series")
    return series_to_histograms(samples.inputs, limits, bins=bins)


def series_limits(samples: Samples) -> Float32[np.ndarray, "C 2"] | None:
    """Limits of the training rows' indices, None for histograms, which bring their edges."""
    return fit_limits(samples.inputs) if isinstance(samples.inputs, IndexSeries) else None


@dataclass(kw_only=True)
class DeepGaussianProcess:
    """CNN on histograms, then y = cnn(x) + h(x) . d + f(place, season) + noise, d ~ N(0, s I), f a GP with RBF kernel.

    The CNN is the one of You et al., which is DFYP's without operator (its blend weight fixed at 0). The kernel's
    variances and length scales are fitted by marginal likelihood on the training rows; the paper sets them by hand.
    """

    name: str = "deep gp"
    width: int = 16
    """Channels of the first convolution (paper: 128); the last hidden layer has 8 times as many units."""
    dropout: float = 0.5
    steps: int = 300
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    gaussian_process: bool = True
    """False: the CNN alone."""
    series_bins: int = 32
    """Bins that index series are spread over; histograms bring their own."""

    def fit(self, samples: Samples, *, seed: int) -> None:
        torch.manual_seed(seed)
        self.limits = series_limits(samples)
        tensor = histograms_of(samples, self.limits, bins=self.series_bins)
        self.centre = tensor.image.mean(axis=(0, 2, 3), keepdims=True)
        self.offset, self.scale = float(samples.target.mean()), max(float(samples.target.std()), 1e-6)
        C, T, K = tensor.layout.shape
        self.cnn = CNN(
            DFYPConfig(
                bands=C, steps=T, bins=K, cnn_width=self.width, cnn_dense=8 * self.width, cnn_dropout=self.dropout
            )
        )
        with torch.no_grad():
            self.cnn.operators.weight.zero_()
        self.cnn.operators.requires_grad_(False)
        self._train(tensor, (samples.target - self.offset) / self.scale, seed)
        if self.gaussian_process:
            self._fit_process(samples, tensor)

    def _train(self, tensor: YieldTensor, target: Float32[np.ndarray, "N"], seed: int) -> None:
        x, y = torch.from_numpy(tensor.image - self.centre), torch.from_numpy(target.astype(np.float32))
        moved = [p for p in self.cnn.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(moved, lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        generator = torch.Generator().manual_seed(seed)
        self.cnn.train()
        for _ in range(self.steps):
            # its own generator: dropout then draws the same numbers whatever the number of rows
            rows = torch.randperm(len(y), generator=generator)[: self.batch]
            optimizer.zero_grad()
            F.mse_loss(self.cnn(x[rows]).squeeze(-1), y[rows]).backward()
            optimizer.step()
            schedule.step()
        self.cnn.eval()

    def _hidden(self, tensor: YieldTensor) -> Float64[np.ndarray, "N H"]:
        """Activations before the last layer, in batches."""
        out = []
        with torch.no_grad():
            for x in torch.from_numpy(tensor.image - self.centre).split(256):
                for block in self.cnn.blocks:
                    x = block(x)
                out.append(self.cnn.dense(x.flatten(1)))
        return torch.cat(out).numpy().astype(np.float64)

    def _mean(self, hidden: Float64[np.ndarray, "N H"]) -> Float64[np.ndarray, "N"]:
        weight, bias = self.cnn.head.weight.detach().numpy(), self.cnn.head.bias.detach().numpy()
        return (hidden @ weight[0].astype(np.float64) + float(bias[0])) * self.scale + self.offset

    def _fit_process(self, samples: Samples, tensor: YieldTensor) -> None:
        hidden = self._hidden(tensor)
        place = _place_and_season(tensor)
        self.hidden_scaler, self.place_scaler = Scaler.fit(hidden), Scaler.fit(place)
        residual = samples.target - self._mean(hidden)
        variance = max(float(residual.var()), 1e-6)
        H = hidden.shape[1]
        kernel = (
            ConstantKernel(0.1 * variance, (1e-6 * variance, 1e2 * variance)) * _Columns(DotProduct(0.0, "fixed"), 0, H)
            + ConstantKernel(variance, (1e-4 * variance, 1e2 * variance))
            * _Columns(RBF([1.0, 1.0, 1.0], (0.05, 1e3)), H, H + 3)
            + WhiteKernel(variance, (1e-3 * variance, 10 * variance))
        )
        self.process = GaussianProcessRegressor(kernel, alpha=1e-8 * variance)
        with warnings.catch_warnings():  # a length scale at its bound says that the axis does not matter
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.process.fit(self._process_inputs(hidden, place), residual)

    def _process_inputs(
        self, hidden: Float64[np.ndarray, "N H"], place: Float64[np.ndarray, "N 3"]
    ) -> Float64[np.ndarray, "N D"]:
        scaled = self.hidden_scaler.apply(hidden) / np.sqrt(hidden.shape[1])
        return np.column_stack([scaled, self.place_scaler.apply(place)])

    def predict(self, samples: Samples) -> Float32[np.ndarray, "N"]:
        tensor = histograms_of(samples, self.limits, bins=self.series_bins)
        hidden = self._hidden(tensor)
        mean = self._mean(hidden)
        if self.gaussian_process:
            mean = mean + self.process.predict(self._process_inputs(hidden, _place_and_season(tensor)))
        return mean.astype(np.float32)


def _place_and_season(tensor: YieldTensor) -> Float64[np.ndarray, "N 3"]:
    if not np.isfinite(tensor.lon).all() or not np.isfinite(tensor.lat).all():
        raise InputProblem("the Deep GP needs longitude and latitude of every region: give a table of centroids")
    return np.column_stack([tensor.lon, tensor.lat, tensor.year]).astype(np.float64)


class _Columns(Exponentiation):
    """`kernel` on columns first to last - 1 only. Exponentiation lends its plumbing for a kernel inside a kernel."""

    def __init__(self, kernel: Kernel, first: int, last: int) -> None:
        self.kernel, self.first, self.last = kernel, first, last

    def get_params(self, deep: bool = True) -> dict[str, object]:
        own: dict[str, object] = {"kernel": self.kernel, "first": self.first, "last": self.last}
        return own | ({f"kernel__{k}": v for k, v in self.kernel.get_params().items()} if deep else {})

    def __call__(self, X, Y=None, eval_gradient=False):  # type: ignore[no-untyped-def]
        Y = None if Y is None else Y[:, self.first : self.last]
        return self.kernel(X[:, self.first : self.last], Y, eval_gradient=eval_gradient)

    def diag(self, X: Float64[np.ndarray, "N D"]) -> Float64[np.ndarray, "N"]:
        return self.kernel.diag(X[:, self.first : self.last])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Columns) and self.get_params() == other.get_params()

    def __repr__(self) -> str:
        return f"{self.kernel} on columns {self.first}:{self.last}"
