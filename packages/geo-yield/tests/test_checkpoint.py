"""Checkpoints: what was saved comes back bit for bit, is readable, and anything else is refused in one sentence."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from geo_yield.baselines import MeanYield
from geo_yield.checkpoint import layout_of, load_model, read_metadata, save_model
from geo_yield.crossfit import CrossFit
from geo_yield.dfyp import DFYPConfig
from geo_yield.errors import InputProblem
from geo_yield.samples import IndexSeries
from geo_yield.training import DFYPRegressor, TrainConfig

TINY = replace(
    DFYPConfig.small(3),
    steps=8, bins=12, cnn_width=4, cnn_dense=6, vit_dim=8, vit_heads=2, vit_head_dim=4, vit_mlp=12,
    operator="learnable", operator_by_year={2009: "scharr"}, operator_after="sobel",
)  # fmt: skip
QUICK = TrainConfig(max_steps=6, batch_size=16, standardise=True, history="residual")


def ensemble(samples, *, folds=2):
    crossfit = CrossFit(lambda: DFYPRegressor(TINY, QUICK, name="DFYP tiny"), folds=folds, level=0.8)
    crossfit.fit(samples, seed=0)
    return crossfit


def assert_same_prediction(a, b):
    for name in ("mean", "spread", "lower", "upper"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_round_trip_is_bitwise_and_leaves_the_random_state_alone(bumps, tmp_path):
    samples = bumps(60, steps=8, bins=12)
    crossfit = ensemble(samples)
    save_model(crossfit, tmp_path / "model", metadata={"source": "moving bumps"})
    torch.manual_seed(1)
    loaded = load_model(tmp_path / "model")
    drawn = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(2))
    assert_same_prediction(crossfit.predict(samples), loaded.predict(samples))
    assert layout_of(loaded) == samples.inputs.layout
    assert [member.model for member in loaded.members] == [TINY, TINY]
    assert loaded.members[0].train == QUICK
    assert loaded.members[0].validation_rmse == crossfit.members[0].validation_rmse
    assert (loaded.folds, loaded.group, loaded.level) == (2, "random", 0.8)
    assert read_metadata(tmp_path / "model") == {"source": "moving bumps"}
    loaded.fit(samples, seed=0)  # and it can be trained again
    assert_same_prediction(crossfit.predict(samples), loaded.predict(samples))


def test_series_members_keep_their_own_limits(bumps, tmp_path):
    samples = bumps(40, steps=8, bins=12)
    series = IndexSeries(
        values=np.random.default_rng(0).normal(0, 1, (40, 3, 5)).astype(np.float32),
        bands=("NDVI", "EVI", "LSWI"),
        doy=(91, 98, 105, 112, 119),
        **{name: getattr(samples.inputs, name) for name in ("region_id", "year", "lon", "lat")},
    )
    rows = samples.replace(inputs=series)
    crossfit = ensemble(rows)
    assert crossfit.members[0].scaling.limits != crossfit.members[1].scaling.limits
    loaded = load_model(save_model(crossfit, tmp_path / "model"))
    assert_same_prediction(crossfit.predict(rows), loaded.predict(rows))


def test_model_json_can_be_read_by_people(bumps, tmp_path):
    save_model(ensemble(bumps(40, steps=8, bins=12)), tmp_path / "model")
    text = (tmp_path / "model" / "model.json").read_text()
    raw = json.loads(text)
    assert (raw["method"], raw["unit"], raw["crop"]) == ("DFYP tiny", "bu/acre", "soybean")
    assert raw["layouts"][0]["bands"] == ["b00", "b01", "b02"]
    assert raw["members"][1]["operator_by_year"] == [[2009, "scharr"]]
    assert raw["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(text.splitlines()) < 150
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "member-0.safetensors", "member-1.safetensors", "model.json",
    ]  # fmt: skip


def test_saving_replaces_an_older_model_and_nothing_else(bumps, tmp_path):
    samples = bumps(60, steps=8, bins=12)
    save_model(ensemble(samples, folds=3), tmp_path / "model")
    save_model(ensemble(samples), tmp_path / "model")
    assert len(load_model(tmp_path / "model").members) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(InputProblem, match="exists and is not a model"):
        save_model(load_model(tmp_path / "model"), tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.png").exists()


def test_what_is_no_model_is_refused(bumps, tmp_path):
    with pytest.raises(InputProblem, match="no model in '.*nowhere'"):
        load_model(tmp_path / "nowhere")
    samples = bumps(40, steps=8, bins=12)
    folder = save_model(ensemble(samples), tmp_path / "model")
    described = (folder / "model.json").read_text()
    (folder / "model.json").write_text(described[:100])
    with pytest.raises(InputProblem, match="not readable as JSON"):
        load_model(folder)
    (folder / "model.json").write_text(described.replace("version 1", "version 9"))
    with pytest.raises(InputProblem, match="has format 'geo-yield model, version 9'"):
        load_model(folder)
    (folder / "model.json").write_text(described.replace('"cnn_width": 4', '"cnn_width": 5'))
    with pytest.raises(InputProblem, match="damaged or of another version"):
        load_model(folder)
    (folder / "model.json").write_text(described)
    weights = folder / "member-1.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(InputProblem, match="damaged or of another version"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(InputProblem, match="damaged or of another version"):
        load_model(folder)


def test_only_fitted_dfyp_is_saved(bumps, tmp_path):
    with pytest.raises(InputProblem, match="got no members"):
        save_model(CrossFit(lambda: DFYPRegressor(TINY, QUICK)), tmp_path / "model")
    baseline = CrossFit(MeanYield, folds=2)
    baseline.fit(bumps(20, steps=8, bins=12), seed=0)
    with pytest.raises(InputProblem, match="only fitted ensembles of DFYP can be saved, got MeanYield"):
        save_model(baseline, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_of_another_sensor_refuses_the_input(bumps, tmp_path):
    samples = bumps(40, steps=8, bins=12)
    loaded = load_model(save_model(ensemble(samples), tmp_path / "model"))
    edges = tuple(tuple(np.linspace(0, 1, 13).tolist()) for _ in range(3))
    other = replace(samples.inputs, layout=replace(samples.inputs.layout, edges=edges))
    with pytest.raises(InputProblem, match="the input does not fit what the model was trained on: edges is"):
        loaded.predict(samples.replace(inputs=other))
