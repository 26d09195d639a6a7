"""What local_correlation promises."""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from shared_kernels.local_correlation import local_correlation, reference
from shared_kernels.testing import Make, OpSpec, Sample


def _maps(make: Make, *shape: int, radius: int) -> Sample:
    return {"source": make.normal(*shape), "target": make.normal(*shape), "radius": radius}


def samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {
            "window": _maps(make, 2, 3, 4, 5, radius=1),
            "scaled": _maps(make, 1, 2, 3, 4, radius=2) | {"scale": 0.3},
        }
    if size == "real":
        return {
            "stride 8 of 448 pixels": _maps(make, 4, 128, 56, 48, radius=4),
            "small window": _maps(make, 2, 96, 120, 160, radius=1),
            "odd": _maps(make, 3, 37, 29, 31, radius=3),
        }
    if size == "medium":
        return {"map": _maps(make, 2, 17, 61, 53, radius=3)}
    return {
        "window": _maps(make, 2, 19, 7, 11, radius=2),
        "more offsets than a tile": _maps(make, 1, 5, 6, 9, radius=4) | {"scale": 0.5},
        "only itself": _maps(make, 2, 33, 5, 7, radius=0),
        "window larger than the map": _maps(make, 2, 4, 2, 3, radius=3),
        "one row": _maps(make, 3, 6, 1, 37, radius=1),
        "large numbers": _maps(make, 1, 16, 5, 6, radius=1)
        | {"source": make.normal(1, 16, 5, 6, scale=300.0), "target": make.normal(1, 16, 5, 6, scale=30.0)},
        "strided": {"source": make.strided(2, 9, 5, 6), "target": make.transposed(2, 9, 5, 6), "radius": 2},
        "no maps": _maps(make, 0, 6, 5, 7, radius=1),
        "no pixels": _maps(make, 2, 6, 0, 7, radius=1),
    }


def agrees_with_the_sum_by_hand(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s = _maps(make, 2, 3, 4, 5, radius=2)
    expected = torch.zeros(2, 25, 4, 5, dtype=make.dtype)
    for b, k, y, x in itertools.product(*map(range, expected.shape)):
        at_y, at_x = y + k // 5 - 2, x + k % 5 - 2
        if 0 <= at_y < 4 and 0 <= at_x < 5:
            expected[b, k, y, x] = s["source"][b, :, y, x] @ s["target"][b, :, at_y, at_x] / math.sqrt(3)
    yield op(**s), expected


def shifted_map_is_found_at_the_shift(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Moving the target moves its products to another channel."""
    source, target = make.normal(2, 5, 9, 12), make.normal(2, 5, 9, 12)
    moved = pad(target, (1, 0, 2, 0))[..., :9, :12]  # by (2, 1)
    still, after = (op(source, t, radius=3).view(2, 7, 7, 9, 12) for t in (target, moved))
    yield after[:, 2:, 1:, 2:, 1:], _at(still[:, :-2, :-1, 2:, 1:], source, target)


def _at(products: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Without those whose neighbour was pushed out of the map by the shift of (2, 1)."""
    H, W = source.shape[2:]
    y, x = torch.arange(2, H), torch.arange(1, W)
    dy, dx = torch.arange(-3, 2), torch.arange(-3, 3)
    inside_y = (y + dy[:, None] < H - 2)[None, :, None, :, None]
    inside_x = (x + dx[:, None] < W - 1)[None, None, :, None, :]
    return products * (inside_y & inside_x).to(target.dtype)


def swapping_maps_mirrors_the_window(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s = _maps(make, 2, 5, 8, 11, radius=1)
    there, back = op(**s), op(s["target"], s["source"], radius=1)
    yield there[:, 0, 1:, 1:], back[:, 8, :-1, :-1]
    yield there[:, 5, :, :-1], back[:, 3, :, 1:]
    yield there[:, 4], back[:, 4]


def launches(sample: Sample) -> None:
    from shared_kernels.local_correlation import triton

    source, target, radius = sample["source"], sample["target"], sample["radius"]
    out = triton.forward(source, target, radius, 0.5)
    triton.backward(out, source, target, radius, 0.5)


def cost(sample: Sample) -> tuple[int, int]:
    x, window = sample["source"], (2 * sample["radius"] + 1) ** 2
    return 2 * x.numel() * window, (2 * x.numel() + x.numel() // x.shape[1] * window) * x.element_size()


def largest(sample: Sample) -> int:
    """Maps as given, padded ones, and windows of numbers; never windows of features."""
    (B, C, H, W), r = sample["source"].shape, sample["radius"]
    stored = max(sample[n].untyped_storage().nbytes() // sample[n].element_size() for n in ("source", "target"))
    padded, window = B * (H + 2 * r) * (W + 2 * r), (2 * r + 1) ** 2
    return max(1, stored, padded * max(C, window), B * H * W * window + 1)


SPEC = OpSpec(
    op=local_correlation,
    reference=reference.local_correlation,
    samples=samples,
    gradients=("source", "target"),
    laws=(agrees_with_the_sum_by_hand, shifted_map_is_found_at_the_shift, swapping_maps_mirrors_the_window),
    refused={
        "no batch": ({"source": torch.ones(19, 7, 11)}, ValueError, r"source must have shape \(B, C, H, W\), got \(19"),
        "another size": ({"target": torch.ones(2, 19, 7, 12)}, ValueError, r"target must have shape \(2, 19, 7, 11\)"),
        "another dtype": ({"target": torch.ones(2, 19, 7, 11).half()}, TypeError, "target must be of the dtype of"),
        "another device": ({"target": torch.ones(2, 19, 7, 11, device="meta")}, ValueError, "target must be on cpu"),
        "integers": ({"source": torch.ones(2, 19, 7, 11).int()}, TypeError, "source must be of a floating-point dtype"),
        "array": ({"source": [1.0]}, TypeError, "source must be a tensor, got list"),
        "negative radius": ({"radius": -1}, ValueError, "radius must be from 0 to 15, got -1"),
        "large radius": ({"radius": 16}, ValueError, "radius must be from 0 to 15, got 16"),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.local_correlation.default,
        torch.ops.shared_kernels.local_correlation_backward.default,
    ),
    launches=launches,
    cost=cost,
    largest=largest,
)
