"""TransNormerLLM: against its formulas, and as a model of transformers."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

import llm_attn
from llm_attn.transnormer import StateCache, TransNormerConfig, TransNormerForCausalLM, TransNormerModel
from llm_attn.transnormer.modeling import LRPE

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "eos_token_id": None,
}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def tiny_config(**changes):
    return TransNormerConfig(**{**SHAPE, "initializer_range": 0.2, **changes})


def tiny(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(**changes)).eval()


def tokens(batch, length, seed=1):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def same(found, right, tolerance=2e-5):
    torch.testing.assert_close(found, right, atol=tolerance * max(1.0, right.abs().max().item()), rtol=0)


# ---- the formulas


def srms(x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def by_formula(weights, ids, *, heads=4, layers=3, lrpe=(0,)):
    """Logits of one row, token after token, from a state dict; names as in the released checkpoints."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    width = w["model.embed_tokens.weight"].shape[1]
    x = math.sqrt(width) * w["model.embed_tokens.weight"][ids]
    for layer in range(layers):
        name = f"model.layers.{layer}."
        q, k, v, u = (srms(x) @ w[name + "token_mixer.qkvu_proj.weight"].T).chunk(4, -1)
        q, k, v = (t.view(len(ids), heads, -1) for t in (F.silu(q), F.silu(k), v))
        if layer in lrpe:
            turn = w[name + "token_mixer.lrpe.theta"][:, 0] * torch.arange(len(ids)).double()[:, None, None]
            q, k = (torch.cat([t * turn.cos(), t * turn.sin()], -1) for t in (q, k))
        base = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)])
        keep = torch.exp(-(base * (1 - layer / (layers - 1) + 1e-5)).double())
        state, out = torch.zeros(heads, q.shape[-1], v.shape[-1]).double(), []
        for t in range(len(ids)):
            state = keep[:, None, None] * state + k[t, :, :, None] * v[t, :, None, :]
            out.append(torch.einsum("hd,hde->he", q[t], state).flatten())
        x = x + (u * srms(torch.stack(out))) @ w[name + "token_mixer.out_proj.weight"].T
        y = srms(x)
        l1, l2, l3 = (w[name + f"channel_mixer.l{i}.weight"] for i in (1, 2, 3))
        x = x + ((y @ l1.T) * (y @ l2.T)) @ l3.T
    return srms(x) @ w["lm_head.weight"].T


@pytest.mark.parametrize("changes", [{}, {"lrpe_layers": [False, True, True]}, {"attention_dim": 48}])
def test_model_is_its_formulas(changes):
    model, ids = tiny(**changes), tokens(1, 70)
    lrpe = [i for i, has in enumerate(model.config.lrpe_layers) if has]
    right = by_formula(model.state_dict(), ids[0], lrpe=lrpe)
    with torch.no_grad():
        same(model.double()(ids).logits[0], right, 1e-6)  # slopes are float32
        same(model.float()(ids).logits[0].double(), right, 2e-5)


def test_lrpe_knows_only_distances():
    torch.manual_seed(0)
    lrpe = LRPE(3, 5, 10000.0).double()
    q, k = torch.randn(1, 3, 9, 5).double(), torch.randn(1, 3, 9, 5).double()
    scores = lrpe(q, 0) @ lrpe(k, 0).mT
    same(lrpe(q, 7) @ lrpe(k, 7).mT, scores, 1e-10)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    theta = 10000.0 ** (-2 * torch.arange(15.0) / 15).view(3, 5)
    turned = torch.cos(theta[:, None, None].double() * distance[..., None])
    same(scores, (q[:, :, :, None] * k[:, :, None] * turned).sum(-1), 1e-6)


def test_choices_change_the_model():
    ids = tokens(1, 12)
    changes = [{}, {"decay": "paper"}, {"value_act": "silu"}, {"hidden_act": "relu"}, {"scale_embedding": False}]
    changes += [{"lrpe_layers": [True] * 3}, {"norm_eps": 0.1}, {"lrpe_base": 10.0}]
    with torch.no_grad():
        seen = [tiny(**change)(ids).logits for change in changes]
    for i, one in enumerate(seen):
        assert not [changes[j] for j in range(i) if torch.allclose(one, seen[j], atol=1e-4)]


