"""Scores of query rows with all their keys on CPUs, one tile after another in one buffer.

A tile is a few rows of one head, or several heads if there is little to do for each, times every key that its rows may
see: a few MiB, so that the passes over it run in cache while the matrix products are large enough. Scores are to base 2
(exp2 takes a quarter of the time of exp), in float32 at least.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared_kernels._visible import visible_keys

HIDDEN = -1e30
"""The score of a key that a row does not see: 2^HIDDEN is 0, and unlike -inf it makes no NaN of a product with 0."""

_FEWEST_ROWS = 32  # of fewer, products with very many keys are slow
_SAFE_EXPONENT = 50.0  # sums of 2^(+-50) neither overflow nor vanish in float32


class Tile(NamedTuple):
    """Heads and rows are slices of the flat (B*H) heads and of the rows, keys the slice that any of the rows sees."""

    heads: slice
    rows: slice
    keys: slice
    query: Float[Tensor, "z r D"]
    key: Float[Tensor, "z n D"]
    scores: Float[Tensor, "z r n"]
    """factor * query . key, HIDDEN where the row may not see the key; lives until the next tile."""


class ScoreTiles:
    """Scores of query (B, H, R, D) with key (B, Hkv, N, D), tile by tile.

    `bounds` (B or 1, R, 2) limits the keys of each row, `key_mask` (B, N) masks keys, NaN in them included. A tile has
    about `size` scores.
    """

    def __init__(
        self,
        query: Float[Tensor, "B H R D"],
        key: Float[Tensor, "B Hkv N D"],
        *,
        factor: float,
        bounds: Int[Tensor, "Bb R 2"] | None = None,
        key_mask: Bool[Tensor, "B N"] | None = None,
        size: int = 1 << 19,
    ) -> None:
        self.B, self.H, self.R, D = query.shape
        self.N, self.group = key.shape[2], self.H // key.shape[1]
        wide = torch.promote_types(query.dtype, torch.float32)
        # in float64, since a factor rounded to float32 is wrong in the same direction everywhere
        scaled = (query.to(torch.float64) * factor).to(wide)
        self.query = scaled.reshape(self.B * self.H, self.R, D).contiguous()
        if key_mask is not None:
            key = key.masked_fill(~key_mask[:, None, :, None], 0)
        self.key = key.to(wide).reshape(self.B * key.shape[1], self.N, D).contiguous()
        self.bounds, self.masked = bounds, None if key_mask is None else ~key_mask
        # the largest score, by Cauchy and Schwarz
        largest = [float(t.norm(dim=-1).amax()) if t.numel() else 0.0 for t in (self.query, self.key)]
        self.small = largest[0] * largest[1] < _SAFE_EXPONENT
        self.heads, self.rows = self._plan(size)
        self.buffer = self.query.new_empty(self.heads * self.rows * self.N)

    def _plan(self, size: int) -> tuple[int, int]:
        rows = max(1, min(self.R, max(_FEWEST_ROWS, size // max(1, self.N))))
        heads = max(1, min(self.B * self.H, size // max(1, rows * self.N))) if rows >= self.R else 1
        return heads, rows

    def __iter__(self) -> Iterator[Tile]:
        for z in range(0, self.B * self.H, self.heads):
            heads = slice(z, min(z + self.heads, self.B * self.H))
            key = self.of_heads(self.key, heads)
            for i in range(0, self.R, self.rows):
                yield self._tile(heads, slice(i, min(i + self.rows, self.R)), key)

    def of_heads(self, tensor: Float[Tensor, "B*Hkv N E"], heads: slice) -> Float[Tensor, "z N E"]:
        """Keys or values of these query heads, without a copy if it is one head or none are shared."""
        first, last = heads.start // self.group, (heads.stop - 1) // self.group + 1
        if self.group == 1 or heads.stop - heads.start == 1:
            return tensor[first:last]
        return tensor[torch.arange(heads.start, heads.stop) // self.group]

    def add_to_keys(self, target: Float[Tensor, "B*Hkv N E"], tile: Tile, weights: Tensor, rows: Tensor) -> None:
        """target += weights^T rows, at the keys of the tile: weights (z, r, n), rows (z, r, E)."""
        z = tile.heads.start // self.group
        if tile.heads.stop - tile.heads.start == 1:
            target[z, tile.keys].addmm_(weights[0].T, rows[0])
            return
        heads = torch.arange(tile.heads.start, tile.heads.stop) // self.group
        target[:, tile.keys].index_add_(0, heads, torch.bmm(weights.mT, rows))

    def _tile(self, heads: slice, rows: slice, key: Tensor) -> Tile:
        bounds = self._bounds_of(heads, rows)
        keys = slice(0, self.N)
        if bounds is not None:
            first, last = int(bounds[..., 0].amin()), int(bounds[..., 1].amax())
            keys = slice(first, max(first, last))
        query, key = self.query[heads, rows], key[:, keys]
        scores = self.space(query.shape[0], query.shape[1], key.shape[1])
        if scores.numel():
            _products(query, key, scores)
            self._hide(scores, heads, keys, bounds)
        return Tile(heads, rows, keys, query, key, scores)

    def space(self, z: int, r: int, n: int) -> Tensor:
        return self.buffer[: z * r * n].view(z, r, n)

    def _bounds_of(self, heads: slice, rows: slice) -> Tensor | None:
        if self.bounds is None:
            return None
        return self.bounds[self._batches(heads, self.bounds.shape[0]), rows]

    def _batches(self, heads: slice, size: int) -> Tensor:
        """Batch of each head; the only one there is, if all share it."""
        return torch.arange(heads.start, heads.stop) // self.H if size > 1 else torch.zeros(1, dtype=torch.int64)

    def _hide(self, scores: Tensor, heads: slice, keys: slice, bounds: Tensor | None) -> None:
        if bounds is not None:
            bounds = (bounds - keys.start).clamp_min(0)
            first, last = int(bounds[..., 0].amax()), int(bounds[..., 1].amin())
            n = scores.shape[2]
            # only the ragged edges of the tile
            for edge in (slice(0, n),) if last < first else (slice(0, min(first, n)), slice(min(last, n), n)):
                if edge.start < edge.stop:
                    seen = visible_keys(bounds - edge.start, edge.stop - edge.start)
                    scores[..., edge].masked_fill_(~seen, HIDDEN)
        if self.masked is not None:
            masked = self.masked[self._batches(heads, self.B), keys]
            scores.masked_fill_(masked[:, None], HIDDEN)


def _products(query: Tensor, key: Tensor, out: Tensor) -> None:
    if query.shape[0] == 1:
        torch.mm(query[0], key[0].T, out=out[0])
    else:
        torch.bmm(query, key.mT, out=out)


def shift(scores: Float[Tensor, "z r n"], small: bool) -> Float[Tensor, "z r"]:
    """Subtract from every row its largest score, in place, and return those.

    If all scores are known to be small, nothing is done and 0 returned: 2^score needs no shift then, and two passes
    over the tile are saved. 0 also for rows without keys.
    """
    if small or scores.shape[2] == 0:
        return scores.new_zeros(scores.shape[:2])
    top = scores.amax(-1)
    top.masked_fill_(top < HIDDEN / 2, 0)
    scores.sub_(top[..., None])
    return top
