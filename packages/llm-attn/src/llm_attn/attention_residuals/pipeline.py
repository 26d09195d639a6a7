"""Attention Residuals across the ranks of a pipeline: each block is sent to a rank once, and its gradient returns once.

Every layer attends to all earlier blocks, so a chunk of layers needs what all chunks before it made. With interleaved
virtual stages a rank comes to a later chunk with most of that in hand, if it kept it: only what it lacks is sent
(report, section on pipeline communication). In the backward pass gradients gather where a block is kept and go back the
way the block came. This is the bookkeeping of one rank and one micro-batch; sending is the pipeline's.

Decided here: a rank may also keep the blocks that it made itself, which the report's count has sent back to it; that
saves (V - 1) P more for each block of a chunk.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from llm_attn.attention_residuals.blocks import BlockDelta, BlockState

Keep = Literal["none", "received", "all"]


def known_blocks(chunk: int, *, num_ranks: int, layers_per_chunk: int, block_size: int, keep: Keep = "all") -> int:
    """How many blocks, the embedding counted, the rank of chunk `chunk` has before anything is sent to it.

    Chunk c runs on rank c % num_ranks. keep: "none" nothing, "received" what was sent to the rank (the report's
    count), "all" also what it made.
    """
    _check_sizes(num_ranks=num_ranks, layers_per_chunk=layers_per_chunk, block_size=block_size)
    if keep not in get_args(Keep):
        raise ValueError(f"keep must be one of {', '.join(get_args(Keep))}, got {keep!r}")
    last = chunk - num_ranks
    if last < 0 or keep == "none":
        return 0
    layers = (last + 1 if keep == "all" else last) * layers_per_chunk
    return 1 + layers // block_size


def blocks_sent(*, num_ranks: int, virtual_stages: int, blocks_per_chunk: int, keep: Keep) -> int:
    """Blocks that cross a rank boundary in one forward pass, embeddings not counted, by walking through the schedule.

    With P ranks, V stages, C = P V chunks of N blocks: N C (C - 1) / 2 for keep="none", N (P (P - 1) / 2 + (V - 1) P^2)
    for "received".
    """
    _check_sizes(num_ranks=num_ranks, virtual_stages=virtual_stages, blocks_per_chunk=blocks_per_chunk)
    sent = 0
    for chunk in range(1, num_ranks * virtual_stages):
        known = known_blocks(chunk, num_ranks=num_ranks, layers_per_chunk=blocks_per_chunk, block_size=1, keep=keep)
        sent += chunk * blocks_per_chunk - max(0, known - 1)
    return sent


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


class BlockCache:
    """The blocks that a rank keeps of one micro-batch, and their gradients. Drop it when the micro-batch ends.

    Forward, for each chunk of the rank: `state = enter(delta)`, run the layers, `delta = leave(state, since)`, where
    `since` is `known_blocks` of the next chunk. The first chunk enters `BlockDelta(0, (embedding,), None, 0)`; the last
    does not leave, its loss has a backward of its own. Backward, the chunks in reverse: `backward(gradients)` with
    those of what was sent, then `gradients()`, those of what was received, for the rank that it came from.
    """

    def __init__(self, block_size: int, *, keep_own: bool = True) -> None:
        self.block_size, self.keep_own = block_size, keep_own
        self._blocks: list[Tensor] = []  # leaves: what later chunks do to them is added up in their .grad
        self._entered: list[tuple[int, int, Tensor | None]] = []
        self._left: list[tuple[int, BlockState]] = []

    def enter(self, delta: BlockDelta) -> BlockState:
        """The state in which the next chunk of this rank begins."""
        if delta.start != len(self._blocks):
            raise ValueError(f"the delta begins at block {delta.start}, but {len(self._blocks)} blocks are kept here")
        self._blocks += [_leaf(block) for block in delta.blocks]
        part = None if delta.part is None else _leaf(delta.part)
        self._entered.append((delta.start, len(self._blocks), part))
        return BlockState(tuple(self._blocks), part, delta.part_layers, self.block_size)

    def leave(self, state: BlockState, since: int) -> BlockDelta:
        """What to send to the rank of the next chunk, which has the first `since` blocks."""
        self._left.append((since, state))
        if self.keep_own:
            self._blocks += [_leaf(block) for block in state.done[len(self._blocks) :]]
        delta = state.delta(since)
        part = None if delta.part is None else delta.part.detach()
        return BlockDelta(since, tuple(block.detach() for block in delta.blocks), part, delta.part_layers)

    def backward(self, gradients: BlockDelta) -> None:
        """Go back through the chunk that left last, given the gradients of what it sent."""
        since, state = self._left.pop()
        received = self._entered[-1][1]
        outputs = [(state.part, gradients.part)] if state.part is not None else []
        for index, block in enumerate(state.done):
            parts = [gradients.blocks[index - since]] if index >= since else []
            if index < received:
                for part in parts:
                    _add_to(block, part)
                continue
            if index < len(self._blocks) and (later := self._blocks[index].grad) is not None:
                parts.append(later)
            if parts:
                outputs.append((block, sum(parts[1:], parts[0])))
        torch.autograd.backward([output for output, _ in outputs], [gradient for _, gradient in outputs])
        del self._blocks[received:]

    def gradients(self) -> BlockDelta:
        """Gradients of what the chunk that entered last was sent; these blocks are forgotten."""
        start, end, part = self._entered.pop()
        blocks = tuple(_gradient(block) for block in self._blocks[start:end])
        del self._blocks[start:]
        return BlockDelta(start, blocks, None if part is None else _gradient(part), 0)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(torch.is_grad_enabled())


def _add_to(leaf: Tensor, gradient: Tensor) -> None:
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
