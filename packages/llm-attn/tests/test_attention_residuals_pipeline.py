"""Caching blocks across the ranks of a pipeline: counts, and a schedule on two processes against one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_attn.attention_residuals import BlockCache, BlockDelta, BlockState, blocks_sent, known_blocks

RANKS_FILE = Path(__file__).with_name("attention_residuals_ranks.py")


# ---- counts


@pytest.mark.parametrize(("ranks", "virtual"), [(2, 1), (4, 2), (8, 4)])
def test_blocks_sent_are_the_formulas_of_the_report(ranks, virtual):
    chunks = ranks * virtual
    for blocks in (1, 3):
        sent = {
            keep: blocks_sent(num_ranks=ranks, virtual_stages=virtual, blocks_per_chunk=blocks, keep=keep)
            for keep in ("none", "received", "all")
        }
        first = ranks * (ranks - 1) // 2
        assert sent["none"] == blocks * chunks * (chunks - 1) // 2
        assert sent["received"] == blocks * (first + (virtual - 1) * ranks**2)
        assert sent["all"] == blocks * (first + (virtual - 1) * ranks * (ranks - 1))


def test_the_reports_example():
    given = {"num_ranks": 4, "virtual_stages": 2, "blocks_per_chunk": 1}
    assert [blocks_sent(**given, keep=keep) for keep in ("none", "received", "all")] == [28, 22, 18]


@pytest.mark.parametrize("keep", ["none", "received", "all"])
@pytest.mark.parametrize(
    ("ranks", "virtual", "layers_per_chunk", "block_size"), [(4, 2, 2, 2), (3, 3, 4, 2), (2, 3, 2, 3)]
)
def test_deltas_rebuild_the_state_on_every_rank(ranks, virtual, layers_per_chunk, block_size, keep):
    """Walks the schedule with states of numbers; blocks may begin and end anywhere in a chunk."""
    held = [BlockState((), None, 0, block_size) for _ in range(ranks)]
    state, sent = BlockState.start(torch.tensor(-1.0), block_size), 0
    for chunk in range(ranks * virtual):
        known = known_blocks(
            chunk, num_ranks=ranks, layers_per_chunk=layers_per_chunk, block_size=block_size, keep=keep
        )
        delta = state.delta(known)
        sent += len(delta.blocks) - (known == 0) if chunk else 0
        arrived = held[chunk % ranks].merge(delta)
        assert [float(s) for s in arrived.sources] == [float(s) for s in state.sources]
        assert arrived.num_layers == chunk * layers_per_chunk
        state = arrived
        for number in range(layers_per_chunk):
            state = state.add(torch.tensor(float(chunk * layers_per_chunk + number)))
        held[chunk % ranks] = state if keep == "all" else arrived
    if layers_per_chunk % block_size == 0:
        per_chunk = layers_per_chunk // block_size
        assert sent == blocks_sent(num_ranks=ranks, virtual_stages=virtual, blocks_per_chunk=per_chunk, keep=keep)


def test_refused_sizes_and_deltas():
    with pytest.raises(ValueError, match="num_ranks must be at least 1, got 0"):
        blocks_sent(num_ranks=0, virtual_stages=1, blocks_per_chunk=1, keep="all")
    with pytest.raises(ValueError, match="virtual_stages must be at least 1, got 0"):
        blocks_sent(num_ranks=2, virtual_stages=0, blocks_per_chunk=1, keep="all")
    with pytest.raises(ValueError, match="keep must be one of none, received, all, got 'some'"):
        known_blocks(3, num_ranks=2, layers_per_chunk=1, block_size=1, keep="some")
    cache = BlockCache(2)
    with pytest.raises(ValueError, match="begins at block 1, but 0 blocks are kept here"):
        cache.enter(BlockDelta(1, (), None, 0))


# ---- two processes


@pytest.fixture(scope="module")
def schedule():
    spec = importlib.util.spec_from_file_location(RANKS_FILE.stem, RANKS_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ranks(schedule, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, RANKS_FILE, folder], check=True, timeout=300)
    return [torch.load(folder / f"{rank}.pt") for rank in range(schedule.RANKS)]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_two_processes_compute_what_one_does(schedule, ranks, number):
    """Outputs, gradients of embeddings, layers, queries and key norms; and each block crosses once each way."""
    setting = layers, block_size, keep = schedule.SETTINGS[number]
    first, second = (rank[setting] for rank in ranks)
    outs, embedding_grads, parameter_grads = schedule.whole(layers, block_size)
    for mine, theirs in zip(second["outs"], outs, strict=True):
        assert (mine - theirs).abs().max() < 1e-12
    for mine, theirs in zip(first["embeddings"], embedding_grads, strict=True):
        assert theirs.abs().max() > 1e-3
        assert (mine - theirs).abs().max() < 1e-12
    for of_first, of_second, theirs in zip(first["parameters"], second["parameters"], parameter_grads, strict=True):
        assert theirs.abs().max() > 1e-3
        assert (of_first + of_second - theirs).abs().max() < 1e-12
    assert first["left"] == second["left"] == [0] * schedule.MICRO_BATCHES
    forward, backward = (first["blocks"][way] + second["blocks"][way] for way in (0, 1))
    assert forward == backward
    per_chunk, rest = divmod(layers // schedule.CHUNKS, block_size)
    if rest == 0:
        sizes = {"num_ranks": schedule.RANKS, "virtual_stages": schedule.VIRTUAL, "blocks_per_chunk": per_chunk}
        embedding = 1  # to the second rank
        assert forward == schedule.MICRO_BATCHES * (blocks_sent(**sizes, keep=keep) + embedding)
