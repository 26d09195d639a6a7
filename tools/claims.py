"""Benchmark claims: finding the files, measuring one, keeping the results. `bench.py` and `gpu_check.py` stand on this.

A claim is a file `<package>/benchmarks/<name>.py` with
  CLAIM     the sentence it stands for
  SWEEP     argument of `make` -> its values, smallest first; every combination is measured
  make      (one value of each) -> inputs; tensors it creates land on the device being measured, random ones are seeded
  RIVALS    name -> function of the inputs; one is called "ours"
  BASELINE  the rival whose time over ours is the ratio
  check     (name -> output) -> raises AssertionError if they disagree; runs before the clock
and, where it has something to say,
  price     (name -> output) -> name -> number: what the speed costs
  work      (inputs) -> (amount, unit): gives amount per second of ours
  TARGET, TARGET_RATE   the ratio, and the amount per second, that must be reached
  TARGET_AT             argument -> values at which the targets hold; everywhere if absent
  TARGETS               in place of TARGET, if it is not the same everywhere: pairs of a ratio and where it holds
  THREADS               1 if absent
  ROUNDS                turns of each rival, 7 if absent
  DEVICES               ("cpu", "cuda") if absent
  SLOW                  True if it takes over 20 seconds at its smallest size; tests then leave it to `-m slow`

Rivals are measured in one process, taking turns, so that a slow minute of the machine hits all of them; what is kept is
each one's median. On a CPU with one thread the clock counts seconds of the processor, which neighbours do not disturb;
with more threads it is the wall clock, on a GPU `triton.testing.do_bench`. Before the clock the C allocator is brought
into the state of a process at work: it then keeps blocks up to 32 MiB instead of asking the system for them anew, which
in a fresh process trebles the time of whatever makes many temporaries, a rival composed from torch most of all.

Needs torch alone, so that a bare GPU machine can run it.
"""

import importlib.util
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import benchmark

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 7
SECONDS_PER_TURN = 0.1
_NEEDED = ("CLAIM", "SWEEP", "make", "RIVALS", "BASELINE", "check")


class ClaimProblem(Exception):
    """A claim file, or a choice of one, that cannot be used; the message says why and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One benchmark file, loaded."""

    package: str
    name: str
    module: ModuleType

    @property
    def key(self) -> str:
        return f"{self.package}/{self.name}"

    @property
    def devices(self) -> tuple[str, ...]:
        return getattr(self.module, "DEVICES", ("cpu", "cuda"))

    @property
    def threads(self) -> int:
        return getattr(self.module, "THREADS", 1)

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the sweep's values, smallest first."""
        sweep = self.module.SWEEP
        return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def packages() -> dict[str, Path]:
    """Package name -> folder, of all packages in the workspace."""
    folders = [ROOT / "shared-kernels", *sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))]
    return {folder.name: folder for folder in folders}


def find(only: str | None = None) -> list[Path]:
    """Claim files of packages; `only` a package, a file's name, or "package/name". ClaimProblem if nothing fits."""
    files = [file for folder in packages().values() for file in sorted(folder.glob("benchmarks/*.py"))]
    chosen = [f for f in files if only in (None, _package(f), f.stem, f"{_package(f)}/{f.stem}")]
    if only is not None and not chosen:
        known = ", ".join(f"{_package(f)}/{f.stem}" for f in files)
        raise ClaimProblem(f"no benchmark is called '{only}'. There are: {known or 'none'}")
    return chosen


