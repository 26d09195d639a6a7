"""DFYP on histograms: crop yield of a region from how its pixel values move through the season.

A gate weighs the bands (RCA: resolution-aware channel attention). A CNN then reads the gated histograms blended with
their gradient magnitude, taken by one of three operators (AOL-Net: Sobel, Scharr, or a learned mixture of both) that is
chosen per year; a ViT reads the gated histograms as they are. Two learned weights add the two predictions (fusion).

Zhang et al., "DFYP: A Dynamic Fusion Framework with Spectral Channel Attention and Adaptive Operator learning for Crop
Yield Prediction", arXiv:2507.05849 (v1, 2025); IEEE TGRS 2026, doi:10.1109/TGRS.2026.3684831. Histograms as input: You
et al., "Deep Gaussian Process for Crop Yield Prediction Based on Remote Sensing Data", AAAI 2017.
Left open there, decided here: "coarse data" means max pooling in RCA; exactly three operators exist; a year without an
entry in `operator_by_year` takes `operator`; any number of bands, composites and bins is allowed. A season that is not
over yet is padded with zeros, which is what composites without a valid pixel look like (`pad_season`).

Shapes: B rows, C bands, T composites, K bins, N = T K / patch^2 tokens, D width of the ViT.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from geo_yield.errors import InputProblem
from shared_kernels import channel_gate, stencil_blend

Operator = Literal["sobel", "scharr", "learnable"]

OPERATORS: tuple[Operator, ...] = ("sobel", "scharr", "learnable")

PUBLISHED_OPERATORS: Mapping[int, Operator] = {
    2009: "scharr",
    2010: "scharr",
    2011: "sobel",
    2012: "learnable",
    2013: "scharr",
    2014: "learnable",
    2015: "sobel",
}
"""Operators that the authors' two-stage selection chose for US soybean; every other year is "learnable"."""

SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
SCHARR = ((-3.0, 0.0, 3.0), (-10.0, 0.0, 10.0), (-3.0, 0.0, 3.0))


