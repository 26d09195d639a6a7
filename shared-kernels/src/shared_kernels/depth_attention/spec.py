"""What depth_attention promises."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shared_kernels.depth_attention import depth_attention, reference
from shared_kernels.testing import Make, OpSpec, Sample


def _sources(make: Make, count: int, *shape: int, scale: float = 1.0) -> list[Tensor]:
    return [make.normal(*shape, scale=scale) for _ in range(count)]


def _state(make: Make, *shape: int) -> list[Tensor]:
    """As from an earlier call; the first token saw nothing there, so nothing of it may be used."""
    out, lse = make.normal(*shape), make.normal(*shape[:-1], wide=True)
    lse[..., 0], out[..., 0, :] = -torch.inf, torch.nan
    return [out, lse]


def samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {
            "weighted": {
                "sources": _sources(make, 3, 2, 3, 5),
                "query": make.normal(5),
                "key_weight": make.normal(5),
                "state": [make.normal(2, 3, 5), make.normal(2, 3)],
                "eps": 1e-2,
                "return_lse": True,
                "return_weights": True,
            },
            "several queries, normed values": {
                "sources": _sources(make, 2, 4, 6),
                "query": make.normal(3, 6),
                "normed_values": True,
                "eps": 1e-3,
            },
        }
    if size == "medium":
        return {
            "several tiles": {
                "sources": _sources(make, 3, 600, 1_030),
                "query": make.normal(1_030, wide=True, scale=0.03),
                "state": _state(make, 600, 1_030),
                "eps": 1e-6,
            }
        }
    if size == "real":
        return _real_samples(make)
    return _small_samples(make)


def _real_samples(make: Make) -> dict[str, Sample]:
    widths = {"4,096": (4, 131, 4_096), "1,000": (10, 211, 1_000), "7,168": (9, 53, 7_168)}
    return {
        **{
            f"width {name}": {
                "sources": _sources(make, *shape),
                "query": make.normal(shape[-1], wide=True, scale=0.03),
                "eps": 1e-6,
            }
            for name, shape in widths.items()
        },
        "phase one": {
            "sources": _sources(make, 5, 130, 2_048),
            "query": make.normal(6, 2_048, wide=True, scale=0.03),
            "eps": 1e-6,
            "return_lse": True,
        },
        "phase two, width 8,192": {
            "sources": _sources(make, 1, 67, 8_192),
            "query": make.normal(8_192, wide=True, scale=0.01),
            "state": _state(make, 67, 8_192),
            "normed_values": True,
            "eps": 1e-6,
        },
    }


def _small_samples(make: Make) -> dict[str, Sample]:
    return {
        "direct": {
            "sources": _sources(make, 4, 2, 7, 37),
            "query": make.normal(37, wide=True, scale=0.3),
            "key_weight": make.normal(37, wide=True),
            "eps": 1e-5,
        },
        "phase one": {
            "sources": _sources(make, 3, 2, 5, 24),
            "query": make.normal(4, 24, wide=True, scale=0.3),
            "key_weight": make.normal(4, 24, wide=True),
            "eps": 1e-6,
            "scale": 24**-0.5,
            "return_lse": True,
        },
        "phase two": {
            "sources": _sources(make, 1, 13, 70),
            "query": make.normal(70, wide=True, scale=0.3),
            "state": _state(make, 13, 70),
            "eps": 1e-6,
            "return_lse": True,
            "return_weights": True,
        },
        "several queries, normed values, state": {
            "sources": [make.transposed(3, 5, 19), make.strided(3, 5, 19), make.normal(3, 5, 19)],
            "query": make.normal(2, 19, wide=True, scale=0.3),
            "normed_values": True,
            "state": _state(make, 2, 3, 5, 19),
            "eps": 1e-2,
            "return_weights": True,
        },
        "scores far apart": {
            "sources": _sources(make, 5, 11, 16, scale=1e-2),
            "query": make.normal(16, wide=True, scale=30.0),
            "eps": 1e-6,
            "return_lse": True,
        },
        "nine sources of width one": {
            "sources": _sources(make, 9, 3, 1),
            "query": make.normal(1, wide=True, scale=3.0),
            "eps": 1e-1,
        },
        "one token": {"sources": _sources(make, 2, 33), "query": make.normal(33, wide=True, scale=0.3), "eps": 1e-6},
        "no tokens": {
            "sources": _sources(make, 2, 0, 3, 12),
            "query": make.normal(12, wide=True, scale=0.3),
            "eps": 1e-6,
        },
    }


def agrees_with_the_sum_by_hand(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Equations 2-4 of the paper, token by token."""
    sources, query, weight = _sources(make, 4, 3, 6), make.normal(6), make.normal(6)
    expected = torch.empty_like(sources[0])
    for t in range(3):
        keys = [v[t] / (v[t].square().sum() / 6 + 1e-2).sqrt() * weight for v in sources]
        shares = torch.stack([torch.exp(0.5 * (query * key).sum()) for key in keys])
        expected[t] = sum(share * v[t] for share, v in zip(shares, sources, strict=True)) / shares.sum()
    yield op(sources, query, key_weight=weight, eps=1e-2, scale=0.5), expected


