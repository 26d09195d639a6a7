"""Lists of key blocks: turned round, against a loop, and checked by value."""

import pytest
import torch

from shared_kernels import sparse_attention, transpose_lists
from shared_kernels.sparse_attention import lists as module

B, HEADS, NQ, M, NK = 2, 3, 5, 4, 7


def made():
    generator = torch.Generator().manual_seed(2)
    indices = torch.rand(B, HEADS, NQ, NK, generator=generator).argsort(-1)[..., :M].to(torch.int32)
    counts = torch.randint(0, M + 1, (B, HEADS, NQ), generator=generator, dtype=torch.int32)
    return indices, counts


@pytest.mark.parametrize("sort_each_from", [1 << 15, 1], ids=["as one vector", "list by list"])
@pytest.mark.parametrize("counted", [True, False])
def test_transposed_lists(monkeypatch, sort_each_from, counted):
    monkeypatch.setattr(module, "_RADIX", sort_each_from)
    indices, counts = made()
    padded = indices.where(torch.arange(M) < counts[..., None], -1)
    turned = transpose_lists(indices if counted else padded, counts if counted else None, num_key_blocks=NK)
    assert turned.entries.dtype == turned.starts.dtype == torch.int32
    for b in range(B):
        for h in range(HEADS):
            for block in range(NK):
                start, stop = turned.starts[b, h, block : block + 2]
                named = (padded[b, h].flatten() == block).nonzero().flatten()
                assert turned.entries[b, h, start:stop].tolist() == named.tolist()
            assert sorted(turned.entries[b, h].tolist()) == list(range(NQ * M))


@pytest.mark.parametrize(
    ("entry", "count", "message"),
    [
        (NK, M, r"indices must lie in \[0, 7\) within counts, got 0 to 7"),
        (-1, M, r"indices must lie in \[0, 7\) within counts, got -1 to 6"),
        (3, M + 1, r"counts must lie in \[0, 4\], got 4 to 5"),
        (2, M, "indices must name a key block at most once for each query block, got one twice"),
    ],
)
def test_contents_are_checked_on_request(entry, count, message):
    indices = torch.tensor([0, 2, 5, 6], dtype=torch.int32).expand(1, 1, NQ, M).clone()
    counts = torch.full((1, 1, NQ), M, dtype=torch.int32)
    query = torch.ones(1, 1, 2 * NQ, 8)
    key = torch.ones(1, 1, 3 * NK, 8)
    sparse_attention(query, key, key, indices, counts, block_size=(2, 3), validate=True)
    indices[0, 0, 1, 2], counts[0, 0, 3] = entry, count
    with pytest.raises(ValueError, match=message):
        sparse_attention(query, key, key, indices, counts, block_size=(2, 3), validate=True)


def test_what_is_behind_a_count_is_not_checked():
    indices, counts = made()
    module.check_lists(indices.where(torch.arange(M) < counts[..., None], 99), counts, num_key_blocks=NK)


def test_a_negative_number_of_blocks_is_refused():
    with pytest.raises(ValueError, match="num_key_blocks must be at least 0, got -1"):
        transpose_lists(made()[0], num_key_blocks=-1)
