"""Frozen Gaussian weights of which any rows can be had at any time, so that none are ever stored.

Row m depends on the seed, on m and on the width only: not on how many rows are asked for, in which pieces, or on the
device. Philox is a generator with a counter; each block of 128 rows has a key of its own.
"""

import numpy as np
from jaxtyping import Float

BLOCK = 128
_SEEDS = 2**64


def frozen_normals(seed: int, start: int, stop: int, width: int) -> Float[np.ndarray, "rows width"]:
    """Rows `start` to `stop` of an endless matrix of independent N(0, 1), float64. ValueError on a negative seed."""
    if not 0 <= seed < _SEEDS:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
    first, last = start // BLOCK, -(-stop // BLOCK)
    blocks = [_block(seed, number, width) for number in range(first, last)]
    rows = np.concatenate(blocks) if blocks else np.zeros((0, width))
    return rows[start - first * BLOCK : stop - first * BLOCK]


def _block(seed: int, number: int, width: int) -> np.ndarray:
    key = np.array([seed, number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal((BLOCK, width))
