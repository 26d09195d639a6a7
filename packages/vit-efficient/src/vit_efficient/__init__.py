"""Vision transformers that spend less, as ordinary timm models; see README.md."""

from vit_efficient import ve_asvit, ve_halonetx, ve_l2vit  # noqa: F401 - they register models with timm
from vit_efficient.adaptive_sparsity import (
    AdaptiveSparsityConfig,
    AdaptiveSparsityLoss,
    apply_adaptive_sparsity,
    fit_thresholds,
    masked_forward,
    model_macs,
    scale_thresholds,
)
from vit_efficient.baselines import (
    DynamicViTConfig,
    EViTConfig,
    FixedTokensConfig,
    ToMeConfig,
    apply_dynamicvit,
    apply_evit,
    apply_fixed_tokens,
    apply_tome,
)
from vit_efficient.door import Handle, load_method, save_method
from vit_efficient.halonet import HaloAttentionConfig, HaloNet, HaloNetConfig, apply_halo_attention
from vit_efficient.l2vit import L2ViT
from vit_efficient.sparsifiner import SparsifinerConfig, apply_sparsifiner, reconstruction_loss, set_phase
from vit_efficient.token_maps import draw_token_maps, kept_patches
from vit_efficient.token_reduction import token_counts

__all__ = [
    "AdaptiveSparsityConfig",
    "AdaptiveSparsityLoss",
    "DynamicViTConfig",
    "EViTConfig",
    "FixedTokensConfig",
    "HaloAttentionConfig",
    "HaloNet",
    "HaloNetConfig",
    "Handle",
    "L2ViT",
    "SparsifinerConfig",
    "ToMeConfig",
    "apply_adaptive_sparsity",
    "apply_dynamicvit",
    "apply_evit",
    "apply_fixed_tokens",
    "apply_halo_attention",
    "apply_sparsifiner",
    "apply_tome",
    "draw_token_maps",
    "fit_thresholds",
    "kept_patches",
    "load_method",
    "masked_forward",
    "model_macs",
    "reconstruction_loss",
    "save_method",
    "scale_thresholds",
    "set_phase",
    "token_counts",
]
