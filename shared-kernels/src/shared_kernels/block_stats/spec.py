"""What block_stats promises."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shared_kernels.block_stats import block_stats, reference
from shared_kernels.testing import Make, OpSpec, Sample


def _lengths(make: Make, *lengths: int) -> Tensor:
    return torch.tensor(lengths, device=make.device)


def samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {"tail and lengths": {"x": make.normal(2, 2, 7, 3), "block_size": 3, "lengths": _lengths(make, 7, 4)}}
    if size == "real":
        return {
            "head_dim 128": {"x": make.normal(2, 12, 8200, 128), "block_size": 128},
            "head_dim 64, lengths": {
                "x": make.normal(2, 16, 4100, 64), "block_size": 64, "lengths": _lengths(make, 4100, 3000)
            },
            "head_dim 256": {"x": make.normal(1, 8, 2100, 256), "block_size": 1024},
            "head_dim 24": {"x": make.normal(1, 3, 2100, 24), "block_size": 32},
        }  # fmt: skip
    if size == "medium":
        return {
            "several chunks": {"x": make.normal(1, 2, 3001, 70), "block_size": 48},
            "several heads a chunk": {
                "x": make.normal(3, 7, 301, 90), "block_size": 48, "lengths": _lengths(make, 301, 250, 48)
            },
        }  # fmt: skip
    return {
        "shorter last block": {"x": make.normal(2, 2, 37, 20), "block_size": 16},
        "whole blocks": {"x": make.normal(1, 1, 36, 40), "block_size": 12},
        "lengths": {"x": make.normal(4, 1, 41, 18), "block_size": 18, "lengths": _lengths(make, 41, 17, 0, 99)},
        "nothing behind the length leaks": {
            "x": make.normal(2, 1, 23, 17).index_fill(2, torch.arange(18, 23, device=make.device), torch.nan),
            "block_size": 7,
            "lengths": _lengths(make, 18, 11),
        },
        "blocks of one token": {"x": make.normal(1, 1, 7, 17), "block_size": 1},
        "one token": {"x": make.normal(2, 1, 1, 24), "block_size": 5},
        "block longer than the sequence": {"x": make.normal(2, 1, 11, 6, scale=30.0), "block_size": 64},
        "heads behind tokens": {"x": make.normal(1, 29, 3, 24).transpose(1, 2), "block_size": 8},
        "strided memory": {"x": make.strided(2, 2, 13, 21), "block_size": 8},
        "no sequences": {"x": make.normal(0, 3, 11, 8), "block_size": 4},
        "no tokens": {"x": make.normal(2, 3, 0, 8), "block_size": 4},
    }


def agrees_with_the_sum_by_hand(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    x = make.normal(2, 3, 11, 5)
    for size in (1, 3, 4, 11, 20):
        mean, deviation = op(x, block_size=size, lengths=torch.tensor([11, 8]))
        for b, end in enumerate((11, 8)):
            for block, start in enumerate(range(0, end, size)):
                tokens = x[b, :, start : min(start + size, end)]
                yield mean[b, :, block], tokens.mean(1)
                yield deviation[b, :, block], (tokens - tokens.mean(1, keepdim=True)).abs().mean(1)


def equal_tokens_do_not_deviate(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    values = make.normal(2, 3, 4, 6)
    mean, deviation = op(values.repeat_interleave(8, 2), block_size=8)
    yield mean, values
    yield deviation, torch.zeros_like(values)


def shifting_and_scaling(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    x, shift = make.normal(2, 3, 23, 6), make.normal(6)
    mean, deviation = op(x, block_size=5)
    moved, same = op(shift - 3 * x, block_size=5)
    yield moved, shift - 3 * mean
    yield same, 3 * deviation


def launches(sample: Sample) -> None:
    from shared_kernels.block_stats import triton

    x, lengths, block_size = sample["x"], sample.get("lengths"), sample["block_size"]
    mean, deviation = triton.forward(x, lengths, block_size)
    triton.backward(mean, deviation, x, lengths, mean, block_size)


def cost(sample: Sample) -> tuple[int, int]:
    x = sample["x"]
    return 4 * x.numel(), x.numel() * x.element_size()


SPEC = OpSpec(
    op=block_stats,
    reference=reference.block_stats,
    samples=samples,
    gradients=("x",),
    laws=(agrees_with_the_sum_by_hand, equal_tokens_do_not_deviate, shifting_and_scaling),
    refused={
        "x without heads": ({"x": torch.ones(3, 8, 9)}, ValueError, r"x must have shape \(batch, heads, tokens"),
        "integers": ({"x": torch.ones(2, 3, 8, 9, dtype=torch.int64)}, TypeError, "x must be of a floating-point"),
        "no block size": ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        "lengths of another batch": ({"lengths": torch.tensor([3])}, ValueError, r"lengths must have shape \(2,\)"),
        "lengths as list": ({"lengths": [3, 4]}, TypeError, "lengths must be a tensor, got list"),
        "lengths with halves": ({"lengths": torch.ones(2)}, TypeError, "lengths must be of torch.int32 or torch.int64"),
        "another device": (
            {"lengths": torch.ones(2, dtype=torch.int64, device="meta")},
            ValueError,
            "lengths must be on cpu like the other tensors, got meta",
        ),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.block_stats.default,
        torch.ops.shared_kernels.block_stats_backward.default,
    ),
    launches=launches,
    cost=cost,
    largest=lambda sample: sample["x"].untyped_storage().nbytes() // sample["x"].element_size(),  # x itself
)
