"""stencil_blend on CPUs: planes laid end to end with zeros between, so that every tap is one flat vector addition.

A plane of H x W is kept as H + 1 rows of W + 1, the last of each zero: the zero right of one row is the zero left of
the next. All neighbours of all pixels are then a slice of one flat vector, and a correlation is a few in-place
additions at full vector width. Separable kernels (Sobel, Scharr, their blends) need 3 additions instead of 5, zeros
none. Roots are taken as 1 / rsqrt, which torch vectorises itself: `sqrt` costs more where it goes through a vendor's
library.

Planes are processed in chunks, large enough that calling torch costs little beside its work, and small enough that the
handful of vectors in use stays in the cache that cores share. Vectors begin at a multiple of 64 bytes, which spares the
processor reads across two cache lines.
"""

import torch
from torch import Tensor

_CHUNK = 100_000  # numbers in one workspace vector, per thread
_SUMMED = 32_000  # numbers summed without float64 on the way to a small gradient: more of them are less exact
_ALIGNED = 16  # numbers; at least 64 bytes in the dtypes computed with

Taps = list[tuple[int, float]]
"""Offset in the flat vector and coefficient of each neighbour that counts; the first coefficient is 1."""


class _Planes:
    """Zero-separated planes in one flat vector with a zero margin at both ends.

    Only what is asked for is zero, margins or all; the rest is whatever memory held.
    """

    def __init__(self, flat: Tensor, shape: torch.Size) -> None:
        planes, H, W = shape
        self.flat, self.margin, self.size = flat, _margin(W), planes * (H + 1) * (W + 1)
        self.vector = self.at(0)
        strides = ((H + 1) * (W + 1), W + 1, 1)
        self.pixels = flat.as_strided(shape, strides, flat.storage_offset() + self.margin)

    def at(self, offset: int, reach: int = 0) -> Tensor:
        """Every position's neighbour at `offset`; `reach` extends the vector into the margins."""
        start = self.margin + offset - reach
        return self.flat[start : start + self.size + 2 * reach]


