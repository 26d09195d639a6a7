"""What l1_attention promises."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_kernels.l1_attention import l1_attention, reference
from shared_kernels.testing import Make, OpSpec, Sample


def _unit(tensor: Tensor) -> Tensor:
    return F.normalize(tensor.double(), dim=-1).to(tensor.dtype) if tensor.device.type != "meta" else tensor


def _qkv(make: Make, B: int, H: int, Hkv: int, Nq: int, Nk: int, D: int, E: int) -> Sample:
    """Query and key of unit length; keys lean to one side, so that scores are not all around 0."""
    query, key = make.normal(B, H, Nq, D), make.normal(B, Hkv, Nk, D)
    return {"query": _unit(query + 0.3), "key": _unit(key + 0.3), "value": make.normal(B, Hkv, Nk, E)}


def _poisoned(sample: Sample, key_mask: Tensor) -> Sample:
    """NaN in the keys and values that are masked."""
    hidden = ~key_mask[:, None, :, None]
    changed = {name: sample[name].masked_fill(hidden, math.nan) for name in ("key", "value")}
    return sample | changed | {"key_mask": key_mask}


def _first_equal(sample: Sample, count: int) -> Sample:
    key = sample["key"]
    return sample | {"key": torch.cat([key[:, :, :1].expand(-1, -1, count, -1), key[:, :, count:]], 2)}


def _padded(make: Make, lengths: list[int], Nk: int) -> Tensor:
    """Keys of each batch that exist, padded on the left."""
    return torch.arange(Nk, device=make.device) >= Nk - torch.tensor(lengths, device=make.device)[:, None]


def samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {
            "power 3": _qkv(make, 1, 4, 2, 6, 9, 4, 3) | {"power": 3.0, "causal": True},
            "power 2.5 in a window": _qkv(make, 2, 2, 2, 7, 7, 5, 4) | {"power": 2.5, "causal": True, "window": 5},
            "one stage": _qkv(make, 1, 2, 1, 5, 7, 4, 3),
        }
    if size == "medium":
        return {
            "several tiles": _qkv(make, 1, 2, 1, 400, 1500, 24, 20) | {"power": 15.0, "causal": True},
            "several heads in a tile": _qkv(make, 3, 6, 3, 61, 409, 20, 24) | {"power": 3.0},
        }
    if size == "real":
        return {
            "128 wide": _qkv(make, 1, 8, 4, 2048, 4096, 128, 128) | {"power": 15.0, "causal": True},
            "64 wide": _qkv(make, 2, 4, 4, 1000, 3000, 64, 64) | {"power": 3.0, "causal": True},
            "256 wide": _qkv(make, 1, 2, 1, 700, 1900, 256, 256) | {"power": 2.5},
            "odd widths": _qkv(make, 1, 2, 1, 700, 1900, 72, 40),
        }
    return {
        "power 15": _qkv(make, 2, 4, 2, 37, 53, 24, 40) | {"power": 15.0, "causal": True},
        "one stage": _qkv(make, 2, 3, 3, 37, 45, 40, 33) | {"causal": True},
        "padded on the left, NaN": _poisoned(_qkv(make, 3, 2, 2, 35, 35, 16, 24), _padded(make, [35, 11, 0], 35))
        | {"power": 3.0, "causal": True},
        "power 2.5 in a window": _qkv(make, 2, 3, 1, 51, 38, 33, 16) | {"power": 2.5, "causal": True, "window": 9},
        "counts and scale given": _qkv(make, 2, 2, 2, 5, 47, 24, 72)
        | {"power": 3.0, "log_d": 2.0, "n_keys": make.normal(2, 5, wide=True).abs() * 20 + 100},
        "first rows see equal keys": _first_equal(_qkv(make, 1, 2, 2, 17, 21, 24, 16), 8)
        | {"power": 15.0, "causal": True},
        "strided memory": {"query": _unit(make.normal(2, 17, 3, 24)).transpose(1, 2)}
        | {"key": _unit(make.normal(2, 33, 3, 24)).transpose(1, 2), "value": make.strided(2, 3, 33, 24), "power": 3.0},
        "one key": _qkv(make, 2, 2, 1, 9, 1, 24, 16) | {"power": 15.0},
        "no images": _qkv(make, 0, 2, 2, 7, 11, 24, 16),
        "no keys": _qkv(make, 2, 2, 1, 7, 0, 24, 16) | {"power": 3.0},
    }


def weights_by_hand(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """The paper's formulas, row by row; values that are the unit matrix show the weights."""
    s = _qkv(make, 1, 2, 1, 6, 6, 8, 6) | {"value": torch.eye(6, dtype=make.dtype)[None, None]}
    expected = torch.zeros(1, 2, 6, 6, dtype=make.dtype)
    for h, i in itertools.product(range(2), range(6)):
        N = i + 1
        z = [math.log(8) * math.log(N) * float(s["query"][0, h, i] @ s["key"][0, 0, j]) for j in range(N)]
        plus = [math.log1p(math.exp(value)) for value in z]
        u = [max(0.0, N * value / sum(plus) - (N > 3)) for value in plus]
        for j in range(N):
            expected[0, h, i, j] = u[j] ** 3 / sum(value**3 for value in u)
    yield op(**s, power=3, causal=True), expected


