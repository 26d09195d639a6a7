"""The definition of select_blocks and choose_blocks in plain torch; the oracle of their tests."""

import math

import torch
from torch import Tensor


def choose_blocks(
    scores: Tensor, *, topk: int | float | None = None, topp: float | None = None, forced: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `shared_kernels.choose_blocks`."""
    num_keys = scores.shape[-1]
    wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    wide = wide.nan_to_num(nan=-torch.inf, posinf=torch.finfo(wide.dtype).max, neginf=-torch.inf)
    ranked, order = wide.sort(dim=-1, descending=True, stable=True)
    if topk is None or isinstance(topk, int):
        at_least = min(topk or 0, num_keys)
    else:
        at_least = max(1, math.floor(topk * num_keys + 1e-9))
    wanted = torch.full(scores.shape[:-1], at_least, device=scores.device)
    if topp is not None:
        within = ranked.softmax(-1).cumsum(-1) <= topp if topp < 1 else torch.ones_like(ranked, dtype=torch.bool)
        wanted = wanted.maximum(within.sum(-1) + 1)
    places = torch.arange(num_keys, device=scores.device)
    chosen = (places < wanted[..., None]) & (ranked > -torch.inf)
    keep = torch.zeros_like(chosen).scatter(-1, order, chosen)
    if forced is not None:
        keep = keep | forced
    width = at_least if topp is None and forced is None else num_keys
    listed = places.expand(keep.shape).masked_fill(~keep, num_keys).sort(-1).values[..., :width]
    return listed.masked_fill(listed == num_keys, -1).int(), keep.sum(-1).int()


def select_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block_size: tuple[int, int] = (128, 128),
    topk: int | float | None = None,
    topp: float | None = None,
    forced: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    list_heads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `shared_kernels.select_blocks`."""
    acc = torch.promote_types(query.dtype, torch.float32)  # float64 stays float64
    H, Nq, Nk = query.shape[1], query.shape[2], key.shape[2]
    q_blocks = query.detach().to(acc).split(block_size[0], 2)
    k_blocks = key.detach().to(acc).repeat_interleave(H // key.shape[1], 1).split(block_size[1], 2)
    if Nq == 0 or Nk == 0:
        scores = query.new_zeros((*query.shape[:2], -(-Nq // block_size[0]), -(-Nk // block_size[1])), dtype=acc)
    else:
        q_means, k_means = (torch.stack([block.mean(2) for block in blocks], 2) for blocks in (q_blocks, k_blocks))
        with torch.autocast(query.device.type, enabled=False):
            scores = (q_means @ k_means.mT) * (query.shape[3] ** -0.5 if scale is None else scale)
    scores = scores.unflatten(1, (list_heads or H, -1)).mean(2)
    if causal:
        seen = torch.arange(Nk, device=query.device) <= torch.arange(Nq, device=query.device)[:, None] + (Nk - Nq)
        rows = [block.any(0) for block in seen.split(block_size[0])]
        allowed = torch.stack([torch.stack([part.any() for part in row.split(block_size[1])]) for row in rows])
        scores = scores.masked_fill(~allowed, -torch.inf)
        forced = None if forced is None else forced & allowed
    return choose_blocks(scores, topk=topk, topp=topp, forced=forced)
