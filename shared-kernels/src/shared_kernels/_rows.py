"""Attention at listed keys on CPUs: three sparse primitives of torch that nobody uses for attention.

`sampled_addmm` computes scores at listed positions only, `embedding_bag` sums listed rows with weights; both are
vectorised and run on all threads. Lists of all batches and heads become one sparse matrix, columns offset by head.

Shapes: Z batches times heads, R query rows, n listed keys per row, N keys, D key width, E value width.
"""

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def flat_columns(columns: Int[Tensor, "Z R n"], num_keys: int) -> Int[Tensor, "Z*R*n"]:
    """Listed keys as rows of the flat (Z * N)."""
    offset = torch.arange(columns.shape[0], dtype=columns.dtype, device=columns.device) * num_keys
    return (columns + offset[:, None, None]).reshape(-1)


def scores_at(
    query: Float[Tensor, "Z R D"], key: Float[Tensor, "Z N D"], flat: Int[Tensor, "Z*R*n"]
) -> Float[Tensor, "Z R n"]:
    """query . key at the listed keys (`flat_columns`), in float32 or float64, whichever both tensors have."""
    Z, R, D = query.shape
    rows, n = Z * R, flat.numel() // max(1, Z * R)
    if flat.numel() == 0:
        return query.new_zeros((Z, R, n))
    starts = torch.arange(0, rows * n + 1, n, dtype=flat.dtype, device=flat.device)
    values = query.new_zeros(rows * n)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        size = (rows, key.shape[0] * key.shape[1])
        pattern = torch.sparse_csr_tensor(starts, flat, values, size, check_invariants=False)
        pattern = torch.sparse.sampled_addmm(pattern, query.reshape(rows, D), key.reshape(-1, D).T, beta=0.0)
        return pattern.values().view(Z, R, n)


def weighted_rows(
    flat: Int[Tensor, "Z*R*n"], value: Float[Tensor, "Z N E"], weight: Float[Tensor, "Z R n"]
) -> Float[Tensor, "Z R E"]:
    """Sum over the listed keys of weight * value."""
    Z, R, n = weight.shape
    if weight.numel() == 0:
        return value.new_zeros((Z, R, value.shape[-1]))
    bags = F.embedding_bag(
        flat.view(Z * R, n), value.reshape(-1, value.shape[-1]), mode="sum", per_sample_weights=weight.reshape(Z * R, n)
    )
    return bags.view(Z, R, -1)


class Transposed(NamedTuple):
    """Lists turned round: for every key, the entries that name it, in the order of the entries."""

    entries: Int[Tensor, "L"]
    """Positions in the flat lists, sorted by key."""
    starts: Int[Tensor, "keys+1"]
    """Where each key's entries begin, and the end."""


def transpose_lists(flat: Int[Tensor, "L"], num_keys: int) -> Transposed:
    """`num_keys` counts the keys of all heads. A stable sort of int32 takes half the time of one of int64."""
    ordered, entries = torch.sort(flat.to(torch.int32), stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_keys + 1, dtype=torch.int32, device=flat.device))
    return Transposed(entries, starts)


def summed_by_key(
    lists: Transposed, rows: Float[Tensor, "L/n E"], weight: Float[Tensor, "L"], n: int
) -> Float[Tensor, "keys E"]:
    """For every key the sum over the entries that name it of weight * the entry's query row: dK and dV."""
    if weight.numel() == 0:
        return rows.new_zeros((len(lists.starts) - 1, rows.shape[-1]))
    return F.embedding_bag(
        lists.entries // n,
        rows,
        lists.starts[:-1],
        mode="sum",
        per_sample_weights=weight.index_select(0, lists.entries),  # a quarter of the time of weight[...]
    )
