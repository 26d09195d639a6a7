"""DHSA against its definition, written out here with loops and masks; predictor, labels and training; the door."""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llm_attn.dhsa import (
    BoundaryPredictor,
    BoundaryTraining,
    DHSAConfig,
    KeyLists,
    PredictorConfig,
    apply_dhsa,
    boundaries_from_logits,
    boundary_targets,
    chunk_keys,
    dhsa_attention,
    dhsa_decode,
    evaluate_boundary_predictor,
    focal_loss,
    keyshift_logits,
    listed_attention,
    mass_ratio,
    punctuation_ids,
    select_keys,
    spaced_peaks,
    train_boundary_predictor,
    uniform_boundaries,
)
from llm_attn.dhsa.attention import gathered_attention
from llm_attn.dhsa.sequences import packed_documents
from llm_attn.dhsa.training import valid_places
from llm_attn.testing import DoorTests, tiny_model, tokens

SMALL = DHSAConfig(
    budget=24,
    block_size=8,
    local_tokens=8,
    global_tokens=4,
    instruction_tokens=5,
    min_distance=2,
    boundary="keyshift",
    generated_chunk=6,
)
"""Few keys, so that texts of some tens of tokens are sparse."""


def random_qkv(length=61, *, queries=None, batch=2, heads=6, kv_heads=3, width=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries or length, width), (batch, kv_heads, length, width), (batch, kv_heads, length, 5))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def random_boundaries(length, *, batch=2, longest=9, seed=0):
    """Rows of unlike numbers of chunks, padded with chunks of no tokens."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(batch):
        cuts = [0]
        while cuts[-1] < length:
            cuts.append(min(length, cuts[-1] + int(torch.randint(1, longest + 1, (), generator=generator))))
        rows.append(cuts)
    most = max(map(len, rows))
    return torch.tensor([row + [length] * (most - len(row)) for row in rows])


def defined_lists(query, key, boundaries, *, budget, block, window=None, local=8, first=4, norm=True, per_head=False):
    """The selection with loops: {(batch, list head, block): set of keys}."""
    B, Nq, Nk = query.shape[0], query.shape[2], key.shape[2]
    heads, chosen = key.shape[1] if per_head else 1, {}
    for b in range(B):
        for h in range(heads):
            group = query.shape[1] // key.shape[1]
            q = query[b, h * group : (h + 1) * group].mean(0) if per_head else query[b].mean(0)
            k = key[b, h] if per_head else key[b].mean(0)
            for block_number, low in enumerate(range(0, Nq, block)):
                rows = q[low : low + block]
                stop = min(low + block, Nq) + Nk - Nq
                allowed = list(range(0 if window is None else max(0, stop - window), stop))
                n = min(budget, len(allowed))
                chosen_here = set(allowed[len(allowed) - min(local, n) :])
                chosen_here |= set(allowed[: min(first, n - len(chosen_here))])
                score = {}
                for begin, end in zip(boundaries[b].tolist(), boundaries[b].tolist()[1:], strict=False):
                    part = k[begin : min(end, stop)]
                    if len(part):
                        weight = math.sqrt(len(part) * len(rows)) if norm else 1.0
                        value = weight * (rows.mean(0) @ part.mean(0)).item()
                        score |= dict.fromkeys(range(begin, min(end, stop)), round(value, 9))
                rest = sorted(set(allowed) - chosen_here, key=lambda j: (-score[j], j))
                chosen[b, h, block_number] = chosen_here | set(rest[: n - len(chosen_here)])
    return chosen


def as_sets(lists: KeyLists):
    found = {}
    for place in torch.cartesian_prod(*map(torch.arange, lists.counts.shape)).tolist():
        b, h, i = place
        row, count = lists.indices[b, h, i].tolist(), int(lists.counts[b, h, i])
        assert row[:count] == sorted(set(row[:count])), "a list must ascend and name no key twice"
        assert row[count:] == [-1] * (len(row) - count)
        found[b, h, i] = set(row[:count])
    return found


def mask_of(sets, query, key, block):
    B, H, Nq, Nk = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
    mask = torch.zeros(B, H, Nq, Nk, dtype=torch.bool)
    heads = 1 + max(h for _, h, _ in sets)
    for (b, h, i), keys in sets.items():
        mask[b, h * H // heads : (h + 1) * H // heads, i * block : (i + 1) * block, sorted(keys)] = True
    return mask & (torch.arange(Nk) <= torch.arange(Nq)[:, None] + Nk - Nq)


def masked_attention(query, key, value, mask, *, scale=None, softcap=None):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return torch.nan_to_num(scores.masked_fill(~mask, -torch.inf).softmax(-1)) @ value


def causal(queries, keys, window=None):
    row, column = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    return (column <= row) & (column > row - (window or keys))


# ---- which keys are chosen


@pytest.mark.parametrize("window", [None, 29])
@pytest.mark.parametrize("queries", [61, 37])
@pytest.mark.parametrize("per_head", [False, True])
def test_lists_are_those_of_the_definition(window, queries, per_head):
    query, key, _ = random_qkv(queries=queries)
    boundaries = random_boundaries(61)
    given = select_keys(
        query,
        key,
        boundaries,
        budget=24,
        block_size=8,
        window=window,
        local_tokens=8,
        global_tokens=4,
        per_kv_head=per_head,
    )
    wanted = defined_lists(query, key, boundaries, budget=24, block=8, window=window, per_head=per_head)
    assert as_sets(given) == wanted
    for (_, _, i), keys in wanted.items():
        stop = min((i + 1) * 8, queries) + 61 - queries
        start = 0 if window is None else max(0, stop - window)
        assert len(keys) == min(24, stop - start)
        assert keys >= set(range(max(start, stop - 8), stop)) | set(range(start, min(start + 4, stop)))
        assert min(keys) >= start
        assert max(keys) < stop


def test_chunks_of_single_tokens_score_as_tokens():
    query, key, _ = random_qkv(40, dtype=torch.float32)
    boundaries = torch.arange(41).expand(2, -1)
    vectors = chunk_keys(key, boundaries, pooling="avgpool")
    torch.testing.assert_close(vectors[:, 0], key.mean(1), atol=1e-7, rtol=0)
    given = select_keys(
        query, key, boundaries, budget=20, block_size=8, local_tokens=8, global_tokens=4, pooling="avgpool"
    )
    assert as_sets(given) == defined_lists(query, key, boundaries, budget=20, block=8, norm=False)


def test_one_chunk_ties_and_gives_the_lowest_keys():
    query, key, _ = random_qkv(64)
    lists = select_keys(
        query, key, torch.tensor([[0, 64], [0, 64]]), budget=20, block_size=8, local_tokens=8, global_tokens=4
    )
    assert as_sets(lists)[1, 0, 7] == set(range(12)) | set(range(56, 64))


@pytest.mark.parametrize("pooling", ["avgpool_norm", "avgpool", "maxpool"])
def test_uniform_chunks_are_block_sparse_attention(pooling):
    """Chunks of 8 with budgets of whole chunks: the best blocks by the product of pooled queries and keys."""
    query, key, _ = random_qkv(80)
    lists = select_keys(
        query,
        key,
        uniform_boundaries(2, 80, 8, key.device),
        budget=32,
        block_size=8,
        local_tokens=8,
        global_tokens=8,
        pooling=pooling,
    )
    q, k = query.mean(1).unflatten(1, (10, 8)), key.mean(1).unflatten(1, (10, 8))
    q, k = (x.amax(2) if pooling == "maxpool" else x.mean(2) for x in (q, k))
    scores = q @ k.mT
    sets = as_sets(lists)
    for b in range(2):
        for i in range(10):
            best = sorted(range(1, i), key=lambda j: -scores[b, i, j])[:2]
            blocks = {0, i, *best}
            assert sets[b, 0, i] == {8 * j + t for j in blocks for t in range(8)}


def test_norm_makes_scores_of_long_and_short_chunks_alike():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, 1, 4, generator=generator)
    variance = {}
    for pooling in ("avgpool_norm", "avgpool"):
        for length in (8, 64):
            key = torch.randn(1, 1, 20_000 * length, 4, generator=generator)
            vectors = chunk_keys(key, uniform_boundaries(1, key.shape[2], length, key.device), pooling=pooling)
            variance[pooling, length] = (vectors @ query.mT).var().item()
    assert variance["avgpool_norm", 8] / variance["avgpool_norm", 64] == pytest.approx(1, rel=0.1)
    assert variance["avgpool", 8] / variance["avgpool", 64] == pytest.approx(8, rel=0.1)


def test_planted_needle_is_always_found():
    for seed in range(50):
        query, key, _ = random_qkv(256, batch=1, width=16, seed=seed)
        at = 16 * (2 + seed % 11)
        direction = F.normalize(
            torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=0
        )
        query[:, :, 240:] += 2 * direction
        key[:, :, at : at + 16] += 2 * direction
        lists = select_keys(
            query,
            key,
            uniform_boundaries(1, 256, 16, key.device),
            budget=32 + 16,
            block_size=16,
            local_tokens=16,
            global_tokens=16,
        )
        assert as_sets(lists)[0, 0, 15] >= set(range(at, at + 16))


def test_keys_that_are_not_numbers_rank_last():
    query, key, value = random_qkv(64, batch=1)
    key[:, :, 17] = torch.nan
    boundaries = uniform_boundaries(1, 64, 4, key.device)
    config = replace(SMALL, instruction_tokens=0)
    out = dhsa_attention(query, key, value, boundaries, config)
    assert out[:, :, 40:].isfinite().all()  # blocks that need not read the chunk


# ---- attention over them


@pytest.mark.parametrize("window", [None, 29])
@pytest.mark.parametrize("queries", [61, 37])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_output_is_masked_attention_over_the_lists(window, queries, softcap, per_kv_head):
    query, key, value = random_qkv(queries=queries)
    boundaries = random_boundaries(61)
    config = replace(SMALL, per_kv_head=per_kv_head)
    given = dhsa_attention(query, key, value, boundaries, config, scale=0.3, softcap=softcap, window=window)
    sparse = queries - 5
    q, k = query[:, :, :sparse], key[:, :, :56]
    sets = defined_lists(q, k, boundaries.clamp(max=56), budget=24, block=8, window=window, per_head=per_kv_head)
    mask = causal(queries, 61, window).expand(2, 6, -1, -1).clone()
    mask[:, :, :sparse, :56] = mask_of(sets, q, k, 8)
    mask[:, :, :sparse, 56:] = False
    wanted = masked_attention(query, key, value, mask, scale=0.3, softcap=softcap)
    torch.testing.assert_close(given, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_to_compute_gives_the_definition(dtype):
    query, key, value = random_qkv(dtype=dtype)
    lists = select_keys(query, key, random_boundaries(61), budget=24, block_size=8, local_tokens=8, global_tokens=4)
    truth = listed_attention(*(t.double() for t in (query, key, value)), lists, block_size=8)
    plain = listed_attention(query, key, value, lists, block_size=8)
    fast = gathered_attention(query, key, value, lists, block_size=8, scale=None)
    with_gradients = [t.clone().requires_grad_() for t in (query, key, value)]
    config = replace(SMALL, instruction_tokens=0)
    through_op = dhsa_attention(*with_gradients, random_boundaries(61), config)
    allowed = 2 * (plain.double() - truth).norm() + torch.finfo(dtype).eps / 2 * truth.norm()
    assert (fast.double() - truth).norm() <= allowed
    assert (through_op.double() - truth).norm() <= allowed
    assert fast.dtype == through_op.dtype == dtype


def test_gradients_are_those_of_masked_attention():
    query, key, value = (t.requires_grad_() for t in random_qkv(40, batch=1))
    boundaries = random_boundaries(40, batch=1)
    d_out = torch.randn(1, 6, 40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = torch.autograd.grad(dhsa_attention(query, key, value, boundaries, SMALL), (query, key, value), d_out)
    sets = defined_lists(query[:, :, :35], key[:, :, :35], boundaries.clamp(max=35), budget=24, block=8)
    mask = causal(40, 40).expand(1, 6, -1, -1).clone()
    mask[:, :, :35, :35] = mask_of(sets, query[:, :, :35], key[:, :, :35], 8)
    wanted = torch.autograd.grad(masked_attention(query, key, value, mask), (query, key, value), d_out)
    for mine, theirs in zip(given, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("window", [None, 20])
def test_budget_for_everything_is_dense_attention(window):
    query, key, value = random_qkv(dtype=torch.float32)
    config = replace(SMALL, budget=61)
    given = dhsa_attention(query, key, value, random_boundaries(61), config, window=window)
    torch.testing.assert_close(given, masked_attention(query, key, value, causal(61, 61, window)), atol=1e-5, rtol=0)
    # and so it is where the lists themselves hold everything
    lists = select_keys(query, key, random_boundaries(61), budget=61, block_size=8, local_tokens=8, global_tokens=4)
    out = listed_attention(query, key, value, lists, block_size=8)
    torch.testing.assert_close(out, masked_attention(query, key, value, causal(61, 61)), atol=1e-5, rtol=0)


def test_no_token_moves_an_earlier_block():
    config = replace(SMALL, instruction_tokens=0)
    query, key, value = random_qkv()
    boundaries = random_boundaries(61, longest=25)  # chunks that reach over the ends of blocks
    before = dhsa_attention(query, key, value, boundaries, config)
    for changed in (8, 27, 48, 60):
        moved = [t.clone() for t in (query, key, value)]
        for t in moved:
            t[:, :, changed] = 9 * t[:, :, changed] + 1
        after = dhsa_attention(*moved, boundaries, config)
        whole = changed // 8 * 8
        assert torch.equal(after[:, :, :whole], before[:, :, :whole])
        assert not torch.equal(after[:, :, changed:], before[:, :, changed:])


def test_queries_in_chunks_of_their_own():
    """The paper's form: the queries of a chunk share a list."""
    query, key, value = random_qkv(batch=1)
    boundaries = torch.tensor([[0, 11, 20, 34, 47, 61]])
    config = replace(SMALL, query_chunks="boundary", instruction_tokens=0)
    out = dhsa_attention(query, key, value, boundaries, config)
    for low, high in ((20, 34), (34, 47)):
        alone = query[:, :, low:high], key[:, :, :high]
        sets = defined_lists(*alone, boundaries.clamp(max=high), budget=24, block=high - low)
        wanted = masked_attention(*alone, value[:, :, :high], mask_of(sets, *alone, high - low))
        torch.testing.assert_close(out[:, :, low:high], wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("window", [None, 40])
def test_decoded_row_is_the_row_of_a_prefill(window):
    """A prompt of whole blocks and one token: in the prefill that token is a block of its own."""
    query, key, value = random_qkv(57)
    config = replace(SMALL, instruction_tokens=0)
    prompt = random_boundaries(56)
    whole = torch.cat([prompt, torch.full((2, 1), 57)], 1)
    wanted = dhsa_attention(query, key, value, whole, config, window=window)[:, :, 56:]
    vectors = chunk_keys(key, prompt)
    given, lists = dhsa_decode(query[:, :, 56:], key, value, prompt, vectors, config, covered=56, window=window)
    torch.testing.assert_close(given, wanted, atol=1e-10, rtol=0)
    assert lists.counts.tolist() == [[[24]], [[24]]]


def test_generated_tokens_are_always_read():
    query, key, value = random_qkv(60, queries=1)
    prompt = random_boundaries(40)
    _, lists = dhsa_decode(query, key, value, prompt, chunk_keys(key, prompt), SMALL, covered=40)
    for keys in as_sets(lists).values():
        assert keys == set(range(40, 60)) | set(range(4))  # 24 keys, nothing left for scores


# ---- boundaries


def naive_peaks(logits, candidates, distance, most, forced):
    taken = [] if forced is None else [forced]
    for i in sorted(candidates, key=lambda i: (-logits[i], i)):
        if len(taken) < most and (forced is None or i <= forced) and all(abs(i - s) > distance for s in taken):
            taken.append(i)
    return sorted(taken)


@pytest.mark.parametrize("forced", [None, 180])
@pytest.mark.parametrize("most", [5, 200])
def test_boundaries_are_spaced_peaks(forced, most):
    logits = torch.randn(200, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    passing = logits > 0.2
    given = spaced_peaks(logits, passing, distance=8, max_count=most, forced=forced)
    assert given == naive_peaks(logits.tolist(), passing.nonzero()[:, 0].tolist(), 8, most, forced)
    row = boundaries_from_logits(
        logits[None], threshold=0.2, distance=8, max_count=most, instruction_tokens=20 if forced else 0
    )
    inside = [i for i in passing.nonzero()[:, 0].tolist() if 3 <= i < 196]
    assert row[0].tolist() == [0, *(i + 1 for i in naive_peaks(logits.tolist(), inside, 8, most, forced)), 200]


def test_rows_without_boundaries_are_one_chunk():
    logits = torch.full((2, 50), -1.0)
    logits[1, 20] = 2.0
    assert boundaries_from_logits(logits).tolist() == [[0, 50, 50], [0, 21, 50]]


def test_keyshift_sees_where_keys_turn():
    key = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 40, -1).clone()
    key[:, :, 17:] = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(1))
    logits = keyshift_logits(key)
    assert logits.argmax() == 16  # the last token before
    left, right = key[0, :, 15].flatten(), key[0, :, 17].flatten()
    assert logits[0, 16].item() == pytest.approx(1 - F.cosine_similarity(left, right, dim=0).item(), abs=1e-6)
    assert logits[0, [2, 36]].tolist() == [-1, -1]


