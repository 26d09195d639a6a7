"""The methods that make attention of visual tokens sparse, in diffusers transformers: one `apply_` function each."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_attn.block_sparse import (
    BlockSparseConfig,
    SlidingTileConfig,
    block_sparse_attention,
    tile_lists,
)
from diffusion_attn.diffusers.door import Layout, Schedule, VisualCall, VisualHandle, open_door
from diffusion_attn.rectified_sparse import RectifiedSparseConfig, rectified_sparse_attention
from diffusion_attn.sla import SLAConfig, SparseLinearAttention, classify_blocks
from diffusion_attn.token_order import Grid, blocks_of_frame, gilbert_order, raster_order, tile_order, touching_blocks
from diffusion_attn.visual_attention import attend_blocks
from shared_kernels import BlockLists

_ALWAYS, _RECTIFIED, _SLA = Schedule(), RectifiedSparseConfig(), SLAConfig()
_BLOCKS, _TILES = BlockSparseConfig(), SlidingTileConfig()
_ORDERS = {"gilbert": gilbert_order, "raster": None}


def apply_rectified_sparse(
    model: nn.Module,
    config: RectifiedSparseConfig = _RECTIFIED,
    *,
    schedule: Schedule = _ALWAYS,
) -> VisualHandle:
    """Rectified SpaAttn in a transformer of diffusers, without training, until the handle's `remove()`.

    The paper keeps the first two layers and the first five steps of Wan 2.1 dense: `Schedule(dense_layers=(0, 1),
    dense_steps=5)`. TypeError on an unsupported model, ValueError where a method is at work already.
    """
    kept: dict[tuple[Grid, torch.device], Tensor | None] = {}

    def method(call: VisualCall, layout: Layout) -> tuple[Tensor, Tensor]:
        key = (layout.grid, call.query.device)
        if key not in kept:
            kept[key] = kept_blocks(config, layout.grid, call.query.device)
        out, lists = rectified_sparse_attention(
            call.query, call.key, call.value, config, text=call.text, kept=kept[key], scale=call.scale
        )
        return out, _shares(lists, call.key, config.block_size)

    return open_door(model, "rectified_sparse", config, method, schedule=schedule, order=_ORDERS[config.order])


def kept_blocks(config: RectifiedSparseConfig, grid: Grid, device: torch.device) -> Tensor | None:
    """Pairs (N, N) of query and key blocks that are kept whatever is in them; None if there are none."""
    order = (_ORDERS[config.order] or raster_order)(grid)
    count = -(-order.numel() // config.block_size)
    kept = torch.zeros(count, count, dtype=torch.bool)
    if config.neighbors:
        kept |= touching_blocks(grid, order, config.block_size)
    if config.first_frame == "frame":
        first = blocks_of_frame(grid, order, config.block_size)
        kept |= first[:, None] & first
    elif config.first_frame == "curve":
        first = torch.arange(count) < count // grid[0]
        kept |= first[:, None] & first
    return kept.to(device) if kept.any() else None


def apply_sla(model: nn.Module, config: SLAConfig = _SLA, *, schedule: Schedule = _ALWAYS) -> VisualHandle:
    """SLA in a transformer of diffusers: it adds one small linear map per layer and is made to be fine-tuned with.

    The maps are `attention.diffusion_attn_sla` and start at zero, which is plain block-sparse attention. All weights of
    the model are meant to be trained (`training`); `save_transformer` keeps them. TypeError on an unsupported model,
    ValueError where a method is at work already.
    """

    def method(call: VisualCall, layout: Layout) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        own: Any = call.attention.diffusion_attn_sla
        classes = classify_blocks(call.query, call.key, config)
        out = own(call.query, call.key, call.value, text=call.text, scale=call.scale, classes=classes)
        return out, _shares(classes.critical, call.key, config.block_size[1])

    return open_door(
        model, "sla", config, method,
        schedule=schedule, order=_ORDERS[config.order], modules=partial(_sla_of, config=config),
    )  # fmt: skip


def _sla_of(attention: Any, config: SLAConfig) -> SparseLinearAttention:
    return SparseLinearAttention(attention.inner_dim // attention.heads, config)


def apply_block_sparse(
    model: nn.Module, config: BlockSparseConfig = _BLOCKS, *, schedule: Schedule = _ALWAYS
) -> VisualHandle:
    """Plain block-sparse attention by the best share of blocks, by mass, or both: a baseline.

    TypeError on an unsupported model, ValueError where a method is at work already.
    """

    def method(call: VisualCall, layout: Layout) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        out, lists = block_sparse_attention(call.query, call.key, call.value, config, text=call.text, scale=call.scale)
        return out, _shares(lists, call.key, config.block_size[1])

    return open_door(model, "block_sparse", config, method, schedule=schedule, order=_ORDERS[config.order])


def apply_sliding_tile(
    model: nn.Module, config: SlidingTileConfig = _TILES, *, schedule: Schedule = _ALWAYS
) -> VisualHandle:
    """Attention to tiles of space and time around the query's own: a baseline.

    TypeError on an unsupported model, ValueError where a method is at work already, and at the first call if tiles do
    not divide the grid.
    """
    tokens = config.tile[0] * config.tile[1] * config.tile[2]
    made: dict[tuple[Grid, torch.device], BlockLists] = {}

    def method(call: VisualCall, layout: Layout) -> tuple[Tensor, Tensor]:
        key = (layout.grid, call.query.device)
        if key not in made:
            made[key] = BlockLists(*(t.to(key[1]) for t in tile_lists(layout.grid, config)))
        B = call.query.shape[0]
        lists = BlockLists(*(t.expand(B, *t.shape[1:]).contiguous() for t in made[key]))
        out = attend_blocks(
            call.query, call.key, call.value, lists, block_size=(tokens, tokens), text=call.text, scale=call.scale
        )
        return out, _shares(lists, call.key, tokens)

    return open_door(
        model, "sliding_tile", config, method, schedule=schedule, order=partial(tile_order, tile=config.tile)
    )


def _shares(lists: BlockLists, key: Tensor, block_size: int) -> Tensor:
    return lists.counts.float() / -(-key.shape[2] // block_size)
