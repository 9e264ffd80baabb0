"""Activation quantization: int8 codes, the scale and the row sum of a token in one kernel.

One program a token. It walks the row twice, first for max|x|, then for the codes; the second walk
finds the row in the L2 cache. Bit-exact with :func:`bitnet_kernels.reference.quant`, which takes
care in two places: Triton's ``/`` on fp32 is an approximation on CUDA (``div_rn`` is not), and the
interpreter has no libdevice, hence no ``rint``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.reference import EPS

_MAX_BLOCK = 4096


@triton.jit
def quant_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_sum_ptr: tl.tensor,
    K: tl.tensor,
    EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Row ``program_id(0)`` of ``x [M, K]``; outputs as in ``reference.quant``."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    inf = float("inf")
    absmax = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + lanes
        magnitude = tl.abs(tl.load(x_ptr + row * K + k, k < K, other=0.0).to(tl.float32))
        # A maximum drops NaN; "not below infinity" catches both, and infinity survives maxima.
        absmax = tl.maximum(absmax, tl.where(magnitude < inf, magnitude, inf))
    largest = tl.max(absmax, 0)
    finite = largest < inf
    scale = tl.div_rn(tl.maximum(tl.where(finite, largest, 1.0), EPS), 127.0)

    row_sum = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + lanes
        x = tl.load(x_ptr + row * K + k, k < K, other=0.0).to(tl.float32)
        scaled = tl.div_rn(tl.where(finite, x, 0.0), scale)
        # 1.5 * 2^23: the sum has no fraction bits, so the addition itself rounds, half to even.
        rounded = (scaled + 12582912.0) - 12582912.0
        code = tl.clamp(rounded, -128.0, 127.0).to(tl.int32)
        tl.store(codes_ptr + row * K + k, code.to(tl.int8), k < K)
        row_sum += code
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")))
    tl.store(row_sum_ptr + row, tl.sum(row_sum, 0))


def quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float ``[M, K]`` -> codes int8 ``[M, K]``, scale fp32 ``[M]``, row sum int32 ``[M]``."""
    m, k = x.shape
    codes = x.new_empty((m, k), dtype=torch.int8)
    scale = x.new_empty((m,), dtype=torch.float32)
    row_sum = x.new_empty((m,), dtype=torch.int32)
    if m:
        block_k = min(triton.next_power_of_2(k), _MAX_BLOCK)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            quant_kernel[(m,)](
                x.contiguous(),
                codes,
                scale,
                row_sum,
                k,
                EPS=EPS,
                BLOCK_K=block_k,
                num_warps=4 if block_k <= 1024 else 8,
                enable_fp_fusion=False,
            )
    return codes, scale, row_sum
