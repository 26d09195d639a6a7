"""The door into timm: attention blocks at chosen sites of a network, and taken out again.

`apply_attention(model, AttentionConfig(...))` puts blocks into timm's ResNets and ResNeXts, MobileNets, EfficientNets
and ConvNeXts. After a block's last activation ("out") that is a forward hook and a submodule of the block; at the end
of the residual branch ("in") it is the slot that timm's own blocks have there. No forward of timm's is copied, the
names of the network's weights stay, and `features_only`, `forward_features`, deepcopy and export work as before.

The light block is of Eisenbach et al. (arXiv:2302.14574); sites as in placement.py. Also here: a last stage that keeps
its resolution, as networks for re-identification have it (Luo et al., "Bag of Tricks", CVPRW 2019), and three models
for timm's registry, `resnet50_reid_light`, `resnet18_reid_w16` and
`resnet34_reid_w16`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import register_model
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from timm.models._efficientnet_blocks import UniversalInvertedResidual as UniversalResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reid_robot.light_attention import LightAttention
from reid_robot.placement import Placement, Site, parse_placement
from reid_robot.rival_blocks import CBAM, EfficientChannel, NonLocal, RelationAware, SqueezeExcitation
from shared_kernels.handle import Handle

SUPPORTED = "timm's ResNet and ResNeXt, MobileNetV2 to V4, EfficientNet and ConvNeXt"
_NARROW = 16  # channels below which the gates of SE, CBAM and light are not narrowed further

BLOCKS: dict[str, Callable[[int, tuple[int, int]], nn.Module]] = {
    "light": lambda channels, _: LightAttention(channels, reduction=min(_NARROW, channels)),
    "light-c": lambda channels, _: LightAttention(channels, kind="c", reduction=min(_NARROW, channels)),
    "light-s": lambda channels, _: LightAttention(channels, kind="s"),
    "se": lambda channels, _: SqueezeExcitation(channels),
    "eca": lambda channels, _: EfficientChannel(channels),
    "cbam": lambda channels, _: CBAM(channels),
    "nonlocal": lambda channels, _: NonLocal(channels),
    "rga-s": lambda channels, size: RelationAware(channels, size, parts="s"),
    "rga-c": lambda channels, size: RelationAware(channels, size, parts="c"),
    "rga-sc": lambda channels, size: RelationAware(channels, size, parts="sc"),
}
"""Name -> (channels, (H, W) of the map) -> block. A new block is one line here."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which block, where."""

    block: str = "light"
    """A name in BLOCKS."""
    where: str = "s2.last,s3.last,s4.last"
    """Placement, see placement.py. Stages of MobileNets and EfficientNets are timm's, 1 to 7."""
    input_size: tuple[int, int] = (256, 128)
    """Height and width of the crops. Only relation-aware blocks are bound to it."""

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ValueError(f"no attention block '{self.block}'; there are {', '.join(BLOCKS)}")
        if len(self.input_size) != 2 or min(self.input_size) < 1:
            raise ValueError(f"input_size must be (height, width) in pixels, got {self.input_size}")


def stages(model: Any) -> list[list[nn.Module]]:
    """The residual blocks of each stage. TypeError for networks that are not supported."""
    if all(hasattr(model, f"layer{n}") for n in range(1, 5)):
        return [list(getattr(model, f"layer{n}")) for n in range(1, 5)]
    if isinstance(getattr(model, "blocks", None), nn.Sequential):
        found = [list(stage) for stage in model.blocks if isinstance(stage, nn.Sequential)]
        if len(found) == len(model.blocks):
            return found
    if hasattr(model, "stages") and all(hasattr(stage, "blocks") for stage in model.stages):
        return [list(stage.blocks) for stage in model.stages]
    raise TypeError(f"{type(model).__name__} is not supported; supported are {SUPPORTED}")


def map_sizes(model: nn.Module, input_size: tuple[int, int]) -> list[list[tuple[int, int, int]]]:
    """(channels, height, width) after each block of each stage, for crops of this size; nothing is computed."""
    blocks = stages(model)
    seen: dict[nn.Module, tuple[int, ...]] = {}

    def look(module: nn.Module, _: Any, output: Tensor) -> None:
        seen[module] = tuple(output.shape[1:])

    hooks = [block.register_forward_hook(look) for stage in blocks for block in stage]
    training = model.training
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model.eval()(torch.empty(2, channels, *input_size))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [[(seen[b][0], seen[b][1], seen[b][2]) for b in stage] for stage in blocks]