def test_one_layer_has_the_base_slopes():
    assert tiny(num_hidden_layers=1).model.layers[0].token_mixer.decay().tolist() == [
        0.25,
        0.0625,
        0.015625,
        0.00390625,
    ]


# ---- generate and its cache


def test_prompt_and_steps_are_the_whole():
    model, ids = tiny(), tokens(2, 90)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :70])
        parts, cache = [first.logits], first.past_key_values
        for part in ids[:, 70:].split([15, 1, 1, 1, 1, 1], 1):
            parts.append(model(part, past_key_values=cache).logits)
    same(torch.cat(parts, 1), whole)
    assert cache.get_seq_length() == 90


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prefill_chunk_size": 3}]
)
def test_generate_is_generate_without_cache(options):
    model, ids = tiny(), tokens(2, 11)
    torch.manual_seed(3)
    found = model.generate(ids, **{**GREEDY, **options})
    torch.manual_seed(3)
    options.pop("prefill_chunk_size", None)
    assert torch.equal(found, model.generate(ids, use_cache=False, **{**GREEDY, **options}))
    assert len(found[:, 11:].unique()) > 4  # not one token over and over


def test_generate_goes_on_from_a_returned_cache():
    model, ids = tiny(), tokens(2, 11)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, tokens(2, 4, seed=2)], 1)
    right = model.generate(longer, **GREEDY)
    assert torch.equal(model.generate(longer, past_key_values=first.past_key_values, **GREEDY), right)


def test_padded_batches_generate_as_alone():
    model, long, short = tiny(), tokens(1, 13), tokens(1, 6, seed=2)
    batch = torch.cat([long, F.pad(short, (7, 0))])
    mask = (torch.arange(13) >= torch.tensor([[0], [7]])).long()
    for options in ({}, {"num_beams": 3}):
        found = model.generate(batch, attention_mask=mask, **GREEDY, **options)
        for row, alone in ((0, long), (1, short)):
            right = model.generate(alone, **GREEDY, **options)
            assert torch.equal(found[row, -8:], right[0, -8:])


def test_embeddings_stand_for_their_tokens():
    model, ids = tiny(), tokens(2, 9)
    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    assert torch.equal(model.generate(inputs_embeds=embedded, **GREEDY), model.generate(ids, **GREEDY)[:, 9:])


def test_cache_is_constant():
    model = tiny()
    sizes = []
    with torch.no_grad():
        for length in (1, 20, 200):
            sizes.append(model(tokens(1, length)).past_key_values.nbytes())
    d = 8
    assert sizes == [4 * 4 * (2 * d * d + 2 * d * d)] * 3  # float32, 4 heads; the layer with LRPE has twice the state


def test_cache_moves_rows():
    model, ids = tiny(), tokens(2, 9)
    with torch.no_grad():
        cache = model(ids).past_key_values
        first = [layer.state.clone() for layer in cache.layers]
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 1]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        for layer, before in zip(cache.layers, first, strict=True):
            assert torch.equal(layer.state, before.flip(0))
        follow = tokens(2, 1, seed=7)
        whole = model(torch.cat([ids.flip(0), follow], 1), use_cache=False).logits[:, -1]
        same(model(follow, past_key_values=cache).logits[:, -1], whole)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes() == 0


# ---- padding, packing, odd lengths


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, ids = tiny(), tokens(2, 21)
    pad = (6, 0) if side == "left" else (0, 6)
    mask = F.pad(torch.ones(2, 21, dtype=torch.long), pad)
    padded = F.pad(ids, pad, value=5)
    with torch.no_grad():
        right = model(ids).logits
        found = model(padded, attention_mask=mask).logits
        same(found[:, 6:] if side == "left" else found[:, :21], right)
        unmasked = model(padded).logits
    if side == "left":
        assert not torch.allclose(unmasked[:, 6:], right, atol=1e-2)


