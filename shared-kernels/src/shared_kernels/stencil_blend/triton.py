"""stencil_blend on GPUs: one program per tile of one plane, neighbours by masked loads, everything else in registers.

The backward pass is two kernels: the first turns the incoming gradient into what flows into the two correlations and
leaves each program's share of the small gradients in its own row, the second applies the transposed correlations.
Rows are summed by torch, so nothing depends on the order of programs.
"""

# mypy: disable-error-code=no-untyped-def
import torch
import triton
import triton.language as tl
from torch import Tensor

_PARTIALS = 32  # a row of partial sums: 9 of kernel_x, 9 of kernel_y, edge, keep, and padding to a power of two


@triton.jit
def _place(H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """The plane of this program, rows and columns of its tile, and which of them are pixels."""
    tiles_w = tl.cdiv(W, BLOCK_W)
    tiles = tl.cdiv(H, BLOCK_H) * tiles_w
    program = tl.program_id(0)
    tile = program % tiles
    rows = (tile // tiles_w) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = (tile % tiles_w) * BLOCK_W + tl.arange(0, BLOCK_W)
    return program // tiles, rows[:, None], columns[None, :]


@triton.jit
def _load(base, rows, columns, stride_h, stride_w, H, W, DTYPE: tl.constexpr):
    inside = (rows >= 0) & (rows < H) & (columns >= 0) & (columns < W)
    offsets = rows.to(tl.int64) * stride_h + columns.to(tl.int64) * stride_w
    return tl.load(base + offsets, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _correlations(base, kernel_x, kernel_y, rows, columns, stride_h, stride_w, H, W, DTYPE: tl.constexpr):
    """Both correlations of one tile."""
    g_x = tl.zeros((rows.shape[0], columns.shape[1]), DTYPE)
    g_y = tl.zeros((rows.shape[0], columns.shape[1]), DTYPE)
    for tap in tl.static_range(9):
        near = _load(base, rows + (tap // 3 - 1), columns + (tap % 3 - 1), stride_h, stride_w, H, W, DTYPE)
        g_x += near * tl.load(kernel_x + tap)
        g_y += near * tl.load(kernel_y + tap)
    return g_x, g_y


@triton.jit
def stencil_blend_fwd_kernel(
    x, kernel_x, kernel_y, edge, keep, out, C, H, W, stride_n, stride_c, stride_h, stride_w, eps,
    DTYPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    plane, rows, columns = _place(H, W, BLOCK_H, BLOCK_W)
    base = x + (plane // C).to(tl.int64) * stride_n + (plane % C).to(tl.int64) * stride_c
    g_x, g_y = _correlations(base, kernel_x, kernel_y, rows, columns, stride_h, stride_w, H, W, DTYPE)
    magnitude = tl.sqrt(g_x * g_x + g_y * g_y + eps)
    center = _load(base, rows, columns, stride_h, stride_w, H, W, DTYPE)
    result = tl.load(edge) * magnitude + tl.load(keep) * center
    target = out + plane.to(tl.int64) * H * W + rows * W + columns
    tl.store(target, result.to(out.dtype.element_ty), mask=(rows < H) & (columns < W))


@triton.jit
def stencil_blend_bwd_kernel_flows(
    d_out, x, kernel_x, kernel_y, edge, flow_x, flow_y, partials, C, H, W,
    d_stride_n, d_stride_c, d_stride_h, d_stride_w, stride_n, stride_c, stride_h, stride_w, eps,
    DTYPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, KERNELS: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    plane, rows, columns = _place(H, W, BLOCK_H, BLOCK_W)
    n, c = (plane // C).to(tl.int64), (plane % C).to(tl.int64)
    base = x + n * stride_n + c * stride_c
    g_x, g_y = _correlations(base, kernel_x, kernel_y, rows, columns, stride_h, stride_w, H, W, DTYPE)
    magnitude = tl.sqrt(g_x * g_x + g_y * g_y + eps)
    d = _load(d_out + n * d_stride_n + c * d_stride_c, rows, columns, d_stride_h, d_stride_w, H, W, DTYPE)
    center = _load(base, rows, columns, stride_h, stride_w, H, W, DTYPE)
    share = tl.load(edge) * d / magnitude
    g_x, g_y = g_x * share, g_y * share
    pixels = plane.to(tl.int64) * H * W + rows * W + columns
    inside = (rows < H) & (columns < W)
    tl.store(flow_x + pixels, g_x, mask=inside)
    tl.store(flow_y + pixels, g_y, mask=inside)
    own = partials + tl.program_id(0).to(tl.int64) * PARTIALS
    tl.store(own + 18, tl.sum(d * magnitude))
    tl.store(own + 19, tl.sum(d * center))
    if KERNELS:
        for tap in tl.static_range(9):
            near = _load(base, rows + (tap // 3 - 1), columns + (tap % 3 - 1), stride_h, stride_w, H, W, DTYPE)
            tl.store(own + tap, tl.sum(g_x * near))
            tl.store(own + 9 + tap, tl.sum(g_y * near))


@triton.jit
def stencil_blend_bwd_kernel_image(
    d_out, flow_x, flow_y, kernel_x, kernel_y, keep, d_x, C, H, W,
    d_stride_n, d_stride_c, d_stride_h, d_stride_w,
    DTYPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    plane, rows, columns = _place(H, W, BLOCK_H, BLOCK_W)
    n, c = (plane // C).to(tl.int64), (plane % C).to(tl.int64)
    result = _load(d_out + n * d_stride_n + c * d_stride_c, rows, columns, d_stride_h, d_stride_w, H, W, DTYPE)
    result *= tl.load(keep)
    start = plane.to(tl.int64) * H * W
    for tap in tl.static_range(9):
        near_rows, near_columns = rows - (tap // 3 - 1), columns - (tap % 3 - 1)
        result += _load(flow_x + start, near_rows, near_columns, W, 1, H, W, DTYPE) * tl.load(kernel_x + tap)
        result += _load(flow_y + start, near_rows, near_columns, W, 1, H, W, DTYPE) * tl.load(kernel_y + tap)
    target = d_x + start + rows * W + columns
    tl.store(target, result.to(d_x.dtype.element_ty), mask=(rows < H) & (columns < W))


def tiles(H: int, W: int) -> dict[str, int]:
    width = min(triton.next_power_of_2(W), 64)
    return {"BLOCK_H": min(triton.next_power_of_2(H), 1024 // width), "BLOCK_W": width}


def _launch(x: Tensor) -> tuple[int, dict[str, object]]:
    """How many programs cover x, and the constants of every kernel."""
    N, C, H, W = x.shape
    block = tiles(H, W)
    dtype = tl.float64 if x.dtype == torch.float64 else tl.float32
    programs = N * C * triton.cdiv(H, block["BLOCK_H"]) * triton.cdiv(W, block["BLOCK_W"])
    return programs, {**block, "DTYPE": dtype, "num_warps": 4, "enable_fp_fusion": True}


def forward(x: Tensor, kernel_x: Tensor, kernel_y: Tensor, edge: Tensor, keep: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    programs, constants = _launch(x)
    kernel_x, kernel_y = kernel_x.contiguous(), kernel_y.contiguous()
    stencil_blend_fwd_kernel[(programs,)](
        x, kernel_x, kernel_y, edge, keep, out, *x.shape[1:], *x.stride(), eps, **constants
    )
    return out


def backward(
    d_out: Tensor,
    x: Tensor,
    kernel_x: Tensor,
    kernel_y: Tensor,
    edge: Tensor,
    keep: Tensor,
    eps: float,
    kernels_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return d_x, *(torch.zeros_like(t) for t in (kernel_x, kernel_y, edge, keep))  # type: ignore[return-value]
    programs, constants = _launch(x)
    kernel_x, kernel_y = kernel_x.contiguous(), kernel_y.contiguous()
    flow_x, flow_y = kernel_x.new_empty((2, *x.shape))
    partials = kernel_x.new_zeros((programs, _PARTIALS))
    stencil_blend_bwd_kernel_flows[(programs,)](
        d_out, x, kernel_x, kernel_y, edge, flow_x, flow_y, partials, *x.shape[1:], *d_out.stride(), *x.stride(), eps,
        **constants, KERNELS=kernels_too, PARTIALS=_PARTIALS,
    )  # fmt: skip
    stencil_blend_bwd_kernel_image[(programs,)](
        d_out, flow_x, flow_y, kernel_x, kernel_y, keep, d_x, *x.shape[1:], *d_out.stride(), **constants
    )
    sums = partials.sum(0)
    # sums of products with the flow, in which edge is a factor already
    d_kernel_x, d_kernel_y = sums[:18].view(2, 3, 3).unbind()
    return d_x, d_kernel_x.clone(), d_kernel_y.clone(), sums[18].clone(), sums[19].clone()