# ---- the predictor


def plain_predictor(predictor, key):
    """Windows one by one, through torch's own MultiheadAttention."""
    config, w = predictor.config, predictor.config.window
    x = F.pad(key.transpose(1, 2).flatten(2), (0, 0, w - 1, w))
    logits = []
    for i in range(key.shape[2]):
        window = x[:, i : i + 2 * w]
        if config.encoder == "conv":
            left, right = (predictor.enc(side.mT)[..., 0] for side in (window[:, :w], window[:, w:]))
        else:
            if config.encoder == "attention":
                encoded = predictor.enc.norm(predictor.enc.mha(window, window, window)[0])
            else:
                encoded = window
                for block in predictor.enc_ls:
                    normed = predictor.norm(encoded)
                    encoded = encoded + block.norm(block.mha(normed, normed, normed)[0])
            sides = encoded[:, :w], encoded[:, w:]
            if config.pooling == "gated":
                sides = [((predictor.pool.gate(s).softmax(1)) * s).sum(1, keepdim=True) for s in sides]
            left, right = (s.mean(1) for s in sides)
        cosine = F.cosine_similarity(left, right, dim=-1, eps=1e-6)[:, None]
        logits.append(predictor.mlp(torch.cat([left, right, (left - right).abs(), left * right, cosine], -1)))
    return torch.cat(logits, 1)


