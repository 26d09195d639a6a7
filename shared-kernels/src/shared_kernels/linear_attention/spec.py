"""What linear_attention and linear_attention_step promise."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shared_kernels.linear_attention import linear_attention, linear_attention_step, reference
from shared_kernels.testing import Make, OpSpec, Sample


def _qkv(make: Make, B: int, H: int, N: int, D: int, E: int, *, kv_heads: int = 0, keys: int = 0) -> Sample:
    shape = (B, kv_heads or H, keys or N)
    return {"query": make.normal(B, H, N, D), "key": make.normal(*shape, D), "value": make.normal(*shape, E)}


def _causal(make: Make, *shape: int, decay: float | None = 0.1, state: bool = False, **more: Any) -> Sample:
    """Decay of the first head as given, of the others ever weaker."""
    sample = _qkv(make, *shape, **more) | {"causal": True}
    if decay is not None:
        sample["log_decay"] = _rates(make, decay, shape[1])
    if state:
        sample |= {"initial_state": make.normal(*shape[:2], *shape[3:], wide=True), "return_state": True}
    return sample


def _rates(make: Make, strongest: float, heads: int) -> Tensor:
    dtype = torch.promote_types(make.dtype, torch.float32)
    return -strongest * 3.0 ** -torch.arange(heads, dtype=dtype, device=make.device)


def _positive(make: Make, *shape: int, **more: Any) -> Sample:
    """Features as a ReLU gives them, but nowhere all 0, and sums that a clamp at 40 % of their size splits."""
    sample = _qkv(make, *shape, **more)
    return sample | {name: sample[name].abs() for name in ("query", "key")}


def _packed(make: Make, lengths: tuple[int, ...]) -> Sample:
    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {"cu_seqlens": ends.to(make.device)}


def _mask(make: Make, *shape: int) -> Tensor:
    """About two blocks in three, and none for the first."""
    mask = make.normal(*shape) > -0.4
    mask[:, :, 0] = False
    return mask


def _past_the_end(sample: Sample) -> Sample:
    """Not a number in tokens of no sequence."""
    for name in ("query", "key", "value"):
        sample[name][:, :, -3:] = torch.nan
    return sample


def samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {
            "causal": _causal(make, 1, 2, 67, 3, 4, state=True),
            "packed": _causal(make, 1, 2, 9, 3, 2) | _packed(make, (5, 3)),
            "sum": _positive(make, 2, 1, 7, 3, 2, keys=5) | {"normalizer": "sum"},
            "blocks": _positive(make, 1, 2, 7, 3, 4, keys=11)
            | {"normalizer": "clamp", "eps": 5.0, "block_size": (3, 4), "block_mask": _mask(make, 1, 2, 3, 3)},
            "joined": _qkv(make, 1, 2, 7, 3, 4) | {"initial_state": make.normal(1, 2, 3, 4), "return_state": True},
        }
    if size == "medium":
        return {
            "several runs": _causal(make, 1, 2, 700, 96, 128, state=True),
            "short sequences": _causal(make, 3, 5, 131, 32, 48, state=True),
            "packed sequences": _causal(make, 1, 3, 700, 40, 64, decay=1e-3) | _packed(make, (301, 5, 0, 130, 261)),
            "sums": _positive(make, 1, 2, 1100, 32, 48) | {"normalizer": "clamp", "eps": 600.0},
            "blocks": _positive(make, 2, 1, 517, 48, 32, keys=611)
            | {"normalizer": "clamp", "block_mask": _mask(make, 1, 1, 17, 13), "block_size": (32, 48)},
        }
    if size == "real":
        return {
            "many heads": _causal(make, 9, 16, 700, 64, 64),
            "heads of 128": _causal(make, 5, 16, 1025, 128, 128, state=True),
            "few heads": _causal(make, 1, 4, 4096, 64, 64, state=True),
            "wide": _causal(make, 1, 3, 1023, 256, 192, state=True),
            "odd widths": _causal(make, 2, 3, 777, 40, 72) | {"normalizer": None},
            "packed": _causal(make, 1, 5, 3000, 128, 64) | _packed(make, (1000, 1, 1999)),
            "vision": _positive(make, 4, 12, 3136, 32, 32) | {"normalizer": "clamp", "eps": 1500.0},
            "two values": _positive(make, 2, 8, 1024, 32, 288) | {"normalizer": "sum"},
            "blocks": _positive(make, 1, 3, 4000, 128, 128)
            | {"normalizer": "clamp", "block_mask": _mask(make, 1, 3, 63, 63)},
        }
    return _small_samples(make)


def _small_samples(make: Make) -> dict[str, Sample]:
    return {
        "decay and states": _causal(make, 2, 2, 41, 24, 17, state=True),
        "no decay": _causal(make, 1, 1, 63, 16, 33, decay=None)
        | {"query": make.transposed(1, 1, 63, 16), "value": make.strided(1, 1, 63, 33), "scale": 0.3},
        "strong decay": _causal(make, 1, 4, 35, 20, 18, decay=50.0, kv_heads=2)
        | {"query": make.normal(1, 4, 35, 20, scale=30)},
        "packed": _past_the_end(
            _causal(make, 1, 2, 39, 18, 16, decay=0.3)
            | _packed(make, (1, 33, 0, 2))
            | {"initial_state": make.normal(4, 2, 18, 16, wide=True), "return_state": True}
        ),
        "few heads, packed": _causal(make, 1, 1, 71, 20, 16, decay=0.05)
        | _packed(make, (67, 4))
        | {"initial_state": make.normal(2, 1, 20, 16, wide=True), "return_state": True},
        "one token": _causal(make, 2, 1, 1, 33, 16),
        "empty batch": _causal(make, 0, 2, 5, 16, 17, state=True),
        "joined": _qkv(make, 1, 4, 37, 20, 17, keys=53, kv_heads=2)
        | {"initial_state": make.normal(1, 4, 20, 17, wide=True), "return_state": True, "scale": 0.5},
        "sum": _positive(make, 2, 1, 37, 40, 24, keys=53) | {"normalizer": "sum", "scale": 0.2, "eps": 1e-3},
        "clamp, packed": _past_the_end(
            _positive(make, 1, 2, 41, 24, 16) | _packed(make, (34, 1, 3)) | {"normalizer": "clamp", "eps": 220.0}
        ),
        "blocks": _positive(make, 2, 1, 37, 20, 17, keys=45)
        | {"normalizer": "clamp", "block_mask": _mask(make, 2, 1, 3, 3), "block_size": (16, 20)},
        "no keys": _positive(make, 1, 2, 9, 16, 17)
        | {"key": make.normal(1, 2, 0, 16), "value": make.normal(1, 2, 0, 17), "normalizer": "clamp"},
    }


def token_by_token(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """The recurrence of the state, written out."""
    sample = _causal(make, 2, 3, 70, 5, 4, state=True) | {"scale": 0.7}
    state, outs = sample["initial_state"], []
    for t in range(70):
        q, k, v = (sample[name][:, :, t] for name in ("query", "key", "value"))
        state = torch.exp(sample["log_decay"])[:, None, None] * state + torch.einsum("bhd,bhe->bhde", k, v)
        outs.append(0.7 * torch.einsum("bhd,bhde->bhe", q, state))
    out, last = op(**sample)
    yield out, torch.stack(outs, 2)
    yield last, state


def a_cut_changes_nothing(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Two parts joined by the state are the whole; sequences end to end are the sequences."""
    sample = _causal(make, 1, 2, 150, 6, 5, state=True)
    whole, last = op(**sample)
    tokens = {name: sample[name] for name in ("query", "key", "value")}
    parts, state = [], sample["initial_state"]
    for cut in (slice(0, 67), slice(67, 150)):
        part, state = op(**sample | {n: t[:, :, cut] for n, t in tokens.items()} | {"initial_state": state})
        parts.append(part)
    yield torch.cat(parts, 2), whole
    yield state, last
    alone = {name: t for name, t in sample.items() if name != "initial_state"}
    packed, states = op(**alone | _packed(make, (67, 83)))
    second, own = op(**alone | {n: t[:, :, 67:] for n, t in tokens.items()})
    yield packed[:, :, 67:], second
    yield states[1:], own


