"""The proof scripts still run; what they found is committed with them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

PROOFS = Path(__file__).parents[1] / "proofs"


def load(name):
    spec = importlib.util.spec_from_file_location(f"proof_{name}", PROOFS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train_wan():
    return load("train_wan")


def test_training_goes_on_where_it_stopped(train_wan, tmp_path, monkeypatch):
    """Four steps at once, and two and two, give the same weights."""
    monkeypatch.setattr(train_wan, "SAVE_EVERY", 1)
    config = train_wan.ClipConfig(frames=2, size=24)
    whole = (train_wan.Stage(steps=4, batch=2, clips=config, lr=1e-3),)
    straight, _ = train_wan.train(whole, tmp_path / "a", seed=0, validation=1)

    class Stop(Exception):
        pass

    step, calls = train_wan._step, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 3:
            raise Stop
        return step(*args)

    monkeypatch.setattr(train_wan, "_step", stopping)
    with pytest.raises(Stop):
        train_wan.train(whole, tmp_path / "b", seed=0, validation=1)
    monkeypatch.setattr(train_wan, "_step", step)
    resumed, log = train_wan.train(whole, tmp_path / "b", seed=0, validation=1)
    assert len(log) == 1
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_quick_training_writes_a_model_that_loads(train_wan, tmp_path):
    app = Typer()
    app.command()(train_wan.main)
    arguments = ["--quick", "--out", str(tmp_path / "model"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "model" / "report.json").read_text())
    model = train_wan.load_small_wan(tmp_path / "model")
    assert report["parameters"] == sum(p.numel() for p in model.parameters()) < 4_000_000
    assert next(model.parameters()).dtype == torch.float32
    assert (tmp_path / "model" / "samples.png").stat().st_size > 1_000
