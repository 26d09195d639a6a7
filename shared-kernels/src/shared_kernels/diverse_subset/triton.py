"""diverse_subset on GPUs: all distances by tensor cores first, then one program per set makes every choice.

The program reads one row of distances per choice (from the L2 cache, for sets of common size), lowers what it keeps
beside it, and takes the arg-maximum in the same sweep. Hundreds of launches per set become two.

A DPP reads all earlier rows of its factor at every step, which wants the whole GPU instead of one program; its loop is
torch's, over all sets at once, without waiting for the GPU.
"""

# mypy: disable-error-code=no-untyped-def
import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._tiles import dot_precision, load_tile, no_float64, strided_rows, target, width

_NOTHING = 1e-5  # see the op's docstring
_SWEEP = 4096  # elements that the choosing program handles at a time
_TILE = 64  # rows and columns of distances
_GRAM, _COSINE, _EUCLIDEAN = 0, 1, 2


@triton.jit
def diverse_subset_kernel_distances(
    x, squared, out, N, D, stride_b, stride_n, KIND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, i, j]: the product of features i and j (KIND 0), 1 - cos (1), or their distance (2)."""
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += b * stride_b
    product = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_D):
        depth = tl.arange(0, BLOCK_D)
        left = load_tile(x + d, rows, depth, stride_n, N, D - d)
        right = load_tile(x + d, columns, depth, stride_n, N, D - d)
        product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
    of_rows = tl.load(squared + b * N + rows, mask=rows < N, other=1.0)[:, None]
    of_columns = tl.load(squared + b * N + columns, mask=columns < N, other=1.0)[None, :]
    if KIND == 1:
        product = tl.maximum(1.0 - product / tl.maximum(tl.sqrt(of_rows) * tl.sqrt(of_columns), 1e-24), 0.0)
    if KIND == 2:
        product = tl.sqrt(tl.maximum(of_rows + of_columns - 2.0 * product, 0.0))
    inside = (rows < N)[:, None] & (columns < N)[None, :]
    tl.store(out + (b * N + rows.to(tl.int64)[:, None]) * N + columns[None, :], product, mask=inside)


@triton.jit
def diverse_subset_kernel_isolation(distance, mask, out, N, BLOCK: tl.constexpr):
    """out[b, i]: the distance of element i to the nearest other allowed one."""
    row, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    nearest = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        allowed = tl.load(mask + b * N + columns, mask=columns < N, other=0) != 0
        others = allowed & (columns != row)
        near = tl.load(distance + (b * N + row) * N + columns, mask=columns < N, other=0.0)
        nearest = tl.minimum(nearest, tl.where(others, near, float("inf")))
    tl.store(out + b * N + row, tl.min(nearest, 0))


@triton.jit
def diverse_subset_kernel_choose(
    distance, weight, start_score, threshold, given, nearest, out, N, F, K,
    THRESHOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every choice of one set. `nearest` holds the distance to the chosen ones, -1 where not to be chosen (again)."""
    b = tl.program_id(0).to(tl.int64)
    weight, start_score, threshold, nearest = weight + b * N, start_score + b * N, threshold + b * N, nearest + b * N
    best, pick = float("-inf"), -1  # -1: nothing is left
    for start in range(0, N, BLOCK):
        elements = start + tl.arange(0, BLOCK)
        allowed = tl.load(nearest + elements, mask=elements < N, other=-1.0) >= 0.0
        score = tl.where(allowed, tl.load(start_score + elements, mask=elements < N, other=0.0), float("-inf"))
        top, at = tl.max(score, 0, return_indices=True)
        pick = tl.where(top > best, start + at, pick)
        best = tl.maximum(best, top)
    for step in range(K):
        if step < F:
            pick = tl.load(given + b * F + step).to(tl.int32)
        tl.store(out + b * K + step, pick)
        row = distance + (b * N + tl.maximum(pick, 0)) * N
        limit = tl.load(threshold + tl.maximum(pick, 0))
        best, following = float("-inf"), -1
        for start in range(0, N, BLOCK):
            elements = start + tl.arange(0, BLOCK)
            near = tl.load(nearest + elements, mask=elements < N, other=-1.0)
            apart = tl.load(row + elements, mask=elements < N, other=0.0)
            out_of_play = (near < 0.0) | (elements == pick)
            if THRESHOLD:
                out_of_play = out_of_play | (apart < limit)
            near = tl.where(out_of_play, -1.0, tl.minimum(near, apart))
            tl.store(nearest + elements, near, mask=elements < N)
            score = tl.load(weight + elements, mask=elements < N, other=0.0)
            if not THRESHOLD:
                score *= near
            top, at = tl.max(tl.where(near < 0.0, float("-inf"), score), 0, return_indices=True)
            following = tl.where(top > best, start + at, following)
            best = tl.maximum(best, top)
        pick = following
        tl.debug_barrier()  # `nearest` is read again, perhaps by other threads


