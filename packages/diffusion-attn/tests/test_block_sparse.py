"""The baselines: plain block-sparse attention and sliding tiles; and the schedule, which all methods share."""

import logging

import pytest
import torch
from torch.nn import functional as F

from diffusion_attn.block_sparse import BlockSparseConfig, SlidingTileConfig, block_sparse_attention, tile_lists
from diffusion_attn.diffusers.door import Schedule
from diffusion_attn.diffusers.methods import apply_block_sparse, apply_sliding_tile
from diffusion_attn.testing import DoorTests, inputs_of, output_of, tiny_model
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
        (Schedule, {"dense_steps": -1}, "must not be negative"),
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


def sparse(model, **schedule):
    return apply_block_sparse(model, BlockSparseConfig(density=0.2, block_size=(8, 8)), schedule=Schedule(**schedule))


def test_layers_that_stay_dense():
    model, inputs = tiny_model("wan"), inputs_of("wan")
    with sparse(model, dense_layers=(0,)) as handle:
        output_of(model, inputs)
        assert handle.layers_changed == (1,)
        assert handle.densities() == {1: pytest.approx(1 / 9)}
    with pytest.raises(ValueError, match="leaves none of the 2 layers"):
        sparse(model, dense_layers=(0, 1))


def test_steps_that_stay_dense():
    """Both calls of a step are dense, the next step is sparse, and a new picture begins anew."""
    model, inputs = tiny_model("wan"), inputs_of("wan")
    host = {time: output_of(model, inputs | {"timestep": torch.full((2,), time)}) for time in (900.0, 500.0)}
    with sparse(model, dense_steps=1):
        for time, dense in ((900.0, True), (900.0, True), (500.0, False), (900.0, True), (500.0, False)):
            found = output_of(model, inputs | {"timestep": torch.full((2,), time)})
            assert torch.equal(found, host[time]) == dense


def test_short_sequences_stay_dense_and_it_is_said_once(caplog):
    model, inputs = tiny_model("wan"), inputs_of("wan")
    host = output_of(model, inputs)
    with caplog.at_level(logging.WARNING), sparse(model, dense_below=100):
        assert torch.equal(output_of(model, inputs), host)
        output_of(model, inputs)
    assert [record.getMessage() for record in caplog.records] == [
        "attention stays dense: 72 visual tokens are fewer than dense_below=100"
    ]


def test_pictures_side_by_side_in_one_sequence_are_refused():
    model, inputs = tiny_model("flux"), inputs_of("flux")
    ids = inputs["img_ids"].clone()
    ids[0, 1] = 9
    with sparse(model), pytest.raises(ValueError, match="are no grid"):
        output_of(model, inputs | {"img_ids": ids})
