"""DFYP on Sentinel-2 chips: production and yield of a county from all its 9 km false-colour chips of a season.

Each chip (B11, B08, B02 as three channels) passes a gate with average pooling, then a small CNN that sees it
blended with the gradient magnitude of its luminance, and a ViT that sees it as it is. Chip features are averaged over
dates and places, so any number of chips will do; both heads' two outputs are added with learned weights.

Zhang et al., "DFYP", arXiv:2507.05849; IEEE TGRS 2026, doi:10.1109/TGRS.2026.3684831. Chips, targets: Tiny CropNet (Lin
et al., "MMST-ViT: Climate Change-aware Crop Yield Prediction via Multi-Modal Spatial-Temporal Vision Transformer", ICCV
2023). Augmentation: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020.
Left open there, decided here: chips are divided by 255 before they are normalised (the published code jitters and
normalises raw bytes, which makes jittered chips nearly constant); no random augmentation when predicting; the published
accumulation of gradients over a whole epoch is not reproduced. Chips go through in chunks, each with its own gate, so
memory depends on the chunk.

Shapes: B counties, T dates, G chips per date, S side of a chip in pixels, n chips of a chunk, D feature width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geo_yield.dfyp import RCA, SCHARR, SOBEL, ViT, kaiming_init
from geo_yield.errors import InputProblem
from shared_kernels import stencil_blend

ChipOperator = Literal["sobel", "scharr"]

PUBLISHED_OPERATORS: Mapping[str, ChipOperator] = {
    "corn": "sobel",
    "cotton": "scharr",
    "soybean": "sobel",
    "winter wheat": "scharr",
}
"""Operators that the authors' two-stage selection chose per crop."""

CHANNEL_MEAN, CHANNEL_STD = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)
"""Of Tiny CropNet's chips (B11, B08, B02) after division by 255."""

LUMINANCE = (0.299, 0.587, 0.114)

Augment = Callable[[Float[Tensor, "n 3 S S"]], Float[Tensor, "n 3 S S"]]


@dataclass(frozen=True, kw_only=True)
class DFYPSentinel2Config:
    """Size and operator of the network. The defaults are the paper's for Sentinel-2: 1,381,007 parameters."""

    size: int = 224
    """S; a multiple of `patch`."""
    outputs: int = 2
    """Natural logarithms of production and of yield."""
    operator: ChipOperator = "sobel"
    rca_reduction: int = 8
    """The gate's hidden width is 3 // rca_reduction, at least 1."""
    cnn_widths: tuple[int, int, int, int] = (32, 64, 128, 128)
    """Channels of the four convolutions; the last is also the width of the CNN's chip features."""
    cnn_dropout: float = 0.5
    """Dropped around the CNN's linear layers; half of it in its convolutions."""
    patch: int = 16
    vit_dim: int = 128
    vit_depth: int = 6
    vit_heads: int = 6
    vit_head_dim: int = 32
    vit_mlp: int = 256
    vit_dropout: float = 0.5
    chunk: int = 8
    """Chips that go through the network together."""
    recompute: bool = False
    """Compute each chunk again in the backward pass: training memory of one chunk instead of a whole county."""

    def __post_init__(self) -> None:
        if self.operator not in ("sobel", "scharr"):
            raise InputProblem(f"operator must be sobel or scharr for Sentinel-2 chips, got '{self.operator}'")
        if self.size % self.patch or self.size < 16:
            raise InputProblem(f"size must be a multiple of patch={self.patch} and at least 16, got {self.size}")
        if self.chunk < 1:
            raise InputProblem(f"chunk must be at least 1, got {self.chunk}")


def unit_images(chips: UInt8[Tensor, "n S S 3"]) -> Float[Tensor, "n 3 S S"]:
    """Bytes, channels last, to floats in [0, 1], channels first."""
    return chips.permute(0, 3, 1, 2).float() / 255


