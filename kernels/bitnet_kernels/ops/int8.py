"""The operators of training: matmuls of int8 codes that are not packed.

A weight changes at every training step, so packing it would be wasted work. Its int8 codes go
straight to int8 tensor cores (Triton on CUDA), or to ``torch._int_mm``. Every device gives the same
bits. The differentiable layer in ``bitnet.quant`` is built on these operators.

M tokens, K in_features, N out_features.
"""

from typing import Any

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.checks import (
    check_bias,
    check_device,
    check_dtype,
    check_matrix,
    check_out_dtype,
    check_scale,
    check_x_q,
)
from bitnet_kernels.cpu import int_mm
from bitnet_kernels.ops.register import register, reshaped, rows


def int8_linear(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The forward of a ternary layer in training: multiply, then rescale,
    ``y = ((acc * s_x) * scale) + bias`` in fp32 in this order, then one cast (BitNet b1.58, arXiv
    2402.17764). It gives the bits of :func:`bitnet_kernels.quantized_linear` of the packed codes.

    Arguments:
        x_q: int8 ``[..., K]``, 1 <= K < 2^24, of any values.
        s_x: fp32 ``[...]``, the scale of each token.
        codes: int8 ``[N, K]`` in {-1, 0, +1}. The values are not checked, because the check would
            wait for the device: with other codes the outputs may be wrong.
        scale: fp32 ``[]`` (one per tensor) or ``[N]`` (one per row).
        bias: float ``[N]`` or None; added after the rescale, never scaled.
        out_dtype: float dtype of the outputs.
    Returns:
        ``[..., N]``, contiguous. It has no backward.
    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape.
    """
    check_x_q(x_q)
    check_matrix("codes", codes, x_q.shape[-1])
    check_device(x_q, s_x=s_x, codes=codes, scale=scale)
    check_dtype("s_x", s_x, torch.float32)
    if s_x.shape != x_q.shape[:-1]:
        raise ValueError(f"s_x: expected shape {list(x_q.shape[:-1])}, got {list(s_x.shape)}")
    check_scale(scale, codes.shape[0])
    check_bias(bias, codes.shape[0], x_q)
    check_out_dtype(out_dtype)
    return _int8_linear(x_q, s_x, codes, scale, bias, out_dtype)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The exact integer product ``acc[m, n] = sum_k a[m, k] * b[n, k]`` of any int8 values.

    Arguments:
        a: int8 ``[M, K]``, 1 <= K < 2^17, so that int32 holds every sum.
        b: int8 ``[N, K]``.
    Returns:
        int32 ``[M, N]``, contiguous.
    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape.
    """
    check_dtype("a", a, torch.int8)
    if a.dim() != 2 or a.shape[1] == 0:
        raise ValueError(f"a: expected shape [M, K] with K >= 1, got {list(a.shape)}")
    if a.shape[1] >= 2**17:
        raise ValueError(f"a: K = {a.shape[1]} may overflow int32 sums; expected K < 2^17")
    check_matrix("b", b, a.shape[1])
    check_device(a, b=b)
    return _int8_matmul(a, b)


def _int8_linear_cpu(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    y = int_mm.scaled_matmul(rows(x_q), s_x.reshape(-1), codes, scale, bias, out_dtype)
    return reshaped(y, *x_q.shape[:-1], codes.shape[0])


def _int8_linear_cuda(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    from bitnet_kernels.gpu.common import Rescale
    from bitnet_kernels.gpu.int8_gemm import int8_gemm, tile_for

    tokens, n = rows(x_q), codes.shape[0]
    rescale = Rescale(s_x.reshape(-1), scale, bias, out_dtype)
    y = int8_gemm(tile_for(tokens.shape[0], n, x_q.device), tokens, codes, rescale)
    return reshaped(y, *x_q.shape[:-1], n)


def _int8_linear_fake(x_q: Tensor, s_x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], codes.shape[0]), dtype=rest[-1])


def _int8_matmul_cuda(a: Tensor, b: Tensor) -> Tensor:
    from bitnet_kernels.gpu.int8_gemm import int8_gemm, tile_for

    return int8_gemm(tile_for(a.shape[0], b.shape[0], a.device), a, b)


def _int8_matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


_int8_linear = register(
    "int8_linear",
    reference.int8_linear,
    cpu=_int8_linear_cpu,
    cuda=_int8_linear_cuda,
    fake=_int8_linear_fake,
)
_int8_matmul = register(
    "int8_matmul",
    reference.int8_matmul,
    cpu=int_mm.int8_matmul,
    cuda=_int8_matmul_cuda,
    fake=_int8_matmul_fake,
)