def apply_attention(model: nn.Module, config: AttentionConfig = AttentionConfig()) -> Handle:
    """Puts `config.block` at the sites of `config.where`; new weights are drawn from torch's generator.

    `layers_changed` counts blocks through the stages, from 0. Raises TypeError for networks that are not supported, and
    ValueError if the placement is empty, does not fit, or meets a site that is taken.
    """
    blocks = stages(model)
    depths = [len(stage) for stage in blocks]
    placement = parse_placement(config.where, depths)
    if not placement:
        raise ValueError("the placement names no site: give at least one, like 's4.last', or leave the network plain")
    for site in placement:
        _check_free(blocks[site.stage - 1][site.block - 1], site)
    sizes = map_sizes(model, config.input_size)
    numbers = [sum(depths[: site.stage - 1]) + site.block - 1 for site in placement]
    handle = Handle(f"attention ({config.block})", model, config, tuple(sorted(set(numbers))))
    some = next(model.parameters())
    for site in placement:
        channels, height, width = sizes[site.stage - 1][site.block - 1]
        block = BLOCKS[config.block](channels, (height, width)).to(some.device, some.dtype).train(model.training)
        _put(blocks[site.stage - 1][site.block - 1], block, site, handle)
    return handle


def attention_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name of the place in the network -> attention block that `apply_attention` put there."""
    known = (LightAttention, SqueezeExcitation, EfficientChannel, CBAM, NonLocal, RelationAware)
    return {name: module for name, module in model.named_modules() if isinstance(module, known)}


def _gate_output(module: Any, _: Any, output: Tensor) -> Tensor:
    return module.reid_attention(output)


def _put(host: Any, block: nn.Module, site: Site, handle: Handle) -> None:
    if site.place == "out" or not getattr(host, "has_skip", True):  # without an addition the branch's end is the end
        host.reid_attention = block
        hook = host.register_forward_hook(_gate_output)

        def close() -> None:
            hook.remove()
            del host.reid_attention

        handle.on_remove(close)
        return
    if isinstance(host, BasicBlock | Bottleneck):
        slot, before = "se", host.se
        host.se = block
    else:
        slot, before = "drop_path", host.drop_path
        host.drop_path = nn.Sequential(block, before)
    handle.on_remove(lambda: setattr(host, slot, before))


def _check_free(host: nn.Module, site: Site) -> None:
    inverted = (InvertedResidual, DepthwiseSeparableConv, EdgeResidual, UniversalResidual)
    if site.place == "in" and not isinstance(host, (BasicBlock, Bottleneck, *inverted)):
        raise ValueError(f"{type(host).__name__} at {site} has no known end of its residual branch; use ':out'")
    taken = hasattr(host, "reid_attention") if site.place == "out" else False
    if site.place == "in":
        if isinstance(host, BasicBlock | Bottleneck):
            taken = host.se is not None
        else:
            taken = isinstance(host.drop_path, nn.Sequential) or hasattr(host, "reid_attention")
    if taken:
        raise ValueError(f"there is attention at {site} already; remove it first, or choose another site")


def keep_last_resolution(model: nn.Module) -> None:
    """Sets the stride of the last stage that has one to 1, so that the last map is twice as high and wide.

    Raises ValueError where this is not done by convolutions alone (avg_down and anti-aliased networks).
    """
    last = next((s for s in reversed(stages(model)) if any(map(_strided, _leaves(s)))), None)
    if last is None:
        raise ValueError(f"no stage of this {type(model).__name__} has a stride to take away; use last_stride=2")
    if any(isinstance(leaf, nn.AvgPool2d) and leaf.stride not in (1, (1, 1)) for leaf in _leaves(last)):
        raise ValueError(
            "this network halves its last map by pooling; last_stride=1 is for those that do by convolution"
        )
    for leaf in _leaves(last):
        if _strided(leaf) and isinstance(leaf, nn.Conv2d):
            leaf.stride = (1, 1)


def _leaves(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for block in blocks for module in block.modules()]


def _strided(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.stride == (2, 2)


def placement_for(model: nn.Module, where: str) -> Placement:
    """`parse_placement` with the depths of this network."""
    return parse_placement(where, [len(stage) for stage in stages(model)])


@register_model
def resnet18_reid_w16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 of width 16 (stages 16, 32, 64, 128; stem of three 3x3 convolutions), 0.7 M parameters: a small
    host.
    """
    if pretrained:
        raise ValueError("resnet18_reid_w16 has no pretrained weights: pass pretrained=False and load a checkpoint")
    small = {"channels": (16, 32, 64, 128), "stem_type": "deep", "stem_width": 8}
    return timm.create_model("resnet18", pretrained=False, **(small | kwargs))


@register_model
def resnet34_reid_w16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The same with the blocks of ResNet-34, 1.4 M parameters: what more depth brings instead of attention."""
    return resnet18_reid_w16(pretrained, **({"block": BasicBlock, "layers": (3, 4, 6, 3)} | kwargs))


@register_model
def resnet50_reid_light(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with a last stage of stride 1 and light attention after stages 2 to 4; any size of crops."""
    model = timm.create_model("resnet50", pretrained=pretrained, **kwargs)
    keep_last_resolution(model)
    apply_attention(model)
    return model
