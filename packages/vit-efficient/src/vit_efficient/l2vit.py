"""L2ViT: a pyramid of windows and global linear attention, linear in the number of pixels.

Zheng: The Linear Attention Resurrection in Vision Transformer (arXiv:2501.16182). Blocks alternate: softmax attention
in windows, and linear attention with ReLU features over the whole map, followed by two 7x7 depth-wise convolutions that
give back the concentration which linear attention lacks (LCM). Positions come from 3x3 depth-wise convolutions (CPE).

Decided here, where paper and published code differ or are silent: the divisor of linear attention is clamped at 100,
the learned factor is one for each head and starts at 32^-0.5, as in the code; LCM is a branch of its own. Windows that
stick out of the map are filled with zeros after the norm, unmasked, as published; `mask_padding=True` leaves them out,
so that the result does not depend on how far a map is from a multiple of the window. Maps stay channels-last.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, Mlp, trunc_normal_
from timm.models import checkpoint_seq, register_notrace_function, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from shared_kernels import linear_attention, local_attention

HEAD_DIM = 32
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "ln2d": LayerNorm2d,
    "gn": lambda channels: nn.GroupNorm(1, channels),
}


def relu_linear_attention(
    query: Float[Tensor, "B h N d"],
    key: Float[Tensor, "B h N d"],
    value: Float[Tensor, "B h N e"],
    factor: Float[Tensor, "h"],
    *,
    clamp: float = 100.0,
) -> Float[Tensor, "B h N e"]:
    """factor relu(q) (sum relu(k)^T v) / max(relu(q) . sum relu(k), clamp) (paper, equations 3 and 4).

    Sums are float32 at least: with 12,544 tokens the divisor exceeds what float16 holds. On a CPU in full precision the
    three products are taken as they stand, which on maps of this model's sizes takes a third of the op's time.
    """
    query, key = query.relu(), key.relu()
    full = query.dtype == value.dtype and query.dtype in (torch.float32, torch.float64)
    if query.device.type == "cpu" and full and not torch.is_autocast_enabled("cpu"):
        divisor = (query @ key.sum(2).unsqueeze(-1)).clamp(min=clamp)
        return (query @ (key.mT @ value * factor[:, None, None])) / divisor
    out: Any = linear_attention(query, key, value, normalizer="clamp", eps=clamp)
    return out * factor.to(out.dtype)[:, None, None]


@register_notrace_module
class ReLULinearAttention(nn.Module):
    """Global linear attention of a channels-last map (B, H, W, C)."""

    def __init__(self, dim: int, num_heads: int, clamp: float = 100.0) -> None:
        super().__init__()
        self.num_heads, self.clamp = num_heads, clamp
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.full((num_heads, 1, 1), HEAD_DIM**-0.5))

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """The map after attention."""
        B, H, W, C = x.shape
        heads = (3, self.num_heads, C // self.num_heads)
        query, key, value = self.qkv(x).reshape(B, H * W, *heads).permute(2, 0, 3, 1, 4)
        out = relu_linear_attention(query, key, value, self.scale.flatten(), clamp=self.clamp)
        return self.proj(out.transpose(1, 2).reshape(B, H, W, C))


@register_notrace_module
class WindowAttention(nn.Module):
    """Softmax attention in windows of a channels-last map (B, H, W, C)."""

    def __init__(self, dim: int, num_heads: int, window_size: int, mask_padding: bool) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.mask_padding = num_heads, window_size, mask_padding
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """The map after attention."""
        B, H, W, C = x.shape
        if self.mask_padding:
            qkv = self.qkv(x).reshape(B, H, W, 3, self.num_heads, C // self.num_heads).permute(3, 0, 4, 1, 2, 5)
            out: Any = local_attention(*qkv, block=self.window_size)
            return self.proj(out.permute(0, 2, 3, 1, 4).reshape(B, H, W, C))
        return self._in_windows(pad_to_multiple(x, self.window_size))[:, :H, :W]

    def _in_windows(self, x: Float[Tensor, "B H2 W2 C"]) -> Float[Tensor, "B H2 W2 C"]:
        """Attention of full windows: all of the same size and nothing to mask, so SDPA takes them as a batch."""
        (B, H, W, C), w, heads = x.shape, self.window_size, self.num_heads
        rows, columns = H // w, W // w
        windows = x.reshape(B, rows, w, columns, w, C).transpose(2, 3).reshape(B * rows * columns, w * w, C)
        query, key, value = self.qkv(windows).unflatten(-1, (3, heads, C // heads)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.proj(out).view(B, rows, columns, w, w, C).transpose(2, 3).reshape(B, H, W, C)


@register_notrace_function
def pad_to_multiple(x: Float[Tensor, "B H W C"], multiple: int) -> Float[Tensor, "B H2 W2 C"]:
    """Zeros at the bottom and right up to a multiple."""
    below, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


class DepthwiseConv(nn.Conv2d):
    """A depth-wise convolution of a channels-last map (B, H, W, C), size kept."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """The map after convolution; the permutations move no memory."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LocalConcentration(nn.Module):
    """LCM: 7x7 depth-wise convolution, GELU, norm, and another."""

    def __init__(self, dim: int, norm: Literal["bn", "ln2d", "gn"]) -> None:
        super().__init__()
        self.conv1, self.act, self.norm, self.conv2 = (
            DepthwiseConv(dim, 7),
            nn.GELU(),
            NORMS[norm](dim),
            DepthwiseConv(dim, 7),
        )

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """The map after both."""
        x = self.norm(self.act(self.conv1(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.conv2(x)


class WindowBlock(nn.Module):
    """x + CPE, + window attention, + CPE, + MLP."""

    def __init__(self, dim: int, num_heads: int, window_size: int, mask_padding: bool, drop_path: float) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([DepthwiseConv(dim, 3), DepthwiseConv(dim, 3)])
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size, mask_padding)
        self.mlp, self.drop_path = Mlp(dim, 4 * dim), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """The map after the block."""
        x = x + self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.cpe[1](x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class GlobalBlock(nn.Module):
    """x + CPE, + linear attention, + LCM, + MLP."""

    def __init__(self, dim: int, num_heads: int, lcm_norm: Literal["bn", "ln2d", "gn"], drop_path: float) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([DepthwiseConv(dim, 3)])
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.local_mp = ReLULinearAttention(dim, num_heads), LocalConcentration(dim, lcm_norm)
        self.mlp, self.drop_path = Mlp(dim, 4 * dim), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """The map after the block."""
        x = x + self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.local_mp(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: an image to a channels-last map at a quarter of its size."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, 2, 1),
            nn.BatchNorm2d(dim // 2),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 3, 2, 1),
            nn.BatchNorm2d(dim),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B H W C"]:
        """The map; the image is padded to a multiple of 4."""
        x = pad_to_multiple(x.permute(0, 2, 3, 1), 4).permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Norm and a 2x2 convolution of stride 2."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(dim), nn.Conv2d(dim, out, 2, 2)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H2 W2 D"]:
        """The map at half the size, rounded up."""
        return self.proj(pad_to_multiple(self.norm(x), 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class L2ViT(nn.Module):
    """The model, as a timm model: NCHW features at strides 4, 8, 16, 32, any input size.

    depths, dims: blocks and channels of the four stages; channels are multiples of 32, the width of a head.
    window_size: of the windows, in positions of the map. lcm_norm: "bn" as published, "ln2d" or "gn" for small batches.
    mask_padding: whether windows at the border see only the map.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        *,
        window_size: int = 7,
        lcm_norm: Literal["bn", "ln2d", "gn"] = "bn",
        mask_padding: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if any(dim % HEAD_DIM for dim in dims):
            raise ValueError(f"dims must be multiples of {HEAD_DIM}, the width of a head, got {dims}")
        if lcm_norm not in NORMS:
            raise ValueError(f"lcm_norm must be one of {', '.join(NORMS)}, got {lcm_norm!r}")
        self.num_classes, self.in_chans, self.grad_checkpointing = num_classes, in_chans, False
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.stem = Stem(in_chans, dims[0])
        self.downsamples = nn.ModuleList(
            [nn.Identity(), *[Downsample(narrow, wide) for narrow, wide in pairwise(dims)]]
        )
        rates = iter([drop_path_rate * index / max(sum(depths) - 1, 1) for index in range(sum(depths))])
        self.stages = nn.ModuleList()
        for depth, dim in zip(depths, dims, strict=True):
            heads, blocks = dim // HEAD_DIM, nn.Sequential()
            for index in range(depth):
                if index % 2 == 0:
                    blocks.append(WindowBlock(dim, heads, window_size, mask_padding, next(rates)))
                else:
                    blocks.append(GlobalBlock(dim, heads, lcm_norm, next(rates)))
            self.stages.append(blocks)
        self.norm: nn.Module = nn.LayerNorm(dims[-1])
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """None: parameters of one dimension get no decay anyway."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """For layer-wise learning rates."""
        single = [(r"^stages\.(\d+)\.(\d+)", None), (r"^downsamples\.(\d+)", (0,)), (r"^norm", (99999,))]
        blocks = r"^(?:stages|downsamples)\.(\d+)" if coarse else single
        return {"stem": r"^stem", "blocks": blocks}

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

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, window_size: int | None = None) -> None:  # noqa: ARG002 - as timm calls it
        """Any size works as it is; `window_size` changes the windows."""
        if window_size is not None:
            for module in self.modules():
                if isinstance(module, WindowAttention):
                    module.window_size = window_size

    def _run(self, x: Tensor, last: int) -> list[Tensor]:
        x, maps = self.stem(x), []
        for downsample, stage in zip(self.downsamples[: last + 1], self.stages[: last + 1], strict=True):
            x = downsample(x)
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """The last map, normalised."""
        return self.norm(self._run(x, len(self.stages) - 1)[-1]).permute(0, 3, 1, 2)

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
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of the stages, as timm's models give them; `norm` applies to the last."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt}")
        take, highest = feature_take_indices(len(self.stages), indices)
        end = len(self.stages) - 1
        maps = self._run(x, highest if stop_early and intermediates_only else end)
        chosen = [self.norm(maps[i]) if norm and i == end else maps[i] for i in take]
        if output_fmt == "NCHW":
            chosen = [m.permute(0, 3, 1, 2).contiguous() for m in chosen]
        return chosen if intermediates_only else (self.norm(maps[-1]).permute(0, 3, 1, 2), chosen)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last one wanted; returns the indices."""
        take, highest = feature_take_indices(len(self.stages), indices)
        self.stages, self.downsamples = self.stages[: highest + 1], self.downsamples[: highest + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def filter_checkpoint(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:  # noqa: ARG001 - timm passes it
    """A state dict of ours, or of the published code (under `model_ema` or `model`), with the names of this model."""
    for wrapper in ("model_ema", "model", "state_dict"):
        state = state.get(wrapper, state)
    if "stem.proj.0.weight" in state:
        return state
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("module.")
        key = key.replace("downsample_layers.0.proj.proj.", "stem.proj.").replace("downsample_layers.0.", "stem.")
        key = key.replace("downsample_layers.", "downsamples.").replace("head.", "head.fc.", 1)
        renamed[key] = value
    return renamed
