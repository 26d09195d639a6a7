"""The outputs of earlier layers as Attention Residuals keeps them: closed blocks, and the open partial sum.

States are values: adding an output gives a new state, so a checkpointed layer that runs twice changes nothing. `delta`
and `merge` are for pipelines, where a rank that has the first blocks is sent only the rest.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class BlockDelta:
    """What a receiver that has the first `start` blocks lacks of a state."""

    start: int
    blocks: tuple[Tensor, ...]
    part: Tensor | None
    part_layers: int


@dataclass(frozen=True)
class BlockState:
    """Sources of the next layer: b_0 (the embedding) and the closed blocks, then the partial sum of the open one.

    `block_size` is S, `part_layers` how many outputs `part` sums, 0 where it is None.
    """

    done: tuple[Float[Tensor, "*tokens D"], ...]
    part: Float[Tensor, "*tokens D"] | None
    part_layers: int
    block_size: int

    @classmethod
    def start(cls, embedding: Float[Tensor, "*tokens D"], block_size: int) -> "BlockState":
        """Before the first layer."""
        return cls((embedding,), None, 0, block_size)

    @property
    def num_layers(self) -> int:
        """Outputs added so far."""
        return (len(self.done) - 1) * self.block_size + self.part_layers

    @property
    def sources(self) -> tuple[Float[Tensor, "*tokens D"], ...]:
        """What the next layer attends to."""
        return self.done if self.part is None else (*self.done, self.part)

    def add(self, output: Float[Tensor, "*tokens D"]) -> "BlockState":
        """After one more layer; closes the block when that was its last (equations 5 and 6).

        Sums are kept in the wider of the embedding's and the output's dtype, as the host's residual stream is.
        """
        if self.part is None:
            part = output.to(torch.promote_types(output.dtype, self.done[0].dtype))
        else:
            part = self.part + output
        if self.part_layers + 1 == self.block_size:
            return BlockState((*self.done, part), None, 0, self.block_size)
        return BlockState(self.done, part, self.part_layers + 1, self.block_size)

    def delta(self, since: int) -> BlockDelta:
        """What somebody needs who has the first `since` blocks."""
        if not 0 <= since <= len(self.done):
            raise ValueError(f"since must lie in [0, {len(self.done)}], the number of closed blocks, got {since}")
        return BlockDelta(since, self.done[since:], self.part, self.part_layers)

    def merge(self, delta: BlockDelta) -> "BlockState":
        """The sender's state, from what is here and what it sent. ValueError if blocks between them are missing."""
        if delta.start > len(self.done):
            raise ValueError(f"the delta begins at block {delta.start}, but only {len(self.done)} blocks are here")
        done = (*self.done[: delta.start], *delta.blocks)
        return BlockState(done, delta.part, delta.part_layers, self.block_size)