def normalise(images: Float[Tensor, "n 3 S S"]) -> Float[Tensor, "n 3 S S"]:
    """Images in [0, 1] minus the channels' published means, over their deviations."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (CHANNEL_MEAN, CHANNEL_STD))
    return (images - mean) / std


def simclr_augmentation(size: int) -> Augment:
    """Random crop, flip, colour jitter, greyscale and blur of images in [0, 1], drawn anew at each call.

    Draws from torch's global random state, one draw for the whole chunk.
    """
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.GaussianBlur(9),
        ]
    )


class ChipCNN(nn.Module):
    """The branch that sees the operator: luminance edges blended in, four convolutions, mean over the chip."""

    kernel: Tensor
    luminance: Tensor

    def __init__(self, config: DFYPSentinel2Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        kernel = {"sobel": SOBEL, "scharr": SCHARR}[config.operator]
        self.register_buffer("kernel", torch.tensor(kernel), persistent=False)
        self.register_buffer("luminance", torch.tensor(LUMINANCE), persistent=False)
        widths = (3, *config.cnn_widths)
        self.convolutions = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths))
        self.dropout = nn.Dropout(config.cnn_dropout / 2)
        dim, drop = widths[-1], config.cnn_dropout
        self.head = nn.Sequential(
            nn.Dropout(drop),
            nn.Linear(dim, dim),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Linear(dim, dim // 2),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Linear(dim // 2, config.outputs),
        )

    def features(self, x: Float[Tensor, "n 3 S S"]) -> Float[Tensor, "n D"]:
        x = stencil_blend(x, self.kernel, self.kernel.T, self.weight, eps=1e-8, luma=self.luminance)
        last = len(self.convolutions) - 1
        for i, convolution in enumerate(self.convolutions):
            x = F.relu(convolution(x))
            x = self.dropout(x) if i > 0 else x
            x = F.max_pool2d(x, 2) if i < last else x.mean(dim=(2, 3))
        return x


class DFYPSentinel2(nn.Module):
    """The network for chips. See `DFYPSentinel2Config` for its size."""

    def __init__(self, config: DFYPSentinel2Config) -> None:
        super().__init__()
        self.config = config
        self.rca = RCA(3, reduction=config.rca_reduction, pool="avg")
        self.cnn = ChipCNN(config)
        self.vit = ViT(
            bands=3,
            size=(config.size, config.size),
            patch=config.patch,
            dim=config.vit_dim,
            depth=config.vit_depth,
            heads=config.vit_heads,
            head_dim=config.vit_head_dim,
            mlp=config.vit_mlp,
            dropout=config.vit_dropout,
            embedding_dropout=0.0,
            outputs=config.outputs,
        )
        self.weight_cnn = nn.Parameter(torch.full((config.outputs,), 0.5))
        self.weight_vit = nn.Parameter(torch.full((config.outputs,), 0.5))
        kaiming_init(self)
        for weight in (self.rca.w1, self.rca.w2):
            nn.init.kaiming_uniform_(weight)

    def forward(
        self,
        chips: UInt8[Tensor, "B T G S S 3"] | Sequence[UInt8[Tensor, "T G S S 3"]],
        *,
        augment: Augment | None = None,
    ) -> Float[Tensor, "B outputs"]:
        """Logarithms of production and yield per county; counties in a list may differ in T and G.

        augment: applied to each chunk in [0, 1] before normalisation, for training. Raises ValueError if the chips are
        not bytes, not of the configured size, or a county has none.
        """
        return torch.stack([self._county(county, augment) for county in chips])

    def scores(self, images: Float[Tensor, "n 3 S S"]) -> Float[Tensor, "n outputs"]:
        """Outputs for single normalised images, each taken for a whole county."""
        return self._heads(*self._chunk_features(images))

    def _county(self, chips: UInt8[Tensor, "T G S S 3"], augment: Augment | None) -> Float[Tensor, "outputs"]:
        size = self.config.size
        if chips.dtype != torch.uint8 or chips.ndim != 5 or chips.shape[2:] != (size, size, 3) or not len(chips):
            raise ValueError(
                f"a county's chips must be uint8 (dates, chips, {size}, {size}, 3), at least one, "
                f"got {chips.dtype} {tuple(chips.shape)}"
            )
        flat = chips.flatten(0, 1)
        features = [self._bytes_features(chunk, augment) for chunk in flat.split(self.config.chunk)]
        cnn, vit = (torch.cat(branch).mean(dim=0, keepdim=True) for branch in zip(*features, strict=True))
        return self._heads(cnn, vit)[0]

    def _bytes_features(
        self, chips: UInt8[Tensor, "n S S 3"], augment: Augment | None
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n d"]]:
        images = unit_images(chips)
        images = normalise(images if augment is None else augment(images))
        if self.config.recompute and torch.is_grad_enabled():
            return checkpoint(self._chunk_features, images, use_reentrant=False)
        return self._chunk_features(images)

    def _chunk_features(self, images: Float[Tensor, "n 3 S S"]) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n d"]]:
        gated = self.rca(images)
        return self.cnn.features(gated), self.vit.features(gated)

    def _heads(self, cnn: Float[Tensor, "n D"], vit: Float[Tensor, "n d"]) -> Float[Tensor, "n outputs"]:
        return self.weight_cnn * self.cnn.head(cnn) + self.weight_vit * self.vit.head(vit)
