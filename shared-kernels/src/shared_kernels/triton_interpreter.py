"""Triton kernels on a CPU, in Triton's interpreter, for as long as a `with` lasts.

Setting TRITON_INTERPRET would decide for the whole process at import, and kernels could then not be compiled any more.
Here the kernels of all loaded modules are swapped for interpreted ones and the language is patched once, and everything
is put back. Kernels must widen bfloat16 right after the load: the interpreter keeps it as bit patterns. It also
truncates when it rounds to bfloat16. Not for several threads at once.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
from triton.runtime.jit import JITFunction, mangle_type

_SPACES = (tl, tl.core, tl.math, tl.standard)
_CLASSES = tuple(
    getattr(tl.core, name)
    for name in ("tensor", "dtype", "condition", "tensor_descriptor_base")
    if hasattr(tl.core, name)
)
_create_dot = InterpreterBuilder.create_dot
_active = False


class _Nothing:
    """What the language's patch of every device function becomes: it was patched once for all."""

    @staticmethod
    def restore() -> None: ...


def _widen(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    return _create_dot(self, _widen(a), _widen(b), d, *rest)  # as bit patterns their product would be nonsense


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run the kernels of every loaded `shared_kernels` module in the interpreter; entering it again changes nothing.

    Raises RuntimeError where Triton's interpreter cannot work: Triton before 3.7 with NumPy 2.4 or later.
    """
    global _active
    if _active:
        yield
        return
    if _version(triton.__version__) < (3, 7) and _version(np.__version__) >= (2, 4):
        raise RuntimeError(
            f"the interpreter of Triton {triton.__version__} needs NumPy before 2.4, got {np.__version__}"
        )
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("shared_kernels.")]
    mangle_type(0)  # its first use imports a language that must see the real tl.standard
    before = [(space, dict(vars(space))) for space in (*_SPACES, *modules, *_CLASSES)]
    patch = interpreter._patch_lang
    _active = True
    try:
        _swap_kernels(tl.standard, tl, *modules)  # tl.max, tl.sum, tl.cdiv are kernels too
        InterpreterBuilder.create_dot = _dot
        patch(eval("lambda: 0", {"tl": tl, "core": tl.core}))
        interpreter._patch_lang = lambda _: _Nothing
        yield
    finally:
        _active = False
        interpreter._patch_lang, InterpreterBuilder.create_dot = patch, _create_dot
        _restore(before)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _swap_kernels(*spaces: Any) -> None:
    for space in spaces:
        for name, value in list(vars(space).items()):
            if isinstance(value, JITFunction):
                setattr(space, name, InterpretedFunction(value.fn))


def _restore(before: list[tuple[Any, dict[str, Any]]]) -> None:
    """A module keeps the names the interpreter added, which its cached rewrites need; a class loses them."""
    for space, old in before:
        for name in set(vars(space)) - set(old) if isinstance(space, type) else ():
            delattr(space, name)
        for name, value in old.items():
            if vars(space).get(name) is not value:
                setattr(space, name, value)
