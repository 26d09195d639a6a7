"""Joining partial softmax results: what makes attention over a union of key sets out of attention over its parts."""

import torch
from jaxtyping import Float
from torch import Tensor


def merge_states(
    out_a: Float[Tensor, "*rows D"],
    lse_a: Float[Tensor, "*rows"],
    out_b: Float[Tensor, "*rows D"],
    lse_b: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows"]]:
    """Join two softmax results over disjoint keys into the result over both.

    `out` is the softmax-weighted sum of values over one set of keys, `lse` the log-sum-exp of its scores; the result is
    differentiable in all four, and is the two outputs weighted by exp(lse). A side without keys (LSE -inf) counts
    nothing, whatever its output holds; no key on either side gives output 0, LSE -inf and gradients 0.

    The output has out_a's dtype, the LSE at least float32. Raises ValueError if shapes disagree.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or out_a.shape[:-1] != lse_a.shape:
        raise ValueError(
            "out_a and out_b must be (*rows, D) with lse_a and lse_b (*rows), got "
            f"{tuple(out_a.shape)}, {tuple(out_b.shape)}, {tuple(lse_a.shape)}, {tuple(lse_b.shape)}"
        )
    acc = torch.promote_types(out_a.dtype, torch.float32)  # float64 stays float64, or gradcheck would mean nothing
    lse_a, lse_b = lse_a.to(acc), lse_b.to(acc)
    top = torch.maximum(lse_a, lse_b)
    empty = top == -torch.inf
    top = top.masked_fill(empty, 0.0)
    gap_a, gap_b = torch.exp(lse_a - top), torch.exp(lse_b - top)  # the larger is 1, the other at most 1
    total = (gap_a + gap_b).masked_fill(empty, 1.0)
    share_b = (gap_b / total).unsqueeze(-1)
    # a side without keys may hold anything, NaN included, where its share is 0
    none_a, none_b = (lse_a == -torch.inf).unsqueeze(-1), (lse_b == -torch.inf).unsqueeze(-1)
    out = torch.lerp(out_a.to(acc).masked_fill(none_a, 0.0), out_b.to(acc).masked_fill(none_b, 0.0), share_b)
    return out.to(out_a.dtype), (top + total.log()).masked_fill(empty, -torch.inf)
