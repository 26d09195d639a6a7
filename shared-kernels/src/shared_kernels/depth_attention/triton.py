"""depth_attention on GPUs: one program per token and query, the whole width in one tile, sources one after another.

Sources arrive as a tuple of pointers, so nothing is stacked; each is read once, with the softmax kept online. Queries
of one token are neighbours in the grid and find its sources in the cache. The list is padded to a multiple of 4 beyond
4 sources (padding is masked and not read), so that a deep network compiles a few kernels and not one per layer.

Backward: one program per few tokens sweeps the sources twice, the second time from the cache: delta is the sum of p_i
d . v_i, since d . out would not be exact where one weight is near 1. With one query, its gradient is summed in
registers and left in the program's own row of partial sums; with several, another kernel reads the sources again for
it. Torch adds the rows up, so nothing depends on the order of programs.
"""

# mypy: disable-error-code=no-untyped-def
from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._tiles import no_float64

_WIDEST = 8_192  # numbers of one token that a program holds a few times in registers
_PARTIALS = 1_024  # rows of partial sums at most
_TOKENS = 8  # that a program of the backward pass serves at least
_PADDED = 4


@triton.jit
def _there(token, i, T, L):
    """Whether there is such a token, and a source i that is no padding."""
    return (token < T) & (tl.full([], i, tl.int32) < L)


