"""Fresh processes: without Triton, and with the first call under torch.compile."""

import subprocess
import sys

import pytest

CALL = """
from shared_kernels.testing import Make, operations, outputs_and_gradients
for spec in operations().values():
    sample = next(iter(spec.samples(Make(), "small").values()))
    {call}
"""


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_cpu_code_runs_where_triton_cannot_be_imported():
    block = 'import sys, torch; sys.modules["triton"] = None; import shared_kernels\n'
    run(block + CALL.format(call="outputs_and_gradients(spec.op, spec, sample)"))


def test_importing_does_not_import_triton():
    run('import shared_kernels, sys; assert not [m for m in sys.modules if m.startswith("shared_kernels.triton")]')


def test_first_call_of_a_process_may_be_compiled():
    call = 'outputs_and_gradients(torch.compile(spec.op, fullgraph=True, backend="aot_eager"), spec, sample)'
    run("import torch\n" + CALL.format(call=call))


def test_importing_changes_no_switch_of_torch():
    run("""
import torch
def switches():
    return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), torch.get_num_threads(),
            torch.initial_seed(), torch.utils.deterministic.fill_uninitialized_memory)
before = switches()
import shared_kernels, shared_kernels.testing, shared_kernels.triton_compiler, shared_kernels.triton_interpreter
assert switches() == before
""") if sys.platform == "linux" else pytest.skip("Triton is a dependency on Linux")
