"""What weighted_cross_entropy promises."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_kernels.testing import Make, OpSpec, Sample
from shared_kernels.weighted_cross_entropy import reference, weighted_cross_entropy


def _sample(make: Make, tokens: int, vocabulary: int, width: int, *, ignored: int = 0, scale: float = 1.0) -> Sample:
    """Targets all over the vocabulary, the last word among them; ignored tokens hold NaN."""
    hidden = make.normal(tokens, width, scale=scale)
    targets = (torch.arange(tokens) * 7 + vocabulary - 1) % vocabulary
    spread = torch.arange(ignored) * tokens // max(1, ignored)
    targets[spread] = -100
    if ignored:
        hidden[spread.to(make.device)] = torch.nan
    return {
        "hidden": hidden,
        "weight": make.normal(vocabulary, width, scale=width**-0.5),
        "targets": targets.to(make.device),
    }


def _segments(make: Make, tokens: int, count: int) -> Sample:
    ids = (torch.arange(tokens) * count // tokens).to(make.device)
    return {"reduction": "segment_sum", "segment_ids": ids, "num_segments": count + 1}  # the last is empty


def samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {
            "weighted": {
                **_sample(make, 5, 7, 3),
                "token_weights": make.normal(5),
                "bias": make.normal(7),
                "reduction": "mean",
            },
            "segments": _sample(make, 6, 5, 4) | _segments(make, 6, 2),
        }
    if size == "medium":
        return {
            "several tiles": {
                **_sample(make, 1_037, 5_003, 8, ignored=5),
                "token_weights": make.normal(1_037, wide=True),
                "bias": make.normal(5_003),
            },
            "several tiles summed": {**_sample(make, 2_003, 5_003, 4, ignored=6), "reduction": "sum"},
        }
    if size == "real":
        return {
            "width 256": _sample(make, 259, 9_003, 256),
            "bias, segments": {
                **_sample(make, 300, 9_001, 1_000, ignored=17),
                "bias": make.normal(9_001),
                **_segments(make, 300, 7),
            },
        }
    return {
        "weighted, some ignored": {
            **_sample(make, 23, 37, 19, ignored=4),
            "token_weights": make.normal(23, wide=True),
        },
        "bias, segments": {**_sample(make, 17, 41, 24, ignored=2), "bias": make.normal(41), **_segments(make, 17, 3)},
        "mean": {**_sample(make, 19, 33, 16, ignored=3), "token_weights": make.normal(19, wide=True).abs()}
        | {"reduction": "mean"},
        "sum of large logits": {**_sample(make, 18, 29, 12, scale=30.0), "reduction": "sum"},
        "strided memory": {
            **_sample(make, 15, 34, 20),
            "hidden": make.strided(15, 20),
            "weight": make.transposed(34, 20, scale=0.2),
        },
        "one token, one word": _sample(make, 1, 1, 3),
        "all ignored": _sample(make, 5, 21, 6, ignored=5),
        "no tokens": _sample(make, 0, 21, 6),
        "marked otherwise": {**_sample(make, 13, 22, 9), "ignore_index": 3},
    }


def agrees_with_the_sum_by_hand(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Minus the logarithm of the target's share, token by token."""
    s, weights, bias = _sample(make, 6, 9, 4), make.normal(6), make.normal(9)
    expected = torch.empty_like(weights)
    for t, aim in enumerate(s["targets"].tolist()):
        shares = torch.exp(
            torch.stack([(s["hidden"][t] * w).sum() + b for w, b in zip(s["weight"], bias, strict=True)])
        )
        expected[t] = -weights[t] * torch.log(shares[aim] / shares.sum())
    yield op(**s, token_weights=weights, bias=bias), expected


