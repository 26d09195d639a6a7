"""The OpSpec machine: what every op is put through, and the one rule by which results are judged. No op is named here.

The rule: inputs are rounded to the dtype first; the truth is the reference on them in float64; an implementation's
error, relative and by norm, may be at most twice that of the reference run in that dtype, plus half an eps of it. What
is not finite must be the same in both, and is compared first; so must integers and booleans be.

An op joins by its folder: `operations()` finds every `shared_kernels/<op>/spec.py`, which holds a `SPEC`, or `SPECS` if
several public functions share one folder.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import shared_kernels

Sample = dict[str, Any]
"""Keyword arguments of one call of an op; values may be lists of tensors."""

Refusal = tuple[Sample, type[Exception], str]
"""Arguments that spoil a good sample, the exception that must come, and a pattern of its message."""

LAW_TOLERANCE = 1e-10
"""Laws hold in float64, but for rounding."""

NUM_LOSSES = 4
"""Gradients are those of so many losses, see `outputs_and_gradients`."""


class Wrong(AssertionError):
    """An implementation does not do what its spec says."""


class Make:
    """Makes the tensors of samples: from a seed, rounded to one dtype, on one device.

    On "meta" they have shapes only.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, wide: bool = False) -> Tensor:
        """Normal numbers; `wide` keeps at least float32, as parameters are kept beside bfloat16 activations."""
        dtype = torch.promote_types(self.dtype, torch.float32) if wide else self.dtype
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        numbers = scale * torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return numbers.to(dtype).to(self.device)

    def transposed(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers of this shape whose memory runs through the first dimension fastest."""
        return self.normal(*reversed(shape), scale=scale).permute(*reversed(range(len(shape))))

    def strided(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers of this shape cut out of a larger tensor, starting past its beginning."""
        return self.normal(*(2 * n + 1 for n in shape), scale=scale)[tuple(slice(1, None, 2) for _ in shape)]


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """What an op promises, in a form that tests, benchmarks and the compile check run."""

    op: Callable[..., Any]
    """The public function."""
    reference: Callable[..., Any]
    """The same arguments; plain torch, float64-clean."""
    samples: Callable[[Make, Literal["tiny", "small", "medium", "real"]], Mapping[str, Sample]]
    """Name -> keyword arguments. "tiny" is for gradcheck, "small" for the CPU code and interpreter, "medium" (may be
    empty) for CPU code that works in chunks, "real" for GPUs and the compile check."""
    gradients: tuple[str, ...] = ()
    """Arguments that are differentiated where a sample has them; every output is weighted in the loss."""
    laws: tuple[Callable[[Callable[..., Any], Make], Iterable[tuple[Any, Any]]], ...] = ()
    """(op, make) -> pairs that must agree: a formula by hand, a reduction to a known function, a permutation."""
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """What raises on purpose -> a pattern of the message. "second derivative" is known."""
    library_ops: tuple[Any, ...] = ()
    """The registered ops, forward first, for opcheck."""
    launches: Callable[[Sample], None] | None = None
    """Runs the Triton host code, forward and backward, on a sample of meta tensors, for the compile check."""
    cost: Callable[[Sample], tuple[int, int]] | None = None
    """Sample -> (FLOPs, bytes that must cross memory) of the forward pass; FLOPs are asserted."""
    rivals: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """For benchmarks."""
    spill_allowed: Mapping[torch.dtype, Mapping[str, int]] = field(default_factory=dict)
    """Dtype of the sample -> target -> bytes of registers per thread that a kernel may spill; elsewhere none."""
    largest: Callable[[Sample], int] | None = None
    """Sample -> elements that no intermediate tensor of the CPU code may exceed on one thread: the memory promise."""

    @property
    def name(self) -> str:
        """That of the public function."""
        return self.op.__name__


def operations() -> dict[str, OpSpec]:
    """Every op's spec by name, found by folder."""
    modules = [importlib.import_module(f"shared_kernels.{folder}.spec") for folder in _folders()]
    specs = [spec for module in modules for spec in getattr(module, "SPECS", None) or (module.SPEC,)]
    return {spec.name: spec for spec in specs}


def _folders() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(shared_kernels.__path__) if module.ispkg]


def cpu_function(library_op: Any) -> Callable[..., Any]:
    """The function of `cpu.py` behind a registered op: `forward`, or what follows the folder's name in the op's."""
    name = library_op._schema.name.split("::")[1]
    folder = max((f for f in _folders() if name == f or name.startswith(f"{f}_")), key=len)
    function = name.removeprefix(folder).removeprefix("_") or "forward"
    return getattr(importlib.import_module(f"shared_kernels.{folder}.cpu"), function)


def to_dtype(sample: Sample, dtype: torch.dtype) -> Sample:
    """A copy of a sample with its floating-point tensors in another dtype."""
    return tree_map(lambda value: value.to(dtype) if _is_float(value) else value, sample)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def leaves_of(spec: OpSpec, sample: Sample) -> dict[str, list[Tensor]]:
    """The tensors that are differentiated, by argument."""
    named = {name: [t for t in tree_leaves(sample.get(name)) if _is_float(t)] for name in spec.gradients}
    return {name: tensors for name, tensors in named.items() if tensors}


