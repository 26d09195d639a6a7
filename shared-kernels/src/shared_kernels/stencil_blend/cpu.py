"""stencil_blend on CPUs: planes laid end to end with zeros between, so that every tap is one flat vector addition.

A plane of H x W is kept as H + 1 rows of W + 1, the last of each zero: the zero right of one row is the zero left of
the next. All neighbours of all pixels are then a slice of one flat vector, and a correlation is a few in-place
additions at full vector width, over as many planes at once as stay in the cache. Separable kernels (Sobel, Scharr,
their blends) need 3 additions instead of 5, zeros none. Roots are taken as 1 / rsqrt, which torch vectorises itself:
`sqrt` costs five times as much where it goes through a vendor's library.
"""

import torch
from torch import Tensor

# numbers in one workspace vector per thread: all of them together fit the L2 cache of a core
_CHUNK = 32_000

Taps = list[tuple[int, float]]
"""Offset in the flat vector and coefficient of each neighbour that counts; the first coefficient is 1."""


class _Planes:
    """Zero-separated planes in one flat vector with a zero margin at both ends."""

    def __init__(self, flat: Tensor, planes: int, H: int, W: int) -> None:
        self.flat, self.margin, self.size = flat, W + 2, planes * (H + 1) * (W + 1)
        self.vector = self.at(0)
        self.pixels = self.vector.view(planes, H + 1, W + 1)[:, :H, :W]

    def at(self, offset: int, reach: int = 0) -> Tensor:
        """Every position's neighbour at `offset`; `reach` extends the vector into the margins."""
        start = self.margin + offset - reach
        return self.flat[start : start + self.size + 2 * reach]

    def load(self, images: Tensor) -> None:
        """Copy images in; planes beyond them become zero, so that they add nothing to a sum."""
        self.pixels[: len(images)].copy_(images)
        self.pixels[len(images) :].zero_()


class _Stencil:
    """A 3x3 kernel as scale times one pass of taps, or two if it is separable."""

    def __init__(self, kernel: Tensor, row: int) -> None:
        values = kernel.tolist()
        i, j = divmod(int(kernel.abs().argmax()), 3)
        self.scale: float = values[i][j] or 1.0
        k = [[value / self.scale for value in line] for line in values]
        column, line = [k[a][j] for a in range(3)], k[i]
        rest = max(abs(k[a][b] - column[a] * line[b]) for a in range(3) for b in range(3))
        if rest <= 4 * torch.finfo(kernel.dtype).eps:  # separable but for rounding
            self.passes = [
                _largest_first([((a - 1) * row, column[a]) for a in range(3)]),
                _largest_first([(b - 1, line[b]) for b in range(3)]),
            ]
        else:
            self.passes = [_largest_first([((a - 1) * row + b - 1, k[a][b]) for a in range(3) for b in range(3)])]


def _largest_first(taps: Taps) -> Taps:
    taps = sorted(taps, key=lambda tap: -abs(tap[1]))
    return [tap for tap in taps if tap[1] != 0] or taps[:1]


