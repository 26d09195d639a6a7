"""Which patches of an image that was padded to a square show the border only.

Geometry of Attention Debiasing (Zhao et al., arXiv:2508.17807, and its published code): an image of W by H pixels lies
in the middle of a square; the part of a patch that the content does not cover is its padding ratio.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def padding_ratio(size: tuple[int, int], grid: int) -> Float[Tensor, "g g"]:
    """Share of border in each patch of a grid by grid image, for content of (height, width) pixels; float64."""
    height, width = size
    longest = max(height, width)
    rows = _covered((longest - height) / (2 * longest) * grid, grid)
    columns = _covered((longest - width) / (2 * longest) * grid, grid)
    return 1 - rows[:, None] * columns[None, :]


def _covered(margin: float, grid: int) -> Float[Tensor, "g"]:
    """Share of each patch along one side that lies between the margins, measured in patches."""
    start = torch.arange(grid, dtype=torch.float64)
    return (torch.minimum(start + 1, torch.tensor(grid - margin)) - start.clamp(min=margin)).clamp(0, 1)
