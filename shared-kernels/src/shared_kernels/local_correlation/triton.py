"""local_correlation on GPUs: a program has some pixels of one map and all, or some, of their offsets in registers.

Channels are added up one after the other; neighbouring threads have neighbouring pixels, so reads are of whole lines
and repeated ones come from the L1 cache. Gradients are sums over the window of the other map, each program owning what
it sums: nothing depends on the order of programs.
"""

# mypy: disable-error-code=no-untyped-def
import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._tiles import no_float64

_PIXELS, _OFFSETS, _CHANNELS = 32, 64, 32


@triton.jit
def local_correlation_fwd_kernel(
    source, target, out, C, H, W, scale, stride_sb, stride_sc, stride_sh, stride_sw,
    stride_tb, stride_tc, stride_th, stride_tw, RADIUS: tl.constexpr, PIXELS: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    SIDE: tl.constexpr = 2 * RADIUS + 1
    b = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    offsets = tl.program_id(1) * OFFSETS + tl.arange(0, OFFSETS)
    y, x = pixels // W, pixels % W
    near_y = y[None, :] + (offsets // SIDE - RADIUS)[:, None]
    near_x = x[None, :] + (offsets % SIDE - RADIUS)[:, None]
    real = (pixels < H * W)[None, :] & (offsets < SIDE * SIDE)[:, None]
    inside = real & (near_y >= 0) & (near_y < H) & (near_x >= 0) & (near_x < W)
    source += b * stride_sb + y.to(tl.int64) * stride_sh + x.to(tl.int64) * stride_sw
    target += b * stride_tb + near_y.to(tl.int64) * stride_th + near_x.to(tl.int64) * stride_tw
    product = tl.zeros((OFFSETS, PIXELS), tl.float32)
    for _ in range(C):
        own = tl.load(source, mask=pixels < H * W, other=0.0).to(tl.float32)
        near = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        product += own[None, :] * near
        source += stride_sc
        target += stride_tc
    place = (b * SIDE * SIDE + offsets.to(tl.int64)[:, None]) * (H * W) + pixels[None, :]
    tl.store(out + place, (product * scale).to(out.dtype.element_ty), mask=real)


@triton.jit
def local_correlation_bwd_kernel(
    d_out, other, gradient, C, H, W, scale, stride_db, stride_dk, stride_dh, stride_dw,
    stride_ob, stride_oc, stride_oh, stride_ow,
    RADIUS: tl.constexpr, MIRRORED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum over the window of d_out times the other map; mirrored, d_out is that of the neighbour's opposite offset."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    b = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    y, x = pixels // W, pixels % W
    d_out, other = d_out + b * stride_db, other + b * stride_ob + channels.to(tl.int64)[:, None] * stride_oc
    result = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for k in range(SIDE * SIDE):
        near_y, near_x = y + k // SIDE - RADIUS, x + k % SIDE - RADIUS
        inside = (pixels < H * W) & (near_y >= 0) & (near_y < H) & (near_x >= 0) & (near_x < W)
        near_y, near_x = near_y.to(tl.int64), near_x.to(tl.int64)
        if MIRRORED:
            flows = d_out + (SIDE * SIDE - 1 - k) * stride_dk + near_y * stride_dh + near_x * stride_dw
        else:
            flows = d_out + k * stride_dk + y.to(tl.int64) * stride_dh + x.to(tl.int64) * stride_dw
        flow = tl.load(flows, mask=inside, other=0.0).to(tl.float32)
        both = inside[None, :] & (channels < C)[:, None]
        near = tl.load(other + (near_y * stride_oh + near_x * stride_ow)[None, :], mask=both, other=0.0)
        result += flow[None, :] * near.to(tl.float32)
    place = (b * C + channels.to(tl.int64)[:, None]) * (H * W) + pixels[None, :]
    real = (pixels < H * W)[None, :] & (channels < C)[:, None]
    tl.store(gradient + place, (result * scale).to(gradient.dtype.element_ty), mask=real)


def forward(source: Tensor, target: Tensor, radius: int, scale: float) -> Tensor:
    no_float64(source)
    (B, C, H, W), offsets = source.shape, (2 * radius + 1) ** 2
    out = torch.empty((B, offsets, H, W), dtype=source.dtype, device=source.device)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(H * W, _PIXELS), triton.cdiv(offsets, _OFFSETS), B)
    local_correlation_fwd_kernel[grid](
        source, target, out, C, H, W, scale, *source.stride(), *target.stride(),
        RADIUS=radius, PIXELS=_PIXELS, OFFSETS=_OFFSETS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def backward(d_out: Tensor, source: Tensor, target: Tensor, radius: int, scale: float) -> tuple[Tensor, Tensor]:
    no_float64(source)
    B, C, H, W = source.shape
    d_source, d_target = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (source, target))
    if source.numel() == 0:
        return d_source, d_target
    grid = (triton.cdiv(H * W, _PIXELS), triton.cdiv(C, _CHANNELS), B)
    for gradient, other, mirrored in ((d_source, target, False), (d_target, source, True)):
        local_correlation_bwd_kernel[grid](
            d_out, other, gradient, C, H, W, scale, *d_out.stride(), *other.stride(),
            RADIUS=radius, MIRRORED=mirrored, PIXELS=_PIXELS, CHANNELS=_CHANNELS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return d_source, d_target
