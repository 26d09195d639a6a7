"""The definitions of attention_received, attention_given and attention_argmax: the whole map, then its sums."""

from collections.abc import Sequence

import torch
from torch import Tensor

Rows = slice | Tensor | None
Heads = Sequence[int] | None


def scores(
    query: Tensor,
    key: Tensor,
    *,
    rows: Rows = None,
    heads: Heads = None,
    causal: bool = False,
    window: int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores (B, h, R, Nk) of the chosen rows, and which of them count."""
    B, H, Nq, D = query.shape
    Nk = key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)  # float64 stays float64, or gradcheck would mean nothing
    key = key.to(wide).repeat_interleave(H // key.shape[1], 1)
    with torch.autocast(query.device.type, enabled=False):
        if key_mask is not None:
            key = key.masked_fill(~key_mask[:, None, :, None], 0)
        s = query.to(wide) @ key.mT * (D**-0.5 if scale is None else scale)
    distance = torch.arange(Nq, device=key.device)[:, None] + (Nk - Nq) - torch.arange(Nk, device=key.device)
    visible = torch.ones(B, H, Nq, Nk, dtype=torch.bool, device=key.device)
    if causal:
        visible = visible & (distance >= 0)
        if window is not None:
            visible = visible & (distance < window)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    return chosen(s, rows, heads), chosen(visible, rows, heads)


def chosen(tensor: Tensor, rows: Rows, heads: Heads) -> Tensor:
    """Heads and rows of (B, H, Nq, ...)."""
    if heads is not None:
        tensor = tensor[:, list(heads)]
    if rows is None:
        return tensor
    if isinstance(rows, slice) or rows.ndim == 1:
        return tensor[:, :, rows]
    return torch.stack([t[:, r] for t, r in zip(tensor, rows, strict=True)])


def log_sum_exp(s: Tensor, visible: Tensor) -> Tensor:
    """Over the visible keys; a row without any: -inf, gradient 0."""
    empty = ~visible.any(-1, keepdim=True)
    s = s.masked_fill(~visible, -torch.inf).masked_fill(empty, 0)
    return s.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)


def probabilities(s: Tensor, visible: Tensor, lse: Tensor) -> Tensor:
    """exp(s - lse) at visible keys, 0 elsewhere and in rows without any."""
    none = (lse == -torch.inf)[..., None]
    return torch.exp(s.masked_fill(~visible, -torch.inf) - lse[..., None].masked_fill(none, 0))


def attention_received(
    query: Tensor,
    key: Tensor,
    *,
    rows: Rows = None,
    heads: Heads = None,
    row_weights: Tensor | None = None,
    lse: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    key_mask: Tensor | None = None,
    columns: slice | None = None,
    reduce: str = "sum",
    scale: float | None = None,
) -> Tensor:
    """See `shared_kernels.attention_received`."""
    s, visible = scores(
        query, key, rows=rows, heads=heads, causal=causal, window=window, key_mask=key_mask, scale=scale
    )
    lse = log_sum_exp(s, visible) if lse is None else chosen(lse.to(s.dtype), rows, heads)
    weights = s.new_ones(s.shape[:3]) if row_weights is None else row_weights.to(s.dtype).expand(s.shape[:3])
    received = (weights[..., None] * probabilities(s, visible, lse)).sum(2)
    if reduce == "mean":
        # a key that is masked is seen like any other, by rows that get nothing from it
        _, seen = scores(query, key, rows=rows, heads=heads, causal=causal, window=window)
        total = (weights[..., None] * seen).sum(2)
        received = received / total.masked_fill(total == 0, 1)
    return received if columns is None else received[..., columns]


def attention_given(
    query: Tensor,
    key: Tensor,
    reduce: str,
    *,
    groups: Tensor | None = None,
    num_groups: int | None = None,
    rows: Rows = None,
    heads: Heads = None,
    causal: bool = False,
    window: int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `shared_kernels.attention_given`."""
    s, visible = scores(
        query, key, rows=rows, heads=heads, causal=causal, window=window, key_mask=key_mask, scale=scale
    )
    lse = log_sum_exp(s, visible)
    if reduce == "lse":
        return lse
    p = probabilities(s, visible, lse)
    if reduce == "entropy":
        log_p = (s - lse[..., None]).masked_fill(~visible, 0)  # not p.log(): p may be 0
        return -(p * log_p).sum(-1)
    members = [] if groups is None else [groups == group for group in range(num_groups or 0)]
    return torch.stack([(p * member[:, None, None]).sum(-1) for member in members], -1)


def attention_argmax(
    query: Tensor,
    key: Tensor,
    *,
    rows: Rows = None,
    heads: Heads = None,
    causal: bool = False,
    window: int | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """See `shared_kernels.attention_argmax`."""
    s, visible = scores(query, key, rows=rows, heads=heads, causal=causal, window=window, key_mask=key_mask)
    if s.shape[-1] == 0:
        return s.new_full(s.shape[:3], -1, dtype=torch.int64)
    s = s.masked_fill(~visible, -torch.inf)
    positions = torch.arange(s.shape[-1], device=s.device)
    first = torch.where(s == s.amax(-1, keepdim=True), positions, s.shape[-1]).amin(-1)
    return first.masked_fill(~visible.any(-1), -1)
