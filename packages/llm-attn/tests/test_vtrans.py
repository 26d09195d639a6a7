"""VTrans: gates against their formulas, masked models against shrunk ones, training against its targets."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from llm_attn.testing import tiny_model
from llm_attn.vtrans import (
    EmbeddingObjective,
    FinetuneConfig,
    LanguageObjective,
    ObjectiveConfig,
    PruningConfig,
    Scores,
    SizeConstraint,
    SizeModel,
    Structure,
    VIBGate,
    VTransConfig,
    VTransTrainer,
    apply_vtrans,
    choose_structure,
    draw_attention,
    draw_structure,
    draw_training,
    embedding_agreement,
    finetune,
    fits_stock,
    layer_drop_structure,
    load_shrunk,
    log_alpha,
    magnitude_structure,
    masked_layer_norm,
    masked_rms_norm,
    objective_for,
    perplexity,
    pick,
    probe_attention,
    shrink,
    vib_gate,
    vib_kl,
)
from llm_attn.vtrans.objectives import match_layers, taught_layers
from llm_attn.vtrans.training import collate

VOCABULARY, TOKENS = 61, 11
BUILDS = {
    "bert": ("bert", AutoModel, {}),
    "bert, masked language": ("bert", AutoModelForMaskedLM, {}),
    "bert, classes": ("bert", AutoModelForSequenceClassification, {"num_labels": 3}),
    "roberta, masked language": ("roberta", AutoModelForMaskedLM, {}),
    "gpt2, tied": ("gpt2", AutoModelForCausalLM, {}),
    "llama": ("llama", AutoModelForCausalLM, {"num_key_value_heads": 6}),
    "llama, grouped and tied": ("llama", AutoModelForCausalLM, {"num_key_value_heads": 3, "tie_word_embeddings": True}),
    "qwen2, grouped": ("qwen2", AutoModelForCausalLM, {"num_key_value_heads": 2}),
    "qwen3, wide heads": ("qwen3", AutoModelForCausalLM, {"num_key_value_heads": 3, "head_dim": 10}),
    "mistral, grouped": ("mistral", AutoModelForCausalLM, {"num_key_value_heads": 3}),
}


def build(name, seed=0, **changes):
    """A random model of three layers, 24 channels and 6 heads whose vectors (norms, biases) are random too."""
    family, auto, own = BUILDS[name]
    shape = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6}
    shape |= {"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **own, **changes}
    if family == "gpt2":
        shape |= {"n_positions": 40, "n_inner": 40}
    else:
        shape |= {"intermediate_size": 40, "max_position_embeddings": 40}
    torch.manual_seed(seed)
    model = auto.from_config(AutoConfig.for_model(family, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model


def ids(seed=1, batch=2, length=TOKENS):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def output(model, given=None):
    out = model(ids() if given is None else given)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def randomise(gates, seed=2):
    """Means of both signs, and a random order of all units."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates.all():
            sign = torch.rand(gate.mu.shape, generator=generator).sub(0.5).sign()
            gate.mu.copy_(sign * (0.5 + torch.rand(gate.mu.shape, generator=generator)))
            gate.log_variance.copy_(torch.randn(gate.mu.shape, generator=generator))


def gated(name, *, sparsity=0.45, seed=2, **config):
    """A model with random gates of which a share is fixed away, its handle and the structure."""
    model = build(name)
    handle = apply_vtrans(model, VTransConfig(**config))
    randomise(handle.gates, seed)
    structure = choose_structure(Scores.of(handle.gates), handle.size, sparsity)
    handle.fix(structure)
    return model, handle, structure


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ---- the gate


def test_kl_is_the_closed_form_and_what_sampling_gives():
    mu, log_variance = torch.tensor([1.0, -0.4, 0.05, 2.0]).double(), torch.tensor([-2.0, 0.3, -1.0, 1.5]).double()
    variance = log_variance.exp()
    expected = 0.5 * (1 + mu**2 / variance).log()
    assert abs(vib_kl(mu, log_variance) - expected.sum()) < 1e-6
    generator = torch.Generator().manual_seed(0)
    z = mu + variance.sqrt() * torch.randn(400_000, 4, generator=generator, dtype=torch.float64)
    posterior = torch.distributions.Normal(mu, variance.sqrt()).log_prob(z)
    prior = torch.distributions.Normal(torch.zeros(4).double(), (mu**2 + variance).sqrt()).log_prob(z)
    sampled = (posterior - prior).mean(0)
    assert ((sampled - expected).abs() < 0.01 * expected + 1e-3).all()


def vibnet(x, mu, log_variance, noise, *, training, weighted):
    """The layer of VIBNet, written from its description for (tokens, units)."""
    if training:
        return x * (mu + torch.exp(log_variance * 0.5) * noise)
    hard = (log_variance - torch.log(mu.pow(2) + 1e-8) < 0).float()
    return x * (hard * mu if weighted else hard)