@dataclass(frozen=True, kw_only=True)
class DFYPConfig:
    """Size and operators of the network. The defaults are the paper's for MODIS: 26,790,713 parameters."""

    bands: int = 9
    """C."""
    steps: int = 32
    """T, composites of a season; a multiple of `patch`."""
    bins: int = 32
    """K, bins of a histogram; a multiple of `patch`."""
    outputs: int = 1
    """Numbers predicted per row."""
    rca_reduction: int = 16
    """The gate's hidden width is C // rca_reduction, at least 1."""
    cnn_width: int = 128
    """Channels of the first convolution; the six have 1, 2, 2, 4, 4, 4 times as many."""
    cnn_dense: int = 2048
    """Width between the CNN's two linear layers."""
    cnn_dropout: float = 0.5
    """Share of activations dropped after each convolution."""
    patch: int = 4
    """Side of a ViT token in composites and bins."""
    vit_dim: int = 256
    vit_depth: int = 4
    vit_heads: int = 8
    vit_head_dim: int = 64
    vit_mlp: int = 512
    """Hidden width of the ViT's feed-forward layers."""
    vit_dropout: float = 0.5
    """Dropped in attention weights, after attention and in feed-forward layers."""
    embedding_dropout: float = 0.1
    """Dropped in the token embeddings."""
    operator: Operator = "learnable"
    """Operator of years that `operator_by_year` does not name, and of calls without years."""
    operator_by_year: Mapping[int, Operator] | tuple[tuple[int, Operator], ...] = ()
    """Year to operator; kept as pairs sorted by year, so that configs compare and hash."""
    operator_after: Operator | None = None
    """Operator of years after the last one in `operator_by_year`, e.g. of seasons to come; None: `operator`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "operator_by_year", tuple(sorted(dict(self.operator_by_year).items())))
        for operator in (self.operator, self.operator_after or self.operator, *dict(self.operator_by_year).values()):
            if operator not in OPERATORS:
                raise InputProblem(f"operator must be one of {', '.join(OPERATORS)}, got '{operator}'")
        for name in ("bands", "steps", "bins", "outputs", "rca_reduction", "cnn_width", "cnn_dense", "patch"):
            if getattr(self, name) < 1:
                raise InputProblem(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps % self.patch or self.bins % self.patch:
            raise InputProblem(
                f"steps and bins must be multiples of patch={self.patch}, got {self.steps} and {self.bins}; "
                "pad the season with pad_season or choose another patch"
            )

    @classmethod
    def small(cls, bands: int, *, operator: Operator = "sobel") -> "DFYPConfig":
        """For hundreds of rows, not thousands: an eighth of the CNN, a ViT of width 64 and depth 2, little dropout."""
        return cls(
            bands=bands,
            cnn_width=16,
            cnn_dense=128,
            vit_dim=64,
            vit_depth=2,
            vit_heads=4,
            vit_head_dim=16,
            vit_mlp=128,
            cnn_dropout=0.1,
            vit_dropout=0.0,
            embedding_dropout=0.0,
            operator=operator,
        )

    def with_operators(self, operator: Operator, by_year: Mapping[int, Operator] | None = None) -> "DFYPConfig":
        """The same network with other operators."""
        return replace(self, operator=operator, operator_by_year=tuple((by_year or {}).items()), operator_after=None)

    def operator_of(self, year: int) -> Operator:
        """The operator that a row of `year` takes."""
        by_year = dict(self.operator_by_year)
        if by_year and self.operator_after and year > max(by_year):
            return self.operator_after
        return by_year.get(year, self.operator)


def learnable_stencil(
    alpha: Float[Tensor, ""], sobel: Float[Tensor, "3 3"], scharr: Float[Tensor, "3 3"]
) -> Float[Tensor, "3 3"]:
    """The learned horizontal kernel: a Sobel + (1 - a) Scharr with a = sigmoid(alpha), divided by its largest entry."""
    share = torch.sigmoid(alpha)
    kernel = share * sobel + (1 - share) * scharr
    return kernel / kernel.abs().max()


def pad_season(image: Float32[np.ndarray, "N C t K"], steps: int) -> Float32[np.ndarray, "N C T K"]:
    """Append all-zero composites until there are `steps`: in-season input for a network that saw whole seasons.

    Pad before centring: an all-zero histogram is a composite without valid pixels. Raises InputProblem if there are
    more than `steps` already.
    """
    missing = steps - image.shape[2]
    if missing < 0:
        raise InputProblem(f"the season has {image.shape[2]} composites, the model takes at most {steps}; cut it first")
    return np.pad(image, ((0, 0), (0, 0), (0, missing), (0, 0)))


class RCA(nn.Module):
    """Resolution-aware channel attention: x times sigmoid(W2 relu(W1 pool(x))), one gate per band (and chip)."""

    def __init__(self, bands: int, *, reduction: int, pool: Literal["max", "avg"]) -> None:
        super().__init__()
        hidden = max(bands // reduction, 1)
        self.pool: Literal["max", "avg"] = pool
        self.w1 = nn.Parameter(torch.empty(hidden, bands))
        self.w2 = nn.Parameter(torch.empty(bands, hidden))
        for weight in (self.w1, self.w2):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # what nn.Linear does

    def forward(self, x: Float[Tensor, "B C T K"]) -> Float[Tensor, "B C T K"]:
        return channel_gate(x, self.w1, self.w2, pool=self.pool)


class OperatorLayer(nn.Module):
    """AOL-Net: w O(x) + (1 - w) x, where each row's year chooses O. Only operators that occur are computed.

    O is the gradient magnitude of two 3x3 correlations in the (composite, bin) plane, the same kernels for every band.
    """

    sobel: Tensor
    scharr: Tensor

    def __init__(self, config: DFYPConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("sobel", torch.tensor(SOBEL), persistent=False)
        self.register_buffer("scharr", torch.tensor(SCHARR), persistent=False)

    def forward(self, x: Float[Tensor, "B C T K"], year: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B C T K"]:
        rows = self.route(len(x), year)
        if len(rows) <= 1:
            return self.apply_operator(next(iter(rows), self.config.operator), x)
        order = torch.cat([torch.as_tensor(of, device=x.device) for of in rows.values()])
        parts = x.index_select(0, order).split([len(of) for of in rows.values()])
        mixed = torch.cat([self.apply_operator(name, part) for name, part in zip(rows, parts, strict=True)])
        return mixed.index_select(0, order.argsort())

    def route(self, batch: int, year: Int[Tensor, "B"] | None) -> dict[Operator, list[int]]:
        """Operator to the rows that take it; only operators that some row takes. Raises ValueError on a wrong count."""
        if year is None:
            return {self.config.operator: list(range(batch))}
        if year.shape != (batch,):
            raise ValueError(f"year must have one entry for each of {batch} images, got shape {tuple(year.shape)}")
        rows: dict[Operator, list[int]] = {}
        for row, value in enumerate(year.tolist()):
            rows.setdefault(self.config.operator_of(value), []).append(row)
        return rows

    def apply_operator(self, name: Operator, x: Float[Tensor, "B C T K"]) -> Float[Tensor, "B C T K"]:
        """w O(x) + (1 - w) x with one operator for all rows."""
        if name == "learnable":
            kernel = learnable_stencil(self.alpha, self.sobel, self.scharr)
            return stencil_blend(x, kernel, kernel.T, self.weight, gain=torch.sigmoid(self.scale), eps=1e-6)
        kernel = self.get_buffer(name)
        return stencil_blend(x, kernel, kernel.T, self.weight, eps=1e-8)


def same_padding(size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis for a 3-wide convolution, as TensorFlow's "same": the odd one goes to the end."""
    total = max((math.ceil(size / stride) - 1) * stride + 3 - size, 0)
    return total // 2, total - total // 2


