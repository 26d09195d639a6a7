"""local_mix on CPUs: for every cell one small matrix product, weights of its pixels times the cells near it.

The cells near those of a few rows are gathered into a workspace that stays in the cache, for all of them at once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from shared_kernels.local_mix.edges import folded, reach

_CHUNK = 1 << 18  # numbers gathered at once, per thread; one row of cells at least


class _Rows(NamedTuple):
    """Some rows of cells of one image."""

    image: int
    first: int
    last: int


class _Cells:
    """All cells of a call: B images of h x w of them, C channels, n offsets, p = factor^2 pixels each."""

    def __init__(
        self, value: Tensor, logits: Tensor, offsets: list[int], factor: int, softmax: bool, replicate: bool
    ) -> None:
        self.dtype = torch.promote_types(value.dtype, torch.float32)
        self.B, self.h, self.w, self.C = value.shape
        self.n, self.factor = len(offsets) // 2, factor
        self.room_r, self.room_c = reach(offsets)
        self.width = self.w + 2 * self.room_c
        self.padded = self._padded(value, replicate)
        steps = torch.tensor(offsets).view(-1, 2) + torch.tensor([self.room_r, self.room_c])
        self.near = steps @ torch.tensor([self.width, 1])
        rows = max(1, _CHUNK * torch.get_num_threads() // max(1, self.w * self.n * self.C))
        self.rows = min(rows, self.h)
        self.index = (self._first_cells(self.rows)[:, None] + self.near).view(-1)
        self.gathered = torch.empty(len(self.index), self.C, dtype=self.dtype)
        self.weights = logits.to(self.dtype)
        if softmax:
            self.weights = self.weights.softmax(1)
        self.by_cell_weights = self.by_cell(self.weights.permute(0, 2, 3, 1)).contiguous()

    def _padded(self, value: Tensor, replicate: bool) -> Tensor:
        padded = torch.zeros(self.B, self.h + 2 * self.room_r, self.width, self.C, dtype=self.dtype)
        inside = padded[:, self.room_r : self.room_r + self.h, self.room_c : self.room_c + self.w]
        inside.copy_(value)
        if replicate:
            rows = padded[:, self.room_r : self.room_r + self.h]
            rows[:, :, : self.room_c] = rows[:, :, self.room_c : self.room_c + 1]
            rows[:, :, self.room_c + self.w :] = rows[:, :, self.room_c + self.w - 1 : self.room_c + self.w]
            padded[:, : self.room_r] = rows[:, :1]
            padded[:, self.room_r + self.h :] = rows[:, -1:]
        return padded

    def _first_cells(self, rows: int) -> Tensor:
        """Where cells lie in the padded map, counted from the corner of their surroundings."""
        return (torch.arange(rows)[:, None] * self.width + torch.arange(self.w)).view(-1)

    def by_cell(self, pixels: Tensor) -> Tensor:
        """(B, factor * h, factor * w, X) as a view (B, h, w, factor, factor, X)"""
        cells = pixels.unflatten(2, (self.w, self.factor)).unflatten(1, (self.h, self.factor))
        return cells.permute(0, 1, 3, 2, 4, 5)

    def __iter__(self) -> Iterator[_Rows]:
        for image in range(self.B):
            for first in range(0, self.h, self.rows):
                yield _Rows(image, first, min(first + self.rows, self.h))

    def of(self, by_cell: Tensor, at: _Rows) -> Tensor:
        """A chunk of `by_cell` as (cells, p, X), a copy."""
        chunk = by_cell[at.image, at.first : at.last]
        return chunk.to(self.dtype).reshape(-1, self.factor**2, chunk.shape[-1])

    def put(self, by_cell: Tensor, at: _Rows, numbers: Tensor) -> None:
        """Write (cells, p, X) where `of` would read it."""
        target = by_cell[at.image, at.first : at.last]
        target.copy_(numbers.view(target.shape))

    def surroundings(self, at: _Rows) -> Tensor:
        """(cells, n, C)"""
        cells = (at.last - at.first) * self.w
        corner = self.padded[at.image].view(-1, self.C)[at.first * self.width :]
        size = cells * self.n
        out = torch.index_select(corner, 0, self.index[:size], out=self.gathered[:size])
        return out.view(cells, self.n, self.C)

    def scatter(self, target: Tensor, at: _Rows, near: Tensor) -> None:
        """Add (cells, n, C) to the cells near those of a chunk, in a padded map; one offset after another."""
        rows = at.last - at.first
        for k, place in enumerate(self.near.tolist()):
            r, c = divmod(place, self.width)
            part = target[at.image, at.first + r : at.last + r, c : c + self.w]
            part += near[:, k].view(rows, self.w, self.C)


def forward(
    value: Tensor, logits: Tensor, offsets: list[int], factor: int, softmax: bool, replicate: bool
) -> tuple[Tensor, Tensor]:
    B, _, height, width = logits.shape
    out = value.new_empty(B, height, width, value.shape[3])
    wide = torch.promote_types(value.dtype, torch.float32)
    stats = logits.new_empty((2, B, height, width) if softmax else (0,), dtype=wide)
    if out.numel() == 0:
        return out, stats.zero_()
    cells = _Cells(value, logits, offsets, factor, softmax, replicate)
    if softmax:
        torch.amax(logits.to(wide), 1, out=stats[0])
        torch.amax(cells.weights, 1, out=stats[1])  # the weight of the largest logit is 1 / sum
    outs = cells.by_cell(out)
    for at in cells:
        cells.put(outs, at, torch.bmm(cells.of(cells.by_cell_weights, at), cells.surroundings(at)))
    return out, stats


def backward(
    d_out: Tensor,
    value: Tensor,
    logits: Tensor,
    stats: Tensor,  # noqa: ARG001 - softmax is cheap here
    offsets: list[int],
    factor: int,
    softmax: bool,
    replicate: bool,
) -> tuple[Tensor, Tensor]:
    if d_out.numel() == 0:
        d_value, d_logits = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (value, logits))
        return d_value, d_logits
    cells = _Cells(value, logits, offsets, factor, softmax, replicate)
    d_padded, d_weights = torch.zeros_like(cells.padded), torch.empty_like(cells.weights)
    d_by_cell, d_outs = cells.by_cell(d_weights.permute(0, 2, 3, 1)), cells.by_cell(d_out)
    for at in cells:
        weights, d_result = cells.of(cells.by_cell_weights, at), cells.of(d_outs, at)
        cells.scatter(d_padded, at, torch.bmm(weights.mT, d_result))
        cells.put(d_by_cell, at, torch.bmm(d_result, cells.surroundings(at).mT))
    if softmax:
        d_weights = (d_weights - (d_weights * cells.weights).sum(1, keepdim=True)) * cells.weights
    d_value = folded(d_padded, cells.room_r, cells.room_c, replicate)
    return d_value.to(value.dtype).contiguous(), d_weights.to(logits.dtype).contiguous()
