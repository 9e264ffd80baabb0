"""Code shared by the tests that run on the device at hand: its fixture, sizes, comparisons.

Not a test module. On a GPU each operator launches its kernels, which may start while the one before
them finishes, a step of generation is a captured graph, and torch.compile takes its own backend.
Neither Triton's interpreter nor ahead-of-time compilation can show this (docs/gpu.md). On a CPU the
operators *are* their references, so there these tests show only that their loops and oracles are
right, on small sizes.

Oracles run on the CPU: exact integer products, fp32 one operation at a time, fp64 for attention;
the plain modules, in which packed layers take the reference; never the kernel under test. If the
operators' documentation promises the same bits, there is no tolerance.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.findings import same

# Those that torch and Triton raise about themselves, in their own files; all others are errors.
OWN_WARNINGS = [
    pytest.mark.filterwarnings(r"ignore:::torch\."),
    pytest.mark.filterwarnings(r"ignore:::triton\."),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

ON_GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = 1e-5
Layout = Callable[[Tensor], Tensor]


def size(cpu: Any, gpu: Any) -> Any:
    """The value for the device at hand."""
    return gpu if ON_GPU else cpu


@pytest.fixture
def device() -> torch.device:
    return torch.device(size("cpu", "cuda"))


def here(kernel: str) -> str:
    """The kernel to test here: on a CPU a formulation would run in Triton's interpreter, which
    other tests cover."""
    return size("reference", kernel)


def equal(got: Tensor, want: Tensor) -> bool:
    """Whether dtype, shape and values are equal; NaN equals NaN."""
    return got.is_contiguous() and same(got.cpu(), want)


def all_equal(got: Any, want: Any) -> bool:
    return all(equal(a, b) for a, b in zip(got, want, strict=True))


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Raises RuntimeError if the host waits for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