@pytest.mark.parametrize("weighted", [True, False])
def test_gate_is_that_of_vibnet(weighted):
    gate = VIBGate(7, weighted=weighted, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        gate.mu.copy_(torch.linspace(-1.2, 1.5, 7))
        gate.log_variance.copy_(torch.linspace(1.0, -2.0, 7))
    x, noise = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    sampled = vib_gate(x, gate.mu, gate.log_variance, noise)
    oracle = vibnet(x.flatten(0, 1), gate.mu, gate.log_variance, noise.flatten(0, 1), training=True, weighted=weighted)
    assert (sampled.flatten(0, 1) - oracle).abs().max() <= 1e-6
    gate.eval()
    oracle = vibnet(x, gate.mu, gate.log_variance, None, training=False, weighted=weighted)
    assert (gate(x) - oracle).abs().max() <= 1e-6
    assert 0 < gate.keep.sum() < 7
    assert torch.equal(gate.keep, gate.log_alpha < 0)


def test_noise_is_drawn_for_each_token_or_each_row():
    for noise, alike in (("token", False), ("sample", True)):
        gate = VIBGate(3, channels=2, noise=noise, log_variance=0.0, generator=torch.Generator().manual_seed(0))
        z = gate(torch.ones(2, 4, 6))
        assert torch.equal(z[:, 0], z[:, 1]) is alike
        assert not torch.equal(z[0], z[1])
        assert not torch.equal(z[..., 0], z[..., 1])  # channels of a unit have noise of their own
        many = gate(torch.ones(20_000, 1, 6)).flatten(0, 1)
        means = gate.mu.repeat_interleave(2)
        assert ((many.mean(0) - means).abs() < 0.04).all()
        assert ((many.std(0) - 1).abs() < 0.04).all()


def test_gradients_of_the_gate():
    torch.manual_seed(0)
    x, mu, log_variance = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,), (5,)))
    noise = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: vib_gate(*a, noise), (x, mu, log_variance))
    assert torch.autograd.gradcheck(vib_kl, (mu, log_variance))
    assert torch.autograd.gradcheck(log_alpha, (mu, log_variance))
    keep = torch.tensor([True, False, True, True, False])
    assert torch.autograd.gradcheck(lambda x, w: masked_layer_norm(x, w, w, keep, eps=1e-5), (x, mu))
    assert torch.autograd.gradcheck(lambda x, w: masked_rms_norm(x, w, keep, eps=1e-5), (x, mu))


