"""Regression on (query, set of keys) in the manner of scikit-learn, which need not be installed.

`fit` computes the Gram matrix, or the closed-form kernel of infinitely many heads, and solves ridge regression exactly.

Decided here: with alpha="cv" a random fifth of the samples chooses among `STRENGTHS`, and all samples are then fitted
with that strength. Targets are not centred. Regression is in the dtype of X up to the Gram matrix, then in float64.
"""

from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_attn.random_feature_theory.features import Features, HeadFeatures, Mean, NeuronFeatures
from llm_attn.random_feature_theory.gram import feature_dot, feature_sum, gram
from llm_attn.random_feature_theory.inputs import Sets, as_sets, warn_off_sphere
from llm_attn.random_feature_theory.kernels import head_kernel, neuron_kernel
from llm_attn.random_feature_theory.layer import RandomHeadAttention
from llm_attn.random_feature_theory.ridge import STRENGTHS, RidgePath, choose_strength

Alpha = float | Literal["cv"]
Array = Any
"""A numpy array or a tensor, on any device."""


class NotFittedError(ValueError, AttributeError):
    """`predict` before `fit`."""


class _SetRegressor:
    """What both regressors share: settings, fit, predict, score."""

    _settings: tuple[str, ...]
    alpha: Alpha
    random_state: int
    alpha_: Float[Tensor, "targets"]
    coef_: Any  # each a tensor or None: see `fit`
    dual_coef_: Any
    kernel_: Any

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002
        """Settings by name; `deep` is scikit-learn's, and has nothing to enter here."""
        return {name: getattr(self, name) for name in self._settings}

    def set_params(self, **settings: Any) -> Self:
        """Changes settings. ValueError on an unknown one."""
        for name, value in settings.items():
            if name not in self._settings:
                raise ValueError(f"unknown setting '{name}': {type(self).__name__} has {', '.join(self._settings)}")
            setattr(self, name, value)
        return self

    def fit(
        self, X: Float[Array, "n N+1 d"], y: Float[Array, "n *targets"], key_mask: Bool[Array, "n N"] | None = None
    ) -> Self:
        """Learns y from X, whose row 0 is the query; key_mask is True where a key is real.

        Sets alpha_ (of each target), coef_ (features x targets; None with infinitely many), kernel_ (n x n, float64;
        None where samples outnumber features) and dual_coef_. ValueError or TypeError on data that cannot be fitted.
        """
        sets, targets = self._checked(X, y, key_mask)
        self.n_features_in_ = sets.d
        self._flat = np.ndim(y) == 1
        self._features = self._feature_map(sets)
        features = self._features
        if features is None or len(sets) <= features.count * features.width:
            self._fit_dual(sets, targets)
        else:
            self._fit_primal(features, sets, targets)
        return self

    def predict(self, X: Float[Array, "n N+1 d"], key_mask: Bool[Array, "n N"] | None = None) -> np.ndarray:
        """What the fitted function says, float64, of the shape of y. NotFittedError before `fit`."""
        if not hasattr(self, "alpha_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted: call fit(X, y) first")
        sets = as_sets(_tensor(X), _mask(key_mask))
        if sets.d != self.n_features_in_:
            raise ValueError(f"fitted on vectors of {self.n_features_in_} numbers, got {sets.d}")
        if self._features is None:
            out = self._kernel(sets, self._samples).double() @ self.dual_coef_
        else:
            out = feature_dot(self._features, sets, self.coef_)
        result = out.cpu().numpy()
        return result[:, 0] if self._flat else result

    def score(
        self, X: Float[Array, "n N+1 d"], y: Float[Array, "n *targets"], key_mask: Bool[Array, "n N"] | None = None
    ) -> float:
        """R^2, the mean over targets."""
        wanted = np.asarray(y, dtype=np.float64)
        residual = ((wanted - self.predict(X, key_mask)) ** 2).sum(0)
        return float(np.mean(1 - residual / ((wanted - wanted.mean(0)) ** 2).sum(0)))

    def __sklearn_tags__(self) -> Any:
        """Asked by scikit-learn's tools only: a regressor of three-dimensional samples."""
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        inputs = InputTags(two_d_array=False, three_d_array=True)
        return Tags("regressor", TargetTags(required=True), regressor_tags=RegressorTags(), input_tags=inputs)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
        return f"{type(self).__name__}({settings})"

    def _feature_map(self, sets: Sets) -> Features | None:
        raise NotImplementedError

    def _kernel(self, sets: Sets, other: Sets | None = None) -> Tensor:
        raise NotImplementedError

    def _checked(self, X: Array, y: Array, key_mask: Array | None) -> tuple[Sets, Tensor]:
        if self.alpha != "cv" and (isinstance(self.alpha, str) or not self.alpha > 0):
            raise ValueError(f"alpha must be 'cv' or a positive number, got {self.alpha!r}")
        sets = as_sets(_tensor(X), _mask(key_mask))
        warn_off_sphere(sets)
        targets = torch.as_tensor(y, dtype=torch.float64, device=sets.keys.device)
        if targets.ndim not in (1, 2) or len(targets) != len(sets):
            raise ValueError(f"y must hold one row for each of {len(sets)} samples, got shape {tuple(targets.shape)}")
        if not targets.isfinite().all():
            raise ValueError("y holds NaN or infinite values: drop those samples first")
        if len(sets) < (5 if self.alpha == "cv" else 1):
            raise ValueError(f"alpha='cv' needs at least 5 samples, got {len(sets)}: give alpha a number")
        return sets, targets.reshape(len(sets), -1)

    def _fit_dual(self, sets: Sets, targets: Tensor) -> None:
        self._samples = sets
        self.kernel_ = (self._kernel(sets) if self._features is None else gram(self._features, sets)).double()
        chosen, held = self._split(len(sets))
        columns = self.kernel_[:, chosen]
        self.alpha_ = self._strengths(columns[chosen], targets[chosen], columns[held], targets[held])
        self.dual_coef_ = RidgePath(self.kernel_).solve_each(targets, self.alpha_)
        self.coef_ = None if self._features is None else feature_sum(self._features, sets, self.dual_coef_)

    def _fit_primal(self, features: Features, sets: Sets, targets: Tensor) -> None:
        phi = features(sets, 0, features.count).double()
        chosen, held = self._split(len(sets))
        part = phi[chosen]
        self.alpha_ = self._strengths(part.T @ part, part.T @ targets[chosen], phi[held], targets[held])
        self.coef_ = RidgePath(phi.T @ phi).solve_each(phi.T @ targets, self.alpha_)
        self.kernel_ = self.dual_coef_ = None

    def _split(self, n: int) -> tuple[Tensor, Tensor]:
        """Four fifths to fit on and a fifth to choose the strength by."""
        order = torch.from_numpy(np.random.default_rng(self.random_state).permutation(n))
        return order[n // 5 :], order[: n // 5]

    def _strengths(self, system: Tensor, rhs: Tensor, validation: Tensor, wanted: Tensor) -> Float[Tensor, "targets"]:
        if self.alpha != "cv":
            return torch.full((wanted.shape[1],), float(self.alpha), dtype=torch.float64, device=wanted.device)
        choice = choose_strength(RidgePath(system).solve(rhs, STRENGTHS), validation, wanted)
        return torch.tensor(STRENGTHS, dtype=torch.float64, device=wanted.device)[choice.index]


class RandomHeadRegressor(_SetRegressor):
    """Ridge regression on random attention heads: RFA (mean="zero") or BRFA (mean="identity"), for ragged sets too.

    n_heads: M, or None for infinitely many, by the closed-form kernel (memory and time then grow with n^2 N^2).
    mean: W_0, "zero", "identity" or an array of shape (d + 1, d + 1). "identity" where the target turns on <x_0, x_i>.
    alpha: relative ridge strength, or "cv". random_state: of the frozen weights and of the split.
    """

    _settings = ("n_heads", "mean", "alpha", "random_state")

    def __init__(
        self, n_heads: int | None = 1000, *, mean: Mean = "zero", alpha: Alpha = "cv", random_state: int = 0
    ) -> None:
        self.n_heads = n_heads
        self.mean = mean
        self.alpha = alpha
        self.random_state = random_state

    def as_layer(self) -> RandomHeadAttention:
        """The fitted function as a torch layer. NotFittedError before `fit`, ValueError with infinitely many heads."""
        if not hasattr(self, "alpha_"):
            raise NotFittedError("this RandomHeadRegressor is not fitted: call fit(X, y) first")
        if self.n_heads is None or self.coef_ is None:
            raise ValueError("infinitely many heads are no layer: fit with a number as n_heads")
        d, targets = self.n_features_in_, self.coef_.shape[1]
        layer = RandomHeadAttention(d, self.n_heads, self.mean, out_features=targets, seed=self.random_state)
        with torch.no_grad():
            layer.value.copy_(self.coef_)
        return layer

    def _feature_map(self, sets: Sets) -> Features | None:
        if self.n_heads is None:
            return None
        return HeadFeatures(d=sets.d, heads=self.n_heads, mean=self.mean, seed=self.random_state)

    def _kernel(self, sets: Sets, other: Sets | None = None) -> Tensor:
        return head_kernel(sets, other, mean=self.mean)


class RandomNeuronRegressor(_SetRegressor):
    """The baseline: ridge regression on random neurons over the concatenated query and keys (RFMLP).

    n_neurons: None for infinitely many, by the closed-form kernel; M (d + 1) trains as many numbers as M heads do.
    """

    _settings = ("n_neurons", "alpha", "random_state")

    def __init__(self, n_neurons: int | None = 17_000, *, alpha: Alpha = "cv", random_state: int = 0) -> None:
        self.n_neurons = n_neurons
        self.alpha = alpha
        self.random_state = random_state

    def _feature_map(self, sets: Sets) -> Features | None:
        if self.n_neurons is None:
            return None
        num_keys = sets.keys.shape[1]
        return NeuronFeatures(d=sets.d, num_keys=num_keys, neurons=self.n_neurons, seed=self.random_state)

    def _kernel(self, sets: Sets, other: Sets | None = None) -> Tensor:
        return neuron_kernel(sets, other)


def _tensor(X: Array) -> Tensor:
    return X if isinstance(X, Tensor) else torch.as_tensor(np.asarray(X))


def _mask(key_mask: Array | None) -> Tensor | None:
    return None if key_mask is None else torch.as_tensor(key_mask)
