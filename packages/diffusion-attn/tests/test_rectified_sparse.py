"""Rectified SpaAttn: the checks of the paper's formulas, and the method in every family."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from diffusion_attn.diffusers.methods import apply_rectified_sparse, kept_blocks
from diffusion_attn.rectified_sparse import (
    RectifiedSparseConfig,
    choose_critical,
    estimate_attention,
    rectification,
    rectified_sparse_attention,
)
from diffusion_attn.testing import DoorTests
from diffusion_attn.visual_attention import TextKeys, listed_blocks


def tokens(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def qkv(*shape, **options):
    return [tokens(*shape, seed=seed, **options) for seed in range(3)]


def some_text(B=2, H=3, T=9, D=16, **options):
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1:, 5:] = False
    return TextKeys(tokens(B, H, T, D, seed=7, **options), tokens(B, H, T, D, seed=8, **options), valid)


def dense(query, key, value, text=None, mask=None):
    """All keys, or those of `mask` (B, H, S, S), and the valid text."""
    mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool) if mask is None else mask
    if text is not None:
        of_text = text.valid[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
        mask = torch.cat([mask.expand(query.shape[0], -1, -1, -1), of_text], 3)
        key, value = torch.cat([key, text.key], 2), torch.cat([value, text.value], 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def blocks_to_tokens(mask, block, S):
    return mask.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :S, :S]


def plain_rectified(query, key, value, config, text=None, kept=None):
    """The method written out for whole maps, float64, one block after the other."""
    S, D = query.shape[2:]
    b, N = config.block_size, -(-S // config.block_size)
    parts = [[x[:, :, n * b : (n + 1) * b] for n in range(N)] for x in (query, key, value)]
    Qp, Kp, Vp = (torch.stack([p.mean(2) for p in part], 2) for part in parts)
    dq, dk = (torch.stack([(p - p.mean(2, keepdim=True)).abs().mean(2) for p in part], 2) for part in parts[:2])
    columns, sizes = [Kp], [part.shape[2] for part in parts[1]]
    if text is not None:
        columns.append(text.key)
    scores = Qp @ torch.cat(columns, 2).mT / D**0.5
    if text is not None:
        scores[..., N:] = scores[..., N:].masked_fill(~text.valid[:, None, None], -torch.inf)
    P = scores.softmax(-1)
    weights = P[..., :N] * (torch.tensor(sizes).double() if config.reallocation else 1)
    of_text = P[..., N:].sum(-1, keepdim=True)
    total = weights.sum(-1, keepdim=True) + of_text
    A = torch.cat([weights, of_text], -1)[..., : N + (text is not None)] / total
    lists = choose_critical(A, config, kept=kept)
    critical = listed_blocks(lists, N)
    gain = (Qp @ Kp.mT).abs() > (dq @ Kp.mT).abs() + (Qp @ dk.mT).abs()
    added = gain & ~critical
    out = dense(query, key, value, text, blocks_to_tokens(critical, b, S))
    R = 1 - (A[..., :N] * added).sum(-1)
    C = (A[..., :N] * added) @ Vp
    rows = torch.arange(S) // b
    return R[:, :, rows, None] * out + C[:, :, rows]


@pytest.mark.parametrize("with_text", [False, True])
def test_everything_kept_is_dense_attention(with_text):
    query, key, value = qkv(2, 3, 75, 16)
    text = some_text() if with_text else None
    out, lists = rectified_sparse_attention(
        query, key, value, RectifiedSparseConfig(density=1, block_size=16), text=text
    )
    torch.testing.assert_close(out, dense(query, key, value, text), atol=1e-5, rtol=0)
    assert (lists.counts == 5).all()


@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_the_formulas_written_out(with_text, density):
    query, key, value = qkv(2, 3, 75, 16, dtype=torch.float64)
    query, key = query + 2 * tokens(2, 3, 5, 16, dtype=torch.float64).repeat_interleave(15, 2), 2 * key
    text = some_text(dtype=torch.float64) if with_text else None
    config = RectifiedSparseConfig(density=density, topp=0.2, block_size=16)
    kept = torch.eye(5, dtype=torch.bool)
    out, _ = rectified_sparse_attention(query, key, value, config, text=text, kept=kept)
    torch.testing.assert_close(out, plain_rectified(query, key, value, config, text, kept), atol=1e-10, rtol=0)


def test_without_correction_it_is_plain_block_sparse():
    query, key, value = qkv(1, 2, 64, 8)
    config = RectifiedSparseConfig(density=0.3, topp=0, block_size=8, correction=False)
    out, lists = rectified_sparse_attention(query, key, value, config)
    seen = blocks_to_tokens(listed_blocks(lists, 8), 8, 64)
    torch.testing.assert_close(out, dense(query, key, value, mask=seen), atol=1e-5, rtol=0)
    assert (lists.counts == 2).all()


def test_without_conserving_mass_the_dropped_share_is_lost():
    query, key, value = qkv(1, 2, 64, 8)
    config = RectifiedSparseConfig(density=0.3, topp=0, block_size=8, correction=False, conserve_mass=False)
    estimate = estimate_attention(query, key, value, config, text=None, scale=8**-0.5)
    out, lists = rectified_sparse_attention(query, key, torch.ones_like(value), config)
    share = (estimate.attention * listed_blocks(lists, 8)).sum(-1)
    torch.testing.assert_close(out[..., 0], share.repeat_interleave(8, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("with_text", [False, True])
def test_weights_sum_to_one(with_text):
    query, key, value = qkv(2, 3, 75, 16)
    text = some_text() if with_text else None
    text = None if text is None else TextKeys(text.key, torch.full_like(text.value, 3.0), text.valid)
    config = RectifiedSparseConfig(density=0.2, block_size=16)
    out, _ = rectified_sparse_attention(2 * query, 2 * key, torch.full_like(value, 3.0), config, text=text)
    torch.testing.assert_close(out, torch.full_like(out, 3.0), atol=1e-5, rtol=0)


def test_constant_blocks_are_exact_with_one_block_kept():
    query, key, value = (x.repeat_interleave(16, 2) for x in qkv(1, 2, 6, 8))
    out, lists = rectified_sparse_attention(
        query, key, value, RectifiedSparseConfig(density=0.01, topp=0, block_size=16)
    )
    assert (lists.counts == 1).all()
    torch.testing.assert_close(out, dense(query, key, value), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_noisy_blocks_are_nearly_exact(kept):
    blocks = [1.5 * x for x in qkv(1, 1, 7, 32)]
    query, key, value = (
        x.repeat_interleave(16, 2) + 0.05 * tokens(1, 1, 112, 32, seed=10 + n) for n, x in enumerate(blocks)
    )
    truth = dense(query, key, value)
    errors = []
    for correction in (True, False):
        config = RectifiedSparseConfig(density=(kept + 0.01) / 7, topp=0, block_size=16, correction=correction)
        out, _ = rectified_sparse_attention(query, key, value, config)
        errors.append((out - truth).norm() / truth.norm())
    assert errors[0] < (0.5 if kept == 4 else 0.25) * errors[1]


def test_noise_without_blocks_is_left_alone():
    query, key, value = qkv(1, 2, 512, 32)
    config = RectifiedSparseConfig(density=0.25, topp=0, block_size=64)
    estimate = estimate_attention(query, key, value, config, text=None, scale=32**-0.5)
    assert estimate.gains.float().mean() <= 0.05


def test_rows_of_the_estimate_sum_to_one_and_single_tokens_are_softmax():
    query, key, value = qkv(2, 3, 20, 16)
    text = some_text()
    config = RectifiedSparseConfig(block_size=1)
    estimate = estimate_attention(query, key, value, config, text=text, scale=0.25)
    torch.testing.assert_close(estimate.attention.sum(-1), torch.ones(2, 3, 20), atol=1e-6, rtol=0)
    scores = torch.cat([query @ key.mT, (query @ text.key.mT).masked_fill(~text.valid[:, None, None], -torch.inf)], 3)
    whole = (scores * 0.25).softmax(-1)
    torch.testing.assert_close(estimate.attention[..., :20], whole[..., :20], atol=1e-6, rtol=0)
    torch.testing.assert_close(estimate.attention[..., 20], whole[..., 20:].sum(-1), atol=1e-6, rtol=0)


def test_pooled_columns_count_as_often_as_they_have_tokens():
    """b Pv / (b Sv + St), with a last block of 3 of 8 tokens."""
    query, key, value = qkv(1, 1, 19, 4)
    text = TextKeys(tokens(1, 1, 5, 4, seed=5), tokens(1, 1, 5, 4, seed=6))
    counted, uncounted = (
        estimate_attention(
            query, key, value, RectifiedSparseConfig(block_size=8, reallocation=each), text=text, scale=0.5
        ).attention
        for each in (True, False)
    )
    weighted = uncounted * torch.tensor([8.0, 8.0, 3.0, 1.0])
    torch.testing.assert_close(counted, weighted / weighted.sum(-1, keepdim=True), atol=1e-6, rtol=0)


def test_more_budget_never_drops_a_block():
    query, key, value = qkv(1, 2, 160, 8)
    estimate = estimate_attention(query, key, value, RectifiedSparseConfig(block_size=8), text=None, scale=1.0)
    for settings in ([{"density": d, "topp": 0.0} for d in (0.1, 0.3, 0.6)], [{"topp": p} for p in (0.3, 0.6, 0.9)]):
        masks = [
            listed_blocks(choose_critical(estimate.attention, RectifiedSparseConfig(**each), kept=None), 20)
            for each in settings
        ]
        for less, more in pairwise(masks):
            assert (more | ~less).all()
            assert more.sum() > less.sum()


def test_gradients_are_those_of_the_whole_map():
    inputs = [x.requires_grad_() for x in qkv(1, 2, 40, 8, dtype=torch.float64)]
    config = RectifiedSparseConfig(density=0.4, topp=0, block_size=8)
    weights = tokens(1, 2, 40, 8, seed=9, dtype=torch.float64)
    found = torch.autograd.grad((rectified_sparse_attention(*inputs, config)[0] * weights).sum(), inputs)
    right = torch.autograd.grad((plain_rectified(*inputs, config) * weights).sum(), inputs)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)


def test_nothing_is_rectified_where_everything_is_kept():
    query, key, value = qkv(1, 2, 40, 8)
    config = RectifiedSparseConfig(density=1, block_size=8)
    estimate = estimate_attention(query, key, value, config, text=None, scale=1.0)
    row_scale, row_bias = rectification(estimate, choose_critical(estimate.attention, config, kept=None), config)
    assert torch.equal(row_scale, torch.ones(1, 2, 5))
    assert not row_bias.any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"density": 0}, "density must lie in"),
        ({"density": 1.5}, "density must lie in"),
        ({"topp": -0.1}, "topp must lie in"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"first_frame": "yes"}, "first_frame must be"),
        ({"order": "hilbert"}, "order must be"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RectifiedSparseConfig(**wrong)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"neighbors": False}, None),
        ({"neighbors": False, "first_frame": "frame"}, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        ({"neighbors": False, "first_frame": "curve"}, [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        ({"neighbors": True}, [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]),
    ],
)
def test_blocks_that_are_kept_in_any_case(settings, expected):
    """Three frames of 2 x 4 tokens, row by row, in blocks of 7: the first frame reaches into the second block."""
    found = kept_blocks(RectifiedSparseConfig(block_size=7, order="raster", **settings), (3, 2, 4), torch.device("cpu"))
    assert (found if found is None else found.int().tolist()) == expected


class TestDoor(DoorTests):
    def apply(self, model):
        return apply_rectified_sparse(
            model, RectifiedSparseConfig(density=0.2, topp=0, block_size=8, neighbors=False, correction=False)
        )

    def neutral(self, model):
        return apply_rectified_sparse(model, RectifiedSparseConfig(density=1, block_size=8))
