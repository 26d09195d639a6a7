"""Orders of the tokens of an image or a video in which a block of neighbours in memory is a compact region.

Block-sparse attention treats runs of tokens as one, so it matters which tokens stand together. Row by row, 128 tokens
of a video are a few lines of one frame; along a generalised Hilbert curve (Gilbert; J. Cerveny's construction, used by
Jenga and Rectified SpaAttn, arXiv:2511.19835) they are a small box of space and time.

Decided here: orders are applied to query, key and value inside an attention layer and undone on its output. Attention
is indifferent to the order of keys and carries that of queries along, so nothing else of the model (rotary tables,
ControlNet residuals, per-token time steps) needs to know; it costs four copies of the tokens per layer.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Grid = tuple[int, int, int]
"""Frames, rows and columns of latent tokens; an image has one frame. Tokens are numbered frame by frame, row by row."""

_Vector = tuple[int, int, int]


def gilbert_order(grid: Grid) -> Int[Tensor, "S"]:
    """Token at each place of the curve: a permutation of S = frames * rows * columns. It starts along the columns.

    Neighbours on the curve are one step apart in space or time, two at places where a side is odd.
    """
    _check_grid(grid)
    return _gilbert_order(grid)


@lru_cache(maxsize=32)
def _gilbert_order(grid: Grid) -> Tensor:
    frames, rows, columns = grid
    points = _curve((0, 0, 0), (columns, 0, 0), (0, rows, 0), (0, 0, frames))
    return torch.tensor([(t * rows + y) * columns + x for x, y, t in points])


def raster_order(grid: Grid) -> Int[Tensor, "S"]:
    """Frame by frame, row by row: the order that tokens have in diffusers."""
    _check_grid(grid)
    return torch.arange(grid[0] * grid[1] * grid[2])


def tile_order(grid: Grid, tile: Grid) -> Int[Tensor, "S"]:
    """Tile by tile, inside each row by row: the order of sliding tile attention. Tiles at the ends may be smaller."""
    _check_grid(grid)
    if min(tile) < 1:
        raise ValueError(f"tile must be three sides of at least 1, got {tile}")
    at = _places(grid)
    number = torch.zeros(at.shape[0], dtype=torch.int64)
    for axis in range(3):
        number = number * -(-grid[axis] // tile[axis]) + at[:, axis] // tile[axis]
    return number.argsort(stable=True)


def inverse_order(order: Int[Tensor, "S"]) -> Int[Tensor, "S"]:
    """Place of each token: what undoes `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


@lru_cache(maxsize=32)
def _touching_pairs(grid: Grid) -> Int[Tensor, "2 P"]:
    """Pairs of tokens that touch, corners included (26 in a video), each once."""
    numbers = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    steps = [(t, y, x) for t in (0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1) if (t, y, x) > (0, 0, 0)]
    pairs = []
    for step in steps:
        here, there = numbers, numbers
        for axis, by in enumerate(step):
            size = grid[axis] - abs(by)
            here = here.narrow(axis, max(-by, 0), max(size, 0))
            there = there.narrow(axis, max(by, 0), max(size, 0))
        pairs.append(torch.stack([here.flatten(), there.flatten()]))
    return torch.cat(pairs, 1)


def touching_blocks(grid: Grid, order: Int[Tensor, "S"], block_size: int) -> Bool[Tensor, "N N"]:
    """Which blocks of `block_size` tokens in this order have tokens that touch in space and time; itself among them."""
    block = inverse_order(order) // block_size
    here, there = (block[tokens] for tokens in _touching_pairs(grid))
    count = -(-order.numel() // block_size)
    touching = torch.eye(count, dtype=torch.bool)
    touching[here, there] = True
    touching[there, here] = True
    return touching


def blocks_of_frame(grid: Grid, order: Int[Tensor, "S"], block_size: int, frame: int = 0) -> Bool[Tensor, "N"]:
    """Which blocks hold a token of this frame."""
    count = -(-order.numel() // block_size)
    held = torch.zeros(count, dtype=torch.bool)
    held[inverse_order(order)[_places(grid)[:, 0] == frame] // block_size] = True
    return held


def _places(grid: Grid) -> Int[Tensor, "S 3"]:
    return torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, 3)


def _check_grid(grid: Grid) -> None:
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"grid must be frames, rows and columns of at least 1, got {grid}")


def _curve(p: _Vector, a: _Vector, b: _Vector, c: _Vector) -> Iterator[_Vector]:
    """Points from p through the box that a, b and c span; a is the way it goes in the main."""
    width, height, depth = (abs(sum(side)) for side in (a, b, c))
    da, db, dc = (_signs(side) for side in (a, b, c))
    for long, step, others in (
        (width, da, (height, depth)),
        (height, db, (width, depth)),
        (depth, dc, (width, height)),
    ):
        if others == (1, 1):
            for _ in range(long):
                yield p
                p = _add(p, step)
            return
    a2, b2, c2 = (_half(*side) for side in ((a, width, da), (b, height, db), (c, depth, dc)))
    for start, *box in _parts(p, (a, b, c), (a2, b2, c2), (da, db, dc), (width, height, depth)):
        yield from _curve(start, *box)


def _parts(
    p: _Vector,
    sides: tuple[_Vector, _Vector, _Vector],
    halves: tuple[_Vector, _Vector, _Vector],
    steps: tuple[_Vector, _Vector, _Vector],
    lengths: _Vector,
) -> list[tuple[_Vector, _Vector, _Vector, _Vector]]:
    """The two, three or five boxes that a box is walked through in, with their starts."""
    (a, b, c), (a2, b2, c2), (da, db, dc), (width, height, depth) = sides, halves, steps, lengths
    end_a, rest_a, rest_b, rest_c = _sub(a, da), _sub(a, a2), _sub(b, b2), _sub(c, c2)
    if 2 * width > 3 * height and 2 * width > 3 * depth:
        return [(p, a2, b, c), (_add(p, a2), rest_a, b, c)]
    if 3 * height > 4 * depth:
        turn = _add(p, end_a, _sub(b2, db))
        return [(p, b2, c, a2), (_add(p, b2), a, rest_b, c), (turn, _neg(b2), c, _neg(rest_a))]
    if 3 * depth > 4 * height:
        turn = _add(p, end_a, _sub(c2, dc))
        return [(p, c2, a2, b), (_add(p, c2), a, b, rest_c), (turn, _neg(c2), _neg(rest_a), b)]
    end_c = _sub(c, dc)
    return [
        (p, b2, c2, a2),
        (_add(p, b2), c, a2, rest_b),
        (_add(p, _sub(b2, db), end_c), a, _neg(b2), _neg(rest_c)),
        (_add(p, end_a, b2, end_c), _neg(c), _neg(rest_a), rest_b),
        (_add(p, end_a, _sub(b2, db)), _neg(b2), c2, _neg(rest_a)),
    ]


def _signs(v: _Vector) -> _Vector:
    x, y, z = ((part > 0) - (part < 0) for part in v)
    return x, y, z


def _half(side: _Vector, length: int, step: _Vector) -> _Vector:
    """Half of a side, and one more where that would be odd: only then does a curve through it end beside the rest."""
    x, y, z = (part // 2 for part in side)
    return _add((x, y, z), step) if abs(x + y + z) % 2 and length > 2 else (x, y, z)


def _add(*vectors: _Vector) -> _Vector:
    x, y, z = (sum(parts) for parts in zip(*vectors, strict=True))
    return x, y, z


def _sub(a: _Vector, b: _Vector) -> _Vector:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def _neg(a: _Vector) -> _Vector:
    return -a[0], -a[1], -a[2]