def test_masked_norms_are_norms_of_the_kept():
    x, keep = torch.randn(2, 3, 6), torch.tensor([True, True, False, True, False, True])
    weight, bias = torch.randn(6), torch.randn(6)
    out = masked_layer_norm(x, weight, bias, keep, eps=1e-5)
    small = nn.LayerNorm(4)
    small.weight.data, small.bias.data = weight[keep], bias[keep]
    torch.testing.assert_close(out[..., keep], small(x[..., keep]), rtol=0, atol=1e-6)
    assert torch.equal(out[..., ~keep], x[..., ~keep])
    out = masked_rms_norm(x, weight, keep, eps=1e-6)
    own = x[..., keep]
    torch.testing.assert_close(out[..., keep], weight[keep] * own / (own.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert torch.equal(out[..., ~keep], x[..., ~keep])


def test_a_gate_refuses_other_widths():
    with pytest.raises(ValueError, match="3 units of 2 channels, got 5"):
        VIBGate(3, channels=2)(torch.ones(1, 5))
    with pytest.raises(ValueError, match="noise must be one of token, sample, got 'row'"):
        VIBGate(3, noise="row")


# ---- the door


@pytest.mark.parametrize("name", BUILDS)
def test_open_gates_are_the_host(name):
    model = build(name)
    before = output(model)
    with apply_vtrans(model, VTransConfig(log_variance=-60.0, layer_gates=True)) as handle:
        with torch.no_grad():
            for gate in handle.gates.all():
                gate.mu.fill_(1.0)
        torch.testing.assert_close(output(model), before, rtol=0, atol=1e-5)  # sampled, without noise to speak of
        handle.gates.eval()
        assert torch.equal(output(model), before)
        assert handle.layers_changed == (0, 1, 2)
        randomise(handle.gates)
        assert not torch.allclose(output(model), before, atol=0.1)
    assert torch.equal(output(model), before)
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_two_doors_are_refused():
    for name in ("bert", "gpt2, tied"):
        model = build(name)
        with apply_vtrans(model), pytest.raises(ValueError, match="has VTrans gates already"):
            apply_vtrans(model)
        apply_vtrans(model).remove()


# ---- shrinking


@pytest.mark.parametrize("layout", ["stock", "ragged"])
@pytest.mark.parametrize("name", BUILDS)
def test_the_shrunk_model_is_the_masked_one(name, layout, tmp_path):
    """Logits, the count of parameters, and the same again from disk, bit for bit."""
    model, handle, structure = gated(name, layout=layout, layer_gates=layout == "ragged", sparsity=0.4)
    masked = output(model)
    if name == "bert":
        masked = masked[..., list(structure.hidden)]
    small = shrink(model, structure, gates=handle.gates)
    out = output(small)
    assert (out - masked).abs().max() <= 1e-4 * masked.abs().max().clamp(min=1)
    assert count(small) < count(model)
    assert count(small) == handle.size.parameters(structure.counts, count_embeddings=True)
    assert not handle.size.sparsity(structure.counts) < 0.4
    assert (fits_stock(model, structure) is None) is (type(small) is type(model))
    small.save_pretrained(tmp_path)
    assert torch.equal(output(load_shrunk(tmp_path)), out)


def test_the_three_counts_of_the_paper():
    """4 D k K + 3 m K + 2 K a layer for Llama, 2 D k K (1 + g) of attention for grouped heads, GPT-2 with biases."""
    d_head, k, m, hidden = 4, 2, 17, 12
    one = {"hidden": tuple(range(hidden)), "layers": (0, 1, 2), "inter": (tuple(range(m)),) * 3, "heads": ((0, 1),) * 3}
    structure = Structure(**one)

    def left(name, **changes):
        size = SizeModel(build(name, **changes), count_embeddings=False, layout="ragged")
        return size.parameters(structure.counts)

    assert left("llama") == 3 * (4 * d_head * k * hidden + 3 * m * hidden + 2 * hidden) + hidden
    grouped = 3 * (2 * d_head * k * hidden * (1 + 2) + 3 * m * hidden + 2 * hidden) + hidden
    assert left("llama, grouped and tied") == grouped
    biases = 3 * d_head * k + hidden + m + hidden
    gpt2 = 3 * (4 * d_head * k * hidden + 2 * m * hidden + biases + 4 * hidden) + 2 * hidden
    assert left("gpt2, tied") == gpt2


def test_expected_size_at_certainty_is_the_true_one():
    for name in ("bert", "llama, grouped and tied"):
        for layout in ("stock", "ragged"):
            model, handle, structure = gated(name, layout=layout, layer_gates=True)
            counts = handle.gates.counts()
            assert isinstance(counts.hidden, torch.Tensor)
            expected = handle.size.parameters(counts, count_embeddings=True)
            assert expected.item() == count(shrink(model, structure, gates=handle.gates))


def test_operations_are_those_of_the_shrunk_model():
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("bert, masked language", "llama, grouped and tied", "gpt2, tied"):
        model, handle, structure = gated(name, sparsity=0.3, layer_gates=False)
        small = shrink(model, structure, gates=handle.gates)
        small.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            output(small, ids(batch=1))
        vocabulary = 2 * TOKENS * VOCABULARY * len(structure.hidden)
        counted = handle.size.flops(structure.counts, TOKENS)
        neck = 0 if name != "bert, masked language" else vocabulary  # its decoder is no lm_head
        assert counted + neck == counter.get_total_flops()


def test_operations_can_be_the_target():
    for name, layout in (("bert", "stock"), ("llama", "ragged")):
        model = build(name)
        handle = apply_vtrans(model, VTransConfig(flops_of=9, layout=layout, layer_gates=False))
        randomise(handle.gates)
        structure = choose_structure(Scores.of(handle.gates), handle.size, 0.4)
        whole = Structure.whole(model).counts
        left = handle.size.flops(structure.counts, 9) / handle.size.flops(whole, 9)
        assert 0.5 < left <= 0.6
        handle.fix(structure)
        assert handle.sparsity().item() == pytest.approx(1 - left, abs=1e-6)
        assert left != pytest.approx(
            1 - handle.size.parameters(structure.counts) / handle.size.parameters(whole), abs=1e-3
        )


def test_unweighted_gates_only_mask():
    model, handle, structure = gated("llama", weighted=False)
    masked = output(model)
    small = shrink(model, structure, gates=handle.gates)
    torch.testing.assert_close(output(small), masked, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output(small), output(shrink(model, structure)), rtol=0, atol=0)


def test_padding_and_generation_with_a_cache_survive_shrinking():
    model, handle, structure = gated("llama, grouped and tied")
    for layout in ("stock", "ragged"):
        if layout == "ragged":
            model, handle, structure = gated("llama, grouped and tied", layout="ragged", seed=5)
        small = shrink(model, structure, gates=handle.gates)
        prompt = ids(length=5)
        generated = small.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            first = small(prompt, use_cache=True)
            step = small(generated[:, 5:6], past_key_values=first.past_key_values, use_cache=True)
        assert (step.logits[:, 0] - output(small, generated[:, :6])[:, 5]).abs().max() <= 1e-4
        for place in range(5, 11):
            assert torch.equal(output(small, generated[:, :place])[:, -1].argmax(-1), generated[:, place])
        padded = F.pad(prompt, (0, 3))
        with torch.no_grad():
            out = small(padded, attention_mask=(padded != 0).long()).logits
        torch.testing.assert_close(out[:, :5], output(small, prompt), rtol=1e-4, atol=1e-4)


def test_checkpoints_load_without_this_package(tmp_path):
    """In a process that cannot import llm_attn: stock ones by themselves, ragged ones by the file they carry."""
    cases = {}
    for index, (name, layout) in enumerate(
        [
            ("bert", "stock"),
            ("gpt2, tied", "stock"),
            ("llama, grouped and tied", "stock"),
            ("llama", "ragged"),
            ("bert", "ragged"),
        ]
    ):
        model, handle, structure = gated(name, layout=layout)
        small = shrink(model, structure, gates=handle.gates)
        small.save_pretrained(tmp_path / str(index))
        cases[str(index)] = (BUILDS[name][1].__name__, layout, output(small).double().sum().item(), count(small))
    code = f"""
import json, sys
sys.modules["llm_attn"] = sys.modules["shared_kernels"] = None
import torch, transformers
transformers.logging.set_verbosity_error()
ids = torch.tensor({ids().tolist()})
for name, (auto, layout, total, parameters) in json.loads({json.dumps(json.dumps(cases))!s}).items():
    options = {{"trust_remote_code": True}} if layout == "ragged" else {{}}
    model = getattr(transformers, auto).from_pretrained({str(tmp_path)!r} + "/" + name, **options).eval()
    with torch.no_grad():
        out = model(ids)
    out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    assert abs(out.double().sum().item() - total) <= 1e-6 * out.double().abs().sum().item(), name
    assert sum(p.numel() for p in model.parameters()) == parameters, name
    print(type(model).__module__.split(".")[0], end=" ")
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    import os

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["transformers"] * 3 + ["transformers_modules"] * 2


def test_what_a_layer_that_goes_leaves_behind():
    """Without the other layers' gates, dropping layer 1 is the host with layers 0 and 2."""
    for name in ("bert", "gpt2, tied", "llama"):
        model = build(name)
        whole = Structure.whole(model)
        kept = (0, 2)
        structure = replace(
            whole,
            layers=kept,
            heads=tuple(h if layer in kept else () for layer, h in enumerate(whole.heads)),
            inter=tuple(h if layer in kept else () for layer, h in enumerate(whole.inter)),
        )
        small = shrink(model, structure)
        layers = small.encoder.layer if name == "bert" else small.base_model.h if "gpt2" in name else small.model.layers
        assert len(layers) == 2
        host = model.encoder if name == "bert" else model.base_model
        path = "layer" if name == "bert" else "h" if "gpt2" in name else "layers"
        setattr(host, path, nn.ModuleList([getattr(host, path)[layer] for layer in kept]))
        for index, layer in enumerate(getattr(host, path)):  # the cache finds its place by it
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
        model.config.num_hidden_layers = 2
        assert torch.equal(output(small), output(model))


# ---- choosing


def test_kept_units_are_nested_and_widths_are_multiples():
    model, handle, _ = gated("llama", layout="ragged")
    scores = Scores.of(handle.gates)
    last = None
    for sparsity in (0.2, 0.4, 0.6):
        chosen = choose_structure(scores, handle.size, sparsity)
        assert handle.size.sparsity(chosen.counts) >= sparsity
        for kept, score in zip(
            (chosen.hidden, *chosen.inter, *chosen.heads), (scores.hidden, *scores.inter, *scores.heads), strict=True
        ):
            assert set(kept) == set(score.argsort()[: len(kept)].tolist())
        if last is not None:
            assert set(chosen.hidden) <= set(last.hidden)
        last = chosen
        same = choose_structure(scores, handle.size, sparsity, multiple_of=1)
        assert same == chosen
        aligned = choose_structure(scores, handle.size, sparsity, multiple_of=8)
        assert len(aligned.hidden) % 8 == 0
        assert {len(kept) % 8 for kept in aligned.inter} == {0}
        assert handle.size.sparsity(aligned.counts) >= sparsity
    aligned = choose_structure(scores, SizeModel(model, layout="stock"), 0.5, multiple_of=8)
    assert aligned.is_even()
    assert fits_stock(model, aligned) is None


def test_the_budget_is_used():
    """Of a model whose units are many, less than four per cent of the budget is left over."""
    model = build("llama", hidden_size=96, intermediate_size=200)
    for layout in ("stock", "ragged"):
        handle = apply_vtrans(model, VTransConfig(layout=layout))
        randomise(handle.gates)
        for sparsity in (0.3, 0.5, 0.7):
            left = handle.size.sparsity(choose_structure(Scores.of(handle.gates), handle.size, sparsity).counts)
            assert sparsity <= left < sparsity + 0.04 * (1 - sparsity)
        handle.remove()


def test_targets_that_cannot_be_met():
    model = build("bert")
    with pytest.raises(ValueError, match=r"a sparsity of 0.99 cannot be met: with one head .* it is 0\.\d+; lower"):
        VTransTrainer(model, [ids()[0]], config=PruningConfig(target_sparsity=0.99))
    for wrong in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match=rf"target_sparsity must lie in \(0, 1\), got {wrong}"):
            PruningConfig(target_sparsity=wrong)


def test_masks_that_leave_no_width_are_refused():
    whole = Structure.whole(build("llama"))
    with pytest.raises(ValueError, match="no attention head of layer 1 stays: its width would be 0"):
        replace(whole, heads=(whole.heads[0], (), whole.heads[2]))
    with pytest.raises(ValueError, match="no feed-forward unit of layer 2 stays"):
        replace(whole, inter=(*whole.inter[:2], ()))
    with pytest.raises(ValueError, match="no channel of the residual stream stays"):
        replace(whole, hidden=())
    with pytest.raises(ValueError, match="no layer stays"):
        replace(whole, layers=())
    with pytest.raises(ValueError, match="41 units were asked for, there are 40"):
        pick(magnitude_of("llama"), layers=(0, 1, 2), hidden=24, heads=[6] * 3, inter=[40, 41, 40])


def magnitude_of(name):
    from llm_attn.vtrans import magnitude_scores

    return magnitude_scores(build(name))


def test_unknown_families_and_foreign_structures():
    with pytest.raises(ValueError, match=r"VTrans shrinks bert, roberta, gpt2, .*'phi3' is not among them"):
        apply_vtrans(tiny_model("phi3"))
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        apply_vtrans(nn.Linear(2, 2))
    model = build("llama")
    with pytest.raises(ValueError, match="the structure is of another model: this one has 3 layers of 6 heads"):
        shrink(model, Structure.whole(build("llama", hidden_size=48)))
    model.extra = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"does not know what the parameter 'extra\.weight'"):
        apply_vtrans(model)
    dropping = replace(Structure.whole(build("gpt2, tied")), layers=(0, 2))
    with pytest.raises(ValueError, match="scales attention by the number of the layer"):
        shrink(build("gpt2, tied", scale_attn_by_inverse_layer_idx=True), dropping)
    handle = apply_vtrans(build("llama"))
    with pytest.raises(ValueError, match="use layer_gates=True"):
        handle.fix(replace(Structure.whole(handle.model), layers=(0, 2)))
    with pytest.raises(ValueError, match="layout must be one of stock, ragged, got 'free'"):
        apply_vtrans(build("llama"), VTransConfig(layout="free"))


