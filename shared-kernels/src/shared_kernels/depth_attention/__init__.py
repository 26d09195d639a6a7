"""depth_attention: softmax attention of a learned query over the outputs of earlier layers, given as a list.

Attention Residuals (Kimi Team, "Attention Residuals", arXiv:2603.15031, equations 1-6 and algorithm 1): the input of a
layer is a convex mix of the embedding and of what earlier layers (or blocks of them) put out, chosen per token by one
query per layer over root-mean-square-normed keys. The list is never stacked: copying costs more than the arithmetic.

Both phases of algorithm 1 are calls of the same function. Phase one, all queries of a block over the closed blocks,
each read once: `out, lse = depth_attention(blocks, queries, eps=eps, return_lse=True)`. Phase two, layer i of the
block: `depth_attention([partial], queries[i], state=(out[i], lse[i]), eps=eps)`.

Decided here: the registered op knows one query matrix, with key weight and scale multiplied into it; what was attended
to before (`state`) counts as one more source whose score is its log-sum-exp. Autocast is ignored: scores, softmax and
mix are float32 at least, as in the paper, with one rounding at the end. A norm that follows is the caller's.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import check_optional, check_positive, check_shape, check_tensors
from shared_kernels.depth_attention import reference

NAME = "depth_attention"


_forward = _backend.library_op(
    NAME,
    "forward",
    "(Tensor[] sources, Tensor queries, Tensor? state_out, Tensor? state_lse, float eps, bool normed_values) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
"""Sources (T, D), queries (S, D), state (S, T, D) and (S, T).

