"""Attention blocks of the literature that the light one is compared with, under one signature.

All take and give a map (B, C, H, W) and say what they cost (`macs`). Sources, each with what was left open there:
SqueezeExcitation: Hu, Shen and Sun, CVPR 2018. EfficientChannel: Wang et al., ECA-Net, CVPR 2020. CBAM: Woo et al.,
ECCV 2018; its MLP has biases and its spatial gate a BatchNorm, as in the published code. NonLocal: Wang et al., CVPR
2018, in the form of AGW (Ye et al., TPAMI 2021): dot products divided by the number of places, inner width C/2,
BatchNorm that starts at zero. RelationAware: Zhang et al., CVPR 2020 (RGA-S, RGA-C, RGA-SC), layer for layer; bound to
one map size.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shared_kernels import channel_gate

RGA_RATIO = 8  # the paper's s: of embeddings, of relations and inside the last two convolutions


class SqueezeExcitation(nn.Module):
    """X * sigmoid(W2 relu(W1 mean X)), without biases."""

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        narrow = max(1, channels // reduction)
        self.w1 = nn.Parameter(torch.empty(narrow, channels))
        self.w2 = nn.Parameter(torch.empty(channels, narrow))
        for weight in (self.w1, self.w2):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The map with its channels scaled."""
        return channel_gate(x, self.w1, self.w2)

    def macs(self, height: int, width: int) -> int:  # noqa: ARG002 - the same for every size
        """Multiply-adds for one crop."""
        return 2 * self.w1.numel()


class EfficientChannel(nn.Module):
    """X * sigmoid(conv1d over the channels' means), kernel the next odd number to |log2(C) / 2 + 1/2|."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        size = int(abs(math.log2(channels) / 2 + 0.5))
        size += 1 - size % 2
        self.channels = channels
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The map with its channels scaled."""
        gate = torch.sigmoid(self.conv(x.mean((2, 3))[:, None]))
        return x * gate[:, 0, :, None, None]

    def macs(self, height: int, width: int) -> int:  # noqa: ARG002 - the same for every size
        """Multiply-adds for one crop."""
        return self.channels * self.conv.kernel_size[0]


class CBAM(nn.Module):
    """First channels, by an MLP of mean and maximum, then places, by a 7x7 convolution of mean and maximum."""

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        narrow = max(1, channels // reduction)
        self.mlp = nn.Sequential(nn.Linear(channels, narrow), nn.ReLU(), nn.Linear(narrow, channels))
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The map gated twice."""
        logits = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        x = x * torch.sigmoid(logits)[:, :, None, None]
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.norm(self.conv(seen)))

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds for one crop: the MLP twice, and the convolution."""
        of_mlp = sum(layer.weight.numel() for layer in self.mlp if isinstance(layer, nn.Linear))
        return 2 * of_mlp + 98 * height * width


class NonLocal(nn.Module):
    """X + BN(W (theta(X)^T phi(X) / N) g(X)), N places, inner width C/2; BN's weight starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = max(1, channels // 2)
        self.theta, self.phi, self.g = (nn.Conv2d(channels, self.inner, 1) for _ in range(3))
        self.out = nn.Conv2d(self.inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The map, each place with what it took from all others."""
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        relation = theta.transpose(1, 2) @ phi / phi.shape[-1]
        taken = (g @ relation.transpose(1, 2)).unflatten(2, tuple(x.shape[2:]))
        return x + self.norm(self.out(taken))

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds for one crop: four 1x1 convolutions, and two products of places with places."""
        places = height * width
        return 4 * self.theta.weight.numel() * places + 2 * self.inner * places**2


class RelationAware(nn.Module):
    """RGA: each node's attention is learned from its relations to all nodes. parts: "s" places, "c" channels, "sc"
    both.

    size: (H, W) of the map, which the layers are built for. Raises ValueError if a width would be zero (fewer than 8
    channels, places, or 7 relations) and, when called, on a map of another size.
    """

    def __init__(self, channels: int, size: tuple[int, int], *, parts: Literal["s", "c", "sc"] = "sc") -> None:
        super().__init__()
        places = size[0] * size[1]
        if min(channels, places) < RGA_RATIO:
            raise ValueError(
                f"relation-aware attention needs at least {RGA_RATIO} channels and places, got {channels} channels on "
                f"{size[0]} x {size[1]}: use larger crops or an earlier stage"
            )
        self.channels, self.size, self.parts = channels, tuple(size), parts
        self.gates = nn.ModuleDict()
        if "s" in parts:
            self.gates["s"] = _Relations(nodes=places, features=channels)
        if "c" in parts:
            self.gates["c"] = _Relations(nodes=channels, features=places)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The map gated by places, then by channels."""
        if tuple(x.shape[2:]) != self.size:
            raise ValueError(
                f"relation-aware attention was built for a map of {self.size[0]} x {self.size[1]}, got "
                f"{x.shape[2]} x {x.shape[3]}: build the network for this input size"
            )
        if "s" in self.gates:
            x = x * torch.sigmoid(self.gates["s"](x.flatten(2))).unflatten(2, self.size)
        if "c" in self.gates:
            logits = self.gates["c"](x.flatten(2).transpose(1, 2))  # (B, 1, C)
            x = x * torch.sigmoid(logits)[:, 0, :, None, None]
        return x

    def macs(self, height: int, width: int) -> int:  # noqa: ARG002 - fixed when built
        """Multiply-adds for one crop."""
        return sum(gate.macs() for gate in self.gates.values() if isinstance(gate, _Relations))


class _Relations(nn.Module):
    """A logit for each of n nodes with f features each, (B, f, n) -> (B, 1, n)."""

    def __init__(self, nodes: int, features: int) -> None:
        super().__init__()
        narrow, relations = features // RGA_RATIO, nodes // RGA_RATIO
        self.nodes, self.features, self.narrow = nodes, features, narrow
        self.theta, self.phi, self.embed = (_point(features, narrow) for _ in range(3))
        self.relate = _point(2 * nodes, relations)
        hidden = max(1, (1 + relations) // RGA_RATIO)
        self.weigh = nn.Sequential(
            *_point(1 + relations, hidden), nn.Conv1d(hidden, 1, 1, bias=False), nn.BatchNorm1d(1)
        )

    def forward(self, x: Float[Tensor, "B f n"]) -> Float[Tensor, "B 1 n"]:
        graph = self.theta(x).transpose(1, 2) @ self.phi(x)  # (B, n, n), from node to node
        # node i's features are what it gives to all (row i, put into the channels) and what it takes (column i)
        relations = self.relate(torch.cat([graph.transpose(1, 2), graph], 1))
        own = self.embed(x).mean(1, keepdim=True)
        return self.weigh(torch.cat([own, relations], 1))

    def macs(self) -> int:
        n = self.nodes
        embeddings = 3 * self.features * self.narrow * n
        convolutions = sum(
            m.weight.numel() for part in (self.relate, self.weigh) for m in part if isinstance(m, nn.Conv1d)
        )
        return embeddings + self.narrow * n * n + convolutions * n


def _point(inside: int, outside: int) -> nn.Sequential:
    """ReLU BN conv1x1, over nodes in a row: a 1x1 convolution does not care how they are laid out."""
    return nn.Sequential(nn.Conv1d(inside, outside, 1, bias=False), nn.BatchNorm1d(outside), nn.ReLU())
