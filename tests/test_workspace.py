"""What no single package can test: that each stands alone, that its rooms are there, and how files read."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [ROOT / "shared-kernels", *sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))]
SOURCES = sorted(path for package in PACKAGES for path in (package / "src").rglob("*.py"))
LONGEST_FUNCTION, LONGEST_KERNEL = 50, 120
CALLED_BY_HOSTS = {"key_mask"}  # transformers calls its mask functions with whatever it has, more with each version


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_package_has_its_rooms(package):
    for room in ("README.md", "CHANGELOG.md", "src", "tests", "benchmarks"):
        assert (package / room).exists(), f"{package.name} lacks {room}"
    assert list((package / "tests").glob("test_*.py"))
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert package.name in root["project"]["dependencies"]
    assert f"{package.name}[test]" in root["dependency-groups"]["dev"]
    assert root["tool"]["uv"]["sources"][package.name] == {"workspace": True}
    assert package.name.replace("-", "_") in root["tool"]["importlinter"]["root_packages"]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_package_installs_alone(package, tmp_path):
    """Built, installed without its neighbours' dependencies in an empty environment, and imported from there."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on the path; `uv run pytest` puts it there")
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment["UV_PROJECT_ENVIRONMENT"] = str(tmp_path / "env")
    sync = [uv, "sync", "--quiet", "--locked", "--package", package.name, "--no-default-groups", "--no-editable"]
    sync += ["--python", sys.executable]
    subprocess.run(sync, check=True, cwd=ROOT, env=environment)
    module = package.name.replace("-", "_")
    others = [p.name.replace("-", "_") for p in PACKAGES if p.name not in (package.name, "shared-kernels")]
    code = (
        f"import importlib.util as u, {module}; print({module}.__file__);"
        f"assert not [m for m in {[*others, 'pytest']} if u.find_spec(m)]"
    )
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    location = subprocess.check_output([python, "-c", code], cwd=tmp_path, env=environment, text=True).strip()
    assert "site-packages" in location
    assert (Path(location).parent / "py.typed").exists()


def test_no_drawers():
    """A file called utils holds what nobody found a place for."""
    assert not [n for n in names(SOURCES) if re.search(r"(utils?|misc|common|helpers?)\.py$", n)]


def functions(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length_without_docstring(node):
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (node.body[0].lineno - node.lineno) + (body[-1].end_lineno - body[0].lineno + 1 if body else 0)


def test_functions_fit_on_a_screen():
    long = []
    for path in SOURCES:
        for node in functions(path):
            jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            limit = LONGEST_KERNEL if jitted else LONGEST_FUNCTION
            if (lines := length_without_docstring(node)) > limit:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines")
    assert not long


def test_public_functions_say_what_they_do():
    """Every public function and class of a module has a docstring, and none takes arguments it does not name."""
    silent = []
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            backend = path.name in ("cpu.py", "triton.py", "spec.py") or path.name.startswith("cpu_")
            if backend or "overload" in decorators:
                continue  # the docstring stands once, on the face
            if ast.get_docstring(node) is None:
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
            # timm calls its models with whatever create_model was given; tiny hosts are built by their own fields
            host_demands = "register_model" in decorators or node.name in CALLED_BY_HOSTS or path.name == "testing.py"
            if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None and not host_demands:
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} takes **{node.args.kwarg.arg}")
    assert not silent


def test_modules_cite_or_explain():
    """The first line of every module says what is in it."""
    assert not [str(p.relative_to(ROOT)) for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text()))]


def test_importing_changes_nothing_outside():
    """Torch's global switches and the environment are as they were; what hosts do when imported is theirs."""
    modules = [p.name.replace("-", "_") for p in PACKAGES]
    code = f"""
import os, torch, cv2, diffusers, timm, transformers
import torch._inductor.config  # a part of transformers imports it late, and it writes a variable
def switches():
    return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.get_float32_matmul_precision(),
            torch.get_num_threads(), torch.initial_seed(), dict(os.environ))
before = switches()
import {", ".join(modules)}
assert switches() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arrows_run_one_way():
    """import-linter's contracts, so that `uv run pytest` alone finds a wrong import."""
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter belongs to the workspace's dev group, which is not installed here")
    result = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
