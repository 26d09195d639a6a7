"""What AS-ViT and Sparsifiner are compared with: fixed-ratio pruning and token merging, as their papers have them."""

from vit_efficient.baselines.dynamicvit import (
    DynamicViTConfig,
    DynamicViTLoss,
    apply_dynamicvit,
    dynamicvit_forward,
    keep_ratio_loss,
)
from vit_efficient.baselines.evit import EViTConfig, apply_evit
from vit_efficient.baselines.fixed_tokens import FixedTokensConfig, apply_fixed_tokens
from vit_efficient.baselines.tome import ToMeConfig, apply_tome

__all__ = [
    "DynamicViTConfig",
    "DynamicViTLoss",
    "EViTConfig",
    "FixedTokensConfig",
    "ToMeConfig",
    "apply_dynamicvit",
    "apply_evit",
    "apply_fixed_tokens",
    "apply_tome",
    "dynamicvit_forward",
    "keep_ratio_loss",
]
