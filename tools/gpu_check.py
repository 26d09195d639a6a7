"""One command for a machine with a GPU: the tests that need one, then the benchmarks, then a short table.

    python tools/gpu_check.py                        everything
    python tools/gpu_check.py --only shared-kernels  one package
    python tools/gpu_check.py --only stencil_blend   one op

Needs a Python with torch, triton, pytest and what the packages import; they themselves need not be installed, and may
be absent one by one with --only. Results go to benchmarks/results/<gpu>.json as they come. Exit 0: all passed; 1: a
test, or the check before a benchmark, failed; 2: there is no GPU, or nothing is called so.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import claims
import torch

_NOTHING_COLLECTED = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a package or an op")
    only = parser.parse_args().only
    packages, op = _chosen(only)
    if not packages:
        print(f"nothing is called '{only}': give an op or one of {', '.join(claims.packages())}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            f"no GPU: torch {torch.__version__} finds no CUDA or ROCm device here. Run this where one is",
            file=sys.stderr,
        )
        return 2
    print(f"{claims.device_name('cuda')}, torch {torch.__version__}")
    _make_importable()
    outcomes = {f"{package}, tests": _test(package, op) for package in packages}
    for file in (file for package in packages for file in claims.find(package) if op in (None, file.stem)):
        claim = claims.load(file)
        if "cuda" in claim.devices:
            outcomes[claim.key] = _benchmark(claim)
    print()
    for name, outcome in outcomes.items():
        print(f"{name:40} {outcome}")
    print(f"\nwritten to {claims.result_file('cuda').relative_to(claims.ROOT)}")
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


def _chosen(only: str | None) -> tuple[list[str], str | None]:
    """Packages to look at, and the op to look for in them."""
    folders = claims.packages()
    if only is None or only in folders:
        return [name for name in folders if only in (None, name)], None
    places = (f"src/*/{only}", f"src/*/{only}.py", f"benchmarks/{only}.py")
    return [name for name, folder in folders.items() if any(list(folder.glob(place)) for place in places)], only


def _sources() -> list[str]:
    return [str(folder / "src") for folder in claims.packages().values()]


def _make_importable() -> None:
    """The packages from their source folders, here and in child processes."""
    sys.path[:0] = _sources()


def _test(package: str, op: str | None) -> str:
    """Run pytest -m gpu on one package, keep the counts, and say what came out."""
    folder = claims.packages()[package] / "tests"
    path = os.pathsep.join([*_sources(), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        # one process: workers would share the GPU, and a bare machine need not have the plugin
        options = ["-o", "addopts=--import-mode=importlib", "-q", "-m", "gpu", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, str(folder)]
        command += ["-k", op] if op else []
        code = subprocess.run(command, cwd=claims.ROOT, env=os.environ | {"PYTHONPATH": path}).returncode
        if code == _NOTHING_COLLECTED:
            return "has no tests for a GPU"
        if not report.exists():
            return f"FAILED: pytest ended with {code} before it ran a test"
        suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    entry = {**counts, "only": op, "torch": torch.__version__, "date": date.today().isoformat()}
    claims.keep("cuda", "tests", package if op is None else f"{package}/{op}", entry)
    bad = counts["failures"] + counts["errors"]
    passed = f"{counts['tests'] - bad - counts['skipped']} passed, {counts['skipped']} skipped"
    return f"FAILED: {bad} of {counts['tests']}" if bad or code else passed


def _benchmark(claim: claims.Claim) -> str:
    """Measure a claim on the GPU, print each point, and sum it up."""
    print(f"\n{claim.key}: {claim.module.CLAIM}")
    results = []
    try:
        for result in claims.run(claim, device="cuda"):
            print(claims.line(result), flush=True)
            results.append(result)
    except AssertionError as disagreement:
        return f"FAILED: the rivals disagree, so nothing was timed: {disagreement}"
    ratios = [result["ratio"] for result in results]
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x against {claim.module.BASELINE}"


if __name__ == "__main__":
    sys.exit(main())
