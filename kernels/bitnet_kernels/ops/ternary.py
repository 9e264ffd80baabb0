"""The operators of packed ternary weights.

``kernel="auto"`` chooses a different kernel on each device, but all kernels give the same int32
accumulators bit for bit, and the same outputs.

M tokens, K in_features, N out_features, P = ceil(K/64)*16 packed bytes per row.
"""

from typing import Any

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.available import takes_native, takes_triton
from bitnet_kernels.checks import (
    check_bias,
    check_choice,
    check_columns,
    check_count,
    check_device,
    check_dtype,
    check_out_dtype,
    check_scale,
    check_x,
    check_x_q,
)
from bitnet_kernels.cpu import int_mm
from bitnet_kernels.cpu import ternary as native_ternary
from bitnet_kernels.dispatch import KERNELS
from bitnet_kernels.ops.register import register, reshaped, rows
from bitnet_kernels.packing import check_packed, codes_of, packed_columns, plane_words


def ternary_matmul(
    x_q: Tensor, packed: Tensor, kernel: str = "auto", planes: Tensor | None = None
) -> Tensor:
    """The exact integer product ``acc[m, n] = sum_k codes[n, k] * x_q[m, k]``.

    Arguments:
        x_q: int8 ``[M, K]``, 1 <= K < 2^24, so that int32 holds every sum.
        packed: uint8 ``[N, P]`` from :func:`bitnet_kernels.packing.pack_ternary`.
        kernel: one of :data:`bitnet_kernels.KERNELS`.
        planes: :func:`bitnet_kernels.packing.bit_planes` of ``packed``, a second layout that
            ``"popcount"`` reads, and ``"addsub"`` on a CPU. Without planes ``"addsub"`` is
            ``"sad"`` on a GPU, and on a CPU each call makes them. Nothing checks that they belong
            to ``packed``.
    Returns:
        int32 ``[M, N]``.
    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape, or the kernel is
            unknown or cannot run here.
    """
    check_x_q(x_q)
    if x_q.dim() != 2:
        raise ValueError(f"x_q: expected shape [M, K] with K >= 1, got {list(x_q.shape)}")
    check_packed(packed, packed_columns(x_q.shape[1]), x_q.shape[1])
    check_device(x_q, packed=packed)
    _check_kernel(kernel, packed, planes)
    return _matmul(x_q, packed, kernel, planes)


