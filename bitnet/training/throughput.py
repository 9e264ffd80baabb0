"""The speed and the memory of a run: tokens per second, MFU, peak memory."""

import math
import re
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Throughput:
    """Tokens per second over the last ``window`` steps, without the time in :meth:`pause`.

    It reads the host's clock: on a GPU call :meth:`step` after the host has waited for the step's
    result, as a loop that reads the loss does.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._mark = clock, clock()
        self._steps: deque[tuple[float, int, float]] = deque(maxlen=window)

    def step(self, tokens: int, waited: float = 0.0) -> None:
        """Count a step of ``tokens`` tokens that has just ended; it waited ``waited`` seconds for
        its batch."""
        now = self._clock()
        self._steps.append((now - self._mark, tokens, waited))
        self._mark = now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock during evaluations, samples and checkpoints."""
        start = self._clock()
        try:
            yield
        finally:
            self._mark += self._clock() - start

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second; 0.0 before the first step."""
        seconds = sum(seconds for seconds, _, _ in self._steps)
        return sum(tokens for _, tokens, _ in self._steps) / seconds if seconds > 0 else 0.0

    @property
    def data_wait(self) -> float:
        """The share of the steps' time spent waiting for a batch; 0.0 before the first step."""
        seconds = sum(seconds for seconds, _, _ in self._steps)
        return sum(waited for _, _, waited in self._steps) / seconds if seconds > 0 else 0.0


_BF16_PEAKS = (
    (r"\bB200", 2250e12),
    (r"H200 NVL", 835e12),
    (r"H200", 989e12),
    (r"H100 NVL", 835e12),
    (r"H100 PCIe", 756e12),
    (r"H100", 989e12),
    (r"A100", 312e12),
    (r"L40S$", 362e12),
    (r"L4$", 121e12),
    (r"A10$", 125e12),
    (r"RTX 4090$", 165e12),  # not the D or the laptop GPU, whose names end otherwise
    (r"RTX 3090$", 71e12),
)
"""Device names and their dense bf16 peak with fp32 accumulation, FLOP/s, from NVIDIA's datasheets
and (RTX) architecture whitepapers. The first match counts."""


