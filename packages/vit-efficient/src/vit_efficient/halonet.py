"""HaloNet: ResNet-shaped networks of blocked local attention, and the same attention for timm's own halo models.

Vaswani et al.: Scaling Local Self-Attention for Parameter Efficient Visual Backbones (CVPR 2021, arXiv:2103.12731). The
map is cut into blocks; all queries of a block share the keys of the block and of a halo around it. Down-sampling takes
the queries at every second position.

Decided here, where the paper is silent: ReLU; relative positions count in steps of the keys also where queries are
strided (timm's do not, `position_stride=1` for its weights); scores are scaled by 1/sqrt(head_dim), positions are not;
keys outside the image are zeros that keep their share of the softmax, as in all published weights (`border="mask"`
leaves them out). Where blocks do not fill the map there are no keys past its end, so any size works.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.layers import ClassifierHead, trunc_normal_
from timm.layers.halo_attn import HaloAttn
from timm.models import checkpoint_seq, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from shared_kernels import local_attention
from vit_efficient.door import Handle

Border = Literal["zero", "mask"]


class RelativePositions(nn.Module):
    """Tables of relative positions, rows and columns, shared by the heads; timm's names."""

    def __init__(self, window: int, head_dim: int) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim))
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=head_dim**-0.5)


@register_notrace_module
class HaloAttention(nn.Module):
    """Blocked local attention of an NCHW map (paper, section 3.1); weights as timm's HaloAttn has them.

    dim: channels in. dim_qk, dim_v: channels of queries and keys, and of values and the output, over all heads.
    stride: 1 or 2. position_stride: keys between the positions of two neighbouring queries; None for the stride.
    border: what lies outside the image, zeros that count or nothing.
    """

    def __init__(
        self,
        dim: int,
        dim_qk: int,
        dim_v: int,
        num_heads: int,
        *,
        block: int,
        halo: int,
        stride: int = 1,
        position_stride: int | None = None,
        border: Border = "zero",
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        if border not in ("zero", "mask"):
            raise ValueError(f"border must be 'zero' or 'mask', got {border!r}")
        self.num_heads, self.block, self.halo, self.border = num_heads, block, halo, border
        # where a block has no whole number of strided queries, attention is full and its output is averaged
        self.pooled = stride == 2 and block % 2 == 1
        self.stride = 1 if self.pooled else stride
        self.position_stride = position_stride
        self.q = nn.Conv2d(dim, dim_qk, 1, bias=False)
        self.kv = nn.Conv2d(dim, dim_qk + dim_v, 1, bias=False)
        self.pos_embed = RelativePositions(block + 2 * halo, dim_qk // num_heads)
        for convolution in (self.q, self.kv):
            trunc_normal_(convolution.weight, std=dim**-0.5)

    def forward(self, x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B v H2 W2"]:
        """The map after attention, at ceil(size / stride)."""
        last = x.permute(0, 2, 3, 1)
        query = _heads(_point(self.q, last[:, :: self.stride, :: self.stride]), self.num_heads)
        # for each head its keys, then its values
        both, d = _heads(_point(self.kv, last), self.num_heads), query.shape[-1]
        out: Any = local_attention(
            query,
            both[..., :d],
            both[..., d:],
            block=self.block,
            halo=self.halo,
            stride=self.stride,
            row_table=self.pos_embed.height_rel,
            column_table=self.pos_embed.width_rel,
            position_stride=self.position_stride,
            border=self.border,
        )
        out = out.permute(0, 1, 4, 2, 3).flatten(1, 2)
        return F.avg_pool2d(out, 2, ceil_mode=True, count_include_pad=False) if self.pooled else out


def _point(convolution: nn.Conv2d, x: Float[Tensor, "B H W c"]) -> Float[Tensor, "B H W d"]:
    return F.linear(x, convolution.weight.flatten(1), convolution.bias)


def _heads(x: Float[Tensor, "B H W c"], num_heads: int) -> Float[Tensor, "B n H W d"]:
    return x.unflatten(-1, (num_heads, -1)).permute(0, 3, 1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class HaloNetConfig:
    """A network of the family (paper, table 2).

    block, halo: of the attention. value_ratio, expansion: r_v and r_b, channels of values and of the blocks' outputs as
    multiples of the width. layers: blocks of each stage. head_width: channels before the classifier, None for none.
    width: channels of the first stage. conv_stages: stages with 3x3 convolutions in place of attention.
    """

    block: int = 8
    halo: int = 3
    value_ratio: float = 1.0
    expansion: float = 1.0
    layers: tuple[int, ...] = (3, 3, 10, 3)
    head_width: int | None = None
    width: int = 64
    heads: tuple[int, ...] = (4, 8, 8, 8)
    conv_stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError on values that make no network."""
        if len(self.layers) != len(self.heads):
            raise ValueError(f"each of the {len(self.layers)} stages needs its heads, got {self.heads}")
        for stage, heads in enumerate(self.heads):
            widths = (self.width * 2**stage, round(self.width * 2**stage * self.value_ratio))
            if any(w % heads for w in widths):
                raise ValueError(f"stage {stage}: widths {widths} must be multiples of its {heads} heads")


class HaloBlock(nn.Module):
    """1x1 convolution, halo attention or a 3x3 convolution, 1x1 convolution, and the shortcut."""

    def __init__(
        self, dim: int, stage: int, stride: int, config: HaloNetConfig, border: Border, act: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        width = config.width * 2**stage
        value, out = round(width * config.value_ratio), round(width * config.expansion)
        self.conv1, self.norm1, self.act1 = nn.Conv2d(dim, width, 1, bias=False), nn.BatchNorm2d(width), act()
        if stage in config.conv_stages:
            self.attn: nn.Module = nn.Conv2d(width, value, 3, stride, 1, bias=False)
        else:
            geometry = {"block": config.block, "halo": config.halo, "stride": stride}
            self.attn = HaloAttention(width, width, value, config.heads[stage], border=border, **geometry)
        self.norm2, self.act2 = nn.BatchNorm2d(value), act()
        self.conv3, self.norm3, self.act3 = nn.Conv2d(value, out, 1, bias=False), nn.BatchNorm2d(out), act()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or dim != out:
            self.shortcut = nn.Sequential(nn.Conv2d(dim, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B d H2 W2"]:
        """The map after the block."""
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.act2(self.norm2(self.attn(y)))
        return self.act3(self.norm3(self.conv3(y)) + self.shortcut(x))


class HaloNet(nn.Module):
    """The model, as a timm model: NCHW features at strides 4, 8, 16, 32, any input size.

    config: which network. border: what lies outside the image. act_layer: activation, ReLU unless given.
    """

    def __init__(
        self,
        config: HaloNetConfig = HaloNetConfig(),
        *,
        border: Border = "zero",
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.grad_checkpointing = num_classes, in_chans, False
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), act_layer(), nn.MaxPool2d(3, 2, 1)
        )
        self.stages, self.feature_info, dim = nn.ModuleList(), [], 64
        for stage, depth in enumerate(config.layers):
            blocks = nn.Sequential()
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(HaloBlock(dim, stage, stride, config, border, act_layer))
                dim = round(config.width * 2**stage * config.expansion)
            self.stages.append(blocks)
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**stage, "module": f"stages.{stage}"})
        self.final: nn.Module = nn.Identity()
        if config.head_width is not None:
            wide = config.head_width
            self.final = nn.Sequential(nn.Conv2d(dim, wide, 1, bias=False), nn.BatchNorm2d(wide), act_layer())
            dim = wide
        self.num_features = self.head_hidden_size = dim
        self.head = ClassifierHead(dim, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith(("height_rel", "width_rel"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """For layer-wise learning rates."""
        fine = [(r"^stages\.(\d+)\.(\d+)", None), (r"^final", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another number of classes; 0 for features."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Nothing to do: any size works."""

    def _run(self, x: Tensor, last: int) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage in self.stages[: last + 1]:
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """The last map."""
        return self.final(self._run(x, len(self.stages) - 1)[-1])

    def forward_head(self, x: Float[Tensor, "B C H W"], pre_logits: bool = False) -> Tensor:
        """Logits, or pooled features."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Float[Tensor, "B c h w"]) -> Tensor:
        """Logits (B, classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Float[Tensor, "B c h w"],
        indices: int | list[int] | None = None,
        norm: bool = False,  # noqa: ARG002 - timm's signature; there is no final norm
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of the stages, as timm's models give them."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt}")
        take, highest = feature_take_indices(len(self.stages), indices)
        maps = self._run(x, highest if stop_early and intermediates_only else len(self.stages) - 1)
        chosen = [maps[i] for i in take]
        return chosen if intermediates_only else (self.final(maps[-1]), chosen)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,  # noqa: ARG002 - timm's signature; there is no final norm
        prune_head: bool = True,
    ) -> list[int]:
        """Drops the stages after the last one wanted; returns the indices."""
        take, highest = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: highest + 1]
        if prune_head:
            self.final = nn.Identity()
            self.reset_classifier(0, "")
        return take


# ---- the door into timm's own halo models


@dataclass(frozen=True, kw_only=True)
class HaloAttentionConfig:
    """How timm's halo attention is computed.

    border: "zero" as its weights were trained, "mask" to leave out what lies outside the image.
    """

    border: Border = "zero"

    def __post_init__(self) -> None:
        """Raises ValueError on another border."""
        if self.border not in ("zero", "mask"):
            raise ValueError(f"border must be 'zero' or 'mask', got {self.border!r}")


class TimmHaloAttention(nn.Module):
    """Computes what a timm HaloAttn does, on the same parameters, for maps of any size."""

    def __init__(self, host: HaloAttn, border: Border) -> None:
        super().__init__()
        self.q, self.kv, self.pos_embed, self.pool = host.q, host.kv, host.pos_embed, host.pool
        self.num_heads, self.block, self.halo, self.stride = (
            host.num_heads,
            host.block_size,
            host.halo_size,
            host.block_stride,
        )
        self.scale, self.scale_positions, self.border = host.scale, host.scale_pos_embed, border

    def forward(self, x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B v H2 W2"]:
        """The map after attention."""
        last = x.permute(0, 2, 3, 1)
        query = _heads(_point(self.q, last[:, :: self.stride, :: self.stride]), self.num_heads)
        both, d = _heads(_point(self.kv, last), self.num_heads), query.shape[-1]
        factor = self.scale if self.scale_positions else 1.0
        out: Any = local_attention(
            query,
            both[..., :d],
            both[..., d:],
            block=self.block,
            halo=self.halo,
            stride=self.stride,
            row_table=self.pos_embed.height_rel * factor,
            column_table=self.pos_embed.width_rel * factor,
            position_stride=1,
            border=self.border,
            scale=self.scale,
        )
        return self.pool(out.permute(0, 1, 4, 2, 3).flatten(1, 2))


def apply_halo_attention(model: nn.Module, config: HaloAttentionConfig = HaloAttentionConfig()) -> Handle:
    """Computes the halo attention of a timm model (halonet26t, halonet50ts, sehalonet33ts, ...) without unfolding keys.

    Same parameters, same state dict, same output at sizes that timm takes; other sizes work too. ValueError on a model
    that has no such layers.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module) is HaloAttn]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no timm HaloAttn layers: supported are timm's halonet*, sehalonet*, "
            "eca_halonext*, lamhalobotnet* and haloregnetz*"
        )
    handle = Handle("halo_attention", model, config, tuple(range(len(found))))
    for name, host in found:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, TimmHaloAttention(host, config.border))
        handle.on_remove(lambda owner=owner, child=child, host=host: setattr(owner, child, host))  # type: ignore[misc]
    return handle
