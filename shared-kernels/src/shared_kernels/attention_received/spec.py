"""What attention_received, attention_given and attention_argmax promise."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_kernels.attention_received import attention_argmax, attention_given, attention_received, reference
from shared_kernels.testing import Make, OpSpec, Sample


def _pair(make: Make, B: int, H: int, Hkv: int, Nq: int, Nk: int, D: int, *, scale: float = 1.0) -> Sample:
    return {"query": make.normal(B, H, Nq, D, scale=scale), "key": make.normal(B, Hkv, Nk, D)}


def _mask(make: Make, B: int, Nk: int) -> Tensor:
    """About a fifth of the keys are no tokens, all of the last batch's if there are three."""
    mask = make.normal(B, Nk, wide=True) > -0.8
    return mask & (torch.arange(B, device=make.device) < 2)[:, None]


def _poisoned(sample: Sample, key_mask: Tensor) -> Sample:
    """NaN in the keys that are masked."""
    key = sample["key"].masked_fill(~key_mask[:, None, :, None], math.nan)
    return sample | {"key": key, "key_mask": key_mask}


def _numbers(make: Make, *rows: list[int]) -> Tensor:
    return torch.tensor(rows if len(rows) > 1 else rows[0], device=make.device)


def _weights(make: Make, *shape: int) -> Tensor:
    """Positive ones: a mean by weights that cancel is worth little."""
    return make.normal(*shape, wide=True).abs() + 0.5


def received_samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {
            "weighted mean": _pair(make, 2, 4, 2, 5, 7, 4)
            | {"causal": True, "row_weights": _weights(make, 2, 4, 5), "reduce": "mean"},
            "from an LSE": _pair(make, 2, 3, 3, 5, 6, 4)
            | {"lse": make.normal(2, 3, 5, wide=True) + 3, "columns": slice(1, 5)},
        }
    if size == "medium":
        return {
            "several tiles": _pair(make, 1, 2, 1, 400, 1500, 24) | {"causal": True, "window": 900},
            "several heads in a tile": _pair(make, 3, 6, 3, 61, 409, 20),
        }
    if size == "real":
        return {
            "128 wide": _pair(make, 1, 8, 4, 2048, 4096, 128) | {"causal": True},
            "64 wide": _pair(make, 2, 4, 4, 1000, 3000, 64),
            "256 wide": _pair(make, 1, 2, 1, 700, 1900, 256) | {"causal": True, "reduce": "mean"},
            "odd width": _pair(make, 1, 2, 1, 700, 1900, 72) | {"row_weights": _weights(make, 1, 2, 700)},
        }
    return {
        "columns from some rows": _pair(make, 2, 6, 3, 37, 53, 24)
        | {"rows": slice(3, 30, 2), "columns": slice(5, 41), "row_weights": _weights(make, 6, 1), "causal": True},
        "rows of each batch, some heads": _pair(make, 2, 6, 3, 37, 45, 40)
        | {"rows": _numbers(make, [3, 36, 0, 17, 9], [1, 2, 35, 4, 5]), "heads": (4, 1, 2), "causal": True},
        "mean in a window": _pair(make, 2, 3, 3, 51, 38, 16, scale=4)
        | {"causal": True, "window": 9, "reduce": "mean", "row_weights": _weights(make, 2, 1, 51)},
        "masked keys are NaN": _poisoned(_pair(make, 3, 2, 2, 19, 47, 33), _mask(make, 3, 47)) | {"reduce": "mean"},
        "from an LSE": _pair(make, 2, 4, 2, 21, 50, 24)
        | {"lse": make.normal(2, 4, 21, wide=True) + 5, "columns": slice(7, 45), "causal": True}
        | {"row_weights": _weights(make, 2, 4, 21)},
        "large scores": _pair(make, 1, 2, 1, 35, 49, 72, scale=30) | {"scale": 0.2},
        "strided memory": {"query": make.strided(2, 2, 17, 24), "key": make.transposed(2, 2, 33, 24)},
        "one row": _pair(make, 2, 3, 1, 9, 65, 24) | {"rows": slice(-1, None)},
        "no images": _pair(make, 0, 2, 2, 7, 11, 24),
        "no keys": _pair(make, 2, 2, 1, 7, 0, 24),
        "no rows": _pair(make, 1, 2, 2, 7, 11, 24) | {"rows": slice(0, 0), "reduce": "mean"},
    }


