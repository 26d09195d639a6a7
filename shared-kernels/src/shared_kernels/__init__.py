"""Attention and token operations; see README.md."""

from shared_kernels._backend import backend
from shared_kernels.gates import channel_gate
from shared_kernels.stencil_blend import stencil_blend
from shared_kernels.zones import zonal_histogram

__all__ = ["backend", "channel_gate", "stencil_blend", "zonal_histogram"]