@pytest.mark.parametrize("encoder", ["attention", "conv", "stack"])
@pytest.mark.parametrize("pooling", ["mean", "gated"])
def test_predictor_judges_every_window_by_itself(encoder, pooling):
    torch.manual_seed(0)
    build = PredictorConfig(channels=24, window=3, hidden=16, num_heads=4, encoder=encoder, pooling=pooling)
    predictor = BoundaryPredictor(build).double().eval()
    key = random_qkv(29, kv_heads=3)[1]
    wanted = plain_predictor(predictor, key)
    torch.testing.assert_close(predictor(key), wanted, atol=1e-10, rtol=0)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_attn.dhsa.predictor.PLACES", 11)
        torch.testing.assert_close(predictor(key), wanted, atol=1e-10, rtol=0)


PUBLISHED = {
    "attention": [0.601182, 0.600536, 0.585248, 0.58023, 0.619136, 0.626098, 0.624219, 0.62493, 0.620649],
    "conv": [0.00673, 0.062509, 0.108951, 0.068493, 0.040889, 0.168915, 0.06275, 0.260268, 0.304418],
    "stack": [-0.192364, -0.210299, -0.174293, -0.194545, -0.13941, -0.085379, -0.102357, -0.077371, -0.058138],
}
"""Logits that the authors' predictors give, with the weights and keys below."""


