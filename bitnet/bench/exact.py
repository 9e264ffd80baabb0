"""Check every operator, in several processes at once: the first minutes on a new device.

    bitnet bench exact

A check spends most of its time compiling its kernel, on one core. So several workers
(bitnet/bench/worker.py) each take the next case when they have finished one. A case that ends its
process, leaves the GPU unusable, or takes longer than its limit gives a row like any other; a fresh
worker continues. :mod:`bitnet_kernels.bench.exact` has the cases.
"""

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bitnet.bench.rows import Figures
from bitnet.bench.worker import Worker, WorkerDied, serve
from bitnet_kernels.bench.exact import Case, check
from bitnet_kernels.bench.verify import Inexact

COLUMNS = (
    *("operator", "kernel", "m", "n", "k", "dtype"),
    *("exact", "why", "seconds", "device", "torch", "triton", "driver", "commit", "code", "date"),
)
"""``exact``: "yes", or the relative error if one is allowed; "no"; "" if the kernel is not for the
device. ``why``: the reason for "no" or "". ``seconds``: includes the compilation."""
LONGEST = 300
"""Longest ``why``, in characters."""

STARTING = 120.0
"""Seconds that a worker may take to import torch and to find its GPU, with 16 starting at once."""


def check_all(
    cases: Sequence[Case], device: str, jobs: int, limit: float
) -> Generator[Figures, None, None]:
    """Check cases in ``jobs`` processes; yields the first columns of a row when its case is done.

    Arguments:
        device: such as "cuda"; all workers share it.
        limit: seconds that a case may take before its process is ended.
    Raises:
        OSError: a process could not be started. Whatever is raised, no process is left behind.
    """
    with TemporaryDirectory(prefix="bench-exact-") as name:
        pool = _Pool(cases, device, limit, Path(name))
        threads = [threading.Thread(target=pool.work, args=(place,)) for place in range(jobs)]
        for thread in threads:
            thread.start()
        try:
            yield from pool.rows(jobs)
        finally:
            pool.stop(threads)


class _Pool:
    """Workers and their cases. Each thread has a place with one worker at a time. It takes the next
    case when it has finished one."""

    def __init__(self, cases: Sequence[Case], device: str, limit: float, folder: Path) -> None:
        self._todo = iter(cases)
        self._device, self._limit, self._folder = device, limit, folder
        self._done = SimpleQueue[Figures | BaseException | None]()
        self._workers: dict[int, Worker] = {}
        self._stopped = threading.Event()

    def rows(self, jobs: int) -> Iterator[Figures]:
        """Yield rows as they come, until ``jobs`` threads have ended. Raises a thread's error."""
        while jobs:
            row = self._done.get()
            if isinstance(row, BaseException):
                raise row
            if row is None:
                jobs -= 1
            else:
                yield row

    def work(self, place: int) -> None:
        """A thread: check cases until there are no more."""
        try:
            for count, case in enumerate(self._todo):
                if self._stopped.is_set():
                    return
                self._done.put(self._check(place, case, f"worker {place}.{count}"))
        except BaseException as error:
            self._done.put(error)
        finally:
            self._done.put(None)

    def stop(self, threads: Sequence[threading.Thread]) -> None:
        """End the workers, and with them the threads."""
        self._stopped.set()
        while any(thread.is_alive() for thread in threads):
            for worker in list(self._workers.values()):
                worker.kill()
            time.sleep(0.01)
        for worker in self._workers.values():
            worker.close()

    def _check(self, place: int, case: Case, name: str) -> Figures:
        """The row of a case; ``name`` is the worker's, if a new one is needed."""
        begun = time.monotonic()
        is_fresh = place not in self._workers
        if is_fresh:
            self._workers[place] = _start(name, self._device, self._folder)
        worker = self._workers[place]
        try:
            if is_fresh:
                with _ended_after(STARTING, worker):
                    worker.ask("ready")
            begun = time.monotonic()
            with _ended_after(self._limit, worker):
                exact, why, is_usable = worker.ask("check", *case)
        except WorkerDied as error:
            is_late = time.monotonic() - begun >= self._limit
            said = f"not done after {self._limit:.0f} s" if is_late else str(error)
            exact, why, is_usable = "no", " ".join(said.split()), False
        if not is_usable:
            self._workers.pop(place).close()
        figures = [*map(str, case), exact, why[:LONGEST], f"{time.monotonic() - begun:.2f}"]
        return dict(zip(COLUMNS, figures, strict=False))


@contextmanager
def _ended_after(seconds: float, worker: Worker) -> Iterator[None]:
    timer = threading.Timer(seconds, worker.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _start(name: str, device: str, folder: Path) -> Worker:
    """Start a worker with one thread: the expected values are small, and other workers compile."""
    return Worker(name, "bitnet.bench.exact", [device], folder, "--jobs", {"OMP_NUM_THREADS": "1"})


def verdict(case: Case, device: torch.device) -> tuple[str, str]:
    """Check a case; returns the columns ``exact`` and ``why`` of its row."""
    try:
        return check(case, device), ""
    except Inexact as error:
        return "no", str(error)
    except Exception as error:
        # Without a GPU, a kernel for GPUs raises a ValueError; anything else is a defect.
        is_defect = device.type == "cuda" or not isinstance(error, ValueError)
        return "no" if is_defect else "", " ".join(f"{type(error).__name__}: {error}".split())


def main(device: str) -> None:
    """Run a worker, which checks a case per request."""

    def make() -> Mapping[str, Callable[..., Any]]:
        target = torch.device(device)

        def check_one(*values: Any) -> tuple[str, str, bool]:
            exact, why = verdict(Case(*values), target)
            return exact, why, _is_usable(target)

        return {"ready": lambda: _is_usable(target), "check": check_one}

    serve(make)


def _is_usable(device: torch.device) -> bool:
    """Whether this process can continue: after an illegal access every CUDA call fails."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1])
