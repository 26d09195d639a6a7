"""Attention and token operations; see README.md."""

from shared_kernels._backend import backend
from shared_kernels.attention_received import attention_argmax, attention_given, attention_received
from shared_kernels.block_stats import BlockStats, block_stats
from shared_kernels.correlation import correlation
from shared_kernels.depth_attention import depth_attention
from shared_kernels.diverse_subset import diverse_subset
from shared_kernels.gates import apply_channel_gate, channel_gate, channel_logits
from shared_kernels.l1_attention import l1_attention
from shared_kernels.linear_attention import linear_attention, linear_attention_step
from shared_kernels.local_attention import local_attention, neighborhood_attention
from shared_kernels.local_correlation import local_correlation
from shared_kernels.local_mix import local_mix
from shared_kernels.select_blocks import BlockLists, choose_blocks, select_blocks
from shared_kernels.sparse_attention import TransposedLists, sparse_attention, transpose_lists
from shared_kernels.states import merge_states
from shared_kernels.stencil_blend import stencil_blend
from shared_kernels.tokens import (
    choose_tokens,
    keep_tokens,
    kept_indices,
    merge_tokens,
    pack_tokens,
    put_tokens,
    repack_tokens,
    segment_mean,
    select_mask,
    select_tokens,
    unpack_tokens,
)
from shared_kernels.weighted_cross_entropy import weighted_cross_entropy
from shared_kernels.zones import zonal_histogram

__all__ = [
    "BlockLists",
    "BlockStats",
    "TransposedLists",
    "apply_channel_gate",
    "attention_argmax",
    "attention_given",
    "attention_received",
    "backend",
    "block_stats",
    "channel_gate",
    "channel_logits",
    "choose_blocks",
    "choose_tokens",
    "correlation",
    "depth_attention",
    "diverse_subset",
    "keep_tokens",
    "kept_indices",
    "l1_attention",
    "linear_attention",
    "linear_attention_step",
    "local_attention",
    "local_correlation",
    "local_mix",
    "merge_states",
    "merge_tokens",
    "neighborhood_attention",
    "pack_tokens",
    "put_tokens",
    "repack_tokens",
    "segment_mean",
    "select_blocks",
    "select_mask",
    "select_tokens",
    "sparse_attention",
    "stencil_blend",
    "transpose_lists",
    "unpack_tokens",
    "weighted_cross_entropy",
    "zonal_histogram",
]
