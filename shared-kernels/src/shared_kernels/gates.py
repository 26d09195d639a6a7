"""Gates that scale whole channels.

Two steps, which methods combine freely: logits of the channels, from the map itself (`channel_logits`:
squeeze-and-excitation, Hu, Shen and Sun, CVPR 2018, eq. 2-3 without biases) or from anywhere else, a sentence say; and
the gate that they open (`apply_channel_gate`). `channel_gate` is both with a sigmoid; with `pool="max"` or "avg" by
sensor it is the resolution-aware channel attention of DFYP (arXiv:2507.05849).

Plain differentiable torch: two passes over x are the floor, and this makes two.
"""

from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

Gate = Literal["sigmoid", "softmax", "relu", "given"]


def channel_logits(
    x: Float[Tensor, "N C *spatial"],
    w1: Float[Tensor, "D C"],
    w2: Float[Tensor, "C D"],
    *,
    pool: Literal["avg", "max"] = "avg",
    channel_dim: int = 1,
) -> Float[Tensor, "N C"]:
    """w2 relu(w1 m), m the mean or maximum of each channel over all of *spatial.

    With `channel_dim=-1`, x is (N, *spatial, C). Where several places share the maximum, they share its gradient
    evenly. Differentiable in x, w1 and w2.

    Raises ValueError if x has no spatial dimension or an empty one, if the weights do not fit its channels, or on
    another `pool` or `channel_dim`.
    """
    channel_dim = _channel_dim(x, channel_dim)
    if x.ndim < 3 or 0 in x.shape[1:channel_dim] + x.shape[channel_dim + 1 :]:
        raise ValueError(f"x must be (N, C, *spatial) with at least one place to pool over, got {tuple(x.shape)}")
    C = x.shape[channel_dim]
    if w1.ndim != 2 or w1.shape[1] != C or w2.shape != (C, w1.shape[0]):
        raise ValueError(
            f"w1 must be (D, C) and w2 (C, D) with C = {C}, the channels of x, "
            f"got {tuple(w1.shape)} and {tuple(w2.shape)}"
        )
    if pool not in ("avg", "max"):
        raise ValueError(f"pool must be 'avg' or 'max', got {pool!r}")
    places, dim = (x.flatten(2), 2) if channel_dim == 1 else (x.flatten(1, -2), 1)
    pooled = places.mean(dim) if pool == "avg" else places.amax(dim)
    hidden = torch.relu(torch.nn.functional.linear(pooled, w1))
    return torch.nn.functional.linear(hidden, w2)


def apply_channel_gate(
    x: Float[Tensor, "#N C *spatial"],
    logits: Float[Tensor, "#N C"],
    *,
    gate: Gate = "sigmoid",
    gain: float = 1.0,
    spatial: Float[Tensor, "#N 1 *spatial"] | None = None,
    spatial_weight: Float[Tensor, "C"] | None = None,
    residual: Tensor | None = None,
    channel_dim: int = 1,
) -> Float[Tensor, "N C *spatial"]:
    """x * gain * gate(logits): each channel of each sample scaled as a whole.

    `gate` is "sigmoid"; "softmax" over the channels (they compete, and share 1: Khoshsirat and Kambhamettu, "Sentence
    Attention Blocks for Answer Grounding", ICCV 2023; gain=C keeps the magnitude of x); "relu"; or "given", where the
    logits are the gate. One of x and logits may have N = 1: many sentences over one image.

    `spatial` adds a logit for each place, times `spatial_weight` (1 unless given) for each channel, before the gate:
    gain=2 with a sigmoid is the light block of person re-identification, which starts as the identity, and "relu" with
    logits gamma and weights alpha is TALENT's rectified ramp relu(alpha_c s + gamma_c). `residual` is added to the
    result. With `channel_dim=-1`, x and residual are (N, *spatial, C) and spatial is (N, *spatial, 1).

    The gate is computed in float32 at least; the result has the dtype of x. Differentiable in all tensors.

    Raises ValueError on another `gate`, on shapes that do not fit, and on `spatial_weight` without `spatial`.
    """
    channel_dim = _channel_dim(x, channel_dim)
    _check_gate(x, logits, gate, spatial, spatial_weight, channel_dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    along = [1] * x.ndim
    along[channel_dim] = x.shape[channel_dim]
    z = logits.to(wide).reshape(logits.shape[0], *along[1:])
    if spatial is not None:
        weight = 1.0 if spatial_weight is None else spatial_weight.to(wide).reshape(along)
        z = z + spatial.to(wide) * weight
    if gate == "sigmoid":
        z = torch.sigmoid(z)
    elif gate == "softmax":
        z = torch.softmax(z, channel_dim)
    elif gate == "relu":
        z = torch.relu(z)
    opened = (z if gain == 1.0 else gain * z).to(x.dtype)
    return x * opened if residual is None else torch.addcmul(residual, x, opened)


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
    """x times g = sigmoid(channel_logits(x, w1, w2, pool)), a gate in (0, 1) per sample and channel.

    It does not depend on where in *spatial a value stands. `return_gate` gives (gated x, g). Differentiable in x, w1
    and w2. Raises ValueError as `channel_logits` does.
    """
    gate = torch.sigmoid(channel_logits(x, w1, w2, pool=pool))
    gated = apply_channel_gate(x, gate, gate="given")
    return (gated, gate) if return_gate else gated


def _channel_dim(x: Tensor, channel_dim: int) -> int:
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim}")
    return channel_dim % max(x.ndim, 2)


def _check_gate(
    x: Tensor, logits: Tensor, gate: str, spatial: Tensor | None, spatial_weight: Tensor | None, channel_dim: int
) -> None:
    if gate not in ("sigmoid", "softmax", "relu", "given"):
        raise ValueError(f"gate must be 'sigmoid', 'softmax', 'relu' or 'given', got {gate!r}")
    if x.ndim < 2 or logits.ndim != 2 or logits.shape[1] != x.shape[channel_dim]:
        raise ValueError(f"logits must be (N, C) with the channels of x, got {tuple(logits.shape)} to {tuple(x.shape)}")
    if logits.shape[0] != x.shape[0] and 1 not in (logits.shape[0], x.shape[0]):
        raise ValueError(f"logits must be for the {x.shape[0]} samples of x or for 1, got {logits.shape[0]}")
    if spatial_weight is not None and (spatial is None or spatial_weight.shape != (x.shape[channel_dim],)):
        raise ValueError(
            f"spatial_weight must be ({x.shape[channel_dim]},), the channels of x, and comes with spatial, "
            f"got {tuple(spatial_weight.shape)} and {'no ' if spatial is None else ''}spatial"
        )
    if spatial is None:
        return
    places = list(x.shape)
    places[channel_dim] = 1
    if list(spatial.shape[1:]) != places[1:] or spatial.shape[0] not in (1, x.shape[0], logits.shape[0]):
        raise ValueError(f"spatial must be {tuple(places)}, one channel of x, got {tuple(spatial.shape)}")
