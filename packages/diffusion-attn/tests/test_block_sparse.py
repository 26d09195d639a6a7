"""The baselines: plain block-sparse attention and sliding tiles."""

import pytest
import torch
from torch.nn import functional as F

from diffusion_attn.block_sparse import BlockSparseConfig, SlidingTileConfig, block_sparse_attention, tile_lists
from diffusion_attn.diffusers.methods import apply_block_sparse, apply_sliding_tile
from diffusion_attn.testing import DoorTests, output_of
from diffusion_attn.token_order import tile_order
from diffusion_attn.visual_attention import listed_blocks


def test_block_sparse_attention_reads_its_lists():
    query, key, value = (torch.randn(2, 2, 70, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    out, lists = block_sparse_attention(query, key, value, BlockSparseConfig(density=0.3, block_size=(16, 8)))
    mask = listed_blocks(lists, 9).repeat_interleave(16, 2).repeat_interleave(8, 3)[:, :, :70, :70]
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(query, key, value, attn_mask=mask), atol=1e-5, rtol=0
    )
    assert (lists.counts == 2).all()


def test_by_mass_rows_read_different_numbers_of_blocks():
    query, key, value = (3 * torch.randn(1, 2, 128, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    _, lists = block_sparse_attention(query, key, value, BlockSparseConfig(density=None, topp=0.6, block_size=(8, 8)))
    assert lists.counts.unique().numel() > 1


def test_tiles_around_the_own_one():
    """Every tile reads those at most one away, moved inwards at the ends, so that all read as many."""
    grid, config = (4, 6, 8), SlidingTileConfig(tile=(2, 2, 2), window=(1, 3, 3))
    lists = tile_lists(grid, config)
    assert lists.indices.shape == (1, 1, 2 * 3 * 4, 9)
    centres = (
        torch.stack(torch.unravel_index(tile_order(grid, config.tile), grid), 1).float().unflatten(0, (-1, 8)).mean(1)
    )
    inner = next(n for n, at in enumerate(centres.tolist()) if at == [0.5, 2.5, 2.5])
    read = centres[lists.indices[0, 0, inner].long()]
    assert (read[:, 0] == 0.5).all()
    assert sorted(map(tuple, read[:, 1:].tolist())) == [(y, x) for y in (0.5, 2.5, 4.5) for x in (0.5, 2.5, 4.5)]
    assert 0 in lists.indices[0, 0, 0]


def test_a_window_of_all_tiles_is_dense():
    lists = tile_lists((2, 4, 4), SlidingTileConfig(tile=(1, 2, 2), window=(9, 9, 9)))
    assert lists.indices.sort(-1).values[0, 0].tolist() == [list(range(8))] * 8


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (BlockSparseConfig, {"density": None}, "give density, topp or both"),
        (BlockSparseConfig, {"density": 2}, "density must lie in"),
        (BlockSparseConfig, {"topp": 2}, "topp must lie in"),
        (BlockSparseConfig, {"block_size": (8, 0)}, "block_size must be two sizes"),
        (BlockSparseConfig, {"order": "z"}, "order must be"),
        (SlidingTileConfig, {"tile": (2, 2)}, "tile must be"),
        (SlidingTileConfig, {"window": (1, 2, 3)}, "window must be three odd"),
    ],
)
def test_wrong_settings_are_refused(config, wrong, message):
    with pytest.raises(ValueError, match=message):
        config(**wrong)


class TestBlockSparseDoor(DoorTests):
    def apply(self, model):
        return apply_block_sparse(model, BlockSparseConfig(density=0.2, block_size=(8, 8)))

    def neutral(self, model):
        return apply_block_sparse(model, BlockSparseConfig(density=1, block_size=(8, 8)))


class TestSlidingTileDoor(DoorTests):
    def apply(self, model):
        return apply_sliding_tile(model, SlidingTileConfig(tile=(1, 2, 2), window=(1, 1, 1)))

    def neutral(self, model):
        return apply_sliding_tile(model, SlidingTileConfig(tile=(1, 2, 2), window=(3, 3, 3)))

    def test_a_grid_that_tiles_do_not_divide(self):
        model, inputs, _ = self.first()
        with (
            apply_sliding_tile(model, SlidingTileConfig(tile=(1, 3, 2))),
            pytest.raises(ValueError, match="do not divide"),
        ):
            output_of(model, inputs)
