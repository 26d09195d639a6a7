"""Token functions against loops, with gradients, ties, empty rows and refused arguments."""

import pytest
import torch

from shared_kernels.tokens import (
    choose_tokens,
    keep_tokens,
    kept_indices,
    merge_tokens,
    pack_tokens,
    put_tokens,
    repack_tokens,
    segment_mean,
    select_mask,
    select_tokens,
    unpack_tokens,
)

B, N, C = 3, 11, 5


@pytest.fixture
def x():
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_choose_keeps_the_highest_in_order_and_ties_go_left():
    score = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.5], [0.0, torch.nan, -1.0, 0.0, 0.0]])
    assert choose_tokens(score, num_kept=3).tolist() == [[1, 2, 3], [0, 3, 4]]
    forced = torch.tensor([[True, False, False, False, False], [False, True, False, False, False]])
    assert choose_tokens(score, num_kept=2, forced=forced).tolist() == [[0, 1], [0, 1]]
    assert choose_tokens(torch.rand(2, 30), keep_ratio=0.1).shape == (2, 3)  # not 4: 0.1 * 30 is just above 3
    assert choose_tokens(torch.rand(2, 7), keep_ratio=0.5).shape == (2, 4)
    assert choose_tokens(score, num_kept=0).shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give num_kept or keep_ratio"),
        ({"num_kept": 1, "keep_ratio": 0.5}, "give num_kept or keep_ratio"),
        ({"num_kept": 12}, r"num_kept must lie in 0\.\.11"),
        ({"keep_ratio": 1.5}, r"keep_ratio must lie in \[0, 1\], got 1.5"),
    ],
)
def test_choose_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_tokens(torch.rand(B, N), **arguments)


def test_select_takes_companions_along(x):
    indices = torch.tensor([[0, 4], [10, 2], [3, 3]])
    positions, shared = torch.arange(B * N).reshape(B, N), torch.arange(N)[None] * 10
    hidden, where, table = select_tokens(indices, x, positions, shared)
    for b in range(B):
        assert torch.equal(hidden[b], x[b, indices[b]])
        assert torch.equal(where[b], positions[b, indices[b]])
        assert torch.equal(table[b], shared[0, indices[b]])
    with pytest.raises(ValueError, match=r"B 3 or 1, got \(2, 11\)"):
        select_tokens(indices, torch.ones(2, N))
    assert torch.autograd.gradcheck(lambda t: select_tokens(indices, t)[0], x.clone().requires_grad_())


def test_put_is_the_inverse_of_select(x):
    indices = torch.tensor([[0, 4], [10, 2], [3, 9]])
    assert torch.equal(put_tokens(x, indices, *select_tokens(indices, x)), x)
    new = torch.zeros(B, 2, C, dtype=torch.float64)
    changed = put_tokens(x, indices, new)
    assert (changed == 0).all(-1).sum() == 6
    leaves = (x.clone().requires_grad_(), new.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda base, tokens: put_tokens(base, indices, tokens), leaves)
    with pytest.raises(ValueError, match=r"tokens must be \(3, 2, 5\)"):
        put_tokens(x, indices, new[:, :1])


def test_pack_and_unpack_ragged(x):
    keep = torch.rand(B, N, generator=torch.Generator().manual_seed(2)) < 0.4
    keep[1] = False  # a sequence that keeps nothing
    packed = pack_tokens(keep, x, torch.arange(B * N).reshape(B, N))
    assert packed.cu_seqlens.tolist() == [0, int(keep[0].sum()), int(keep[0].sum()), int(keep.sum())]
    assert torch.equal(packed.tensors[0], x[keep])
    assert torch.equal(packed.tensors[1], packed.source)
    back = unpack_tokens(packed.tensors[0], packed.source, batch=B, tokens=N, fill=7.0)
    assert torch.equal(back, torch.where(keep[..., None], x, 7.0))
    leaf = packed.tensors[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: unpack_tokens(t, packed.source, batch=B, tokens=N), leaf)
    with pytest.raises(ValueError, match="like keep"):
        pack_tokens(keep, x[:, :4])