Returns the mix (S, T, D), its log-sum-exp (S, T), scores (T, L, S) and one over the root mean square (T, L, 1).
"""


@_forward.register_fake
def _(sources: list[Tensor], queries: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, D), L, S = sources[0].shape, len(sources), queries.shape[0]
    out = queries.new_empty((S, T, D), dtype=_result_dtype(sources))
    return out, queries.new_empty((S, T)), queries.new_empty((T, L, S)), queries.new_empty((T, L, 1))


_backward = _backend.library_op(
    NAME,
    "backward",
    "(Tensor d_out, Tensor d_lse, Tensor d_scores, Tensor scores, Tensor inverse, Tensor[] sources, Tensor queries, "
    "Tensor? state_out, Tensor? state_lse, bool normed_values) -> (Tensor[], Tensor, Tensor, Tensor)",
)
"""Gradients of sources, queries and both parts of the state, which are empty where there is none."""


@_backward.register_fake
def _(*inputs: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    sources, queries, state_out, state_lse, _ = inputs[-5:]
    d_out, d_lse = (queries.new_empty(0) if t is None else t.new_empty(t.shape) for t in (state_out, state_lse))
    return [source.new_empty(source.shape) for source in sources], queries.new_empty(queries.shape), d_out, d_lse


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    sources, queries, state_out, state_lse, _, ctx.normed_values = inputs
    ctx.save_for_backward(*output[2:], *sources, queries, state_out, state_lse)


def _differentiate(
    ctx: Any, d_out: Tensor, d_lse: Tensor, d_scores: Tensor, _: Tensor
) -> tuple[list[Tensor] | Tensor | None, ...]:
    scores, inverse, *sources, queries, state_out, state_lse = ctx.saved_tensors
    d_sources, d_queries, d_state_out, d_state_lse = _backward(
        d_out, d_lse, d_scores, scores, inverse, sources, queries, state_out, state_lse, ctx.normed_values
    )
    if state_out is None:
        return d_sources, d_queries, None, None, None, None
    return d_sources, d_queries, d_state_out, d_state_lse, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.shared_kernels.depth_attention)
def _flops(sources: list[torch.Size], queries: torch.Size, state_out: torch.Size | None, *_: Any, **__: Any) -> int:
    (T, D), L, S = sources[0], len(sources), queries[0]
    return 2 * T * D * (L + L * S + (L + (state_out is not None)) * S)  # norms, scores, mix


@register_flop_formula(torch.ops.shared_kernels.depth_attention_backward)
def _backward_flops(d_out: torch.Size, *rest: Any, **_: Any) -> int:
    S, T, D = d_out
    L = rest[2][1]  # of scores
    return 2 * T * D * L * (1 + 4 * S)  # of each weight, query, and three terms of the source


def depth_attention(
    sources: Sequence[Float[Tensor, "*tokens D"]],
    query: Float[Tensor, "*S D"],
    *,
    key_weight: Float[Tensor, "*S D"] | None = None,
    eps: float,
    scale: float = 1.0,
    normed_values: bool = False,
    state: tuple[Float[Tensor, "*S tokens D"], Float[Tensor, "*S tokens"]] | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Float[Tensor, "*S tokens D"] | tuple[Tensor, ...]:
    """sum_i w_i v_i,  with  w = softmax over i of  scale * query . (v_i / sqrt(mean(v_i^2) + eps) * key_weight).

    v_i are the L sources, every token for itself. `query` is (D,), or (S, D) for S of them at once, and then every
    result has S in front; `key_weight`, the weight of the key norm, has query's shape. `normed_values` mixes the normed
    sources (without key_weight) instead of the raw ones. `state` is a result (out, lse) over other sources that this
    call goes on from; where its lse is -inf, nothing was seen. Differentiable once in every source, query, key_weight
    and state.

    Returns the mix in the widest dtype among the sources (they may differ, as may the other tensors); with `return_lse`
    also the log-sum-exp of all scores, with `return_weights` also the weights of the sources (..., L), both float32 at
    least.

    Raises TypeError on what is not a floating-point tensor, ValueError on an empty list, shapes that disagree, mixed
    devices, or eps <= 0. On a GPU float64 raises TypeError, D above 8,192 ValueError.
    """
    _check_arguments(sources, query, key_weight, eps, state)
    if _backend.forced == "reference":
        return reference.depth_attention(
            sources, query, key_weight=key_weight, eps=eps, scale=scale, normed_values=normed_values, state=state,
            return_lse=return_lse, return_weights=return_weights,
        )  # fmt: skip
    acc = torch.promote_types(_result_dtype(sources), torch.float32)
    queries = scale * (query.to(acc) if key_weight is None else query.to(acc) * key_weight.to(acc))
    tokens, (D, S) = sources[0].shape[:-1], (query.shape[-1], query.shape[:-1])
    T, num_queries = math.prod(tokens), math.prod(S)
    before = (None, None) if state is None else (state[0].reshape(num_queries, T, D), state[1].reshape(num_queries, T))
    flat = [source.reshape(T, D) for source in sources]
    out, lse, scores, _ = _forward(flat, queries.reshape(num_queries, D), *before, eps, normed_values)
    results = [out.view(*S, *tokens, D)]
    if return_lse:
        results.append(lse.view(*S, *tokens))
    if return_weights:
        others = [] if before[1] is None else [before[1].T.unsqueeze(1)]
        weights = torch.cat([scores, *others], 1).softmax(1)[:, : len(sources)]
        results.append(weights.permute(2, 0, 1).reshape(*S, *tokens, len(sources)))
    return results[0] if len(results) == 1 else tuple(results)


def _result_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (source.dtype for source in sources))


def _check_arguments(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor | None,
    eps: float,
    state: tuple[Tensor, Tensor] | None,
) -> None:
    if isinstance(sources, Tensor) or len(sources) == 0:
        given = "one tensor" if isinstance(sources, Tensor) else "an empty list"
        raise ValueError(f"sources must be a list of at least one tensor, got {given}")
    if state is not None and len(state) != 2:
        raise ValueError(f"state must be (out, lse), got {len(state)} of them")
    named = {f"sources[{i}]": source for i, source in enumerate(sources)}
    check_tensors(named | {"query": query})
    shape, device = sources[0].shape, sources[0].device
    if len(shape) == 0 or query.ndim not in (1, 2) or query.shape[-1] != shape[-1]:
        raise ValueError(
            f"query must be (D,) or (S, D) with sources (..., D), got {tuple(query.shape)}, {tuple(shape)}"
        )
    for name, source in named.items():
        check_shape(name, source, *shape)
    check_optional("key_weight", key_weight, tuple(query.shape), device)
    out, lse = state or (None, None)
    check_optional("out of state", out, (*query.shape[:-1], *shape), device)
    check_optional("lse of state", lse, (*query.shape[:-1], *shape[:-1]), device)
    check_positive("eps", eps)  # a source of zeros has no direction without
