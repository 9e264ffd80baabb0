"""Large pages for memory that every step reads from end to end.

A CPU keeps the addresses of pages in a table of limited size (the TLB). A model's weights in pages
of 4 KB outgrow it. In pages of 2 MB they do not, and the CPU reads them up to twice as fast.

Linux can move memory that is in use into large pages in place (MADV_COLLAPSE, Linux 6.1).
Addresses, contents and tensors stay as they are. On other systems, or if there is no free page of
that size, nothing happens: the results are the same, only slower.
"""

import ctypes
import sys
from collections.abc import Iterable

from torch import Tensor

_PAGE = 2**21
_REACH = 2**23
"""Bytes that small pages serve as well: 2,048 pages, the number that CPUs remember."""
_MADV_COLLAPSE = 25


def use_large_pages(tensors: Iterable[Tensor]) -> None:
    """Move the memory of CPU tensors into pages of 2 MB, if the system can. Other memory in the
    same 2 MB moves too."""
    spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]
    if not sys.platform.startswith("linux") or sum(size for _, size in set(spans)) < _REACH:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for first, last in _merged((at // _PAGE, -(-(at + size) // _PAGE)) for at, size in spans):
        madvise(first * _PAGE, (last - first) * _PAGE, _MADV_COLLAPSE)


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (first, past the last), with touching ones joined, because each system call costs
    milliseconds."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged
