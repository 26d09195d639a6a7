"""The functions that are learned: averages over keys of some F(x_0, x_i) (section 3.2), and their complexity.

    f*(x) = 1/N sum_i F(x_0, x_i),   F(x_0, x_i) = sum_rs <x_0^(x)r (x) x_i^(x)s, f_rs>
    B(f*) = inf over such sums of  sum_k C_k sum_{max(r,s)=k} |f_rs|_F^2,   C_k = max(k^4.5 4^k, 1)

B is an upper bound in every family here: it is that of the sum that stands in the docstring.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Target(Protocol):
    """A family of target functions with a direction beta."""

    @property
    def label(self) -> str:
        """How figures call it."""

    def __call__(self, x: Float[Tensor, "n N+1 d"], beta: Float[Tensor, "d"]) -> Float[Tensor, "n"]:
        """f*(x)."""

    def complexity(self, d: int, *, beta_norm: float = 1.0) -> float:
        """Upper bound on B(f*)."""


def degree_constant(k: int) -> float:
    """C_k = max(k^4.5 4^k, 1): what a part of degree k costs. ValueError on a negative degree."""
    if k < 0:
        raise ValueError(f"a degree must be at least 0, got {k}")
    return max(k**4.5 * 4.0**k, 1.0)


@dataclass(frozen=True)
class Average:
    """F = <beta, x_i>^p, which is f_0p = beta^(x)p: B <= C_p |beta|^(2p). p = 1 is linear in the keys."""

    p: int

    def __post_init__(self) -> None:
        _check_degree("p", self.p)

    @property
    def label(self) -> str:
        """How figures call it."""
        return f"average p={self.p}"

    def __call__(self, x: Float[Tensor, "n N+1 d"], beta: Float[Tensor, "d"]) -> Float[Tensor, "n"]:
        """1/N sum_i <beta, x_i>^p."""
        return (x[:, 1:] @ beta).pow(self.p).mean(1)

    def complexity(self, d: int, *, beta_norm: float = 1.0) -> float:  # noqa: ARG002
        """C_p |beta|^(2p), whatever d."""
        return degree_constant(self.p) * beta_norm ** (2 * self.p)


@dataclass(frozen=True)
class Correlation:
    """F = <x_0, x_i>^q <beta, x_i>, which is f_q,q+1 with |f|_F^2 = d^q |beta|^2: B <= C_(q+1) d^q |beta|^2."""

    q: int

    def __post_init__(self) -> None:
        _check_degree("q", self.q)

    @property
    def label(self) -> str:
        """How figures call it."""
        return f"correlation q={self.q}"

    def __call__(self, x: Float[Tensor, "n N+1 d"], beta: Float[Tensor, "d"]) -> Float[Tensor, "n"]:
        """1/N sum_i <x_0, x_i>^q <beta, x_i>."""
        return _mean_correlation(x, beta, self.q)

    def complexity(self, d: int, *, beta_norm: float = 1.0) -> float:
        """C_(q+1) d^q |beta|^2."""
        return degree_constant(self.q + 1) * d**self.q * beta_norm**2


@dataclass(frozen=True)
class Mixture:
    """F = (1 - g) <beta, x_i>^2 + g <x_0, x_i> <beta, x_i>: from an easy average (g = 0) to a correlation (g = 1)."""

    g: float

    def __post_init__(self) -> None:
        if not 0 <= self.g <= 1:
            raise ValueError(f"g must lie in [0, 1], got {self.g}")

    @property
    def label(self) -> str:
        """How figures call it."""
        return f"mixture g={self.g:g}"

    def __call__(self, x: Float[Tensor, "n N+1 d"], beta: Float[Tensor, "d"]) -> Float[Tensor, "n"]:
        """(1 - g) average + g correlation."""
        return (1 - self.g) * Average(2)(x, beta) + self.g * _mean_correlation(x, beta, 1)

    def complexity(self, d: int, *, beta_norm: float = 1.0) -> float:
        """C_2 ((1 - g)^2 |beta|^4 + g^2 d |beta|^2)."""
        return degree_constant(2) * ((1 - self.g) ** 2 * beta_norm**4 + self.g**2 * d * beta_norm**2)


def random_direction(d: int, *, generator: torch.Generator) -> Float[Tensor, "d"]:
    """beta: uniform on the unit sphere."""
    return torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)


def _mean_correlation(x: Tensor, beta: Tensor, q: int) -> Tensor:
    return ((x[:, 1:] @ x[:, 0, :, None])[..., 0].pow(q) * (x[:, 1:] @ beta)).mean(1)


def _check_degree(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
