"""Attention Residuals in transformers models: the tests of every door, and what is its own."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llm_attn import SoftplusConfig, apply_softplus, param_groups
from llm_attn.attention_residuals import (
    AttentionResidualsConfig,
    apply_attention_residuals,
    depth_weights,
    reference,
)
from llm_attn.testing import DoorTests, tiny_model, tokens


def stir(handle, *, seed=0, scale=0.3):
    """Queries and key weights as training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in handle.model.llm_attn_attention_residuals.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return handle


def applied(model, *, scale=0.3, **settings):
    return stir(apply_attention_residuals(model, AttentionResidualsConfig(**settings)), scale=scale)


class TestDoor(DoorTests):
    trained = True

    def apply(self, model):
        return applied(model, layers_per_block=1)

    def neutral(self, model):
        return apply_attention_residuals(model, AttentionResidualsConfig(sum_scale=True))


class TestFullInTwoPhasesAlways(DoorTests):
    families = ("phi",)
    trained = True
    compiled = False  # takes long, and is tested above

    def apply(self, model):
        return applied(model, sublayers_per_block=1, two_phase="always")


def llama(num_layers, std, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=std,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


# ---- conversion


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 12])
def test_a_converted_model_computes_what_it_did(size):
    for std, sum_scale, limit in ((0.3, False, 1e-4), (0.3, True, 2e-5), (0.02, True, 1e-5)):
        model, ids = llama(6, std), tokens(2, 15)
        before = model(ids).logits
        apply_attention_residuals(model, AttentionResidualsConfig(sublayers_per_block=size, sum_scale=sum_scale))
        after = model(ids).logits
        assert (after - before).abs().max() < limit
        assert not torch.equal(after, before)  # it did go through the mixes


def test_without_sum_scale_small_activations_feel_eps():
    """Why conversion wants sum_scale: at std 0.02 the mean is no longer large against the norms' eps."""
    model, ids = llama(6, 0.02), tokens(2, 15)
    before = model(ids).logits
    apply_attention_residuals(model, AttentionResidualsConfig(sublayers_per_block=1))
    assert (model(ids).logits - before).abs().max() > 1e-4


# ---- the definition, with the host's attention and MLP as layers


# norms that read the stream, and modules whose outputs are added to it, those of one sub-layer together
SUBLAYERS = {
    "llama": [("input_layernorm", ["self_attn"]), ("post_attention_layernorm", ["mlp"])],
    "gemma2": [
        ("input_layernorm", ["post_attention_layernorm"]),
        ("pre_feedforward_layernorm", ["post_feedforward_layernorm"]),
    ],
    "phi": [("input_layernorm", ["self_attn", "mlp"])],
}


@pytest.mark.parametrize("family", list(SUBLAYERS))
@pytest.mark.parametrize("size", [1, 3])
def test_the_model_is_what_the_equations_say(family, size):
    """Every input of a sub-layer, from what the sub-layers before added, by the definition."""
    model = tiny_model(family, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    applied(model, sublayers_per_block=size)
    entered, added = [], []

    def enter(_, args, __):
        entered.append(args[0].detach())
        added.append(0)

    def add(_, __, output):
        added[-1] = added[-1] + (output[0] if isinstance(output, tuple) else output).detach()

    for layer in model.model.layers:
        for norm, modules in SUBLAYERS[family]:
            getattr(layer, norm).register_forward_hook(enter)
            for module in modules:
                getattr(layer, module).register_forward_hook(add)
    model(tokens(2, 9))
    residuals = model.llm_attn_attention_residuals
    given, eps = [parameter.detach() for parameter in residuals.parameters()], residuals.eps
    layers = [lambda _, output=output: output for output in added]
    expected = reference.attention_residuals(entered[0], layers, *given, block_size=size, eps=eps)
    assert len(entered) == 4 * len(SUBLAYERS[family])
    for mine, theirs in zip(entered, expected, strict=False):
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_hidden_states_are_the_inputs_of_the_layers():
    model, ids = llama(4, 0.3), tokens(2, 7)
    applied(model, layers_per_block=2)
    entered = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _, args, __: entered.append(args[0]))
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 5
    for state, given in zip(states[:4], entered, strict=True):
        assert torch.equal(state, given)
    assert torch.equal(states[4], model.model(ids).last_hidden_state)
    as_tuple = model(ids, output_hidden_states=True, return_dict=False, use_cache=False)[-1]
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, states, strict=True))
    some = model(ids, output_hidden_states=[2]).hidden_states
    assert torch.equal(some[2], states[2])


# ---- two phases


