"""What correlation promises."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from shared_kernels.correlation import correlation, reference
from shared_kernels.testing import Make, OpSpec, Sample


def _maps(make: Make, B: int, N: int, M: int, D: int, E: int) -> Sample:
    """Features of both images, and values of their targets in float32 at least."""
    return {
        "source": make.normal(B, N, D),
        "target": make.normal(B, M, D),
        "values": make.normal(M, E, wide=True),
        "temperature": 0.3,
    }


def _mask(make: Make, *lengths: int, tokens: int) -> Tensor:
    """Of image b the last lengths[b] positions count."""
    short = tokens - torch.tensor(lengths, device=make.device)
    return torch.arange(tokens, device=make.device) >= short[:, None]


def _masked(make: Make) -> Sample:
    """Second image without targets; what does not count is not a number."""
    sample = _maps(make, 3, 21, 34, 24, 3) | {"return_lse": True, "values": make.normal(3, 34, 3, wide=True)}
    sample |= {"source_mask": _mask(make, 17, 21, 9, tokens=21), "target_mask": _mask(make, 30, 0, 11, tokens=34)}
    for name, mask in (("source", "source_mask"), ("target", "target_mask"), ("values", "target_mask")):
        sample[name] = sample[name].masked_fill(~sample[mask][..., None], torch.nan)
    return sample


def samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        sides = {"source_mask": _mask(make, 5, 4, tokens=5), "target_mask": _mask(make, 7, 0, tokens=7)}
        return {
            "row": _maps(make, 2, 5, 7, 4, 2) | {"return_lse": True},
            "dual": _maps(make, 2, 5, 7, 4, 2) | {"return_lse": True, "softmax": "dual"} | sides,
        }
    if size == "real":
        return {
            "width 256": _maps(make, 2, 4096, 4000, 256, 2) | {"temperature": 0.02},
            "width 768, dual": _maps(make, 2, 4096, 4096, 768, 2) | {"temperature": 0.02, "softmax": "dual"},
            "width 40": _maps(make, 2, 900, 1100, 40, 5),
        }
    if size == "medium":
        return {"several tiles": _maps(make, 2, 700, 900, 24, 2) | {"return_lse": True, "softmax": "dual"}}
    column = _maps(make, 2, 37, 19, 33, 2) | {"softmax": "column", "values": make.normal(2, 37, 2, wide=True)}
    return {
        "row": _maps(make, 2, 37, 43, 24, 2) | {"return_lse": True},
        "dual": _maps(make, 2, 35, 41, 40, 3) | {"softmax": "dual", "return_lse": True},
        "column": column,
        "sharp": _maps(make, 1, 33, 31, 80, 2) | {"temperature": 0.01},
        # temperature 8: at 1, gradients on GPUs are a fifth too inexact for a log-sum-exp of hundreds in float32
        "products of large features": _maps(make, 1, 18, 37, 20, 16)
        | {"source": make.normal(1, 18, 20, scale=30.0), "normalize": False, "temperature": 8.0, "return_lse": True},
        "masked": _masked(make),
        "masked, dual": _masked(make) | {"softmax": "dual"},
        "strided": _maps(make, 2, 17, 23, 19, 2)
        | {"source": make.strided(2, 17, 19), "target": make.transposed(2, 23, 19), "return_lse": True},
        "one of each": _maps(make, 7, 1, 1, 16, 1) | {"return_lse": True},
        "no target": _maps(make, 2, 5, 0, 16, 2) | {"return_lse": True},
        "no source": _maps(make, 2, 0, 5, 16, 2) | {"softmax": "dual"},
        "no images": _maps(make, 0, 6, 5, 16, 2) | {"return_lse": True},
    }


def agrees_with_the_sum_by_hand(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Both softmaxes, pair by pair."""
    s = _maps(make, 1, 4, 5, 3, 2)
    x, y = (t[0] / (t[0].norm(dim=-1, keepdim=True) + 1e-5) for t in (s["source"], s["target"]))
    e = torch.empty(4, 5, dtype=make.dtype)
    for i, j in itertools.product(range(4), range(5)):
        e[i, j] = torch.exp(x[i] @ y[j] / 0.3)
    row, column = e / e.sum(1, keepdim=True), e / e.sum(0)
    out, lse = op(**s, return_lse=True)
    yield out[0], row @ s["values"]
    yield lse[0], e.sum(1).log()
    out, lse = op(**s, softmax="dual", return_lse=True)
    yield out[0], (row * column) @ s["values"] / (row * column).sum(1, keepdim=True)
    yield lse[0], (row * column).sum(1).log()
    yield op(**s | {"values": s["values"][:4]}, softmax="column")[0], column.T @ s["values"][:4]