@pytest.mark.parametrize("encoder", PUBLISHED)
def test_predictor_is_the_published_one(encoder):
    predictor = BoundaryPredictor(PredictorConfig(channels=12, hidden=8, encoder=encoder)).double().eval()
    for n, parameter in enumerate(predictor.parameters()):
        i = torch.arange(parameter.numel(), dtype=torch.float64)
        parameter.data = torch.sin(0.37 * i * (n + 1) + n).view(parameter.shape) / 2
    i = torch.arange(2 * 9 * 6, dtype=torch.float64)
    key = torch.cos(1.3 * i + 0.01 * i**2).view(1, 2, 9, 6)
    torch.testing.assert_close(predictor(key)[0], torch.tensor(PUBLISHED[encoder]).double(), atol=1e-6, rtol=0)


def test_boundaries_are_the_published_ones():
    """What the authors' code makes of the same logits."""
    i = torch.arange(160, dtype=torch.float64)
    logits = 3 * torch.sin(0.7 * i * i)[None]
    few = [0, 20, 31, 41, 53, 63, 88, 98, 119, 152, 160]
    with_tail = [0, 11, 20, 31, 41, 53, 63, 75, 88, 98, 119, 129, 141, 160]
    assert boundaries_from_logits(logits, max_count=9)[0].tolist() == few
    assert boundaries_from_logits(logits, max_count=30, instruction_tokens=20)[0].tolist() == with_tail


