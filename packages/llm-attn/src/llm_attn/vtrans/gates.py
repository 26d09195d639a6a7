"""The gate of VTrans: one Gaussian multiplier per unit, trained by a variational information bottleneck.

A unit's output is multiplied by z = mu + sigma * eps, eps ~ N(0, 1). Noise that does not hurt may grow, and a unit
whose gate carries more noise than signal (sigma^2 > mu^2) goes. With the variational prior that fits best, a
zero-mean Gaussian of variance mu^2 + sigma^2, the information that a unit costs has a closed form (Dai et al.,
"Compressing Neural Networks using the Variational Information Bottleneck", ICML 2018):

    KL = 1/2 log(1 + mu^2 / sigma^2)            log alpha = log sigma^2 - log mu^2, a unit stays while that is below 0

Dutta et al., "VTrans: Accelerating Transformer Compression with Variational Information Bottleneck based Pruning",
arXiv:2406.05276. Left open there, decided here: sigma^2 is learned as its logarithm; noise is drawn anew for every
token (and, where a unit has several channels, for each of them), or with `noise="sample"` once for each row of the
batch.

Shapes: N units, C channels of a unit; `...` batch and tokens.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

Noise = Literal["token", "sample"]
EPSILON = 1e-8
"""Keeps logarithm and quotient finite, as in the published gate."""


def vib_gate(
    x: Float[Tensor, "... N"], mu: Float[Tensor, "N"], log_variance: Float[Tensor, "N"], noise: Float[Tensor, "... N"]
) -> Float[Tensor, "... N"]:
    """x * (mu + exp(log_variance / 2) * noise): a gate that is being trained."""
    return x * (mu + (log_variance / 2).exp() * noise).to(x.dtype)


def log_alpha(mu: Float[Tensor, "N"], log_variance: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """log(sigma^2 / mu^2): negative where a gate carries more signal than noise."""
    return log_variance - (mu.square() + EPSILON).log()


def vib_kl(mu: Float[Tensor, "N"], log_variance: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    """1/2 sum log(1 + mu^2 / sigma^2), in nats: KL(N(mu, sigma^2) || N(0, mu^2 + sigma^2)) of all units."""
    return 0.5 * torch.log1p(mu.square() / (log_variance.exp() + EPSILON)).sum()


class VIBGate(nn.Module):
    """Gates of N units with C channels each; it acts on the last axis, of N * C channels, unit by unit.

    In training mode noise is drawn from `generator`. Else, and wherever `fixed` says which units stay, a unit's
    multiplier is its mean (or 1, unless `weighted`) if it stays and 0 if not.
    """

    def __init__(
        self,
        num_units: int,
        *,
        channels: int = 1,
        log_variance: float = -9.0,
        noise: Noise = "token",
        weighted: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {', '.join(get_args(Noise))}, got {noise!r}")
        super().__init__()
        self.channels, self.noise, self.weighted, self.generator = channels, noise, weighted, generator
        start = torch.zeros(2, num_units, device=None if generator is None else generator.device)
        start.normal_(std=0.01, generator=generator)
        self.mu = nn.Parameter(1 + start[0])
        self.log_variance = nn.Parameter(log_variance + start[1])
        self.fixed: Tensor | None = None

    @property
    def log_alpha(self) -> Float[Tensor, "N"]:
        """log(sigma^2 / mu^2) of every unit."""
        return log_alpha(self.mu, self.log_variance)

    @property
    def keep(self) -> Bool[Tensor, "N"]:
        """Units that stay: those that were fixed, else those with more signal than noise."""
        return self.log_alpha.detach() < 0 if self.fixed is None else self.fixed

    def fix(self, keep: Bool[Tensor, "N"] | None) -> None:
        """Says which units stay from now on, without noise; None lets the gates decide again."""
        self.fixed = None if keep is None else keep.to(self.mu.device)

    def keep_probability(self, slope: float = 10.0) -> Float[Tensor, "N"]:
        """sigmoid(-slope * log alpha); exactly 0 and 1 once the units are fixed."""
        if self.fixed is not None:
            return self.fixed.to(self.mu.dtype)
        return torch.sigmoid(-slope * self.log_alpha)

    def kl(self) -> Float[Tensor, ""]:
        """Nats that the units cost together."""
        return vib_kl(self.mu, self.log_variance)

    def multiplier(self) -> Float[Tensor, "N"]:
        """What units are multiplied by when no noise is drawn."""
        return self.keep.to(self.mu.dtype) * (self.mu if self.weighted else 1.0)

    def forward(self, x: Float[Tensor, "... N*C"]) -> Float[Tensor, "... N*C"]:
        """The gated x; ValueError where its last axis is not N * C long."""
        units = self.mu.numel()
        if x.shape[-1] != units * self.channels:
            raise ValueError(f"the gate has {units} units of {self.channels} channels, got {x.shape[-1]} channels")
        if not self.training or self.fixed is not None:
            return x * self.multiplier().repeat_interleave(self.channels).to(x.dtype)
        mu, log_variance = (p.repeat_interleave(self.channels) for p in (self.mu, self.log_variance))
        return vib_gate(x, mu, log_variance, self._draw(x))

    def _draw(self, x: Tensor) -> Tensor:
        shape = x.shape if self.noise == "token" else (x.shape[0], *(1 for _ in x.shape[1:-1]), x.shape[-1])
        return torch.randn(shape, generator=self.generator, dtype=self.mu.dtype, device=x.device)


def masked_layer_norm(
    x: Float[Tensor, "... N"],
    weight: Float[Tensor, "N"],
    bias: Float[Tensor, "N"] | None,
    keep: Bool[Tensor, "N"],
    *,
    eps: float,
) -> Float[Tensor, "... N"]:
    """Layer normalisation with the statistics of kept channels only; the others pass as they are."""
    own = keep.nonzero()[:, 0]
    kept = F.layer_norm(x[..., own], (len(own),), weight[own], None if bias is None else bias[own], eps)
    return x.index_copy(-1, own, kept)


def masked_rms_norm(
    x: Float[Tensor, "... N"], weight: Float[Tensor, "N"], keep: Bool[Tensor, "N"], *, eps: float
) -> Float[Tensor, "... N"]:
    """Root-mean-square normalisation with the mean square of kept channels only; the others pass as they are."""
    own = keep.nonzero()[:, 0]
    wide = x[..., own].float() if x.dtype in (torch.bfloat16, torch.float16) else x[..., own]
    kept = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return x.index_copy(-1, own, weight[own] * kept.to(x.dtype))