def ternary_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    kernel: str = "auto",
    group_size: int = 128,
    planes: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize, multiply, rescale: ``y = ((acc * s_x) * scale) + bias`` in fp32, then one cast.

    Arguments:
        x: float ``[..., K]``, 1 <= K < 2^24; see :func:`bitnet_kernels.quant` for float64, NaN and
            infinity (the outputs of such a token are NaN).
        packed: uint8 ``[N, P]`` from :func:`bitnet_kernels.packing.pack_ternary`.
        scale: fp32 ``[]`` (one per tensor), ``[N]`` (one per row) or ``[N, ceil(K/group_size)]``
            (one per group of ``group_size`` columns, which no Triton kernel takes).
        bias: float ``[N]`` or None; added after the rescale, never scaled.
        kernel, planes: see :func:`ternary_matmul`.
        out_dtype: float dtype of the outputs; x's where None.
    Returns:
        ``[..., N]``. It has no backward: packed weights are for inference.
    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape, or the kernel is
            unknown or cannot run here.
    """
    check_x(x)
    check_columns("x", x.shape[-1])
    check_packed(packed, packed_columns(x.shape[-1]), x.shape[-1])
    check_device(x, packed=packed, scale=scale)
    _check_kernel(kernel, packed, planes)
    check_count("group_size", group_size)
    n = packed.shape[0]
    if scale.dim() == 2:
        check_dtype("scale", scale, torch.float32)
        if kernel not in ("auto", "reference"):
            raise ValueError(
                f"kernel: {kernel!r} has no group-wise scales; use 'auto' or 'reference'"
            )
        groups = -(-x.shape[-1] // group_size)
        if scale.shape[0] != n or scale.shape[1] != groups:
            raise ValueError(f"scale: expected shape [{n}, {groups}], got {list(scale.shape)}")
    else:
        check_scale(scale, n, " or [N, ceil(K/group_size)]")
    check_bias(bias, n, x)
    check_out_dtype(out_dtype)
    return _linear(x, packed, scale, bias, kernel, group_size, planes, out_dtype or x.dtype)


def quantized_linear(
    x_q: Tensor,
    s_x: Tensor,
    row_sum: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    kernel: str = "auto",
    planes: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """:func:`ternary_linear` of tokens already quantized, by :func:`bitnet_kernels.quant` or one of
    the fused quantizers. Several layers can share them.

    Arguments:
        x_q: int8 ``[..., K]``, 1 <= K < 2^24.
        s_x, row_sum: fp32 and int32 ``[...]``, the scale and the sum of the codes of each token.
        packed, scale, bias, kernel, planes: as for :func:`ternary_linear`, without group-wise
            scales.
        out_dtype: float dtype of the outputs.
    Returns:
        ``[..., N]``: ``((acc * s_x) * scale) + bias`` in fp32, then one cast.
    Raises:
        TypeError, ValueError: as :func:`ternary_linear`. Nothing checks the values of ``row_sum``:
            wrong ones give wrong outputs.
    """
    check_x_q(x_q)
    check_packed(packed, packed_columns(x_q.shape[-1]), x_q.shape[-1])
    check_device(x_q, packed=packed, s_x=s_x, row_sum=row_sum, scale=scale)
    for name, one, dtype in (("s_x", s_x, torch.float32), ("row_sum", row_sum, torch.int32)):
        check_dtype(name, one, dtype)
        if one.shape != x_q.shape[:-1]:
            shape = list(x_q.shape[:-1])
            raise ValueError(f"{name}: expected shape {shape}, got {list(one.shape)}")
    _check_kernel(kernel, packed, planes)
    check_scale(scale, packed.shape[0])
    check_bias(bias, packed.shape[0], x_q)
    check_out_dtype(out_dtype)
    return _quantized(x_q, s_x, row_sum, packed, scale, bias, kernel, planes, out_dtype)


def _check_kernel(kernel: str, packed: Tensor, planes: Tensor | None) -> None:
    check_choice("kernel", kernel, KERNELS)
    if planes is None:
        if kernel == "popcount":
            raise ValueError("planes: kernel 'popcount' needs them; see bit_planes(packed)")
        return
    check_dtype("planes", planes, torch.int32)
    shape = [packed.shape[0], 2, plane_words(packed.shape[1])]
    if list(planes.shape) != shape:
        raise ValueError(f"planes: expected shape {shape}, got {list(planes.shape)}")
    check_device(packed, planes=planes)


def _matmul_by_kernel(x_q: Tensor, packed: Tensor, kernel: str, planes: Tensor | None) -> Tensor:
    if takes_triton(kernel, x_q.device):
        from bitnet_kernels.gpu.matmul import matmul, plan

        (m, k), n = x_q.shape, packed.shape[0]
        return matmul(*plan(kernel, m, n, k, planes is not None, x_q.device), x_q, packed, planes)
    if kernel == "reference":
        return reference.ternary_matmul(x_q, packed)
    if takes_native(kernel, x_q.device):
        addsub = native_ternary.takes_addsub(kernel, x_q.shape[0], packed, planes)
        return native_ternary.matmul(x_q, packed, planes, addsub)
    return int_mm.codes_matmul(x_q, codes_of(packed, x_q.shape[1]))


def _matmul_fake(x_q: Tensor, packed: Tensor, *rest: object) -> Tensor:
    return x_q.new_empty((x_q.shape[0], packed.shape[0]), dtype=torch.int32)


_matmul = register("ternary_matmul", _matmul_by_kernel, fake=_matmul_fake)


def _quantized_by_kernel(
    x_q: Tensor,
    s_x: Tensor,
    row_sum: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: str,
    planes: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    tokens, s_x, row_sum = rows(x_q), s_x.reshape(-1), row_sum.reshape(-1)
    (m, k), n = tokens.shape, packed.shape[0]
    if takes_triton(kernel, x_q.device):
        from bitnet_kernels.gpu.common import Rescale
        from bitnet_kernels.gpu.matmul import matmul, plan

        choice = plan(kernel, m, n, k, planes is not None, x_q.device)
        rescale = Rescale(s_x.contiguous(), scale, bias, out_dtype)
        y = matmul(*choice, tokens, packed, planes, row_sum.contiguous(), rescale)
    elif kernel == "reference":
        y = reference.quantized_linear(tokens, s_x, packed, scale, bias, out_dtype)
    elif takes_native(kernel, x_q.device):
        addsub = native_ternary.takes_addsub(kernel, m, packed, planes)
        y = native_ternary.quantized_linear(tokens, s_x, packed, planes, scale, bias, addsub)
        y = y.to(out_dtype)
    else:
        y = int_mm.scaled_matmul(tokens, s_x, codes_of(packed, k), scale, bias, out_dtype)
    return reshaped(y, *x_q.shape[:-1], n)


def _quantized_fake(
    x_q: Tensor, s_x: Tensor, row_sum: Tensor, packed: Tensor, *rest: Any
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], packed.shape[0]), dtype=rest[-1])


_quantized = register("quantized_linear", _quantized_by_kernel, fake=_quantized_fake)


def _linear_by_kernel(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: str,
    group_size: int,
    planes: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    tokens = rows(x)
    (m, k), (n, p) = tokens.shape, packed.shape
    if scale.dim() < 2 and takes_triton(kernel, x.device):
        from bitnet_kernels.gpu.common import Rescale
        from bitnet_kernels.gpu.matmul import matmul, plan
        from bitnet_kernels.gpu.quant import quant as triton_quant

        choice = plan(kernel, m, n, k, planes is not None, x.device)
        x_q, s_x, row_sum = triton_quant(tokens, 4 * p)
        rescale = Rescale(s_x, scale, bias, out_dtype)
        y = matmul(*choice, x_q, packed, planes, row_sum, rescale, full_range=False)
    elif kernel == "reference":
        y = reference.ternary_linear(tokens, packed, scale, bias, group_size, out_dtype)
    elif scale.dim() < 2 and takes_native(kernel, x.device):
        addsub = native_ternary.takes_addsub(kernel, m, packed, planes)
        y = native_ternary.linear(tokens, packed, planes, scale, bias, addsub).to(out_dtype)
    else:
        x_q, s_x = reference.absmax_int8(tokens)
        codes = codes_of(packed, k)
        y = int_mm.scaled_matmul(x_q, s_x, codes, scale, bias, out_dtype, group_size)
    return reshaped(y, *x.shape[:-1], n)


def _linear_fake(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=rest[-1])


_linear = register("ternary_linear", _linear_by_kernel, fake=_linear_fake)