def test_predictor_has_the_size_of_the_papers():
    assert sum(p.numel() for p in BoundaryPredictor(PredictorConfig(channels=1024)).parameters()) == 5_249_793


def test_predictor_is_saved_and_loaded(tmp_path):
    build = PredictorConfig(channels=24, num_heads=2, pooling="gated", host="some model")
    predictor = BoundaryPredictor(build).eval()
    predictor.save_pretrained(tmp_path)
    loaded = BoundaryPredictor.from_pretrained(tmp_path)
    key = random_qkv(30, dtype=torch.float32)[1]
    assert loaded.config == build
    assert torch.equal(loaded(key), predictor(key))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["boundary_predictor.json", "boundary_predictor.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"boundary_predictor\.json is missing"):
        BoundaryPredictor.from_pretrained(tmp_path / "elsewhere")


# ---- labels, loss and training


@pytest.mark.parametrize(("sliding", "rows"), [(None, None), (13, 9)])
def test_ratio_is_the_naive_sum(sliding, rows, monkeypatch):
    monkeypatch.setattr("llm_attn.dhsa.training.ROWS", 7)
    query, key, _ = random_qkv(31, batch=1)
    w, L = 3, 31
    given = mass_ratio(query, key, window=w, scale=0.4, sliding=sliding, max_rows=rows)
    keys = key.repeat_interleave(2, 1)
    scores = (query @ keys.mT * 0.4).masked_fill(~causal(L, L, sliding), -torch.inf)
    attention = scores.softmax(-1)[0].mean(0)
    for i in range(L):
        if not 2 * w - 1 <= i < L - 2 * w:
            assert given[0, i] == 0
            continue
        past = future = 0.0
        for t in range(i + w, min(L, i + w + (rows or L))):
            past += sum(attention[t, j].item() for j in range(i - w + 1, i + 1))
            future += sum(attention[t, j].item() for j in range(i + 1, i + w + 1))
        wanted = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
        assert given[0, i].item() == pytest.approx(wanted, rel=1e-9)


def test_targets_are_boundaries_from_a_ratio_of_two_on():
    ratio = torch.tensor([[0.0, 1.0, 1.99, 2.01, 50.0]], dtype=torch.float64)
    assert boundary_targets(ratio).tolist() == [[0, 0, 0, 1, 1]]
    soft = boundary_targets(ratio, soft=True)
    assert soft[0, 0].item() == pytest.approx(0.2, abs=1e-5)  # sigmoid(-2 log 2) = 1 / (1 + 4)
    assert soft[0, 4].item() == pytest.approx(625 / 626, abs=1e-5)


def test_focal_loss_without_focus_is_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 30, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, valid = torch.rand(2, 30, generator=generator, dtype=torch.float64), valid_places(30, 3, logits.device)
    plain = F.binary_cross_entropy_with_logits(logits[:, valid], targets[:, valid])
    assert focal_loss(logits, targets, valid, gamma=0, pos_weight=1).item() == pytest.approx(plain.item(), abs=1e-12)
    sure = focal_loss(torch.tensor([[4.0]]), torch.ones(1, 1), torch.ones(1, dtype=torch.bool))
    assert sure.item() == pytest.approx(1.3 * math.log1p(math.exp(-4)) / (1 + math.exp(4)) ** 2, rel=1e-5)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, targets, valid), logits)


def segments(generator, *, length=320, channels=64, noise=0.3):
    """Keys with a constant mean in each of segments of 20 to 60 tokens, and the last token of each but the last."""
    parts, ends = [], []
    while sum(map(len, parts)) < length:
        size = int(torch.randint(20, 61, (), generator=generator))
        parts.append(torch.randn(1, channels, generator=generator).expand(size, -1))
        ends.append(sum(map(len, parts)) - 1)
    keys = torch.cat(parts)[:length]
    keys = keys + noise * torch.randn(keys.shape, generator=generator)
    return keys.view(1, length, 1, channels).transpose(1, 2), [end for end in ends if end < length - 8]