def test_structures_survive_json():
    _, _, structure = gated("llama", layout="ragged", layer_gates=True)
    assert Structure.from_json(json.loads(json.dumps(structure.to_json()))) == structure


# ---- baselines


def test_magnitude_keeps_the_largest():
    model = build("llama, grouped and tied")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 5] *= 30
        model.model.layers[0].self_attn.v_proj.weight[4:8] *= 30  # key head 1
        model.model.embed_tokens.weight[:, 7] *= 30
    like = replace(Structure.whole(model), hidden=(0,), heads=((0,), (0,), (0,)), inter=((0,), (0,), (0,)))
    chosen = magnitude_structure(model, like)
    assert chosen.hidden == (7,)
    assert chosen.heads[0] == (1,)
    assert chosen.inter[1] == (5,)


def test_layers_are_dropped_evenly_and_narrowed_where_that_is_not_enough():
    model = build("bert", num_hidden_layers=6)
    size = SizeModel(model, layout="stock")
    whole = Structure.whole(model)
    half = replace(whole.counts, layers=[1, 0, 1, 0, 0, 1])
    dropped = layer_drop_structure(model, size, size.sparsity(half) - 0.01)
    assert dropped.layers == (0, 2, 5)
    assert dropped.hidden == whole.hidden
    assert layer_drop_structure(model, size, size.sparsity(half) + 0.01).layers == (0, 5)
    narrow = layer_drop_structure(model, size, 0.85)
    assert narrow.layers == (0, 2, 5)
    assert len(narrow.hidden) < 24
    assert fits_stock(model, narrow) is None
    assert size.sparsity(narrow.counts) >= 0.85