def reduces_to_cross_entropy(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s = _sample(make, 11, 13, 5)
    s["targets"][4] = -100
    logits = s["hidden"] @ s["weight"].T
    for reduction in ("none", "sum", "mean"):
        yield op(**s, reduction=reduction), F.cross_entropy(logits, s["targets"], reduction=reduction)


def segments_are_sums_of_their_tokens(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """And a document's loss does not depend on what it is packed with."""
    s, ids = _sample(make, 12, 13, 5), torch.tensor([2, 2, 2, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    sums = op(**s, reduction="segment_sum", segment_ids=ids, num_segments=3)
    for segment in range(3):
        alone = {"hidden": s["hidden"][ids == segment], "targets": s["targets"][ids == segment]}
        yield sums[segment], op(**s | alone, reduction="sum")


def mean_ignores_the_scale_of_weights(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean over constant weights is the plain mean, whatever the constant."""
    s = _sample(make, 11, 13, 5)
    constant = torch.full((11,), 0.3, dtype=make.dtype)
    yield op(**s, token_weights=constant, reduction="mean"), op(**s, reduction="mean")


def launches(sample: Sample) -> None:
    from shared_kernels.weighted_cross_entropy import triton

    hidden, weight, bias, targets = sample["hidden"], sample["weight"], sample.get("bias"), sample["targets"]
    losses, softmax = triton.forward(hidden, weight, bias, targets, -100)
    triton.backward(losses, hidden, weight, bias, targets, softmax, -100, True, True)


def _logits(sample: Sample) -> int:
    return len(sample["targets"]) * len(sample["weight"])


def _tile(sample: Sample) -> int:
    summed = sample.get("reduction") in ("sum", "mean")
    return max(1 << 23, 64 * len(sample["weight"])) if summed else 512 * 4_096


def cost(sample: Sample) -> tuple[int, int]:
    (T, D), V = sample["hidden"].shape, sample["weight"].shape[0]
    return 2 * T * D * V, (T + V) * D * sample["hidden"].element_size()


SPEC = OpSpec(
    op=weighted_cross_entropy,
    reference=reference.weighted_cross_entropy,
    samples=samples,
    gradients=("hidden", "weight", "token_weights", "bias"),
    laws=(
        agrees_with_the_sum_by_hand,
        reduces_to_cross_entropy,
        segments_are_sums_of_their_tokens,
        mean_ignores_the_scale_of_weights,
    ),
    refused={
        "hidden with batch": ({"hidden": torch.ones(2, 23, 19)}, ValueError, r"hidden must have shape \(T, D\), got"),
        "weight of another width": ({"weight": torch.ones(37, 20)}, ValueError, r"weight must have shape \(V, 19\)"),
        "targets of another length": (
            {"targets": torch.zeros(22, dtype=torch.int64)},
            ValueError,
            r"targets must have shape \(23,\), got \(22,\)",
        ),
        "targets of int32": ({"targets": torch.zeros(23, dtype=torch.int32)}, TypeError, "targets must be of"),
        "integers": ({"hidden": torch.ones(23, 19, dtype=torch.int64)}, TypeError, "hidden must be of a floating"),
        "weight of another dtype": (
            {"weight": torch.ones(37, 19, dtype=torch.bfloat16)},
            TypeError,
            "weight must be of the dtype of hidden, torch.float32, got torch.bfloat16",
        ),
        "weights per word": ({"token_weights": torch.ones(37)}, ValueError, r"token_weights must have shape \(23,\)"),
        "bias per token": ({"bias": torch.ones(23)}, ValueError, r"bias must have shape \(37,\), got \(23,\)"),
        "another reduction": ({"reduction": "batchmean"}, ValueError, "reduction must be one of none, sum, mean"),
        "segments that are not summed": (
            {"segment_ids": torch.zeros(23, dtype=torch.int64), "num_segments": 2},
            ValueError,
            "segment_ids and num_segments go with reduction=",
        ),
        "another device": (
            {"targets": torch.zeros(23, dtype=torch.int64, device="meta")},
            ValueError,
            "targets must be on cpu like the other tensors, got meta",
        ),
        "target past the vocabulary": (
            {"targets": torch.full((23,), 37)},
            ValueError,
            r"targets must lie in \[0, 37\) or be ignore_index, -100, got 37 to 37",
        ),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.weighted_cross_entropy.default,
        torch.ops.shared_kernels.weighted_cross_entropy_backward.default,
        torch.ops.shared_kernels.weighted_cross_entropy_total.default,
        torch.ops.shared_kernels.weighted_cross_entropy_total_backward.default,
    ),
    launches=launches,
    spill_allowed={torch.float32: {"sm_89": 8, "sm_100": 8, "sm_120": 8}},
    cost=cost,
    # the inputs once, and a tile of logits that tokens and vocabulary do not change
    largest=lambda sample: max(
        sample["hidden"].numel(),
        sample["weight"].numel(),
        min(_tile(sample), _logits(sample)),
        2 * len(sample["targets"]),
    ),
)
