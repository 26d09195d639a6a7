"""Rectified SpaAttn: block-sparse attention that gives back what dropping blocks takes (arXiv:2511.19835).

Plain block-sparse attention lets the softmax over the kept blocks sum to one, so kept weights come out too large and
dropped blocks count nothing. This method estimates the attention between blocks from their means, and
- scales the sparse output of a query block by the share of attention that its kept blocks would have had (isolated
  pooling attention reallocation, IPAR: text is not pooled, and a pooled column stands for as many tokens as it has),
- adds the pooled values of dropped blocks, weighted by their estimated attention, where the estimate is larger than
  the error of pooling (gain-aware pooling rectification, GAPR).
Both parts together always weigh one.

Decided here: blocks are averaged over the tokens they have, and weighted by that number, so a shorter last block is
not pulled towards zero. The share of blocks that the estimate is rejected for stays with the kept ones, as in the
authors' code (the paper's figure can be read otherwise): `conserve_mass`. Text is one column that takes part in the
cut by mass, as there; the share of blocks is of visual ones, where that code lets text take one of their places.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffusion_attn.visual_attention import TextKeys, attend_blocks, block_sizes, listed_blocks
from shared_kernels import BlockLists, block_stats, choose_blocks


@dataclass(frozen=True, kw_only=True)
class RectifiedSparseConfig:
    """What is kept, and which rectifications are made. Defaults are those of the paper's Wan 2.1."""

    density: float = 0.25
    """Share of the visual key blocks that every query block keeps at least (1 - the paper's drop rate)."""
    topp: float = 0.3
    """Keeps as many blocks, best first, as together exceed this share of the estimated attention; 0: no more."""
    block_size: int = 128
    """Tokens of a block."""
    reallocation: bool = True
    """IPAR: a pooled column counts as often as it has tokens. Without it, text counts for too much."""
    correction: bool = True
    """GAPR: pooled values of dropped blocks are added where this gains."""
    conserve_mass: bool = True
    """The share of blocks that are neither kept nor added stays with the kept ones; else it is lost."""
    neighbors: bool = True
    """Keeps blocks that touch the query block in space or time."""
    first_frame: Literal["off", "frame", "curve"] = "off"
    """Keeps, among the blocks of the first frame, each other: "frame" those that hold its tokens (image to video);
    "curve" as many at the start of the order, as the authors' code does for Wan."""
    order: Literal["gilbert", "raster"] = "gilbert"
    """How tokens are brought into blocks, see `token_order`."""

    def __post_init__(self) -> None:
        """Raises ValueError on values out of range."""
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")
        if not 0 <= self.topp <= 1:
            raise ValueError(f"topp must lie in [0, 1], got {self.topp}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.first_frame not in ("off", "frame", "curve"):
            raise ValueError(f"first_frame must be 'off', 'frame' or 'curve', got {self.first_frame!r}")
        if self.order not in ("gilbert", "raster"):
            raise ValueError(f"order must be 'gilbert' or 'raster', got {self.order!r}")


class Estimate(NamedTuple):
    """Attention between N blocks as estimated from their means, before anything is dropped.

    attention: (B, H, N, N), or N + 1 columns where there is text, which is the last; rows sum to 1.
    gains: (B, H, N, N), whether pooling a pair of blocks gains more than it errs.
    values: (B, H, N, E), means of the values.
    """

    attention: Float[Tensor, "B H N M"]
    gains: Bool[Tensor, "B H N N"]
    values: Float[Tensor, "B H N E"]


def rectified_sparse_attention(
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B H S D"],
    value: Float[Tensor, "B H S E"],
    config: RectifiedSparseConfig = RectifiedSparseConfig(),
    *,
    text: TextKeys | None = None,
    kept: Bool[Tensor, "N N"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H S E"], BlockLists]:
    """Output of the visual queries, and the blocks that were kept.

    query, key, value: of visual tokens, in an order in which blocks are compact (`token_order`). text: what all of
    them also read. kept: (N, N), blocks of keys that blocks of queries keep in any case (neighbours, first frame).
    scale: 1 / sqrt(D) unless given. Keeping everything is dense attention.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    estimate = estimate_attention(query, key, value, config, text=text, scale=scale)
    lists = choose_critical(estimate.attention.detach(), config, kept=kept)
    row_scale, row_bias = rectification(estimate, lists, config)
    out = attend_blocks(
        query, key, value, lists,
        block_size=(config.block_size, config.block_size), text=text, scale=scale,
        row_scale=row_scale, row_bias=row_bias,
    )  # fmt: skip
    return out, lists


def estimate_attention(
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B H S D"],
    value: Float[Tensor, "B H S E"],
    config: RectifiedSparseConfig,
    *,
    text: TextKeys | None,
    scale: float,
) -> Estimate:
    """The implicit full attention (paper, sections on IPAR and GAPR), in float32 at least."""
    (Qp, dq), (Kp, dk), (Vp, _) = (block_stats(x, block_size=config.block_size) for x in (query, key, value))
    dots = Qp @ Kp.mT
    gains = dots.abs() > (dq @ Kp.mT).abs() + (Qp @ dk.mT).abs()
    scores = dots * scale
    if config.reallocation:
        scores = scores + block_sizes(key.shape[2], config.block_size, key).log()
    if text is None or text.key.shape[2] == 0:
        return Estimate(scores.softmax(-1), gains, Vp)
    of_text = Qp @ text.key.to(Qp.dtype).mT * scale
    if text.valid is not None:
        of_text = of_text.masked_fill(~text.valid[:, None, None], -torch.inf)
    attention = torch.cat([scores, of_text.logsumexp(-1, keepdim=True)], -1).softmax(-1)
    return Estimate(attention, gains, Vp)


def choose_critical(
    attention: Float[Tensor, "B H N M"], config: RectifiedSparseConfig, *, kept: Bool[Tensor, "N N"] | None
) -> BlockLists:
    """The visual blocks to keep: the best by share and by mass, and those in `kept`."""
    N, M = attention.shape[-2:]
    count = max(1, int(config.density * N + 1e-9))
    forced = kept
    if M > N:
        count += 1  # text takes a place of its own, so that the share is one of visual blocks
        forced = torch.zeros(N, M, dtype=torch.bool, device=attention.device)
        forced[:, N] = True
        if kept is not None:
            forced[:, :N] = kept
    topp = config.topp if config.topp > 0 else None
    forced = None if forced is None else forced[None, None]
    lists = choose_blocks(attention.log(), topk=count, topp=topp, forced=forced)
    # lists ascend, so that text, which is in all of them, is the last entry
    return lists if M == N else BlockLists(lists.indices, lists.counts - 1)


def rectification(
    estimate: Estimate, lists: BlockLists, config: RectifiedSparseConfig
) -> tuple[Float[Tensor, "B H N"] | None, Float[Tensor, "B H N E"] | None]:
    """What the sparse output of a query block is multiplied by, and what is added to it; None where nothing is."""
    attention, N = estimate.attention, estimate.attention.shape[2]
    if not config.correction and config.conserve_mass:
        return None, None
    critical = listed_blocks(lists, N)
    visual = attention[..., :N]
    added = estimate.gains & ~critical if config.correction else torch.zeros_like(critical)
    if config.conserve_mass:
        row_scale = 1 - (visual * added).sum(-1)
    else:
        row_scale = (visual * critical).sum(-1) + attention[..., N:].sum(-1)
    return row_scale, (visual * added) @ estimate.values if config.correction else None