def test_merge_is_the_weighted_mean_of_each_segment(x):
    generator = torch.Generator().manual_seed(3)
    segment = torch.randint(-1, 4, (B, N), generator=generator)
    segment[0][segment[0] == 2] = 1  # segment 2 of the first sequence stays empty
    weight = torch.rand(B, N, generator=generator, dtype=torch.float64)
    merged, total = merge_tokens(x, segment, num_segments=4, weight=weight)
    for b in range(B):
        for m in range(4):
            mine = segment[b] == m
            assert total[b, m] == pytest.approx(float(weight[b, mine].sum()))
            if mine.any():
                expected = (weight[b, mine, None] * x[b, mine]).sum(0) / weight[b, mine].sum()
                assert torch.allclose(merged[b, m], expected)
    assert torch.equal(merged[0, 2], torch.zeros(C, dtype=torch.float64))
    plain, count = merge_tokens(x, segment, num_segments=4)
    assert count.sum() == (segment >= 0).sum()
    assert torch.allclose(plain[1, 3], x[1, segment[1] == 3].mean(0))


def test_merge_gradients(x):
    segment = torch.randint(-1, 3, (B, N), generator=torch.Generator().manual_seed(4))
    leaves = (x.clone().requires_grad_(), torch.rand(B, N, dtype=torch.float64).requires_grad_())
    assert torch.autograd.gradcheck(lambda t, w: merge_tokens(t, segment, num_segments=3, weight=w)[0], leaves)


NAN = torch.nan


