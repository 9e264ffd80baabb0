"""The gradients of a ternary layer in fp32 on a CPU, where the native library is faster than torch.

Integers are exact in fewer bits than floats, so a product with codes can cost less than a product
of floats and be as accurate: on Intel's AMX (``native/tiles.c``), with a table of sums
(``native/lookup.c``), or as three int8 products.
"""

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.cpu import int_mm, native
from bitnet_kernels.cpu.training import library_of, takes

_ALIGNED = 64
_TOKENS = 2**16
"""Most tokens of a sum of int8 products, which then reaches half of int32's range."""


def takes_input_gradient(*tensors: Tensor) -> bool:
    """Whether :func:`takes` holds and :func:`input_gradient` is faster than torch: with AMX or
    AVX-512."""
    if not takes(*tensors):
        return False
    lib = native.library()
    return lib is not None and bool(lib.bn_has_tiles() or lib.bn_has_lookup())


def takes_weight_gradient(*tensors: Tensor) -> bool:
    """Whether :func:`takes` holds and :func:`weight_gradient` is faster than torch: with AMX or
    VNNI."""
    if not takes(*tensors):
        return False
    lib = native.library()
    return lib is not None and bool(lib.bn_has_tiles() or _multiplies_digits(tensors[0].shape[0]))


def _multiplies_digits(tokens: int) -> bool:
    """Whether three integer products are exact and faster than one fp32 product."""
    return native.used() == "avx512" and tokens <= _TOKENS and int_mm.int_mm_takes_any_int8()


def input_gradient(dy: Tensor, codes: Tensor, gamma: Tensor) -> Tensor:
    """:func:`bitnet_kernels.reference.input_gradient` with sums in another order: on AMX if the
    CPU has it, with exact products and sums rounded as in fp32, else on AVX-512 by additions."""
    lib = library_of(dy, gamma)
    m, n, k = *dy.shape, codes.shape[1]
    if lib is None or 0 in (m, n) or not (lib.bn_has_tiles() or lib.bn_has_lookup()):
        return reference.input_gradient(dy, codes, gamma)
    dy, codes, gamma = dy.contiguous(), codes.contiguous(), gamma.contiguous()
    dx, threads = dy.new_empty(m, k), native.threads()
    arguments = dy.data_ptr(), codes.data_ptr(), gamma.data_ptr(), gamma.dim(), m, n, k
    if lib.bn_has_tiles():
        scratch = _scratch(lib.bn_tiles_scratch(threads))
        lib.bn_input_gradient(*arguments, dx.data_ptr(), _aligned(scratch), threads)
    else:
        scratch = _scratch(lib.bn_lookup_scratch(n, k, threads))
        lib.bn_lookup_gradient(*arguments, dx.data_ptr(), _aligned(scratch), threads)
    return dx


def weight_gradient(dy: Tensor, x_q: Tensor, s_x: Tensor) -> Tensor:
    """:func:`bitnet_kernels.reference.weight_gradient`, on AMX as in :func:`input_gradient`, or on
    VNNI in integers: ``dy * s_x`` is rounded to multiples of 2^-23 of its column's largest value
    and cut into three 8-bit digits. Their products with ``x_q``, and the sums of these, are exact.
    """
    lib = library_of(dy, s_x)
    m, n, k = *dy.shape, x_q.shape[1]
    if lib is None or 0 in (m, n) or not (lib.bn_has_tiles() or _multiplies_digits(m)):
        return reference.weight_gradient(dy, x_q, s_x)
    dy, x_q, s_x = dy.contiguous(), x_q.contiguous(), s_x.contiguous()
    dw, threads = dy.new_empty(n, k), native.threads()
    if lib.bn_has_tiles():
        scratch = _scratch(lib.bn_tiles_scratch(threads))
        pointers = dy.data_ptr(), x_q.data_ptr(), s_x.data_ptr()
        lib.bn_weight_gradient(*pointers, m, n, k, dw.data_ptr(), _aligned(scratch), threads)
        return dw
    digits, scale = dy.new_empty((3 * n, m), dtype=torch.int8), dy.new_empty(n)
    lib.bn_digits_columns(
        dy.data_ptr(), s_x.data_ptr(), m, n, digits.data_ptr(), scale.data_ptr(), threads
    )
    acc = int_mm.int8_matmul(digits, x_q.t())
    lib.bn_sum_of_digits(acc.data_ptr(), scale.data_ptr(), n, k, dw.data_ptr(), threads)
    return dw


def _scratch(size: int) -> Tensor:
    return torch.empty(size + _ALIGNED, dtype=torch.uint8, device="cpu")


def _aligned(scratch: Tensor) -> int:
    return -(-scratch.data_ptr() // _ALIGNED) * _ALIGNED
