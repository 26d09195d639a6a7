"""Gates that scale whole channels by what is in them.

Squeeze-and-excitation: Hu, Shen and Sun, "Squeeze-and-Excitation Networks", CVPR 2018, eq. 2-4 with a sigmoid gate and
without biases. With `pool="max"` or "avg" by sensor it is the resolution-aware channel attention of DFYP
(arXiv:2507.05849). Plain differentiable torch: two passes over x are the floor, and this makes two.
"""

from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor


@overload
def channel_gate(
    x: Tensor, w1: Tensor, w2: Tensor, *, pool: Literal["avg", "max"] = ..., return_gate: Literal[False] = ...
) -> Tensor: ...
@overload
def channel_gate(
    x: Tensor, w1: Tensor, w2: Tensor, *, pool: Literal["avg", "max"] = ..., return_gate: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def channel_gate(
    x: Float[Tensor, "N C *spatial"],
    w1: Float[Tensor, "D C"],
    w2: Float[Tensor, "C D"],
    *,
    pool: Literal["avg", "max"] = "avg",
    return_gate: bool = False,
) -> Float[Tensor, "N C *spatial"] | tuple[Float[Tensor, "N C *spatial"], Float[Tensor, "N C"]]:
    """x times a gate per sample and channel: g = sigmoid(w2 relu(w1 m)), m the mean or maximum over all of *spatial.

    Each gate lies in (0, 1) and does not depend on where in *spatial a value stands. Where several places share the
    maximum, they share its gradient evenly. `return_gate` gives (gated x, g). Differentiable in x, w1 and w2.

    Raises ValueError if x has no spatial dimension or an empty one, if the weights do not fit its channels, or on
    another `pool`.
    """
    if x.ndim < 3 or 0 in x.shape[2:]:
        raise ValueError(f"x must be (N, C, *spatial) with at least one place to pool over, got {tuple(x.shape)}")
    N, C = x.shape[:2]
    if w1.ndim != 2 or w1.shape[1] != C or w2.shape != (C, w1.shape[0]):
        raise ValueError(
            f"w1 must be (D, C) and w2 (C, D) with C = {C}, the channels of x, "
            f"got {tuple(w1.shape)} and {tuple(w2.shape)}"
        )
    if pool == "avg":
        pooled = x.flatten(2).mean(dim=2)
    elif pool == "max":
        pooled = x.flatten(2).amax(dim=2)
    else:
        raise ValueError(f"pool must be 'avg' or 'max', got {pool!r}")
    hidden = torch.relu(torch.nn.functional.linear(pooled, w1))
    gate = torch.sigmoid(torch.nn.functional.linear(hidden, w2))
    gated = x * gate.reshape(N, C, *[1] * (x.ndim - 2))
    return (gated, gate) if return_gate else gated