def is_attention_over_unit_features(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s = _maps(make, 2, 13, 17, 24, 3) | {"eps": 1e-300}
    x, y = (normalize(s[name], dim=-1)[:, None] for name in ("source", "target"))
    values = s["values"].expand(2, 1, 17, 3)
    yield op(**s), scaled_dot_product_attention(x, y, values, scale=1 / 0.3)[:, 0]


def sharp_softmax_is_the_best_match(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets are sources in another order: at temperature 0 every softmax finds them, and is sure of it."""
    x, order = make.normal(2, 29, 24), make.normal(29).argsort()
    values = make.normal(29, 2)
    for softmax in ("row", "dual"):
        found = op(x, x[:, order], values[order], softmax=softmax, temperature=1e-3)
        yield found, values.expand(2, -1, -1)
    _, lse = op(x, x[:, order], values, softmax="dual", temperature=1e-3, return_lse=True)
    yield lse.exp(), torch.ones_like(lse)


def splitting_images_changes_nothing(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s = _maps(make, 3, 11, 13, 9, 2)
    whole = op(**s, softmax="dual")
    for b in range(3):
        yield op(s["source"][b, None], s["target"][b, None], s["values"], temperature=0.3, softmax="dual")[0], whole[b]


def masked_targets_are_as_if_absent(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s = _maps(make, 2, 11, 13, 9, 2) | {"return_lse": True}
    for softmax in ("row", "dual"):
        few = s | {"target": s["target"][:, 4:], "values": s["values"][4:], "softmax": softmax}
        masked = op(**s, softmax=softmax, target_mask=_mask(make, 9, 9, tokens=13))
        yield from zip(masked, op(**few), strict=True)


def launches(sample: Sample) -> None:
    from shared_kernels.correlation import triton

    x, y, v = sample["source"], sample["target"], sample["values"].expand(sample["source"].shape[0], -1, -1)
    of_x, of_y = (t.new_empty(t.shape[:2], dtype=torch.float32) for t in (x, y))
    out, lse = triton.forward(x, y, v, of_x, of_y, of_y)
    triton.backward(out, lse, x, y, v, of_x, of_y, of_y, out, lse)


def cost(sample: Sample) -> tuple[int, int]:
    (B, N, D), M, E = sample["source"].shape, sample["target"].shape[1], sample["values"].shape[-1]
    widths = [D + E]
    if sample.get("softmax") == "dual":
        widths += [D + 1] * (2 if sample.get("return_lse") else 1)
    moved = sum(t.numel() * t.element_size() for t in (sample["source"], sample["target"], sample["values"]))
    return 2 * B * N * M * sum(widths), moved


def largest(sample: Sample) -> int:
    """Inputs (also as they lie in memory), and tiles of 2^18 similarities or 16 rows; never N x M."""
    inputs = [sample[name] for name in ("source", "target", "values")]
    stored = max(t.untyped_storage().nbytes() // t.element_size() for t in inputs)
    (B, N, D), M, E = inputs[0].shape, inputs[1].shape[1], inputs[2].shape[-1]
    return max(1, stored, max(N, M) * B * max(D, E + 1), min(N * M, max(1 << 18, 16 * M)), 16 * min(M, N) * 16)


_WIDE = torch.ones(43, 17)
SPEC = OpSpec(
    op=correlation,
    reference=reference.correlation,
    samples=samples,
    gradients=("source", "target", "values"),
    laws=(
        agrees_with_the_sum_by_hand,
        is_attention_over_unit_features,
        sharp_softmax_is_the_best_match,
        splitting_images_changes_nothing,
        masked_targets_are_as_if_absent,
    ),
    refused={
        "no batch": ({"source": torch.ones(37, 24)}, ValueError, r"source must have shape \(B, N, D\), got \(37, 24\)"),
        "maps": ({"target": torch.ones(2, 24, 5, 7)}, ValueError, r"target must have shape \(2, M, 24\), got \(2, 24"),
        "another width": ({"target": torch.ones(2, 43, 25)}, ValueError, r"target must have shape \(2, M, 24\), got"),
        "another dtype": ({"target": torch.ones(2, 43, 24).half()}, TypeError, "target must be of the dtype of source"),
        "integers": ({"values": torch.ones(43, 2).int()}, TypeError, "values must be of a floating-point dtype"),
        "too few values": ({"values": torch.ones(42, 2)}, ValueError, r"values must have shape \(43, E\), got \(42"),
        "too wide values": ({"values": _WIDE}, ValueError, "values must have 1 to 16 columns, got 17"),
        "list": ({"values": [1.0]}, TypeError, "values must be a tensor, got list"),
        "another device": ({"values": torch.ones(43, 2, device="meta")}, ValueError, "values must be on cpu like the"),
        "another softmax": ({"softmax": "both"}, ValueError, "softmax must be one of row, column, dual, got 'both'"),
        "cold": ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        "eps of zero": ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        "mask of numbers": ({"target_mask": torch.ones(2, 43)}, TypeError, "target_mask must be of torch.bool, got"),
        "mask of targets": (
            {"source_mask": torch.ones(2, 43, dtype=torch.bool)},
            ValueError,
            r"source_mask must have shape \(2, 37\), got \(2, 43\)",
        ),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.correlation.default,
        torch.ops.shared_kernels.correlation_backward.default,
    ),
    launches=launches,
    # five columns of values: the gradients of a target, in bfloat16 the read-out
    spill_allowed={torch.float32: {"sm_80": 24, "sm_120": 40}, torch.bfloat16: {"sm_89": 16}},
    cost=cost,
    largest=largest,
)