# ---- training


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
def test_the_constraint_reaches_its_target(target):
    """Against gradients that do not change, three times the warm-up is enough."""
    model = build("llama", num_hidden_layers=2)
    handle = apply_vtrans(model, VTransConfig(layout="ragged"))
    warm = 100
    constraint = SizeConstraint(target, warm_up_steps=warm)
    gates = torch.optim.AdamW(handle.gates.parameters(), lr=0.05, weight_decay=0.0)
    lambdas = torch.optim.AdamW(constraint.parameters(), lr=1.0, weight_decay=0.0, maximize=True)
    assert constraint.target_at(warm // 2) == pytest.approx(target / 2)
    generator = torch.Generator().manual_seed(0)
    task = [1e-4 * torch.rand(gate.mu.shape, generator=generator) for gate in handle.gates.all()]
    for step in range(3 * warm):
        gates.zero_grad()
        lambdas.zero_grad()
        gates.param_groups[0]["lr"] = 0.05 * (1 - step / (3 * warm))
        sparsity = handle.sparsity()
        frozen = sum((g * gate.log_variance).sum() for g, gate in zip(task, handle.gates.all(), strict=True))
        (1e-6 * handle.gates.kl() + frozen + constraint(sparsity, step)).backward()
        gates.step()
        lambdas.step()
    assert abs(handle.sparsity().item() - target) <= 0.005


def test_relevant_inputs_are_found():
    """Sixteen inputs of which four matter, weights that are known but for noise: the gates keep the four."""
    seeds, inputs, relevant = 10, 16, 4
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(seeds, inputs, generator=generator)
    weight[:, :relevant] += 1
    gate = VIBGate(seeds * inputs, generator=generator)
    constraints = nn.ModuleList([SizeConstraint(0.75, warm_up_steps=300) for _ in range(seeds)])
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.05, weight_decay=0.0)
    ascent = torch.optim.AdamW(constraints.parameters(), lr=0.1, weight_decay=0.0, maximize=True)
    for step in range(1500):
        optimizer.zero_grad()
        ascent.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 1500)
        x = torch.randn(32, seeds, inputs, generator=generator)
        target = x[..., :relevant].sum(-1)
        predicted = (gate(x.flatten(1)).unflatten(1, (seeds, inputs)) * weight).sum(-1)
        sparsity = 1 - gate.keep_probability().view(seeds, inputs).mean(-1)
        size = sum(constraint(s, step) for constraint, s in zip(constraints, sparsity, strict=True))
        ((predicted - target).square().mean(0).sum() + 1e-2 * gate.kl() + size).backward()
        optimizer.step()
        ascent.step()
    kept = gate.keep.view(seeds, inputs)
    right = (kept[:, :relevant].all(-1) & ~kept[:, relevant:].any(-1)).sum()
    assert right >= 9