def outputs_and_gradients(function: Callable[..., Any], spec: OpSpec, sample: Sample) -> dict[str, Tensor]:
    """Call a function on a sample and differentiate losses that weight every output with fixed random numbers.

    Gradients are stacked over a few losses: of a single sum, an error says more about luck than about the code.
    """
    wanted = {name: tree_map(_leaf, sample[name]) for name in leaves_of(spec, sample)}
    results = [t for t in tree_leaves(function(**{**sample, **wanted})) if isinstance(t, Tensor)]
    named = {f"output {i}": t.detach() for i, t in enumerate(results)}
    if wanted:
        differentiable = [t for t in results if t.requires_grad]
        leaves = {
            f"gradient of {name}" + (f"[{i}]" if len(tensors) > 1 else ""): t
            for name, tensors in leaves_of(spec, wanted).items()
            for i, t in enumerate(tensors)
        }
        losses = [_gradients(differentiable, leaves, seed) for seed in range(NUM_LOSSES)]
        named |= {name: torch.stack([loss[name] for loss in losses]) for name in leaves}
    return named


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if _is_float(value) else value


def _gradients(results: list[Tensor], leaves: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    make = Make(torch.float64, seed=seed)
    weights = [make.normal(*t.shape).to(t.device, t.dtype) for t in results]
    # -inf is the log-sum-exp of a row without keys, and no loss
    finite = [w.masked_fill(~t.isfinite(), 0.0) for w, t in zip(weights, results, strict=True)]
    gradients = torch.autograd.grad(results, list(leaves.values()), finite, retain_graph=True, allow_unused=True)
    named = dict(zip(leaves, gradients, strict=True))
    if unused := [name for name, gradient in named.items() if gradient is None]:
        raise Wrong(f"no {', no '.join(unused)}")
    return named


def error(ours: Tensor, truth: Tensor) -> float:
    """|ours - truth| / |truth| by norm over the finite part."""
    finite = truth.isfinite()
    ours, truth = ours.double()[finite], truth.double()[finite]
    distance, size = float((ours - truth).norm()), float(truth.norm())
    return distance / size if size > 0 else distance


def compare(ours: Mapping[str, Tensor], in_dtype: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """Judge results by the rule above; `in_dtype` is the reference run in the dtype of ours. Raises Wrong."""
    for name, mine in ours.items():
        expected, plain = truth[name], in_dtype[name]
        if mine.shape != expected.shape or mine.dtype != plain.dtype:
            raise Wrong(f"{name} is {mine.dtype} {tuple(mine.shape)}, not {plain.dtype} {tuple(expected.shape)}")
        if not mine.is_floating_point():
            if not torch.equal(mine, expected):
                raise Wrong(f"{name}: {int((mine != expected).sum())} of {mine.numel()} are other than the reference's")
            continue
        rounded = expected.to(mine.dtype)
        for what in (torch.isnan, torch.isposinf, torch.isneginf):
            if not torch.equal(what(mine), what(rounded)):
                raise Wrong(f"{name}: {what.__name__} in other places than in the reference")
        budget = 2 * error(plain, expected) + torch.finfo(mine.dtype).eps / 2
        if not (found := error(mine, expected)) <= budget:
            raise Wrong(f"{name}: error {found:.2e}, allowed {budget:.2e}")


def check_against_reference(spec: OpSpec, sample: Sample, *, op: Callable[..., Any] | None = None) -> None:
    """Forward and gradients of the op, under the backend in force, against the reference. Raises Wrong.

    `op` stands in for spec.op: a compiled or a sabotaged one.
    """
    truth = outputs_and_gradients(spec.reference, spec, to_dtype(sample, torch.float64))
    in_dtype = outputs_and_gradients(spec.reference, spec, sample)
    compare(outputs_and_gradients(op or spec.op, spec, sample), in_dtype, truth)


def check_laws(spec: OpSpec, *, op: Callable[..., Any] | None = None) -> None:
    """Every law of the spec in float64. Raises Wrong."""
    for law in spec.laws:
        for ours, expected in law(op or spec.op, Make(torch.float64)):
            if not _agree(ours, expected):
                raise Wrong(f"{law.__name__} does not hold")


def _agree(ours: Tensor, expected: Tensor) -> bool:
    if ours.shape != expected.shape or not torch.equal(ours.isfinite(), expected.isfinite()):
        return False
    if not ours.is_floating_point():
        return torch.equal(ours, expected)
    return error(ours, expected) <= LAW_TOLERANCE


class RecordCalls(TorchDispatchMode):
    """Inside, keeps the arguments of every call of the given registered ops."""

    def __init__(self, ops: Iterable[Any]) -> None:
        super().__init__()
        self.ops = tuple(ops)
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.ops:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Inside, counts the elements of the largest storage that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.layout == torch.strided:  # what is sparse has a dense tensor of its values
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result
