"""Efficient attention for language models; see README.md."""

from llm_attn.affine_attention import (
    AffineConfig,
    AffineScale,
    AffineScaledAttention,
    AttentionMass,
    AverageAffineMeans,
    affine_attention,
    affine_weights,
    apply_affine,
    attention_mass,
    average_affine_means,
    draw_attention_mass,
    linear_clip,
    prefix_value_sum,
    sink_attention,
    sink_weights,
)
from llm_attn.distillation import Distillation, DistillationConfig, distillation_loss
from llm_attn.softplus_attention import (
    SoftplusConfig,
    apply_softplus,
    set_softplus_power,
    softmax_logn_attention,
    softplus_attention,
    softplus_weights,
)
from llm_attn.transformers.training import param_groups

__all__ = [
    "AffineConfig",
    "AffineScale",
    "AffineScaledAttention",
    "AttentionMass",
    "AverageAffineMeans",
    "Distillation",
    "DistillationConfig",
    "SoftplusConfig",
    "affine_attention",
    "affine_weights",
    "apply_affine",
    "apply_softplus",
    "attention_mass",
    "average_affine_means",
    "distillation_loss",
    "draw_attention_mass",
    "linear_clip",
    "param_groups",
    "prefix_value_sum",
    "set_softplus_power",
    "sink_attention",
    "sink_weights",
    "softmax_logn_attention",
    "softplus_attention",
    "softplus_weights",
]