def text(rows, length=24, seed=0):
    """Sequences that follow one table: what comes after a token depends on the two before it, mostly."""
    generator = torch.Generator().manual_seed(99)
    table = torch.randint(3, VOCABULARY, (7, 7), generator=generator)
    generator = torch.Generator().manual_seed(seed)
    out = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    for place in range(2, length):
        follows = torch.rand(rows, generator=generator) < 0.9
        own = table[out[:, place - 1] % 7, out[:, place - 2] % 7]
        out[:, place] = torch.where(follows, own, out[:, place])
    return list(out)


def trainer(model, *, folder=None, steps=8, on_step=None, mode="faster", **more):
    config = PruningConfig(target_sparsity=0.4, steps=steps, batch_size=4, check_every=3, gate_lr=0.1, mode=mode)
    gates = VTransConfig(log_variance=-2.0)
    return VTransTrainer(model, text(40), config=config, gates=gates, folder=folder, on_step=on_step, **more)


def test_faster_trains_gates_alone():
    model = build("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = trainer(model)
    gates_before = run.handle.gates.hidden.mu.clone()
    structure = run.train()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert not torch.equal(run.handle.gates.hidden.mu, gates_before)
    assert run.handle.size.sparsity(structure.counts) >= 0.4
    small = run.shrink()
    torch.testing.assert_close(output(small), output(model), rtol=1e-3, atol=1e-3)


def test_full_trains_both_and_fast_reads_three_per_cent():
    model = build("llama")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    run = trainer(model, mode="full")
    run.train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert len(run.data) == 40
    assert len(trainer(build("llama"), mode="fast").data) == 4
    config = PruningConfig(mode="fast", batch_size=4)
    many = VTransTrainer(build("llama"), text(1000, length=3), config=config).data
    assert len(many) == 30
    assert len({tuple(row.tolist()) for row in many}) > 20


@pytest.mark.parametrize("mode", ["faster", "full"])
def test_a_stopped_training_ends_as_one_that_was_not(mode, tmp_path):
    figures = {}

    def run(folder, stop=None):
        def on_step(done, found):
            figures.setdefault(done, found)
            assert figures[done] == found
            if done == stop:
                raise KeyboardInterrupt

        return trainer(build("llama"), folder=folder, on_step=on_step, mode=mode, held_out=text(8, seed=1))

    whole = run(None)
    structure = whole.train()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=5).train()
    second = run(tmp_path)
    assert second.train() == structure
    assert len(figures) == 8
    for ours, theirs in zip(whole.handle.gates.parameters(), second.handle.gates.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(output(whole.shrink()), output(second.shrink()))
    with pytest.raises(ValueError, match="holds a training with other settings"):
        trainer(build("llama"), folder=tmp_path, steps=9, mode=mode).train()


def test_the_best_state_near_the_target_is_kept(monkeypatch):
    """Judged with the masks of the target; a state far from the target is not."""
    judged = iter([2.0, 3.0, 1.0])
    monkeypatch.setattr("llm_attn.vtrans.training.evaluate", lambda *_, **__: next(judged))
    run = trainer(build("llama"), held_out=text(8, seed=1))
    progress, means = {"best": None}, []
    for sparsity, best in ((0.2, None), (0.3995, 2.0), (0.399, 2.0), (0.4005, 1.0)):
        with torch.no_grad():
            run.handle.gates.hidden.mu.add_(0.1)
        means.append(run.handle.gates.hidden.mu.detach().clone())
        run._look(progress, sparsity=sparsity)
        assert progress["best"] == best
        if best == 2.0:
            run_kept = run._best["best_gates"].hidden.mu
            assert torch.equal(run_kept, means[1])
    with torch.no_grad():
        run.handle.gates.hidden.mu.zero_()
    run._restore()
    assert torch.equal(run.handle.gates.hidden.mu, means[3])


def test_masks_come_before_the_small_model():
    run = trainer(build("llama"))
    with pytest.raises(ValueError, match="there are no masks yet"):
        run.shrink()
    run.train()
    sizes = [run.handle.size.sparsity(run.set_masks(target).counts) for target in (0.3, 0.6)]
    assert 0.3 <= sizes[0] < 0.6 <= sizes[1]


@pytest.mark.slow
def test_gates_beat_magnitude_on_a_trained_model():
    """Trained for 300 steps; at half the size, gates alone lose less than magnitude (mean of 3 seeds)."""
    rises = {"gates": [], "magnitude": []}
    held = text(64, seed=7)
    for seed in range(3):
        model = build(
            "llama", seed=seed, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, initializer_range=0.1
        )
        model.config.num_hidden_layers = 2
        model.model.layers = model.model.layers[:2]
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        data = torch.stack(text(2400, seed=seed + 10))
        for step in range(300):
            rows = data[8 * step : 8 * step + 8]
            optimizer.zero_grad()
            model(rows, labels=rows).loss.backward()
            optimizer.step()
        dense = np.log(perplexity(model, held))
        config = PruningConfig(
            target_sparsity=0.5, mode="faster", steps=150, batch_size=8, gate_lr=0.1, check_every=150
        )
        run = VTransTrainer(model, list(data), config=config, gates=VTransConfig(log_variance=-2.0, seed=seed))
        structure = run.train()
        rises["gates"].append(np.log(perplexity(run.shrink(), held)) - dense)
        run.handle.remove()
        rises["magnitude"].append(
            np.log(perplexity(shrink(model, magnitude_structure(model, structure)), held)) - dense
        )
        assert dense < 3.0  # of log 58 = 4.06: it has learned
    assert np.mean(rises["gates"]) < np.mean(rises["magnitude"])


def test_finetuning_lowers_the_loss_and_resumes(tmp_path):
    model = build("llama, grouped and tied")
    structure = magnitude_structure(model, gated("llama, grouped and tied")[2])
    losses = {}

    def run(folder, stop=None):
        def on_step(done, figures):
            losses.setdefault(done, figures["loss"])
            assert losses[done] == figures["loss"]
            if done == stop:
                raise KeyboardInterrupt

        objective = objective_for(model).narrowed(structure.hidden)
        config = FinetuneConfig(steps=12, batch_size=4, learning_rate=3e-3, checkpoint_every=4)
        return finetune(
            shrink(model, structure),
            model,
            text(30),
            objective=objective,
            config=config,
            folder=folder,
            on_step=on_step,
        )

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=6)
    assert torch.equal(output(run(tmp_path)), output(whole))
    assert losses[12] < losses[1]