def test_rows_of_padding_and_empty_prompts_are_finite():
    model, ids = tiny(), tokens(2, 7)
    mask = torch.tensor([[1] * 7, [0] * 7])
    with torch.no_grad():
        out = model(ids, attention_mask=mask).logits
        assert out.isfinite().all()
        same(out[0], model(ids[:1]).logits[0])
        assert model(ids[:, :1]).logits.isfinite().all()
        assert model(ids[:, :0]).logits.shape == (2, 0, 97)
        cache = model(ids[:, :0]).past_key_values
        same(model(ids, past_key_values=cache).logits, model(ids).logits)
        same(model(ids, past_key_values=model(ids[:, :0]).past_key_values).logits, model(ids).logits)


def test_packed_sequences_are_separate():
    model, parts = tiny(), [tokens(1, n, seed=n) for n in (9, 1, 14)]
    ids = torch.cat(parts, 1)
    positions = torch.cat([torch.arange(n) for n in (9, 1, 14)])[None]
    ends = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
    with torch.no_grad():
        right = torch.cat([model(part).logits for part in parts], 1)
        same(model(ids, position_ids=positions).logits, right)
        same(model(ids, cu_seq_lens_q=ends).logits, right)
        assert model(ids, position_ids=positions).past_key_values is None
        rows = torch.cat([ids, ids.flip(1)])  # two rows with boundaries of their own
        both = model(rows, position_ids=torch.cat([positions, torch.arange(24)[None]])).logits
        same(both[:1], right)
        same(both[1:], model(ids.flip(1)).logits)
        plain = model(ids, position_ids=torch.arange(24)[None] + 5).logits
        same(plain, model(ids).logits)
        assert not torch.allclose(plain, right, atol=1e-2)


# ---- saving and loading


@pytest.mark.parametrize("tied", [False, True])
def test_saved_models_come_back(tmp_path, tied):
    model, ids = tiny(tie_word_embeddings=tied, decay="paper"), tokens(2, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)  # is built on the meta device
    assert type(again) is TransNormerForCausalLM
    assert json.loads(again.config.to_json_string()) == json.loads((tmp_path / "config.json").read_text())
    assert again.config.decay == "paper"
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        body = AutoModel.from_pretrained(tmp_path)
        assert type(body) is TransNormerModel
        assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer, other in zip(half.model.layers, model.model.layers, strict=True):
        assert torch.equal(layer.token_mixer.decay(), other.token_mixer.decay())
    assert half(ids).logits.dtype == torch.bfloat16
    assert half(ids).logits.isfinite().all()


RELEASED = {
    "model_type": "transnormer",
    "architectures": ["TransnormerForCausalLM"],
    "decoder_embed_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "glu_dim": 40,
    "hidden_dim": 48,
    "linear_act_fun": "silu",
    "linear_use_lrpe_list": [1, 0],
    "no_scale_embedding": False,
    "add_bos_token": False,
    "norm_type": "simplermsnorm",
    "init_std": 0.02,
    "bias": False,
    "vocab_size": 97,
}


def test_released_checkpoints_load_as_they_are(tmp_path):
    """Names and layouts of config.json and weights as the authors' code has them."""
    shapes = {"model.embed_tokens.weight": (97, 32), "lm_head.weight": (97, 32)}
    for layer in range(2):
        name = f"model.layers.{layer}."
        shapes |= {name + "token_mixer.qkvu_proj.weight": (192, 32), name + "token_mixer.out_proj.weight": (32, 48)}
        shapes |= {name + f"channel_mixer.l{i}.weight": (40, 32) for i in (1, 2)}
        shapes[name + "channel_mixer.l3.weight"] = (32, 40)
    shapes["model.layers.0.token_mixer.lrpe.theta"] = (4, 1, 12)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) / 5 for name, shape in shapes.items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokens(1, 20)
    with torch.no_grad():
        same(model(ids).logits[0].double(), by_formula(weights, ids[0], layers=2))


