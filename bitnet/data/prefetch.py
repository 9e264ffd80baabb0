"""Batches made one step ahead of the training that takes them.

While a step computes, one background thread makes the next step's batch, so a slow disk or a large
batch delays a step only by what it takes longer than the step. A batch is a pure function of its
step (loader.py), so the thread changes no number, has no state to save, and what it has made ahead
when a run ends is dropped.

The thread works in numpy alone: an operator of torch would start a second team of OpenMP threads,
which would spin on the cores of the first.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Tokens and the token that follows each: int64 ``[B, T]`` both."""


class Prefetcher:
    """Takes batches from ``make`` one step ahead. Use as a context manager, which ends the thread
    however the block ends.

    Attributes:
        waited: seconds that the last :meth:`take` waited for its batch.

    Arguments:
        make: the batch of a step, on the CPU; called in the thread, for one step at a time.
        device: where batches go. For a GPU the thread copies them to pinned memory, and
            :meth:`take` begins a copy that the host does not wait for.
        first_step, last_step: the steps to make are from ``first_step`` to ``last_step`` - 1.
    """

    def __init__(
        self, make: Callable[[int], Batch], device: torch.device, first_step: int, last_step: int
    ) -> None:
        self._make, self._device, self._last_step = make, device, last_step
        self._executor = ThreadPoolExecutor(1, "batches", self._start)
        self._step, self._next = first_step, self._begin(first_step)
        self.waited = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def take(self, step: int) -> Batch:
        """The batch of a step, on the device; begins to make that of the next one. Steps are taken
        in order, each once.

        Raises:
            Exception: what ``make`` raised for this step.
        """
        assert self._next is not None
        assert step == self._step, "steps are taken in order"
        begin = time.perf_counter()
        batch = self._next.result()
        self.waited = time.perf_counter() - begin
        self._step, self._next = step + 1, self._begin(step + 1)
        tokens, targets = (part.to(self._device, non_blocking=True) for part in batch)
        return tokens, targets

    def _begin(self, step: int) -> "Future[Batch] | None":
        if step >= self._last_step:
            return None
        return self._executor.submit(self._made, step)

    def _start(self) -> None:
        if self._device.type == "cuda":  # a new thread would pin for GPU 0, with a context there
            torch.cuda.set_device(self._device)

    def _made(self, step: int) -> Batch:
        tokens, targets = self._make(step)
        if self._device.type == "cuda":
            return tokens.pin_memory(), targets.pin_memory()
        return tokens, targets