# ---- objectives, measures, pictures


def test_the_language_objective_is_its_formula():
    student, teacher = build("llama", seed=1), build("llama")
    batch = collate([ids()[0], ids()[1][:7]], 0)
    config = ObjectiveConfig(task=0.7, logits=0.3, temperature=2.0, layers=0.2)
    objective = LanguageObjective(24, config)
    with torch.no_grad():
        objective.projection += 0.1 * torch.randn(24, 24)
        found = objective(student, teacher, batch)
        own, their = (m(**batch, output_hidden_states=True) for m in (student, teacher))
    target = batch["input_ids"][:, 1:]
    counted = batch["attention_mask"][:, 1:].bool()
    logits, known = own.logits[:, :-1][counted], their.logits[:, :-1][counted]
    task = F.cross_entropy(logits, target[counted])
    p, q = (known / 2).softmax(-1), (logits / 2).log_softmax(-1)
    logit = 4 * (p * (p.log() - q)).sum(-1).mean()
    seen = batch["attention_mask"].bool()
    distance = [
        [F.mse_loss(s[seen] @ objective.projection.T, t[seen]) for s in own.hidden_states[1:]]
        for t in their.hidden_states[1:]
    ]
    chosen = match_layers(torch.stack([torch.stack(row) for row in distance]).detach())
    layers = sum(distance[j][m] for j, m in enumerate(chosen))
    assert found.item() == pytest.approx((0.7 * task + 0.3 * logit + 0.2 * layers).item(), rel=1e-5)
    plain = LanguageObjective(24, ObjectiveConfig(logits=0.0))(student, teacher, batch)
    assert plain.item() == pytest.approx(task.item(), rel=1e-5)


def test_the_embedding_objective_is_zero_for_the_teacher_itself():
    model, other = build("bert"), build("bert", seed=3)
    batch = collate([ids()[0], ids()[1][:7], ids(seed=4)[0]], 0)
    objective = objective_for(model)
    assert isinstance(objective, EmbeddingObjective)
    with torch.no_grad():
        assert objective(model, model, batch).item() == pytest.approx(0, abs=1e-5)
        assert objective(other, model, batch).item() > 0.1
    batch["input_ids"][1, 7:] = 5  # under the mask
    with torch.no_grad():
        assert objective(model, model, batch).item() == pytest.approx(0, abs=1e-5)


