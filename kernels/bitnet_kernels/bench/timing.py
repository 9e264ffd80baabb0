"""Time calls, in the same way on a GPU and on a CPU.

A *replay* is a series of calls: on a GPU a CUDA graph of them (launch overhead would otherwise hide
kernels of a few microseconds), on a CPU a loop. Contenders take turns, one replay each per round,
so that a drifting clock affects all equally. A figure is the median over the rounds, beside the
10th and 90th percentiles.

*Cold* replays rotate over copies of the weights that together are larger than the cache, so that
each call reads its weights from memory, as a model's layers do. *Hot* replays use one copy.
Activations are not rotated: in a model the layer before has just written them.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

CALL = Callable[[int], Tensor]
"""Runs a contender on the i-th copy of its weights."""
_COLD_FACTOR = 4
"""Rotated bytes per byte of cache. A cache that evicts at random keeps 20% of the bytes at a factor
of 2 and 2% at 4 (h = exp(-(1 - h) * factor)); one that evicts the oldest keeps nothing of either.
"""


class Recorded(NamedTuple):
    """A replay, ready to run."""

    run: Callable[[], None]
    output: Callable[[], Tensor]
    """The output of the last call of the last run."""
    calls: int


class Backend(Protocol):
    """What differs between a GPU and a CPU."""

    target: float
    """The least seconds that a replay should take, so that reading the clock costs nothing."""

    def seconds(self, run: Callable[[], None]) -> float:
        """How long a run takes."""
        ...

    def record(self, call: CALL, copies: int, calls: int) -> Recorded:
        """A replay of about ``calls`` calls."""
        ...


class CpuBackend:
    """A loop, and the clock of the host."""

    target = 2e-3

    def seconds(self, run: Callable[[], None]) -> float:
        """How long a run takes."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def record(self, call: CALL, copies: int, calls: int) -> Recorded:
        """A loop that continues the rotation where the last run left it."""
        rotation = itertools.cycle(range(copies))
        last: list[Tensor] = []

        def run() -> None:
            for _ in range(calls):
                last[:] = [call(next(rotation))]

        return Recorded(run, lambda: last[0], calls)


class CudaBackend:
    """A CUDA graph, and events."""

    target = 1e-3

    def seconds(self, run: Callable[[], None]) -> float:
        """How long the GPU takes for a run."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3  # milliseconds

    def record(self, call: CALL, copies: int, calls: int) -> Recorded:
        """A graph of whole rotations. Before the capture every copy is called once on a separate
        stream, because a first call that compiles or tunes itself cannot be captured."""
        calls = copies * -(-calls // copies)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(copies):
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                output = call(i % copies)
        return Recorded(graph.replay, lambda: output, calls)


def copies_needed(weight_bytes: int, cache_bytes: int, cache: str) -> int:
    """Copies of the weights to rotate over: 1 for ``"hot"``; for ``"cold"`` at least 2, which
    together exceed four times the cache."""
    return 1 if cache == "hot" else max(2, _COLD_FACTOR * cache_bytes // max(1, weight_bytes) + 1)


def quantile(values: list[float], q: float) -> float:
    """The q-quantile (0..1), linear between the two nearest values."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def record(call: CALL, copies: int, backend: Backend) -> Recorded:
    """A replay that takes about ``backend.target`` seconds or one call, whichever is longer."""
    trial = backend.record(call, copies, 1)
    trial.run()
    seconds = min(backend.seconds(trial.run) for _ in range(3)) / trial.calls
    calls = max(1, round(backend.target / max(seconds, 1e-9)))
    return trial if calls <= trial.calls else backend.record(call, copies, calls)


def interleave(
    recorded: Mapping[str, Recorded],
    backend: Backend,
    rounds: int,
    cache: str,
) -> dict[str, list[float]]:
    """Seconds per call, ``rounds`` times each; contenders take turns.

    Each round begins with the next contender. Before each hot replay there is one that is not
    timed, since other contenders have used the cache in between.
    """
    names = list(recorded)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            replay = recorded[name]
            if cache == "hot":
                replay.run()
            seconds[name].append(backend.seconds(replay.run) / replay.calls)
    return seconds
