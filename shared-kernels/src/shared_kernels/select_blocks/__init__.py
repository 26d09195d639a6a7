"""select_blocks: which key blocks each query block attends to, by the softmax of its mean against theirs.

The selection of SLA (arXiv:2509.24006, section 3.1: a share of the blocks), Rectified SpaAttn (arXiv:2511.19835: at
least a share of them, and as many as hold the mass p), Sparsifiner (arXiv:2303.13755) and DHSA (arXiv:2510.24606), as
lists for `sparse_attention`. Costs a 1 / (block_q * block_k) of the scores of dense attention; nothing of the size
tokens x tokens exists, and no int64 of the size blocks x blocks.

Decided here: means and scores are two reductions and a matrix product that torch does best, also on GPUs; what follows
(softmax, cut, ties, list) is the registered op, one kernel. Forced blocks come on top of those chosen, as in Rectified
SpaAttn and Sparsifiner. Where heads share a list, it is by their mean score; that is the score of the mean query, so
it is no more work than one head. Nothing here is differentiable: lists are integers.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared_kernels import _backend
from shared_kernels._arguments import (
    check_attention,
    check_block_size,
    check_broadcasts,
    check_shape,
    check_tensors,
    check_whole_number,
)
from shared_kernels.select_blocks import reference

NAME = "select_blocks"


class BlockLists(NamedTuple):
    """What `sparse_attention` takes: for every query block the key blocks it sees."""

    indices: Int[Tensor, "B Hl nq m"]
    """int32, ascending, padded with -1."""
    counts: Int[Tensor, "B Hl nq"]
    """int32, how many of the m entries hold."""


_forward = _backend.library_op(
    NAME,
    "forward",
    "(Tensor scores, Tensor? forced, SymInt topk, float? topp) -> (Tensor, Tensor)",
)


@_forward.register_fake
def _(scores: Tensor, forced: Tensor | None, topk: int, topp: float | None) -> tuple[Tensor, Tensor]:
    *rows, n = scores.shape
    width = topk if forced is None and topp is None else n
    return scores.new_empty((*rows, width), dtype=torch.int32), scores.new_empty(rows, dtype=torch.int32)


def choose_blocks(
    scores: Float[Tensor, "B Hl nq nk"],
    *,
    topk: int | float | None = None,
    topp: float | None = None,
    forced: Bool[Tensor, "#B #Hl #nq #nk"] | None = None,
) -> BlockLists:
    """The best-scored key blocks of every query block, as lists; `select_blocks` with scores of one's own.

    `topk` as an integer is a number of blocks, as a float a share of all nk: floor(topk * nk), but at least 1. `topp`
    keeps the fewest blocks, best first, whose softmax exceeds it together. With both, the larger number holds. Ties go
    to the lower index. `forced` blocks are kept on top of these, whatever their score; a score of -inf is kept by
    `forced` alone, and NaN is -inf. To let forced blocks count towards `topk`, give them the score +inf instead.

    Lists have room for m = min(topk, nk) blocks, or for all nk if `topp` or `forced` is given, as their number then
    depends on values; `indices[..., : counts.max()]` cuts them, where waiting for a GPU is no matter. Not
    differentiable. On GPUs, up to 8,192 key blocks.

    Raises TypeError on other dtypes, ValueError on other shapes or devices, neither `topk` nor `topp`, or one out of
    range.
    """
    check_tensors({"scores": scores})
    check_shape("scores", scores, "batch", "list heads", "query blocks", "key blocks")
    _check_choice(topk, topp, forced, tuple(scores.shape), scores.device)
    if _backend.forced == "reference":
        return BlockLists(*reference.choose_blocks(scores, topk=topk, topp=topp, forced=forced))
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    num_keys = scores.shape[-1]
    if topp is not None and topp >= 1.0:  # all of them; a sum that rounds above 1 must not end early
        topk, topp = num_keys, None
    count = _as_count(topk, num_keys)
    return BlockLists(*_forward(scores, None if forced is None else forced.expand(scores.shape), count, topp))


def select_blocks(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    *,
    block_size: tuple[int, int] = (128, 128),
    topk: int | float | None = None,
    topp: float | None = None,
    forced: Bool[Tensor, "#B #Hl #nq #nk"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    list_heads: int | None = None,
) -> BlockLists:
    """Lists of key blocks for `sparse_attention` with the same `block_size` = (block_q, block_k) and `causal`.

    The score of a block of queries and one of keys is scale * mean(query) . mean(key), scale 1/sqrt(D) unless given;
    from scores to lists see `choose_blocks`. nq = ceil(Nq / block_q), nk = ceil(Nk / block_k); the last blocks may be
    shorter and are averaged over what they have. With H > Hkv, heads of queries share heads of keys. `list_heads` Hl is
    H unless given; with Hkv the heads of a group share a list by their mean score, with 1 all heads do.

    `causal` is aligned bottom-right, as in flash attention: query i sees keys up to i + Nk - Nq. A block is allowed if
    any of its queries sees any of its keys; what is not allowed is not chosen nor forced, and rows may have fewer than
    `topk` blocks or none. Means are of whole blocks: if block_k > block_q, whether a block on the diagonal is chosen
    depends on keys behind the queries too, unless `forced` holds the diagonal anyway.

    Not differentiable. Raises TypeError on other dtypes, ValueError on shapes or devices that disagree or
    arguments out of range.
    """
    check_attention(query, key, scale=scale)
    check_block_size(block_size)
    if list_heads not in (None, 1, key.shape[1], query.shape[1]):
        raise ValueError(f"list_heads must be one of {sorted({1, key.shape[1], query.shape[1]})}, got {list_heads}")
    list_heads = query.shape[1] if list_heads is None else list_heads
    blocks = [-(-t.shape[2] // size) for t, size in zip((query, key), block_size, strict=True)]
    _check_choice(topk, topp, forced, (query.shape[0], list_heads, *blocks), query.device)
    if _backend.forced == "reference":
        return BlockLists(*reference.select_blocks(
            query, key, block_size=block_size, topk=topk, topp=topp, forced=forced, causal=causal, scale=scale,
            list_heads=list_heads,
        ))  # fmt: skip
    query_means, key_means = _block_means(query.detach(), block_size[0]), _block_means(key.detach(), block_size[1])
    scores = _shared_scores(query_means, key_means, list_heads) * (query.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        allowed = _allowed(query.shape[2], key.shape[2], block_size, query.device)
        scores = scores.masked_fill(~allowed, -torch.inf)
        forced = None if forced is None else forced & allowed
    return choose_blocks(scores, topk=topk, topp=topp, forced=forced)


def _block_means(x: Tensor, size: int) -> Tensor:
    whole = x.shape[2] // size
    wide = torch.promote_types(x.dtype, torch.float32)
    means = x[:, :, : whole * size].unflatten(2, (whole, size)).mean(3, dtype=wide)
    if whole * size == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole * size :].mean(2, keepdim=True, dtype=wide)], 2)


def _shared_scores(query: Tensor, key: Tensor, list_heads: int) -> Tensor:
    """query . key of the means, averaged over the heads that share a list: as products of averaged queries."""
    H, Hkv = query.shape[1], key.shape[1]
    groups = query.unflatten(1, (Hkv, H // Hkv))
    with torch.autocast(query.device.type, enabled=False):
        if list_heads == H:
            return (groups @ key.mT.unsqueeze(2)).flatten(1, 2)
        own = groups.mean(2)
        if list_heads == Hkv:
            return own @ key.mT
        # the sum over heads of keys is one product over all their dimensions
        own, key = (t.transpose(1, 2).flatten(2).unsqueeze(1) for t in (own, key))
        return own @ key.mT / Hkv


def _allowed(num_queries: int, num_keys: int, block_size: tuple[int, int], device: torch.device) -> Tensor:
    """(nq, nk): whether the last query of a block sees the first key of another."""
    ends = torch.arange(1, -(-num_queries // block_size[0]) + 1, device=device) * block_size[0]
    seen = ends.clamp(max=num_queries) + (num_keys - num_queries)
    return torch.arange(0, num_keys, block_size[1], device=device) < seen[:, None]


def _as_count(topk: int | float | None, num_keys: int) -> int:
    """Blocks to keep at least; the small term keeps 0.29 * 100 = 28.999999999999996 at 29."""
    if topk is None:
        return 0
    return max(1, int(topk * num_keys + 1e-9)) if isinstance(topk, float) else min(topk, num_keys)


def _check_choice(
    topk: int | float | None, topp: float | None, forced: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> None:
    if topk is None and topp is None:
        raise ValueError("give topk, topp or both, got neither")
    if isinstance(topk, float):
        if not 0.0 < topk <= 1.0:
            raise ValueError(f"topk as a share must lie in (0, 1], got {topk}")
    elif topk is not None:
        check_whole_number("topk", topk, 0)
    if topp is not None and not 0.0 <= topp <= 1.0:
        raise ValueError(f"topp must lie in [0, 1], got {topp}")
    if forced is not None:
        check_tensors({"forced": forced}, torch.bool, device=device)
        check_broadcasts("forced", forced, *shape)