def test_taught_layers_and_their_match():
    assert taught_layers(12) == [2, 5, 8, 11]
    assert taught_layers(6) == [1, 2, 4, 5]
    assert taught_layers(2) == [0, 1]
    distances = torch.tensor([[9.0, 1, 5, 7], [0, 3, 2, 8], [4, 5, 3, 6]])
    assert match_layers(distances) == [0, 0, 2]  # the first student layer serves two
    assert match_layers(torch.tensor([[3.0, 1, 2], [2, 1, 5], [5, 4, 1]])) == [0, 1, 2]


def test_heads_with_unknown_tasks_ask_for_an_objective():
    with pytest.raises(ValueError, match="BertForSequenceClassification has a head whose task is not known here"):
        objective_for(build("bert, classes"))


def test_agreement_of_embeddings():
    torch.manual_seed(0)
    vectors = torch.randn(40, 8)
    rotated = vectors @ torch.linalg.qr(torch.randn(8, 8))[0]
    same = embedding_agreement(rotated, vectors)
    assert same["rank correlation"] == pytest.approx(1, abs=1e-4)
    assert same["neighbours"] == pytest.approx(1, abs=0.02)
    other = embedding_agreement(torch.randn(40, 5), vectors)
    assert abs(other["rank correlation"]) < 0.2
    assert other["neighbours"] == pytest.approx(10 / 39, abs=0.1)
    with pytest.raises(ValueError, match="takes 12 texts, got 5"):
        embedding_agreement(vectors[:5], vectors[:5])


def test_perplexity_is_that_of_the_loss():
    model = build("llama")
    rows = ids(batch=3)
    with torch.no_grad():
        loss = model(rows, labels=rows).loss
    assert perplexity(model, list(rows), batch_size=2) == pytest.approx(loss.exp().item(), rel=1e-5)


def test_probing_finds_what_a_head_looks_at(tmp_path):
    model = build("llama", num_hidden_layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()  # attention is even over what a row sees
    probe = probe_attention(model, [ids()[0], ids()[1][:7], ids()[0][:1]])
    assert set(probe) == {"entropy", "distance", "first", "previous", "self"}
    rows = [1 / (t + 1) for length in (11, 7) for t in range(1, length)]
    for name, value in (
        ("entropy", 1.0),
        ("first", np.mean(rows)),
        ("self", np.mean(rows)),
        ("previous", np.mean(rows)),
        ("distance", np.mean([t / 2 for length in (11, 7) for t in range(1, length)])),
    ):
        np.testing.assert_allclose(probe[name], value, rtol=1e-5)
    assert model.config._attn_implementation == "sdpa"
    ragged, handle, structure = gated("llama", layout="ragged", seed=5)
    small = shrink(ragged, structure, gates=handle.gates)
    handle.remove()
    probes = {"original": probe_attention(ragged, [ids()[0]]), "small": probe_attention(small, [ids()[0]])}
    heads = [len(kept) for kept in structure.heads]
    assert np.isfinite(probes["small"]["first"]).sum(1).tolist() == heads
    assert draw_attention(probes, tmp_path / "a.png", structure=structure, model=ragged).stat().st_size > 10_000
    with pytest.raises(ValueError, match="at least one text of two tokens"):
        probe_attention(model, [ids()[0][:1]])


def test_pictures(tmp_path):
    model, _, structure = gated("llama", layout="ragged")
    assert draw_structure(structure, Structure.whole(model), tmp_path / "s.png").stat().st_size > 5_000
    history = [{"step": step, "target": 0.1, "sparsity": 0.05, "loss": 1.0} for step in (1, 2)]
    assert draw_training(history, tmp_path / "t.png").stat().st_size > 5_000


CONFIGS = {
    "slope": (VTransConfig, {"slope": 0.0}, "slope must be positive, got 0.0"),
    "operations": (VTransConfig, {"flops_of": 0}, "flops_of is a number of tokens, at least 1, got 0"),
    "mode": (PruningConfig, {"mode": "fastest"}, "mode must be one of full, fast, faster, got 'fastest'"),
    "steps": (PruningConfig, {"steps": 0}, "steps must be positive, got 0"),
    "warm-up": (PruningConfig, {"warm_up": 2.0}, r"warm_up is a share of the steps and must lie in \[0, 1\], got 2.0"),
    "rate": (FinetuneConfig, {"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
    "weight": (ObjectiveConfig, {"layers": -1.0}, "layers must be at least 0, got -1.0"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_settings_are_checked(case):
    build_config, given, sentence = CONFIGS[case]
    with pytest.raises(ValueError, match=sentence):
        build_config(**given)
    assert PruningConfig(target_sparsity=0.4).rate == 0.05
    assert PruningConfig(target_sparsity=0.6).rate == 0.1
