"""local_attention on CPUs: a chain of batched matrix products on one row of blocks after another.

The rows of the map that a row of blocks sees are copied once, columns first: then every window is one run of memory,
and overlapping windows are operands of a batched product as they lie. Workspaces stay in a core's cache. Positions are
a matrix product too: a query's row and column logits times, for every key, the unit vectors of its window row and
column; what flows back through it are the gradients of the logits. A masked row or column of a window is a logit of
-1e30.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_kernels.local_attention.neighborhood_cpu import neighborhood, neighborhood_backward

__all__ = ["backward", "forward", "neighborhood", "neighborhood_backward"]

_CHUNK = 1 << 19  # numbers in the workspaces of a chunk, per thread: 1 MiB of float32
_LONG = 4  # blocks in a row, from which on a row is enough for a chunk
_NEVER = -1e30  # finite, as 0 * -inf in the product back would be NaN
_LOG2E = 1.4426950408889634
_LN2 = 0.6931471805599453

Chunk = tuple[slice, slice, slice]
"""Some batches, key heads and rows of blocks."""


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """How a map of rows x columns keys is cut into n x m blocks.

    B batches, H heads of keys and values, G query heads for each of them.
    """

    rows: int
    columns: int
    block: int
    halo: int
    stride: int
    heads: int

    @property
    def window(self) -> int:
        return self.block + 2 * self.halo

    @property
    def side(self) -> int:
        """Queries along one side of a block."""
        return self.block // self.stride

    @property
    def count(self) -> tuple[int, int]:
        return -(-self.rows // self.block), -(-self.columns // self.block)

    def of_queries(self, t: Tensor) -> Tensor:
        """(B, H * G, rows, columns, X) as (B, H, n, m, G, side, side, X): a view where blocks fill the map."""
        n, m = self.count
        missing = n * self.side - t.shape[2], m * self.side - t.shape[3]
        if any(missing):
            t = F.pad(t, (0, 0, 0, missing[1], 0, missing[0]))
        t = t.unflatten(3, (m, self.side)).unflatten(2, (n, self.side)).unflatten(1, (self.heads, -1))
        return t.permute(0, 1, 3, 5, 2, 4, 6, 7)

    def at_window(self, relative: Tensor, axis: int, step: int) -> Tensor:
        """`of_queries` of logits by relative position (.., 2w - 1), as a view by position in the window (.., w).

        Query i of a block meets window position a at relative position a - step * i + w - 1, so a step in i is a step
        back.
        """
        shape, strides = list(relative.shape), list(relative.stride())
        strides[5 + axis] -= step * strides[-1]
        shape[-1] = self.window
        offset = relative.storage_offset() + (self.window - 1) * strides[-1]
        return relative.as_strided(shape, strides, offset)

    def windows(self, padded: Tensor) -> Tensor:
        """The overlapping windows of padded maps as a view, columns before rows.

        (B, H, n * block + 2 * halo, m * block + 2 * halo, X) as (B, H, n, m, w, w, X).
        """
        b, h, r, c, x = padded.stride()
        shape = *padded.shape[:2], *self.count, self.window, self.window, padded.shape[-1]
        return padded.as_strided(shape, (b, h, self.block * r, self.block * c, c, r, x))

    def add_windows(self, target: Tensor, windows: Tensor) -> None:
        """Sum windows (any shape) into the padded map of which `target` (B, H, n, m, w, w, X) is a view.

        Windows so far apart that they do not overlap are added in one go.
        """
        windows = windows.view(target.shape)
        apart = -(-self.window // self.block)
        for i, j in itertools.product(range(apart), repeat=2):
            target[:, :, i::apart, j::apart] += windows[:, :, i::apart, j::apart]

    def room(self, like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """For results of all queries of whole blocks: (B, H * G, n * side, m * side, width)."""
        n, m = self.count
        return like.new_empty(*like.shape[:2], n * self.side, m * self.side, width, dtype=dtype)

    def zeros(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A padded map for the gradients of one: (B, H, n * block + 2 * halo, m * block + 2 * halo, X)."""
        sides = [k * self.block + 2 * self.halo for k in self.count]
        return like.new_zeros(*like.shape[:2], *sides, like.shape[-1], dtype=dtype)

    def inside(self, padded: Tensor) -> Tensor:
        h = self.halo
        return padded[..., h : h + self.rows, h : h + self.columns, :]

    def masks(self, axis: int, masked: bool, dtype: torch.dtype) -> Tensor:
        """(n or m, w): what a row or column of each window adds to its scores.

        Past the end of a map that the blocks do not fill, positions are never keys.
        """
        size, count = (self.rows, self.columns)[axis], self.count[axis]
        position = torch.arange(count)[:, None] * self.block - self.halo + torch.arange(self.window)
        low, high = (0, size) if masked else (-self.halo, size + self.halo)
        if count * self.block > size:
            high = size
        return torch.zeros(position.shape, dtype=dtype).masked_fill_((position < low) | (position >= high), _NEVER)


