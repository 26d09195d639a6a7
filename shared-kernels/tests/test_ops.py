"""Every op through every level, from the spec in its folder. Nothing here knows any op."""

import contextlib
import dataclasses
import re
import shutil

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from shared_kernels import backend
from shared_kernels.testing import (
    LargestTensor,
    Make,
    RecordCalls,
    check_against_reference,
    check_laws,
    cpu_function,
    leaves_of,
    operations,
    outputs_and_gradients,
)

OPS = operations()
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
each_op = pytest.mark.parametrize("spec", OPS.values(), ids=list(OPS))


@contextlib.contextmanager
def one_thread():
    """Workspaces grow with the threads they serve, so promises are counted on one, whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _memory_that_nobody_wrote_is_nan():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def each_sample(size, *dtypes):
    """Parametrise over ops, dtypes and samples: `stencil_blend-float32-sobel`."""
    cases = [
        pytest.param(spec, dtype, name, id=f"{spec.name}-{str(dtype).removeprefix('torch.')}-{name}")
        for spec in OPS.values()
        for dtype in dtypes
        for name in spec.samples(Make(dtype, "meta"), size)
    ]
    return pytest.mark.parametrize(("spec", "dtype", "name"), cases)


def each_entry(argument, table):
    """Parametrise over ops and the names in one table of their specs."""
    cases = [pytest.param(s, key, id=f"{s.name}-{key}") for s in OPS.values() for key in getattr(s, table)]
    return pytest.mark.parametrize(("spec", argument), cases)


def sample_of(spec, size, dtype=torch.float32, name=None, device="cpu"):
    samples = spec.samples(Make(dtype, device), size)
    return samples[name or next(iter(samples))]


# 1, 6: the definition


@each_op
@pytest.mark.parametrize("which", ["reference", "cpu"])
def test_laws(spec, which):
    with backend(which):
        check_laws(spec)


@each_sample("tiny", torch.float64)
@pytest.mark.parametrize("which", ["reference", "cpu"])
def test_gradcheck(spec, dtype, name, which):
    sample = sample_of(spec, "tiny", dtype, name)
    leaves = [t.requires_grad_() for tensors in leaves_of(spec, sample).values() for t in tensors]
    if not leaves:
        pytest.skip("not differentiable")
    with backend(which):
        # the sample holds the leaves themselves; masked outputs (-inf) have no numerical derivative
        call = lambda *_: [t.nan_to_num(neginf=0.0) for t in tree_leaves(spec.op(**sample)) if t.requires_grad]  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


# 2, 3: the implementations


@each_sample("small", torch.float32, torch.bfloat16)
def test_cpu(spec, dtype, name):
    with backend("cpu"):
        check_against_reference(spec, sample_of(spec, "small", dtype, name))


@each_sample("medium", torch.float32, torch.bfloat16)
def test_cpu_in_chunks(spec, dtype, name):
    with backend("cpu"):
        check_against_reference(spec, sample_of(spec, "medium", dtype, name))


@each_sample("small", torch.float32, torch.bfloat16)
def test_interpreted(spec, dtype, name):
    pytest.importorskip("triton")
    if dtype == torch.bfloat16:
        spec = dataclasses.replace(
            spec, gradients=()
        )  # the interpreter truncates to bfloat16; loads are tested by this
    with backend("triton"):
        check_against_reference(spec, sample_of(spec, "small", dtype, name))


@each_op
def test_forced_reference_is_the_reference(spec):
    sample = sample_of(spec, "small")
    with backend("reference"):
        ours = outputs_and_gradients(spec.op, spec, sample)
    for name, expected in outputs_and_gradients(spec.reference, spec, sample).items():
        assert torch.equal(ours[name], expected), name


# what training loops do to an op


def one_gradient(spec, sample, call):
    """Float outputs of the op and the gradient of their sum, each once."""
    named = leaves_of(spec, sample)
    wanted = {name: tree_map(lambda t: t.detach().requires_grad_(), sample[name]) for name in named}
    outputs = [t for t in tree_leaves(call(**{**sample, **wanted})) if t.is_floating_point()]
    loss = sum(t.float().masked_fill(~t.isfinite(), 0).sum() for t in outputs if t.requires_grad)
    leaves = [t for tensors in leaves_of(spec, wanted).values() for t in tensors]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ()
    return [t.detach() for t in outputs], [g for g in gradients if g is not None]


@each_op
def test_activation_checkpointing_changes_nothing(spec):
    """It runs the forward pass again, and gives the backward pass what was saved only once."""
    sample = sample_of(spec, "small")
    if not leaves_of(spec, sample):
        pytest.skip("not differentiable")
    _, wanted = one_gradient(spec, sample, spec.op)
    _, given = one_gradient(spec, sample, lambda **inputs: checkpoint(spec.op, use_reentrant=False, **inputs))
    assert all(torch.equal(one, other) for one, other in zip(given, wanted, strict=True))


@each_op
def test_forward_and_backward_under_autocast(spec):
    sample = sample_of(spec, "small")
    wide = one_gradient(spec, sample, spec.op)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = one_gradient(spec, sample, spec.op)
    for given, wanted in zip([*narrow[0], *narrow[1]], [*wide[0], *wide[1]], strict=True):
        finite = wanted.isfinite()
        assert torch.equal(given.isfinite(), finite)
        assert (given.float() - wanted)[finite].norm() <= 0.1 * wanted[finite].norm() + 1e-6


# 4: kernels for GPUs that are not here


def check_compiles(spec, target, dtype, name=None):
    from shared_kernels.triton_compiler import SHARED_MEMORY, compile_only

    with compile_only(target) as compiled:
        spec.launches(sample_of(spec, "real", dtype, name, device="meta"))
    assert compiled
    for kernel in compiled:
        assert kernel.shared <= SHARED_MEMORY[target], kernel
        assert kernel.spilled <= spec.spill_allowed.get(dtype, {}).get(target, 0), kernel


@each_op
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for(spec, target):
    pytest.importorskip("triton")
    check_compiles(spec, target, torch.bfloat16)


@pytest.mark.slow
@each_sample("real", torch.float32, torch.bfloat16)
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_compiles_for(spec, dtype, name, target):
    pytest.importorskip("triton")
    check_compiles(spec, target, dtype, name)


# 5: torch's machinery


def recorded_calls(spec, *samples):
    with RecordCalls(spec.library_ops) as record:
        for sample in samples:
            outputs_and_gradients(spec.op, spec, sample)
    return record.calls


@each_op
def test_opcheck(spec):
    calls = dict(reversed(recorded_calls(spec, *spec.samples(Make(), "small").values())))  # the first of each op
    assert set(calls) == set(spec.library_ops)
    for func, args in calls.items():
        leaves = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args)
        if spec.gradients and not func._schema.name.endswith("backward"):
            tree_map_only(torch.Tensor, lambda t: t.requires_grad_(t.is_floating_point()), leaves)
        torch.library.opcheck(func, leaves)
        permuted = tree_map_only(torch.Tensor, lambda t: t.mT.contiguous().mT if t.ndim > 1 else t, leaves)
        torch.library.opcheck(func, permuted, test_utils=("test_schema", "test_faketensor"))


@each_op
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_without_graph_break(spec, compiler):
    if compiler == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    torch._dynamo.reset()
    compiled = torch.compile(spec.op, fullgraph=True, backend=compiler)
    check_against_reference(spec, sample_of(spec, "small"), op=compiled)


@each_op
def test_flops(spec):
    for name, sample in spec.samples(Make(), "small").items():
        with FlopCounterMode(display=False) as counter:
            spec.op(**sample)
        assert counter.get_total_flops() == spec.cost(sample)[0], name


@each_entry("case", "refused")
def test_refused(spec, case):
    changes, exception, message = spec.refused[case]
    sample = sample_of(spec, "small") | changes
    with pytest.raises(exception, match=message):
        spec.op(**sample)


@each_entry("case", "refused")
def test_refused_when_compiled(spec, case):
    """The checks are part of the trace, and what they say comes out as the cause of Dynamo's own error."""
    changes, exception, message = spec.refused[case]
    sample = sample_of(spec, "small") | changes
    torch._dynamo.reset()
    with pytest.raises((exception, torch._dynamo.exc.Unsupported)) as raised:
        torch.compile(spec.op, fullgraph=True, backend="eager")(**sample)
    said = f"{raised.value!r} {raised.value} {raised.value.__cause__}"
    assert exception.__name__ in said
    assert re.search(message, said)


