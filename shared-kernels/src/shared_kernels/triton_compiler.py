"""Compile Triton kernels for a GPU that is not there, and read what they would use of it.

An op's host code runs on meta tensors: types, constants and alignment come from Triton's own binder exactly as at run
time, nothing is allocated, and host code that waits for a value of a tensor fails.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
"""Bytes that one program may have of each target."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel uses."""

    name: str
    shared: int
    """Bytes of shared memory per program."""
    spilled: int
    """Bytes of local memory per thread that registers are spilled to."""


class _TargetOnly:
    """All that the compiler asks of a driver."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:  # noqa: ARG002
        return 0


@contextlib.contextmanager
def compile_only(target: str) -> Iterator[list[Resources]]:
    """Inside, `kernel[grid](...)` compiles for `target` (a key of TARGETS) and launches nothing.

    Yields a list that gets the resources of every kernel called. Raises ValueError on another target.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    compiled: list[Resources] = []
    used: list[JITFunction] = []
    run, active = JITFunction.run, getattr(driver, "_active", None)

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:  # noqa: ARG001
        self.device_caches.clear()
        used.append(self)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(_resources(self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_instead
    driver.set_active(_TargetOnly(TARGETS[target]))
    try:
        yield compiled
    finally:
        JITFunction.run, driver._active = run, active
        for function in used:
            function.device_caches.clear()  # or a later real launch would take a binary for another GPU


def _resources(name: str, kernel: Any) -> Resources:
    spilled = _spilled_amd(kernel) if "amdgcn" in kernel.asm else _spilled_nvidia(kernel)
    return Resources(name=name, shared=kernel.metadata.shared, spilled=spilled)


def _spilled_nvidia(kernel: Any) -> int:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))  # type: ignore[union-attr]


def _spilled_amd(kernel: Any) -> int:
    return 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"]).group(1))  # type: ignore[union-attr]
