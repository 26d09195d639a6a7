"""Two ranks of a pipeline, each a process, on gloo; run by test_attention_residuals_pipeline.py.

    python attention_residuals_ranks.py FOLDER

writes what each rank computed in every setting to FOLDER. A script of its own, because processes that share a test
module cannot be spawned, and forked ones may not follow a backward pass; so libraries are loaded once.
"""

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

from llm_attn.attention_residuals import (
    BlockCache,
    BlockDelta,
    ResidualStream,
    attention_residuals,
    known_blocks,
)
from llm_attn.attention_residuals.stream import Mixer

WIDTH, TOKENS, EPS = 12, 5, 1e-6
RANKS, VIRTUAL, MICRO_BATCHES = 2, 3, 2
CHUNKS = RANKS * VIRTUAL
SETTINGS = ((12, 2, "all"), (12, 2, "received"), (12, 5, "all"))  # layers, block size, what a rank keeps


def parameters(layers):
    generator = torch.Generator().manual_seed(0)
    shapes = [(layers, WIDTH, WIDTH), (layers + 1, WIDTH), (layers + 1, WIDTH)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) * WIDTH**-0.5 for shape in shapes]
    return [tensor.requires_grad_() for tensor in (drawn[0], drawn[1], 1 + drawn[2])]


def layer(weight):
    return lambda h: torch.tanh(F.rms_norm(h, (WIDTH,), eps=EPS) @ weight)


def embeddings():
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(MICRO_BATCHES, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return [embedding.requires_grad_() for embedding in drawn]


def whole(layers, block_size):
    """Outputs, and gradients of embeddings and parameters, in one process."""
    given, inputs = parameters(layers), embeddings()
    outs = []
    for embedding in inputs:
        outs.append(attention_residuals(embedding, map(layer, given[0]), *given[1:], block_size=block_size, eps=EPS))
        outs[-1].square().sum().backward()
    return [out.detach() for out in outs], [e.grad for e in inputs], [p.grad for p in given]


class Wire:
    """Deltas to and from the other rank, and how many blocks crossed."""

    def __init__(self, other):
        self.other, self.blocks = other, 0

    def send(self, delta):
        part = delta.part is not None
        dist.send(torch.tensor([delta.start, len(delta.blocks), part, delta.part_layers]), self.other)
        for tensor in (*delta.blocks, *([delta.part] if part else [])):
            dist.send(tensor.contiguous(), self.other)
        self.blocks += len(delta.blocks)

    def receive(self):
        head = torch.empty(4, dtype=torch.long)
        dist.recv(head, self.other)
        start, count, part, part_layers = head.tolist()
        tensors = [torch.empty(TOKENS, WIDTH, dtype=torch.float64) for _ in range(count + part)]
        for tensor in tensors:
            dist.recv(tensor, self.other)
        return BlockDelta(start, tuple(tensors[:count]), tensors[count] if part else None, part_layers)


class Rank:
    """One rank of the pipeline: its chunks of layers, a cache for each micro-batch, the wire to the other."""

    def __init__(self, rank, layers, block_size, keep):
        self.rank, self.per_chunk, self.block_size, self.keep = rank, layers // CHUNKS, block_size, keep
        self.weights, queries, key_weights = self.given = parameters(layers)
        self.mixer = Mixer(queries=queries, key_weights=key_weights, eps=EPS)
        self.wire, self.embeddings, self.outs = Wire(1 - rank), embeddings(), []
        self.caches = [BlockCache(block_size, keep_own=keep == "all") for _ in range(MICRO_BATCHES)]

    def forward(self, batch, chunk):
        first = BlockDelta(0, (self.embeddings[batch].detach(),), None, 0)
        state = self.caches[batch].enter(self.wire.receive() if chunk else first)
        stream = ResidualStream.at(state, self.mixer)
        for weight in self.weights[chunk * self.per_chunk : (chunk + 1) * self.per_chunk]:
            stream = stream + layer(weight)(stream.mixed())
        if chunk + 1 == CHUNKS:
            self.outs.append(stream.mixed())
            return
        since = known_blocks(
            chunk + 1, num_ranks=RANKS, layers_per_chunk=self.per_chunk, block_size=self.block_size, keep=self.keep
        )
        self.wire.send(self.caches[batch].leave(stream.state, since))

    def backward(self, batch, chunk):
        cache = self.caches[batch]
        if chunk + 1 == CHUNKS:
            self.outs[batch].square().sum().backward()
        else:
            cache.backward(self.wire.receive())
        gradients = cache.gradients()
        if chunk:
            self.wire.send(gradients)
        else:
            self.embeddings[batch].grad = gradients.blocks[0]


def run(rank, layers, block_size, keep):
    mine = Rank(rank, layers, block_size, keep)
    for batch in range(MICRO_BATCHES):
        for chunk in range(rank, CHUNKS, RANKS):
            mine.forward(batch, chunk)
    forward_blocks = mine.wire.blocks
    for batch in range(MICRO_BATCHES):
        for chunk in reversed(range(rank, CHUNKS, RANKS)):
            mine.backward(batch, chunk)
    return {
        "outs": [out.detach() for out in mine.outs],
        "embeddings": [embedding.grad for embedding in mine.embeddings],
        "parameters": [parameter.grad for parameter in mine.given],
        "blocks": (forward_blocks, mine.wire.blocks - forward_blocks),
        "left": [len(cache._blocks) for cache in mine.caches],
    }


def run_all(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.save({setting: run(rank, *setting) for setting in SETTINGS}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_all, args=(rank, Path(sys.argv[1]))) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))
