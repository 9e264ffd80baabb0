"""Make batches one step ahead of training.

While a step computes, one background thread makes the next step's batch. So a slow disk or a large
batch delays a step only if the batch takes longer than the step. A batch is a pure function of its
step (loader.py), so the thread changes no result and has no state to save. At the end of a run the
batch made ahead is dropped.

The thread uses only numpy: an operator of torch would start a second team of OpenMP threads, which
would spin on the cores of the first.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Tokens, and the token that follows each: both int64 ``[B, T]``."""


class Prefetcher:
    """Takes batches from ``make`` one step ahead. Use as a context manager, which ends the thread
    however the block ends.

    Attributes:
        waited: seconds that the last :meth:`take` waited for its batch.

    Arguments:
        make: makes the batch of a step, on the CPU; called in the thread, one step at a time.
        device: device of the batches. For a GPU the thread copies them to pinned memory, and
            :meth:`take` starts an asynchronous copy.
        first_step, last_step: batches are made for steps ``first_step`` to ``last_step`` - 1.
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
        """Return the batch of a step, on the device, and start on the next one. Take each step
        once, in order.

        Raises:
            Exception: the exception that ``make`` raised for this step.
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
        if self._device.type == "cuda":  # else a new thread pins for GPU 0 and makes a context
            torch.cuda.set_device(self._device)

    def _made(self, step: int) -> Batch:
        tokens, targets = self._make(step)
        if self._device.type == "cuda":
            return tokens.pin_memory(), targets.pin_memory()
        return tokens, targets
