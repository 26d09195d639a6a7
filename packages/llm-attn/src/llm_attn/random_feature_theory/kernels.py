"""Kernels of infinitely many heads or neurons, in closed form (derived from the models of `features`).

With c the cosine of two keys, q that of two queries (ones included) and rho = q c,

    K_RFA(x, x') = 1/N^2 sum_ij kappa(rho_ij) (1 + <x_i, x'_j>)
    kappa(rho)   = E relu(a) relu(b) = (sqrt(1 - rho^2) + (pi - arccos rho) rho) / (2 pi)
    K_MLP(x, x') = kappa((1 + sum_i <x_i, x'_i>) / (N + 2))

BRFA has E relu(m + z) relu(m' + z') in place of kappa, m = <x_0, x_i>. Norms other than one factor out, and m becomes
m over the standard deviation |x~_0| |x~_i| / 2.

Two ways, held against each other: `exact=True` is the formula as it stands in float64 (arccos; an integral for BRFA).
The other works in the samples' dtype: kappa(rho) = rho/4 + even(|rho|) with a polynomial of degree 8 in sqrt(1 - |rho|)
(error 7e-8), and for BRFA the Hermite series sum_k c_k(m) c_k(m') rho^k, c_k(m) = E relu(m + z) He_k(z) / sqrt(k!), of
which the first 24 terms are taken. The series is a kernel itself; it differs from the integral by under 2e-5 where
|rho| <= 0.9, and by at most 1e-3 at |rho| = 1, where only a key meets itself under the same query.

Decided here: the integral runs over z > -m only, where the integrand is smooth, by Gauss-Legendre. Gauss-Hermite over
all z stumbles over the kink of the relu: 8e-4 with 80 nodes, against 1e-11 (|rho| up to 0.99).
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm_attn.random_feature_theory.features import Mean, concatenated, mean_matrix
from llm_attn.random_feature_theory.inputs import Sets

TERMS = 24
"""Of the Hermite series."""
_NODES = 80
_REACH = 9.0
"""Standard deviations up to which z is integrated."""
_TILE = 32, 48
"""Samples of a tile, times N keys each: what a core's cache holds."""


def arc_cosine(rho: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """kappa(rho) = E relu(a) relu(b) of two standard normals with correlation rho (arc-cosine kernel of degree 1)."""
    rho = rho.clamp(-1, 1)
    return ((1 - rho * rho).sqrt() + (math.pi - rho.arccos()) * rho) / (2 * math.pi)


def _even_part(degree: int = 8) -> list[float]:
    """Polynomial in w = sqrt(1 - |rho|) for (sqrt(1 - rho^2) + rho arcsin rho) / (2 pi), highest power first."""
    nodes = (1 - np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))) / 2
    rho = 1 - nodes**2
    values = (np.sqrt(1 - rho**2) + rho * np.arcsin(rho)) / (2 * np.pi)
    return [float(number) for number in np.linalg.solve(np.vander(nodes), values)]


_EVEN_PART = _even_part()


