"""stencil_blend on CPUs: planes laid end to end with zeros between them, so that every tap is one flat vector addition.

A plane of H x W is kept as H + 1 rows of W + 1, the last of each zero: the zero right of one row is the zero left of the
next. All neighbours of all pixels are then a slice of one flat vector, and a correlation is a few in-place additions at
full vector width, over as many planes at once as stay in the cache. Separable kernels (Sobel, Scharr, their blends) need
3 additions instead of 5, zeros none.
"""

import torch
from torch import Tensor

# floats of one workspace vector per thread: seven of them fill the L2 cache of today's CPUs; torch itself gives a
# second thread work only beyond 32,768 elements
_CHUNK = 24_000

Taps = list[tuple[int, float]]  # (offset in the flat vector, coefficient), the first coefficient 1


class _Planes:
    """P zero-separated planes in one flat vector with a zero margin."""

    def __init__(self, like: Tensor, planes: int, dtype: torch.dtype) -> None:
        H, W = like.shape[-2:]
        self.margin, self.size = W + 2, planes * (H + 1) * (W + 1)
        self.flat = torch.zeros(self.size + 2 * self.margin, dtype=dtype, device=like.device)
        self.pixels = self.at(0).view(planes, H + 1, W + 1)[:, :H, :W]

    def at(self, offset: int, reach: int = 0) -> Tensor:
        """Every position's neighbour at `offset`; `reach` extends the vector into the margin at both ends."""
        start = self.margin + offset - reach
        return self.flat[start : start + self.size + 2 * reach]

    def load(self, images: Tensor) -> None:
        """Copy images in; planes beyond them become zero, so that they add nothing to a sum."""
        self.pixels[: len(images)].copy_(images)
        self.pixels[len(images) :].zero_()


class _Stencil:
    """A 3x3 kernel as scale * (sums over the taps of one pass after the other)."""

    def __init__(self, kernel: Tensor, row: int) -> None:
        k = kernel.tolist()
        i, j = divmod(int(kernel.abs().argmax()), 3)
        self.scale = k[i][j] or 1.0
        column, line = [k[a][j] / self.scale for a in range(3)], [k[i][b] / self.scale for b in range(3)]
        rest = max(abs(k[a][b] / self.scale - column[a] * line[b]) for a in range(3) for b in range(3))
        if rest <= 4 * torch.finfo(kernel.dtype).eps:  # separable but for rounding
            vertical = [((a - 1) * row, column[a]) for a in range(3)]
            self.passes = [_sparse(vertical), _sparse([(b - 1, line[b]) for b in range(3)])]
        else:
            taps = [((a - 1) * row + b - 1, k[a][b] / self.scale) for a in range(3) for b in range(3)]
            self.passes = [_sparse(taps)]

    def bind(self, source: _Planes, between: _Planes, out: _Planes, *, transposed: bool = False) -> "_Correlation":
        """Slice the vectors once; they are used for every chunk."""
        sign = -1 if transposed else 1
        steps = []
        for number, taps in enumerate(self.passes, 1):
            last = number == len(self.passes)
            reach, target = (0, out) if last else (1, between)
            terms = [(source.at(sign * offset, reach), coefficient) for offset, coefficient in taps]
            steps.append((terms, target.at(0, reach)))
            source = target
        return _Correlation(steps)


class _Correlation:
    def __init__(self, steps: list[tuple[list[tuple[Tensor, float]], Tensor]]) -> None:
        self.steps = steps

    def run(self) -> None:
        for terms, out in self.steps:
            (first, coefficient), *rest = terms
            if rest:
                (second, alpha), *rest = rest
                torch.add(first, second, alpha=alpha, out=out)
            else:
                torch.mul(first, coefficient, out=out)
            for term, alpha in rest:
                out.add_(term, alpha=alpha)


def _sparse(taps: Taps) -> Taps:
    """The taps that count, largest first."""
    taps = sorted(taps, key=lambda tap: -abs(tap[1]))
    return [tap for tap in taps if tap[1] != 0] or taps[:1]


