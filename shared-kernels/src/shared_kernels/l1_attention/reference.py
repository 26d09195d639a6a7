"""The definition of l1_attention in plain torch: the whole map, as the paper writes it."""

import math

import torch
from torch import Tensor


def l1_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    power: float | None = None,
    causal: bool = False,
    window: int | None = None,
    key_mask: Tensor | None = None,
    n_keys: Tensor | None = None,
    log_d: float | None = None,
) -> Tensor:
    """See `shared_kernels.l1_attention`."""
    B, H, Nq, D = query.shape
    Nk, group = key.shape[2], H // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)  # float64 stays float64, or gradcheck would mean nothing
    distance = torch.arange(Nq, device=key.device)[:, None] + (Nk - Nq) - torch.arange(Nk, device=key.device)
    seen = torch.ones(B, 1, Nq, Nk, dtype=torch.bool, device=key.device)
    if causal:
        seen = seen & (distance >= 0) & (distance < (Nk + Nq if window is None else window))
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
        key, value = (t.masked_fill(~key_mask[:, None, :, None], 0) for t in (key, value))
    count = seen.sum(-1, keepdim=True) if n_keys is None else n_keys[:, None, :, None]
    count = count.to(wide)
    with torch.autocast(query.device.type, enabled=False):
        keys, values = (t.to(wide).repeat_interleave(group, 1) for t in (key, value))
        cosine = query.to(wide) @ keys.mT
        z = (math.log(D) if log_d is None else log_d) * count.clamp_min(1).log() * cosine
        s = torch.where(seen, torch.nn.functional.softplus(z, threshold=88), 0)
        total = s.sum(-1, keepdim=True)
        a = s / total.masked_fill(total == 0, 1)
        weights = a if power is None else reweighted(a, count, power)
        return (weights @ values).to(query.dtype)


def reweighted(a: Tensor, count: Tensor, power: float) -> Tensor:
    """Powers of what weights exceed the row's mean by, normalised; a itself where nothing but rounding does."""
    u = torch.relu(count * a - (count > 3).to(a.dtype))
    top = u.amax(-1, keepdim=True) if u.shape[-1] else u.new_zeros((*u.shape[:-1], 1))
    flat = top <= 64 * torch.finfo(a.dtype).eps
    y = (u / top.detach().masked_fill(flat, 1)) ** power  # homogeneous: the largest, as a constant, cancels
    return torch.where(flat, a, y / y.sum(-1, keepdim=True).masked_fill(flat, 1))
