"""The theorems as formulas: shapes, not numbers to rely on.

Every constant of the paper is 1 here and logarithms are left out, so a bound says how an error scales with n, M, d and
the target, and not how large it is. `kernel_norm_bound` and `mlp_norm_bound` are exact inequalities on norms in the
kernels of `kernels`, derived here, which samples can be held against: y^T K^-1 y <= |f*|^2 for any samples.
"""

import math

from jaxtyping import Float
from torch import Tensor

_TERMS = 400
"""Of the series of kappa, more than enough at rho = 1/(N + 2)."""


def approximation_bound(complexity: float, *, d: int, heads: int, delta: float = 0.1) -> float:
    """E (f_M - f*)^2 <~ (d^2 + log M) B / (delta M), with probability 1 - delta over the frozen weights (theorem 1).

    The logarithm is kept, since it adds to d^2.
    """
    _check(complexity=complexity, d=d, heads=heads, delta=delta)
    return (d**2 + math.log(heads)) * complexity / (delta * heads)


def value_bounds(complexity: float, *, heads: int, delta: float = 0.1) -> tuple[float, float]:
    """sum_m |v_m| <~ sqrt(B) + sqrt(B / (delta M)) and sum_m |v_m|^2 <~ B / (delta M) of that f_M (theorem 1)."""
    _check(complexity=complexity, heads=heads, delta=delta)
    return complexity**0.5 + (complexity / (delta * heads)) ** 0.5, complexity / (delta * heads)


def value_norms(weights: Float[Tensor, "features targets"], *, heads: int) -> tuple[Tensor, Tensor]:
    """What `value_bounds` bounds, of weights of features over sqrt(M): `RandomHeadRegressor.coef_` for example."""
    _check(heads=heads)
    norms = (weights.unflatten(0, (heads, -1)) / heads**0.5).norm(dim=1)
    return norms.sum(0), norms.square().sum(0)


def excess_risk_bound(complexity: float, *, n: int, heads: int, d: int, delta: float = 0.1) -> float:
    """L(f_hat) - L(f*) <~ sqrt(B) (sqrt(1/n) + sqrt(d^2 / (delta M))) for a 1-Lipschitz loss (theorem 2)."""
    _check(complexity=complexity, n=n, heads=heads, d=d, delta=delta)
    return complexity**0.5 * (n**-0.5 + (d**2 / (delta * heads)) ** 0.5)


def samples_needed(complexity: float, *, error: float) -> float:
    """n at which the first term of `excess_risk_bound` falls to `error`: B / error^2."""
    _check(complexity=complexity, error=error)
    return complexity / error**2


def biased_gain(q: int, d: int) -> float:
    """B of RFA over B of BRFA for F = <x_0, x_i>^q G(x_i), about d^q: the correlation costs BRFA no power of d."""
    _check(d=d)
    return float(d**q)


def arc_cosine_coefficient(k: int) -> float:
    """Coefficient of rho^k in kappa: 1/(2 pi), 1/4, then (k - 3)!!^2 / (2 pi k!) at even k and 0 at odd k."""
    if k < 2:
        return (1 / (2 * math.pi), 0.25)[k]
    if k % 2:
        return 0.0
    half = k // 2
    # (k - 3)!! = (2h - 2)! / (2^(h-1) (h-1)!)
    log_double = math.lgamma(2 * half - 1) - (half - 1) * math.log(2) - math.lgamma(half)
    return math.exp(2 * log_double - math.lgamma(k + 1)) / (2 * math.pi)


def mlp_norm_bound(p: int, *, num_keys: int, beta_norm: float = 1.0) -> float:
    """|f*|^2 of 1/N sum_i <beta, x_i>^p in K_MLP is at most |beta|^(2p) / (N a_p), about (N + 2)^p / N / c_p.

    a_p is the coefficient of (sum_i <x_i, x'_i>)^p in K_MLP: the sum over k >= p of c_k binom(k, p) / (N + 2)^k.
    """
    _check(num_keys=num_keys)
    part = sum(arc_cosine_coefficient(k) * math.comb(k, p) * (num_keys + 2.0) ** -k for k in range(p, p + _TERMS))
    return beta_norm ** (2 * p) / (num_keys * part)


def kernel_norm_bound(query_degree: int, key_degree: int, *, squared_norm: float = 1.0) -> float:
    """|f*|^2 in K_RFA of 1/N sum_i <x_0^(x)r (x) x_i^(x)s, f> is at most |f|_F^2 over the coefficient of s^r t^s.

    (r, s) are the degrees. That coefficient of (1 + t) kappa((1 + s)(1 + t)/4) is the sum over k of
    c_k 4^-k binom(k, r) (binom(k, s) + binom(k, s - 1)). Averages <beta, x_i>^p have (0, p) and |beta|^(2p), so what
    they cost depends on neither N nor d, the advantage over `mlp_norm_bound`; correlations have (q, q + 1) and
    d^q |beta|^2.
    """
    r, s = query_degree, key_degree
    if min(r, s) < 0:
        raise ValueError(f"degrees must be at least 0, got {r} and {s}")
    part = 0.0
    for k in range(max(r, s - 1, 0), max(r, s) + _TERMS):
        of_keys = math.comb(k, s) + (math.comb(k, s - 1) if s else 0)
        part += arc_cosine_coefficient(k) * 4.0**-k * math.comb(k, r) * of_keys
    return squared_norm / part


def _check(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
    if numbers.get("delta", 0.5) >= 1:
        raise ValueError(f"delta is a probability below 1, got {numbers['delta']}")