def test_predictor_learns_where_keys_turn():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    predictor = BoundaryPredictor(PredictorConfig(channels=64))
    optimizer = torch.optim.Adam(predictor.parameters(), lr=3e-3)
    train, test = ([segments(generator) for _ in range(count)] for count in (60, 10))
    for key, ends in train:
        targets = torch.zeros(1, key.shape[2])
        targets[0, ends] = 1
        loss = focal_loss(predictor(key), targets, valid_places(key.shape[2], 4, key.device), pos_weight=10.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = hits = wanted = 0
    for key, ends in test:
        with torch.no_grad():
            cut = boundaries_from_logits(predictor(key), threshold=-0.5)[0, 1:-1] - 1
        found, wanted = found + len(cut), wanted + len(ends)
        hits += sum(any(abs(end - c) <= 2 for c in cut.tolist()) for end in ends)
    assert 2 * hits / (found + wanted) >= 0.9


def test_training_goes_on_where_it_stopped(tmp_path):
    model = tiny_model("llama", num_key_value_heads=4)
    documents = [tokens(1, 40 + i, seed=i)[0] for i in range(3)] + [tokens(1, 9)[0]]
    training = BoundaryTraining(min_tokens=20, max_tokens=41, epochs=2, learning_rate=1e-3, checkpoint_every=2)
    losses = {}

    def stop_after(count):
        def on_document(done, loss):
            losses[done] = loss
            if done == count:
                raise KeyboardInterrupt

        return on_document

    whole = train_boundary_predictor(model, documents, training=training)
    with pytest.raises(KeyboardInterrupt):
        train_boundary_predictor(model, documents, training=training, folder=tmp_path, on_document=stop_after(3))
    seen = []
    resumed = train_boundary_predictor(
        model, documents, training=training, folder=tmp_path, on_document=lambda done, _: seen.append(done)
    )
    assert seen == [3, 4, 5, 6]  # three documents that are long enough, twice; the checkpoint was behind the second
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, atol=1e-6, rtol=0)
    assert resumed.config.host == "llama, 2 layers, width 48, 48 key channels"
    assert BoundaryPredictor.from_pretrained(tmp_path).config == resumed.config
    with pytest.raises(ValueError, match="other settings"):
        train_boundary_predictor(model, documents, training=replace(training, seed=1), folder=tmp_path)
    with pytest.raises(ValueError, match="no document has the 512 tokens"):
        train_boundary_predictor(model, documents)
    found = evaluate_boundary_predictor(model, whole, documents[:2], training=training, topk=5)
    assert set(found) == {"precision", "recall", "f1", "overlap"}
    assert all(0 <= value <= 1 for value in found.values())


# ---- the door


class TestDHSADoor(DoorTests):
    attention = "dhsa"
    cache = False  # a query's keys depend on the block that it comes in
    chunked = False

    def apply(self, model):
        config = replace(SMALL, budget=8, block_size=4, local_tokens=4, global_tokens=2, instruction_tokens=2)
        return apply_dhsa(model, config)

    def neutral(self, model):
        return apply_dhsa(model, DHSAConfig(boundary="uniform"))


@pytest.fixture(scope="module")
def predictor():
    model = tiny_model("llama")
    training = BoundaryTraining(min_tokens=20, epochs=1, learning_rate=1e-2)
    return train_boundary_predictor(model, [tokens(1, 60, seed=i)[0] for i in range(2)], training=training)


def logits(model, ids, **given):
    with torch.no_grad():
        return model(input_ids=ids, **given).logits


def test_predictor_travels_with_the_model(predictor, tmp_path):
    model, ids = tiny_model("llama"), tokens(2, 60)
    config = replace(SMALL, boundary="predictor", threshold=-1.0)
    handle = apply_dhsa(model, config, predictor=predictor)
    wanted = logits(model, ids)
    assert {name for name in model.state_dict() if "llm_attn_dhsa.mlp" in name}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, ids), wanted)
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "llm_attn_dhsa" in name)
    handle.remove()
    assert not torch.equal(logits(model, ids), wanted)
    assert not [name for name in model.state_dict() if "dhsa" in name]


def test_boundaries_of_the_first_layer_hold_in_all(predictor):
    model, ids, seen = tiny_model("llama"), tokens(1, 60), []
    config = replace(SMALL, boundary="predictor", threshold=-1.0)
    for share in (True, False):
        seen.clear()
        options = {"predictor": predictor, "on_selection": seen.append}
        with apply_dhsa(model, replace(config, share_boundaries=share), **options):
            logits(model, ids)
        assert [s.layer for s in seen] == [0, 1]
        assert torch.equal(seen[0].boundaries, seen[1].boundaries) is share
        assert not torch.equal(seen[0].lists.indices, seen[1].lists.indices)
    seen.clear()
    with apply_dhsa(model, replace(config, share_lists=True), predictor=predictor, on_selection=seen.append):
        logits(model, ids)
    assert torch.equal(seen[0].lists.indices, seen[1].lists.indices)


def test_counts_are_what_is_read():
    model, ids, seen = tiny_model("llama"), tokens(1, 61), []
    with apply_dhsa(model, SMALL, layers=[1], on_selection=seen.append) as handle:
        logits(model, ids)
    (only,) = seen
    assert handle.layers_changed == (1,)
    assert (only.layer, only.num_queries, only.num_keys) == (1, 61, 61)
    assert only.lists.counts.tolist() == [[[8, 16, 24, 24, 24, 24, 24]]]