@each_entry("what", "unsupported")
def test_unsupported(spec, what):
    assert what == "second derivative", "this suite knows no other"
    sample = sample_of(spec, "tiny")
    leaf = leaves_of(spec, sample)[spec.gradients[0]][0].requires_grad_()
    out = next(t for t in tree_leaves(spec.op(**sample)) if t.requires_grad)
    (first,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=spec.unsupported[what]):
        first.sum().backward()


# 6: memory


@each_op
def test_no_intermediate_tensor_is_larger_than_promised(spec):
    for size in ("small", "medium"):
        for name, sample in spec.samples(Make(), size).items():
            for func, args in recorded_calls(spec, sample):
                with one_thread(), LargestTensor() as largest, torch.no_grad():
                    cpu_function(func)(*args)
                assert largest.elements <= spec.largest(sample), f"{func} on {name}"


# 7: a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@each_sample("real", torch.float32, torch.bfloat16)
def test_gpu(spec, dtype, name):
    sample = sample_of(spec, "real", dtype, name, device="cuda")
    check_against_reference(spec, sample)
    first, second = (outputs_and_gradients(spec.op, spec, sample) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), f"{key} differs from run to run"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@each_sample("small", torch.float32, torch.bfloat16)
def test_gpu_on_odd_shapes(spec, dtype, name):
    check_against_reference(spec, sample_of(spec, "small", dtype, name, device="cuda"))
