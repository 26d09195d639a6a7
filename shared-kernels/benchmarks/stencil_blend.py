"""stencil_blend against the eager composition of the same layer."""

import torch
from torch.nn import functional as F

from shared_kernels import stencil_blend

CLAIM = "From 256 images of DFYP's size on, stencil_blend is at least 2.5 times faster than its composition from torch."
SWEEP = {
    "shape": ((64, 9, 32, 32), (256, 9, 32, 32), (8, 3, 224, 224)),
    "kernels": ("sobel", "learned"),
    "pass": ("forward", "forward + backward"),
}
BASELINE = "eager"
TARGET = 2.5
# 64 images fit a core's cache with all temporaries of the eager form, and fixed costs of a call weigh more
TARGET_AT = {"shape": ((256, 9, 32, 32), (8, 3, 224, 224))}
EPS = 1e-6


def make(shape, kernels, **other):
    """DFYP's kernels: Sobel as constants, or its learned mixture of Sobel and Scharr, with gradients."""
    kernel_x = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    if kernels == "learned":
        kernel_x = torch.tensor([[-0.18, 0, 0.18], [-0.53, 0, 0.53], [-0.18, 0, 0.18]]).requires_grad_()
    kernel_y = kernel_x.detach().T.contiguous().requires_grad_(kernels == "learned")
    x, weight = torch.randn(shape, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    return other["pass"], x, kernel_x, kernel_y, weight, torch.randn(shape)


def eager(x, kernel_x, kernel_y, weight):
    """Two depthwise convolutions, magnitude, lerp."""
    channels = x.shape[1]
    across, down = (
        F.conv2d(x, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels) for kernel in (kernel_x, kernel_y)
    )
    return torch.lerp(x, torch.sqrt(across**2 + down**2 + EPS), weight)


def ours(x, kernel_x, kernel_y, weight):
    return stencil_blend(x, kernel_x, kernel_y, weight, eps=EPS)


def through(function):
    def run(inputs):
        which, *arguments, d_out = inputs
        if which == "forward":
            with torch.no_grad():
                return [function(*arguments)]
        out = function(*arguments)
        return [out.detach(), *torch.autograd.grad(out, [a for a in arguments if a.requires_grad], d_out)]

    return run


RIVALS = {"eager": through(eager), "ours": through(ours)}


def check(out):
    for name, mine, theirs in zip(("out", "dx", "dw", "dkx", "dky"), out["ours"], out["eager"], strict=False):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6, name