class _Chunks:
    """One chunk of blocks after another, in workspaces that serve them all.

    Each block has M = G * side^2 queries and N = w^2 keys; Z is the number of blocks in a chunk. Scores are
    multiplied by log2(e), so softmax is to base 2.
    """

    def __init__(
        self,
        blocks: _Blocks,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        logits: list[Tensor],
        step: int,
        masked: bool,
        scale: float,
    ) -> None:
        self.blocks, self.scale, self.dtype = blocks, scale * _LOG2E, torch.promote_types(query.dtype, torch.float32)
        self.query, self.key, self.value = blocks.of_queries(query), key, value
        self.logits = [blocks.at_window(blocks.of_queries(_rows_apart(t)), axis, step) for axis, t in enumerate(logits)]
        masks = [blocks.masks(axis, masked, self.dtype) for axis in (0, 1)]
        self.positions = bool(logits) or any(bool(mask.any()) for mask in masks)
        rows, columns = (mask[:, None, None, None] for mask in masks)
        self.masks = rows[:, None], columns
        w, self.widest = blocks.window, max(query.shape[-1], value.shape[-1])
        self.M, self.N = prod(self.query.shape[4:7]), w * w
        place = torch.arange(self.N)
        self.units = torch.cat([F.one_hot(place % w, w), F.one_hot(place // w, w)], -1).to(self.dtype)
        self.sizes = self._sizes()
        self.workspaces: dict[str, Tensor] = {}
        self.strips: dict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def _sizes(self) -> list[int]:
        """Batches, heads and rows of blocks in a chunk: as many rows as fit, then heads, then batches."""
        B, H, n, m = self.query.shape[:4]
        each = m * (self.M * self.N + (self.M + self.N) * self.widest)
        left, sizes = max(1, _CHUNK * torch.get_num_threads() // each), []
        if m >= _LONG:
            left = 1  # windows of one row of blocks need not be copied
        for available in (n, H, B):
            sizes.append(min(left, available))
            left = max(1, left // available)
        return sizes[::-1]

    def __iter__(self) -> Iterator[Chunk]:
        steps = [
            [slice(i, min(i + size, n)) for i in range(0, n, size)]
            for n, size in zip(self.query.shape[:3], self.sizes, strict=True)
        ]
        yield from itertools.product(*steps)

    def workspace(self, name: str, Z: int, *shape: int) -> Tensor:
        if name not in self.workspaces:
            self.workspaces[name] = torch.empty(prod(self.sizes) * self.query.shape[3], *shape, dtype=self.dtype)
        return self.workspaces[name][:Z]

    def fill(self, name: str, chunk: Tensor, places: int) -> Tensor:
        """Copy a view (B, H, n, m, ..., X) into a workspace (Z, places, X)."""
        workspace = self.workspace(name, prod(chunk.shape[:4]), places, chunk.shape[-1])
        workspace.view(chunk.shape).copy_(chunk)
        return workspace

    def windows(self, name: str, source: Tensor, at: Chunk) -> Tensor:
        """The windows of keys or values, zeros outside the map: (Z, N, X).

        The rows that a row of blocks sees are copied with columns first, so that every window is one run of memory. Of
        a single row of blocks the windows are a view.
        """
        blocks, w = self.blocks, self.blocks.window
        strips, windows = self._strips(name, source.shape[-1], tuple(s.stop - s.start for s in at))
        batch, heads, here = at
        for i in range(here.stop - here.start):
            first = (here.start + i) * blocks.block - blocks.halo
            rows = source[batch, heads, max(first, 0) : first + w].transpose(2, 3)
            top, bottom = max(-first, 0), max(-first, 0) + rows.shape[3]
            strips[:, :, i, blocks.halo : blocks.halo + blocks.columns, top:bottom] = rows
            if bottom - top < w:
                strips[:, :, i, :, :top] = 0
                strips[:, :, i, :, bottom:] = 0
        return windows.reshape(-1, self.N, source.shape[-1])

    def _strips(self, name: str, width: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """For a chunk of such sizes (B, H, n, m * block + 2 * halo, w, X), and the windows in it (B, H, n, m, N, X).

        What lies left and right of the map stays zero.
        """
        if (name, sizes) not in self.strips:
            blocks, m = self.blocks, self.query.shape[3]
            strips = torch.zeros(*sizes, m * blocks.block + 2 * blocks.halo, blocks.window, width, dtype=self.dtype)
            *outer, column, place, x = strips.stride()
            shape, strides = (*sizes, m, self.N, width), (*outer, blocks.block * column, place, x)
            self.strips[name, sizes] = strips, strips.as_strided(shape, strides)
        return self.strips[name, sizes]

    def queries(self, at: Chunk) -> Tensor:
        """(Z, M, D)"""
        return self.fill("query", self.query[at], self.M)

    def scores(self, query: Tensor, key: Tensor, at: Chunk) -> Tensor:
        """To base 2: (Z, M, N)."""
        out = self.workspace("scores", len(query), self.M, self.N)
        if not self.positions:
            return torch.baddbmm(out, query, key.mT, beta=0, alpha=self.scale, out=out)
        w, shape = self.blocks.window, self.query[at].shape[:-1]
        terms = self.workspace("logits", len(query), self.M, 2 * w)
        for axis, term in enumerate(terms.view(*shape, 2, w).unbind(-2)):
            mask = self.masks[axis][at[2]] if axis == 0 else self.masks[axis]
            if self.logits:
                torch.add(self.logits[axis][at], mask, out=term)
            else:
                term.copy_(mask)
        flat = out.view(-1, self.N)
        torch.addmm(flat, terms.view(-1, 2 * w), self.units.T, beta=0, alpha=_LOG2E, out=flat)
        return out.baddbmm_(query, key.mT, alpha=self.scale)


def _rows_apart(logits: Tensor) -> Tensor:
    """The tensor itself if stepping back in its last dimension while going to the next query still goes forward."""
    *_, row, column, last = logits.stride()
    return logits if last == 1 and min(row, column) >= logits.shape[-1] else logits.contiguous()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_logits: Tensor | None,
    column_logits: Tensor | None,
    block: int,
    halo: int,
    stride: int,
    step: int,
    masked: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    blocks = _Blocks(rows=key.shape[2], columns=key.shape[3], block=block, halo=halo, stride=stride, heads=key.shape[1])
    dtype = torch.promote_types(query.dtype, torch.float32)
    out, lse = (blocks.room(query, width, kind) for width, kind in ((value.shape[-1], query.dtype), (1, dtype)))
    if query.numel() > 0:
        logits = [t for t in (row_logits, column_logits) if t is not None]
        chunks = _Chunks(blocks, query, key, value, logits, step, masked, scale)
        out_blocks, lse_blocks = blocks.of_queries(out), blocks.of_queries(lse)
        for at in chunks:
            weights = chunks.scores(chunks.queries(at), chunks.windows("key", key, at), at)
            top = weights.amax(-1, keepdim=True)
            weights.sub_(top).exp2_()
            total = weights.sum(-1, keepdim=True)
            result = torch.bmm(weights, chunks.windows("value", value, at)).div_(total)
            out_blocks[at] = result.view(out_blocks[at].shape)
            lse_blocks[at] = total.log2_().add_(top).mul_(_LN2).view(lse_blocks[at].shape)
    out, lse = (t[:, :, : query.shape[2], : query.shape[3]].contiguous() for t in (out, lse))
    return out, lse.squeeze(-1)


def backward(
    d_out: Tensor,
    delta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_logits: Tensor | None,
    column_logits: Tensor | None,
    lse: Tensor,
    block: int,
    halo: int,
    stride: int,
    step: int,
    masked: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`delta` is the row sum of d_out * out, less the gradient of lse. Without logits their gradients are empty."""
    blocks = _Blocks(rows=key.shape[2], columns=key.shape[3], block=block, halo=halo, stride=stride, heads=key.shape[1])
    logits = [t for t in (row_logits, column_logits) if t is not None]
    d_query = blocks.room(query, query.shape[-1], lse.dtype)
    d_logits = [blocks.room(query, t.shape[-1], lse.dtype).zero_() for t in logits]
    d_maps = [blocks.zeros(t, lse.dtype) for t in (key, value)]
    if query.numel() > 0:
        chunks = _Chunks(blocks, query, key, value, logits, step, masked, scale)
        d_outs, deltas, lses = (blocks.of_queries(t) for t in (d_out, delta[..., None], lse[..., None]))
        d_query_blocks, (d_keys, d_values) = blocks.of_queries(d_query), (blocks.windows(t) for t in d_maps)
        d_terms = [blocks.at_window(blocks.of_queries(t), axis, step) for axis, t in enumerate(d_logits)]
        for at in chunks:
            queries, keys = chunks.queries(at), chunks.windows("key", key, at)
            weights = chunks.scores(queries, keys, at)
            weights.sub_(chunks.fill("lse", lses[at], chunks.M).mul_(_LOG2E)).exp2_()
            d_result = chunks.fill("d_out", d_outs[at], chunks.M)
            blocks.add_windows(d_values[at], torch.bmm(weights.mT, d_result))
            d_scores = chunks.workspace("d_scores", *weights.shape)
            torch.bmm(d_result, chunks.windows("value", value, at).mT, out=d_scores)
            d_scores.sub_(chunks.fill("delta", deltas[at], chunks.M)).mul_(weights)
            d_query_blocks[at] = torch.bmm(d_scores, keys).view(d_query_blocks[at].shape)
            blocks.add_windows(d_keys[at], torch.bmm(d_scores.mT, queries))
            for axis, terms in enumerate(d_terms):
                units = chunks.units[:, axis * blocks.window : (axis + 1) * blocks.window]
                terms[at] = torch.mm(d_scores.view(-1, chunks.N), units).view(terms[at].shape)
    d_query, *d_logits = (t[:, :, : query.shape[2], : query.shape[3]] for t in (d_query, *d_logits))
    d_key, d_value = (blocks.inside(t) for t in d_maps)
    d_rows, d_columns = (t.contiguous() for t in d_logits or (lse.new_empty(0), lse.new_empty(0)))
    d_query = (d_query * scale).to(query.dtype).contiguous()
    d_key = (d_key * scale).to(key.dtype).contiguous()
    return d_query, d_key, d_value.to(value.dtype).contiguous(), d_rows, d_columns
