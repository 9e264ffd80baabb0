"""How fast a run is and what it needs: tokens a second, MFU, peak memory."""

import math
import os
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Throughput:
    """Tokens a second over the last ``window`` steps, time in :meth:`pause` left out.

    It reads the host's clock: on a GPU call :meth:`step` where the host has waited for the step's
    result, as a loop that looks at its loss has.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._mark = clock, clock()
        self._steps: deque[tuple[float, int]] = deque(maxlen=window)

    def step(self, tokens: int) -> None:
        """A step that trained on ``tokens`` tokens has just ended."""
        now = self._clock()
        self._steps.append((now - self._mark, tokens))
        self._mark = now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around evaluations, samples and checkpoints."""
        start = self._clock()
        try:
            yield
        finally:
            self._mark += self._clock() - start

    @property
    def tokens_per_second(self) -> float:
        """0.0 before the first step."""
        seconds = sum(seconds for seconds, _ in self._steps)
        return sum(tokens for _, tokens in self._steps) / seconds if seconds > 0 else 0.0


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
    (r"RTX 4090$", 165e12),  # not the D or the laptop part, which end otherwise
    (r"RTX 3090$", 71e12),
)
"""Device names and their dense bf16 peak with fp32 accumulation, FLOP/s; NVIDIA's datasheets and
(RTX) architecture whitepapers. The first match counts."""


def datasheet_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name CUDA gives it; None where it is not known, or is a
    MIG slice."""
    if "MIG" in name:
        return None
    return next((peak for pattern, peak in _BF16_PEAKS if re.search(pattern, name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The FLOP/s that MFU is measured against, and where the number comes from.

    The datasheet's where the run computes in bf16 on a known GPU; else *measured*, once, by the
    fastest of a few square matmuls in ``dtype`` (under a second; a busy machine lowers it).
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


def busy_hint(device: torch.device) -> str:
    """What to say where other programs keep the CPU's cores busy: two OpenMP threads then wait for
    each other, and training takes several times as long. "" where it does not matter."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not hasattr(os, "getloadavg"):
        return ""
    load = os.getloadavg()[0]  # of the last minute
    if load < 0.75 * cores:
        return ""
    return (
        f"other programs keep the {cores} cores busy (load {load:.1f}): train.threads=1 may be "
        "several times as fast (stop with Ctrl-C; the same command with it goes on)"
    )


def mfu(flops_per_token: float, tokens_per_second: float, peak: float) -> float:
    """Model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B), a share of ``peak``."""
    return flops_per_token * tokens_per_second / peak


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors held on a GPU, or that the process held resident (CPU).

    Linux counts ru_maxrss over an exec, so a child of a large process would report its parent's
    peak; VmHWM is the process's own.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> bool:
    """Let :func:`peak_memory` count anew, from what is held now; False where the system cannot,
    and the peak stays that of the whole process (a CPU without Linux's clear_refs)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: VmHWM alone; proc(5)
    except OSError:
        return False
    return True
