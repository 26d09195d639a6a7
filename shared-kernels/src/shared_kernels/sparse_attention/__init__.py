"""sparse_attention: softmax attention in which every block of queries sees a list of key blocks.

Block sizes of queries and keys are independent, down to single tokens, so one op serves
- blocks over blocks: SLA (arXiv:2509.24006), Sparsifiner (arXiv:2303.13755), and Rectified SpaAttn (arXiv:2511.19835),
  which rescales and shifts the output of each query block;
- blocks of queries over single keys: DHSA (arXiv:2510.24606);
- single queries over single keys: top-k attention.
Two calls whose lists complement one another give both parts of a partition of the keys, as attention calibration
(arXiv:2406.15765) needs them, and `merge_states` joins such parts.

Decided here: lists are data, never differentiated. An entry that comes twice counts twice. Row scale and bias are plain
torch around the registered op. The lists turned round, which only the backward pass needs, are made there unless given.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from shared_kernels import _backend
from shared_kernels._arguments import (
    check_attention,
    check_block_size,
    check_optional,
    check_shape,
    check_tensors,
)
from shared_kernels.sparse_attention import reference
from shared_kernels.sparse_attention.lists import (
    TransposedLists,
    check_list_tensors,
    check_lists,
    transpose_lists,
)

__all__ = ["TransposedLists", "check_lists", "sparse_attention", "transpose_lists"]

NAME = "sparse_attention"


_forward = _backend.library_op(
    NAME,
    "forward",
    "(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor counts, bool causal, float scale, "
    "SymInt block_q, SymInt block_k, Tensor? entries, Tensor? starts) -> (Tensor, Tensor)",
)
"""The last two, the lists turned round, wait here for the backward pass."""


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((*query.shape[:3], value.shape[3])), query.new_empty(query.shape[:3], dtype=wide)


_backward = _backend.library_op(
    NAME,
    "backward",
    "(Tensor d_out, Tensor delta, Tensor query, Tensor key, Tensor value, Tensor lse, Tensor indices, Tensor counts, "
    "Tensor entries, Tensor starts, bool causal, float scale, SymInt block_q, SymInt block_k) "
    "-> (Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(d_out: Tensor, delta: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    query, key, value = (t.new_empty(t.shape) for t in inputs[:3])
    return query, key, value


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, indices, counts, causal, scale, block_q, block_k, entries, starts = inputs
    ctx.rest = (causal, scale, block_q, block_k)
    ctx.save_for_backward(*tensors, *output, indices, counts, entries, starts)


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, indices, counts, entries, starts = ctx.saved_tensors
    if entries is None:
        num_key_blocks = -(-key.shape[2] // ctx.rest[-1])
        entries, starts = transpose_lists(indices, counts, num_key_blocks=num_key_blocks)
    # d score = p * (d p - delta), and what flows into the LSE adds p * d_lse
    delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - d_lse
    gradients = _backward(d_out, delta, query, key, value, lse, indices, counts, entries, starts, *ctx.rest)
    return *gradients, *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_save)


def _listed_pairs(query: Tensor, indices: Tensor, counts: Tensor, block_q: int, block_k: int) -> int:
    """Query-key pairs of whole blocks; without values to read, as if every list were full."""
    known = not isinstance(counts, FakeTensor) and counts.device.type != "meta"
    blocks = int(counts.sum()) if known else indices.numel()
    return blocks * (query.shape[1] // indices.shape[1]) * block_q * block_k if blocks else 0


@register_flop_formula(torch.ops.shared_kernels.sparse_attention, get_raw=True)
def _flops(
    query: Tensor,
    key: Tensor,  # noqa: ARG001
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    causal: bool,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    block_q: int,
    block_k: int,
    *_: Any,
    **__: Any,
) -> int:
    pairs = _listed_pairs(query, indices, counts, block_q, block_k)
    return 2 * pairs * (query.shape[3] + value.shape[3])


@register_flop_formula(torch.ops.shared_kernels.sparse_attention_backward, get_raw=True)
def _backward_flops(*inputs: Any, **_: Any) -> int:
    _d_out, _delta, query, _key, value, _lse, indices, counts = inputs[:8]
    block_q, block_k = inputs[-2:]
    # scores, d query and d key by the key width, d weights and d value by the value width
    pairs = _listed_pairs(query, indices, counts, block_q, block_k)
    return 2 * pairs * (3 * query.shape[3] + 2 * value.shape[3])


def sparse_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    indices: Int[Tensor, "B Hl nq m"],
    counts: Int[Tensor, "B Hl nq"] | None = None,
    *,
    block_size: tuple[int, int] = (128, 128),
    causal: bool = False,
    scale: float | None = None,
    row_scale: Float[Tensor, "B H nq"] | None = None,
    row_bias: Float[Tensor, "B H nq E"] | None = None,
    transposed: TransposedLists | None = None,
    return_lse: bool = False,
    validate: bool = False,
) -> Float[Tensor, "B H Nq E"] | tuple[Float[Tensor, "B H Nq E"], Float[Tensor, "B H Nq"]]:
    """Softmax attention of every query block over the key blocks that its list names.

    Blocks of queries and of keys are runs of `block_size` = (block_q, block_k) tokens, the last ones perhaps shorter;
    nq = ceil(Nq / block_q). `indices` (int32) names key blocks, `counts` (int32) how many of the m entries of a list
    hold; the rest is padding and is not read. Without `counts`, lists end at their first -1. Hl is 1, Hkv or H: heads
    share lists as query heads share keys. The order of a list is irrelevant, an entry that comes twice counts twice.

    `causal` is aligned bottom-right, as in flash attention: query i sees keys up to i + Nk - Nq. `scale` is 1/sqrt(D)
    unless given. The rows of query block n come out as row_scale[n] * out + row_bias[n] (Rectified SpaAttn; the LSE is
    that of the attention itself). `transposed` is what `transpose_lists` makes of the same lists; the backward pass
    makes it anew if absent. With `validate`, the contents of the lists are checked, which waits for a GPU.

    Returns the output, contiguous and of query's dtype, and with `return_lse` the natural log-sum-exp of the scores, in
    float32 at least. Rows that see no key: output 0 (before scale and bias), LSE -inf, gradients 0. Keys that no list
    of the head names have no influence, NaN included; what `causal` hides of a listed block from some of its queries
    must be finite. Differentiable once in query, key, value, row_scale, row_bias, through both outputs.

    Raises TypeError on other dtypes than floating-point ones and int32, ValueError on shapes or devices that disagree,
    on a block size or scale out of range, and with `validate` on lists that name what is not there.
    """
    check_attention(query, key, value, scale=scale)
    _check_lists_fit(query, key, indices, counts, block_size, transposed)
    rows = (*query.shape[:2], indices.shape[2])
    check_optional("row_scale", row_scale, rows, query.device)
    check_optional("row_bias", row_bias, (*rows, value.shape[3]), query.device)
    if validate:
        check_lists(indices, counts, num_key_blocks=-(-key.shape[2] // block_size[1]))
    query, key, value = _backend.autocast(query, key, value)
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    if _backend.forced == "reference":
        return reference.sparse_attention(
            query, key, value, indices, counts, block_size=block_size, causal=causal, scale=scale,
            row_scale=row_scale, row_bias=row_bias, return_lse=return_lse,
        )  # fmt: skip
    if counts is None:
        counts = (indices >= 0).sum(-1, dtype=torch.int32)
    entries, starts = transposed or (None, None)
    out, lse = _forward(query, key, value, indices, counts, causal, scale, *block_size, entries, starts)
    out = _scaled_and_shifted(out, row_scale, row_bias, block_size[0])
    return (out, lse) if return_lse else out


def _scaled_and_shifted(out: Tensor, row_scale: Tensor | None, row_bias: Tensor | None, block_q: int) -> Tensor:
    """row_scale * out + row_bias, computed in float32 at least and rounded once."""
    if row_scale is None and row_bias is None:
        return out
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    if row_scale is not None:
        wide = _per_row(row_scale[..., None], block_q, out.shape[2]) * wide
    if row_bias is not None:
        wide = wide + _per_row(row_bias, block_q, out.shape[2])
    return wide.to(out.dtype)


def _per_row(blocks: Tensor, block_q: int, rows: int) -> Tensor:
    return blocks.repeat_interleave(block_q, 2)[:, :, :rows]


def _check_lists_fit(
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    counts: Tensor | None,
    block_size: tuple[int, int],
    transposed: TransposedLists | None,
) -> None:
    check_block_size(block_size)
    check_list_tensors(indices, counts, query.device)
    (B, H, Nq, _), (_, Hkv, Nk, _) = query.shape, key.shape
    nq = -(-Nq // block_size[0])
    if indices.shape[0] != B or indices.shape[2] != nq or indices.shape[1] not in (1, Hkv, H):
        raise ValueError(
            f"indices must be ({B}, list heads, {nq}, m) for {Nq} queries in blocks of {block_size[0]}, with "
            f"{sorted({1, Hkv, H})} list heads, got {tuple(indices.shape)}"
        )
    if transposed is None:
        return
    widths = (nq * indices.shape[3], -(-Nk // block_size[1]) + 1)
    for name, tensor, wide in zip(("transposed.entries", "transposed.starts"), transposed, widths, strict=True):
        check_tensors({name: tensor}, torch.int32, device=query.device)
        check_shape(name, tensor, *indices.shape[:2], wide)