def _distances(x: Tensor, kind: int) -> Tensor:
    """(B, N, N) in float32, see the kernel."""
    B, N, D = x.shape
    x = strided_rows(x)
    squared = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square_()
    out = torch.empty((B, N, N), dtype=torch.float32, device=x.device)
    block = 32 if target(x) == "interpreter" else _TILE  # small samples shall have several
    blocks = triton.cdiv(N, block)
    diverse_subset_kernel_distances[(blocks, blocks, B)](
        x, squared, out, N, D, x.stride(0), x.stride(1), KIND=kind, PRECISION=dot_precision(x),
        BLOCK_N=block, BLOCK_D=min(32, width(D)), num_warps=8, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _volume(gram: Tensor, quality: Tensor, mask: Tensor, given: Tensor, num_kept: int, *, cosine: bool) -> Tensor:
    """Greedy choices of the largest determinant from products of features (B, N, N)."""
    squares = gram.diagonal(dim1=1, dim2=2).masked_fill(~mask, 0)
    inverse = squares.clamp(min=1e-24).rsqrt() if cosine else torch.ones_like(squares)
    residual = (squares > 0).to(gram.dtype) if cosine else squares.clone()
    floor, B, N = _NOTHING * residual, *squares.shape
    factors = gram.new_zeros((B, num_kept, N))
    chosen = torch.empty((B, num_kept), dtype=torch.int64, device=gram.device)
    taken = ~mask
    for step in range(num_kept):
        score = (quality * residual).masked_fill(taken, -torch.inf)
        best, pick = score.max(1, keepdim=True)
        if step < given.shape[1]:
            pick = given[:, step, None]
        else:  # the lowest of equally good ones, which `max` does not promise
            pick = (score == best).to(torch.uint8).argmax(1, keepdim=True)
        chosen[:, step] = pick[:, 0].masked_fill(taken.all(1), -1)
        row = gram.gather(1, pick[..., None].expand(B, 1, N))[:, 0] * inverse * inverse.gather(1, pick)
        at_pick = factors[:, :step].gather(2, pick[:, None].expand(B, step, 1))
        row -= torch.bmm(at_pick.mT, factors[:, :step])[:, 0]
        left = residual.gather(1, pick)
        row = torch.where((left > 0) & mask, row * left.clamp(min=1e-38).rsqrt(), 0)
        factors[:, step] = row
        residual = residual - row.square()
        residual = residual.masked_fill(residual <= floor, 0)
        taken = taken.scatter(1, pick, True)
    return chosen


def forward(
    features: Tensor,
    weight: Tensor,
    mask: Tensor,
    given: Tensor,
    threshold: Tensor | None,
    num_kept: int,
    method: str,
    metric: str,
    isolated: bool,
) -> Tensor:
    no_float64(features)
    B, N, _ = features.shape
    chosen = torch.empty((B, num_kept), dtype=torch.int64, device=features.device)
    if chosen.numel() == 0:
        return chosen
    weight, given = weight.float().contiguous(), given.contiguous()
    if method == "dpp":
        gram = _distances(features, _GRAM)
        return _volume(gram, weight.square(), mask, given, num_kept, cosine=metric == "cosine")
    distance = _distances(features, _COSINE if metric == "cosine" else _EUCLIDEAN)
    nearest = torch.where(mask, torch.inf, -1.0)
    block, start_score = min(_SWEEP, width(N)), weight
    if isolated:
        start_score = torch.empty_like(weight)
        diverse_subset_kernel_isolation[(N, B)](
            distance, mask.contiguous(), start_score, N, BLOCK=min(block, 1024), num_warps=4, enable_fp_fusion=True
        )
    limits = weight if threshold is None else threshold.float().contiguous()
    diverse_subset_kernel_choose[(B,)](
        distance, weight, start_score, limits, given, nearest, chosen, N, given.shape[1], num_kept,
        THRESHOLD=threshold is not None, BLOCK=block, num_warps=8 if block > 1024 else 4, enable_fp_fusion=True,
    )  # fmt: skip
    return chosen