@pytest.mark.parametrize("settings", [{"layers_per_block": 1}, {"sublayers_per_block": 1}, {"sublayers_per_block": 3}])
def test_two_phase_decoding_is_direct_decoding(settings):
    ids, given = tokens(2, 6), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    found = []
    for two_phase in ("never", "inference"):
        model = llama(4, 0.3, eos_token_id=None)
        applied(model, two_phase=two_phase, **settings)
        found.append(model.generate(ids, **given))
    found.append(model.generate(ids, use_cache=False, **given))
    assert found[0].shape == (2, 26)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("two_phase", ["inference", "always"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_checkpointing_gives_the_same_gradients(two_phase, size):
    results = []
    for checkpointing in (False, True):
        model, ids = llama(4, 0.3).train(), tokens(2, 9)
        applied(model, sublayers_per_block=size, two_phase=two_phase)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert (plain - recomputed).abs().max() < 1e-6


def test_compiles_into_one_graph():
    torch.compiler.reset()  # other models of this process count against the limit of recompilations
    model, ids = llama(2, 0.3), tokens(2, 9)
    applied(model, layers_per_block=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert (compiled(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max() < 1e-5


# ---- with others, and taken away


def test_together_with_an_attention_method(tmp_path):
    model, ids = tiny_model("llama"), tokens(2, 9)
    softplus = apply_softplus(model, SoftplusConfig())
    alone = model(ids).logits
    residuals = applied(model, layers_per_block=1)
    both = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, both)
    assert not torch.equal(both, alone)
    residuals.remove()
    assert torch.equal(model(ids).logits, alone)
    softplus.remove()


def test_a_deep_copy_has_queries_of_its_own():
    model, ids = llama(2, 0.3), tokens(1, 9)
    applied(model)
    before = model(ids).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, before)
    copied.llm_attn_attention_residuals.queries.data += 1
    assert not torch.allclose(copied(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


def test_loaded_model_trains_on_and_can_be_applied_again(tmp_path):
    model = llama(2, 0.3)
    handle = applied(model)
    model.save_pretrained(tmp_path)
    handle.remove()
    apply_attention_residuals(model).remove()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    loaded(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    assert loaded.llm_attn_attention_residuals.queries.grad[1:].abs().amax(1).min() > 0


def test_queries_and_key_norms_do_not_decay():
    model = llama(2, 0.3)
    apply_attention_residuals(model)
    decayed, free = param_groups(model, weight_decay=0.1)
    own = {id(parameter) for parameter in model.llm_attn_attention_residuals.parameters()}
    assert own <= {id(parameter) for parameter in free["params"]}
    assert any(parameter is model.model.layers[0].mlp.up_proj.weight for parameter in decayed["params"])


# ---- learning


@pytest.mark.parametrize("size", [1, 2])
def test_a_model_from_scratch_learns_to_copy(size):
    """Sixteen tokens, a separator, and again: two layers, at most 150 steps; the queries leave zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=34,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    apply_attention_residuals(model, AttentionResidualsConfig(sublayers_per_block=size))
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.01), lr=6e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        half = torch.randint(2, 34, (32, 16), generator=generator)
        ids = torch.cat([half, torch.ones(32, 1, dtype=torch.long), half], 1)
        logits = model(ids[:, :-1]).logits[:, 16:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), half.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    assert (logits.argmax(-1) == half).float().mean() >= 0.99
    queries = model.llm_attn_attention_residuals.queries
    assert queries[0].abs().max() == 0
    assert queries[1:].abs().max() > 0.01
    weights = depth_weights(model, {"input_ids": ids})
    assert max((weight - 1 / weight.shape[-1]).abs().max() for weight in weights) > 0.1


# ---- refused


def test_a_model_with_norms_after_its_sublayers_only_is_refused():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Olmo2ForCausalLM(Olmo2Config(vocab_size=9, **shape))
    with pytest.raises(ValueError, match="its layers have the norms post_attention_layernorm"):
        apply_attention_residuals(model)
    assert not hasattr(model, "llm_attn_attention_residuals")


def test_blocks_longer_than_the_model_are_refused():
    model = llama(2, 0.3)
    with pytest.raises(ValueError, match="layers_per_block=3 is longer than the model"):
        apply_attention_residuals(model, AttentionResidualsConfig(layers_per_block=3))
    assert not hasattr(model, "llm_attn_attention_residuals")


def test_reentrant_checkpointing_is_refused():
    model = llama(2, 0.3).train()
    applied(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="not reentrant"):
        model(tokens(1, 9))
    model.eval()
    assert model(tokens(1, 9)).logits.isfinite().all()


def test_a_layer_alone_is_refused():
    model = llama(2, 0.3)
    applied(model)
    hidden, positions = torch.randn(1, 3, 64), torch.arange(3)[None]
    with pytest.raises(TypeError, match="cannot run without those before it"):
        model.model.layers[1](hidden, position_embeddings=model.model.rotary_emb(hidden, positions))


def test_layers_that_add_otherwise_are_refused(monkeypatch):
    """Attention and MLP side by side under two norms: the count of outputs tells."""

    def side_by_side(self, hidden_states, position_embeddings=None, **given):
        attention, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings=position_embeddings, **given
        )
        return hidden_states + (attention + self.mlp(self.post_attention_layernorm(hidden_states)))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", side_by_side)
    model = llama(2, 0.3)
    applied(model)
    with pytest.raises(RuntimeError, match="has added 0 outputs to the stream where 1 were expected"):
        model(tokens(1, 5), use_cache=False)


def test_logits_can_be_read_from_a_hidden_state():
    """The final norm takes a tensor as it is: hidden states are mixes already."""
    model, ids = llama(2, 0.3), tokens(1, 5)
    applied(model)
    state = model(ids, output_hidden_states=True).hidden_states[1]
    expected = nn.functional.rms_norm(state, (64,), model.model.norm.weight, model.model.norm.variance_epsilon)
    assert (model.model.norm(state) - expected).abs().max() < 1e-5
