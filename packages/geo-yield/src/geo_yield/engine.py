"""One function over many units of work, in local processes or on Ray, with the same results.

The function is stateless, importable by its name and picklable, and so are units and results; what must last, it
writes to files under a temporary name and renames. Then it does not matter who runs a unit, in which order, or twice: a
worker that dies (out of memory, a reclaimed machine) costs its unit's time and nothing else.

Local workers are never forked from this process, since a fork of a process that has used torch's threads can hang; they
are forked from a server that has only imported the function's module (where systems allow it), or started afresh.
"""

import logging
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from geo_yield.errors import InputProblem

Unit = TypeVar("Unit")
Result = TypeVar("Result")

ENGINES = ("local", "ray")
_ATTEMPTS = 3
_RAY_STORE_BYTES = 256 << 20

log = logging.getLogger(__name__)


def run_units(
    function: Callable[[Unit], Result], units: Sequence[Unit], *, engine: str = "local", workers: int | None = None
) -> Iterator[tuple[int, Result]]:
    """Yield (position in `units`, result) as they finish, in any order.

    `workers` defaults to the processors at hand; with one, "local" runs in this process. "ray" uses the cluster that
    this process is connected to, or starts one on this machine for the time of the run. An exception of `function` ends
    the run; a worker that is killed is replaced and its unit done again, at most three times.
    Raises InputProblem if `engine` or `workers` is not possible, or Ray is not installed.
    """
    if engine not in ENGINES:
        raise InputProblem(f"engine must be one of {', '.join(ENGINES)}, got '{engine}'")
    if workers is not None and workers < 1:
        raise InputProblem(f"workers must be at least 1, got {workers}")
    count = min(workers or _processors(), max(len(units), 1))
    if engine == "ray":
        return _on_ray(function, units, count)
    if count == 1:
        return ((index, function(unit)) for index, unit in enumerate(units))
    return _in_processes(function, units, count)


def _processors() -> int:
    """Those this process may use; systems without affinity tell only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(
    function: Callable[[Unit], Result], units: Sequence[Unit], workers: int
) -> Iterator[tuple[int, Result]]:
    left = dict(enumerate(units))
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            for index, result in _one_pool(function, left, workers):
                del left[index]
                yield index, result
            return
        except BrokenProcessPool:
            log.warning("a worker was killed (out of memory?); %d units are still to do", len(left))
            if attempt == _ATTEMPTS:
                raise RuntimeError(
                    f"workers were killed {_ATTEMPTS} times with {len(left)} units left. Give fewer workers"
                ) from None


def _one_pool(function: Callable[[Unit], Result], units: dict[int, Unit], workers: int) -> Iterator[tuple[int, Result]]:
    """Until all are done or a worker dies. Few units wait in the pool at a time, so many cost no memory."""
    waiting = iter(list(units.items()))
    running: dict[Future[Result], int] = {}
    pool = ProcessPoolExecutor(workers, mp_context=_context(function), initializer=_end_with_parent)
    try:
        while True:
            while len(running) < 2 * workers and (entry := next(waiting, None)) is not None:
                running[pool.submit(_single_threaded, function, entry[1])] = entry[0]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _context(function: Callable[[Unit], Result]) -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    return context


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers, which would wait for work, and keep its pipes open, for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _single_threaded(function: Callable[[Unit], Result], unit: Unit) -> Result:
    """As many workers as processors, each with torch's own threads, would only wait for one another."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    return function(unit)


def _on_ray(function: Callable[[Unit], Result], units: Sequence[Unit], workers: int) -> Iterator[tuple[int, Result]]:
    try:
        import ray
        import ray.data
    except ImportError:
        raise InputProblem("engine 'ray' needs geo-yield[ray]: uv add 'geo-yield[ray]'") from None
    return _ray_rows(ray, function, units, workers)


def _ray_rows(
    ray: Any, function: Callable[[Unit], Result], units: Sequence[Unit], workers: int
) -> Iterator[tuple[int, Result]]:
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            object_store_memory=_RAY_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [{"index": index, "unit": pickle.dumps(unit)} for index, unit in enumerate(units)]
        jobs = ray.data.from_items(rows, override_num_blocks=max(1, min(len(rows), 64 * workers)))
        done = jobs.map(_ray_row, fn_args=(function,), compute=ray.data.TaskPoolStrategy(size=workers))
        for row in done.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, InputProblem):
                raise result
            yield int(row["index"]), result
    finally:
        if started_here:
            ray.shutdown()


def _ray_row(row: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    try:
        result = function(pickle.loads(row["unit"]))
    except InputProblem as problem:  # as a value: Ray would wrap the exception and print its traceback
        result = problem
    return {"index": row["index"], "result": pickle.dumps(result)}