class ConvBlock(nn.Module):
    """3x3 convolution with "same" padding, batch normalisation, ReLU, dropout."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride)
        self.norm = nn.BatchNorm2d(channels_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B C T K"]) -> Float[Tensor, "B c t k"]:
        stride = self.conv.stride[0]
        padding = (*same_padding(x.shape[-1], stride), *same_padding(x.shape[-2], stride))
        return self.dropout(F.relu(self.norm(self.conv(F.pad(x, padding)))))


class CNN(nn.Module):
    """The branch that sees the operator: six convolution blocks, then two linear layers with nothing between them."""

    def __init__(self, config: DFYPConfig) -> None:
        super().__init__()
        widths = [config.bands, *(config.cnn_width * factor for factor in (1, 2, 2, 4, 4, 4))]
        strides = (1, 2, 1, 2, 1, 2)
        self.operators = OperatorLayer(config)
        self.blocks = nn.ModuleList(
            ConvBlock(before, after, stride=stride, dropout=config.cnn_dropout)
            for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        flat = widths[-1] * math.ceil(config.steps / 8) * math.ceil(config.bins / 8)
        self.dense = nn.Linear(flat, config.cnn_dense)
        self.head = nn.Linear(config.cnn_dense, config.outputs)
        kaiming_init(self)

    def forward(self, x: Float[Tensor, "B C T K"], year: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B outputs"]:
        x = self.operators(x, year)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dense(x.flatten(1)))


class Attention(nn.Module):
    """Pre-normalised self-attention without biases in the projections to queries, keys and values."""

    def __init__(self, dim: int, *, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.drop = heads, head_dim, dropout
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        B, N, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, N, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop if self.training else 0.0)
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))


class FeedForward(nn.Sequential):
    """Pre-normalised two-layer perceptron with GELU."""

    def __init__(self, dim: int, *, hidden: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
        )


class ViT(nn.Module):
    """The branch that sees the gated input alone: square patches, class token, position table, pre-norm layers."""

    def __init__(
        self,
        *,
        bands: int,
        size: tuple[int, int],
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        head_dim: int,
        mlp: int,
        dropout: float,
        embedding_dropout: float,
        outputs: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        tokens, pixels = (size[0] // patch) * (size[1] // patch), bands * patch**2
        self.embed = nn.Sequential(nn.LayerNorm(pixels), nn.Linear(pixels, dim), nn.LayerNorm(dim))
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, tokens + 1, dim))
        self.dropout = nn.Dropout(embedding_dropout)
        self.attentions = nn.ModuleList(
            Attention(dim, heads=heads, head_dim=head_dim, dropout=dropout) for _ in range(depth)
        )
        self.perceptrons = nn.ModuleList(FeedForward(dim, hidden=mlp, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, outputs)

    def features(self, x: Float[Tensor, "B C T K"]) -> Float[Tensor, "B D"]:
        """The class token after the last layer."""
        tokens = self.embed(self.patches(x))
        x = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        x = self.dropout(x + self.positions)
        for attention, perceptron in zip(self.attentions, self.perceptrons, strict=True):
            x = x + attention(x)
            x = x + perceptron(x)
        return self.norm(x[:, 0])

    def patches(self, x: Float[Tensor, "B C T K"]) -> Float[Tensor, "B N pixels"]:
        """Patches in raster order; inside one, the order is composite, bin, band."""
        B, C, T, K = x.shape
        grid = x.reshape(B, C, T // self.patch, self.patch, K // self.patch, self.patch)
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(B, T * K // self.patch**2, self.patch**2 * C)

    def forward(self, x: Float[Tensor, "B C T K"]) -> Float[Tensor, "B outputs"]:
        return self.head(self.features(x))


class DFYP(nn.Module):
    """The network for histograms, centred by the training rows' mean of each band. See `DFYPConfig` for its size."""

    def __init__(self, config: DFYPConfig) -> None:
        super().__init__()
        self.config = config
        self.rca = RCA(config.bands, reduction=config.rca_reduction, pool="max")
        self.cnn = CNN(config)
        self.vit = ViT(
            bands=config.bands,
            size=(config.steps, config.bins),
            patch=config.patch,
            dim=config.vit_dim,
            depth=config.vit_depth,
            heads=config.vit_heads,
            head_dim=config.vit_head_dim,
            mlp=config.vit_mlp,
            dropout=config.vit_dropout,
            embedding_dropout=config.embedding_dropout,
            outputs=config.outputs,
        )
        self.weight_cnn = nn.Parameter(torch.tensor(0.5))
        self.weight_vit = nn.Parameter(torch.tensor(0.5))

    def scores(
        self, image: Float[Tensor, "B C T K"], year: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B outputs"]:
        """Weighted sum of both branches, one column per output. Raises ValueError if the image has another size."""
        expected = (self.config.bands, self.config.steps, self.config.bins)
        if image.shape[1:] != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"image must be (rows, bands, steps, bins) = (B, {sizes}), got {tuple(image.shape)}")
        gated = self.rca(image)
        return self.weight_cnn * self.cnn(gated, year) + self.weight_vit * self.vit(gated)

    def forward(self, image: Float[Tensor, "B C T K"], year: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """Prediction per row (with more than one output: (B, outputs)). Without `year`, the default operator."""
        return self.scores(image, year).squeeze(-1)


def kaiming_init(module: nn.Module) -> None:
    """Kaiming-uniform weights and zero biases in every convolution and linear layer of `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
