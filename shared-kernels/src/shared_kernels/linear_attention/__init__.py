"""linear_attention: attention without softmax, which needs one (D, E) state per head instead of all earlier keys.

Causal, the state decays by a constant factor of the head at each token (Qin et al., "Various Lengths, Constant Speed:
Efficient Language Modeling with Lightning Attention", arXiv:2405.17381, and its backward pass in arXiv:2401.04658;
Sun et al., "Retentive Network", arXiv:2307.08621): cost is linear in the tokens, and a sequence is continued from its
state, by `linear_attention_step` in time independent of its length. Not causal, all queries share one state, divided by
a sum over keys or not (Zheng, "The Linear Attention Resurrection in Vision Transformer", arXiv:2501.16182), or every
block of queries sums the states of its own set of key blocks (Zhang et al., "SLA", arXiv:2509.24006).

Decided here:
- The feature map is the caller's: `linear_attention(phi(query), phi(key), value)`.
- Decay is given as its logarithm, like flash-linear-attention's `g_gamma`; for Lightning Attention it is minus the
  slope. It is a constant and gets no gradient (a learned one made its authors' training diverge). Only powers of the
  decay with exponents >= 0 are formed, so neither long sequences nor strong decay overflow.
- Sums over sets of key blocks are one matrix product of the 0/1 mask with all blocks' states. It costs the same however
  many blocks are in the set, so there is no form that subtracts from the total, and no digits are lost that way. What
  the mask excludes must be finite all the same, like a value within 64 tokens after a causal query: 0 times NaN is NaN,
  and as the next row may see what one must not, it cannot be masked where it is loaded.
- Saved for the backward pass are the inputs, and for the normalised form the output and the divisor.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import (
    check_attention,
    check_block_size,
    check_broadcasts,
    check_optional,
    check_positive,
    check_shape,
    check_tensors,
)
from shared_kernels.linear_attention import reference

NAME = "linear_attention"
CHUNK = 64  # tokens whose mutual products are formed; what is counted, and what all implementations use


_causal = _backend.library_op(
    NAME,
    "forward",
    "(Tensor query, Tensor key, Tensor value, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, bool state_wanted) -> (Tensor, Tensor)",
)


@_causal.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, _: Any, __: Any, cu_seqlens: Tensor | None, *___: Any
) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:3], value.shape[3]), _new_state(query, key, value, cu_seqlens)


def _new_state(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, query.shape[1], key.shape[3], value.shape[3])
    return query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))


_causal_backward = _backend.library_op(
    NAME,
    "backward",
    "(Tensor d_out, Tensor? d_state, Tensor query, Tensor key, Tensor value, Tensor? log_decay, "
    "Tensor? initial_state, Tensor? cu_seqlens, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_causal_backward.register_fake
def _(
    _: Tensor, __: Any, query: Tensor, key: Tensor, value: Tensor, ___: Any, ____: Any, cu_seqlens: Any, *_____: Any
) -> tuple[Tensor, ...]:
    return *(t.new_empty(t.shape) for t in (query, key, value)), _new_state(query, key, value, cu_seqlens)


def _save_causal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, ctx.scale, ctx.state_wanted = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_causal(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing gives it only once
    flows = d_state if ctx.state_wanted else None
    *d_inputs, d_initial = _causal_backward(d_out, flows, *saved, ctx.scale)
    return *d_inputs, None, None if saved[4] is None else d_initial, None, None, None


_causal.register_autograd(_differentiate_causal, setup_context=_save_causal)


_full = _backend.library_op(
    NAME,
    "full",
    "(Tensor query, Tensor key, Tensor value, Tensor? initial_state, Tensor? cu_seqlens, Tensor? block_mask, "
    "SymInt block_q, SymInt block_k, float scale, str normalizer, float eps, bool state_wanted) "
    "-> (Tensor, Tensor, Tensor)",
)
"""Output, state (nothing with a block mask) and what the output was divided by (nothing without normalizer)."""


@_full.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Any,
    cu_seqlens: Tensor | None,
    block_mask: Tensor | None,
    __: int,
    ___: int,
    ____: float,
    normalizer: str,
    *_____: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    state = _new_state(query, key, value, cu_seqlens)
    divisor = query.new_empty(query.shape[:3] if normalizer != "none" else (0,), dtype=state.dtype)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, state if block_mask is None else state.new_empty(0), divisor


_full_backward = _backend.library_op(
    NAME,
    "full_backward",
    "(Tensor d_out, Tensor? d_state, Tensor query, Tensor key, Tensor value, Tensor? out, Tensor state, "
    "Tensor divisor, Tensor? cu_seqlens, Tensor? block_mask, SymInt block_q, SymInt block_k, float scale, "
    "str normalizer, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_full_backward.register_fake
def _(
    _: Tensor, __: Any, query: Tensor, key: Tensor, value: Tensor, ___: Any, state: Tensor, *____: Any
) -> tuple[Tensor, ...]:
    return *(t.new_empty(t.shape) for t in (query, key, value)), state.new_empty(state.shape)


def _save_full(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, initial_state, cu_seqlens, block_mask, *ctx.options, ctx.state_wanted = inputs
    out, state, divisor = output
    ctx.mark_non_differentiable(divisor)
    ctx.began = initial_state is not None
    ctx.save_for_backward(query, key, value, out if divisor.numel() else None, state, divisor, cu_seqlens, block_mask)


def _differentiate_full(ctx: Any, d_out: Tensor, d_state: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    flows = d_state if ctx.state_wanted else None
    *d_inputs, d_initial = _full_backward(d_out, flows, *ctx.saved_tensors, *ctx.options)
    return *d_inputs, d_initial if ctx.began else None, *[None] * 8


_full.register_autograd(_differentiate_full, setup_context=_save_full)


_step = _backend.library_op(
    NAME,
    "step",
    "(Tensor query, Tensor key, Tensor value, Tensor(a3!) state, Tensor? log_decay, float scale) -> Tensor",
    mutates=("state",),
)


@_step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return query.new_empty(*query.shape[:2], value.shape[2])


def _products(query: torch.Size, key: torch.Size, value: torch.Size) -> tuple[int, int]:
    """Operations of a (D, E) product for each query and each key."""
    each = 2 * query[0] * query[1] * query[3] * value[3]
    return each * query[2], each * key[2]


@register_flop_formula(torch.ops.shared_kernels.linear_attention)
def _causal_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    within = 2 * query[0] * query[1] * query[2] * CHUNK * (query[3] + value[3])
    return within + sum(_products(query, key, value))


@register_flop_formula(torch.ops.shared_kernels.linear_attention_backward)
def _causal_backward_flops(_: Any, __: Any, *inputs: Any, **___: Any) -> int:
    return 3 * _causal_flops(*inputs)  # each gradient is a causal linear attention of the same size


@register_flop_formula(torch.ops.shared_kernels.linear_attention_full)
def _full_flops(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    _: Any,
    __: Any,
    mask: torch.Size | None,
    *___: Any,
    **____: Any,
) -> int:
    return sum(_products(query, key, value)) + _mask_flops(mask, query, value)


def _mask_flops(mask: torch.Size | None, query: torch.Size, value: torch.Size) -> int:
    return 0 if mask is None else 2 * mask[0] * mask[1] * mask[2] * mask[3] * query[3] * value[3]


@register_flop_formula(torch.ops.shared_kernels.linear_attention_full_backward)
def _full_backward_flops(
    _: Any, __: Any, query: torch.Size, key: torch.Size, value: torch.Size, *rest: Any, **___: Any
) -> int:
    by_query, by_key = _products(query, key, value)
    mask = rest[4]
    again = 0 if mask is None else by_key + _mask_flops(mask, query, value)
    return 2 * (by_query + by_key) + again + _mask_flops(mask, query, value)


@register_flop_formula(torch.ops.shared_kernels.linear_attention_step)
def _step_flops(query: torch.Size, _: Any, value: torch.Size, *__: Any, **___: Any) -> int:
    return 4 * query[0] * query[1] * query[2] * value[2]


def linear_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    *,
    causal: bool = False,
    log_decay: Float[Tensor, "H"] | None = None,
    scale: float = 1.0,
    normalizer: Literal["sum", "clamp"] | None = None,
    eps: float = 1e-6,
    initial_state: Float[Tensor, "S H D E"] | None = None,
    return_state: bool = False,
    cu_seqlens: Int32[Tensor, "S+1"] | None = None,
    block_mask: Bool[Tensor, "#B #H blocks_q blocks_k"] | None = None,
    block_size: tuple[int, int] = (64, 64),
) -> Float[Tensor, "B H Nq E"] | tuple[Float[Tensor, "B H Nq E"], Float[Tensor, "S H D E"]]:
    """scale * query_t S_t, where the state S_t sums key^T value over what token t sees.

    causal: S_t = exp(log_decay) S_(t-1) + key_t^T value_t, from `initial_state` (zeros if None), for every head its own
    log_decay <= 0 (0 if None: nothing is forgotten); a token sees itself undecayed. Nq = Nk.

    Not causal: all keys, plus `initial_state`. `normalizer` divides by d_t = query_t . (sum of the keys seen): "sum" by
    d_t + eps, "clamp" by max(d_t, eps). With `block_mask`, query t of block i = t // block_size[0] sees the keys of
    those blocks j of block_size[1] keys where the mask, broadcast over batch and heads, is True at (i, j).

    return_state: also the state after the last token, float32 (float64 for float64), S = B sequences. Pass it on as
    `initial_state` to continue. cu_seqlens: B = 1 and S sequences lie end to end, the i-th in tokens cu_seqlens[i] up
    to cu_seqlens[i + 1]; each has its own state; tokens past the last give 0.

    The output is contiguous and of query's dtype, computed in float32 at least. Differentiable once in query, key,
    value and initial_state, also through the returned state. Heads of fewer keys are repeated in memory: H must be a
    multiple of Hkv. To normalise causally, append a column of ones to value and divide by what it gives. Two values
    over the same keys may be concatenated along E.

    Raises TypeError on tensors of other or mixed dtypes, ValueError on other shapes, mixed devices, eps <= 0, and
    arguments that do not go together.
    """
    check_attention(query, key, value, scale=scale)
    check_optional("log_decay", log_decay, (query.shape[1],), query.device)
    _check_sequences(query, key, value, cu_seqlens, initial_state)
    _check_options(causal, log_decay, normalizer, eps, initial_state, return_state, block_mask)
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(f"causal needs as many queries as keys, got {query.shape[2]} and {key.shape[2]}")
    if block_mask is not None:
        block_mask = _checked_mask(block_mask, block_size, query, key, cu_seqlens)
    query, key, value = _backend.autocast(query, key, value)
    key, value = (_repeated(t, query.shape[1]) for t in (key, value))
    acc = torch.promote_types(query.dtype, torch.float32)
    log_decay, initial_state = (t if t is None else t.to(acc) for t in (log_decay, initial_state))
    if log_decay is not None:
        log_decay = log_decay.detach().clamp(min=-1e4)  # forgets all in any dtype; 0 * -inf would be NaN
    states = (initial_state, cu_seqlens)
    if _backend.forced == "reference":
        out, state = reference.attend(
            query, key, value, *states, causal, log_decay, scale, normalizer, eps, block_mask, block_size
        )
    elif causal:
        out, state = _causal(query, key, value, log_decay, *states, scale, return_state)
    else:
        options = (*block_size, scale, normalizer or "none", eps, return_state)
        out, state, _ = _full(query, key, value, *states, block_mask, *options)
    return (out, state) if return_state else out


def linear_attention_step(
    query: Float[Tensor, "B H *one D"],
    key: Float[Tensor, "B Hkv *one D"],
    value: Float[Tensor, "B Hkv *one E"],
    state: Float[Tensor, "B H D E"],
    *,
    log_decay: Float[Tensor, "H"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "B H *one E"]:
    """One more token of causal `linear_attention`; `state` is overwritten with the state after it.

    query, key and value are (B, heads, width), or (B, heads, 1, width) as models have them; the output is like query.
    state is that of `linear_attention`: float32 (float64 for float64), its last dimension contiguous. Takes the time of
    reading and writing the state, however many tokens came before.

    Not differentiable: with gradients enabled, tensors that require one are refused with a ValueError. Raises TypeError
    on other or mixed dtypes, ValueError on other shapes and mixed devices.
    """
    _check_step(query, key, value, state, log_decay)
    query, key, value = _backend.autocast(query, key, value)
    given = query.shape
    query, key, value = (t.flatten(1, 2) if t.ndim == 4 else t for t in (query, key, value))
    if log_decay is not None:
        log_decay = log_decay.detach().to(state.dtype).clamp(min=-1e4)
    run = reference.step if _backend.forced == "reference" else _step
    return run(query, key, value, state, log_decay, scale).view(*given[:-1], value.shape[-1])


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _check_sequences(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None
) -> None:
    sequences, H, Nq, D = query.shape
    if cu_seqlens is not None:
        check_tensors({"cu_seqlens": cu_seqlens}, torch.int32, device=query.device)
        check_shape("cu_seqlens", cu_seqlens, "sequences + 1")
        if cu_seqlens.shape[0] < 2 or sequences != 1 or Nq != key.shape[2]:
            raise ValueError(
                f"cu_seqlens needs a sequence, batch 1 and as many queries as keys, got {cu_seqlens.shape[0] - 1} "
                f"sequences, batch {sequences}, {Nq} queries and {key.shape[2]} keys"
            )
        sequences = cu_seqlens.shape[0] - 1
    check_optional("initial_state", initial_state, (sequences, H, D, value.shape[3]), query.device)


def _check_options(
    causal: bool,
    log_decay: Tensor | None,
    normalizer: str | None,
    eps: float,
    initial_state: Tensor | None,
    return_state: bool,
    block_mask: Tensor | None,
) -> None:
    if normalizer not in (None, "sum", "clamp"):
        raise ValueError(f"normalizer must be None, 'sum' or 'clamp', got {normalizer!r}")
    check_positive("eps", eps)
    if log_decay is not None and not causal:
        raise ValueError("log_decay needs causal=True: without order there is nothing to forget")
    if causal and (normalizer or block_mask is not None):
        raise ValueError("normalizer and block_mask need causal=False")
    if (initial_state is not None or return_state) and (normalizer or block_mask is not None):
        raise ValueError("initial_state and return_state need normalizer=None and block_mask=None")


def _checked_mask(
    mask: Tensor, block_size: tuple[int, int], query: Tensor, key: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    check_tensors({"block_mask": mask}, torch.bool, device=query.device)
    check_block_size(block_size)
    if cu_seqlens is not None:
        raise ValueError("block_mask and cu_seqlens do not go together: call once for each sequence")
    blocks = (-(-query.shape[2] // block_size[0]), -(-key.shape[2] // block_size[1]))
    check_shape("block_mask", mask, "batch", "heads", *blocks)
    check_broadcasts("block_mask", mask, *query.shape[:2], *blocks)
    return mask.expand(*query.shape[:2], *blocks)


def _check_step(query: Tensor, key: Tensor, value: Tensor, state: Tensor, log_decay: Tensor | None) -> None:
    one = (1,) if isinstance(query, Tensor) and query.ndim == 4 else ()
    check_attention(query, key, value, layout=("batch", "heads", *one, "head_dim"))
    check_tensors({"state": state}, torch.promote_types(query.dtype, torch.float32), device=query.device)
    check_shape("state", state, *query.shape[:2], query.shape[-1], value.shape[-1])
    if state.stride(-1) != 1:
        raise ValueError(f"state must be contiguous along its last dimension, got a stride of {state.stride(-1)}")
    check_optional("log_decay", log_decay, (query.shape[1],), query.device)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, state)):
        raise ValueError("linear_attention_step has no gradient: call it under torch.no_grad()")