def test_sentences_end_chunks():
    model, seen = tiny_model("llama"), []
    ids = tokens(1, 60).masked_fill(tokens(1, 60) == 5, 6)
    ids[0, [11, 30, 44]] = 5
    config = replace(SMALL, boundary="punctuation", punctuation_ids=(5,), instruction_tokens=0)
    with apply_dhsa(model, config, on_selection=seen.append):
        out = model(ids, use_cache=True)
        assert seen[0].boundaries.tolist() == [[0, 12, 31, 45, 60]]
        model(ids[:, :1], past_key_values=out.past_key_values)
        assert seen[-1].boundaries.tolist() == [[0, 12, 31, 45, 60]]
        padded, mask = torch.cat([ids[:, :7], ids], 1), torch.ones(1, 67, dtype=torch.long)
        mask[:, :7] = 0
        model(padded, attention_mask=mask)
        assert seen[-1].boundaries.tolist() == [[0, 12, 31, 45, 60]]
        with pytest.raises(ValueError, match="needs the input_ids"):
            model(inputs_embeds=torch.zeros(1, 200, 48))


def test_ids_of_sentence_ends_come_from_the_tokenizer():
    class Tokenizer:
        all_special_ids = (0,)

        def __len__(self):
            return 6

        def batch_decode(self, rows):
            return [[".", "word", ". ", "no.1", "\n\n", "What?"][row[0]] for row in rows]

    assert punctuation_ids(Tokenizer()) == (2, 4, 5)


def steps_of(model, ids, start, seen):
    """Selections of the first layer while tokens from `start` on are fed one by one."""
    out = model(ids[:, :start], use_cache=True)
    found = []
    for i in range(start, ids.shape[1]):
        seen.clear()
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(seen[0])
    return found, out


def test_generated_tokens_become_chunks():
    model, seen = tiny_model("llama"), []
    with torch.no_grad(), apply_dhsa(model, SMALL, on_selection=seen.append):
        steps, _ = steps_of(model, tokens(1, 60), 40, seen)
    ends = [int(s.boundaries[0, -1]) for s in steps]
    assert ends == [40] * 6 + [47] * 7 + [54] * 7  # cut as soon as more than six are not covered
    for s in steps:
        keys = as_sets(s.lists)[0, 0, 0]
        assert keys >= set(range(int(s.boundaries[0, -1]), s.num_keys)) | set(range(s.num_keys - 8, s.num_keys))
        assert len(keys) == 24


def test_state_follows_the_cache():
    """Two texts in turn, each with its own cache; rows exchanged; a cache cut back: always as if alone."""
    model, seen = tiny_model("llama"), []
    first, second = tokens(2, 60), tokens(2, 60, seed=9)
    with torch.no_grad(), apply_dhsa(model, replace(SMALL, generated_chunk=3), on_selection=seen.append):

        def alone(ids, start=40):
            return steps_of(model, ids, start, seen)[1]

        wanted = alone(first)
        outs = [model(ids[:, :40], use_cache=True) for ids in (first, second)]
        for i in range(40, 60):
            outs = [
                model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
                for ids, out in zip((first, second), outs, strict=True)
            ]
        # caches in turn lose what was generated as chunks, so that chunks differ; what is read stays right
        assert seen[-1].num_keys == 60
        cut = wanted.past_key_values
        cut.crop(-3)
        again = model(first[:, 57:58], past_key_values=cut, use_cache=True).logits
        assert again.isfinite().all()
        exchanged = alone(first)
        cache = exchanged.past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        extra = tokens(2, 1, seed=4)
        seen.clear()
        out = model(extra, past_key_values=cache).logits
        ends = (seen[0].boundaries[:, 1:] - 1)[..., None]
        key = cache.layers[0].keys[:, 0]
        memory = model.model.layers[0].self_attn.llm_attn_dhsa_memory
        held = memory.chunks[None, 0, False].ends
        assert torch.equal(held, key.gather(1, ends.expand(-1, -1, key.shape[2])))
        assert out.isfinite().all()


def test_more_of_a_prompt_is_cut_behind_what_is_there():
    model, ids, seen = tiny_model("llama"), tokens(1, 80), []
    with torch.no_grad(), apply_dhsa(model, SMALL, on_selection=seen.append):
        out = model(ids[:, :40], use_cache=True)
        before = seen[0].boundaries
        seen.clear()
        model(ids[:, 40:], past_key_values=out.past_key_values)
    assert torch.equal(seen[0].boundaries[:, : before.shape[1]], before)
    assert int(seen[0].boundaries[0, -1]) == 80
    assert seen[0].lists.counts.shape == (1, 1, 5)  # 35 queries in blocks of 8
    for i, keys in enumerate(as_sets(seen[0].lists).values()):
        assert max(keys) == min(40 + 8 * (i + 1), 75) - 1


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_windows_and_capped_scores(family):
    """Sliding layers choose inside the window; scores are capped as the host caps them."""
    changes = {"attn_logit_softcapping": 5.0} if family == "gemma2" else {}
    model, ids, seen = tiny_model(family, sliding_window=40, **changes), tokens(1, 90), []
    model.set_attn_implementation("eager")
    host = logits(model, ids)
    with apply_dhsa(model, replace(SMALL, budget=90), on_selection=seen.append):
        torch.testing.assert_close(logits(model, ids), host, atol=1e-4, rtol=0)
        assert not seen
    with apply_dhsa(model, SMALL, on_selection=seen.append):
        logits(model, ids)
    first = as_sets(seen[0].lists)
    assert seen[0].layer == 0
    for (_, _, i), keys in first.items():
        stop = min(8 * (i + 1), 85)
        assert min(keys) == max(0, stop - 40)  # the first keys of the window are always read


