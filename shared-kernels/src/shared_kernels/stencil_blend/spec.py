"""What stencil_blend promises."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_kernels.stencil_blend import reference, stencil_blend
from shared_kernels.testing import Make, OpSpec, Sample

SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


def _parameters(make: Make, *, gain: bool = False) -> Sample:
    numbers: Sample = {f"kernel_{axis}": make.normal(3, 3, wide=True) for axis in "xy"}
    numbers["weight"] = make.normal(wide=True)
    return numbers | ({"gain": make.normal(wide=True)} if gain else {})


def _sobel(make: Make) -> Sample:
    kernel_x = torch.tensor(SOBEL, dtype=make.dtype, device=make.device)
    return {"kernel_x": kernel_x, "kernel_y": kernel_x.T, "weight": make.normal()}


def samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {
            "learned": {"x": make.normal(2, 3, 4, 5), **_parameters(make, gain=True)},
            "luma": {"x": make.normal(2, 3, 4, 5), **_parameters(make), "luma": make.normal(3)},
        }
    if size == "real":
        return {
            "histograms": {"x": make.normal(256, 9, 32, 32), **_parameters(make, gain=True)},
            "chips": {"x": make.normal(8, 3, 224, 224), **_sobel(make)},
        }
    if size == "medium":
        return {"several chunks": {"x": make.normal(7, 13, 61, 53), **_parameters(make)}}
    return {
        "sobel": {"x": make.normal(2, 3, 13, 17), **_sobel(make), "eps": 1e-6},
        "learned": {"x": make.normal(1, 2, 11, 70), **_parameters(make, gain=True), "eps": 1e-4},
        "luma": {"x": make.normal(2, 3, 9, 10), **_parameters(make), "luma": make.normal(3)},
        "one row": {"x": make.normal(3, 2, 1, 19), **_parameters(make)},
        "one column": {"x": make.normal(2, 3, 19, 1), **_sobel(make)},
        "transposed memory": {"x": make.transposed(2, 3, 7, 12), **_parameters(make)},
        "strided memory": {"x": make.strided(2, 3, 7, 12), **_parameters(make)},
        "large numbers": {"x": make.normal(2, 3, 8, 9, scale=1e4), **_sobel(make)},
        "one tap and none": {
            "x": make.normal(2, 3, 6, 9),
            **_sobel(make),
            "kernel_x": torch.zeros(3, 3, dtype=make.dtype, device=make.device).fill_diagonal_(0.5)[:, [1, 2, 0]],
            "kernel_y": torch.zeros(3, 3, dtype=make.dtype, device=make.device),
        },
        "no images": {"x": make.normal(0, 3, 6, 9), **_sobel(make)},
    }


def agrees_with_the_sum_by_hand(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """The definition, pixel by pixel."""
    x, p = make.normal(2, 3, 4, 5), _parameters(make, gain=True)
    padded, expected = F.pad(x, (1, 1, 1, 1)), torch.empty_like(x)
    for n, c, h, w in itertools.product(*map(range, x.shape)):
        window = padded[n, c, h : h + 3, w : w + 3]
        squares = [(p[kernel] * window).sum() ** 2 for kernel in ("kernel_x", "kernel_y")]
        magnitude = p["gain"] * (sum(squares) + 1e-3).sqrt()
        expected[n, c, h, w] = p["weight"] * magnitude + (1 - p["weight"]) * x[n, c, h, w]
    yield op(x, **p, eps=1e-3), expected


def ramp_has_its_slope(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Sobel of a ramp is 8 inside, whichever way it runs; weight 0 gives the image."""
    ramp = torch.arange(9.0, dtype=make.dtype).expand(2, 3, 7, 9)
    sobel = _sobel(make) | {"weight": torch.ones((), dtype=make.dtype)}
    eight = torch.full((2, 3, 5, 7), 8.0, dtype=make.dtype)
    yield op(ramp, **sobel, eps=1e-12)[..., 1:-1, 1:-1], eight
    yield op(ramp.mT, **sobel, eps=1e-12)[..., 1:-1, 1:-1], eight.mT
    yield op(ramp, **sobel | {"weight": torch.zeros((), dtype=make.dtype)}), ramp


def transposing_swaps_the_kernels(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    x, p = make.normal(2, 3, 8, 11), _parameters(make)
    swapped = {"kernel_x": p["kernel_y"].T, "kernel_y": p["kernel_x"].T, "weight": p["weight"]}
    yield op(x.mT, **swapped), op(x, **p).mT


def luma_of_one_channel_is_that_channel(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    x, p = make.normal(2, 3, 8, 11), _parameters(make)
    second = torch.tensor([0.0, 1.0, 0.0], dtype=make.dtype)
    ones = p | {"weight": torch.ones((), dtype=make.dtype)}
    yield op(x, **ones, luma=second), op(x[:, 1:2], **ones).expand_as(x)


def launches(sample: Sample) -> None:
    from shared_kernels.stencil_blend import triton

    x, eps = sample["x"], sample.get("eps", 1e-8)
    wide: dict[str, Any] = {
        k: sample[k].to(torch.promote_types(x.dtype, torch.float32)) for k in ("kernel_x", "weight")
    }
    small = (wide["kernel_x"], wide["kernel_x"], wide["weight"], wide["weight"])
    triton.forward(x, *small, eps)
    triton.backward(x, x, *small, eps, True)  # without kernel gradients the same kernel needs less


def cost(sample: Sample) -> tuple[int, int]:
    x, planes = sample["x"], sample["x"].shape[0] * (1 if "luma" in sample else sample["x"].shape[1])
    return 2 * 2 * 9 * planes * math.prod(x.shape[2:]), 2 * x.numel() * x.element_size()


SPEC = OpSpec(
    op=stencil_blend,
    reference=reference.stencil_blend,
    samples=samples,
    gradients=("x", "kernel_x", "kernel_y", "weight", "gain", "luma"),
    laws=(
        agrees_with_the_sum_by_hand,
        ramp_has_its_slope,
        transposing_swaps_the_kernels,
        luma_of_one_channel_is_that_channel,
    ),
    refused={
        "x without batch": ({"x": torch.ones(3, 8, 9)}, ValueError, r"x must have shape \(N, C, H, W\), got \(3, 8"),
        "integers": (
            {"x": torch.ones(2, 3, 8, 9, dtype=torch.int64)},
            TypeError,
            "x must be of a floating-point dtype",
        ),
        "larger kernel": (
            {"kernel_y": torch.ones(5, 5)},
            ValueError,
            r"kernel_y must have shape \(3, 3\), got \(5, 5\)",
        ),
        "weight per channel": ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(\), got \(3,\)"),
        "weight as number": ({"weight": 0.5}, TypeError, "weight must be a tensor, got float"),
        "luma of another count": ({"luma": torch.ones(4)}, ValueError, r"luma must have shape \(3,\), got \(4,\)"),
        "eps of zero": ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        "another device": ({"weight": torch.ones((), device="meta")}, ValueError, "weight must be on cpu like the"),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.stencil_blend.default,
        torch.ops.shared_kernels.stencil_blend_backward.default,
    ),
    launches=launches,
    cost=cost,
    # both correlations of a chunk in one storage; a chunk is at most half as large again as planned
    largest=lambda sample: max(sample["x"].numel(), 2 * 150_000),
)
