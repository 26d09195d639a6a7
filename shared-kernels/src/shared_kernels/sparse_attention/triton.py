"""sparse_attention on GPUs: one program per tile of query rows walks its list of key blocks, or the other way round.

Query heads that share key, value and list are rows of the same tile (the form of Yuan et al., "Native Sparse
Attention", arXiv:2502.11089), so a list per token still fills a tile where heads are grouped. Keys are gathered slot by
slot, whatever block_k is; where a tile of keys lies in one block they are addressed as a range.

The backward pass has no atomics, so nothing depends on the order of programs. dQ walks the lists. dK and dV walk the
transposed lists, all query rows that name a key block. Blocks of fewer than 16 keys would leave most of that tile
empty: from a size on, each query block writes what it adds to its listed keys in a workspace, and every key sums its
own rows in the order of the lists.
"""

# mypy: disable-error-code=no-untyped-def
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._tiles import (
    LOG2E,
    dot_precision,
    load_rows,
    softmax_end,
    softmax_step,
    store_rows,
    strided_rows,
    target,
    width,
)


@triton.jit
def _listed(entries, start, total, size, WIDTH: tl.constexpr, GATHER: tl.constexpr):
    """Slots start .. start + WIDTH of a list of blocks of `size`: the block of each slot, or of all, and where in it."""
    if GATHER:
        slots = start + tl.arange(0, WIDTH)
        return tl.load(entries + slots // size, mask=slots < total, other=-1), slots % size
    return tl.load(entries + start // size), start % size + tl.arange(0, WIDTH)


@triton.jit
def _place(block, inner, first_head, block_q, Nq):
    """Head and position of a query block's rows, which run through its positions head by head."""
    position = block * block_q + inner % block_q
    return first_head + inner // block_q, position, (block >= 0) & (position < Nq)


@triton.jit
def _program(tiles, units, BACKWARDS: tl.constexpr):
    """Which tile of which batch and head; lists of causal attention grow, and the longest should not come last."""
    program = tl.program_id(0)
    tile = program % tiles
    if BACKWARDS:
        tile = tiles - 1 - tile
    unit = program // tiles
    return tile, (unit // units).to(tl.int64), unit % units


@triton.jit
def sparse_attention_fwd_kernel(
    query, key, value, indices, counts, out, lse, query_strides, key_strides, value_strides, list_strides,
    count_strides, H, Nq, Nk, D, E, block_q, block_k, fold, group, heads_per_list, query_blocks, scale,
    CAUSAL: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(fold * block_q, BLOCK_M)
    tile, batch, unit = _program(query_blocks * tiles, H // fold, CAUSAL)
    block, inner = tile // tiles, tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head, position, inside = _place(block, inner, unit * fold, block_q, Nq)
    inside &= inner < fold * block_q
    rows = head.to(tl.int64) * query_strides[1] + position.to(tl.int64) * query_strides[2]
    columns, columns_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q = load_rows(query + batch * query_strides[0], rows, inside, columns, D)
    list_head = (unit * fold // heads_per_list).to(tl.int64)
    entries = indices + batch * list_strides[0] + list_head * list_strides[1] + block.to(tl.int64) * list_strides[2]
    count = tl.load(counts + batch * count_strides[0] + list_head * count_strides[1] + block * count_strides[2])
    kv_head = (unit * fold // group).to(tl.int64)
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    limit = position + (Nk - Nq)
    end = tl.minimum((block + 1) * block_q, Nq) + (Nk - Nq) if CAUSAL else Nk
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(0, count * block_k, BLOCK_N):
        key_block, slot = _listed(entries, start, count * block_k, block_k, BLOCK_N, GATHER)
        keys = key_block * block_k + slot
        listed = (key_block >= 0) & (keys < end)
        k = load_rows(key, keys.to(tl.int64) * key_strides[2], listed, columns, D)
        v = load_rows(value, keys.to(tl.int64) * value_strides[2], listed, columns_e, E)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        visible = listed[None, :]
        if CAUSAL:
            visible &= keys[None, :] <= limit[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        top, total, weights, shrink = softmax_step(scores, top, total)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    inverse, natural = softmax_end(top, total)
    results = (batch * H + head) * Nq + position
    store_rows(out, acc * inverse[:, None], results * E, inside, columns_e, E)
    tl.store(lse + results, natural, mask=inside)


@triton.jit
def sparse_attention_bwd_kernel_dq(
    d_out, delta, query, key, value, lse, indices, counts, d_query, d_out_strides, query_strides, key_strides,
    value_strides, list_strides, count_strides, H, Nq, Nk, D, E, block_q, block_k, fold, group, heads_per_list,
    query_blocks, scale, log2_scale,
    CAUSAL: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(fold * block_q, BLOCK_M)
    tile, batch, unit = _program(query_blocks * tiles, H // fold, CAUSAL)
    block, inner = tile // tiles, tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head, position, inside = _place(block, inner, unit * fold, block_q, Nq)
    inside &= inner < fold * block_q
    head, position = head.to(tl.int64), position.to(tl.int64)
    columns, columns_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    rows = head * query_strides[1] + position * query_strides[2]
    q = load_rows(query + batch * query_strides[0], rows, inside, columns, D)
    rows = head * d_out_strides[1] + position * d_out_strides[2]
    d = load_rows(d_out + batch * d_out_strides[0], rows, inside, columns_e, E)
    results = (batch * H + head) * Nq + position
    row_lse, row_delta = _row_statistics(lse, delta, results, inside)
    list_head = (unit * fold // heads_per_list).to(tl.int64)
    entries = indices + batch * list_strides[0] + list_head * list_strides[1] + block.to(tl.int64) * list_strides[2]
    count = tl.load(counts + batch * count_strides[0] + list_head * count_strides[1] + block * count_strides[2])
    kv_head = (unit * fold // group).to(tl.int64)
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    limit = position + (Nk - Nq)
    end = tl.minimum((block + 1) * block_q, Nq) + (Nk - Nq) if CAUSAL else Nk
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, count * block_k, BLOCK_N):
        key_block, slot = _listed(entries, start, count * block_k, block_k, BLOCK_N, GATHER)
        keys = key_block * block_k + slot
        listed = (key_block >= 0) & (keys < end)
        k = load_rows(key, keys.to(tl.int64) * key_strides[2], listed, columns, D)
        v = load_rows(value, keys.to(tl.int64) * value_strides[2], listed, columns_e, E)
        visible = listed[None, :]
        if CAUSAL:
            visible &= keys[None, :] <= limit[:, None]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
        weights = tl.exp2(tl.where(visible, scores, float("-inf")) - row_lse[:, None])
        d_weights = tl.dot(d, tl.trans(v), input_precision=PRECISION)
        d_scores = tl.where(visible, weights * (d_weights - row_delta[:, None]), 0.0)
        acc = tl.dot(d_scores.to(k.dtype), k, acc, input_precision=PRECISION)
    store_rows(d_query, acc * scale, results * D, inside, columns, D)


@triton.jit
def _row_statistics(lse, delta, rows, inside):
    """LSE to base 2, 0 for rows without keys, whose every score is -inf; and delta."""
    natural = tl.load(lse + rows, mask=inside, other=0.0)
    return tl.where(natural == float("-inf"), 0.0, natural * 1.4426950408889634), tl.load(
        delta + rows, mask=inside, other=0.0
    )


@triton.jit
def _add_rows(
    d_key, d_value, k, v, q, d, row_lse, row_delta, visible, log2_scale, PRECISION: tl.constexpr
):  # fmt: skip
    """What a tile of query rows (M) adds to the gradients of a tile of keys (N); visible is (N, M)."""
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * log2_scale
    weights = tl.exp2(tl.where(visible, scores, float("-inf")) - row_lse[None, :])
    d_value = tl.dot(weights.to(d.dtype), d, d_value, input_precision=PRECISION)
    d_weights = tl.dot(v, tl.trans(d), input_precision=PRECISION)
    d_scores = tl.where(visible, weights * (d_weights - row_delta[None, :]), 0.0)
    return tl.dot(d_scores.to(q.dtype), q, d_key, input_precision=PRECISION), d_value


@triton.jit
def sparse_attention_bwd_kernel_dkv(
    d_out, delta, query, key, value, lse, entries, starts, d_key, d_value, d_out_strides, query_strides, key_strides,
    value_strides, entry_strides, start_strides, H, Nq, Nk, D, E, block_q, block_k, fold, group, heads_per_list,
    key_blocks, scale, log2_scale,
    CAUSAL: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(block_k, BLOCK_N)
    tile, batch, kv_head = _program(key_blocks * tiles, H // group, False)
    block, inner = tile // tiles, tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = block * block_k + inner
    inside = (inner < block_k) & (keys < Nk)
    kv_row = (batch * (H // group) + kv_head) * Nk + keys
    columns, columns_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    key += batch * key_strides[0] + kv_head.to(tl.int64) * key_strides[1]
    value += batch * value_strides[0] + kv_head.to(tl.int64) * value_strides[1]
    k = load_rows(key, keys.to(tl.int64) * key_strides[2], inside, columns, D)
    v = load_rows(value, keys.to(tl.int64) * value_strides[2], inside, columns_e, E)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    query += batch * query_strides[0]
    d_out += batch * d_out_strides[0]
    for first_head in range(kv_head * group, (kv_head + 1) * group, fold):
        list_head = (first_head // heads_per_list).to(tl.int64)
        own = starts + batch * start_strides[0] + list_head * start_strides[1] + block
        first, last = tl.load(own), tl.load(own + 1)
        own = entries + batch * entry_strides[0] + list_head * entry_strides[1] + first
        size = fold * block_q
        for start in range(0, (last - first) * size, BLOCK_M):
            query_block, slot = _listed(own, start, (last - first) * size, size, BLOCK_M, GATHER)
            head, position, exists = _place(query_block, slot, first_head, block_q, Nq)
            visible = exists[None, :]
            if CAUSAL:
                visible &= keys[:, None] <= position[None, :] + (Nk - Nq)
            head, position = head.to(tl.int64), position.to(tl.int64)
            q = load_rows(query, head * query_strides[1] + position * query_strides[2], exists, columns, D)
            d = load_rows(d_out, head * d_out_strides[1] + position * d_out_strides[2], exists, columns_e, E)
            row_lse, row_delta = _row_statistics(lse, delta, (batch * H + head) * Nq + position, exists)
            acc_k, acc_v = _add_rows(acc_k, acc_v, k, v, q, d, row_lse, row_delta, visible, log2_scale, PRECISION)
    store_rows(d_key, acc_k * scale, kv_row * D, inside, columns, D)
    store_rows(d_value, acc_v, kv_row * E, inside, columns_e, E)
