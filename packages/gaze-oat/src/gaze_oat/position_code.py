"""Position codes of OAT: one vector for each grid index, whose cosines say how far two indices are apart.

Wanted: cos(E_i, E_j) = exp(-(i - j)^2 / (2 sigma^2)), and equal norms. The paper finds E by gradient descent, once,
before training:

    minimise over W ~ N(0, 1), (n, 86):
        [ sum_ij (cos(W_i, W_j) - target_ij)^2 + mean_i (|W_i| - mean |W|)^2 ] / (n (n - 1)) Adam, lr 0.01, 10,000 steps

The Gaussian Gram matrix is positive definite, so its factor is the answer in closed form: exact and instant.
Fang et al., ECCV 2024, arXiv:2407.13335, "distance-based positional encoding"; the other codes are its ablation.

Decided here: `closed` orders columns by their weight, so that a table narrower than n, and OAT's cut of the last
columns, lose the least; its rows have norm sqrt(columns), as if entries had variance 1. The paper writes the ablation's
frequencies as i^alpha / c and (i / c)^alpha; i counts sine-cosine pairs from 1 and alpha is 0.9.

Shapes: n indices, C columns.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from gaze_oat.errors import ScanpathProblem

Kind = Literal["solved", "closed", "sinusoid", "linear", "exp1", "exp2", "original_update"]
ALPHA = 0.9


def gaussian_gram(n: int, sigma: float) -> Float[Tensor, "n n"]:
    """exp(-(i - j)^2 / (2 sigma^2)) in float64."""
    if n < 1 or not sigma > 0:
        raise ScanpathProblem(f"a position code needs n >= 1 indices and sigma > 0, got n={n}, sigma={sigma}")
    index = torch.arange(n, dtype=torch.float64)
    return torch.exp(-((index[:, None] - index) ** 2) / (2 * sigma**2))


def cosines(table: Float[Tensor, "n C"]) -> Float[Tensor, "n n"]:
    """Cosine of every two rows."""
    unit = torch.nn.functional.normalize(table, dim=-1)
    return unit @ unit.T


def code_loss(table: Float[Tensor, "n C"], target: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """What the paper minimises."""
    n, norms = len(table), table.norm(dim=-1)
    misfit = ((cosines(table) - target) ** 2).sum() + ((norms - norms.mean()) ** 2).mean()
    return misfit / max(1, n * (n - 1))


def solved_code(
    n: int, columns: int = 86, *, sigma: float = 2.0, steps: int = 10_000, seed: int = 1234
) -> Float[Tensor, "n C"]:
    """The paper's solver; float32. Some seconds for 10,000 steps."""
    _check_columns(columns)
    target = gaussian_gram(n, sigma).float()
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(n, columns, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.01)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            code_loss(table, target).backward()
            optimizer.step()
    return table.detach()


def closed_code(n: int, columns: int = 86, *, sigma: float = 2.0) -> Float[Tensor, "n C"]:
    """Factor of the Gaussian Gram matrix, float64; exact for columns >= n, else nearest of that rank, renormalised."""
    _check_columns(columns)
    values, vectors = torch.linalg.eigh(gaussian_gram(n, sigma))
    factor = (vectors * values.clamp(min=0).sqrt()).flip(-1)[:, :columns]
    factor = torch.nn.functional.pad(factor, (0, columns - factor.shape[1]))
    return torch.nn.functional.normalize(factor, dim=-1) * columns**0.5


def sinusoid_code(n: int, columns: int, kind: Kind = "sinusoid") -> Float[Tensor, "n C"]:
    """Sines and cosines in turn; the kind says how frequencies fall: the transformer's, linear, exp1, exp2."""
    _check_columns(columns)
    pairs = (columns + 1) // 2
    i = torch.arange(1, pairs + 1, dtype=torch.float64)
    inverse = {
        "sinusoid": 10_000.0 ** (2 * (i - 1) / columns),
        "linear": i,
        "exp1": i**ALPHA / pairs * n,
        "exp2": (i / pairs) ** ALPHA * n,
    }[kind]
    angle = torch.arange(n, dtype=torch.float64)[:, None] / inverse
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :columns]


def updated_code(n: int, columns: int, *, power: int = 15) -> Float[Tensor, "n C"]:
    """`original_update`: each sinusoid turned in its plane with the centre's until cos = (old cos)^15; norms stay."""
    table = sinusoid_code(n, columns)
    centre = torch.nn.functional.normalize(table[n // 2], dim=0)
    norms = table.norm(dim=-1, keepdim=True)
    unit = table / norms
    cosine = unit @ centre
    rest = torch.nn.functional.normalize(unit - cosine[:, None] * centre, dim=-1)
    wanted = cosine.clamp(-1, 1) ** power
    turned = wanted[:, None] * centre + (1 - wanted**2).clamp(min=0).sqrt()[:, None] * rest
    turned[n // 2] = centre
    return turned * norms


def position_table(kind: Kind, n: int, columns: int, *, sigma: float = 2.0) -> Float[Tensor, "n C"]:
    """The table of that kind, float32."""
    if kind not in get_args(Kind):
        raise ScanpathProblem(f"position_code must be one of {', '.join(get_args(Kind))}, got '{kind}'")
    if kind == "solved":
        return solved_code(n, columns, sigma=sigma)
    if kind == "closed":
        return closed_code(n, columns, sigma=sigma).float()
    if kind == "original_update":
        return updated_code(n, columns).float()
    return sinusoid_code(n, columns, kind).float()


def _check_columns(columns: int) -> None:
    if columns < 2:
        raise ScanpathProblem(f"a position code needs at least 2 columns, got {columns}: widen the model")
