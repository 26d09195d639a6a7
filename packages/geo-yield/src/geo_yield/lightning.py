"""DFYP for Lightning: tasks and data modules, for training on several devices or beside other models.

`DFYPTask` shares loss, optimiser and schedule with `geo_yield.training`, whose plain loop gives the same weights on the
same batches. Data modules hand out dictionaries with "image" and "label" (and "year"), as torchgeo's do, so torchgeo's
tasks run on them too. Metrics are in units of the label: if the data module standardises, multiply by its
`scaling.scale` for yields.
`DFYPSentinel2Task` takes one county per batch and accumulates `batch_size` of them for each update; it augments while
training and only then, and reports every target in logarithms and in natural units, never pooled.

Zhang et al., "DFYP", arXiv:2507.05849; hyperparameters and decisions as in `geo_yield.training` and
`geo_yield.dfyp_sentinel2`.

Shapes: B rows or counties, C bands, T composites or dates, K bins, G chips, S side of a chip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, R2Score

from geo_yield.dfyp import DFYP, DFYPConfig
from geo_yield.dfyp_sentinel2 import DFYPSentinel2, DFYPSentinel2Config, simclr_augmentation
from geo_yield.errors import InputProblem
from geo_yield.samples import Samples
from geo_yield.scaling import fit_scaling
from geo_yield.training import TrainConfig, loss_of, make_optimizer, rate_factor, validation_rows

Batch = dict[str, Tensor]

TARGETS = ("production", "yield")


class ChipBatch(TypedDict):
    """What `ChipDataModule` hands out."""

    chips: list[UInt8[Tensor, "T G S S 3"]]
    label: Float[Tensor, "B 2"]
    """Natural logarithms of production and yield."""


class DFYPTask(LightningModule):
    """DFYP with the paper's loss, optimiser, schedule and early stopping. Rows are routed by their "year".

    Logs train_loss, and val_ and test_ loss, RMSE, MAE, R2.
    """

    def __init__(self, model: DFYPConfig | None = None, train: TrainConfig | None = None) -> None:
        super().__init__()
        self.train_config = train or TrainConfig()
        if self.train_config.noise:
            raise InputProblem("noise on training images is an option of DFYPRegressor, not of DFYPTask")
        self.model = DFYP(model or DFYPConfig())
        self.val_metrics, self.test_metrics = _metrics("val_"), _metrics("test_")

    def forward(self, image: Float[Tensor, "B C T K"], year: Tensor | None = None) -> Float[Tensor, "B"]:
        return self.model(image, year)

    def training_step(self, batch: Batch) -> Tensor:
        loss, _ = self._loss(batch)
        self.log("train_loss", loss, batch_size=len(batch["label"]))
        return loss

    def validation_step(self, batch: Batch) -> None:
        self._evaluate(batch, "val_loss", self.val_metrics)

    def test_step(self, batch: Batch) -> None:
        self._evaluate(batch, "test_loss", self.test_metrics)

    def predict_step(self, batch: Batch) -> Float[Tensor, "B"]:
        return self(batch["image"], batch.get("year"))

    def configure_optimizers(self) -> dict[str, object]:  # type: ignore[override]
        return _optimizer_and_schedule(self, self.train_config)

    def configure_callbacks(self) -> list[Callback]:
        return _early_stopping(self.train_config)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        output = self(batch["image"], batch.get("year"))
        return loss_of(output, batch["label"], l1_weight=self.train_config.l1_weight), output

    def _evaluate(self, batch: Batch, name: str, metrics: MetricCollection) -> None:
        loss, output = self._loss(batch)
        metrics.update(output, batch["label"])
        self.log(name, loss, batch_size=len(batch["label"]))
        self.log_dict(metrics, on_epoch=True)


class HistogramDataModule(LightningDataModule):
    """Rows with yields as batches of "image", "label", "year"; centred and scaled by the training rows alone.

    samples are split into training and validation as `train.validation` says; `test` may have unknown yields (NaN).
    """

    def __init__(
        self,
        samples: Samples,
        *,
        test: Samples | None = None,
        train: TrainConfig | None = None,
        steps: int = 32,
        bins: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        config = train or TrainConfig()
        self.batch_size, self.seed, self.num_workers = config.batch_size, seed, num_workers
        self.scaling = fit_scaling(
            samples, steps=steps, bins=bins, standardise=config.standardise, history=config.history
        )
        held_out = validation_rows(samples.year, config, seed=seed)
        self.train_rows = self._rows(samples.take(~held_out))
        self.val_rows = self._rows(samples.take(held_out)) if held_out.any() else None
        self.test_rows = self._rows(test) if test is not None else None

    def train_dataloader(self) -> DataLoader:
        shuffle = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            self.train_rows, batch_size=self.batch_size, shuffle=True, generator=shuffle, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.val_rows) if self.val_rows is not None else []

    def test_dataloader(self) -> DataLoader:
        if self.test_rows is None:
            raise InputProblem("this data module has no test rows: pass test= when it is made")
        return self._loader(self.test_rows)

    predict_dataloader = test_dataloader

    def _rows(self, samples: Samples) -> "_Rows":
        year = torch.from_numpy(samples.year.astype(np.int64))
        return _Rows(self.scaling.images(samples.inputs), self.scaling.targets(samples), year)

    def _loader(self, rows: "_Rows") -> DataLoader:
        return DataLoader(rows, batch_size=self.batch_size, num_workers=self.num_workers)


class _Rows(Dataset):
    def __init__(self, image: Tensor, label: Tensor, year: Tensor) -> None:
        self.image, self.label, self.year = image, label, year

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, row: int) -> Batch:
        return {"image": self.image[row], "label": self.label[row], "year": self.year[row]}


@dataclass(frozen=True, kw_only=True)
class CountySeason:
    """Chips and harvest of one county and year. A sequence of them may read its chips when indexed."""

    region_id: str
    year: int
    chips: UInt8[np.ndarray, "T G S S 3"]
    production: float
    """Of the county, above 0."""
    yield_per_area: float
    """Above 0."""


class DFYPSentinel2Task(LightningModule):
    """DFYP on chips: one county per batch, `train.batch_size` counties per update, augmented in training only.

    Logs train_loss, val_ and test_ loss and, for production and yield each, RMSE and R2 of logarithms ("log_") and of
    natural units.
    """

    def __init__(self, model: DFYPSentinel2Config | None = None, train: TrainConfig | None = None) -> None:
        super().__init__()
        self.train_config = train or TrainConfig.sentinel2()
        self.model = DFYPSentinel2(model or DFYPSentinel2Config(recompute=True))
        self.augment = simclr_augmentation(self.model.config.size)
        self.val_metrics, self.test_metrics = (
            torch.nn.ModuleDict(
                {scale + target: _metrics(f"{part}_{scale}{target}_") for target in TARGETS for scale in ("", "log_")}
            )
            for part in ("val", "test")
        )

    def forward(self, chips: Sequence[Tensor]) -> Float[Tensor, "B 2"]:
        return self.model(chips)

    def training_step(self, batch: ChipBatch) -> Tensor:
        output = self.model(batch["chips"], augment=self.augment)
        loss = loss_of(output, batch["label"], l1_weight=self.train_config.l1_weight)
        self.log("train_loss", loss, batch_size=len(output))
        return loss

    def validation_step(self, batch: ChipBatch) -> None:
        self._evaluate(batch, "val_loss", self.val_metrics)

    def test_step(self, batch: ChipBatch) -> None:
        self._evaluate(batch, "test_loss", self.test_metrics)

    def predict_step(self, batch: ChipBatch) -> Float[Tensor, "B 2"]:
        """Production and yield in natural units."""
        return self(batch["chips"]).exp()

    def configure_optimizers(self) -> dict[str, object]:  # type: ignore[override]
        return _optimizer_and_schedule(self, self.train_config)

    def configure_callbacks(self) -> list[Callback]:
        return [GradientAccumulationScheduler({0: self.train_config.batch_size}), *_early_stopping(self.train_config)]

    def _evaluate(self, batch: ChipBatch, name: str, metrics: torch.nn.ModuleDict) -> None:
        output, label = self(batch["chips"]), batch["label"]
        self.log(name, loss_of(output, label, l1_weight=self.train_config.l1_weight), batch_size=len(output))
        for scale, outputs, labels in (("log_", output, label), ("", output.exp(), label.exp())):
            for column, target in enumerate(TARGETS):
                metric = cast(MetricCollection, metrics[scale + target])
                metric.update(outputs[:, column], labels[:, column])
                self.log_dict(metric, on_epoch=True, batch_size=len(output))


class ChipDataModule(LightningDataModule):
    """Counties one by one: "chips", a list of one (T, G, S, S, 3) tensor, and "label", (1, 2) logarithms.

    train, val and test are sequences of `CountySeason`; pass sequences that read on indexing if they exceed memory.
    """

    def __init__(
        self,
        train: Sequence[CountySeason],
        *,
        val: Sequence[CountySeason] = (),
        test: Sequence[CountySeason] = (),
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train_counties, self.val_counties, self.test_counties = train, val, test
        self.seed, self.num_workers = seed, num_workers

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_counties, shuffle=True)

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.val_counties) if len(self.val_counties) else []

    def test_dataloader(self) -> DataLoader:
        if not len(self.test_counties):
            raise InputProblem("this data module has no test counties: pass test= when it is made")
        return self._loader(self.test_counties)

    predict_dataloader = test_dataloader

    def _loader(self, counties: Sequence[CountySeason], *, shuffle: bool = False) -> DataLoader:
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            _Counties(counties),
            batch_size=1,
            shuffle=shuffle,
            generator=generator,
            num_workers=self.num_workers,
            collate_fn=_collate_counties,
        )


class _Counties(Dataset):
    def __init__(self, counties: Sequence[CountySeason]) -> None:
        self.counties = counties

    def __len__(self) -> int:
        return len(self.counties)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        county = self.counties[row]
        if not (county.production > 0 and county.yield_per_area > 0):
            raise InputProblem(
                f"county '{county.region_id}' in {county.year} has production {county.production} and yield "
                f"{county.yield_per_area}; both must be above 0, for their logarithms are predicted"
            )
        label = torch.tensor([county.production, county.yield_per_area], dtype=torch.float64).log().float()
        return torch.from_numpy(county.chips), label


def _collate_counties(rows: list[tuple[Tensor, Tensor]]) -> ChipBatch:
    return {"chips": [chips for chips, _ in rows], "label": torch.stack([label for _, label in rows])}


def _metrics(prefix: str) -> MetricCollection:
    return MetricCollection(
        {"RMSE": MeanSquaredError(squared=False), "MAE": MeanAbsoluteError(), "R2": R2Score()}, prefix=prefix
    )


def _optimizer_and_schedule(task: LightningModule, config: TrainConfig) -> dict[str, object]:
    optimizer = make_optimizer(task.parameters(), config)
    steps = int(task.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, config, steps=steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _early_stopping(config: TrainConfig) -> list[Callback]:
    """None without validation rows."""
    if config.validation == "none":
        return []
    return [EarlyStopping("val_loss", patience=config.patience)]
