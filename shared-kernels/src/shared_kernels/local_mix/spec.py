"""What local_mix promises."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_kernels.local_mix import local_mix, reference
from shared_kernels.testing import Make, OpSpec, Sample

UPLIFT = (
    (-2, -2), (-2, 0), (-2, 2), (-1, -1), (-1, 0), (-1, 1), (0, -2), (0, -1), (0, 0),
    (0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, -2), (2, 0), (2, 2),
)  # fmt: skip
"""The 17 offsets of the released models, in their order."""

Op = Callable[..., Any]
Pairs = Iterator[tuple[Tensor, Tensor]]


def _sample(make: Make, B: int, C: int, h: int, w: int, offsets: Any, factor: int = 1, **others: Any) -> Sample:
    n = offsets**2 if isinstance(offsets, int) else len(offsets)
    wide, scale = others.pop("wide", False), others.pop("scale", 1.0)
    logits = make.normal(B, n, factor * h, factor * w, wide=wide, scale=scale)
    return {"value": make.normal(B, C, h, w), "logits": logits, "offsets": offsets, "factor": factor, **others}


def _channels_last(sample: Sample) -> Sample:
    return sample | {"value": sample["value"].contiguous(memory_format=torch.channels_last)}


def samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {
            "uplift": _sample(make, 2, 3, 4, 5, UPLIFT, 2),
            "carafe": _sample(make, 1, 2, 3, 4, 3, 2, border="zero"),
            "given weights": _sample(make, 1, 2, 3, 3, ((0, 1), (-1, 0)), softmax=False),
        }
    if size == "real":
        return {
            "uplift, dinov2": _channels_last(_sample(make, 4, 384, 64, 64, UPLIFT, 2)),
            "carafe": _sample(make, 4, 256, 50, 84, 5, 2, border="zero", wide=True),
            "raft": _sample(make, 2, 2, 55, 128, 3, 8, border="zero"),
            "latents, odd": _sample(make, 2, 5, 63, 97, UPLIFT, 2, softmax=False),
        }
    if size == "medium":
        return {"several rows at once": _sample(make, 2, 33, 40, 29, 5, 2)}
    return {
        "uplift": _sample(make, 1, 19, 5, 7, UPLIFT, 2),
        "channels last, three pixels a side": _channels_last(_sample(make, 2, 6, 3, 5, 3, 3)),
        "carafe, wide logits": _sample(make, 1, 17, 6, 5, 3, 2, border="zero", wide=True),
        "given weights": _sample(make, 2, 3, 4, 6, ((0, 0), (-3, 1), (1, -2)), 2, softmax=False),
        "given weights, zeros outside": _sample(make, 1, 3, 4, 6, ((0, 5), (2, -1)), softmax=False, border="zero"),
        "farther than the map": _sample(make, 1, 2, 2, 3, ((-4, 0), (0, 7), (5, -9))),
        "large logits": _sample(make, 2, 5, 3, 4, 3, scale=30.0),
        "strided memory": _sample(make, 2, 5, 4, 3, 3, 2)
        | {"value": make.strided(2, 5, 4, 3), "logits": make.transposed(2, 9, 8, 6)},
        "one cell": _sample(make, 3, 4, 1, 1, 3, 2, border="zero"),
        "no images": _sample(make, 0, 4, 3, 5, 3, 2),
    }


def agrees_with_the_sum_by_hand(op: Op, make: Make) -> Pairs:
    """The published formula, pixel by pixel."""
    for border in ("replicate", "zero"):
        s = _sample(make, 2, 3, 4, 5, UPLIFT, 2, border=border)
        out, weights = op(**s), s["logits"].softmax(1)
        expected = torch.zeros_like(out)
        for y in range(8):
            for x in range(10):
                for k, (dy, dx) in enumerate(UPLIFT):
                    r, c = y // 2 + dy, x // 2 + dx
                    if border == "zero" and not (0 <= r < 4 and 0 <= c < 5):
                        continue
                    near = s["value"][:, :, min(max(r, 0), 3), min(max(c, 0), 4)]
                    expected[:, :, y, x] += weights[:, k, y, x, None] * near
        yield out, expected


def raft_upsampling(op: Op, make: Make) -> Pairs:
    """As RAFT writes it: unfold, softmax over nine, permute."""
    flow, mask = make.normal(2, 2, 4, 5), make.normal(2, 9 * 64, 4, 5)
    weights = mask.view(2, 1, 9, 8, 8, 4, 5).softmax(2)
    near = F.unfold(8 * flow, 3, padding=1).view(2, 2, 9, 1, 1, 4, 5)
    expected = (weights * near).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(2, 2, 32, 40)
    yield op(8 * flow, F.pixel_shuffle(mask, 8), 3, factor=8, border="zero"), expected


def equal_kernels_are_a_convolution(op: Op, make: Make) -> Pairs:
    value, kernel = make.normal(2, 3, 6, 7), make.normal(9)
    padded = F.pad(value, (1, 1, 1, 1), mode="replicate")
    expected = F.conv2d(padded, kernel.softmax(0).view(1, 1, 3, 3).expand(3, 1, 3, 3), groups=3)
    yield op(value, kernel.view(1, 9, 1, 1).expand(2, 9, 6, 7), 3), expected


def a_certain_centre_is_nearest_neighbour(op: Op, make: Make) -> Pairs:
    s = _sample(make, 2, 3, 4, 5, UPLIFT, 3)
    s["logits"][:, UPLIFT.index((0, 0))] += 100.0
    yield op(**s), F.interpolate(s["value"], scale_factor=3, mode="nearest")


def launches(sample: Sample) -> None:
    from shared_kernels.local_mix import _pairs, triton

    value, logits, factor = sample["value"].permute(0, 2, 3, 1), sample["logits"], sample["factor"]
    offsets = [number for pair in _pairs(sample["offsets"]) for number in pair]
    rest = (offsets, factor, sample.get("softmax", True), sample.get("border") != "zero")
    out, stats = triton.forward(value, logits, *rest)
    triton.backward(out, value, logits, stats, *rest)


def cost(sample: Sample) -> tuple[int, int]:
    value, logits = sample["value"], sample["logits"]
    out = value.numel() * sample["factor"] ** 2
    moved = (value.numel() + out) * value.element_size() + logits.numel() * logits.element_size()
    return 2 * logits.numel() * value.shape[1], moved


def largest(sample: Sample) -> int:
    """The output, the logits, the map with room around it, or what is gathered for a row of cells and a bit more."""
    value, logits = sample["value"], sample["logits"]
    B, C, h, w = value.shape
    offsets = sample["offsets"]
    far = offsets // 2 if isinstance(offsets, int) else max(abs(number) for pair in offsets for number in pair)
    padded = B * (h + 2 * far) * (w + 2 * far) * C
    storage = logits.untyped_storage().nbytes() // logits.element_size()
    return max(value.numel() * sample["factor"] ** 2, storage, padded, w * logits.shape[1] * C, 1 << 18)


SPEC = OpSpec(
    op=local_mix,
    reference=reference.local_mix,
    samples=samples,
    gradients=("value", "logits"),
    laws=(
        agrees_with_the_sum_by_hand,
        raft_upsampling,
        equal_kernels_are_a_convolution,
        a_certain_centre_is_nearest_neighbour,
    ),
    refused={
        "value without batch": ({"value": torch.ones(19, 5, 7)}, ValueError, r"value must have shape \(batch"),
        "integers": (
            {"value": torch.ones(1, 19, 5, 7, dtype=torch.int64)},
            TypeError,
            "value must be of a floating-point dtype, got torch.int64",
        ),
        "no tensor": ({"logits": 1.0}, TypeError, "logits must be a tensor, got float"),
        "another device": ({"logits": torch.ones(1, 17, 10, 14, device="meta")}, ValueError, "logits must be on cpu"),
        "another factor": ({"factor": 3}, ValueError, r"logits must have shape \(1, 17, 15, 21\), got \(1, 17, 10"),
        "other offsets": ({"offsets": 3}, ValueError, r"logits must have shape \(1, 9, 10, 14\), got \(1, 17, 10"),
        "even square": ({"offsets": 4}, ValueError, "offsets must be pairs, or an odd number for a square, got 4"),
        "no offsets": ({"offsets": ()}, ValueError, "offsets must be pairs"),
        "offsets in fractions": ({"offsets": ((0.5, 1),)}, TypeError, "offsets must be whole numbers of cells"),
        "factor of truth": ({"factor": True}, TypeError, "factor must be a whole number, got bool"),
        "factor of zero": ({"factor": 0}, ValueError, "factor must be at least 1, got 0"),
        "unknown border": ({"border": "wrap"}, ValueError, "border must be one of replicate, zero, got 'wrap'"),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.local_mix.default,
        torch.ops.shared_kernels.local_mix_backward.default,
    ),
    launches=launches,
    cost=cost,
    largest=largest,
)
