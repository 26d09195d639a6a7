"""Token functions against loops, with gradients, ties, empty rows and refused arguments."""

import pytest
import torch

from shared_kernels.tokens import choose_tokens, merge_tokens, pack_tokens, put_tokens, select_tokens, unpack_tokens

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
