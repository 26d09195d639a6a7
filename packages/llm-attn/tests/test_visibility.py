"""What the masks of transformers mean, held against masks written out one entry at a time."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama.configuration_llama import LlamaConfig

from llm_attn.transformers.visibility import Visibility, dense_attention, key_mask, read_mask

KEY_MASK = torch.tensor(
    [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0] * 7], dtype=torch.bool
)


def written_out(num_queries, num_keys, window, keys):
    batch = 1 if keys is None else keys.shape[0]
    mask = torch.zeros(batch, 1, num_queries, num_keys, dtype=torch.bool)
    for b in range(batch):
        for i in range(num_queries):
            for j in range(num_keys):
                place = i + num_keys - num_queries
                near = window is None or place - j < window
                mask[b, 0, i, j] = j <= place and near and (keys is None or keys[b, j])
    return mask


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("keys", [None, KEY_MASK], ids=["all", "padded"])
@pytest.mark.parametrize("num_queries", [1, 4, 7])
def test_words_and_mask_say_the_same(num_queries, keys, window):
    visible = Visibility(window, keys)
    wanted = written_out(num_queries, 7, window, keys)
    assert torch.equal(visible.dense(num_queries, 7, torch.device("cpu")), wanted)
    assert torch.equal(visible.counts(num_queries, 7, torch.device("cpu")), wanted[:, 0].sum(-1))
    as_mask = Visibility(mask=wanted)
    assert torch.equal(as_mask.counts(num_queries, 7, torch.device("cpu")), wanted[:, 0].sum(-1))


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("keys", [None, KEY_MASK], ids=["all", "padded"])
def test_dense_attention_is_the_formula(keys, softcap):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, 6, 5, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 4, 3, 7, 8, generator=generator, dtype=torch.float64)
    visible = Visibility(3, keys)
    scores = torch.einsum("bhid,bhjd->bhij", query, key.repeat_interleave(2, 1)) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.exp() * written_out(5, 7, 3, keys)
    wanted = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30) @ value.repeat_interleave(2, 1)
    given = dense_attention(query, key, value, visible, scale=0.3, softcap=softcap)
    torch.testing.assert_close(given, wanted, atol=1e-12, rtol=0)


# ---- through transformers' own mask code


@pytest.fixture
def config():
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 32}
    config = LlamaConfig(**shape, sliding_window=3)
    config._attn_implementation = "visibility"
    return config


@pytest.fixture(autouse=True)
def registered():
    AttentionInterface.register("visibility", lambda *_: None)
    AttentionMaskInterface.register("visibility", key_mask)


def seen_by(config, length, *, cache=None, slots=None, padding=None, before=0, make=create_causal_mask, window=None):
    """Mask of queries x keys that an attention function would come to, and the number of keys left after cropping."""
    slots = slots or before + length
    positions = torch.arange(before, before + length)[None]
    mask = make(config, torch.zeros(1, length, 16), padding, cache=cache, position_ids=positions)
    query, key = torch.zeros(1, 2, length, 8), torch.zeros(1, 2, slots, 8)
    key, _, visible = read_mask(mask, query, key, key, window)
    return visible, visible.dense(length, key.shape[2], key.device), key.shape[2]


def filled(cache, tokens):
    cache.update(torch.zeros(1, 2, tokens, 8), torch.zeros(1, 2, tokens, 8), 0)
    return cache


def test_prompt_without_padding_needs_no_mask(config):
    visible, dense, _ = seen_by(config, 5, cache=DynamicCache(config=config))
    assert visible.plain
    assert torch.equal(dense, written_out(5, 5, None, None))


def test_continuation_sees_the_cache(config):
    visible, dense, keys = seen_by(config, 2, cache=filled(DynamicCache(), 4), before=4)
    assert visible.plain
    assert keys == 6
    assert torch.equal(dense, written_out(2, 6, None, None))


@pytest.mark.parametrize("padded", [False, True])
def test_static_cache_is_cropped_to_what_is_written(config, padded):
    cache = StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=11)
    padding = torch.tensor([[0, 0, 1, 1, 1]]).bool() if padded else None
    _, dense, keys = seen_by(config, 5, cache=cache, slots=11, padding=padding)
    assert keys == 5
    assert torch.equal(dense, written_out(5, 5, None, padding))


def test_static_decode_masks_what_is_not_written(config):
    cache = filled(StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=11), 4)
    visible, dense, _ = seen_by(config, 1, cache=cache, slots=11, before=4)
    assert visible.mask is None
    assert dense[0, 0, 0].tolist() == [True] * 5 + [False] * 6


def test_packed_rows_come_as_a_mask(config):
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    mask = create_causal_mask(config, torch.zeros(1, 5, 16), None, cache=None, position_ids=positions)
    zeros = torch.zeros(1, 2, 5, 8)
    _, _, visible = read_mask(mask, zeros, zeros, zeros, None)
    wanted = written_out(5, 5, None, None)
    wanted[..., 3:, :3] = False
    assert torch.equal(visible.mask, wanted)


def test_window_comes_from_the_layer(config):
    visible, dense, _ = seen_by(config, 5, make=create_sliding_window_causal_mask, window=3)
    assert visible.window == 3
    assert visible.key_mask is None
    assert torch.equal(dense, written_out(5, 5, 3, None))


def test_window_wider_than_the_keys_is_none():
    zeros = torch.zeros(1, 2, 5, 8)
    assert read_mask(None, zeros, zeros, zeros, 5)[2].plain
    assert read_mask(None, zeros, zeros, zeros, 4)[2].window == 4


def test_additive_masks_are_read_and_odd_shapes_refused():
    zeros = torch.zeros(1, 2, 3, 8)
    additive = torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min).triu(1)
    assert torch.equal(read_mask(additive, zeros, zeros, zeros, None)[2].mask, written_out(3, 3, None, None))
    with pytest.raises(ValueError, match="alike for all heads"):
        read_mask(additive.expand(1, 2, 3, 3), zeros, zeros, zeros, None)
