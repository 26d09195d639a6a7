"""Workers that each load a model once and then do unit after unit, here, in local processes, or on Ray.

What a worker makes of a unit it writes to a file, under a temporary name that is then changed, and a unit whose file is
there is done. So it does not matter who does a unit, in which order, or twice: a worker that dies (out of memory, a
reclaimed machine) costs its unit's time and nothing else.
"""

import logging
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any

import torch

from llm_attn.attention_influence.corpus import Unit
from llm_attn.attention_influence.errors import CorpusProblem

Worker = Callable[[Unit], int]
"""Does a unit and returns how many documents it has."""

ENGINES = ("local", "ray")
_ATTEMPTS = 3
_RAY_STORE_BYTES = 256 << 20

log = logging.getLogger(__name__)


def run_units(
    make: Callable[[], Worker], units: Sequence[Unit], *, engine: str = "local", workers: int = 1
) -> Iterator[int]:
    """Yields, as units finish, how many documents they had.

    make: gives a worker; picklable. "local" with one worker runs in this process with all of torch's threads; with
    more, processes share the processors, and take turns at the GPUs. "ray" uses the Ray cluster that this process is
    connected to, whose machines must see the same files, or starts one here for the time of the run. A worker that is
    killed is replaced and its unit done again. CorpusProblem if `engine` or `workers` is not possible.
    """
    if engine not in ENGINES:
        raise CorpusProblem(f"engine must be one of {', '.join(ENGINES)}, got '{engine}'")
    if workers < 1:
        raise CorpusProblem(f"workers must be at least 1, got {workers}")
    count = min(workers, max(len(units), 1))
    if engine == "ray":
        return _on_ray(make, units, count)
    if count == 1:
        return _here(make, units)
    return _in_processes(make, units, count)


def _here(make: Callable[[], Worker], units: Sequence[Unit]) -> Iterator[int]:
    worker = make() if units else None
    for unit in units:
        yield worker(unit) if worker is not None else 0


def _threads(workers: int) -> int:
    """Of each worker; as many workers as processors, each with all threads, would only wait for one another."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // workers)


# ---- local processes

_make: Callable[[], Worker] | None = None  # of this process, where it is one of a pool


def _in_processes(make: Callable[[], Worker], units: Sequence[Unit], workers: int) -> Iterator[int]:
    left = dict(enumerate(units))
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            for number, documents in _one_pool(make, left, workers):
                del left[number]
                yield documents
            return
        except BrokenProcessPool:
            log.warning("a worker was killed (out of memory?); %d units are still to do", len(left))
            if attempt == _ATTEMPTS:
                raise RuntimeError(
                    f"workers were killed {_ATTEMPTS} times with {len(left)} units left. Give fewer workers"
                ) from None


def _one_pool(make: Callable[[], Worker], units: dict[int, Unit], workers: int) -> Iterator[tuple[int, int]]:
    waiting = iter(list(units.items()))
    running: dict[Future[int], int] = {}
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch's threads can hang
    settings = (make, _threads(workers), context.Value("i", 0))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=settings)
    try:
        while True:
            while len(running) < 2 * workers and (entry := next(waiting, None)) is not None:
                running[pool.submit(_work, entry[1])] = entry[0]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(make: Callable[[], Worker], threads: int, started: Any) -> None:
    global _make
    parent = multiprocessing.parent_process()
    if parent is not None:  # one that is killed cannot tell its workers, which would wait for work for ever
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    _make = cache(make)


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _work(unit: Unit) -> int:
    if _make is None:
        raise RuntimeError("the worker was not started")
    return _make()(unit)  # made here and not at the start, where the pool would take a problem for a death


# ---- Ray


def _on_ray(make: Callable[[], Worker], units: Sequence[Unit], workers: int) -> Iterator[int]:
    try:
        import ray
        import ray.data
    except ImportError:
        raise CorpusProblem("engine 'ray' needs llm-attn[ray]: uv add 'llm-attn[ray]'") from None
    return _ray_results(ray, make, units, workers) if units else iter(())


def _ray_results(ray: Any, make: Callable[[], Worker], units: Sequence[Unit], workers: int) -> Iterator[int]:
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(
            num_cpus=workers + 1,  # one for what Ray Data does beside the workers
            include_dashboard=False,
            object_store_memory=_RAY_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        on_gpu = ray.cluster_resources().get("GPU", 0) >= workers
        rows = [{"unit": pickle.dumps(unit)} for unit in units]
        done = ray.data.from_items(rows, override_num_blocks=min(len(rows), 256 * workers)).map(
            _RayWorker,
            fn_constructor_args=(make, _threads(workers)),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=1 if on_gpu else None,
        )
        for row in done.iter_rows():
            if row["problem"] is not None:
                raise CorpusProblem(row["problem"])
            yield int(row["documents"])
    finally:
        if started_here:
            ray.shutdown()


class _RayWorker:
    """A worker as Ray Data runs it, in an actor that it replaces if it dies."""

    def __init__(self, make: Callable[[], Worker], threads: int) -> None:
        torch.set_num_threads(threads)
        self.make = cache(make)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"documents": self.make()(pickle.loads(row["unit"])), "problem": None}
        except CorpusProblem as problem:  # as a value: Ray would wrap the exception and print its traceback
            return {"documents": 0, "problem": str(problem)}
