"""Exact integer products by ``torch._int_mm``, which has undocumented conditions.

* CPU: K > 1 (torch 2.13 returns wrong products at K = 1), and strides of exactly [K, 1], or [1, N]
  for the right operand.
* CPU without VNNI: oneDNN adds pairs of products in int16. Ternary codes on the right cannot
  overflow it; two operands of any int8 values can, and so can ternary codes on the left. oneDNN is
  also 30 times slower than fp32 there (torch 2.13, 2048 x 768 x 768, AMD Zen 3), so the native
  library multiplies by the codes, which are packed for each call.
* CUDA: M > 16, and K and N in multiples of 8.

Each function pads or copies the operands as needed for an exact product. On other devices, and
where no condition can be met, :func:`bitnet_kernels.reference.int8_matmul` runs.

M tokens, K in_features, N out_features.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitnet_kernels import reference
from bitnet_kernels.cpu import native, ternary, training


def codes_matmul(x_q: Tensor, codes: Tensor) -> Tensor:
    """Exact ``x_q @ codes.T``: any int8 ``[M, K]``, ternary codes int8 ``[N, K]`` -> int32
    ``[M, N]``, K < 2^24."""
    m, n = x_q.shape[0], codes.shape[0]
    if 0 in (m, n):
        return x_q.new_empty((m, n), dtype=torch.int32)
    if _native_is_faster(x_q, codes):
        return ternary.matmul(x_q, ternary.pack(codes), None, addsub=False)
    x_q = _row_major(x_q)
    if x_q.device.type == "cpu" and codes.stride() == (1, n) and x_q.shape[1] > 1:
        return torch._int_mm(x_q, codes.t())
    codes = _row_major(codes)
    if x_q.device.type == "cpu":
        if x_q.shape[1] == 1:
            x_q, codes = pad(x_q, (0, 1)), pad(codes, (0, 1))
        return torch._int_mm(x_q, codes.t())
    if x_q.device.type == "cuda":
        k_pad = -x_q.shape[1] % 8
        x_q = pad(x_q, (0, k_pad, 0, max(0, 17 - m)))
        codes = pad(codes, (0, k_pad, 0, -n % 8))
        return torch._int_mm(x_q, codes.t())[:m, :n]
    return reference.int8_matmul(x_q, codes)


def _native_is_faster(x_q: Tensor, codes: Tensor) -> bool:
    """Whether there is a native library and it is faster: on a CPU without VNNI, the instructions
    for ``torch._int_mm``."""
    if x_q.device.type != "cpu" or torch.cpu._is_vnni_supported():
        return False
    return native.library() is not None and native.runs_now(x_q, codes)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact ``a @ b.T`` of any values: int8 ``[M, K]`` and ``[N, K]`` -> int32 ``[M, N]``, K < 2^17
    so that int32 holds every sum of products up to 128^2."""
    kind = a.device.type
    if kind == "cuda" or (kind == "cpu" and int_mm_takes_any_int8()):
        return codes_matmul(a, b)
    return reference.int8_matmul(a, b)


@cache
def int_mm_takes_any_int8() -> bool:
    """Whether ``torch._int_mm`` on this CPU is exact for any int8 values: if the CPU has the VNNI
    instructions and oneDNN uses them (ONEDNN_MAX_CPU_ISA may forbid it). A test product whose pairs
    overflow int16 shows whether it does."""
    if not torch.cpu._is_vnni_supported():
        return False
    a = torch.tensor([[127], [-128]], dtype=torch.int8, device="cpu").repeat(32, 256)
    return torch.equal(torch._int_mm(a, a.t()), reference.int8_matmul(a, a))


def scaled_matmul(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    group_size: int = 128,
) -> Tensor:
    """:func:`bitnet_kernels.reference.scaled_matmul` of x_q ``[M, K]``, with the same bits."""
    if scale.dim() == 2:
        return reference.scaled_matmul(
            x_q, s_x, codes, scale, bias, dtype, group_size, matmul=codes_matmul
        )
    acc = codes_matmul(x_q, codes)
    y = training.rescale_(acc, s_x, scale, None if bias is None else bias.float())
    return y.to(dtype)


def _row_major(matrix: Tensor) -> Tensor:
    """The matrix with strides of exactly [K, 1]. Torch accepts any stride for a dimension of size
    1, but ``torch._int_mm`` (2.13, CPU) leaves its output unwritten for strides below K."""
    if matrix.stride() == (matrix.shape[1], 1):
        return matrix
    return matrix.new_empty(matrix.shape).copy_(matrix)
