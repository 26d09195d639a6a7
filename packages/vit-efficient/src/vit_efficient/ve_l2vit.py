"""L2ViT under timm model names, after `import vit_efficient`: `timm.create_model("l2vit_tiny")`."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from vit_efficient.l2vit import L2ViT, filter_checkpoint


def _cfg(size: int = 224) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj.0",
        "classifier": "head.fc",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs(
    {
        "l2vit_tiny.untrained": _cfg(),
        "l2vit_small.untrained": _cfg(),
        "l2vit_base.untrained": _cfg(),
        "l2vit_base_384.untrained": _cfg(384),
    }
)


def _build(name: str, pretrained: bool, arguments: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        L2ViT, name, pretrained, pretrained_filter_fn=filter_checkpoint, feature_cfg=features, **{**arguments, **kwargs}
    )


@register_model
def l2vit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """28.6 M parameters."""
    return _build("l2vit_tiny", pretrained, {}, kwargs)


@register_model
def l2vit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """50.2 M parameters."""
    return _build("l2vit_small", pretrained, {"depths": (2, 2, 18, 2)}, kwargs)


@register_model
def l2vit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """88.6 M parameters."""
    base = {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024)}
    return _build("l2vit_base", pretrained, base, kwargs)


@register_model
def l2vit_base_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The same with windows of 12, for 384 x 384."""
    base = {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "window_size": 12}
    return _build("l2vit_base_384", pretrained, base, kwargs)