@pytest.mark.parametrize("boundary", ["keyshift", "punctuation"])
def test_sliding_layers_decode_from_a_cache_of_their_window(boundary):
    """Their cache holds the latest keys alone, that of the other layers holds all: both read what they should."""
    model, ids, seen = tiny_model("gemma3_text", sliding_window=40), tokens(2, 70), []
    config = replace(SMALL, boundary=boundary, punctuation_ids=(5, 6, 7))
    with torch.no_grad(), apply_dhsa(model, config, on_selection=seen.append):
        out = model(ids[:, :50], use_cache=True)
        for i in range(50, 70):
            seen.clear()
            out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            assert out.logits.isfinite().all()
            assert [s.num_keys for s in seen] == [40, i + 1]
            for s in seen:
                assert int(s.boundaries.max()) <= s.num_keys
                for keys in as_sets(s.lists).values():
                    assert len(keys) == 24
                    assert keys >= set(range(s.num_keys - 8, s.num_keys)) | set(range(4))


def test_documents_in_a_packed_row():
    mask = torch.block_diag(*(torch.ones(n, n) for n in (3, 1, 4))).bool().tril()[None, None]
    assert packed_documents(mask) == [[(0, 3), (3, 4), (4, 8)]]
    hole = mask.clone()
    hole[0, 0, 2, 1] = False
    assert packed_documents(hole) is None


def test_bad_input_is_refused_in_a_sentence(predictor):
    model, other = tiny_model("llama"), tiny_model("qwen2")
    refused = {
        "needs predictor=": lambda: apply_dhsa(model),
        "reads keys of 16 channels, this model's have 24": lambda: apply_dhsa(
            model, predictor=BoundaryPredictor(PredictorConfig(channels=16))
        ),
        "trained on another model: llama": lambda: apply_dhsa(other, predictor=predictor),
        "used with boundary='predictor' only": lambda: apply_dhsa(model, SMALL, predictor=predictor),
        r"layers must be some of 0 to 1, got \[5\]": lambda: apply_dhsa(model, SMALL, layers=[5]),
        "budget must hold what is always read": lambda: DHSAConfig(budget=200),
        "pooling must be one of": lambda: DHSAConfig(pooling="sum"),
        "block_size must be at least 1": lambda: DHSAConfig(block_size=0),
        "needs punctuation_ids": lambda: DHSAConfig(boundary="punctuation"),
        "num_heads must divide channels": lambda: PredictorConfig(channels=10),
        "encoder must be one of": lambda: PredictorConfig(channels=8, encoder="lstm"),
        "gamma must be at least 0": lambda: BoundaryTraining(gamma=-1),
        "epochs must be positive": lambda: BoundaryTraining(epochs=0),
        "reads 24 channels, the keys have 2 x 5": lambda: predictor(torch.ones(1, 2, 9, 5)),
        "boundaries must ascend from 0 to 61": lambda: dhsa_attention(*random_qkv(), random_boundaries(60), SMALL),
        r"boundaries must be \(2, chunks \+ 1\)": lambda: dhsa_attention(*random_qkv(), torch.arange(3), SMALL),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    model = tiny_model("llama", attention_dropout=0.1).train()
    with apply_dhsa(model, SMALL), pytest.raises(ValueError, match="no attention dropout"):
        model(tokens(1, 60))


def test_short_texts_and_none():
    query, key, value = random_qkv(1)
    whole = torch.tensor([[0, 1]] * 2)
    torch.testing.assert_close(dhsa_attention(query, key, value, whole, SMALL), value.repeat_interleave(2, 1))
    none = [t[:, :, :0] for t in (query, key, value)]
    assert dhsa_attention(*none, torch.zeros(2, 2, dtype=torch.long), SMALL).shape == (2, 6, 0, 5)


def test_the_proof_runs(tmp_path):
    script = Path(__file__).parents[1] / "proofs" / "dhsa.py"
    spec = importlib.util.spec_from_file_location("dhsa_proof", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules["dhsa_proof"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    module.main(out=tmp_path, quick=True)
    before = (tmp_path / "dhsa.json").read_text()
    units = {file: file.stat().st_mtime_ns for file in tmp_path.glob("dhsa_units_quick/*.json")}
    module.main(out=tmp_path, quick=True)  # nothing is left to do
    assert (tmp_path / "dhsa.json").read_text() == before
    assert {file: file.stat().st_mtime_ns for file in units} == units
    rows = json.loads((tmp_path / "dhsa.json").read_text())["rows"]
    assert {r["way"] for r in rows} == {
        "dense",
        "dhsa, predictor",
        "dhsa, keyshift",
        "dhsa, punctuation",
        "dhsa, uniform",
        "topk",
        "a_shape",
        "window",
    }
    losses = {(r["way"], r["share"]): r["mean"] for r in rows if r["task"] == "loss"}
    assert len(set(losses.values())) > len(losses) / 2
    assert (tmp_path / "dhsa.png").stat().st_size > 10_000
