"""The definition of sparse_attention in plain torch; the oracle of its tests."""

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_kernels.sparse_attention.lists import TransposedLists, listed


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    block_size: tuple[int, int] = (128, 128),
    causal: bool = False,
    scale: float | None = None,
    row_scale: Tensor | None = None,
    row_bias: Tensor | None = None,
    transposed: TransposedLists | None = None,  # noqa: ARG001 - says nothing that indices do not
    return_lse: bool = False,
    validate: bool = False,  # noqa: ARG001 - the face has checked
) -> Tensor | tuple[Tensor, Tensor]:
    """See `shared_kernels.sparse_attention`."""
    acc = torch.promote_types(query.dtype, torch.float32)  # float64 stays float64, or gradcheck would mean nothing
    (B, H, Nq, D), Nk, (block_q, block_k) = query.shape, key.shape[2], block_size
    nq = indices.shape[2]
    rows = torch.arange(nq * block_q, device=query.device).view(nq, block_q, 1)
    keys, there = _listed_keys(indices.repeat_interleave(H // indices.shape[1], 1), counts, H, Nk, block_k)
    allowed = there[..., None, :].expand(B, H, nq, block_q, -1)
    if causal:
        allowed = allowed & (keys[..., None, :] <= rows + Nk - Nq)
    chosen_key, chosen_value = (_chosen(t.to(acc), keys, there, H) for t in (key, value))
    queries = F.pad(query.to(acc), (0, 0, 0, nq * block_q - Nq)).view(B, H, nq, block_q, D)
    scores = queries @ chosen_key.mT * (D**-0.5 if scale is None else scale)
    empty = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    out = scores.softmax(-1).masked_fill(~allowed, 0.0) @ chosen_value
    if row_scale is not None:
        out = row_scale.to(acc)[..., None, None] * out
    if row_bias is not None:
        out = out + row_bias.to(acc)[..., None, :]
    out, lse = out.flatten(2, 3)[:, :, :Nq].to(query.dtype), lse.flatten(2, 3)[:, :, :Nq]
    return (out.contiguous(), lse.contiguous()) if return_lse else out.contiguous()


def _listed_keys(indices: Tensor, counts: Tensor | None, H: int, Nk: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Listed keys of every query block (B, H, nq, m * block_k), and which of them are there."""
    if counts is not None:
        counts = counts.repeat_interleave(H // counts.shape[1], 1)
    keys = indices[..., None].long() * block_k + torch.arange(block_k, device=indices.device)
    there = (listed(indices, counts)[..., None] & (keys < Nk)).flatten(-2)
    return keys.flatten(-2), there


def _chosen(tensor: Tensor, keys: Tensor, there: Tensor, H: int) -> Tensor:
    """Rows of (B, Hkv, Nk, D) at the listed keys, (B, H, nq, n, D); zeros, and no gradient, where there is none."""
    padded = F.pad(tensor, (0, 0, 0, 1)).repeat_interleave(H // tensor.shape[1], 1)  # the last row: no key
    flat = keys.where(there, padded.shape[2] - 1).flatten(2)[..., None].expand(-1, -1, -1, tensor.shape[3])
    return padded.gather(2, flat).unflatten(2, keys.shape[2:])
