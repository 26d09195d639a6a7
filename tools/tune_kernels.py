"""Find the tiles that are fastest on the GPU of this machine, and print the rows to paste into the tables.

    python tools/tune_kernels.py                          every op that has a table
    python tools/tune_kernels.py --only sparse_attention  one of them

Each `shared_kernels/<op>/triton.py` with a table `TILES` (target -> kernel -> widest row -> Tile) is timed on the op's
"real" samples in bfloat16, forward and backward. The search starts from the tile that the table has and goes to
whichever neighbour (rows, keys or warps doubled or halved, one stage more or less) is faster, by 2 % at least, until
none is. Samples that use the same row of the table are timed together. What the GPU has no room for is passed over.

Nothing is written. Paste what is printed, then let the suite look at it: `pytest -m "gpu or slow" -k <op>` computes
with the new tiles and compiles them for every target without spilling registers.

Needs a Python with torch and triton; the package itself need not be installed. Exit 0: done; 2: there is no GPU, or no
op with a table is called so.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import claims
import torch

_WORTH = 0.98
_LIMITS = {"rows": (16, 256), "keys": (16, 256), "warps": (1, 16), "stages": (1, 5)}

Clock = Callable[[Callable[[], None]], float]
"""Milliseconds that a call takes; infinity if it cannot run."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table, as it is and as it should be."""

    kernel: str
    columns: int
    before: Any
    after: Any
    time_before: float
    time_after: float


class _Noticed(dict[int, Any]):
    """A kernel's part of a table that remembers which of its rows were looked up."""

    def __init__(self, rows: dict[int, Any]) -> None:
        super().__init__(rows)
        self.seen: set[int] = set()

    def __getitem__(self, columns: int) -> Any:
        self.seen.add(columns)
        return super().__getitem__(columns)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="an op")
    only = parser.parse_args().only
    if not torch.cuda.is_available():
        print(
            f"no GPU: torch {torch.__version__} finds no CUDA or ROCm device here, and tiles are timed on one. "
            "Run this where one is",
            file=sys.stderr,
        )
        return 2
    sys.path[:0] = [str(folder / "src") for folder in claims.packages().values()]
    tables = _tables()
    if only is not None and only not in tables:
        print(f"no op with a table is called '{only}': give one of {', '.join(tables)}", file=sys.stderr)
        return 2
    for name in tables if only is None else [only]:
        _tune_op(name, tables[name])
    return 0


def _tables() -> dict[str, Any]:
    """Op name -> its Triton module, of those that have a table."""
    from shared_kernels.testing import operations

    modules = {}
    for name in operations():
        module = importlib.import_module(f"shared_kernels.{name}.triton")
        if hasattr(module, "TILES"):
            modules[name] = module
    return modules


def _tune_op(name: str, module: Any) -> None:
    """Tune one op and print what to paste."""
    from shared_kernels._tiles import target
    from shared_kernels.testing import Make

    module_of_spec = importlib.import_module(f"shared_kernels.{name}.spec")
    specs = getattr(module_of_spec, "SPECS", None) or (module_of_spec.SPEC,)
    make = Make(torch.bfloat16, "cuda")
    samples = {f"{s.name} {k}": (s, sample) for s in specs for k, sample in s.samples(make, "real").items()}
    gpu = target(torch.empty(0, device="cuda"))
    print(f"{name} on {torch.cuda.get_device_name()}, {gpu}, torch {torch.__version__}")
    found: dict[str, dict[int, Any]] = {}
    for row in tuned_rows(module.TILES[gpu], lambda case: _run(*case), samples, milliseconds):
        change = f"{row.before}  {row.time_before:.3f} ms -> {row.after}  {row.time_after:.3f} ms"
        print(f"  {row.kernel}, up to {row.columns}: {change}", flush=True)
        found.setdefault(row.kernel, {})[row.columns] = row.after
    print(f'  TILES["{gpu}"] of shared_kernels/{name}/triton.py:')
    for kernel, rows in found.items():
        print(f'        "{kernel}": {{{", ".join(f"{c}: Tile{tuple(tile)}" for c, tile in sorted(rows.items()))}}},')


def _run(spec: Any, sample: dict[str, Any]) -> None:
    """Forward and backward of an op, with a gradient of ones into every output."""
    leaves = {name: sample[name].detach().requires_grad_() for name in spec.gradients if name in sample}
    outputs = spec.op(**{**sample, **leaves})
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    wanted = [t for t in outputs if t.requires_grad]
    if wanted:
        torch.autograd.grad(wanted, list(leaves.values()), [torch.ones_like(t) for t in wanted])


def milliseconds(call: Callable[[], None]) -> float:
    """Median time on the GPU, infinity if the GPU has too little shared memory or too few registers for it."""
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        return float(do_bench(call, return_mode="median"))
    except (OutOfResources, PTXASError):
        return math.inf


def tuned_rows(
    table: dict[str, dict[int, Any]], run: Callable[[Any], Any], samples: dict[str, Any], clock: Clock
) -> Iterator[Row]:
    """Tune every row that a sample uses; `table` is one target's, and is as before when this ends."""
    for kernel in list(table):
        users: dict[int, list[Any]] = {}
        for sample in samples.values():
            for columns in _rows_used(table, kernel, run, sample):
                users.setdefault(columns, []).append(sample)
        for columns, mine in sorted(users.items()):
            yield _tuned(table, kernel, columns, clock, partial(_run_all, run, mine))


def _run_all(run: Callable[[Any], Any], samples: list[Any]) -> list[Any]:
    return [run(sample) for sample in samples]


def _rows_used(table: dict[str, dict[int, Any]], kernel: str, run: Callable[[Any], Any], sample: Any) -> set[int]:
    rows = table[kernel]
    table[kernel] = noticed = _Noticed(rows)
    try:
        run(sample)
    finally:
        table[kernel] = rows
    return noticed.seen


def _tuned(table: dict[str, dict[int, Any]], kernel: str, columns: int, clock: Clock, call: Callable[[], Any]) -> Row:
    """Walk from the table's tile to faster neighbours until there is none."""
    rows = table[kernel]

    def time_of(tile: Any) -> float:
        table[kernel] = rows | {columns: tile}  # a new one: ops share what they have in common between targets
        try:
            return clock(call)
        finally:
            table[kernel] = rows

    tile = rows[columns]
    best = first = time_of(tile)
    row = Row(kernel=kernel, columns=columns, before=tile, after=tile, time_before=first, time_after=first)
    tried = {tile}
    while True:
        near = [other for other in neighbours(row.after) if other not in tried]
        tried.update(near)
        times = {other: time_of(other) for other in near}
        fastest = min(times, key=times.__getitem__, default=row.after)
        if not times or math.isinf(times[fastest]) or times[fastest] > _WORTH * best:
            return row
        best = times[fastest]
        row = replace(row, after=fastest, time_after=best)


def neighbours(tile: Any) -> list[Any]:
    """Tiles that differ in one field: doubled or halved, and one more or less for stages."""
    changed = []
    for field, (low, high) in _LIMITS.items():
        value = getattr(tile, field)
        for other in (value - 1, value + 1) if field == "stages" else (value // 2, 2 * value):
            if low <= other <= high:
                changed.append(tile._replace(**{field: other}))
    return changed


if __name__ == "__main__":
    sys.exit(main())
