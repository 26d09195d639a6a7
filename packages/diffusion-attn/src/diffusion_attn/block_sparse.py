"""Plain block-sparse attention for visual tokens, what the methods here are compared with.

- `topk`: the best share of the blocks by the product of their means, as in most training-free methods;
- `topp`: the fewest blocks whose estimated attention exceeds a mass (SpargeAttn-like, arXiv:2502.18137, without its
  quantisation and its test of how alike the tokens of a block are);
- `sliding_tile`: tiles of space and time that lie in a window around the query's tile (STA-like, arXiv:2502.04507).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_attn.token_order import Grid
from diffusion_attn.visual_attention import TextKeys, attend_blocks
from shared_kernels import BlockLists, select_blocks


@dataclass(frozen=True, kw_only=True)
class BlockSparseConfig:
    """Which blocks are read. Of `density` and `topp`, the larger number of blocks holds."""

    density: float | None = 0.25
    """Share of the key blocks, at least one; None: by `topp` alone."""
    topp: float | None = None
    """Estimated attention that the blocks exceed together; None: by `density` alone."""
    block_size: tuple[int, int] = (128, 128)
    """Queries and keys of a block."""
    order: Literal["gilbert", "raster"] = "gilbert"
    """How tokens are brought into blocks, see `token_order`."""

    def __post_init__(self) -> None:
        """Raises ValueError on values out of range."""
        if self.density is None and self.topp is None:
            raise ValueError("give density, topp or both, got neither")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")
        if self.topp is not None and not 0 <= self.topp <= 1:
            raise ValueError(f"topp must lie in [0, 1], got {self.topp}")
        if min(self.block_size) < 1:
            raise ValueError(f"block_size must be two sizes of at least 1, got {self.block_size}")
        if self.order not in ("gilbert", "raster"):
            raise ValueError(f"order must be 'gilbert' or 'raster', got {self.order!r}")


@dataclass(frozen=True, kw_only=True)
class SlidingTileConfig:
    """A window of tiles. A tile is a block of the sparse attention."""

    tile: Grid = (4, 4, 8)
    """Frames, rows and columns of a tile, 128 tokens by default."""
    window: Grid = (3, 3, 3)
    """Tiles that are read along each axis, odd: as many before a tile as behind it, moved inwards at the ends."""

    def __post_init__(self) -> None:
        """Raises ValueError on values out of range."""
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(f"tile must be frames, rows and columns of at least 1, got {self.tile}")
        if len(self.window) != 3 or min(self.window) < 1 or any(side % 2 == 0 for side in self.window):
            raise ValueError(f"window must be three odd numbers of tiles, got {self.window}")


def block_sparse_attention(
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B H S D"],
    value: Float[Tensor, "B H S E"],
    config: BlockSparseConfig = BlockSparseConfig(),
    *,
    text: TextKeys | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H S E"], BlockLists]:
    """Output of the visual queries, and the blocks that were read."""
    share = None if config.density is None else float(config.density)
    lists = select_blocks(query, key, block_size=config.block_size, topk=share, topp=config.topp, scale=scale)
    return attend_blocks(query, key, value, lists, block_size=config.block_size, text=text, scale=scale), lists


def tile_lists(grid: Grid, config: SlidingTileConfig) -> BlockLists:
    """The tiles that every tile reads, (1, 1, n, m), numbered as `token_order.tile_order` has them.

    ValueError unless tiles divide the grid: a block of the sparse attention has one size.
    """
    if any(side % part for side, part in zip(grid, config.tile, strict=True)):
        raise ValueError(f"tiles of {config.tile} do not divide a grid of {grid}: choose sides that do")
    counts = [side // part for side, part in zip(grid, config.tile, strict=True)]
    ranges = []
    for count, width in zip(counts, config.window, strict=True):
        width = min(width, count)
        first = (torch.arange(count) - width // 2).clamp(0, count - width)
        ranges.append(first[:, None] + torch.arange(width))
    frames, rows, columns = ranges
    number = (frames[:, None, None, :, None, None] * counts[1] + rows[None, :, None, None, :, None]) * counts[2]
    number = number + columns[None, None, :, None, None, :]
    indices = number.reshape(counts[0] * counts[1] * counts[2], -1).to(torch.int32)[None, None]
    return BlockLists(indices, torch.full(indices.shape[:3], indices.shape[3], dtype=torch.int32))
