"""attention_given and attention_argmax: what query rows do with their attention, without the map.

The log-sum-exp and the mass on groups of keys tell sinks from content (visual attention redistribution,
arXiv:2503.03321), the most attended position tells a head that retrieves (AttentionInfluence, arXiv:2505.07293).

Decided here: the position is a function of its own, as it needs no softmax and has no gradient. Groups partition keys
by labels, since overlapping sets are sums of a finer partition.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import check_choice, check_optional, check_whole_number
from shared_kernels.attention_received import reference
from shared_kernels.attention_received.selection import Rows, check_selection, choose

NAME = "attention_received"  # the folder, whose kernels these share
Statistic = Literal["lse", "entropy", "mass"]
_MOST_GROUPS = 64


_given = _backend.library_op(
    NAME,
    "given",
    "(Tensor query, Tensor key, Tensor? bounds, Tensor? key_mask, Tensor? labels, SymInt num_groups, bool entropy, "
    "float scale) -> (Tensor, Tensor, Tensor)",
)
"""Log-sum-exp, entropy and masses; what is not asked for is empty."""


@_given.register_fake
def _(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    num_groups, entropy, _ = rest[-3:]
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return lse, lse.new_empty(lse.shape if entropy else (0,)), lse.new_empty((*lse.shape, num_groups))


_given_backward = _backend.library_op(
    NAME,
    "given_backward",
    "(Tensor d_scores, Tensor? d_entropy, Tensor d_mass, Tensor query, Tensor key, Tensor? bounds, Tensor? key_mask, "
    "Tensor? labels, Tensor lse, Tensor entropy, float scale) -> (Tensor, Tensor)",
)
"""Gradients through d score = P * (d_scores - d_entropy * (ln P + entropy) + d_mass of the key's group)."""


@_given_backward.register_fake
def _(d_scores: Tensor, d_entropy: Tensor | None, d_mass: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    query, key = rest[:2]
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, bounds, key_mask, labels, _, ctx.entropy, ctx.scale = inputs
    ctx.save_for_backward(query, key, bounds, key_mask, labels, *output)


def _differentiate(ctx: Any, d_lse: Tensor, d_entropy: Tensor, d_mass: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lse, entropy, mass = ctx.saved_tensors
    # d mass_g / d score = P (1 if the key is of group g, else 0) - P mass_g
    d_scores = d_lse - (d_mass * mass).sum(-1)
    asked = d_entropy.contiguous() if ctx.entropy else None
    gradients = _given_backward(d_scores, asked, d_mass.contiguous(), *tensors, lse, entropy, ctx.scale)
    return *gradients, *[None] * 6


_given.register_autograd(_differentiate, setup_context=_save)


_argmax = _backend.library_op(NAME, "argmax", "(Tensor query, Tensor key, Tensor? bounds, Tensor? key_mask) -> Tensor")


@_argmax.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.int64)


def _flops_of(query_shape: torch.Size, key_shape: torch.Size, num_groups: int, products: int) -> int:
    B, H, R, D = query_shape
    return 2 * B * H * R * key_shape[2] * (products * D + num_groups)


@register_flop_formula(torch.ops.shared_kernels.attention_received_given)
def _flops(query_shape: torch.Size, key_shape: torch.Size, *rest: Any, **_: Any) -> int:
    return _flops_of(query_shape, key_shape, rest[3], 1)


@register_flop_formula(torch.ops.shared_kernels.attention_received_argmax)
def _argmax_flops(query_shape: torch.Size, key_shape: torch.Size, *_: Any, **__: Any) -> int:
    return _flops_of(query_shape, key_shape, 0, 1)


@register_flop_formula(torch.ops.shared_kernels.attention_received_given_backward)
def _backward_flops(*inputs: Any, **_: Any) -> int:
    d_mass_shape, query_shape, key_shape = inputs[2:5]
    return _flops_of(query_shape, key_shape, d_mass_shape[-1], 3)


def attention_given(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    reduce: Statistic,
    *,
    groups: Int[Tensor, "B Nk"] | None = None,
    num_groups: int | None = None,
    rows: Rows = None,
    heads: Sequence[int] | None = None,
    causal: bool = False,
    window: int | None = None,
    key_mask: Bool[Tensor, "B Nk"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B h R"] | Float[Tensor, "B h R G"]:
    """What the softmax attention P_ij = exp(s_ij - lse_i), s = scale q_i . k_j, of every chosen row comes to.

    `reduce` says what is returned:
    - "lse": the natural log-sum-exp of the scores;
    - "entropy": -sum_j P_ij ln P_ij, in nats;
    - "mass": (B, h, R, G), the sum of P_ij over the keys of each group. `groups` (int64) labels keys 0 to
      `num_groups` - 1; other labels belong to no group. G is at most 64.
    Rows that see no key: LSE -inf, entropy 0, masses 0, gradients 0.

    Other arguments are those of `attention_received`. The share of keys in a row of a larger softmax, whose LSE is
    known, is exp(attention_given(query, those keys, "lse") - that LSE). Results are float32, or float64 for
    float64; differentiable once in query and key.

    Raises TypeError on other types and dtypes, ValueError on shapes or devices that disagree and values out of range.
    """
    check_selection(query, key, rows=rows, heads=heads, causal=causal, window=window, key_mask=key_mask, scale=scale)
    _check_groups(key, reduce, groups, num_groups)
    query, key = _backend.autocast(query, key)
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    if _backend.forced == "reference":
        return reference.attention_given(
            query, key, reduce, groups=groups, num_groups=num_groups, rows=rows, heads=heads, causal=causal,
            window=window, key_mask=key_mask, scale=scale,
        )  # fmt: skip
    query, key, bounds = choose(query, key, rows=rows, heads=heads, causal=causal, window=window)
    results = _given(query, key, bounds, key_mask, groups, num_groups or 0, reduce == "entropy", scale)
    return results[get_args(Statistic).index(reduce)]


def attention_argmax(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    *,
    rows: Rows = None,
    heads: Sequence[int] | None = None,
    causal: bool = False,
    window: int | None = None,
    key_mask: Bool[Tensor, "B Nk"] | None = None,
) -> Int[Tensor, "B h R"]:
    """The key that each chosen row attends to most: argmax_j of q_i . k_j over the keys that it sees, int64.

    Of several, the lowest; -1 for rows that see no key. Arguments and errors are those of `attention_received`. Not
    differentiable.
    """
    check_selection(query, key, rows=rows, heads=heads, causal=causal, window=window, key_mask=key_mask)
    query, key = _backend.autocast(query, key)
    if _backend.forced == "reference":
        return reference.attention_argmax(
            query, key, rows=rows, heads=heads, causal=causal, window=window, key_mask=key_mask
        )
    query, key, bounds = choose(query, key, rows=rows, heads=heads, causal=causal, window=window)
    return _argmax(query.detach(), key.detach(), bounds, key_mask)


def _check_groups(key: Tensor, reduce: str, groups: Tensor | None, num_groups: int | None) -> None:
    check_choice("reduce", reduce, Statistic)
    if (groups is None) != (num_groups is None) or (groups is not None) != (reduce == "mass"):
        raise ValueError(f'groups and num_groups belong to reduce="mass", which needs both; got reduce={reduce!r}')
    check_optional("groups", groups, (key.shape[0], key.shape[2]), key.device, torch.int64)
    if num_groups is not None:
        check_whole_number("num_groups", num_groups, 1, _MOST_GROUPS)
