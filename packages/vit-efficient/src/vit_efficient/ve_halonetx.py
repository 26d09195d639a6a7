"""HaloNet H0 to H7 under timm model names: `timm.create_model("halonetx_h0")` after `import vit_efficient`.

timm has a `halonet_h1` of its own, with eight heads everywhere; these are `halonetx_*`. No weights are given.
"""

from dataclasses import replace
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from vit_efficient.halonet import HaloNet, HaloNetConfig

# paper, table 2: block, halo, r_v, r_b, blocks of the third stage, width before the classifier
_FAMILY = {
    "h0": (8, 3, 1.0, 0.5, 7, None),
    "h1": (8, 3, 1.0, 1.0, 10, None),
    "h2": (8, 3, 1.0, 1.25, 11, None),
    "h3": (10, 3, 1.0, 1.5, 12, 1024),
    "h4": (12, 2, 1.0, 3.0, 12, 1280),
    "h5": (14, 2, 2.5, 2.0, 23, 1536),
    "h6": (8, 4, 3.0, 2.75, 24, 1536),
    "h7": (10, 3, 4.0, 3.5, 26, 2048),
}
_SIZES = {"h0": 256, "h1": 256, "h2": 256, "h3": 320, "h4": 384, "h5": 448, "h6": 512, "h7": 640, "h4_base128": 384}


def family_config(name: str) -> HaloNetConfig:
    """Configuration of "h0" to "h7", and "h4_base128"."""
    block, halo, value_ratio, expansion, third, head_width = _FAMILY[name.removesuffix("_base128")]
    layers = (3, 3, third, 3)
    config = HaloNetConfig(
        block=block, halo=halo, value_ratio=value_ratio, expansion=expansion, layers=layers, head_width=head_width
    )
    return replace(config, width=128) if name.endswith("_base128") else config


def _cfg(size: int) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.94,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({f"halonetx_{name}.untrained": _cfg(size) for name, size in _SIZES.items()})


def _build(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    config = kwargs.pop("config", family_config(name))
    if "conv_stages" in kwargs:
        config = replace(config, conv_stages=tuple(kwargs.pop("conv_stages")))
    features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(HaloNet, f"halonetx_{name}", pretrained, feature_cfg=features, config=config, **kwargs)


@register_model
def halonetx_h0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """5.5 M parameters."""
    return _build("h0", pretrained, kwargs)


@register_model
def halonetx_h1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """8.1 M parameters."""
    return _build("h1", pretrained, kwargs)


@register_model
def halonetx_h2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """9.4 M parameters."""
    return _build("h2", pretrained, kwargs)


@register_model
def halonetx_h3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """11.8 M parameters."""
    return _build("h3", pretrained, kwargs)


@register_model
def halonetx_h4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """19.1 M parameters."""
    return _build("h4", pretrained, kwargs)


@register_model
def halonetx_h5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """30.7 M parameters."""
    return _build("h5", pretrained, kwargs)


@register_model
def halonetx_h6(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """43.5 M parameters."""
    return _build("h6", pretrained, kwargs)


@register_model
def halonetx_h7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """67.4 M parameters."""
    return _build("h7", pretrained, kwargs)


@register_model
def halonetx_h4_base128(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """85 M parameters."""
    return _build("h4_base128", pretrained, kwargs)
