"""Choosing, gathering, packing, merging and putting back tokens: what every token-pruning method is made of.

Plain differentiable torch: a gather of whole rows is bound by memory, on CPUs and GPUs alike, and a kernel of our own
wins nothing over `index_select` and `embedding_bag`.

Shapes: B sequences, N tokens each, K kept tokens, T packed tokens of all sequences, M merged tokens.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def choose_tokens(
    score: Float[Tensor, "B N"],
    *,
    num_kept: int | None = None,
    keep_ratio: float | None = None,
    forced: Bool[Tensor, "B N"] | None = None,
) -> Int[Tensor, "B K"]:
    """The positions of the highest scores of every sequence, in sequence order; ties go to the lower position.

    Give either `num_kept` (K) or `keep_ratio` (K = ceil(ratio * N)). Tokens of `forced` are kept whatever their score
    (class token, registers) and count towards K. NaN scores are refused by ranking last. Raises ValueError if both or
    neither of the two are given, or K is outside 0..N.
    """
    if (num_kept is None) == (keep_ratio is None):
        raise ValueError(f"give num_kept or keep_ratio, got num_kept={num_kept} and keep_ratio={keep_ratio}")
    tokens = score.shape[-1]
    if keep_ratio is not None:
        if not 0.0 <= keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio must lie in [0, 1], got {keep_ratio}")
        # -(-a // b) is the ceiling; the small term keeps 0.1 * 30 = 3.0000000000000004 at 3
        num_kept = int(-(-(keep_ratio * tokens - 1e-9) // 1))
    if num_kept is None or not 0 <= num_kept <= tokens:
        raise ValueError(f"num_kept must lie in 0..{tokens}, the number of tokens, got {num_kept}")
    rank = score.detach().masked_fill(score.isnan(), -torch.inf)
    if forced is not None:
        rank = rank.masked_fill(forced, torch.inf)
    order = torch.sort(rank, dim=-1, descending=True, stable=True).indices[..., :num_kept]
    return order.sort(dim=-1).values


def select_tokens(indices: Int[Tensor, "B K"], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows `indices` of every tensor (B, N, ...) as (B, K, ...): hidden states, positions, cos and sin, masks alike.

    A tensor whose first dimension is 1 is shared by all sequences. Differentiable. One flat `index_select` per tensor.
    Raises ValueError on a tensor whose first dimension is neither B nor 1; indices are not read for the check.
    """
    B, K = indices.shape
    selected = []
    for x in tensors:
        if x.ndim < 2 or x.shape[0] not in (1, B):
            raise ValueError(f"every tensor must be (B, N, ...) with B {B} or 1, got {tuple(x.shape)}")
        N = x.shape[1]
        offset = torch.arange(B, device=indices.device)[:, None] * (N if x.shape[0] == B else 0)
        flat = x.reshape(-1, *x.shape[2:]).index_select(0, (indices + offset).reshape(-1))
        selected.append(flat.reshape(B, K, *x.shape[2:]))
    return tuple(selected)


def put_tokens(
    base: Float[Tensor, "B N C"], indices: Int[Tensor, "B K"], tokens: Float[Tensor, "B K C"]
) -> Float[Tensor, "B N C"]:
    """A copy of `base` with `tokens` at `indices` (distinct within a sequence): the inverse of `select_tokens`.

    Differentiable in both: overwritten rows of `base` get gradient 0.
    """
    if tokens.shape != (*indices.shape, base.shape[-1]):
        raise ValueError(f"tokens must be {(*indices.shape, base.shape[-1])}, got {tuple(tokens.shape)}")
    return base.scatter(1, indices[..., None].expand_as(tokens), tokens.to(base.dtype))


class PackedTokens(NamedTuple):
    """Ragged sequences end to end."""

    tensors: tuple[Tensor, ...]
    """Each (T, ...), in sequence order."""
    cu_seqlens: Int[Tensor, "B+1"]
    """int32 starts of the sequences in T, and T at the end: the form that variable-length attention takes."""
    source: Int[Tensor, "T"]
    """Where each packed token came from, in the flat (B * N)."""


def pack_tokens(keep: Bool[Tensor, "B N"], *tensors: Tensor) -> PackedTokens:
    """The tokens where `keep` is true, of every tensor (B, N, ...), end to end without padding; counts may differ.

    Differentiable; reads how many tokens are kept, so a GPU synchronises once. Raises ValueError on other shapes.
    """
    for x in tensors:
        if x.shape[:2] != keep.shape:
            raise ValueError(f"every tensor must be {tuple(keep.shape)} + (...), like keep, got {tuple(x.shape)}")
    index = keep.reshape(-1).nonzero().squeeze(1)
    starts = torch.zeros(keep.shape[0] + 1, dtype=torch.int32, device=keep.device)
    starts[1:] = keep.sum(dim=1).cumsum(0)
    packed = tuple(x.reshape(-1, *x.shape[2:]).index_select(0, index) for x in tensors)
    return PackedTokens(packed, starts, index)


def unpack_tokens(
    packed: Float[Tensor, "T C"], index: Int[Tensor, "T"], *, batch: int, tokens: int, fill: float = 0.0
) -> Float[Tensor, "B N C"]:
    """Packed tokens back at their places in (batch, tokens, C); dropped places hold `fill`. Differentiable."""
    if packed.shape[0] != index.shape[0]:
        raise ValueError(f"packed has {packed.shape[0]} tokens but index {index.shape[0]}")
    flat = packed.new_full((batch * tokens, *packed.shape[1:]), fill)
    return flat.index_copy(0, index, packed).reshape(batch, tokens, *packed.shape[1:])


def merge_tokens(
    x: Float[Tensor, "B N C"],
    segment: Int[Tensor, "B N"],
    *,
    num_segments: int,
    weight: Float[Tensor, "B N"] | None = None,
) -> tuple[Float[Tensor, "B M C"], Float[Tensor, "B M"]]:
    """Weighted means of the tokens of each segment 0..M-1 (-1: dropped), and each segment's total weight.

    y_m = sum_{i in m} w_i x_i / sum_{i in m} w_i; a segment of weight 0 gives 0. Differentiable in x and weight.
    Sums run in token order over a stable sort, so results are bit-stable on GPUs, where `scatter_add` is not.
    Raises ValueError if shapes disagree; segments are not read for the check.
    """
    if segment.shape != x.shape[:2] or (weight is not None and weight.shape != x.shape[:2]):
        raise ValueError(f"segment and weight must be {tuple(x.shape[:2])}, like x without channels")
    B, N, C = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    weight = x.new_ones((B, N), dtype=acc) if weight is None else weight.to(acc)
    # dropped tokens go to one extra segment behind the others
    group = torch.where(segment < 0, num_segments, segment).long()
    flat = (group + torch.arange(B, device=x.device)[:, None] * (num_segments + 1)).reshape(-1)
    flat, order = torch.sort(flat, stable=True)
    starts = torch.searchsorted(flat, torch.arange(B * (num_segments + 1), device=x.device))
    values = torch.cat([x.to(acc), torch.ones_like(weight)[..., None]], dim=-1).reshape(B * N, C + 1)
    sums = torch.nn.functional.embedding_bag(
        order, values, starts, mode="sum", per_sample_weights=weight.reshape(-1)[order]
    ).reshape(B, num_segments + 1, C + 1)[:, :num_segments]
    total = sums[..., C]
    merged = sums[..., :C] / total.masked_fill(total == 0, 1.0)[..., None]
    return merged.masked_fill((total == 0)[..., None], 0.0).to(x.dtype), total