def decay_at_its_ends(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Nothing forgotten is the sum over earlier tokens; all forgotten leaves the token itself."""
    sample = _causal(make, 1, 2, 130, 4, 5, decay=None)
    q, k, v = (sample[name] for name in ("query", "key", "value"))
    yield op(**sample), (q @ k.mT).tril() @ v
    yield op(**sample, log_decay=q.new_zeros(2)), (q @ k.mT).tril() @ v
    yield op(**sample, log_decay=q.new_tensor([-50.0, -torch.inf])), (q * k).sum(-1, keepdim=True) * v
    ones = torch.ones(1, 2, 130, 1, dtype=q.dtype)
    yield op(ones, ones, v, causal=True), v.cumsum(2)


def sums_of_sets(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of weights sum to scale; a mask that lets all through is none; a set of blocks is its tokens."""
    sample = _positive(make, 2, 3, 40, 4, 5, keys=50) | {"normalizer": "clamp"}
    q, k, v = (sample[name] for name in ("query", "key", "value"))
    weights = q @ k.mT
    yield op(**sample), weights / weights.sum(-1, keepdim=True) @ v
    yield op(**sample | {"value": torch.ones_like(v), "scale": 0.3}), torch.full((2, 3, 40, 5), 0.3, dtype=q.dtype)
    everything = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    yield op(**sample, block_mask=everything, block_size=(16, 14)), op(**sample)
    everything[:, :, 1, 2:] = False
    second = op(**sample, block_mask=everything, block_size=(16, 14))[:, :, 16:32]
    yield second, op(q[:, :, 16:32], k[:, :, :28], v[:, :, :28], normalizer="clamp")


def cost(sample: Sample) -> tuple[int, int]:
    q, v = sample["query"], sample["value"]
    (B, H, N, D), (E, keys) = q.shape, (v.shape[3], v.shape[2])
    flops = 2 * B * H * (N + keys) * D * E
    if sample.get("causal"):
        flops += 2 * B * H * N * 64 * (D + E)
    if "block_mask" in sample:
        blocks = sample["block_mask"].shape
        flops += 2 * B * H * blocks[2] * blocks[3] * D * E
    return flops, (B * H * (N + keys) * (D + E)) * q.element_size()


def _largest(sample: Sample) -> int:
    """Inputs with heads repeated, a state for every sequence and block, and what a run of chunks works on."""
    (B, H, N, D), (keys, E) = sample["query"].shape, sample["value"].shape[2:]
    blocks = max(sample["block_mask"].shape[2:]) if "block_mask" in sample else -(-max(N, keys) // 512)
    sequences = len(sample["cu_seqlens"]) - 1 if "cu_seqlens" in sample else B
    return max(B * H * max(N, keys) * max(D, E), H * (sequences + blocks) * D * E, 300_000)


def launches(sample: Sample) -> None:
    from shared_kernels.linear_attention import triton

    q, k, v = (sample[name] for name in ("query", "key", "value"))
    state, cu_seqlens, scale = sample.get("initial_state"), sample.get("cu_seqlens"), sample.get("scale", 1.0)
    if sample.get("causal"):
        rest = (sample.get("log_decay"), state, cu_seqlens, scale)
        out, last = triton.forward(q, k, v, *rest, state is not None)
        triton.backward(out, last if state is not None else None, q, k, v, *rest)
        return
    mask, normalizer = sample.get("block_mask"), sample.get("normalizer") or "none"
    block_q, block_k = sample.get("block_size", (64, 64))
    eps = sample.get("eps", 1e-6)
    mask = mask if mask is None else mask.expand(*q.shape[:2], *mask.shape[2:])
    out, total, divisor = triton.full(q, k, v, state, cu_seqlens, mask, block_q, block_k, scale, normalizer, eps, False)
    triton.full_backward(
        out, None, q, k, v, out, total, divisor, cu_seqlens, mask, block_q, block_k, scale, normalizer, eps
    )


def _refuse(changes: Sample, message: str, exception: type[Exception] = ValueError) -> tuple[Any, ...]:
    return changes, exception, message


SPEC = OpSpec(
    op=linear_attention,
    reference=reference.linear_attention,
    samples=samples,
    gradients=("query", "key", "value", "initial_state"),
    laws=(token_by_token, a_cut_changes_nothing, decay_at_its_ends, sums_of_sets),
    refused={
        "other tokens": _refuse({"value": torch.ones(2, 2, 42, 17)}, r"value must have shape \(2, 2, 41, width\), got"),
        "other width": _refuse({"key": torch.ones(2, 2, 41, 23)}, r"key must have shape \(2, heads, tokens, 24\), got"),
        "heads that do not divide": _refuse(
            {"key": torch.ones(2, 3, 41, 24), "value": torch.ones(2, 3, 41, 17)},
            "heads of query must be a multiple of those of key, got 2 and 3",
        ),
        "no heads": _refuse({"query": torch.ones(41, 24)}, r"query must have shape \(batch, heads, tokens, head_dim\)"),
        "mixed dtypes": _refuse(
            {"key": torch.ones(2, 2, 41, 24).half()},
            "key must be of the dtype of query, torch.float32, got torch.float16",
            TypeError,
        ),
        "integers": _refuse({"query": torch.ones(2, 2, 41, 24).int()}, "query must be of a floating", TypeError),
        "another device": _refuse({"log_decay": torch.ones(2, device="meta")}, "log_decay must be on cpu like the"),
        "decay per token": _refuse({"log_decay": torch.ones(2, 41)}, r"log_decay must have shape \(2,\), got \(2"),
        "state turned": _refuse({"initial_state": torch.ones(2, 2, 17, 24)}, r"initial_state must have shape \(2, 2"),
        "decay without order": _refuse({"causal": False}, "log_decay needs causal=True"),
        "causal with normalizer": _refuse({"normalizer": "sum"}, "need causal=False"),
        "another normalizer": _refuse({"normalizer": "softmax"}, "normalizer must be None, "),
        "state with normalizer": _refuse(
            {"causal": False, "log_decay": None, "normalizer": "sum"}, "need normalizer=None and block_mask=None"
        ),
        "eps of zero": _refuse({"eps": 0.0}, "eps must be positive and finite, got 0.0"),
        "sequences in a batch": _refuse(
            {"cu_seqlens": torch.tensor([0, 41], dtype=torch.int32)},
            "cu_seqlens needs a sequence, batch 1 and as many queries as keys, got 1 sequences, batch 2, 41 queries",
        ),
        "long cu_seqlens": _refuse({"cu_seqlens": torch.tensor([0, 41])}, "cu_seqlens must be of", TypeError),
        "mask of tokens": _refuse(
            {
                "causal": False,
                "log_decay": None,
                "initial_state": None,
                "return_state": False,
                "block_mask": torch.ones(1, 1, 41, 41, dtype=torch.bool),
            },
            r"block_mask must have shape \(batch, heads, 1, 1\), got \(1, 1, 41, 41\)",
        ),
    },
    unsupported={"second derivative": "no autograd formula"},
    library_ops=tuple(
        getattr(torch.ops.shared_kernels, f"linear_attention{part}").default
        for part in ("", "_backward", "_full", "_full_backward")
    ),
    launches=launches,
    cost=cost,
    spill_allowed={torch.bfloat16: {"sm_89": 8, "sm_100": 8, "sm_120": 64}},  # heads of 128, one sweep of four
    largest=_largest,
)


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    function: Callable[..., Tensor] = linear_attention_step,
) -> tuple[Tensor, Tensor]:
    """The step on a copy of the state, which it returns."""
    state = state.clone()
    return function(query, key, value, state, log_decay=log_decay, scale=scale), state


def _reference_step(**arguments: Any) -> tuple[Tensor, Tensor]:
    return _step(**arguments, function=reference.linear_attention_step)


_step.__name__ = "linear_attention_step"


def step_samples(make: Make, size: str) -> dict[str, Sample]:
    def sample(
        B: int, H: int, D: int, E: int, kv_heads: int = 0, tokens: tuple[int, ...] = (), decay: float | None = 0.2
    ) -> Sample:
        key = (B, kv_heads or H, *tokens)
        vectors = {"query": make.normal(B, H, *tokens, D), "key": make.normal(*key, D), "value": make.normal(*key, E)}
        rates = {} if decay is None else {"log_decay": _rates(make, decay, H)}
        return vectors | rates | {"state": make.normal(B, H, D, E, wide=True)}

    if size == "real":
        return {
            "heads of 128": sample(8, 16, 128, 128),
            "odd": sample(3, 5, 72, 40),
            "wide": sample(2, 4, 256, 256),
            "narrow": sample(64, 12, 32, 32),
        }
    if size in ("tiny", "medium"):
        return {}
    return {
        "decay": sample(2, 3, 24, 40),
        "no decay": sample(1, 2, 17, 5, decay=None) | {"scale": 0.3},
        "grouped heads, one token": sample(2, 4, 33, 16, kv_heads=2, tokens=(1,)),
        "strong decay": sample(3, 2, 16, 65, decay=60.0),
        "transposed memory": sample(2, 3, 20, 18) | {"query": make.transposed(2, 3, 20), "key": make.strided(2, 3, 20)},
        "empty batch": sample(0, 2, 16, 17),
    }


def steps_are_the_sequence(op: Callable[..., Any], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    sample = _causal(make, 2, 3, 11, 5, 4, state=True)
    expected, last = linear_attention(**sample)
    state, outs = sample["initial_state"], []
    for t in range(11):
        token = {name: sample[name][:, :, t : t + 1] for name in ("query", "key", "value")}
        out, state = op(**token, state=state, log_decay=sample["log_decay"])
        outs.append(out)
    yield torch.cat(outs, 2), expected
    yield state, last


def step_launches(sample: Sample) -> None:
    from shared_kernels.linear_attention import triton

    q, k, v, state, log_decay = (sample[name] for name in ("query", "key", "value", "state", "log_decay"))
    triton.step(q, k, v, state, log_decay, 1.0)


STEP = OpSpec(
    op=_step,
    reference=_reference_step,
    samples=step_samples,
    laws=(steps_are_the_sequence,),
    refused={
        "several tokens": _refuse(
            {"query": torch.ones(2, 3, 7, 24), "key": torch.ones(2, 3, 7, 24), "value": torch.ones(2, 3, 7, 40)},
            r"query must have shape \(batch, heads, 1, head_dim\), got \(2, 3, 7, 24\)",
        ),
        "half a state": _refuse(
            {"state": torch.ones(2, 3, 24, 40).half()}, "state must be of torch.float32, got torch.float16", TypeError
        ),
        "state turned": _refuse({"state": torch.ones(2, 3, 40, 24)}, r"state must have shape \(2, 3, 24, 40\), got"),
        "state in pieces": _refuse({"state": torch.ones(2, 3, 40, 24).mT.mT.mT}, "contiguous along its last dimension"),
        "gradients": _refuse({"query": torch.ones(2, 3, 24, requires_grad=True)}, "has no gradient: call it under"),
        "decay of other heads": _refuse({"log_decay": torch.ones(2)}, r"log_decay must have shape \(3,\), got \(2,\)"),
    },
    library_ops=(torch.ops.shared_kernels.linear_attention_step.default,),
    launches=step_launches,
    cost=lambda sample: (4 * sample["state"].numel(), 2 * sample["state"].numel() * sample["state"].element_size()),
    largest=lambda sample: max(sample["state"].numel(), sample["query"].shape[1]),
)

SPECS = (SPEC, STEP)