def _margin(W: int) -> int:
    """The farthest that taps reach, W + 2, and on to where vectors are read fastest."""
    return -(-(W + 2) // _ALIGNED) * _ALIGNED


class _Stencil:
    """A 3x3 kernel as scale times one pass of taps, or two if it is separable.

    The longer one comes first: adding the last to what is there already costs one operation for each of its taps.
    """

    def __init__(self, kernel: Tensor, row: int) -> None:
        values: list[list[float]] = kernel.tolist()
        i, j = max(((a, b) for a in range(3) for b in range(3)), key=lambda at: abs(values[at[0]][at[1]]))
        self.scale = values[i][j] or 1.0
        k = [[value / self.scale for value in line] for line in values]
        column, line = [k[a][j] for a in range(3)], k[i]
        rest = max(abs(k[a][b] - column[a] * line[b]) for a in range(3) for b in range(3))
        if rest <= 4 * torch.finfo(kernel.dtype).eps:  # separable but for rounding
            down = _largest_first([((a - 1) * row, column[a]) for a in range(3)])
            across = _largest_first([(b - 1, line[b]) for b in range(3)])
            self.passes = sorted([down, across], key=len, reverse=True)
        else:
            self.passes = [_largest_first([((a - 1) * row + b - 1, k[a][b]) for a in range(3) for b in range(3)])]


def _largest_first(taps: Taps) -> Taps:
    taps = sorted(taps, key=lambda tap: -abs(tap[1]))
    return [tap for tap in taps if tap[1] != 0] or taps[:1]


class _Correlation:
    """A stencil between two workspaces: the vectors are sliced once and used for every chunk."""

    def __init__(self, stencil: _Stencil, source: _Planes, between: _Planes, out: _Planes, *, sign: int = 1) -> None:
        self.steps = []
        for taps, later in zip(stencil.passes, (*stencil.passes[1:], None), strict=True):
            # the second pass reads beyond either end of the first
            reach, target = (0, out) if later is None else (max(abs(offset) for offset, _ in later), between)
            terms = [(source.at(sign * offset, reach), coefficient) for offset, coefficient in taps]
            self.steps.append((terms, target.at(0, reach)))
            source = target

    def run(self) -> None:
        for terms, out in self.steps:
            _write(terms, out)

    def add(self) -> None:
        """On top of what the output holds."""
        for terms, out in self.steps[:-1]:
            _write(terms, out)
        terms, out = self.steps[-1]
        for term, coefficient in terms:
            out.add_(term, alpha=coefficient)


def _write(terms: list[tuple[Tensor, float]], out: Tensor) -> None:
    if len(terms) == 1:
        torch.mul(*terms[0], out=out)
        return
    torch.add(terms[0][0], terms[1][0], alpha=terms[1][1], out=out)
    for term, coefficient in terms[2:]:
        out.add_(term, alpha=coefficient)


class _Gradient:
    """Both correlations of a chunk of planes, in workspaces that serve every chunk of its size.

    g_x and g_y lack their stencil's scale.
    """

    def __init__(self, images: Tensor, kernel_x: Tensor, kernel_y: Tensor) -> None:
        planes, H, W = self.shape = images.shape
        self.length = -(-(planes * (H + 1) * (W + 1)) // _ALIGNED) * _ALIGNED + 2 * _margin(W)
        self.stencil_x, self.stencil_y = _Stencil(kernel_x, W + 1), _Stencil(kernel_y, W + 1)
        self.image = _Planes(kernel_x.new_zeros(self.length), self.shape)
        self.between = self.workspace()
        self.gradients = kernel_x.new_empty(2, self.length)
        self.g_x, self.g_y = (_Planes(flat, self.shape) for flat in self.gradients.unbind())
        self.across = _Correlation(self.stencil_x, self.image, self.between, self.g_x)
        self.down = _Correlation(self.stencil_y, self.image, self.between, self.g_y)

    def workspace(self) -> _Planes:
        return _Planes(self.image.flat.new_empty(self.length), self.shape)

    def run(self, images: Tensor, eps: Tensor, out: Tensor) -> Tensor:
        """Write the squared magnitude to `out`, which may be the vector of g_x."""
        self.image.pixels.copy_(images)
        self.across.run()
        self.down.run()
        g_x, g_y = self.g_x.vector, self.g_y.vector
        torch.addcmul(eps, g_x, g_x, value=self.stencil_x.scale**2, out=out)
        return out.addcmul_(g_y, g_y, value=self.stencil_y.scale**2)


def _chunks(*images: Tensor) -> list[tuple[Tensor, ...]]:
    """Each (N, C, H, W) as the same few chunks of planes, of at most two sizes that differ by one plane."""
    N, C, H, W = images[0].shape
    if images[0].numel() == 0:
        return []
    wanted = round(N * C * (H + 1) * (W + 1) / (_CHUNK * torch.get_num_threads()))
    chunks = max(1, min(N * C, wanted))
    return list(zip(*(t.reshape(N * C, H, W).tensor_split(chunks) for t in images), strict=True))


def forward(x: Tensor, kernel_x: Tensor, kernel_y: Tensor, edge: Tensor, keep: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    share, floor, work = keep.item(), edge.new_tensor(eps), None
    for images, result in _chunks(x, out):
        if work is None or work.shape != images.shape:
            work = _Gradient(images, kernel_x, kernel_y)
        magnitude = work.run(images, floor, work.g_x.vector).rsqrt_()
        torch.div(edge, magnitude, out=magnitude)
        torch.add(work.g_x.pixels, images, alpha=share, out=result)
    return out


class _Reverse(_Gradient):
    """The gradients of a chunk of planes.

    With s the scale of a stencil and g what it gives without it, m^2 = eps + s_x^2 g_x^2 + s_y^2 g_y^2, and what flows
    back through the taps is edge * d / m * s^2 * g.
    """

    def __init__(self, images: Tensor, kernel_x: Tensor, kernel_y: Tensor, eps: float, *, kernels_too: bool) -> None:
        super().__init__(images, kernel_x, kernel_y)
        margin, row = self.image.margin, self.shape[2] + 1
        # transposed taps would carry what is not zero in a margin, or between planes, into a plane
        self.gradients[:, :margin].zero_()
        self.gradients[:, margin + self.image.size :].zero_()
        self.share = _Planes(torch.zeros_like(self.image.flat), self.shape)
        self.square = self.d_image = self.workspace()  # the second is needed when the first no longer is
        self.spread_x = _Correlation(self.stencil_x, self.g_x, self.between, self.d_image, sign=-1)
        self.spread_y = _Correlation(self.stencil_y, self.g_y, self.between, self.d_image, sign=-1)
        self.flows = [(self.g_x.vector, self.stencil_x.scale), (self.g_y.vector, self.stencil_y.scale)]
        self.pieces = []
        for i in range(0, self.image.size if kernels_too else 0, _SUMMED):
            end = min(i + _SUMMED, self.image.size)
            near = [self.image.at(a * row + b)[i:end] for a in (-1, 0, 1) for b in (-1, 0, 1)]
            self.pieces.append((self.gradients[:, margin + i : margin + end], near))
        self.eps, self.zero = kernel_x.new_tensor(eps), kernel_x.new_zeros(())

    def backward(self, images: Tensor, d: Tensor, edge: float, keep: float, out: Tensor) -> list[Tensor]:
        """Write the gradient of `images` to `out`; returns those of edge and keep, and perhaps of both kernels."""
        square, share = self.run(images, self.eps, self.square.vector), self.share.vector
        torch.rsqrt(square, out=self.between.vector)
        torch.mul(self.between.pixels, d, out=self.share.pixels)
        sums = [_dot(share, square), _dot(*(t.to(square.dtype).reshape(-1) for t in (d, images)))]
        for g, scale in self.flows:
            torch.addcmul(self.zero, g, share, value=edge * scale**2, out=g)
        if self.pieces:
            by_piece = [torch.stack([torch.mv(flows, near) for near in nine], 1) for flows, nine in self.pieces]
            by_tap = torch.stack(by_piece).sum(0, dtype=torch.float64)
            sums += [taps.view(3, 3) / scale for taps, (_, scale) in zip(by_tap, self.flows, strict=True)]
        self.spread_x.run()
        self.spread_y.add()
        torch.add(self.d_image.pixels, d, alpha=keep, out=out)
        return sums


def _dot(a: Tensor, b: Tensor) -> Tensor:
    pieces = zip(a.split(_SUMMED), b.split(_SUMMED), strict=True)
    return torch.stack([torch.dot(*piece) for piece in pieces]).sum(dtype=torch.float64)


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
    totals = [t.new_zeros(t.shape, dtype=torch.float64) for t in (edge, keep, kernel_x, kernel_y)]
    edge_share, keep_share, work = edge.item(), keep.item(), None
    for images, d_images, result in _chunks(x, d_out, d_x):
        if work is None or work.shape != images.shape:
            work = _Reverse(images, kernel_x, kernel_y, eps, kernels_too=kernels_too)
        # without kernels there are two sums only
        for total, part in zip(totals, work.backward(images, d_images, edge_share, keep_share, result), strict=False):
            total += part
    d_edge, d_keep, d_kernel_x, d_kernel_y = (total.to(edge.dtype) for total in totals)
    return d_x, d_kernel_x, d_kernel_y, d_edge, d_keep
