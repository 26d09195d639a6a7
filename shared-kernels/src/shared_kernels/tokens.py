"""Choosing, gathering, packing, merging and putting back tokens: what every token-pruning method is made of.

Plain differentiable torch: a gather of whole rows is bound by memory, on CPUs and GPUs alike, and a kernel of our own
wins nothing over `index_select` and `embedding_bag`.

The ways through, each with gradients and with positions, cos and sin and masks travelling along:
- the same number of every sequence: `choose_tokens`, `select_tokens` (`select_mask` for masks), `put_tokens`;
- different numbers, end to end: `keep_tokens`, `pack_tokens`, `repack_tokens` at later stages, `unpack_tokens`;
- different numbers, padded: `keep_tokens`, `kept_indices`, `select_tokens`.

Shapes: B sequences, N tokens each, K kept tokens, T packed tokens of all sequences, M merged tokens or segments.
"""

from typing import Literal, NamedTuple

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


def keep_tokens(
    score: Float[Tensor, "B N"],
    *,
    threshold: float | Float[Tensor, "B"] | None = None,
    num_kept: int | Int[Tensor, "B"] | None = None,
    candidates: Bool[Tensor, "B N"] | None = None,
    forced: Bool[Tensor, "B N"] | None = None,
) -> Bool[Tensor, "B N"]:
    """Which tokens stay, where sequences may keep different numbers: a mask for `pack_tokens` or `kept_indices`.

    A token stays if its score is above `threshold` and among the `num_kept` highest of its sequence (all that there
    are, if fewer); give either or both, for all sequences or one for each. Ties go to the lower position. Where
    `candidates` is false (text, padding) the answer is false and nothing counts towards `num_kept`; `forced` tokens
    stay whatever their score, on top of the rest. NaN scores do not stay. Not differentiable; no host synchronisation.

    Raises ValueError if neither of the two is given.
    """
    if threshold is None and num_kept is None:
        raise ValueError("give threshold, num_kept or both, got neither")
    score = score.detach()
    eligible = ~score.isnan() if candidates is None else candidates & ~score.isnan()
    keep = eligible
    if threshold is not None:
        keep = keep & (score > (threshold[:, None] if isinstance(threshold, Tensor) else threshold))
    if num_kept is not None:
        # the best first, and behind them what may not stay
        order = torch.sort(score.masked_fill(~eligible, -torch.inf), dim=1, descending=True, stable=True).indices
        order = order.gather(1, torch.sort(~eligible.gather(1, order), dim=1, stable=True).indices)
        places = torch.arange(score.shape[1], device=score.device).expand_as(order)
        best = places < (num_kept[:, None] if isinstance(num_kept, Tensor) else num_kept)
        keep = keep & torch.zeros_like(keep).scatter(1, order, best)
    return keep if forced is None else keep | forced


class KeptIndices(NamedTuple):
    """Kept tokens of ragged sequences, padded to the longest."""

    indices: Int[Tensor, "B K"]
    """Positions in sequence order; padding names dropped tokens of the sequence, so all of a row are distinct."""
    valid: Bool[Tensor, "B K"]
    """False for padding."""


def kept_indices(keep: Bool[Tensor, "B N"], *, pad: Literal["left", "right"] = "left") -> KeptIndices:
    """A mask of kept tokens as indices for `select_tokens`, `select_mask` and `put_tokens`.

    K is what the fullest sequence keeps; reading it synchronises a GPU once. Decoding needs padding on the left, where
    it is by default. Raises ValueError on another `pad`.
    """
    if pad not in ("left", "right"):
        raise ValueError(f"pad must be 'left' or 'right', got {pad!r}")
    N = keep.shape[1]
    count = keep.sum(dim=1, keepdim=True)
    K = int(count.max()) if keep.numel() else 0
    places = torch.arange(K, device=keep.device)
    order = torch.sort(keep, dim=1, descending=pad == "right", stable=True).indices
    if pad == "right":
        return KeptIndices(order[:, :K], places < count)
    return KeptIndices(order[:, N - K :], places >= K - count)


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


def select_mask(indices: Int[Tensor, "B K"], mask: Tensor) -> Tensor:
    """Rows and columns `indices` of attention masks (B, heads, N, N), as (B, heads, K, K).

    Boolean or additive; of (B, heads, 1, N), columns only. A first dimension of 1 is shared by all sequences. Raises
    ValueError on other shapes.
    """
    B = indices.shape[0]
    if mask.ndim != 4 or mask.shape[0] not in (1, B) or mask.shape[2] not in (1, mask.shape[3]):
        raise ValueError(f"mask must be (B, heads, N, N) or (B, heads, 1, N) with B {B} or 1, got {tuple(mask.shape)}")
    mask = mask.expand(B, -1, -1, -1)
    if mask.shape[2] > 1:
        mask = mask.gather(2, indices[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask.gather(3, indices[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))


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
    """Where each packed token came from, in the flat (B * N), or in what was packed before."""


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


def repack_tokens(keep: Bool[Tensor, "T"], cu_seqlens: Int[Tensor, "B+1"], *tensors: Tensor) -> PackedTokens:
    """`pack_tokens` of what is packed already, tensors (T, ...): the next stage of pruning.

    Differentiable; synchronises a GPU once. Raises ValueError on tensors that do not begin like keep.
    """
    for x in tensors:
        if x.shape[:1] != keep.shape:
            raise ValueError(f"every tensor must be {tuple(keep.shape)} + (...), like keep, got {tuple(x.shape)}")
    index = keep.nonzero().squeeze(1)
    before = torch.zeros(keep.shape[0] + 1, dtype=torch.int32, device=keep.device)
    before[1:] = keep.cumsum(0)
    return PackedTokens(tuple(x.index_select(0, index) for x in tensors), before[cu_seqlens.long()], index)


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


def segment_mean(x: Float[Tensor, "B N C"], boundaries: Int[Tensor, "B M+1"]) -> Float[Tensor, "B M C"]:
    """Means of runs of tokens: segment m of a sequence is boundaries[m] up to, not with, boundaries[m + 1].

    Boundaries ascend within 0..N; a segment without tokens, as padding makes it, gives 0, and tokens before the first
    or behind the last boundary count nowhere. Summed by segment in float32 at least: faster than the difference of
    prefix sums (DHSA, arXiv:2510.24606), which loses digits on long sequences. Differentiable in x. Raises ValueError
    if shapes disagree; boundaries are not read for the check.
    """
    B, N, C = x.shape
    if boundaries.ndim != 2 or boundaries.shape[0] != B or boundaries.shape[1] < 1:
        raise ValueError(f"boundaries must be ({B}, M + 1) for x of {B} sequences, got {tuple(boundaries.shape)}")
    # two more segments per sequence, before the first boundary and behind the last, hold what counts nowhere
    starts = torch.nn.functional.pad(boundaries.long(), (1, 0)) + torch.arange(B, device=x.device)[:, None] * N
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(B * N, C)
    tokens = torch.arange(B * N, device=x.device)
    means = torch.nn.functional.embedding_bag(tokens, wide, starts.reshape(-1), mode="mean")
    return means.reshape(B, -1, C)[:, 1:-1].to(x.dtype)