def given_samples(make: Make, size: str) -> dict[str, Sample]:
    def labels(B: int, Nk: int, G: int) -> Sample:
        numbers = make.normal(B, Nk, wide=True).mul(2).round().to(torch.int64).clamp(-1, G - 1)
        return {"reduce": "mass", "groups": numbers, "num_groups": G}

    if size == "tiny":
        return {
            "entropy": _pair(make, 2, 4, 2, 5, 7, 4) | {"reduce": "entropy", "causal": True},
            "mass": _pair(make, 2, 3, 3, 5, 6, 4) | labels(2, 6, 3),
            "lse": _pair(make, 1, 2, 1, 5, 6, 4) | {"reduce": "lse"},
        }
    if size == "medium":
        return {
            "several tiles": _pair(make, 1, 2, 1, 400, 1500, 24) | {"causal": True, "window": 900, "reduce": "entropy"},
            "several heads in a tile": _pair(make, 3, 6, 3, 61, 409, 20) | labels(3, 409, 5),
        }
    if size == "real":
        return {
            "128 wide": _pair(make, 1, 8, 4, 2048, 4096, 128) | {"causal": True, "reduce": "entropy"},
            "64 wide": _pair(make, 2, 4, 4, 1000, 3000, 64) | labels(2, 3000, 17),
            "256 wide": _pair(make, 1, 2, 1, 700, 1900, 256) | labels(1, 1900, 3),
            "odd width": _pair(make, 1, 2, 1, 700, 1900, 72) | {"reduce": "lse"},
        }
    return {
        "mass of some rows": _pair(make, 2, 6, 3, 37, 53, 24) | labels(2, 53, 4) | {"rows": slice(3, 30, 2)},
        "entropy": _pair(make, 2, 4, 2, 37, 45, 40) | {"reduce": "entropy", "causal": True},
        "entropy of large scores": _pair(make, 1, 2, 1, 35, 49, 72, scale=30) | {"reduce": "entropy", "scale": 0.2},
        "lse, masked keys are NaN": _poisoned(_pair(make, 3, 2, 2, 19, 47, 33), _mask(make, 3, 47)) | {"reduce": "lse"},
        "mass in a window, rows without keys": _pair(make, 2, 3, 3, 51, 38, 16, scale=4)
        | labels(2, 38, 17)
        | {"causal": True, "window": 9},
        "strided memory": {"query": make.strided(2, 2, 17, 24), "key": make.transposed(2, 2, 33, 24), "reduce": "lse"},
        "no images": _pair(make, 0, 2, 2, 7, 11, 24) | labels(0, 11, 3),
        "no keys": _pair(make, 2, 2, 1, 7, 0, 24) | {"reduce": "entropy"},
    }


def argmax_samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {}
    if size == "medium":
        return {
            "several tiles": _pair(make, 1, 2, 1, 400, 1500, 24) | {"causal": True, "window": 900},
            "several heads in a tile": _pair(make, 3, 6, 3, 61, 409, 20),
        }
    if size == "real":
        return {
            "128 wide": _pair(make, 1, 8, 4, 2048, 4096, 128) | {"causal": True},
            "256 wide": _pair(make, 1, 2, 1, 700, 1900, 256),
        }
    masked = _poisoned(_pair(make, 3, 2, 2, 19, 47, 24), _mask(make, 3, 47))
    return {
        "rows of each batch": _pair(make, 2, 6, 3, 37, 45, 40)
        | {"rows": _numbers(make, [3, 36, 0, 17], [1, 2, 35, 4]), "heads": (4, 1), "causal": True},
        "rows without keys": masked | {"causal": True, "window": 30},
        "many ties": {"query": make.normal(2, 2, 17, 8).sign(), "key": make.normal(2, 2, 40, 8).sign()},
        "no images": _pair(make, 0, 2, 2, 7, 11, 24),
        "no keys": _pair(make, 2, 2, 1, 7, 0, 24),
    }