@triton.jit
def _row(base, row, D, columns, there):
    """One row of D numbers, in float32; zeros unless it is there."""
    inside = columns < tl.where(there, D, 0)
    return tl.load(base + tl.cast(row, tl.int64) * D + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_row(base, values, row, D, columns, there):
    target = base + tl.cast(row, tl.int64) * D + columns
    tl.store(target, values.to(base.dtype.element_ty), mask=columns < tl.where(there, D, 0))


@triton.jit
def depth_attention_fwd_kernel(
    sources, queries, state_out, state_lse, out, lse, scores, inverse, T, L, S, D, eps,
    BLOCK_D: tl.constexpr, HAS_STATE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    token, s, columns = tl.program_id(0) // S, tl.program_id(0) % S, tl.arange(0, BLOCK_D)
    row = s * T + token
    query = _row(queries, s, D, columns, token < T)
    top, total, mix = float("-inf"), 0.0, tl.zeros((BLOCK_D,), tl.float32)
    if HAS_STATE:
        top = tl.load(state_lse + row).to(tl.float32) * 1.4426950408889634
        seen = top > float("-inf")
        total = tl.where(seen, 1.0, 0.0)
        mix = tl.where(seen, _row(state_out, row, D, columns, token < T), 0.0)
    for i in tl.static_range(len(sources)):
        there = _there(token, i, T, L)
        value = _row(sources[i], token, D, columns, there)
        norm = tl.rsqrt(tl.sum(value * value) / D + eps)
        score = tl.sum(value * query) * norm
        at = token.to(tl.int64) * L + i
        tl.store(scores + at * S + s, score, mask=there)
        tl.store(inverse + at, norm, mask=there & (s == 0))
        score = tl.where(there, score * 1.4426950408889634, float("-inf"))
        new_top = tl.maximum(top, score)
        shrink, weight = tl.exp2(top - new_top), tl.exp2(score - new_top)
        total = total * shrink + weight
        if NORMED:
            weight *= norm
        mix = mix * shrink + weight * value
        top = new_top
    _store_row(out, mix / total, row, D, columns, token < T)
    tl.store(lse + row, (top + tl.log2(total)) * 0.6931471805599453)


@triton.jit
def depth_attention_bwd_kernel_sources(
    sources, d_sources, queries, state_out, state_lse, d_state_out, d_state_lse, d_out, d_lse, d_scores,
    scores, inverse, factors, partials, T, L, S, D,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, TOKENS: tl.constexpr,
    HAS_STATE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    queried, sourced = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, BLOCK_L)[None, :]
    d_query = tl.zeros((BLOCK_D,), tl.float32)
    for step in tl.range(0, TOKENS, disable_licm=True):  # or the addresses of all sources stay in registers
        token = tl.program_id(0) * TOKENS + step
        dots, of_state = tl.zeros((BLOCK_S, BLOCK_L), tl.float32), tl.zeros((BLOCK_S, 1), tl.float32)
        for s in range(S):
            d = _row(d_out, s * T + token, D, columns, token < T)
            for i in tl.static_range(len(sources)):
                value = _row(sources[i], token, D, columns, _there(token, i, T, L))
                dots = tl.where((queried == s) & (sourced == i), tl.sum(d * value), dots)
            if HAS_STATE:
                dot = tl.sum(d * _row(state_out, s * T + token, D, columns, token < T))
                of_state = tl.where(queried == s, dot, of_state)
        inside = queried < tl.where(token < T, S, 0)
        at = (token.to(tl.int64) * L + sourced) * S + queried
        there = inside & (sourced < L)
        norm = tl.load(inverse + token.to(tl.int64) * L + sourced, mask=sourced < tl.where(token < T, L, 0), other=0.0)
        score = tl.load(scores + at, mask=there, other=float("-inf"))
        top = tl.max(score, 1)[:, None]
        before = tl.full((BLOCK_S, 1), float("-inf"), tl.float32)
        if HAS_STATE:
            before = tl.load(state_lse + queried * T + token, mask=inside, other=float("-inf")).to(tl.float32)
            of_state = tl.where(before > float("-inf"), of_state, 0.0)
            top = tl.maximum(top, before)
        top = tl.where(inside, top, 0.0)
        weight, share = tl.exp2((score - top) * 1.4426950408889634), tl.exp2((before - top) * 1.4426950408889634)
        total = tl.where(inside, tl.sum(weight, 1)[:, None] + share, 1.0)
        weight, share = weight / total, share / total
        if NORMED:
            dots *= norm
        delta = tl.sum(weight * dots, 1)[:, None] + share * of_state
        delta -= tl.load(d_lse + queried * T + token, mask=inside, other=0.0)
        if HAS_STATE:
            d_before = (share * (of_state - delta)).to(d_state_lse.dtype.element_ty)
            tl.store(d_state_lse + queried * T + token, d_before, mask=inside)
        along = weight * (dots - delta) + tl.load(d_scores + at, mask=there, other=0.0)
        outward = along * tl.where(there, score, 0.0)
        if NORMED:
            outward += weight * dots
            weight *= norm
        along *= norm
        outward = tl.sum(outward, 0)[None, :] * norm * norm / D
        if BLOCK_S > 1:
            tl.store(factors + at, along, mask=there)
        for i in tl.static_range(len(sources)):
            value = _row(sources[i], token, D, columns, _there(token, i, T, L))
            d_value = -tl.sum(tl.where(sourced == i, outward, 0.0)) * value
            for s in range(S):
                own = (queried == s) & (sourced == i)
                d = _row(d_out, s * T + token, D, columns, token < T)
                d_value += tl.sum(tl.where(own, weight, 0.0)) * d
                d_value += tl.sum(tl.where(own, along, 0.0)) * _row(queries, s, D, columns, token < T)
            if BLOCK_S == 1:
                d_query += tl.sum(tl.where(sourced == i, along, 0.0)) * value
            _store_row(d_sources[i], d_value, token, D, columns, _there(token, i, T, L))
        if HAS_STATE:
            for s in range(S):
                d = _row(d_out, s * T + token, D, columns, token < T)
                d *= tl.sum(tl.where(queried == s, share, 0.0))
                _store_row(d_state_out, d, s * T + token, D, columns, token < T)
    if BLOCK_S == 1:
        _store_row(partials, d_query, tl.program_id(0), D, columns, tl.program_id(0) * TOKENS < T)


@triton.jit
def depth_attention_bwd_kernel_query(
    sources, factors, partials, T, L, S, D, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr
):
    chunk, s, columns = tl.program_id(0) // S, tl.program_id(0) % S, tl.arange(0, BLOCK_D)
    d_query = tl.zeros((BLOCK_D,), tl.float32)
    for step in tl.range(0, TOKENS, disable_licm=True):  # or the addresses of all sources stay in registers
        token = chunk * TOKENS + step
        for i in tl.static_range(len(sources)):
            there = _there(token, i, T, L)
            along = tl.load(factors + (token.to(tl.int64) * L + i) * S + s, mask=there, other=0.0)
            d_query += along * _row(sources[i], token, D, columns, there)
    _store_row(partials, d_query, tl.program_id(0), D, columns, chunk * TOKENS < T)


def _constants(D: int) -> dict[str, object]:
    """The tile of every kernel: 8 numbers of a row per thread, and at most 16 warps."""
    width = triton.next_power_of_2(D)
    return {"BLOCK_D": width, "num_warps": min(16, max(1, width // 256)), "enable_fp_fusion": True}


def _padded(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Contiguous, and a multiple of so many; what fills up is never touched."""
    rest = -len(tensors) % _PADDED if len(tensors) > _PADDED else 0
    return tuple(t.contiguous() for t in tensors) + (tensors[0],) * rest


def _contiguous(state_out: Tensor | None, state_lse: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if state_out is None or state_lse is None else (state_out.contiguous(), state_lse.contiguous())


def _check(sources: list[Tensor]) -> None:
    no_float64(*sources)
    if sources[0].shape[1] > _WIDEST:
        raise ValueError(f"sources must be at most {_WIDEST} wide on a GPU, got {sources[0].shape[1]}")


def forward(
    sources: list[Tensor],
    queries: Tensor,
    state_out: Tensor | None,
    state_lse: Tensor | None,
    eps: float,
    normed_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(sources)
    (T, D), L, S = sources[0].shape, len(sources), queries.shape[0]
    dtype = reduce(torch.promote_types, (source.dtype for source in sources))
    out, lse = queries.new_empty((S, T, D), dtype=dtype), queries.new_empty((S, T))
    scores, inverse = queries.new_empty((T, L, S)), queries.new_empty((T, L, 1))
    if T * S > 0:
        state = _contiguous(state_out, state_lse) or (out, lse)
        depth_attention_fwd_kernel[(T * S,)](
            _padded(sources), queries.contiguous(), *state, out, lse, scores, inverse, T, L, S, D, eps,
            HAS_STATE=state_out is not None, NORMED=normed_values, **_constants(D),
        )  # fmt: skip
    return out, lse, scores, inverse


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    d_scores: Tensor,
    scores: Tensor,
    inverse: Tensor,
    sources: list[Tensor],
    queries: Tensor,
    state_out: Tensor | None,
    state_lse: Tensor | None,
    normed_values: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    (T, D), L, S = sources[0].shape, len(sources), queries.shape[0]
    d_sources = [source.new_empty(source.shape) for source in sources]
    d_state = [queries.new_empty(0) if t is None else t.new_empty(t.shape) for t in (state_out, state_lse)]
    if T * S == 0:
        return d_sources, torch.zeros_like(queries), d_state[0], d_state[1]
    step = triton.next_power_of_2(max(_TOKENS, triton.cdiv(T, _PARTIALS)))
    programs, pointers, constants = triton.cdiv(T, step), _padded(sources), {"TOKENS": step, **_constants(D)}
    partials, factors = queries.new_empty((programs * S, D)), queries.new_empty(scores.shape if S > 1 else 1)
    state = _contiguous(state_out, state_lse) or (scores, scores)
    depth_attention_bwd_kernel_sources[(programs,)](
        pointers, _padded(d_sources), queries.contiguous(), *state, *d_state, d_out.contiguous(), d_lse.contiguous(),
        d_scores.contiguous(), scores, inverse, factors, partials, T, L, S, D,
        BLOCK_S=triton.next_power_of_2(S), BLOCK_L=triton.next_power_of_2(L),
        HAS_STATE=state_out is not None, NORMED=normed_values, **constants,
    )  # fmt: skip
    if S > 1:
        depth_attention_bwd_kernel_query[(programs * S,)](pointers, factors, partials, T, L, S, D, **constants)
    return d_sources, partials.view(programs, S, D).sum(0), d_state[0], d_state[1]
