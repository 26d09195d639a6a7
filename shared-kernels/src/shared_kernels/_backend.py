"""Which implementation of an op runs: the one of the tensor's device, or the one that `backend` forces for a while.

The reference is not looked up here: it is plain differentiable torch and runs in place of the registered op, so an
op's face asks for `forced == "reference"` itself. `cpu` and `triton` are looked up below the registered boundary, at
run time, so a compiled graph obeys `backend` too.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.library import CustomOpDef

Backend = Literal["reference", "cpu", "triton"]

# the one piece of state: set and restored by `backend`, for the whole process
forced: Backend | None = None

_OF_DEVICE: dict[str, Backend] = {"cpu": "cpu", "cuda": "triton"}  # ROCm devices are called "cuda" too


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force one implementation of every op inside a `with`: for tests, and for people hunting a bug.

    "reference" is the definition in plain torch, "cpu" the fast torch code, "triton" the GPU kernels. On CPU tensors
    "triton" runs the kernels in Triton's interpreter: exact in float32 and very slow. The setting holds for the whole
    process, all threads; a backward pass that runs after the `with` chooses anew. Raises ValueError on another name.
    """
    global forced
    if name not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {name!r}")
    before = forced
    forced = name
    try:
        yield
    finally:
        forced = before


def implementation(op: str, tensor: Tensor) -> Any:
    """`shared_kernels.<op>.cpu` or `.triton`, imported on first use: who does not need Triton does not need it here.

    Both hold `forward` for the registered op <op>, and a function called like what follows in the name of each further
    one: `backward` for <op>_backward, `phase1` for <op>_phase1.
    """
    name = forced or _OF_DEVICE[tensor.device.type]
    module = importlib.import_module(f"shared_kernels.{op}.{name}")
    if name == "triton" and tensor.device.type == "cpu":
        return _Interpreted(module)
    return module


def library_op(op: str, function: str, schema: str, *, mutates: tuple[str, ...] = ()) -> CustomOpDef:
    """Register `shared_kernels::<op>` or `<op>_<function>`, which calls that function of the implementation in force.

    `schema` names the arguments and results, which are those of the function: it is `forward` for the op itself. The
    first argument, or the first tensor of a list, says by its device which implementation that is.
    """
    name = op if function == "forward" else f"{op}_{function}"

    def call(*arguments: Any) -> Any:
        first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
        # dtypes were settled in the face; inside, autocast would narrow sums that are kept wide
        with torch.autocast(first.device.type, enabled=False):
            return getattr(implementation(op, first), function)(*arguments)

    return torch.library.custom_op(
        f"shared_kernels::{name}", call, mutates_args=mutates, device_types=("cpu", "cuda"), schema=schema
    )


class _Interpreted:
    """A triton implementation whose calls run in the interpreter."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)

        def call(*args: Any) -> Any:
            from shared_kernels.triton_interpreter import interpreted

            with interpreted():
                return function(*args)

        return call


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the autocast in force, if one is, as torch's own attention takes them.

    Done in an op's face, since a registered autocast would also cast what must stay wide, log-sum-exps and biases.
    """
    return tuple(t.to(autocast_dtype(t)) for t in tensors)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that `autocast` gives the tensor; float64 and integers keep theirs."""
    device = tensor.device.type
    kept = tensor.dtype == torch.float64 or not tensor.is_floating_point()
    return tensor.dtype if kept or not torch.is_autocast_enabled(device) else torch.get_autocast_dtype(device)
