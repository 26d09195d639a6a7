"""The "little bit of attention": a block that asks which channels and which places matter, at the price of one pass.

    u  = mean over places of X                       (B, C)
    gc = W2 relu(W1 u)                               W1: (C/r, C), W2: (C, C/r), no biases
    gs = scale * BN(V X)                             V: a 1x1 convolution to one channel, scale: one number
    Y  = X * 2 sigmoid(gc + gs)                      one sigmoid, one product

W2 and scale start at zero, so Y = X exactly: a pretrained network is not disturbed. Nothing here is C x C or places x
places, which is what makes relation and non-local blocks slow.

Eisenbach, Lübberstedt, Aganian, Gross, "A Little Bit Attention Is All You Need for Person Re-Identification", ICRA
2023, arXiv:2302.14574. Decided here: no code of the authors is published, so these layers are a reconstruction of what
the abstract promises (an attention block that hardly slows inference, put where a search finds it pays), not a copy.

Shapes: B crops, C channels, H x W places.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shared_kernels import apply_channel_gate, channel_logits

Kind = Literal["c", "s", "cs"]


class LightAttention(nn.Module):
    """The block. kind: "c" weighs channels, "s" places, "cs" both. reduction: r, how much narrower the channel gate is.

    Raises ValueError on another kind, on fewer than 1 channel, and if reduction leaves no channel.
    """

    def __init__(self, channels: int, *, kind: Kind = "cs", reduction: int = 16) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be 'c', 's' or 'cs', got {kind!r}")
        if channels < 1 or not 1 <= reduction <= channels:
            raise ValueError(f"reduction must lie in [1, channels], got {reduction} for {channels} channels")
        self.channels, self.kind = channels, kind
        if "c" in kind:
            self.w1 = nn.Parameter(torch.empty(channels // reduction, channels))
            self.w2 = nn.Parameter(torch.zeros(channels, channels // reduction))
            nn.init.kaiming_uniform_(self.w1, a=math.sqrt(5))
        if "s" in kind:
            self.project = nn.Conv2d(channels, 1, 1, bias=False)
            self.norm: nn.Module = nn.BatchNorm2d(1)
            self.scale: Tensor | None = nn.Parameter(torch.zeros(()))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Y. Raises ValueError, as `channel_logits` does, if x has another number of channels."""
        if self.kind == "s":
            return x * (2 * torch.sigmoid(self.spatial_logits(x)))
        logits = channel_logits(x, self.w1, self.w2)
        return apply_channel_gate(x, logits, gain=2.0, spatial=self.spatial_logits(x) if self.kind == "cs" else None)

    def spatial_logits(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 H W"]:
        """gs, what the block thinks of every place. Raises ValueError for kind "c", which looks at none."""
        if self.kind == "c":
            raise ValueError("a block of kind 'c' has no spatial gate; use 's' or 'cs'")
        projected = self.project(x)
        return projected if self.scale is None else self.scale * self.norm(projected)

    @torch.no_grad()
    def fold(self) -> None:
        """BN and scale go into V, for inference. In eval mode the output stays the same; training then makes no
        sense.
        """
        if self.kind == "c" or self.scale is None:
            return
        norm = self.norm
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_var is None or norm.running_mean is None:
            raise TypeError(f"the spatial gate's norm must be a BatchNorm2d with statistics, is {type(norm).__name__}")
        factor = self.scale * norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        folded = nn.Conv2d(self.channels, 1, 1, bias=False, dtype=factor.dtype, device=factor.device)
        folded.weight.copy_(self.project.weight * factor)
        folded.bias = nn.Parameter((self.scale * norm.bias - norm.running_mean * factor).view(1))
        self.project, self.norm = folded, nn.Identity()
        del self.scale
        self.scale = None

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds for one crop whose map is height x width: 2 C C/r for the channels, C H W for the places."""
        channel = 2 * self.w1.numel() if "c" in self.kind else 0
        return channel + (self.channels * height * width if "s" in self.kind else 0)
