"""The door and its saving, tried with a method made for it: softmax attention times a gate of the layer's input."""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from llm_attn.testing import DoorTests, tiny_model, tokens
from llm_attn.transformers import (
    Handle,
    attention_layers,
    dense_attention,
    layer_config,
    load_model,
    open_door,
    register_attention,
    register_door,
)


@dataclass(frozen=True)
class GateConfig:
    strength: float = 0.5


class Gate(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, width, generator=torch.Generator().manual_seed(heads)))
        self.register_buffer("count", torch.zeros(1))


def gated(layer, query, key, value, visible, *, scale, dropout, softcap, hidden_states):
    strength = layer_config(layer, "gated", GateConfig()).strength
    gate = (hidden_states @ layer.llm_attn_gated.weight.T).tanh().mT[..., None]
    out = dense_attention(query, key, value, visible, scale=scale, dropout=dropout, softcap=softcap)
    return out * (1 + strength * gate)


def apply_gate(model, config, *, layers=None):
    def make(layer):
        return Gate(model.config.hidden_size, model.config.num_attention_heads)

    return open_door(model, "gated", config, layers=layers, modules=make, hidden_states=True)


@pytest.fixture(scope="module", autouse=True)
def gate_registered():
    register_attention("gated", gated, softcap=True)
    register_door("gated", GateConfig, apply_gate)


class TestGate(DoorTests):
    attention = "gated"
    by_name = False
    trained = True

    def apply(self, model):
        return apply_gate(model, GateConfig())

    def neutral(self, model):
        return apply_gate(model, GateConfig(0.0))


class Forgetful(DoorTests):
    """The gate, but deaf to padding: what the suite must notice."""

    attention = "deaf"

    def apply(self, model):
        return open_door(model, "deaf", GateConfig())


def test_a_method_that_ignores_padding_fails_the_suite():
    def deaf(layer, query, key, value, visible, *, scale, dropout):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)

    register_attention("deaf", deaf)
    with pytest.raises(AssertionError, match="not close"):
        Forgetful().test_padding_leaves_real_tokens_alone("llama")
    with pytest.raises(AssertionError, match="changes nothing"):
        Forgetful().test_changes_the_output_and_remove_restores_the_host("llama")


def test_layers_left_out_are_the_hosts_own():
    model, ids = tiny_model("gemma2"), tokens(2, 23)
    host = model(ids, output_hidden_states=True).hidden_states
    handle = apply_gate(model, GateConfig(), layers=[1])
    with_gate = model(ids, output_hidden_states=True).hidden_states
    assert handle.layers_changed == (1,)
    torch.testing.assert_close(with_gate[1], host[1], atol=1e-5, rtol=1e-5)
    assert (with_gate[2] - host[2]).abs().max() > 0.01


def test_capped_scores_are_the_hosts_own():
    model, ids = tiny_model("gemma2", attn_logit_softcapping=0.5), tokens(2, 23)
    uncapped = tiny_model("gemma2")(ids).logits
    host = model(ids).logits
    apply_gate(model, GateConfig(0.0))
    torch.testing.assert_close(model(ids).logits, host, atol=1e-5, rtol=1e-5)
    assert (host - uncapped).abs().max() > 0.01


@pytest.mark.parametrize("layers", [[2], [-1], [0, 5], []])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="layers must be some of 0 to 1"):
        apply_gate(tiny_model("llama"), GateConfig(), layers=layers)


def test_two_attention_methods_are_refused_and_nothing_is_left():
    register_attention("second", gated, softcap=True)
    model, ids = tiny_model("llama"), tokens(1, 9)
    handle = apply_gate(model, GateConfig())
    before = model(ids).logits
    with pytest.raises(ValueError, match="attention is gated already"):
        open_door(model, "second", GateConfig())
    assert torch.equal(model(ids).logits, before)
    handle.remove()
    open_door(model, "second", GateConfig()).remove()


def test_models_without_decoder_layers_are_refused():
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ValueError, match="tested families: llama"):
        attention_layers(bert)
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        attention_layers(nn.Linear(2, 2))


def test_a_door_that_fails_half_way_leaves_nothing():
    model, made = tiny_model("llama"), []

    def make(layer):
        if made:
            raise MemoryError
        made.append(layer)
        return nn.Linear(2, 2)

    before = set(model.state_dict())
    with pytest.raises(MemoryError):
        open_door(model, "gated", GateConfig(), modules=make)
    assert set(model.state_dict()) == before
    assert not hasattr(model.model.layers[0].self_attn, "llm_attn")


def test_undoing_runs_backwards():
    done = []
    handle = Handle("x", nn.Identity(), None, (0,))
    handle.on_remove(lambda: done.append("first"))
    handle.on_remove(lambda: done.append("second"))
    handle.remove()
    assert done == ["second", "first"]


# ---- saving


def test_saved_methods_stand_in_the_config_and_go_with_remove(tmp_path):
    model = tiny_model("qwen3")
    handle = apply_gate(model, GateConfig(0.25), layers=[0])
    model.save_pretrained(tmp_path / "gated")
    saved = json.loads((tmp_path / "gated" / "config.json").read_text())
    assert saved["model_type"] == "llm_attn"
    method = {"name": "gated", "layers": [0], "config": {"strength": 0.25}}
    assert saved["llm_attn"] == {"model_type": "qwen3", "methods": [method]}
    handle.remove()
    model.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "qwen3"


def test_a_copy_keeps_its_method_and_saves_it(tmp_path):
    model, ids = tiny_model("llama"), tokens(1, 9)
    handle = apply_gate(model, GateConfig())
    wanted = model(ids).logits
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(twin(ids).logits, wanted)
    twin.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, wanted)


def test_statistics_keep_their_dtype():
    model = tiny_model("llama").to(torch.bfloat16)
    apply_gate(model, GateConfig())
    gate = model.model.layers[0].self_attn.llm_attn_gated
    assert (gate.weight.dtype, gate.count.dtype) == (torch.bfloat16, torch.float32)


def test_unknown_methods_and_missing_weights_are_refused(tmp_path):
    model = tiny_model("llama")
    apply_gate(model, GateConfig())
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    for change, message in (({"name": "later"}, "runs later; this llm-attn knows"), ({"layers": [0]}, "disagree")):
        changed = json.loads(json.dumps(saved))
        changed["llm_attn"]["methods"][0].update(change)
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_transformers_alone_does_not_load_it_as_something_else(tmp_path):
    model = tiny_model("llama")
    apply_gate(model, GateConfig())
    model.save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "llm_attn" in run.stderr


def test_pushing_from_inside_is_refused(tmp_path):
    model = tiny_model("llama")
    apply_gate(model, GateConfig())
    with pytest.raises(ValueError, match="save .* to a folder"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_loading_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a transformers folder or a \.gguf file"):
        load_model(tmp_path / "nothing")
