"""Faster and steerable attention for image and video diffusion, in diffusers; see README.md."""

from diffusion_attn.block_sparse import BlockSparseConfig, SlidingTileConfig, block_sparse_attention
from diffusion_attn.diffusers.door import Schedule, VisualHandle
from diffusion_attn.diffusers.methods import (
    apply_block_sparse,
    apply_rectified_sparse,
    apply_sla,
    apply_sliding_tile,
)
from diffusion_attn.diffusers.saving import load_transformer, save_transformer
from diffusion_attn.diffusers.subject_insertion import InContextBrush, apply_in_context_brush
from diffusion_attn.in_context_brush import InContextBrushConfig, in_context_attention
from diffusion_attn.rectified_sparse import RectifiedSparseConfig, rectified_sparse_attention
from diffusion_attn.sla import SLAConfig, SparseLinearAttention, classify_blocks, sla_flops, sparse_linear_parts
from diffusion_attn.token_order import gilbert_order, inverse_order, raster_order, tile_order
from diffusion_attn.training import distillation_loss, flow_matching_loss, log_normal_times
from diffusion_attn.visual_attention import TextKeys

__all__ = [
    "BlockSparseConfig",
    "InContextBrush",
    "InContextBrushConfig",
    "RectifiedSparseConfig",
    "SLAConfig",
    "Schedule",
    "SlidingTileConfig",
    "SparseLinearAttention",
    "TextKeys",
    "VisualHandle",
    "apply_block_sparse",
    "apply_in_context_brush",
    "apply_rectified_sparse",
    "apply_sla",
    "apply_sliding_tile",
    "block_sparse_attention",
    "classify_blocks",
    "distillation_loss",
    "flow_matching_loss",
    "gilbert_order",
    "in_context_attention",
    "inverse_order",
    "load_transformer",
    "log_normal_times",
    "raster_order",
    "rectified_sparse_attention",
    "save_transformer",
    "sla_flops",
    "sparse_linear_parts",
    "tile_order",
]