def fast_arc_cosine(rho: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """kappa by a polynomial, to 7e-8 in any dtype that holds it; rho must lie in [-1, 1] up to rounding."""
    w = rho.abs().neg_().add_(1).clamp_(min=0).sqrt_()
    out = torch.full_like(w, _EVEN_PART[0])
    for coefficient in _EVEN_PART[1:]:
        out.mul_(w).add_(coefficient)
    return out.add_(rho, alpha=0.25)


def rectified_product(
    mean: Float[Tensor, "*s"], other_mean: Float[Tensor, "*s"], rho: Float[Tensor, "*s"], *, nodes: int = _NODES
) -> Float[Tensor, "*s"]:
    """E relu(m + z) relu(m' + z') of two standard normals with correlation rho, by an integral over z > -m."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    mean, other_mean, rho = torch.broadcast_tensors(mean, other_mean, rho)
    low = -mean
    half = (_REACH - low) / 2
    spread = (1 - rho * rho).clamp(min=0).sqrt()
    out = torch.zeros_like(low)
    for point, weight in zip(points, weights, strict=True):
        z = low + half * (1 + point)
        density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        out += weight * half * (mean + z) * density * rectified_mean(other_mean + rho * z, spread)
    return out


def rectified_mean(mean: Float[Tensor, "*s"], spread: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """E relu(y), y from N(mean, spread^2): mean Phi(mean/spread) + spread phi(mean/spread)."""
    scaled = mean / spread.clamp(min=1e-12)
    density = torch.exp(-scaled * scaled / 2) / math.sqrt(2 * math.pi)
    return mean * torch.special.ndtr(scaled) + spread * density


def hermite_coefficients(mean: Float[Tensor, "*s"], terms: int = TERMS) -> Float[Tensor, "terms *s"]:
    """c_k(m) = E relu(m + z) He_k(z) / sqrt(k!): m Phi + phi, Phi, then phi(m) He_(k-2)(-m) / sqrt(k!)."""
    m = mean.double()
    density, below = torch.exp(-m * m / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(m)
    out = [m * below + density, below]
    scaled, before = density / math.sqrt(2), torch.zeros_like(m)  # phi(m) He_(k-2)(-m) / sqrt(k!) for k = 2, 1
    for k in range(2, terms):
        out.append(scaled)
        following = -m * scaled / math.sqrt(k + 1) - (k - 2) * before / math.sqrt((k + 1) * k)
        scaled, before = following, scaled
    return torch.stack(out[:terms]).to(mean.dtype)


def head_kernel(
    sets: Sets,
    other: Sets | None = None,
    *,
    mean: Mean = "zero",
    exact: bool = False,
    on_tile: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "n n2"]:
    """K_RFA (mean="zero") or K_BRFA (mean="identity"; any W_0) of samples with `other`, or with themselves.

    exact: the formula in float64, slow. on_tile: told how many tiles are done, of how many. ValueError if d differs.
    """
    symmetric = other is None
    left = _Side(sets, mean, exact)
    right = left if other is None else _Side(other, mean, exact)
    if left.query.shape[-1] != right.query.shape[-1]:
        raise ValueError(f"samples must agree on d, got {sets.d} and {right.query.shape[-1] - 1}")
    out = left.query.new_zeros(len(left.query), len(right.query))
    tiles = list(_tiles(len(left.query), len(right.query), symmetric))
    for done, (rows, columns) in enumerate(tiles, 1):
        out[rows, columns] = _tile(left, right, rows, columns, exact)
        if on_tile is not None:
            on_tile(done, len(tiles))
    return out.tril() + out.tril(-1).T if symmetric else out


class _Side:
    """Samples as a tile reads them: unit vectors, and per key its weight, standard deviation and mean."""

    def __init__(self, sets: Sets, mean: Mean, exact: bool) -> None:
        query, keys, weight = ((t.double() if exact else t) for t in (sets.query, sets.keys, sets.weight))
        long, longs = query.norm(dim=-1, keepdim=True), keys.norm(dim=-1)
        self.query, self.keys = query / long, keys / longs[..., None]
        self.weight = weight * long * longs.square() / 2  # one |x~_i| of the score, one of the value
        shift = torch.from_numpy(mean_matrix(mean, sets.d)).to(query)
        self.mean: Tensor | None = None
        if shift.any():
            self.mean = ((query @ shift)[:, None] @ keys.mT)[:, 0] / (long * longs / 2)
            if not exact:
                self.series = hermite_coefficients(self.mean)


def _tiles(n: int, n2: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    for top in range(0, n, _TILE[0]):
        bottom = min(top + _TILE[0], n)
        for left in range(0, bottom if symmetric else n2, _TILE[1]):
            yield slice(top, bottom), slice(left, min(left + _TILE[1], n2))


def _tile(left: _Side, right: _Side, rows: slice, columns: slice, exact: bool) -> Float[Tensor, "b c"]:
    N, N2 = left.keys.shape[1], right.keys.shape[1]
    cosine = left.keys[rows].flatten(0, 1) @ right.keys[columns].flatten(0, 1).T
    cosine = cosine.view(-1, N, len(right.query[columns]), N2)
    rho = cosine * (left.query[rows] @ right.query[columns].T)[:, None, :, None]
    if left.mean is None or right.mean is None:
        value = arc_cosine(rho) if exact else fast_arc_cosine(rho)
    elif exact:
        value = rectified_product(left.mean[rows, :, None, None], right.mean[columns], rho.clamp(-1, 1))
    else:
        value = _series(left.series[:, rows], right.series[:, columns], rho)
    summed = (value.mul_(cosine) * right.weight[columns]).sum(-1)
    return (summed * left.weight[rows, :, None]).sum(1)


def _series(left: Tensor, right: Tensor, rho: Float[Tensor, "b N c N2"]) -> Tensor:
    """sum_k c_k(m) c_k(m') rho^k by Horner's rule; each step adds an outer product."""
    power = rho.reshape(left[0].numel(), right[0].numel())
    out = torch.zeros_like(power)
    for a, b in zip(left.flip(0).flatten(1), right.flip(0).flatten(1), strict=True):
        out.mul_(power).addr_(a, b)
    return out.view_as(rho)


def neuron_kernel(sets: Sets, other: Sets | None = None, *, exact: bool = False) -> Float[Tensor, "n n2"]:
    """K_MLP of samples with `other`, or with themselves. ValueError on masked keys and on other numbers of keys."""
    num_keys, d = sets.keys.shape[1], sets.d
    left = concatenated(sets, num_keys, d)
    right = left if other is None else concatenated(other, num_keys, d)
    if exact:
        left, right = left.double(), right.double()
    norm, other_norm = left.norm(dim=-1, keepdim=True), right.norm(dim=-1, keepdim=True)
    rho = (left / norm) @ (right / other_norm).T
    scale = norm * other_norm.T / (num_keys + 2)
    return scale * (arc_cosine(rho) if exact else fast_arc_cosine(rho))
