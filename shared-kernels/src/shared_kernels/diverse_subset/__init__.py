"""diverse_subset: a few elements that are unlike each other, chosen one after the other.

Three greedy rules, each over features of every image (or view, or set) by itself:

- "max_min": next is the greatest weight * distance to the nearest element chosen so far. Farthest-point sampling;
  DivPrune (Alvar et al., CVPR 2025, arXiv:2503.02175) starts it from the most isolated element, ZOO-Prune (Kim et al.,
  CVPR 2026, arXiv:2509.24837) weights it by sensitivity.
- "dpp": next is what multiplies the determinant of the chosen weighted Gram matrix most, by incremental Cholesky
  (Chen et al., NeurIPS 2018, arXiv:1709.05135); CDPruner (Zhang et al., NeurIPS 2025, arXiv:2506.10967) weights it by
  relevance.
- "threshold": next is the greatest weight among what is not too near to a chosen element; each chosen element says by
  its own threshold what is too near (AgilePruner, Baek et al., ICLR 2026, arXiv:2603.01236). Suppression as of boxes.

Decided here: ties go to the lower index; -1 stands where nothing was left to choose; in a DPP what lies within 1e-5 of
the span of the chosen counts as lying in it, since float32 cannot tell, and comes last, in order of index. Computed in
float32 at least. Choices have no gradient.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import check_choice, check_optional, check_shape, check_tensors, check_whole_number
from shared_kernels.diverse_subset import reference

NAME = "diverse_subset"
Method = Literal["max_min", "dpp", "threshold"]
Metric = Literal["cosine", "euclidean"]


_forward = _backend.library_op(
    NAME,
    "forward",
    "(Tensor features, Tensor weight, Tensor mask, Tensor given, Tensor? threshold, SymInt num_kept, str method, "
    "str metric, bool isolated) -> Tensor",
)


@_forward.register_fake
def _(features: Tensor, *rest: Any) -> Tensor:
    num_kept = rest[4]
    return features.new_empty((features.shape[0], num_kept), dtype=torch.int64)


@register_flop_formula(torch.ops.shared_kernels.diverse_subset)
def _flops(features_shape: torch.Size, *rest: Any, out_shape: Any = None, **_: Any) -> int:  # noqa: ARG001
    num_kept, method, _metric, isolated = rest[4:8]
    return flops(features_shape, num_kept, method, isolated)


def flops(shape: torch.Size | tuple[int, ...], num_kept: int, method: str, isolated: bool) -> int:
    """One row of the Gram matrix for each choice; a DPP reads all earlier rows of its factor as well."""
    B, N, D = shape
    rows = num_kept + (N if isolated else 0)
    return 2 * B * N * (rows * D + (num_kept * (num_kept - 1) // 2 if method == "dpp" else 0))


def diverse_subset(
    features: Float[Tensor, "B N D"],
    *,
    num_kept: int,
    method: Method = "max_min",
    weight: Float[Tensor, "B N"] | None = None,
    metric: Metric = "cosine",
    first: Literal["weight", "isolated"] | Int[Tensor, "B F"] = "weight",
    threshold: float | Float[Tensor, "B N"] | None = None,
    mask: Bool[Tensor, "B N"] | None = None,
) -> Int[Tensor, "B K"]:
    """Indices of K = min(num_kept, N) elements of each set, in order of choice; ties go to the lower index.

    With d the distance, 1 - cos for `metric` "cosine" or the Euclidean one, each step chooses the greatest
    - `method` "max_min": weight_i * min over chosen j of d_ij;
    - "dpp": weight_i^2 * (squared distance of feature i, of length 1 if "cosine", to the span of the chosen ones);
    - "threshold": weight_i, among elements with d_ij >= threshold_j for every chosen j. May end early.

    `weight`, not negative, is 1 if None, so that "threshold" goes through elements in order. `first` starts "max_min"
    with the greatest weight, or with the element farthest from its nearest other one ("isolated"); indices in place of
    that, F < N distinct ones, are taken as the first choices of "max_min" and "dpp". Elements where `mask` is False are
    never chosen, whatever their features hold. Rows end in -1 where nothing is left to choose.

    Not differentiable. On a CPU negative weights raise ValueError; on a GPU values are not read and the choice is then
    undefined, as it is everywhere for NaN. Raises TypeError on other kinds of arguments, ValueError on other shapes,
    devices, names, or options that the method does not know.
    """
    _check_tensors(features, weight, first, threshold, mask)
    _check_options(num_kept, method, metric, first, threshold)
    if _backend.forced == "reference":
        return reference.diverse_subset(
            features, num_kept=num_kept, method=method, weight=weight, metric=metric, first=first,
            threshold=threshold, mask=mask,
        )  # fmt: skip
    B, N, _ = features.shape
    acc = torch.promote_types(features.dtype, torch.float32)
    if weight is None:
        weight = features.new_ones((B, N), dtype=acc)
    if mask is None:
        mask = features.new_ones((B, N), dtype=torch.bool)
    given = first if isinstance(first, Tensor) else features.new_empty((B, 0), dtype=torch.int64)
    if threshold is not None and not isinstance(threshold, Tensor):
        threshold = features.new_full((B, N), threshold, dtype=acc)
    isolated = isinstance(first, str) and first == "isolated"
    kept = min(num_kept, N)
    return _forward(
        features.detach(), weight.detach(), mask, given[:, :kept], threshold, kept, method, metric, isolated
    )


def _check_tensors(features: Tensor, weight: Any, first: Any, threshold: Any, mask: Any) -> None:
    check_tensors({"features": features})
    check_shape("features", features, "B", "N", "D")
    (B, N, _), device = features.shape, features.device
    check_optional("weight", weight, (B, N), device)
    check_optional("mask", mask, (B, N), device, torch.bool)
    if isinstance(threshold, Tensor):
        check_optional("threshold", threshold, (B, N), device)
    if isinstance(first, Tensor):
        check_optional("first", first, (B, "F"), device, torch.int64)
        if first.shape[1] > N:
            raise ValueError(f"first must name at most the {N} elements of a set, got {first.shape[1]}")


def _check_options(num_kept: int, method: str, metric: str, first: Any, threshold: Any) -> None:
    check_whole_number("num_kept", num_kept, 1)
    check_choice("method", method, Method)
    check_choice("metric", metric, Metric)
    if not isinstance(first, Tensor):
        if first not in ("weight", "isolated"):
            raise ValueError(f"first must be 'weight', 'isolated' or indices, got {first!r}")
        if first == "isolated" and method != "max_min":
            raise ValueError(f"first 'isolated' needs method 'max_min', got {method!r}")
    elif method == "threshold":
        raise ValueError("first must be 'weight' for method 'threshold', got indices")
    if (threshold is not None) != (method == "threshold"):
        raise ValueError(
            f"threshold must be given for method 'threshold' and for no other, got {threshold} for {method!r}"
        )