@pytest.mark.parametrize(
    ("size", "layer", "embedding"),
    [
        # width, layers, heads, inside the GLU; parameters of a layer; of one embedding matrix
        ((1024, 24, 8, 2816), 5 * 1024**2 + 3 * 1024 * 2816, 64000 * 1024),  # 385M
        ((2048, 16, 16, 5632), 55_574_528, 131_072_000),  # 1B
        ((4096, 30, 32, 11264), 222_298_112, 262_144_000),  # 7B
    ],
)
def test_parameters_of_the_published_sizes(size, layer, embedding):
    width, layers, heads, inside = size
    config = TransNormerConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inside
    )
    with torch.device("meta"):
        model = TransNormerForCausalLM(config)
    assert model.num_parameters() == layers * layer + width + 2 * embedding  # width: the angles of the first layer
    if width == 1024:
        assert model.num_parameters() == 464_520_192
        assert config.to_dict() == TransNormerConfig().to_dict()


# ---- training


def gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_is_of_the_next_token():
    model, ids = tiny(), tokens(2, 17)
    labels = ids.clone()
    labels[0, :5] = -100
    logits = model(ids).logits
    wanted = labels[:, 1:].flatten()
    right = F.cross_entropy(logits[:, :-1].flatten(0, 1)[wanted >= 0], wanted[wanted >= 0])
    torch.testing.assert_close(model(ids, labels=labels).loss, right)
    kept = model(ids, logits_to_keep=2).logits
    same(kept, logits[:, -2:])


def test_gradient_checkpointing_changes_nothing():
    model, ids = tiny().train(), tokens(2, 17)
    loss, right = gradients(model, ids)
    model.gradient_checkpointing_enable()
    again, found = gradients(model, ids)
    assert torch.equal(loss, again)
    for name, gradient in right.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="computes each layer twice"):
        model(ids, past_key_values=StateCache(model.config))
    assert model(ids, use_cache=True).past_key_values is None


def test_compiled_in_one_graph():
    model, ids = tiny(), tokens(2, 19)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        same(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def arguments(folder, **changes):
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True}
    options |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), **{**options, **changes})


@pytest.mark.parametrize("flat", [False, True])
def test_trainer(tmp_path, flat):
    model = tiny().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": t.tolist(), "labels": t.tolist()} for t in tokens(4, 12)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True) if flat else None
    Trainer(model, arguments(tmp_path), train_dataset=rows, data_collator=collator).train()
    for name, parameter in model.named_parameters():
        assert (parameter != before[name]).any(), name
        assert parameter.isfinite().all()


def test_angles_do_not_decay():
    model = tiny()
    decayed, exempt = (group["params"] for group in llm_attn.param_groups(model, weight_decay=0.1))
    assert [p is model.model.layers[0].token_mixer.lrpe.theta for p in exempt] == [True]
    assert len(decayed) == len(list(model.parameters())) - 1


def test_lora(tmp_path):
    model, ids = tiny(), tokens(2, 9)
    right = model(ids).logits
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["qkvu_proj", "l3"], task_type="CAUSAL_LM"))
    assert torch.equal(tuned(input_ids=ids).logits, right)
    rows = [{"input_ids": t.tolist(), "labels": t.tolist()} for t in tokens(4, 12)]
    Trainer(tuned.train(), arguments(tmp_path), train_dataset=rows).train()
    assert not torch.allclose(tuned.eval()(input_ids=ids).logits, right, atol=1e-3)
    with tuned.disable_adapter():
        same(tuned(input_ids=ids).logits, right)


