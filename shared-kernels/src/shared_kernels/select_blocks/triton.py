"""select_blocks on GPUs: a few rows of scores per program; no sort.

Scores are read as integers of the same order, and the cut of a row is found bit by bit: the largest number such that
what lies at or above it is enough, by count and by mass. What is above the cut is kept, ties with it from the left
while there is room, and a running count of what is kept says where each index goes, in ascending order by itself.
"""

# mypy: disable-error-code=no-untyped-def
import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._tiles import LOG2E, no_float64, target

_COLUMNS = 8192
_TILE = 2048  # scores per program, 16 for each thread of 4 warps


@triton.jit
def _ordered(scores):
    """float32 as uint32 in the same order, both zeros alike."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)


@triton.jit
def select_blocks_kernel(
    scores, forced, indices, counts, H, R, N, width, topk, topp, log2e,
    score_b, score_h, score_r, score_n, forced_b, forced_h, forced_r, forced_n,
    TOPP: tl.constexpr, FORCED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(R, ROWS)
    bh = tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    r, n = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    inside = (rows < R)[:, None] & (columns < N)[None, :]
    at = b * score_b + h * score_h + r * score_r + n * score_n
    value = tl.load(scores + at, mask=inside, other=float("-inf"))
    value = tl.where(value == value, tl.minimum(value, 3.4028234663852886e38), float("-inf"))
    order = _ordered(value)
    weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    if TOPP:
        top = tl.max(value, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(tl.maximum(value - top[:, None], -200.0) * log2e)  # 2 ** -288 is 0
        total = tl.sum(weight, 1)
        weight = weight / tl.where(total == 0.0, 1.0, total)[:, None]
    cut = tl.zeros((ROWS,), tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        higher = cut | bit
        reached = order >= higher[:, None]
        enough = tl.sum(reached.to(tl.int32), 1) >= topk
        if TOPP:
            enough = enough & (tl.sum(tl.where(reached, weight, 0.0), 1) > topp)
        cut = tl.where(enough, higher, cut)
        bit = bit >> 1
    above, ties = order > cut[:, None], order == cut[:, None]
    place = tl.cumsum(ties.to(tl.int32), 1) - 1  # how many ties stand to the left
    room = place < (topk - tl.sum(above.to(tl.int32), 1))[:, None]
    if TOPP:
        mass = tl.sum(tl.where(above, weight, 0.0), 1)
        room = room | (mass[:, None] + place * weight <= topp)
    keep = (above | (ties & room)) & (value > float("-inf"))
    if FORCED:
        at = b * forced_b + h * forced_h + r * forced_r + n * forced_n
        keep = keep | (tl.load(forced + at, mask=inside, other=0) != 0)
    kept = tl.cumsum(keep.to(tl.int32), 1)  # up to and with each column
    count = tl.sum(keep.to(tl.int32), 1)
    first = bh.to(tl.int64) * R
    tl.store(counts + first + rows, count, mask=rows < R)
    names = tl.broadcast_to(columns[None, :], (ROWS, COLUMNS))
    slot = tl.where(keep, kept - 1, count[:, None] + names - kept)  # what is not kept pads the list behind it
    slot = tl.where(inside, slot, width)
    tl.store(indices + (first + r) * width + slot, tl.where(keep, names, -1), mask=slot < width)


def tiles(scores: Tensor) -> dict[str, int]:
    """Rows and columns of a program's tile, and warps for 16 scores a thread."""
    columns = max(16, triton.next_power_of_2(scores.shape[-1]))
    if target(scores) == "interpreter":
        return {"ROWS": 16, "COLUMNS": columns, "num_warps": 4}
    return {"ROWS": max(1, _TILE // columns), "COLUMNS": columns, "num_warps": 4 * max(1, columns // _TILE)}


def forward(scores: Tensor, forced: Tensor | None, topk: int, topp: float | None) -> tuple[Tensor, Tensor]:
    no_float64(scores)
    if scores.shape[-1] > _COLUMNS:
        raise ValueError(f"scores must have at most {_COLUMNS} key blocks on a GPU, got {scores.shape[-1]}")
    B, H, R, n = scores.shape
    width = topk if forced is None and topp is None else n
    indices = torch.empty((B, H, R, width), dtype=torch.int32, device=scores.device)
    counts = torch.empty((B, H, R), dtype=torch.int32, device=scores.device)
    if indices.numel() == 0:
        return indices, counts.zero_()
    tile = tiles(scores)
    mask = scores if forced is None else forced.view(torch.uint8)
    select_blocks_kernel[(B * H * triton.cdiv(R, tile["ROWS"]),)](
        scores, mask, indices, counts, H, R, n, width, topk, 0.0 if topp is None else topp, LOG2E,
        *scores.stride(), *mask.stride(),
        TOPP=topp is not None, FORCED=forced is not None, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return indices, counts