def datasheet_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its CUDA name; None for an unknown GPU or a MIG slice."""
    if "MIG" in name:
        return None
    return next((peak for pattern, peak in _BF16_PEAKS if re.search(pattern, name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The peak FLOP/s on which MFU is based, and the source of the number.

    For bf16 on a known GPU it is the datasheet's. Otherwise it is *measured* once: the fastest of
    a few square matmuls in ``dtype`` (under a second; a busy machine gives a lower peak).
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if (peak := datasheet_peak(name)) is not None:
            return peak, f"datasheet, {name}, dense bf16"
    n = 8192 if device.type == "cuda" else 1024
    a = torch.full((n, n), 0.5, dtype=dtype, device=device)
    torch.mm(a, a)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, f"measured, {n}x{n} matmul, {str(dtype).removeprefix('torch.')}"


class Meter:
    """A run's speed, as numbers for a line of metrics: :meth:`readings`.

    Arguments:
        bf16: whether the run computes in bf16, else fp32.
        flops_per_token: of training, forward and backward.
    Attributes:
        peak, peak_source: from :func:`peak_flops`.
    """

    def __init__(self, device: torch.device, bf16: bool, flops_per_token: float) -> None:
        self.device, self.bf16 = device, bf16
        self._throughput, self._flops_per_token = Throughput(), flops_per_token
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.peak, self.peak_source = peak_flops(device, dtype)
        self.step, self.pause = self._throughput.step, self._throughput.pause

    def readings(self) -> dict[str, float]:
        """``tokens_per_second``, ``data_wait`` (a share of the time), ``mfu`` and
        ``peak_memory_bytes``."""
        speed = self._throughput.tokens_per_second
        return {
            "tokens_per_second": speed,
            "data_wait": self._throughput.data_wait,
            "mfu": mfu(self._flops_per_token, speed, self.peak),
            "peak_memory_bytes": peak_memory(self.device),
        }


class CoreWatch:
    """Finds out whether other programs take CPU cores away from a run.

    Threads of OpenMP wait for each other at the end of each operator, so a step takes several times
    as long when one of them has no core. The training thread then has no core for much of the time;
    on an idle machine it nearly always has one. So its CPU time is compared with the elapsed time,
    in windows of at least :data:`WINDOW` seconds and steps. If the CPU time is too small, a forward
    pass is timed with the run's threads and with one thread, in turns.

    Arguments:
        clock, cpu_clock: seconds that passed, and seconds in which the calling thread had a core.
    """

    WINDOW: float = 3
    """Steps, and seconds of steps, per window."""
    SHARE = 0.85
    """A thread that had a core for more than this share of the time is not disturbed."""
    GAIN = 1.25
    """Smallest speedup by one thread that is worth a line; another line needs a speedup that
    differs by this factor."""
    COST = 100
    """Time between measurements, as a multiple of the time of the last one."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._clock, self._cpu_clock = clock, cpu_clock
        self._wall = self._cpu = self._until_next = self._told = 0.0
        self._mark = 0.0, 0.0
        self._steps = -1  # the first step warms up, and may compile

    def begin(self) -> None:
        """Note the beginning of a step."""
        self._mark = self._clock(), self._cpu_clock()

    def end(self, forward: Callable[[], object]) -> str:
        """Note the end of a step. Returns a line that says what would be faster and by how much;
        usually "".

        Arguments:
            forward: a forward pass without side effects; called a few times to time it.
        """
        wall, cpu = self._mark
        self._steps += 1
        if self._steps:
            self._wall += self._clock() - wall
            self._cpu += self._cpu_clock() - cpu
        if self._steps < self.WINDOW or self._wall < self.WINDOW:
            return ""
        share, self._until_next = self._cpu / self._wall, self._until_next - self._wall
        self._steps, self._wall, self._cpu = 0, 0.0, 0.0
        threads = torch.get_num_threads()
        if share > self.SHARE or threads == 1 or self._until_next > 0:
            return ""
        begin = self._clock()
        many, one = _in_turns(forward, threads, self._clock)
        self._until_next = self.COST * (self._clock() - begin)
        gain = many / one
        if gain < self.GAIN or (self._told and 1 / self.GAIN < gain / self._told < self.GAIN):
            return ""
        self._told = gain
        return (
            f"other programs keep the CPU busy (this run had a core for {share:.0%} of its last "
            f"steps): a forward pass takes {1000 * many:.0f} ms with {threads} threads, "
            f"{1000 * one:.0f} ms with one, so train.threads=1 would be {gain:.1f} times as fast "
            "(stop with Ctrl-C, then add it to the command: the run resumes)"
        )


def _in_turns(
    work: Callable[[], object], threads: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Median seconds of ``work`` with ``threads`` threads and with one. Restores the number of
    threads."""
    seconds: dict[int, list[float]] = {threads: [], 1: []}
    try:
        for _ in range(3):
            for n, taken in seconds.items():
                torch.set_num_threads(n)
                begin = clock()
                work()
                taken.append(clock() - begin)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(seconds[threads]), statistics.median(seconds[1])


def mfu(flops_per_token: float, tokens_per_second: float, peak: float) -> float:
    """Model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B), a share of ``peak``."""
    return flops_per_token * tokens_per_second / peak


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of tensors on a GPU, of the process's resident memory on a CPU.

    Linux keeps ru_maxrss across an exec, so a child of a large process would report its parent's
    peak. VmHWM is the process's own.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> bool:
    """Restart :func:`peak_memory` from the memory held now. Returns False if the system cannot (a
    CPU without Linux's clear_refs): then the peak covers the whole life of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # 5: only VmHWM; proc(5)
    except OSError:
        return False
    return True
