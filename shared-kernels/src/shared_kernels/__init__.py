"""Attention and token operations; see README.md."""

from shared_kernels.gates import channel_gate
from shared_kernels.zones import zonal_histogram

__all__ = ["channel_gate", "zonal_histogram"]
