"""The operators of training: matmuls of int8 codes that are not packed, checked and registered.

While it is trained a weight changes at every step, so packing it would be wasted; its int8 codes go
straight to int8 tensor cores (Triton on CUDA), or to ``torch._int_mm``. Every device gives the same
bits. What is differentiable is built on top, see ``bitnet.quant``.

M tokens, K in_features, N out_features.
"""

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.checks import check_device, check_tensor, check_vector, no_backward
from bitnet_kernels.ops.ternary import (
    _check_codes,
    _check_dtype,
    _check_out_dtype,
    _check_scale,
    _usable,
    shaped_result,
)


def int8_linear(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The forward of a ternary layer in training: multiply, rescale,
    ``y = ((acc * s_x) * gamma) + bias`` in fp32 in this order, then one cast (BitNet b1.58, arXiv
    2402.17764). The bits of :func:`bitnet_kernels.quantized_linear` of the packed codes.

    Arguments:
        x_q: int8 ``[..., K]``, 1 <= K < 2^24, of any values.
        s_x: fp32 ``[...]``, the scale of each token.
        codes: int8 ``[N, K]`` in {-1, 0, +1}. That they are is not checked, since that would wait
            for the device; of others the outputs may be wrong.
        gamma: fp32 ``[]`` (one a tensor) or ``[N]`` (one a row).
        bias: float ``[N]`` or None; added after the rescale, never scaled.
        out_dtype: float dtype of the outputs.
    Returns:
        ``[..., N]``, contiguous. It has no backward.
    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape.
    """
    _check_codes(x_q)
    _check_matrix("codes", codes, x_q.shape[-1], "N")
    check_device(x_q, s_x=s_x, codes=codes, gamma=gamma)
    _check_dtype("s_x", s_x, torch.float32)
    if s_x.shape != x_q.shape[:-1]:
        raise ValueError(f"s_x: expected shape {list(x_q.shape[:-1])}, got {list(s_x.shape)}")
    _check_scale(gamma, codes.shape[0], name="gamma")
    if bias is not None:
        check_vector("bias", bias, codes.shape[0])
        check_device(x_q, bias=bias)
    _check_out_dtype(out_dtype)
    return _int8_linear(x_q, s_x, codes, gamma, bias, out_dtype)


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
    check_tensor("a", a)
    _check_dtype("a", a, torch.int8)
    if a.dim() != 2 or a.shape[1] == 0:
        raise ValueError(f"a: expected shape [M, K] with K >= 1, got {list(a.shape)}")
    if a.shape[1] >= 2**17:
        raise ValueError(f"a: K = {a.shape[1]} may overflow int32 sums; expected K < 2^17")
    _check_matrix("b", b, a.shape[1], "N")
    check_device(a, b=b)
    return _int8_matmul(a, b)


def _check_matrix(name: str, matrix: Tensor, columns: int, rows: str) -> None:
    """Raise TypeError or ValueError unless ``matrix`` is int8 ``[rows, columns]``."""
    check_tensor(name, matrix)
    _check_dtype(name, matrix, torch.int8)
    if matrix.dim() != 2 or matrix.shape[1] != columns:
        raise ValueError(f"{name}: expected shape [{rows}, {columns}], got {list(matrix.shape)}")


@torch.library.custom_op("bitnet::int8_linear", mutates_args=())
def _int8_linear(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    tokens, s_x = x_q.reshape(-1, x_q.shape[-1]), s_x.reshape(-1)
    if _usable(x_q.device):
        from bitnet_kernels.gpu.common import Rescale
        from bitnet_kernels.gpu.int8_gemm import int8_gemm, plan

        config = plan(tokens.shape[0], codes.shape[0], x_q.device)
        y = int8_gemm(config, tokens, codes, Rescale(s_x, gamma, bias, out_dtype))
    else:
        y = reference.scaled_matmul(tokens, s_x, codes, gamma, bias, out_dtype)
    return shaped_result(y, *x_q.shape[:-1], codes.shape[0])


@_int8_linear.register_fake
def _int8_linear_fake(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], codes.shape[0]), dtype=out_dtype)


@torch.library.custom_op("bitnet::int8_matmul", mutates_args=())
def _int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    if not _usable(a.device):
        return reference.any_int8_matmul(a, b).contiguous()
    from bitnet_kernels.gpu.int8_gemm import int8_gemm, plan

    return int8_gemm(plan(a.shape[0], b.shape[0], a.device), a, b)


@_int8_matmul.register_fake
def _int8_matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


_int8_linear.register_autograd(no_backward)
_int8_matmul.register_autograd(no_backward)