def test_keep_by_threshold_and_by_number_for_each_sequence():
    score = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.5], [0.0, NAN, -1.0, 0.0, -torch.inf]])
    rows = lambda keep: [row.nonzero()[:, 0].tolist() for row in keep]  # noqa: E731
    assert rows(keep_tokens(score, threshold=0.5)) == [[1, 3], []]
    assert rows(keep_tokens(score, threshold=torch.tensor([0.8, -0.5]))) == [[1, 3], [0, 3]]
    assert rows(keep_tokens(score, num_kept=3)) == [[1, 2, 3], [0, 2, 3]]
    assert rows(keep_tokens(score, num_kept=torch.tensor([1, 9]))) == [[1], [0, 2, 3, 4]]
    assert rows(keep_tokens(score, num_kept=2, threshold=-0.5)) == [[1, 3], [0, 3]]
    text = torch.tensor([[True, True, False, False, False], [True, True, True, True, False]])
    assert rows(keep_tokens(score, num_kept=2, candidates=~text)) == [[2, 3], [4]]
    assert rows(keep_tokens(score, num_kept=1, candidates=~text, forced=text)) == [[0, 1, 3], [0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="give threshold, num_kept or both, got neither"):
        keep_tokens(score)


def test_kept_indices_agree_with_choose_tokens_where_all_keep_alike():
    score = torch.rand(B, N, generator=torch.Generator().manual_seed(5))
    for pad in ("left", "right"):
        indices, valid = kept_indices(keep_tokens(score, num_kept=4), pad=pad)
        assert torch.equal(indices, choose_tokens(score, num_kept=4))
        assert valid.all()


@pytest.mark.parametrize("pad", ["left", "right"])
def test_kept_indices_pad_ragged_sequences(x, pad):
    keep = torch.rand(B, N, generator=torch.Generator().manual_seed(2)) < 0.4
    keep[1] = False
    indices, valid = kept_indices(keep, pad=pad)
    assert indices.shape[1] == keep.sum(1).max()
    for b in range(B):
        assert indices[b, valid[b]].tolist() == keep[b].nonzero()[:, 0].tolist()
        assert len(set(indices[b].tolist())) == indices.shape[1]
        count = int(keep[b].sum())
        assert valid[b, -count if pad == "left" else 0 :][:count].all()
    (kept,) = select_tokens(indices, x)
    assert torch.equal(put_tokens(x, indices, kept), x)
    assert kept_indices(keep[1:2], pad=pad).indices.shape == (1, 0)
    with pytest.raises(ValueError, match="pad must be 'left' or 'right', got 'both'"):
        kept_indices(keep, pad="both")


def test_masks_lose_rows_and_columns():
    indices = torch.tensor([[0, 4, 7], [1, 2, 10], [3, 5, 6]])
    mask = torch.rand(B, 2, N, N, generator=torch.Generator().manual_seed(6))
    chosen = select_mask(indices, mask)
    for b in range(B):
        assert torch.equal(chosen[b], mask[b][:, indices[b]][:, :, indices[b]])
    causal = torch.ones(1, 1, N, N).tril().bool()
    assert torch.equal(select_mask(indices, causal), torch.ones(B, 1, 3, 3).tril().bool())  # order is kept
    assert torch.equal(select_mask(indices, mask[:, :, :1])[2], mask[2][:, :1, indices[2]])
    with pytest.raises(ValueError, match=r"with B 3 or 1, got \(3, 2, 4, 11\)"):
        select_mask(indices, mask[:, :, :4])


def test_attention_over_packed_masked_and_selected_tokens_is_the_same(x):
    """The three ways to drop tokens agree: a mask, a padded selection, and packing."""
    keep = torch.rand(B, N, generator=torch.Generator().manual_seed(2)) < 0.4
    keep[:, 3] = True
    attend = torch.nn.functional.scaled_dot_product_attention
    masked = attend(x[:, None], x[:, None], x[:, None], attn_mask=keep[:, None, None])[:, 0]
    indices, valid = kept_indices(keep)
    (kept,) = select_tokens(indices, x)
    padded = attend(kept[:, None], kept[:, None], kept[:, None], attn_mask=valid[:, None, None])[:, 0]
    packed = pack_tokens(keep, x)
    starts = packed.cu_seqlens.tolist()
    for b in range(B):
        own = packed.tensors[0][starts[b] : starts[b + 1]][None, None]
        assert torch.allclose(attend(own, own, own)[0, 0], masked[b, keep[b]])
        assert torch.allclose(padded[b, valid[b]], masked[b, keep[b]])


def test_repacking_is_packing_what_both_keep(x):
    generator = torch.Generator().manual_seed(7)
    first, second = (torch.rand(B, N, generator=generator) < 0.6 for _ in range(2))
    second[2] = False
    once = pack_tokens(first, x, second)
    again = repack_tokens(once.tensors[1], once.cu_seqlens, once.tensors[0])
    direct = pack_tokens(first & second, x)
    assert torch.equal(again.tensors[0], direct.tensors[0])
    assert torch.equal(again.cu_seqlens, direct.cu_seqlens)
    assert again.cu_seqlens.dtype == torch.int32
    assert torch.equal(once.source[again.source], direct.source)
    with pytest.raises(ValueError, match="like keep"):
        repack_tokens(once.tensors[1], once.cu_seqlens, x)


def test_segment_means_by_hand(x):
    boundaries = torch.tensor([[0, 4, 5, 11], [2, 3, 3, 9], [0, 11, 11, 11]], dtype=torch.int32)
    means = segment_mean(x, boundaries)
    for b in range(B):
        for m in range(3):
            start, end = boundaries[b, m], boundaries[b, m + 1]
            expected = x[b, start:end].mean(0) if start < end else torch.zeros(C, dtype=x.dtype)
            assert torch.allclose(means[b, m], expected)
    assert torch.autograd.gradcheck(lambda t: segment_mean(t, boundaries), x.clone().requires_grad_())
    assert segment_mean(x, boundaries[:, :1]).shape == (B, 0, C)
    with pytest.raises(ValueError, match=r"boundaries must be \(3, M \+ 1\)"):
        segment_mean(x, boundaries[:2])


def test_segment_means_keep_their_digits_behind_a_long_sequence():
    x = 100 + torch.randn(1, 60_000, 2, generator=torch.Generator().manual_seed(8))
    means = segment_mean(x, torch.tensor([[59_990, 60_000]]))
    assert torch.allclose(means[0, 0].double(), x[0, 59_990:].double().mean(0), rtol=1e-6)
    assert segment_mean(x.bfloat16(), torch.tensor([[0, 60_000]])).dtype == torch.bfloat16


def test_what_a_stage_of_pruning_needs_compiles_without_a_break(x):
    def stage(score, hidden, mask):
        indices = choose_tokens(score, num_kept=4)
        keep = keep_tokens(score, threshold=0.2, num_kept=5)
        return *select_tokens(indices, hidden), select_mask(indices, mask), keep, segment_mean(hidden, indices)

    arguments = x[..., 0], x, torch.ones(1, 1, N, N).tril()
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*arguments), stage(*arguments), strict=True):
        assert torch.equal(ours, expected)
