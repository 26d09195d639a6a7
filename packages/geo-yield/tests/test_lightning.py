"""Lightning doors: the same weights as the plain loop, dictionaries torchgeo can read, chips with accumulation."""

import logging
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from geo_yield.dfyp import DFYP, DFYPConfig
from geo_yield.dfyp_sentinel2 import DFYPSentinel2Config
from geo_yield.errors import InputProblem
from geo_yield.lightning import ChipDataModule, CountySeason, DFYPSentinel2Task, DFYPTask, HistogramDataModule
from geo_yield.training import Rows, TrainConfig, TrainingRun

TINY = replace(
    DFYPConfig.small(3),
    steps=8, bins=12, cnn_width=4, cnn_dense=6, vit_dim=8, vit_heads=2, vit_head_dim=4, vit_mlp=12, cnn_dropout=0.0,
    operator_by_year={2011: "scharr"},
)  # fmt: skip
QUICK = TrainConfig(max_steps=12, batch_size=16, learning_rate=3e-3, drops=(4,), standardise=True, l1_weight=0.3)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


def trainer(tmp_path, **options):
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path, **options,
    )  # fmt: skip


def test_task_gives_the_weights_of_the_plain_loop_on_the_same_batches(bumps, tmp_path):
    train = replace(QUICK, validation="none")
    module = HistogramDataModule(bumps(48, steps=8, bins=12), train=train, steps=8, bins=12)
    rows = Rows(**{n: getattr(module.train_rows, m) for n, m in (("image",) * 2, ("target", "label"), ("year",) * 2)})
    torch.manual_seed(0)
    run = TrainingRun(DFYP(TINY), rows, None, train, seed=0)
    start = {name: t.clone() for name, t in run.network.state_dict().items()}
    order = torch.Generator().manual_seed(0)
    batches = [torch.randperm(48, generator=order).split(16) for _ in range(2)]
    run.train_epoch()
    run.train_epoch()
    assert run.step == 6  # the learning rate falls after 4

    task = DFYPTask(TINY, train)
    task.model.load_state_dict(start)
    flat = [module.train_rows[int(row)] for epoch in batches for batch in epoch for row in batch]
    trainer(tmp_path, max_epochs=1).fit(task, DataLoader(flat, batch_size=16))
    for name, tensor in run.network.state_dict().items():
        torch.testing.assert_close(task.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_task_trains_stops_early_tests_and_predicts_on_the_data_module(bumps, tmp_path):
    samples, test = bumps(64, steps=8, bins=12), bumps(20, seed=1, steps=8, bins=12)
    train = replace(QUICK, learning_rate=0.05, patience=2)
    module = HistogramDataModule(samples, test=test, train=train, steps=8, bins=12)
    task, run = DFYPTask(TINY, train), trainer(tmp_path, max_epochs=60)
    run.fit(task, datamodule=module)
    assert run.current_epoch < 60
    (figures,) = run.test(task, datamodule=module, verbose=False)
    predicted = torch.cat(run.predict(task, datamodule=module))
    truth = module.test_rows.label
    error = predicted - truth
    assert figures["test_RMSE"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-4)
    assert figures["test_MAE"] == pytest.approx(float(error.abs().mean()), rel=1e-4)
    r2 = float(1 - error.square().sum() / (truth - truth.mean()).square().sum())
    assert figures["test_R2"] == pytest.approx(r2, rel=1e-4)
    yields = module.scaling.yields(predicted, test)
    assert np.abs(yields - test.target).mean() == pytest.approx(figures["test_MAE"] * module.scaling.scale, rel=1e-3)


def test_data_module_learns_nothing_from_test_rows_and_says_when_there_are_none(bumps):
    samples, test = bumps(40, steps=8, bins=12), bumps(10, seed=1, steps=8, bins=12)
    module = HistogramDataModule(samples, train=QUICK, steps=8, bins=12)
    with_test = HistogramDataModule(samples, test=test, train=QUICK, steps=8, bins=12)
    assert module.scaling == with_test.scaling
    assert len(module.train_rows) + len(module.val_rows) == 40
    assert {int(b["year"].shape[0]) for b in with_test.test_dataloader()} == {10}
    with pytest.raises(InputProblem, match="no test rows: pass test="):
        module.test_dataloader()
    with pytest.raises(InputProblem, match="noise on training images is an option of DFYPRegressor"):
        DFYPTask(TINY, replace(QUICK, noise=0.1))


CHIPS = DFYPSentinel2Config(
    size=32, patch=16, cnn_widths=(4, 5, 6, 8), vit_dim=12, vit_depth=1, vit_heads=2, vit_head_dim=5, vit_mlp=9,
    cnn_dropout=0.0, vit_dropout=0.0, chunk=3,
)  # fmt: skip


def county(i, **changes):
    rng = np.random.default_rng(i)
    chips = rng.integers(0, 256, (2, 1 + i % 3, 32, 32, 3), dtype=np.uint8)
    fields = {"region_id": f"{19001 + i}", "year": 2021, "chips": chips, "production": 1e6 + i, "yield_per_area": 50.0}
    return CountySeason(**fields | changes)


def test_chips_train_with_accumulated_counties_and_test_without_augmentation(tmp_path):
    module = ChipDataModule([county(i) for i in range(5)], val=[county(7), county(8)], test=[county(9), county(11)])
    task = DFYPSentinel2Task(CHIPS, replace(TrainConfig.sentinel2(), batch_size=2))
    run = trainer(tmp_path, max_epochs=2)
    run.fit(task, datamodule=module)
    assert run.global_step == 2 * 3  # five counties, two per update, the last alone
    first, second = (run.test(task, datamodule=module, verbose=False)[0] for _ in range(2))
    assert first == second
    predicted = torch.cat(run.predict(task, datamodule=module))
    assert first["test_yield_MAE"] == pytest.approx(float((predicted[:, 1] - 50).abs().mean()), rel=1e-4)
    logs = predicted[:, 0].log() - torch.tensor([1e6 + 9, 1e6 + 11]).log()
    assert first["test_log_production_RMSE"] == pytest.approx(float(logs.square().mean().sqrt()), rel=1e-4)


def test_counties_without_a_harvest_are_refused():
    loader = ChipDataModule([county(1, production=0.0)]).train_dataloader()
    with pytest.raises(InputProblem, match="county '19002' in 2021 has production 0.0"):
        next(iter(loader))
    with pytest.raises(InputProblem, match="no test counties"):
        ChipDataModule([county(1)]).test_dataloader()
