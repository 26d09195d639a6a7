"""neighborhood_attention on CPUs: attention at listed keys, see `shared_kernels._rows`.

The lists depend on the size of the map only. They are made for one map and kept, and so are the lists turned round that
the backward pass walks: sorting them would be its largest part.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels._rows import Transposed, scores_at, summed_by_key, transpose_lists, weighted_rows

_CHUNK = 1 << 19  # query-key pairs handled at once, per thread; one map at least
_LOG2E = 1.4426950408889634
_LN2 = 0.6931471805599453


@functools.lru_cache(maxsize=16)
def _lists(rows: int, columns: int, k: int) -> tuple[Tensor, Tensor]:
    """For one map, int32 (N, n): the keys of every query, and their relative positions in a flat bias table."""
    first = [(torch.arange(n) - k // 2).clamp(0, n - k) for n in (rows, columns)]
    at_row, at_column = (f[:, None] + torch.arange(k) for f in first)
    keys = at_row[:, None, :, None] * columns + at_column[:, None, :]
    by_row, by_column = (at - torch.arange(len(at))[:, None] + k - 1 for at in (at_row, at_column))
    relative = by_row[:, None, :, None] * (2 * k - 1) + by_column[:, None, :]
    shape = rows * columns, k * k
    return keys.reshape(shape).to(torch.int32), relative.reshape(shape).to(torch.int32)


@functools.lru_cache(maxsize=16)
def _transposed(rows: int, columns: int, k: int, group: int) -> Transposed:
    """The lists of one map, `group` times over, turned round."""
    return transpose_lists(_lists(rows, columns, k)[0].repeat(group, 1).view(-1), rows * columns)


class _Maps(NamedTuple):
    """Some maps: z of them, each with N keys and R = G * N queries, n keys to a query."""

    at: slice
    flat: Tensor
    """Listed keys among the keys of all maps, (z * R * n,)."""
    bias: Tensor | None
    """(z, R, n)"""


class _Lists:
    """All maps of a call, Z = B * Hkv of them."""

    def __init__(self, query: Tensor, key: Tensor, bias: Tensor | None, k: int) -> None:
        self.rows, self.columns, self.k = *key.shape[2:4], k
        self.Z, self.heads, self.group = key.shape[0] * key.shape[1], key.shape[1], query.shape[1] // key.shape[1]
        self.keys, self.relative = _lists(self.rows, self.columns, k)
        self.N, self.n = self.keys.shape
        self.R = self.group * self.N
        # (Hkv, R, n): every map of a head has the same
        self.bias = None if bias is None else bias.flatten(1)[:, self.relative].view(self.heads, self.R, self.n)

    def maps(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, rows, columns, X) as (Z, R or N, X)"""
        return t.to(dtype).reshape(self.Z, -1, t.shape[-1])

    def __iter__(self) -> Iterator[_Maps]:
        size = max(1, _CHUNK * torch.get_num_threads() // (self.R * self.n))
        for start in range(0, self.Z, size):
            z = torch.arange(start, min(start + size, self.Z), dtype=torch.int32)
            offset = (z - start) * self.N
            flat = (self.keys.repeat(self.group, 1) + offset[:, None, None]).view(-1)
            bias = None if self.bias is None else self.bias.index_select(0, z % self.heads)
            yield _Maps(slice(start, start + len(z)), flat, bias)

    def transposed(self, maps: int) -> Transposed:
        entries, starts = _transposed(self.rows, self.columns, self.k, self.group)
        offset = torch.arange(maps, dtype=torch.int64)[:, None] * len(entries)
        ends = torch.tensor([maps * len(entries)])
        return Transposed((entries + offset).view(-1), torch.cat([(starts[:-1] + offset).view(-1), ends]))


def _scores(maps: _Maps, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """To base 2: (z, R, n)."""
    scores = scores_at(query[maps.at], key[maps.at], maps.flat).mul_(scale * _LOG2E)
    return scores if maps.bias is None else scores.add_(maps.bias, alpha=_LOG2E)


def neighborhood(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of attention to the k x k neighbours of every pixel."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    out, lse = query.new_empty((*query.shape[:4], value.shape[4])), query.new_empty(query.shape[:4], dtype=dtype)
    if query.numel() == 0:
        return out, lse
    lists = _Lists(query, key, bias, kernel_size)
    queries, keys, values = (lists.maps(t, dtype) for t in (query, key, value))
    outs, lses = out.view(lists.Z, lists.R, -1), lse.view(lists.Z, lists.R, 1)
    for maps in lists:
        weights = _scores(maps, queries, keys, scale)
        top = weights.amax(-1, keepdim=True)
        total = weights.sub_(top).exp2_().sum(-1, keepdim=True)
        outs[maps.at] = weighted_rows(maps.flat, values[maps.at], weights).div_(total)
        lses[maps.at] = total.log2_().add_(top).mul_(_LN2)
    return out, lse


def neighborhood_backward(
    d_out: Tensor,
    delta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    kernel_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`delta` is the row sum of d_out * out, less the gradient of lse. Without bias its gradient is empty."""
    gradients = [torch.zeros(t.shape, dtype=t.dtype) for t in (query, key, value)]
    d_bias = lse.new_zeros(0 if bias is None else bias.shape)
    if query.numel() == 0:
        return *gradients, d_bias  # type: ignore[return-value]
    lists = _Lists(query, key, bias, kernel_size)
    tensors = [lists.maps(t, lse.dtype) for t in (query, key, value, d_out, delta[..., None], lse[..., None])]
    d_query, d_key, d_value = (t.view(lists.Z, -1, t.shape[-1]) for t in gradients)
    d_biases = lse.new_zeros(lists.heads, lists.R, lists.n) if bias is not None else None
    for maps in lists:
        queries, keys, values, d_outs, deltas, lses = (t[maps.at] for t in tensors)
        weights = _scores(maps, tensors[0], tensors[1], scale).sub_(lses, alpha=_LOG2E).exp2_()
        d_scores = scores_at(d_outs, values, maps.flat).sub_(deltas).mul_(weights)
        by_key = lists.transposed(len(queries))
        d_value[maps.at] = summed_by_key(by_key, d_outs.flatten(0, 1), weights.view(-1), lists.n).view(values.shape)
        if d_biases is not None:
            d_biases.index_add_(0, torch.arange(maps.at.start, maps.at.stop) % lists.heads, d_scores)
        d_scores.mul_(scale)
        d_query[maps.at] = weighted_rows(maps.flat, keys, d_scores)
        d_key[maps.at] = summed_by_key(by_key, queries.flatten(0, 1), d_scores.view(-1), lists.n).view(keys.shape)
    if d_biases is not None:
        places = lists.relative.view(-1).long().expand(len(d_bias), -1)
        d_bias.flatten(1).scatter_add_(1, places, d_biases.view(len(d_bias), -1))
    return *gradients, d_bias  # type: ignore[return-value]
