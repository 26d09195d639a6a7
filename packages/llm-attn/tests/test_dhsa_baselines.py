"""Patterns of fixed blocks against what they are said to choose, written out with loops."""

import pytest
import torch

from llm_attn.dhsa import FixedBlocksConfig, apply_fixed_blocks, fixed_block_lists
from llm_attn.testing import DoorTests, tiny_model, tokens
from shared_kernels import sparse_attention

N, BLOCK_Q, BLOCK_K, BUDGET = 61, 8, 4, 24
PATTERNS = ("topk", "a_shape", "vertical_slash", "block_vertical_slash", "window")


def random_qk(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, N, 8, generator=generator, dtype=torch.float64) for heads in (6, 3)]


def config(pattern):
    return FixedBlocksConfig(pattern=pattern, budget=BUDGET, block_q=BLOCK_Q, block_k=BLOCK_K, instruction_tokens=5)


def lists_of(pattern):
    query, key = random_qk()
    lists, size = fixed_block_lists(query, key, config(pattern))
    return query, key.repeat_interleave(2, 1), lists, size


def chosen(lists, b, h, i):
    row = lists.indices[b, h if lists.indices.shape[1] > 1 else 0, i, : lists.counts[b, h % lists.counts.shape[1], i]]
    found = row.tolist()
    assert len(set(found)) == len(found)
    return set(found)


def last_rows(query, key):
    scores = query[:, :, -BLOCK_Q:] @ key.mT * 8**-0.5
    rows = torch.arange(N - BLOCK_Q, N)[:, None]
    return scores.masked_fill(torch.arange(N) > rows, -torch.inf).softmax(-1), rows


@pytest.mark.parametrize("pattern", ["topk", "a_shape"])
def test_blocks_by_the_product_of_their_means(pattern):
    query, key, lists, size = lists_of(pattern)
    assert size == (BLOCK_Q, BLOCK_K)
    for h in range(6):
        for i in range(8):
            seen = range(min(2 * (i + 1), 16))
            always = {0, 2 * i, 2 * i + 1} & set(seen) if pattern == "a_shape" else set()
            mean = query[1, h, i * 8 : i * 8 + 8].mean(0)
            score = {j: (mean @ key[1, h, j * 4 : j * 4 + 4].mean(0)).item() for j in seen}
            best = sorted(set(seen) - always, key=lambda j: -score[j])[: 6 - len(always)]
            assert chosen(lists, 1, h, i) == always | set(best)


def test_window_reads_the_first_block_and_the_latest():
    *_, lists, _ = lists_of("window")
    for i in range(8):
        latest = set(range(max(0, 2 * (i + 1) - 5), 2 * (i + 1)))
        assert chosen(lists, 0, 0, i) == ({0} | latest if i > 2 else set(range(2 * (i + 1))))


def test_vertical_slash_reads_columns_and_diagonals():
    query, key, lists, size = lists_of("vertical_slash")
    assert size == (1, 1)
    weights, rows = last_rows(query, key)
    for h in range(6):
        columns = set(weights[0, h].sum(0).topk(12).indices.tolist())
        mass = torch.zeros(N, dtype=torch.float64)
        for r in range(BLOCK_Q):
            for j in range(int(rows[r]) + 1):
                mass[int(rows[r]) - j] += weights[0, h, r, j]
        distances = set(mass.topk(12).indices.tolist())
        for t in (30, 52, 60):
            wanted = {c for c in columns if c <= t} | {t - d for d in distances if d <= t}
            assert chosen(lists, 0, h, t) == wanted
        assert chosen(lists, 0, h, 23) == set(range(24))  # the first rows see everything


def test_block_vertical_slash_keeps_blocks_on_lines():
    query, key, lists, _ = lists_of("block_vertical_slash")
    weights, rows = last_rows(query, key)
    for h in range(6):
        column = torch.zeros(16, dtype=torch.float64)
        diagonal = torch.zeros(16, dtype=torch.float64)
        for r in range(BLOCK_Q):
            for j in range(int(rows[r]) + 1):
                column[j // 4] += weights[0, h, r, j]
                diagonal[(int(rows[r]) - j) // 4] += weights[0, h, r, j]
        columns, distances = (set(x.topk(3).indices.tolist()) for x in (column, diagonal))
        for i in range(8):
            seen = range(2 * (i + 1))
            lines = {j for j in seen if j in columns or 2 * (i + 1) - 1 - j in distances} | {2 * i, 2 * i + 1}
            given = chosen(lists, 0, h, i)
            assert given <= lines
            assert len(given) == min(6, len(lines))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_door_runs_the_lists(pattern):
    model, ids = tiny_model("llama"), tokens(1, N)
    seen = {}
    with torch.no_grad(), apply_fixed_blocks(model, config(pattern)):
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs: seen.update(out=inputs[0])
        )
        model(ids)
        hook.remove()
        given = seen["out"].view(1, N, 4, -1).transpose(1, 2)
        query, key, value = first_layer(model, ids)
        lists, size = fixed_block_lists(query, key, config(pattern))
        sparse = sparse_attention(query, key, value, *lists, block_size=size, causal=True)
        dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(given[:, :, : N - 5], sparse[:, :, : N - 5], atol=1e-6, rtol=0)
    torch.testing.assert_close(given[:, :, N - 5 :], dense[:, :, N - 5 :], atol=1e-6, rtol=0)
    assert (sparse - dense)[:, :, : N - 5].abs().max() > 1e-3


def first_layer(model, ids):
    """Query, key and value of layer 0, through the host's own functions."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids))
    cos, sin = model.model.rotary_emb(hidden, position_ids=torch.arange(N)[None])
    attention = layer.self_attn
    heads = [p(hidden).unflatten(2, (-1, attention.head_dim)).transpose(1, 2) for p in (
        attention.q_proj, attention.k_proj, attention.v_proj
    )]  # fmt: skip
    return *apply_rotary_pos_emb(heads[0], heads[1], cos, sin), heads[2]


def test_a_budget_for_everything_is_the_host():
    model, ids = tiny_model("llama"), tokens(2, N)
    host = model(ids).logits
    with apply_fixed_blocks(model):
        assert torch.equal(model(ids).logits, host)
    assert torch.equal(model(ids).logits, host)


class TestFixedBlocksDoor(DoorTests):
    attention = "fixed_blocks"
    families = ("llama", "gemma3_text")
    cache = False
    chunked = False
    compiled = False  # the same door

    def apply(self, model):
        small = FixedBlocksConfig(pattern="a_shape", budget=8, block_q=4, block_k=2, instruction_tokens=2)
        return apply_fixed_blocks(model, small)


def test_bad_settings_are_refused():
    for wrong, message in (
        ({"pattern": "random"}, "pattern must be one of"),
        ({"block_k": 48}, "must be a multiple of block_k"),
        ({"budget": 100}, "budget must be at least block_q"),
        ({"instruction_tokens": -1}, "instruction_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            FixedBlocksConfig(**wrong)
    model = tiny_model("gemma2", attn_logit_softcapping=5.0)
    with apply_fixed_blocks(model, config("topk")), pytest.raises(ValueError, match="does not cap scores"):
        model(tokens(1, N))
