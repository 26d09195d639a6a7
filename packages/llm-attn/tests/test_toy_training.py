"""The toy trainings: their tasks are solvable as they say, every variant runs, and a second start goes on."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "proofs" / "toy_training.py"


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("toy_training", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def variants():
    """Names in the script, read as text: importing it takes the time of transformers."""
    table = SCRIPT.read_text().split("VARIANTS: dict")[1].split("\n}")[0]
    return [line.split('"')[1] for line in table.splitlines() if line.strip().startswith('"')]


@pytest.mark.parametrize("length", [32, 512])
def test_a_permutation_repeats_and_the_tokens_that_count_follow_from_the_text(toy, length):
    tokens, counted = toy.repeated_permutation(40, length, torch.Generator().manual_seed(0))
    periods = set()
    for row, mask in zip(tokens.tolist(), counted.tolist(), strict=True):
        period = row.index(row[0], 1)
        periods.add(period)
        assert len(set(row)) == period
        assert all(row[i] == row[i - period] for i in range(period, length))
        assert mask == [i > period for i in range(length)]
    assert periods == set(range(6, 15))


@pytest.mark.parametrize("length", [32, 512])
def test_a_string_is_copied_and_the_copy_counts(toy, length):
    tokens, counted = toy.copied_string(40, length, torch.Generator().manual_seed(0))
    sizes = set()
    for row, mask in zip(tokens.tolist(), counted.tolist(), strict=True):
        size = row.index(toy.SEPARATOR)
        sizes.add(size)
        assert row[:size] == row[size + 1 : 2 * size + 1]
        assert len(set(row[:size])) == size
        assert set(row[2 * size + 1 :]) <= {toy.END}
        assert mask == [size < i <= 2 * size for i in range(length)]
    assert min(sizes) >= length // 4
    assert max(sizes) <= (length - 1) // 2
    assert len(sizes) > 5


@pytest.mark.parametrize("variant", variants())
def test_every_variant_trains_and_can_be_looked_at(toy, variant):
    recipe = replace(toy.QUICK, steps=2, look_every=1)
    run = toy.train(variant, "copy", 0, recipe, lambda: None)
    again = toy.train(variant, "copy", 0, recipe, lambda: None)
    assert run["lengths"] == again["lengths"]  # a seed is a result
    for seen in (*run["lengths"].values(), {k: v[-1] for k, v in run["curves"].items()}):
        assert 0 <= seen["entropy"] <= 1 + 1e-4
        assert 0 < seen["max_logit"] < 1e3
    assert run["curves"]["loss"][0] > 5  # nothing learnt yet: near ln(258)
    assert 0 < run["largest_gradient_norm"] < 1e3
    assert run["parameters"] < 4e6


def test_looking_at_softmax_sees_what_the_model_computes(toy):
    """Weights built from the hooks, times the values, through the rest of the layer: the layer's own output."""
    model = toy.llama(0)
    tokens, _ = toy.copied_string(2, 32, torch.Generator().manual_seed(0))
    outputs, values = [], []
    layers = model.model.layers
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: outputs.append(given[0])) for layer in layers
    ]
    hooks += [layer.self_attn.v_proj.register_forward_hook(lambda *given: values.append(given[-1])) for layer in layers]
    with torch.no_grad():
        seen = toy.llama_attention(model, tokens, of=toy.softmax_attention)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2
    for (_, weights), value, output in zip(seen, values, outputs, strict=True):
        mine = weights @ value.view(2, 32, 4, 16).transpose(1, 2)
        assert (mine.transpose(1, 2).flatten(2) - output).abs().max() < 1e-6


def test_runs_are_kept_and_drawn(toy, tmp_path, monkeypatch, capsys):
    recipe = replace(toy.QUICK, steps=2, look_every=1)
    monkeypatch.setattr(toy, "QUICK", recipe)
    monkeypatch.setitem(toy.METHODS, "softplus", ("softmax", "lssar_15"))
    toy.main("softplus", out=tmp_path, quick=True)
    table = (tmp_path / "toy_softplus.md").read_text()
    assert table.count("| lssar_15 | ") == len(toy.TASKS)
    assert table in capsys.readouterr().out
    assert (tmp_path / "toy_softplus.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / "toy_training" / "lssar_15.json").read_text())
    assert [(run["task"], run["seed"]) for run in kept["runs"]] == [(task, 0) for task in toy.TASKS]
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]

    monkeypatch.setattr(toy, "train", lambda *_: pytest.fail("a finished run was started again"))
    toy.main("softplus", out=tmp_path, quick=True)
    monkeypatch.setattr(toy, "QUICK", replace(recipe, steps=3))
    with pytest.raises(toy.typer.Exit):
        toy.main("softplus", out=tmp_path, quick=True)
    assert "holds runs of another recipe" in " ".join(capsys.readouterr().err.split())


def test_unknown_method(toy, tmp_path, capsys):
    with pytest.raises(toy.typer.Exit):
        toy.main("relu", out=tmp_path)
    assert "no method is called 'relu'. There are: softplus" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow  # two trainings of two to three minutes
def test_softplus_attention_holds_past_its_training_length_where_softmax_does_not(toy):
    recipe = replace(toy.Recipe(), lengths=(32, 128))
    accuracy = {}
    for variant in ("softmax", "lssar_15"):
        run = toy.train(variant, "repeated permutation", 0, recipe, lambda: None)
        accuracy[variant] = {length: seen["accuracy"] for length, seen in run["lengths"].items()}
    print(accuracy)
    assert min(found["32"] for found in accuracy.values()) >= 0.95
    assert accuracy["lssar_15"]["128"] >= 0.85
    assert accuracy["lssar_15"]["128"] >= accuracy["softmax"]["128"] + 0.1