class _Correlation:
    """A stencil between two workspaces: the vectors are sliced once and used for every chunk."""

    def __init__(self, stencil: _Stencil, source: _Planes, between: _Planes, out: _Planes, *, sign: int = 1) -> None:
        self.steps = []
        for taps in stencil.passes:
            # the second pass reads one position past either end of the first
            reach, target = (0, out) if taps is stencil.passes[-1] else (1, between)
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
    """Both correlations of a chunk of planes and the square of their magnitude, in reused workspaces."""

    def __init__(self, images: Tensor, kernel_x: Tensor, kernel_y: Tensor, eps: float) -> None:
        count, self.H, self.W = images.shape
        plane = (self.H + 1) * (self.W + 1)
        chunks = max(1, round(count * plane / (_CHUNK * torch.get_num_threads())))
        self.planes = -(-count // chunks)
        self.eps = torch.tensor(eps, dtype=kernel_x.dtype, device=images.device)
        flats = self.eps.new_zeros(2, self.planes * plane + 2 * self.W + 4)
        self.g_x, self.g_y = (_Planes(flat, self.planes, self.H, self.W) for flat in flats)
        self.gradients = flats[:, self.W + 2 : -self.W - 2]  # both as the rows of one matrix
        self.image, self.between, self.square = (self.workspace() for _ in range(3))
        self.stencil_x, self.stencil_y = _Stencil(kernel_x, self.W + 1), _Stencil(kernel_y, self.W + 1)
        self.across = _Correlation(self.stencil_x, self.image, self.between, self.g_x)
        self.down = _Correlation(self.stencil_y, self.image, self.between, self.g_y)

    def workspace(self) -> _Planes:
        return _Planes(torch.zeros_like(self.g_x.flat), self.planes, self.H, self.W)

    def run(self, images: Tensor) -> Tensor:
        """The squared magnitude of at most `planes` images; g_x and g_y lack their stencil's scale."""
        self.image.load(images)
        self.across.run()
        self.down.run()
        g_x, g_y, square = self.g_x.vector, self.g_y.vector, self.square.vector
        torch.addcmul(self.eps, g_x, g_x, value=self.stencil_x.scale**2, out=square)
        return square.addcmul_(g_y, g_y, value=self.stencil_y.scale**2)


def forward(x: Tensor, kernel_x: Tensor, kernel_y: Tensor, edge: Tensor, keep: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    images, results = x.reshape(-1, *x.shape[2:]), out.view(-1, *x.shape[2:])
    gradient = _Gradient(images, kernel_x, kernel_y, eps)
    share = keep.item()
    for chunk, result in zip(images.split(gradient.planes), results.split(gradient.planes), strict=True):
        square = gradient.run(chunk)
        torch.div(edge, square.rsqrt_(), out=square)
        torch.add(gradient.square.pixels[: len(chunk)], chunk, alpha=share, out=result)
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
    sums = torch.zeros(2, 10, dtype=torch.float64, device=x.device)  # nine taps of each kernel; edge and keep
    if x.numel() > 0:
        shape = (-1, *x.shape[2:])
        work = _Gradient(x.reshape(shape), kernel_x, kernel_y, eps)
        _sweep_back(work, d_out.reshape(shape), x.reshape(shape), d_x.view(shape), sums, edge, keep, kernels_too)
    sums = sums.to(kernel_x.dtype)
    d_kernel_x, d_kernel_y = sums[:, :9].reshape(2, 3, 3).unbind()
    return d_x, d_kernel_x.clone(), d_kernel_y.clone(), sums[0, 9].clone(), sums[1, 9].clone()


def _sweep_back(
    work: _Gradient,
    d_out: Tensor,
    x: Tensor,
    d_x: Tensor,
    sums: Tensor,
    edge: Tensor,
    keep: Tensor,
    kernels_too: bool,
) -> None:
    """Fill d_x and `sums`, chunk by chunk.

    With s the scale of a stencil and g what it gives without it, m^2 = eps + s_x^2 g_x^2 + s_y^2 g_y^2, and what flows
    back through the taps is edge * d / m * s^2 * g.
    """
    share, d_image = work.workspace(), work.workspace()
    spread_x = _Correlation(work.stencil_x, work.g_x, work.between, d_image, sign=-1)
    spread_y = _Correlation(work.stencil_y, work.g_y, work.between, d_image, sign=-1)
    scales, zero = (work.stencil_x.scale, work.stencil_y.scale), torch.zeros_like(work.eps)
    row, edge_share, keep_share = work.W + 1, edge.item(), keep.item()
    neighbours = [work.image.at(i * row + j) for i in (-1, 0, 1) for j in (-1, 0, 1)] if kernels_too else []
    chunks = zip(x.split(work.planes), d_out.split(work.planes), d_x.split(work.planes), strict=True)
    for images, d_images, result in chunks:
        square, count = work.run(images), len(images)
        # the zeros between planes must stay zero here: a transposed tap would carry them into its neighbours
        share.pixels[count:].zero_()
        inverse = torch.rsqrt(square, out=d_image.vector)
        torch.mul(d_image.pixels[:count], d_images, out=share.pixels[:count])
        sums[0, 9] += torch.mul(share.vector, square, out=inverse).sum()
        sums[1, 9] += torch.mul(d_images.to(square.dtype), images).sum()
        for g, scale in zip((work.g_x.vector, work.g_y.vector), scales, strict=True):
            torch.addcmul(zero, g, share.vector, value=edge_share * scale**2, out=g)
        if neighbours:
            sums[:, :9] += torch.stack([torch.mv(work.gradients, n) for n in neighbours], dim=1)
        spread_x.run()
        spread_y.add()
        torch.add(d_image.pixels[:count], d_images, alpha=keep_share, out=result)
    sums[:, :9] /= torch.tensor(scales, dtype=sums.dtype, device=sums.device)[:, None]