@pytest.mark.slow
def test_learns_to_repeat():
    """Permutations of 6 to 14 symbols over and over, length 32: the tokens that repeat are predicted."""
    torch.manual_seed(0)
    config = tiny_config(hidden_size=64, intermediate_size=192, num_hidden_layers=2, initializer_range=0.02)
    model, generator = TransNormerForCausalLM(config).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def draw(rows):
        order = torch.rand(rows, 40, generator=generator).argsort(1)
        period = torch.randint(6, 15, (rows, 1), generator=generator)
        place = torch.arange(32).expand(rows, -1)
        return order.gather(1, place % period), (place > period)[:, 1:]

    for _ in range(400):
        ids, counted = draw(64)
        loss = F.cross_entropy(model(ids).logits[:, :-1][counted], ids[:, 1:][counted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, counted = draw(256)
    with torch.no_grad():
        right = model.eval()(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert right[counted].float().mean() >= 0.8


# ---- as transformers expects


def test_hidden_states_are_those_between_the_layers():
    model, ids = tiny(), tokens(2, 9)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        assert len(out.hidden_states) == 4
        same(out.hidden_states[0], math.sqrt(32) * model.model.embed_tokens(ids))
        same(out.hidden_states[2], model.model.layers[1](out.hidden_states[1]))
        same(model.lm_head(out.hidden_states[-1]), out.logits)
        assert model(ids).hidden_states is None
        assert isinstance(model(ids, return_dict=False), tuple)


def test_registered_twice_and_found():
    import importlib

    import llm_attn.transnormer

    importlib.reload(llm_attn.transnormer)
    assert type(AutoConfig.for_model("transnormer")) is TransNormerConfig
    assert AutoConfig.for_model("transnormer").lrpe_layers == [True] + [False] * 23


def test_mixed_precision_keeps_the_state_wide():
    model, ids = tiny(), tokens(2, 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(ids)
        again = model(ids[:, :1], past_key_values=out.past_key_values)
    assert out.logits.isfinite().all()
    assert again.logits.isfinite().all()
    assert {layer.state.dtype for layer in out.past_key_values.layers} == {torch.float32}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, i: m(i, past_key_values=DynamicCache()), TypeError, "needs a StateCache.*got a DynamicCache"),
        (lambda m, i: m(i, cache=StateCache(m.config), past_key_values=StateCache(m.config)), ValueError, "give one"),
        (lambda m, i: m(i, output_attentions=True), ValueError, "no attention maps"),
        (lambda m, i: m(i, inputs_embeds=i), ValueError, "either input_ids or inputs_embeds"),
        (lambda m, i: m(i, attention_mask=torch.ones(2, 1, 6, 6)), ValueError, "only padding can be masked"),
        (lambda m, i: m(i, attention_mask=torch.ones(2, 5)), ValueError, r"over at least the 6 tokens.*\(2, 5\)"),
        (lambda m, i: m.generate(i, cache_implementation="static", **GREEDY), ValueError, "constant size.*'static'"),
        (lambda m, i: m(i).past_key_values.crop(-1), ValueError, "cannot forget its last tokens"),
        (lambda m, i: StateCache(m.config).update(i, i, 0), TypeError, "belongs to TransNormerLLM"),
    ],
)
def test_model_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(tiny(), tokens(2, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "attention_dim must be a multiple of num_attention_heads, got 32 and 5"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"lrpe_layers": [True]}, "for each of the 3 layers whether it has LRPE, got 1 values"),
        ({"hidden_act": "swish7"}, "hidden_act must be one of .*, got 'swish7'"),
        ({"decay": "learned"}, "decay must be one of alibi, paper, got 'learned'"),
        ({"norm_type": "layernorm"}, "norm_type='layernorm' is not supported"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


SPLIT = """
import sys, torch
from transformers.distributed import DistributedConfig
from llm_attn import TransNormerForCausalLM
plain = TransNormerForCausalLM.from_pretrained(sys.argv[1])
split = TransNormerForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto"))
ids = torch.arange(3, 21).view(2, 9)
part, whole = (model.model.layers[0].channel_mixer.l3.weight for model in (split, plain))
with torch.no_grad():
    difference = (split(ids).logits - plain(ids).logits).abs().max() / plain(ids).logits.abs().max()
print("part", *getattr(part, "to_local", lambda: part)().shape, "of", *whole.shape)
print("difference", difference.item())
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_gated_linear_units(tmp_path):
    """One all-reduce each; gloo, on this machine."""
    tiny().save_pretrained(tmp_path)
    (tmp_path / "split.py").write_text(SPLIT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "split.py"), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.count("part 32 20 of 32 40") == 2
    differences = [float(found) for found in re.findall(r"difference (\S+)", said)]
    assert len(differences) == 2
    assert max(differences) < 1e-5