def norms_do_not_matter(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores scale with log_d: normalising outside is the same as any other length made up for."""
    s = _qkv(make, 2, 4, 2, 9, 14, 8, 5)
    longer = s | {"query": 3 * s["query"]}
    yield op(**longer, power=15, log_d=math.log(8) / 3), op(**s, power=15)


def weights_sum_to_one(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s = _qkv(make, 2, 4, 2, 9, 14, 8, 5)
    s["value"] = torch.ones_like(s["value"])
    for power in (None, 1, 15):
        yield op(**s, power=power, causal=True), torch.ones(2, 4, 9, 5, dtype=make.dtype)


def large_powers_pick_the_nearest_key(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s = _qkv(make, 1, 2, 2, 9, 14, 8, 5)
    nearest = (s["query"] @ s["key"].mT).argmax(-1)
    s["value"] = s["value"].round()
    expected = s["value"].gather(2, nearest[..., None].expand(-1, -1, -1, 5))
    yield op(**s, power=3e5), expected


def few_keys_keep_all_their_weight(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Up to three keys nothing is cut off, so that power 1 is the first stage."""
    s = _qkv(make, 2, 2, 2, 3, 3, 8, 5)
    yield op(**s, power=1, causal=True), op(**s, causal=True)


def decoding_continues_the_prefill(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    s = _qkv(make, 1, 2, 1, 12, 12, 8, 5)
    last = op(query=s["query"][:, :, 9:], key=s["key"], value=s["value"], power=15, causal=True)
    yield last, op(**s, power=15, causal=True)[:, :, 9:]
    step = op(query=s["query"][:, :, 6:7], key=s["key"][:, :, :7], value=s["value"][:, :, :7], power=15)
    yield step, op(**s, power=15, causal=True)[:, :, 6:7]


def launches(sample: Sample) -> None:
    from shared_kernels.l1_attention import triton

    query, key, value = (sample[name] for name in ("query", "key", "value"))
    bounds = torch.empty(1, query.shape[2], 2, dtype=torch.int32, device=query.device) if "causal" in sample else None
    mask = torch.empty(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    counts = torch.empty(query.shape[0], query.shape[2], device=query.device)
    inputs = (bounds, mask, counts, math.log(query.shape[3]), sample.get("power"))
    out, state = triton.forward(query, key, value, *inputs)
    triton.backward(out, query, key, value, state, *inputs)


def cost(sample: Sample) -> tuple[int, int]:
    query, key, value = (sample[name] for name in ("query", "key", "value"))
    B, H, R, D = query.shape
    pairs = B * H * R * key.shape[2]
    if query.numel() == 0:
        return 0, 0
    moved = query.numel() + key.numel() + value.numel() + B * H * R * value.shape[3]
    return 2 * pairs * (D + value.shape[3]), moved * query.element_size()


def largest(sample: Sample) -> int:
    """Inputs with heads in full, and a tile."""
    query, key, value = (sample[name] for name in ("query", "key", "value"))
    group = query.shape[1] // key.shape[1]
    inputs: list[Any] = [query.numel(), query[..., :1].numel() * value.shape[3], key.numel() * group]
    return max(*inputs, value.numel() * group, 1 << 19)


SPEC = OpSpec(
    op=l1_attention,
    reference=reference.l1_attention,
    samples=samples,
    gradients=("query", "key", "value"),
    laws=(
        weights_by_hand,
        norms_do_not_matter,
        weights_sum_to_one,
        large_powers_pick_the_nearest_key,
        few_keys_keep_all_their_weight,
        decoding_continues_the_prefill,
    ),
    refused={
        "query without heads": ({"query": torch.ones(2, 37, 24)}, ValueError, r"query must have shape \(batch, heads"),
        "integer values": (
            {"value": torch.ones(2, 2, 53, 8, dtype=torch.int64)},
            TypeError,
            "value must be of a float",
        ),
        "values of other keys": ({"value": torch.ones(2, 2, 50, 8)}, ValueError, r"value must have shape \(2, 2, 53"),
        "values of another dtype": (
            {"value": torch.ones(2, 2, 53, 8, dtype=torch.float64)},
            TypeError,
            "value must be of the dtype of query, torch.float32, got torch.float64",
        ),
        "heads that do not divide": (
            {"key": torch.ones(2, 3, 53, 24), "value": torch.ones(2, 3, 53, 8)},
            ValueError,
            "heads of query must be a multiple of those of key, got 4 and 3",
        ),
        "power below 1": ({"power": 0.5}, ValueError, "power must be at least 1, or None for one stage, got 0.5"),
        "log_d of zero": ({"log_d": 0.0}, ValueError, "log_d must be positive and finite, got 0.0"),
        "window without causal": ({"causal": False, "window": 3}, ValueError, "window needs causal=True"),
        "counts of keys": ({"n_keys": torch.ones(2, 53)}, ValueError, r"n_keys must have shape \(2, 37\)"),
        "key mask of rows": (
            {"key_mask": torch.ones(2, 37, dtype=torch.bool)},
            ValueError,
            r"key_mask must have shape \(2, 53\), got \(2, 37\)",
        ),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.l1_attention.default,
        torch.ops.shared_kernels.l1_attention_backward.default,
    ),
    launches=launches,
    cost=cost,
    spill_allowed={torch.bfloat16: {"sm_80": 56, "sm_89": 24, "sm_100": 32, "sm_120": 16}},  # rows of 72 and of 256
    largest=largest,
)
