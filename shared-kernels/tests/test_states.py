"""merge_states against softmax over all keys at once, with empty sides and gradients through the LSE."""

import pytest
import torch

from shared_kernels.states import merge_states

INF = float("inf")


def attend(scores, values):
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def test_two_parts_make_the_whole():
    torch.manual_seed(0)
    scores, values = torch.randn(3, 5, 11) * 30, torch.randn(3, 11, 7)
    out, lse = merge_states(*attend(scores[..., :4], values[:, :4]), *attend(scores[..., 4:], values[:, 4:]))
    whole, whole_lse = attend(scores.double(), values.double())
    assert torch.allclose(out.double(), whole, atol=1e-5)
    assert torch.allclose(lse.double(), whole_lse, atol=1e-5)


def test_an_empty_side_counts_nothing_and_two_give_zero():
    out, lse = torch.randn(4, 3), torch.tensor([0.5, -INF, 2.0, -INF])
    other, other_lse = torch.full((4, 3), torch.nan), torch.full((4,), -INF)
    merged, merged_lse = merge_states(out, lse, other, other_lse)
    assert torch.equal(merged[[0, 2]], out[[0, 2]])
    assert torch.equal(merged[[1, 3]], torch.zeros(2, 3))
    assert torch.equal(merged_lse, lse)
    swapped, _ = merge_states(other, other_lse, out, lse)
    assert torch.equal(swapped, merged)


def test_gradients_also_through_the_lse_and_zero_without_keys():
    torch.manual_seed(1)
    out_a, out_b = torch.randn(2, 6, 3, dtype=torch.float64)
    lse_a, lse_b = torch.randn(2, 6, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (out_a, lse_a, out_b, lse_b)]
    assert torch.autograd.gradcheck(merge_states, leaves)
    none = torch.full((6,), -INF, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (out_a, none, out_b, none)]
    out, lse = merge_states(*leaves)
    gradients = torch.autograd.grad(out.sum() + lse.masked_fill(lse.isinf(), 0).sum(), leaves)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"\(\*rows, D\).*got \(2, 3\), \(2, 4\)"):
        merge_states(torch.ones(2, 3), torch.ones(2), torch.ones(2, 4), torch.ones(2))
