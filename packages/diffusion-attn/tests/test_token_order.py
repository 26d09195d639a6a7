"""Orders of tokens, and which blocks touch in them."""

import pytest
import torch

from diffusion_attn.token_order import (
    blocks_of_frame,
    gilbert_order,
    inverse_order,
    raster_order,
    tile_order,
    touching_blocks,
)

GRIDS = [(1, 8, 8), (1, 1, 1), (1, 1, 5), (3, 5, 7), (2, 1, 9), (7, 2, 2), (4, 6, 10), (5, 12, 8)]


def places(grid, order):
    return torch.stack(torch.unravel_index(order, grid), 1)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_curve_visits_every_token_once_and_hardly_jumps(grid):
    order = gilbert_order(grid)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1] * grid[2]))
    jumps = places(grid, order).diff(dim=0).abs().sum(1)
    assert jumps.numel() == 0 or jumps.max() <= (1 if all(side % 2 == 0 or side == 1 for side in grid) else 2)
    assert torch.equal(order[inverse_order(order)], torch.arange(order.numel()))


def test_the_curve_of_a_small_square():
    assert gilbert_order((1, 2, 2)).tolist() == [0, 2, 3, 1]


def test_blocks_of_the_curve_are_compact():
    """The spread of a block's tokens in space and time is far below that of rows."""
    grid = (8, 16, 16)

    def spread(order):
        return places(grid, order).float().unflatten(0, (-1, 128)).var(1).sum(1).mean()

    assert spread(gilbert_order(grid)) < 0.5 * spread(raster_order(grid))


def test_tiles_stand_together():
    order = tile_order((2, 4, 6), (1, 2, 3))
    first, second = order[:6], order[6:12]
    assert first.tolist() == [0, 1, 2, 6, 7, 8]
    assert second.tolist() == [3, 4, 5, 9, 10, 11]
    assert sorted(tile_order((3, 5, 7), (2, 2, 2)).tolist()) == list(range(105))


@pytest.mark.parametrize("grid", [(3, 4, 5), (1, 6, 6), (9, 3, 1)])
@pytest.mark.parametrize("make", [gilbert_order, raster_order])
def test_touching_blocks_by_comparing_all_tokens(grid, make):
    order = make(grid)
    at = places(grid, order)
    touch = (at[:, None] - at).abs().amax(-1) <= 1
    block = torch.arange(order.numel()) // 4
    count = int(block.max()) + 1
    expected = torch.zeros(count, count, dtype=torch.bool)
    for i, j in touch.nonzero().tolist():
        expected[block[i], block[j]] = True
    assert torch.equal(touching_blocks(grid, order, 4), expected)
    assert not expected.all()


def test_blocks_that_hold_a_frame():
    order = raster_order((3, 2, 4))
    assert blocks_of_frame((3, 2, 4), order, 5).tolist() == [True, True, False, False, False]
    assert blocks_of_frame((3, 2, 4), order, 5, frame=2).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("grid", [(0, 4, 4), (4, 4)])
def test_grids_without_tokens_are_refused(grid):
    with pytest.raises(ValueError, match="grid must be frames, rows and columns"):
        gilbert_order(grid)


def test_tiles_without_tokens_are_refused():
    with pytest.raises(ValueError, match="tile must be three sides"):
        tile_order((2, 2, 2), (1, 0, 2))