def query_of_zeros_gives_the_mean(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """And a large one the source it points at."""
    sources = _sources(make, 7, 5, 12)
    yield op(sources, torch.zeros(12, dtype=make.dtype), eps=1e-6), torch.stack(sources).mean(0)
    query = make.normal(12)
    best = torch.stack([torch.nn.functional.rms_norm(v, (12,), eps=1e-6) @ query for v in sources]).argmax(0)
    yield op(sources, 1e4 * query, eps=1e-6), torch.stack(sources)[best, torch.arange(5)]


def two_phases_give_the_direct_result(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """All queries over closed blocks, then each on with its own partial sum: algorithm 1 of the paper."""
    blocks, partials, queries = _sources(make, 4, 2, 5, 12), _sources(make, 3, 2, 5, 12), make.normal(3, 12)
    out, lse = op(blocks, queries, eps=1e-6, return_lse=True)
    for i, partial in enumerate(partials):
        direct, whole = op([*blocks, partial], queries[i], eps=1e-6, return_lse=True)
        mix, merged = op([partial], queries[i], state=(out[i], lse[i]), eps=1e-6, return_lse=True)
        yield mix, direct
        yield merged, whole
        # equation of the merge: a gate on the difference
        score = (torch.nn.functional.rms_norm(partial, (12,), eps=1e-6) * queries[i]).sum(-1)
        yield mix, out[i] + torch.sigmoid(score - lse[i]).unsqueeze(-1) * (partial - out[i])


def order_of_sources_is_irrelevant(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    sources, query = _sources(make, 5, 3, 12), make.normal(12, scale=20.0)
    out, weights = op(sources, query, eps=1e-6, return_weights=True)
    turned, turned_weights = op(sources[::-1], query, eps=1e-6, return_weights=True)
    yield turned, out
    yield turned_weights.flip(-1), weights


def length_of_a_source_does_not_change_weights(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    sources, query = _sources(make, 3, 4, 12), make.normal(12)
    longer = [sources[0], 100 * sources[1], sources[2]]
    (_, weights), (_, same) = (op(s, query, eps=1e-14, return_weights=True) for s in (sources, longer))
    yield same, weights
    yield op(longer, query, eps=1e-14, normed_values=True), op(sources, query, eps=1e-14, normed_values=True)


def launches(sample: Sample) -> None:
    from shared_kernels.depth_attention import triton

    query = sample["query"]
    queries = query.reshape(-1, query.shape[-1])
    S, D = queries.shape
    sources = [source.reshape(-1, D) for source in sample["sources"]]
    T = sources[0].shape[0]
    state_out, state_lse = sample.get("state", (None, None))
    before: tuple[Any, Any] = (None, None)
    if state_out is not None:
        before = (state_out.reshape(S, T, D), state_lse.reshape(S, T))
    normed = sample.get("normed_values", False)
    out, lse, scores, inverse = triton.forward(sources, queries, *before, 1e-6, normed)
    triton.backward(out, lse, scores, scores, inverse, sources, queries, *before, normed)


def _queries(sample: Sample) -> int:
    return sample["query"].numel() // sample["query"].shape[-1]


def _scores(sample: Sample) -> int:
    return (len(sample["sources"]) + ("state" in sample)) * _queries(sample) * sample["sources"][0][..., 0].numel()


def cost(sample: Sample) -> tuple[int, int]:
    sources = sample["sources"]
    L, S = len(sources), _queries(sample)
    numbers, more = sources[0].numel(), "state" in sample
    return 2 * numbers * (L + L * S + (L + more) * S), (L + S * (1 + more)) * numbers * sources[0].element_size()


SPEC = OpSpec(
    op=depth_attention,
    reference=reference.depth_attention,
    samples=samples,
    gradients=("sources", "query", "key_weight", "state"),
    laws=(
        agrees_with_the_sum_by_hand,
        query_of_zeros_gives_the_mean,
        two_phases_give_the_direct_result,
        order_of_sources_is_irrelevant,
        length_of_a_source_does_not_change_weights,
    ),
    refused={
        "no sources": ({"sources": []}, ValueError, "sources must be a list of at least one tensor, got an empty list"),
        "stacked sources": (
            {"sources": torch.ones(4, 2, 7, 37)},
            ValueError,
            "sources must be a list .*, got one",
        ),
        "another shape": (
            {"sources": [torch.ones(2, 7, 37), torch.ones(2, 8, 37)]},
            ValueError,
            r"sources\[1\] must have shape \(2, 7, 37\), got \(2, 8, 37\)",
        ),
        "integers": (
            {"sources": [torch.ones(2, 7, 37, dtype=torch.int64)]},
            TypeError,
            r"sources\[0\] must be of a floating-point dtype",
        ),
        "query of another width": ({"query": torch.ones(36)}, ValueError, r"query must be \(D,\) or \(S, D\)"),
        "key weight for other queries": (
            {"key_weight": torch.ones(2, 37)},
            ValueError,
            r"key_weight must have shape \(37,\), got \(2, 37\)",
        ),
        "state of other tokens": (
            {"state": (torch.ones(2, 7, 37), torch.ones(2, 8))},
            ValueError,
            r"lse of state must have shape \(2, 7\), got \(2, 8\)",
        ),
        "state without lse": ({"state": (torch.ones(2, 7, 37),)}, ValueError, r"state must be \(out, lse\), got 1"),
        "eps of zero": ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        "another device": ({"query": torch.ones(37, device="meta")}, ValueError, "query must be on cpu like the other"),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=(
        torch.ops.shared_kernels.depth_attention.default,
        torch.ops.shared_kernels.depth_attention_backward.default,
    ),
    launches=launches,
    # nine sources of width 7,168, which the compiler loads ahead
    spill_allowed={
        torch.float32: {"sm_80": 376, "sm_89": 424, "sm_90": 1_160, "sm_100": 1_392, "sm_120": 480, "gfx942": 112},
        torch.bfloat16: {"sm_80": 16, "sm_89": 16},
    },
    cost=cost,
    # a result for every query; never two sources in one tensor
    largest=lambda sample: max(
        _queries(sample) * sample["sources"][0].numel(), _scores(sample), sample["query"].numel()
    ),
)
