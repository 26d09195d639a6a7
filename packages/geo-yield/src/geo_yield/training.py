"""Training DFYP as published: seeded, resumable, with the best weights really kept; and choosing the operator.

One plain loop. It is not Lightning's because a training that was killed has to go on bit for bit, with the random state
in the file and nothing unpickled, on every supported version of Lightning; `geo_yield.lightning.DFYPTask` shares
optimiser, loss and schedule with it and a test holds both to the same weights.

Zhang et al., "DFYP", arXiv:2507.05849: MSE (optionally + L1), Adam with coupled weight decay, learning rate divided by
ten after steps 4,000 and 20,000, validation on a random tenth, early stopping after 10 epochs; operators by two-stage
selection: one training per candidate, the lowest validation RMSE wins and is then frozen.
Left open there, decided here: the best weights are copied (the published loop keeps a reference, so that its restoring
does nothing); validation may be the last year instead; a stage-one training uses its candidate for all years; years
after the last one with a validated operator take that year's operator. `TrainConfig.small()` is ours, for hundreds of
rows.

Shapes: N rows, C bands, T composites, K bins.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from geo_yield.dfyp import DFYP, OPERATORS, DFYPConfig, Operator
from geo_yield.errors import InputProblem
from geo_yield.samples import Samples, years_of
from geo_yield.scaling import History, Scaling, fit_scaling
from geo_yield.whole_files import whole_file

PREDICT_BATCH = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. The defaults are the paper's, which are made for thousands of rows in bushels per acre."""

    max_steps: int = 25_000
    """Epochs are max_steps / (rows / batch_size), rounded down, at least 1; patience mostly ends training before."""
    learning_rate: float = 1e-4
    schedule: Literal["steps", "cosine"] = "steps"
    """"steps": divided by ten after each of `drops`; "cosine": down to zero at the last step."""
    drops: tuple[int, ...] = (4_000, 20_000)
    weight_decay: float = 1.0
    """Coupled (L2) with "adam", decoupled with "adamw"."""
    optimizer: Literal["adam", "adamw"] = "adam"
    batch_size: int = 64
    l1_weight: float = 0.0
    """Weight of the mean absolute error, added to the mean squared error."""
    validation: Literal["random", "last-year", "none"] = "random"
    """Rows held out for early stopping: a random tenth, the latest year, or none (then all steps are taken)."""
    patience: int = 10
    """Epochs without a better validation loss after which training stops."""
    standardise: bool = False
    """Scale the target to mean 0 and deviation 1 over the training rows."""
    history: History = "none"
    """"residual": predict what a linear fit on the county's history leaves unexplained."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on training images, in units of their standard deviation."""

    def __post_init__(self) -> None:
        allowed = {
            "schedule": ("steps", "cosine"),
            "optimizer": ("adam", "adamw"),
            "validation": ("random", "last-year", "none"),
            "history": ("none", "residual"),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise InputProblem(f"{name} must be one of {', '.join(choices)}, got '{getattr(self, name)}'")
        for name in ("max_steps", "batch_size", "patience", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputProblem(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "l1_weight", "noise"):
            if not getattr(self, name) >= 0:
                raise InputProblem(f"{name} must be 0 or more, got {getattr(self, name)}")

    @classmethod
    def small(cls, *, history: History = "none", max_steps: int = 300) -> "TrainConfig":
        """For hundreds of rows: standardised target, AdamW, a fixed number of steps, learning rate down to zero."""
        return cls(
            max_steps=max_steps,
            learning_rate=1e-3,
            schedule="cosine",
            weight_decay=0.05,
            optimizer="adamw",
            batch_size=32,
            validation="none",
            standardise=True,
            history=history,
        )

    @classmethod
    def sentinel2(cls) -> "TrainConfig":
        """The paper's for chips: weight decay 1e-5. Eight counties per update are ours; the paper has one."""
        return cls(weight_decay=1e-5, batch_size=8)

    def epochs(self, rows: int) -> int:
        """Epochs for a training set of `rows`, the validation rows among them."""
        return max(int(self.max_steps / (rows / self.batch_size)), 1)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Network inputs and targets."""

    image: Float[Tensor, "N C T K"]
    target: Float[Tensor, "N"]
    year: Int[Tensor, "N"]

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: Tensor) -> "Rows":
        return Rows(image=self.image[rows], target=self.target[rows], year=self.year[rows])


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What `on_epoch` is told."""

    epoch: int
    """Epochs done."""
    epochs: int
    """Epochs at most."""
    train_loss: float
    validation_loss: float
    """NaN without validation rows."""


OnEpoch = Callable[[EpochReport], None]


def loss_of(output: Float[Tensor, "B"], target: Float[Tensor, "B"], *, l1_weight: float) -> Float[Tensor, ""]:
    """Mean squared error + l1_weight times mean absolute error."""
    squared = F.mse_loss(output, target)
    return squared + l1_weight * F.l1_loss(output, target) if l1_weight else squared


def make_optimizer(parameters: Iterable[Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW as configured."""
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def rate_factor(step: int, config: TrainConfig, *, steps: int) -> float:
    """Factor on the learning rate of the update that follows `step` updates, of `steps` in all."""
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
    return 0.1 ** sum(step >= drop for drop in config.drops)


def validation_rows(year: np.ndarray, config: TrainConfig, *, seed: int) -> Bool[np.ndarray, "N"]:
    """Mask of the rows held out for early stopping.

    Raises InputProblem if the split would leave nothing on one side.
    """
    held_out = np.zeros(len(year), bool)
    if config.validation == "last-year":
        held_out = year == year.max()
    elif config.validation == "random":
        held_out[np.random.default_rng(seed).permutation(len(year))[: len(year) // 10]] = True
    if config.validation != "none" and (not held_out.any() or held_out.all()):
        raise InputProblem(
            f"{len(year)} rows of {len(set(year.tolist()))} year(s) cannot be split for "
            f"validation='{config.validation}'; give more rows or use validation='none'"
        )
    return held_out


class TrainingRun:
    """One training, epoch by epoch. Its whole state can be written to a file and read back."""

    def __init__(self, network: DFYP, rows: Rows, validation: Rows | None, config: TrainConfig, *, seed: int) -> None:
        self.network, self.rows, self.validation, self.config = network, rows, validation, config
        self.optimizer = make_optimizer(network.parameters(), config)
        self.shuffle = torch.Generator().manual_seed(seed)
        self.epochs = config.epochs(len(rows) + len(validation or ()))
        self.steps = self.epochs * math.ceil(len(rows) / config.batch_size)
        self.noise = config.noise * float(rows.image.std()) if config.noise else 0.0
        self.epoch, self.step, self.waited, self.best_loss = 0, 0, 0, math.inf
        self.best = deepcopy(network.state_dict())

    @property
    def finished(self) -> bool:
        return self.epoch >= self.epochs or (self.validation is not None and self.waited >= self.config.patience)

    def train_epoch(self) -> EpochReport:
        """One pass over the rows, then validation; remembers the weights if they are the best so far."""
        self.network.train()
        total = 0.0
        for rows in torch.randperm(len(self.rows), generator=self.shuffle).split(self.config.batch_size):
            total += self._update(self.rows.take(rows)) * len(rows)
        self.epoch += 1
        loss = self._validate()
        if self.validation is None or loss < self.best_loss:
            self.best, self.best_loss, self.waited = deepcopy(self.network.state_dict()), loss, 0
        else:
            self.waited += 1
        return EpochReport(
            epoch=self.epoch, epochs=self.epochs, train_loss=total / len(self.rows), validation_loss=loss
        )

    def _update(self, batch: Rows) -> float:
        image = batch.image + self.noise * torch.randn_like(batch.image) if self.noise else batch.image
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate_factor(self.step, self.config, steps=self.steps)
        self.optimizer.zero_grad()
        loss = loss_of(self.network(image, batch.year), batch.target, l1_weight=self.config.l1_weight)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _validate(self) -> float:
        if self.validation is None:
            return math.nan
        output = predict_rows(self.network, self.validation.image, self.validation.year)
        return float(loss_of(output, self.validation.target, l1_weight=self.config.l1_weight))

    def save(self, path: Path) -> None:
        """Write everything the rest of the training depends on, the random state included; whole or not at all."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "shuffle": self.shuffle.get_state(),
            "random": torch.get_rng_state(),
            **{name: getattr(self, name) for name in _COUNTERS},
        }
        with whole_file(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        """Go on from a file that `save` wrote. Raises InputProblem if it is damaged."""
        try:
            state = torch.load(path, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best = state["best"]
            self.shuffle.set_state(state["shuffle"])
            torch.set_rng_state(state["random"])
            for name in _COUNTERS:
                setattr(self, name, state[name])
        except (OSError, RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError) as problem:
            raise InputProblem(f"'{path}' cannot be resumed from ({type(problem).__name__}); delete it") from None


_COUNTERS = ("epoch", "step", "waited", "best_loss")


def train_network(
    run: TrainingRun, *, resume: Path | None = None, save_seconds: float = 20.0, on_epoch: OnEpoch | None = None
) -> None:
    """Train until the epochs are used up or patience is, then restore the best weights.

    With `resume` the state is read from that file if it exists, written there every `save_seconds` and at the end; a
    training that was killed ends with the same weights, bit for bit, as one that was not.
    """
    if resume is not None and resume.exists():
        run.load(resume)
    saved = time.monotonic()
    while not run.finished:
        report = run.train_epoch()
        if resume is not None and (run.finished or time.monotonic() - saved >= save_seconds):
            run.save(resume)
            saved = time.monotonic()
        if on_epoch is not None:
            on_epoch(report)
    run.network.load_state_dict(run.best)


def predict_rows(
    network: DFYP, image: Float[Tensor, "N C T K"], year: Int[Tensor, "N"], *, batch_size: int = PREDICT_BATCH
) -> Float[Tensor, "N"]:
    """Outputs in evaluation mode, `batch_size` rows at a time, without gradients."""
    network.eval()
    with torch.no_grad():
        parts = [
            network(images, years)
            for images, years in zip(image.split(batch_size), year.split(batch_size), strict=True)
        ]
    return torch.cat(parts)


class DFYPRegressor:
    """DFYP as a `Regressor`: fit on samples, predict yields. Everything learned comes from the rows given to `fit`.

    candidates: operators among which `fit` first chooses by validation (two-stage selection); none: the config's.
    resume_dir: a folder for unfinished trainings; each (rows, configs, seed) has its own file there, so many
    regressors may share the folder, and a finished one is read back instead of trained again.
    """

    def __init__(
        self,
        model: DFYPConfig,
        train: TrainConfig,
        *,
        name: str = "DFYP",
        candidates: Sequence[Operator] = (),
        resume_dir: Path | None = None,
        save_seconds: float = 20.0,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        self.model, self.train, self.name, self.candidates = model, train, name, tuple(candidates)
        self.resume_dir, self.save_seconds, self.on_epoch = resume_dir, save_seconds, on_epoch
        self.network: DFYP | None = None
        self.scaling: Scaling | None = None
        self.validation_rmse = math.nan

    def fit(self, samples: Samples, *, seed: int) -> None:
        """Choose the operator if asked to, fit the scaling, train; the caller's random state is left alone.

        Raises InputProblem if the samples do not fit the model's bands, steps and bins, or cannot be split.
        """
        if self.candidates:
            chosen, _ = select_operator(samples, self.model, self.train, candidates=self.candidates, seed=seed)
            self.model = self.model.with_operators(chosen)
        config = self.train
        scaling = fit_scaling(
            samples,
            steps=self.model.steps,
            bins=self.model.bins,
            standardise=config.standardise,
            history=config.history,
        )
        self._refuse_other_shape(scaling)
        rows = Rows(
            image=scaling.images(samples.inputs), target=scaling.targets(samples), year=_year_tensor(samples.year)
        )
        held_out = torch.from_numpy(validation_rows(samples.year, config, seed=seed))
        validation = rows.take(held_out) if held_out.any() else None
        resume = None if self.resume_dir is None else self.resume_dir / f"{self._fingerprint(rows, seed)}.pt"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = DFYP(self.model)
            run = TrainingRun(network, rows.take(~held_out), validation, config, seed=seed)
            train_network(run, resume=resume, save_seconds=self.save_seconds, on_epoch=self.on_epoch)
        self.network, self.scaling = network.eval(), scaling
        if validation is not None:
            left_out = samples.take(held_out.numpy())
            error = self.predict(left_out).astype(np.float64) - left_out.target
            self.validation_rmse = float(np.sqrt(np.mean(error**2)))

    def predict(self, samples: Samples) -> Float32[np.ndarray, "N"]:
        """Yields in the unit of the training rows.

        Raises InputProblem before `fit`, on another unit or layout; a season that has only begun is allowed.
        """
        if self.network is None or self.scaling is None:
            raise InputProblem("this model is not trained yet: call fit, or load one with load_model")
        if samples.unit != self.scaling.unit:
            raise InputProblem(
                f"the model predicts {self.scaling.unit}, the samples are in {samples.unit}; convert them"
            )
        outputs = predict_rows(self.network, self.scaling.images(samples.inputs), _year_tensor(samples.year))
        return self.scaling.yields(outputs, samples)

    def _refuse_other_shape(self, scaling: Scaling) -> None:
        bands, steps, bins = scaling.layout.shape
        if (bands, bins) != (self.model.bands, self.model.bins) or steps > self.model.steps:
            raise InputProblem(
                f"the model takes {self.model.bands} bands x {self.model.steps} composites x {self.model.bins} bins, "
                f"the histograms have {bands} x {steps} x {bins}; set bands, steps and bins of DFYPConfig"
            )

    def _fingerprint(self, rows: Rows, seed: int) -> str:
        settings = json.dumps([asdict(self.model), asdict(self.train), seed])
        digest = hashlib.sha256(settings.encode())
        for tensor in (rows.image, rows.target, rows.year):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def select_operator(
    samples: Samples,
    config: DFYPConfig,
    train: TrainConfig,
    *,
    candidates: Sequence[Operator] = OPERATORS,
    seed: int,
    on_fit: Callable[[Operator, float], None] | None = None,
) -> tuple[Operator, pd.DataFrame]:
    """Stage one of the selection: train once per candidate, used for all years; the lowest validation RMSE wins.

    Returns the winner (of equals, the one named first) and a table operator, rmse (in `samples.unit`). on_fit(operator,
    rmse) is called after each training. Raises InputProblem without candidates or with `validation="none"`.
    """
    if not candidates:
        raise InputProblem(f"name at least one operator to choose from: {', '.join(OPERATORS)}")
    if train.validation == "none":
        raise InputProblem("operators are chosen by validation: use validation='random' or 'last-year'")
    scores = []
    for operator in candidates:
        regressor = DFYPRegressor(config.with_operators(operator), train)
        regressor.fit(samples, seed=seed)
        scores.append(regressor.validation_rmse)
        if on_fit is not None:
            on_fit(operator, scores[-1])
    table = pd.DataFrame({"operator": list(candidates), "rmse": scores})
    return candidates[int(np.argmin(scores))], table


def select_operators_by_year(
    samples: Samples,
    config: DFYPConfig,
    train: TrainConfig,
    *,
    years: Sequence[int] | None = None,
    candidates: Sequence[Operator] = OPERATORS,
    seed: int,
    on_fit: Callable[[Operator, float], None] | None = None,
) -> tuple[DFYPConfig, pd.DataFrame]:
    """An operator for each of `years` (default: all but the first two), each validated on that year after the earlier.

    Returns the config with the map and with the last year's operator for all years after it, and a table year,
    operator, rmse. Raises InputProblem if a year has no rows or no rows before it.
    """
    known = years_of(samples)
    years = known[2:] if years is None else sorted(years)
    if not years or set(years) - set(known[1:]):
        raise InputProblem(f"operators can be chosen for {known[1:]} (earlier rows are needed), got {list(years)}")
    by_year: dict[int, Operator] = {}
    tables = []
    for year in years:
        until = samples.take(samples.year <= year)
        last_year = replace(train, validation="last-year")
        by_year[year], table = select_operator(
            until, config, last_year, candidates=candidates, seed=seed, on_fit=on_fit
        )
        tables.append(table.assign(year=year)[["year", "operator", "rmse"]])
    chosen = replace(config.with_operators(config.operator, by_year), operator_after=by_year[years[-1]])
    return chosen, pd.concat(tables, ignore_index=True)


def _year_tensor(year: np.ndarray) -> Int[Tensor, "N"]:
    return torch.from_numpy(year.astype(np.int64))
