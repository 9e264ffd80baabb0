"""Large pages for memory that every step reads from end to end.

A CPU finds the place of each page of memory in a table of limited size. A model's weights, in pages
of 4 KB, outgrow it; in pages of 2 MB they do not, and are read up to twice as fast.

Linux moves memory that is there already into large pages where it is (MADV_COLLAPSE, Linux 6.1).
Addresses, contents and tensors stay as they are. Elsewhere, or where there is no free page of that
size, nothing happens: the results are the same, only later.
"""

import ctypes
import sys
from collections.abc import Iterable

from torch import Tensor

_PAGE = 2**21
_REACH = 2**23
"""Bytes that small pages serve as well: 2,048 of them, as many as CPUs remember."""
_MADV_COLLAPSE = 25


def use_large_pages(tensors: Iterable[Tensor]) -> None:
    """Move the memory of tensors on the CPU into pages of 2 MB, where the system can. What lies
    beside them in the same 2 MB moves too."""
    spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]
    if not sys.platform.startswith("linux") or sum(size for _, size in set(spans)) < _REACH:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for first, last in _merged((at // _PAGE, -(-(at + size) // _PAGE)) for at, size in spans):
        madvise(first * _PAGE, (last - first) * _PAGE, _MADV_COLLAPSE)


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (first, past the last), where those that touch are one: each call of the system costs
    milliseconds."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged
