"""Ternary products by the native library: the arguments of ``native/product.c``.

The callers have checked shapes, dtypes and devices (:mod:`bitnet_kernels.ops.ternary`). This module
provides what the C code expects: row-major tensors, one new tensor per output, and a workspace.
A call runs on as many threads as torch uses.

M tokens, K in_features, N out_features.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet_kernels.cpu import native
from bitnet_kernels.packing import packed_columns, plane_words

_CACHE = 32 << 20
"""With more bytes of weights than this, memory limits the speed of a product."""
_PER_THREAD = 1 << 18
"""Multiply-adds that make it worthwhile to wake a thread: a few microseconds of work."""


def takes_addsub(kernel: str, m: int, packed: Tensor, planes: Tensor | None) -> bool:
    """Whether ``kernel``, a family or ``"auto"``, means addsub for M tokens.

    ``auto`` means dot, except for one token with weights that no cache holds, where both families
    wait for memory. There addsub was a tenth faster on an Ice Lake (57 against 48 G weights/s at
    55 MB) and 6% slower on a busy Sapphire Rapids. If a cache holds the weights, dot is faster: 156
    against 97 for one token, 250 against 94 for 128 tokens. With AVX2 addsub computes for longer
    than it waits: 46 G weights/s against 76 (Zen 3, 55 MB).
    """
    if kernel == "auto":
        waits = planes is not None and not native.families_share_layout()
        return waits and m == 1 and packed.nbytes > _CACHE
    return kernel == "addsub"


def matmul(x_q: Tensor, packed: Tensor, planes: Tensor | None, addsub: bool) -> Tensor:
    """int8 ``[M, K]`` times packed uint8 ``[N, P]`` -> int32 ``[M, N]``. ``addsub`` reads bit
    planes, unless both families read packed weights. Without ``planes`` this call makes them, which
    takes longer than the product."""
    (m, k), n = x_q.shape, packed.shape[0]
    acc = x_q.new_empty((m, n), dtype=torch.int32)
    if m and n:
        weights = _weights(packed, planes, addsub)
        _call("bn_ternary_matmul", addsub, m, n, k, [x_q], weights, [acc])
    return acc


def quantized_linear(
    x_q: Tensor,
    s_x: Tensor,
    packed: Tensor,
    planes: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    addsub: bool,
) -> Tensor:
    """fp32 ``[M, N]`` of quantized tokens x_q ``[M, K]``, s_x ``[M]``; scale fp32 ``[]`` or
    ``[N]``, bias float ``[N]``."""
    (m, k), n = x_q.shape, packed.shape[0]
    y = x_q.new_empty((m, n), dtype=torch.float32)
    if m and n:
        weights = _weights(packed, planes, addsub)
        tokens = [x_q, s_x.float()]
        added = None if bias is None else bias.float()
        rescale: list[Tensor | int | None] = [scale, scale.dim(), added, y]
        _call("bn_quantized_linear", addsub, m, n, k, tokens, weights, rescale)
    return y


def linear(
    x: Tensor,
    packed: Tensor,
    planes: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    addsub: bool,
) -> Tensor:
    """Quantize float tokens x ``[M, K]``, then as :func:`quantized_linear`: fp32 ``[M, N]``."""
    x = x.float()  # absmax_int8 computes in fp32, too
    (m, k), n = x.shape, packed.shape[0]
    y = x.new_empty((m, n))
    if m and n:
        weights = _weights(packed, planes, addsub)
        added = None if bias is None else bias.float()
        rescale: list[Tensor | int | None] = [scale, scale.dim(), added, y]
        _call("bn_ternary_linear", addsub, m, n, k, [x], weights, rescale)
    return y


def pack(codes: Tensor) -> Tensor:
    """:func:`bitnet_kernels.packing.pack_ternary` of codes int8 ``[N, K]``, unchecked."""
    lib = native.library()
    assert lib is not None
    n, k = codes.shape
    packed = torch.empty((n, packed_columns(k)), dtype=torch.uint8, device="cpu")
    codes = codes.contiguous()
    lib.bn_pack(native.threads(), codes.data_ptr(), n, k, packed.data_ptr())
    return packed


def bit_planes(packed: Tensor) -> Tensor:
    """:func:`bitnet_kernels.packing.bit_planes` of packed uint8 ``[N, P]``, unchecked."""
    lib = native.library()
    assert lib is not None
    n, p = packed.shape
    planes = packed.new_empty((n, 2, plane_words(p)), dtype=torch.int32)
    packed = packed.contiguous()
    lib.bn_bit_planes(native.threads(), packed.data_ptr(), n, p, planes.data_ptr())
    return planes


def _weights(packed: Tensor, planes: Tensor | None, addsub: bool) -> list[Tensor | None]:
    """``[packed, planes]``, with None for the layout that the kernel does not read."""
    if not addsub or native.families_share_layout():
        return [packed, None]
    return [None, bit_planes(packed) if planes is None else planes]


def _call(
    name: str,
    addsub: bool,
    m: int,
    n: int,
    k: int,
    *operands: Sequence[Tensor | int | None],
) -> None:
    """Make the operands contiguous, then call a function of the library with their addresses and a
    workspace."""
    lib = native.library()
    assert lib is not None
    threads = max(1, min(native.threads(), m * n * k // _PER_THREAD))
    size = lib.bn_ternary_workspace(threads, m, k)
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    kept = [
        one.contiguous() if isinstance(one, Tensor) else one for some in operands for one in some
    ]
    addresses = [one.data_ptr() if isinstance(one, Tensor) else one for one in kept]
    getattr(lib, name)(threads, addsub, m, n, k, *addresses, ctypes.c_void_p(workspace.data_ptr()))