def load(file: Path) -> Claim:
    """Import a claim file. Raises ClaimProblem if it lacks a part."""
    package = _package(file)
    spec = importlib.util.spec_from_file_location(f"benchmark_{package}_{file.stem}".replace("-", "_"), file)
    if spec is None or spec.loader is None:
        raise ClaimProblem(f"'{file}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        raise ClaimProblem(f"{package}/{file.stem} lacks {', '.join(missing)}; tools/claims.py says what a claim has")
    for name in ("ours", module.BASELINE):
        if name not in module.RIVALS:
            raise ClaimProblem(f"{package}/{file.stem} has no rival '{name}', only {', '.join(module.RIVALS)}")
    return Claim(package=package, name=file.stem, module=module)


def _package(file: Path) -> str:
    return file.parents[1].name


def measure(claim: Claim, point: Mapping[str, Any], *, device: str, rounds: int | None = None) -> dict[str, Any]:
    """Check the rivals against each other at one point of the sweep, then time them; `rounds=1` runs each once.

    Returns point, seconds (median per rival), spread (20 and 80 % quantiles), ratio, and target, rate and price if the
    claim has them. AssertionError of the claim's check passes through: no figure comes from a wrong result.
    """
    module = claim.module
    turns_each = getattr(module, "ROUNDS", ROUNDS) if rounds is None else rounds
    threads = torch.get_num_threads()
    torch.set_num_threads(claim.threads)
    try:
        torch.empty(
            31 << 20, dtype=torch.uint8
        )  # freed at once: the allocator's threshold follows the largest block freed
        torch.manual_seed(0)
        with torch.device(device):
            inputs = module.make(**point)
        outputs = {name: rival(inputs) for name, rival in module.RIVALS.items()}
        module.check(outputs)
        price = module.price(outputs) if hasattr(module, "price") else {}
        del outputs
        turns = _take_turns(module.RIVALS, inputs, device=device, threads=claim.threads, rounds=turns_each)
    finally:
        torch.set_num_threads(threads)
    seconds = {name: statistics.median(times) for name, times in turns.items()}
    spread = {name: _quantiles(times) for name, times in turns.items()}
    result: dict[str, Any] = {"point": _plain(point), "seconds": seconds, "spread": spread}
    result["ratio"] = seconds[module.BASELINE] / seconds["ours"]
    if hasattr(module, "work"):
        amount, unit = module.work(inputs)
        result["rate"] = {"per second": amount / seconds["ours"], "unit": unit}
    if price:
        result["price"] = price
    if (target := wanted_ratio(claim, point)) is not None:
        result["target"] = target
    if found := _targets(module, point, result):
        result["targets"] = found
    return result


def target_ratios(claim: Claim) -> list[tuple[float, Mapping[str, Sequence[Any]]]]:
    """The ratios that must be reached, each with the values of the sweep at which it holds."""
    module = claim.module
    one = [(module.TARGET, getattr(module, "TARGET_AT", {}))] if hasattr(module, "TARGET") else []
    return list(getattr(module, "TARGETS", one))


def wanted_ratio(claim: Claim, point: Mapping[str, Any]) -> float | None:
    """The ratio that must be reached at this point of the sweep, if there is one."""
    return next((ratio for ratio, where in target_ratios(claim) if _holds(where, point)), None)


def _holds(where: Mapping[str, Sequence[Any]], point: Mapping[str, Any]) -> bool:
    return all(point[name] in values for name, values in where.items())


def _targets(module: ModuleType, point: Mapping[str, Any], result: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """What the claim promises, with what was found, and whether that reaches it."""
    found = []
    if "target" in result:
        text = f"{result['ratio']:.3g}x, at least {result['target']:.3g}x wanted"
        found.append((text, result["ratio"] >= result["target"]))
    if hasattr(module, "TARGET_RATE") and _holds(getattr(module, "TARGET_AT", {}), point):
        rate, wanted = result["rate"]["per second"], module.TARGET_RATE
        amount = f"{rate_shown(rate)} {result['rate']['unit']} per second, at least {rate_shown(wanted)} wanted"
        found.append((amount, rate >= wanted))
    return found


def rate_shown(per_second: float) -> str:
    """With three digits: 328 million, 61,700, 45.9."""
    if per_second >= 1e6:
        return f"{per_second / 1e6:,.0f} million"
    return f"{float(f'{per_second:.3g}'):,.0f}" if per_second >= 999.5 else f"{per_second:.3g}"


def _take_turns(
    rivals: Mapping[str, Callable], inputs: Any, *, device: str, threads: int, rounds: int
) -> dict[str, list[float]]:
    clocks = {name: _clock(rival, inputs, device=device, threads=threads) for name, rival in rivals.items()}
    if rounds > 1:
        for clock in clocks.values():
            clock()  # the first turn finds out how often to repeat, and warms caches
    turns: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, clock in clocks.items():
            turns[name].append(clock())
    return turns


def _clock(rival: Callable, inputs: Any, *, device: str, threads: int) -> Callable[[], float]:
    """A function that measures the rival for one turn and returns seconds per call."""
    if device == "cuda":
        from triton.testing import do_bench

        return lambda: do_bench(lambda: rival(inputs), return_mode="median") / 1e3
    timer = benchmark.Timer(
        "rival(inputs)",
        globals={"rival": rival, "inputs": inputs},
        num_threads=threads,
        timer=time.process_time if threads == 1 else benchmark.timer,
    )
    repeats = 1

    def turn() -> float:
        nonlocal repeats
        seconds = timer.timeit(repeats).mean
        repeats = max(repeats, min(10_000, int(SECONDS_PER_TURN / max(seconds, 1e-7))))
        return seconds

    return turn


def _quantiles(times: Sequence[float]) -> list[float]:
    ordered = sorted(times)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)]


def _plain(point: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in point.items()}


def run(claim: Claim, *, device: str) -> Iterator[dict[str, Any]]:
    """Measure every point of a claim and yield its result; each is in the device's result file before it is yielded."""
    module = claim.module
    entry = {"claim": module.CLAIM, "baseline": module.BASELINE, "rivals": list(module.RIVALS)}
    entry |= {"threads": claim.threads, "torch": torch.__version__, "date": date.today().isoformat()}
    points: list[dict[str, Any]] = []
    for point in claim.points():
        points.append(measure(claim, point, device=device))
        keep(device, "claims", claim.key, entry | {"points": points})
        yield points[-1]


def device_name(device: str) -> str:
    """What the results are filed under: the model of the processor or GPU, never the name of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_model()}, {os.cpu_count()} cores"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        return found[1].strip()
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def result_file(device: str) -> Path:
    """benchmarks/results/<device>.json"""
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}.json"


def keep(device: str, section: str, key: str, entry: Mapping[str, Any]) -> None:
    """Put one entry into the device's result file, which is whole at any time."""
    file = result_file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"device": device_name(device)}
    content.setdefault(section, {})[key] = dict(entry)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(
        json.dumps(
            content,
            indent=1,
        )
        + "\n"
    )
    temporary.replace(file)


def line(result: Mapping[str, Any]) -> str:
    """One result for a terminal."""
    point = ", ".join(f"{name} {shown(value)}" for name, value in result["point"].items())
    seconds = ", ".join(f"{name} {duration(value)}" for name, value in result["seconds"].items())
    return f"  {point}: {seconds}; {result['ratio']:.2f}x"


def shown(value: Any) -> str:
    """A value of a sweep: 8 x 9 x 32 x 32, 2,400, sobel."""
    if isinstance(value, list | tuple):
        return " x ".join(str(part) for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e3, "ms")) if seconds * s >= 1), (1e6, "us"))
    return f"{seconds * scale:.3g} {unit}" if seconds * scale < 100 else f"{seconds * scale:.0f} {unit}"
