"""AS-ViT under timm model names: `timm.create_model("asvit_deit_small_patch16_224")` after `import vit_efficient`."""

from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from torch import nn

from vit_efficient.adaptive_sparsity import apply_adaptive_sparsity

_SETTINGS = {
    "input_size": (3, 224, 224),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "fixed_input_size": True,
}
_SIZES = ("tiny", "small", "base")
default_cfgs = generate_default_cfgs({f"asvit_deit_{size}_patch16_224.untrained": _SETTINGS for size in _SIZES})


def _build(size: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    if pretrained:
        raise RuntimeError("no trained thresholds are published: create the model, load DeiT's weights, fine-tune")
    for key in ("pretrained_cfg", "pretrained_cfg_overlay"):
        kwargs.pop(key, None)
    model: Any = timm.create_model(f"deit_{size}_patch16_224", **kwargs)
    vit = getattr(model, "model", model)  # features_only wraps it
    apply_adaptive_sparsity(vit)
    vit.pretrained_cfg = vit.default_cfg = default_cfgs[f"asvit_deit_{size}_patch16_224"].default.to_dict()
    return model


@register_model
def asvit_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AS-ViT on DeiT-Ti (192 wide, 12 blocks)."""
    return _build("tiny", pretrained, **kwargs)


@register_model
def asvit_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AS-ViT on DeiT-S (384 wide, 12 blocks), the paper's main model."""
    return _build("small", pretrained, **kwargs)


@register_model
def asvit_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AS-ViT on DeiT-B (768 wide, 12 blocks)."""
    return _build("base", pretrained, **kwargs)
