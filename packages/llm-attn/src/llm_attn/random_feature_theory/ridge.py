"""Ridge regression by one eigendecomposition, which serves all strengths and all targets.

    dual    a = (K + lam tr(K) I)^-1 y,             prediction K(x, X) a
    primal  w = (Phi^T Phi + lam tr(K) I)^-1 Phi^T y,  prediction phi(x) w;  tr(Phi^T Phi) = tr(K)

lam is relative: lam tr(K) = lam n (mean diagonal of K). The paper's estimator is empirical risk minimisation under
bounds on the norms of v; ridge is its Lagrangian form and what one computes.

Decided here: float64 throughout; eigenvalues below zero, which rounding makes, count as zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

STRENGTHS = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""lam among which a validation split chooses."""


class RidgePath:
    """Solutions z = (S + lam tr(S) I)^-1 r for any lam and right-hand sides r, S symmetric and not negative."""

    def __init__(self, matrix: Float[Tensor, "k k"]) -> None:
        values, self.vectors = torch.linalg.eigh(matrix.double())
        self.values = values.clamp(min=0)
        self.trace = matrix.double().trace()
        if not self.trace > 0:
            raise ValueError("all features are zero on these samples: there is nothing to regress on")

    def solve(self, rhs: Float[Tensor, "k targets"], strengths: Sequence[float]) -> Float[Tensor, "lams k targets"]:
        """One solution for each strength. ValueError on a strength that is not positive."""
        if min(strengths) <= 0:
            raise ValueError(f"ridge strengths must be positive, got {list(strengths)}")
        rotated = self.vectors.T @ rhs.double()
        return torch.stack([self.vectors @ (rotated / (self.values + lam * self.trace)[:, None]) for lam in strengths])

    def solve_each(
        self, rhs: Float[Tensor, "k targets"], strengths: Float[Tensor, "targets"]
    ) -> Float[Tensor, "k targets"]:
        """The solution for each target at its own strength."""
        return self.vectors @ (self.vectors.T @ rhs.double() / (self.values[:, None] + strengths * self.trace))


@dataclass(frozen=True)
class Choice:
    """The strength that a validation split prefers, for each target."""

    index: Int[Tensor, "targets"]
    """Position in the strengths."""
    solution: Float[Tensor, "k targets"]
    """The solution at that strength."""


def choose_strength(
    solutions: Float[Tensor, "lams k targets"],
    validation: Float[Tensor, "v k"],
    wanted: Float[Tensor, "v targets"],
) -> Choice:
    """Least mean squared error on validation rows, each target by itself; `validation` is what solutions multiply."""
    errors = (validation.double() @ solutions - wanted.double()).square().mean(1)
    index = errors.argmin(0)
    return Choice(index, solutions[index, :, torch.arange(solutions.shape[2])].T)