class _Gradient:
    """Both correlations of the loaded planes and the square of their magnitude."""

    def __init__(self, x: Tensor, kernel_x: Tensor, kernel_y: Tensor, eps: float) -> None:
        H, W = x.shape[-2:]
        plane = (H + 1) * (W + 1)
        chunks = max(1, round(x.shape[0] * plane / (_CHUNK * torch.get_num_threads())))
        self.planes = -(-x.shape[0] // chunks)
        self.dtype = kernel_x.dtype
        self.like = x
        self.x, self.g_x, self.g_y, self.between, self.square = (self.workspace() for _ in range(5))
        self.stencil_x, self.stencil_y = _Stencil(kernel_x, W + 1), _Stencil(kernel_y, W + 1)
        self.correlate_x = self.stencil_x.bind(self.x, self.between, self.g_x)
        self.correlate_y = self.stencil_y.bind(self.x, self.between, self.g_y)
        self.eps = torch.tensor(eps, dtype=self.dtype, device=x.device)

    def workspace(self) -> _Planes:
        return _Planes(self.like, self.planes, self.dtype)

    def run(self, images: Tensor) -> Tensor:
        """(P, H, W) images to the vector of squares; g_x and g_y lack their stencil's scale."""
        self.x.load(images)
        self.correlate_x.run()
        self.correlate_y.run()
        square, g_x, g_y = self.square.at(0), self.g_x.at(0), self.g_y.at(0)
        torch.addcmul(self.eps, g_x, g_x, value=self.stencil_x.scale**2, out=square)
        return square.addcmul_(g_y, g_y, value=self.stencil_y.scale**2)


def forward(x: Tensor, kernel_x: Tensor, kernel_y: Tensor, edge: Tensor, keep: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    images, results = x.reshape(-1, *x.shape[2:]), out.view(-1, *x.shape[2:])
    gradient = _Gradient(images, kernel_x, kernel_y, eps)
    weight_of_edge, weight_of_x = edge.item(), keep.item()
    for chunk, result in zip(images.split(gradient.planes), results.split(gradient.planes), strict=True):
        gradient.run(chunk).sqrt_().mul_(weight_of_edge)
        torch.add(gradient.square.pixels[: len(chunk)], chunk, alpha=weight_of_x, out=result)
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
    sums = torch.zeros(20, dtype=torch.float64, device=x.device)  # kernel_x, kernel_y, edge, keep
    if x.numel() > 0:
        shape = (-1, *x.shape[2:])
        _backward_chunks(
            d_out.reshape(shape),
            x.reshape(shape),
            d_x.view(shape),
            sums,
            kernel_x,
            kernel_y,
            edge,
            keep,
            eps,
            kernels_too,
        )
    d_kernel_x, d_kernel_y, d_edge, d_keep = sums.to(kernel_x.dtype).split([9, 9, 1, 1])
    return d_x, d_kernel_x.view(3, 3), d_kernel_y.view(3, 3).clone(), d_edge.view(()).clone(), d_keep.view(()).clone()


def _backward_chunks(d_out, x, d_x, sums, kernel_x, kernel_y, edge, keep, eps, kernels_too):
    gradient = _Gradient(x, kernel_x, kernel_y, eps)
    g_x, g_y, image, row = gradient.g_x, gradient.g_y, gradient.x, x.shape[-1] + 1
    d, inverse = gradient.workspace(), gradient.workspace()
    spread_x = gradient.stencil_x.bind(g_x, gradient.between, gradient.square, transposed=True)
    spread_y = gradient.stencil_y.bind(g_y, gradient.between, inverse, transposed=True)
    a, b = edge.item() * gradient.stencil_x.scale, edge.item() * gradient.stencil_y.scale
    neighbours = [image.at((i - 1) * row + j - 1) for i in range(3) for j in range(3)]
    pairs = [(g, n) for g in (g_x.at(0), g_y.at(0)) for n in neighbours] if kernels_too else []
    factors = torch.tensor([a] * 9 + [b] * 9 + [1, 1], dtype=torch.float64)
    for images, d_images, d_result in zip(
        x.split(gradient.planes), d_out.split(gradient.planes), d_x.split(gradient.planes)
    ):
        d.load(d_images)
        square = gradient.run(images)
        share = torch.rsqrt(square, out=inverse.at(0)).mul_(d.at(0))
        d_edge = torch.dot(share, square)
        d_keep = torch.dot(d.at(0), image.at(0))
        g_x.at(0).mul_(share)
        g_y.at(0).mul_(share)
        dots = [torch.dot(g, n) for g, n in pairs]
        if not dots:
            dots = [d_edge.new_zeros(())] * 18
        sums += torch.stack([*dots, d_edge, d_keep])
        spread_x.run()
        spread_y.run()
        result = (
            gradient.square.at(0)
            .mul_(a * gradient.stencil_x.scale)
            .add_(inverse.at(0), alpha=b * gradient.stencil_y.scale)
        )
        torch.add(gradient.square.pixels[: len(images)], d_images, alpha=keep.item(), out=d_result)
    sums *= factors