def sums_of_a_map_by_hand(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """The definition, row by row."""
    s = _pair(make, 1, 2, 1, 5, 7, 8)
    expected = torch.zeros(1, 2, 7, dtype=make.dtype)
    for h in range(2):
        for i in (1, 4):
            seen = i + 7 - 5 + 1
            p = torch.softmax(torch.stack([s["query"][0, h, i] @ s["key"][0, 0, j] for j in range(seen)]) / 8**0.5, 0)
            expected[0, h, :seen] += p
    yield op(**s, rows=slice(1, None, 3), causal=True), expected


def all_that_is_given_is_received(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s, weights = _pair(make, 2, 4, 2, 11, 17, 8), make.normal(2, 4, 11)
    yield op(**s, row_weights=weights, causal=True).sum(-1), weights.sum(-1)


def values_of_ones_at_a_key_are_its_share(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention with the unit matrix as values is the map."""
    s = _pair(make, 2, 3, 3, 12, 10, 8)
    ones = torch.eye(10, dtype=make.dtype).expand(2, 3, 10, 10)
    attention = F.scaled_dot_product_attention(**s, value=ones)
    yield op(**s), attention.sum(2)
    yield op(**s, heads=[2], rows=slice(4, None), reduce="mean"), attention[:, 2:, 4:].mean(2)


def mean_is_over_the_rows_that_see_the_key(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention calibration: c_j = sum_k P_kj / (S - j); padded rows do not count."""
    s, valid = _pair(make, 1, 2, 2, 9, 9, 8), torch.arange(9) >= 2
    counts = torch.arange(9, 0, -1, dtype=make.dtype)
    yield op(**s, causal=True, reduce="mean"), op(**s, causal=True) / counts
    padded = op(**s, causal=True, key_mask=valid[None], row_weights=valid.to(make.dtype), reduce="mean")
    cut = {name: t[:, :, 2:] for name, t in s.items()}
    yield padded[..., 2:], op(**cut, causal=True, reduce="mean")


def an_lse_of_all_keys_changes_nothing(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s = _pair(make, 2, 4, 2, 9, 14, 8)
    lse = attention_given(**s, reduce="lse", causal=True)
    yield op(**s, lse=lse, causal=True, columns=slice(3, 12)), op(**s, causal=True)[..., 3:12]
    later = op(query=s["query"], key=s["key"][:, :, :6], lse=attention_given(**s, reduce="lse"))
    yield later, op(**s)[..., :6]


def statistics_of_a_map_by_hand(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s, labels = _pair(make, 1, 2, 1, 3, 5, 8), torch.tensor([[1, 0, -1, 1, 2]])
    scores = (s["query"] @ s["key"].mT) / 8**0.5
    p = scores.exp() / scores.exp().sum(-1, keepdim=True)
    yield op(**s, reduce="lse"), scores.exp().sum(-1).log()
    yield op(**s, reduce="entropy"), -(p * p.log()).sum(-1)
    mass = torch.stack([p[..., 1], p[..., 0] + p[..., 3], p[..., 4]], -1)
    yield op(**s, reduce="mass", groups=labels, num_groups=3), mass


def equal_keys_share_equally(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Entropy ln n; causal rows see one key more each."""
    s = _pair(make, 1, 2, 2, 6, 6, 8)
    s["key"] = s["key"][:, :, :1].expand_as(s["key"])
    seen = torch.arange(1, 7, dtype=make.dtype)
    yield op(**s, reduce="entropy", causal=True)[..., 1:], seen.log().expand(1, 2, 6)[..., 1:]


def masses_are_those_of_the_log_sum_exps(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s, labels = _pair(make, 2, 4, 2, 9, 14, 8), (torch.arange(14) >= 5).to(torch.int64).expand(2, -1)
    part = op(query=s["query"], key=s["key"][:, :, :5], reduce="lse") - op(**s, reduce="lse")
    mass = op(**s, reduce="mass", groups=labels, num_groups=2)
    yield mass[..., 0], part.exp()
    yield mass.sum(-1), torch.ones_like(part)


def place_of_the_largest_score_by_hand(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s = _pair(make, 1, 2, 1, 5, 7, 8)
    expected = [
        [max(range(i + 3), key=lambda j: s["query"][0, h, i] @ s["key"][0, 0, j]) for i in range(5)] for h in range(2)
    ]
    yield op(**s, causal=True), torch.tensor([expected])


def _visibility(sample: Sample) -> tuple[Tensor | None, Tensor]:
    """Intervals and mask that go with a sample of meta tensors."""
    query, key = sample["query"], sample["key"]
    bounds = torch.empty(1, query.shape[2], 2, dtype=torch.int32, device=query.device)
    mask = torch.empty(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    return bounds if sample.get("causal") else None, mask


def received_launches(sample: Sample) -> None:
    from shared_kernels.attention_received import triton

    query, key, (bounds, mask) = sample["query"], sample["key"], _visibility(sample)
    last, lse = key.shape[2], query.new_empty(query.shape[:3], dtype=torch.float32)
    received, _ = triton.forward(query, key, bounds, mask, lse, None, 0, last, 0.125)
    triton.backward(received, query, key, bounds, mask, lse, lse, 0, last, 0.125, True)


def given_launches(sample: Sample) -> None:
    from shared_kernels.attention_received import triton

    query, key, (bounds, mask) = sample["query"], sample["key"], _visibility(sample)
    labels, groups, entropy = sample.get("groups"), sample.get("num_groups", 0), sample["reduce"] == "entropy"
    lse, entropies, mass = triton.given(query, key, bounds, mask, labels, groups, entropy, 0.125)
    d_entropy = lse if entropy else None
    triton.given_backward(lse, d_entropy, mass, query, key, bounds, mask, labels, lse, entropies, 0.125)


def argmax_launches(sample: Sample) -> None:
    from shared_kernels.attention_received import triton

    triton.argmax(sample["query"], sample["key"], *_visibility(sample))


def _counted(sample: Sample) -> tuple[int, int, int, int]:
    """Heads of all batches, rows, keys and width that a call multiplies."""
    B, H, Nq, D = sample["query"].shape
    rows, Nk = sample.get("rows"), sample["key"].shape[2]
    R = Nq if rows is None else len(range(*rows.indices(Nq))) if isinstance(rows, slice) else rows.shape[-1]
    if sample.get("lse") is not None:
        Nk = len(range(*sample.get("columns", slice(None)).indices(Nk)))
    return B * len(sample.get("heads", range(H))), R, Nk, D


def received_cost(sample: Sample) -> tuple[int, int]:
    Z, R, N, D = _counted(sample)
    size = sample["query"].element_size()
    return 2 * Z * R * N * D, Z * R * D * size + sample["key"].numel() * size + 4 * Z * N


def given_cost(sample: Sample) -> tuple[int, int]:
    Z, R, N, D = _counted(sample)
    size = sample["query"].element_size()
    return 2 * Z * R * N * (D + sample.get("num_groups", 0)), Z * R * D * size + sample["key"].numel() * size


def largest(sample: Sample) -> int:
    """Inputs, as many columns per head as there are keys, and one tile."""
    query, key = sample["query"], sample["key"]
    B, H = query.shape[:2]
    columns = B * H * key.shape[2] * 2  # float64 in a tensor that is counted in float32
    mass = sample.get("num_groups", 0) * B * max(H * query.shape[2], key.shape[2])
    return max(query.numel(), key.numel() * (H // key.shape[1]), columns, mass, 1 << 20)


_OTHER_SHAPES: dict[str, tuple[Sample, type[Exception], str]] = {
    "query without heads": ({"query": torch.ones(2, 37, 24)}, ValueError, r"query must have shape \(batch, heads"),
    "integers": ({"query": torch.ones(2, 6, 37, 24, dtype=torch.int64)}, TypeError, "query must be of a floating"),
    "key of another width": ({"key": torch.ones(2, 3, 53, 16)}, ValueError, r"key must have shape \(2, heads, tokens"),
    "key of another dtype": ({"key": torch.ones(2, 3, 53, 24, dtype=torch.float64)}, TypeError, "key must be of the"),
    "heads that do not divide": ({"key": torch.ones(2, 4, 53, 24)}, ValueError, "heads of query must be a multiple of"),
    "head that is not there": ({"heads": (1, 6)}, ValueError, "heads must be from 0 to 5, got 6"),
    "rows as number": ({"rows": 3}, TypeError, "rows must be a slice, a tensor of row numbers or None, got int"),
    "rows of another batch": ({"rows": torch.zeros(3, 5, dtype=torch.int64)}, ValueError, r"rows must have shape \(2"),
    "infinite scale": ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
    "window without causal": ({"causal": False, "window": 3}, ValueError, "window needs causal=True"),
    "window of none": ({"causal": True, "window": 0}, ValueError, "window must be at least 1, got 0"),
    "key mask of rows": (
        {"key_mask": torch.ones(2, 37, dtype=torch.bool)},
        ValueError,
        r"key_mask must have shape \(2, 53\), got \(2, 37\)",
    ),
}

RECEIVED = OpSpec(
    op=attention_received,
    reference=reference.attention_received,
    samples=received_samples,
    gradients=("query", "key", "row_weights", "lse"),
    laws=(
        sums_of_a_map_by_hand,
        all_that_is_given_is_received,
        values_of_ones_at_a_key_are_its_share,
        mean_is_over_the_rows_that_see_the_key,
        an_lse_of_all_keys_changes_nothing,
    ),
    refused=_OTHER_SHAPES
    | {
        "unknown reduction": ({"reduce": "max"}, ValueError, "reduce must be one of sum, mean, got .*max"),
        "columns as list": ({"columns": [1, 2]}, ValueError, "columns must be a slice of step 1"),
        "weights of all rows": (
            {"row_weights": torch.ones(37)},
            ValueError,
            r"broadcasts to \(2, 6, 14\), got \(37,\)",
        ),
        "LSE of the rows": ({"lse": torch.ones(2, 6, 14)}, ValueError, r"lse must have shape \(2, 6, 37\)"),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.attention_received.default,
        torch.ops.shared_kernels.attention_received_backward.default,
    ),
    launches=received_launches,
    cost=received_cost,
    # rows of 72 and of 256, backward: a smaller tile would cost more
    spill_allowed={torch.bfloat16: {"sm_80": 32, "sm_89": 40, "sm_100": 8, "sm_120": 24}},
    largest=largest,
)

GIVEN = OpSpec(
    op=attention_given,
    reference=reference.attention_given,
    samples=given_samples,
    gradients=("query", "key"),
    laws=(statistics_of_a_map_by_hand, equal_keys_share_equally, masses_are_those_of_the_log_sum_exps),
    refused=_OTHER_SHAPES
    | {
        "unknown statistic": ({"reduce": "max"}, ValueError, "reduce must be one of lse, entropy, mass"),
        "mass without groups": ({"groups": None}, ValueError, "groups and num_groups belong to"),
        "groups for an entropy": ({"reduce": "entropy"}, ValueError, "groups and num_groups belong to"),
        "too many groups": ({"num_groups": 65}, ValueError, "num_groups must be from 1 to 64, got 65"),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.attention_received_given.default,
        torch.ops.shared_kernels.attention_received_given_backward.default,
    ),
    launches=given_launches,
    cost=given_cost,
    spill_allowed={torch.bfloat16: {"sm_80": 8, "sm_89": 32, "sm_90": 24, "sm_100": 32, "sm_120": 32}},  # rows of 256
    largest=largest,
)

ARGMAX = OpSpec(
    op=attention_argmax,
    reference=reference.attention_argmax,
    samples=argmax_samples,
    laws=(place_of_the_largest_score_by_hand,),
    refused={
        "another width": ({"key": torch.ones(2, 3, 45, 16)}, ValueError, r"key must have shape \(2, heads, tokens"),
        "rows as number": ({"rows": 3}, TypeError, "rows must be a slice, a tensor of row numbers or None, got int"),
    },
    library_ops=(torch.ops.shared_kernels.attention_received_argmax.default,),
    launches=argmax_launches,
    cost=given_cost,
    largest=largest,
)

SPECS = (RECEIVED, GIVEN, ARGMAX)
