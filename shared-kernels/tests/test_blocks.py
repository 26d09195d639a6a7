"""Choosing key blocks and attending to them: what both promise together, and the memory of the whole call."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from shared_kernels import backend, block_stats, choose_blocks, select_blocks, sparse_attention
from shared_kernels.testing import LargestTensor, Make


@pytest.fixture
def tokens():
    make = Make(torch.float64)
    return make.normal(2, 4, 45, 16), make.normal(2, 2, 53, 16), make.normal(2, 2, 53, 16)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("list_heads", [1, 2, 4])
def test_all_blocks_are_dense_attention(tokens, causal, list_heads):
    query, key, value = tokens
    lists = select_blocks(query, key, block_size=(8, 4), topk=1.0, causal=causal, list_heads=list_heads)
    out = sparse_attention(query, key, value, *lists, block_size=(8, 4), causal=causal, validate=True)
    mask = torch.ones(45, 53, dtype=torch.bool).tril(53 - 45 if causal else 53)
    assert torch.allclose(out, sdpa(query, key, value, attn_mask=mask, enable_gqa=True), atol=1e-12)


def test_attention_over_chosen_blocks_is_attention_under_their_mask(tokens):
    query, key, value = tokens
    sink = torch.arange(14) == 0
    indices, counts = select_blocks(query, key, block_size=(8, 4), topk=3, topp=0.2, forced=sink, causal=True)
    out = sparse_attention(query, key, value, indices, counts, block_size=(8, 4), causal=True, validate=True)
    keep = torch.zeros(2, 4, 6, 15).scatter(-1, indices.long() % 15, 1.0)[..., :14] > 0
    assert keep[..., 0].all()
    assert torch.equal(keep.sum(-1), counts)
    mask = keep.repeat_interleave(8, 2)[:, :, :45].repeat_interleave(4, 3)[..., :53]
    mask = mask & torch.ones(45, 53, dtype=torch.bool).tril(53 - 45)
    assert torch.allclose(out, sdpa(query, key, value, attn_mask=mask, enable_gqa=True), atol=1e-12)


def test_choosing_from_the_means_of_block_stats_is_select_blocks(tokens):
    query, key, _ = tokens
    means = block_stats(query, block_size=8).mean, block_stats(key, block_size=4).mean.repeat_interleave(2, 1)
    scores = means[0] @ means[1].mT / 4
    ours = select_blocks(query, key, block_size=(8, 4), topk=0.2, topp=0.3)
    for mine, expected in zip(choose_blocks(scores, topk=0.2, topp=0.3), ours, strict=True):
        assert torch.equal(mine, expected)


def test_only_blocks_times_blocks_exists():
    query, key = (Make().normal(1, 2, 4099, 16) for _ in range(2))
    with LargestTensor() as largest:
        select_blocks(query, key, block_size=(32, 64), topk=0.1, topp=0.2, causal=True, list_heads=1)
    assert largest.elements == query.numel()  # query and key themselves; tokens x tokens would be 64 times as many


def test_lists_do_not_differentiate(tokens):
    query, key, _ = (t.requires_grad_() for t in tokens)
    indices, counts = select_blocks(query, key, block_size=(8, 4), topk=2)
    assert not indices.requires_grad
    assert not counts.requires_grad


def test_under_autocast_scores_stay_wide(tokens):
    query, key, _ = (t.float() for t in tokens)
    plain = select_blocks(query, key, block_size=(8, 4), topk=0.3, topp=0.4)
    with torch.autocast("cpu", torch.bfloat16):
        again = select_blocks(query, key, block_size=(8, 4), topk=0.3, topp=0.4)
    for mine, expected in zip(again, plain, strict=True):
        assert torch.equal(mine, expected)


def test_what_kernels_do_not_take_is_refused():
    pytest.importorskip("triton")
    with backend("triton"):
        with pytest.raises(TypeError, match="float16, bfloat16 and float32, got torch.float64"):
            choose_blocks(torch.zeros(1, 1, 2, 3, dtype=torch.float64), topk=1)
        with pytest.raises(ValueError, match="scores must have at most 8192 key blocks on a GPU, got 8193"):
            choose_blocks(torch.zeros(1, 1, 2, 8193), topk=1)
        with pytest.raises(TypeError, match="float16, bfloat16 and float32, got torch.float64"):
            block_stats(torch.zeros(1, 1, 2, 3, dtype=torch.float64), block_size=2)
