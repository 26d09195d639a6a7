"""The three models as feature maps: each is linear in what is trained (equations of sections 2 to 4).

RFA    f(x) = sum_m <v_m, phi_m(x)>,  phi_m(x) = 1/N sum_i relu(x~_0^T W_m x~_i) x~_i,  entries of W_m from N(0, 1/4)
BRFA   the same with W_m = W_0 + Z_m; W_0 = blockdiag(I, 0) adds <x_0, x_i> to what is under the relu
RFMLP  f(x) = sum_m v_m relu(<w_m, vec>),  vec = [x_0; ...; x_N; 1],  entries of w_m from N(0, 1/(N + 2))

On the unit sphere what is under the relu is then N(0, 1), or N(<x_0, x_i>, 1). An RFMLP with M (d + 1) neurons trains
as many numbers as an RFA with M heads.

Decided here: features carry 1/sqrt(M), so that their Gram matrix converges to a kernel; the paper's v_m are ours over
sqrt(M). Weights are drawn in float64 for each chunk of heads anew (`frozen_normals`) and never kept.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm_attn.random_feature_theory.frozen import frozen_normals
from llm_attn.random_feature_theory.inputs import Sets

Mean = Any
"""W_0: "zero", "identity", or an array of shape (d + 1, d + 1)."""


class Features(Protocol):
    """A feature map that comes in `count` units of `width` numbers: heads of d + 1, or neurons of one."""

    @property
    def count(self) -> int:
        """Units, M."""

    @property
    def width(self) -> int:
        """Numbers of a unit."""

    def __call__(self, sets: Sets, start: int, stop: int) -> Float[Tensor, "n units*width"]:
        """Features of units `start` to `stop`, over sqrt(count)."""


def mean_matrix(mean: Mean, d: int) -> Float[np.ndarray, "D D"]:
    """W_0, float64. ValueError if it is neither a known name nor of shape (d + 1, d + 1)."""
    if isinstance(mean, str):
        if mean not in ("zero", "identity"):
            raise ValueError(f"mean must be 'zero', 'identity' or an array of {(d + 1, d + 1)}, got '{mean}'")
        return np.diag([1.0 if mean == "identity" else 0.0] * d + [0.0])
    matrix = np.asarray(mean, dtype=np.float64)
    if matrix.shape != (d + 1, d + 1):
        raise ValueError(f"mean must be 'zero', 'identity' or an array of {(d + 1, d + 1)}, got shape {matrix.shape}")
    return matrix


def head_features(sets: Sets, weights: Float[Tensor, "M D D"]) -> Float[Tensor, "n M D"]:
    """phi_m of each head: attention with relu in place of softmax, 1/N in place of its normaliser, values x~_i."""
    M, D, _ = weights.shape
    projected = (sets.query @ weights.permute(1, 0, 2).reshape(D, M * D)).unflatten(-1, (M, D))
    scores = (projected @ sets.keys.mT).relu_()
    return scores @ (sets.keys * sets.weight[..., None])


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadFeatures:
    """RFA with mean="zero", BRFA with mean="identity"."""

    d: int
    """Width of query and keys, without the one."""
    heads: int = 1000
    """M (paper: 1000)."""
    mean: Mean = "zero"
    """W_0."""
    seed: int = 0
    """Of the frozen weights."""

    def __post_init__(self) -> None:
        _at_least_one(d=self.d, heads=self.heads)
        mean_matrix(self.mean, self.d)

    @property
    def count(self) -> int:
        """Heads."""
        return self.heads

    @property
    def width(self) -> int:
        """Numbers of a head, d + 1."""
        return self.d + 1

    def weights(self, start: int, stop: int) -> Float[np.ndarray, "heads D D"]:
        """W_m of heads `start` to `stop`, float64."""
        noise = frozen_normals(self.seed, start, stop, self.width**2)
        return mean_matrix(self.mean, self.d) + 0.5 * noise.reshape(-1, self.width, self.width)

    def __call__(self, sets: Sets, start: int, stop: int) -> Float[Tensor, "n heads*D"]:
        """Features of heads `start` to `stop`, over sqrt(M)."""
        if sets.d != self.d:
            raise ValueError(f"these features are for vectors of {self.d} numbers, got {sets.d}")
        weights = torch.from_numpy(self.weights(start, stop)).to(sets.keys)
        return head_features(sets, weights).flatten(1) / self.heads**0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class NeuronFeatures:
    """RFMLP: two layers on the concatenated query and keys, which knows nothing of sets."""

    d: int
    """Width of query and keys."""
    num_keys: int
    """N; fixed, since every key has its own input weights."""
    neurons: int
    """M of the RFMLP; for a fair comparison heads * (d + 1)."""
    seed: int = 0
    """Of the frozen weights."""

    def __post_init__(self) -> None:
        _at_least_one(d=self.d, num_keys=self.num_keys, neurons=self.neurons)

    @property
    def count(self) -> int:
        """Neurons."""
        return self.neurons

    @property
    def width(self) -> int:
        """Numbers of a neuron, one."""
        return 1

    def weights(self, start: int, stop: int) -> Float[np.ndarray, "neurons (N+1)*d+1"]:
        """w_m of neurons `start` to `stop`, float64."""
        noise = frozen_normals(self.seed, start, stop, (self.num_keys + 1) * self.d + 1)
        return noise / (self.num_keys + 2) ** 0.5

    def __call__(self, sets: Sets, start: int, stop: int) -> Float[Tensor, "n neurons"]:
        """Features of neurons `start` to `stop`, over sqrt(M)."""
        weights = torch.from_numpy(self.weights(start, stop)).to(sets.keys)
        return (concatenated(sets, self.num_keys, self.d) @ weights.T).relu_() / self.neurons**0.5


def concatenated(sets: Sets, num_keys: int, d: int) -> Float[Tensor, "n (N+1)*d+1"]:
    """[x_0; x_1; ...; x_N; 1]. ValueError on masked keys and on another number of keys."""
    if sets.ragged:
        raise ValueError("a random-feature MLP reads each key at its own place, so it has no masked keys: use heads")
    if sets.keys.shape[1:] != (num_keys, d + 1):
        found, wide = sets.keys.shape[1], sets.d
        raise ValueError(f"this random-feature MLP reads {num_keys} keys of {d} numbers, got {found} of {wide}")
    plain = torch.cat((sets.query[:, None], sets.keys), 1)[..., :-1].flatten(1)
    return torch.cat((plain, plain.new_ones(len(plain), 1)), 1)


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
