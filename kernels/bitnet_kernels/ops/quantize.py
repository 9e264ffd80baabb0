"""The operators that quantize activations, alone and after the norms of a transformer.

Every device gives the bits of :mod:`bitnet_kernels.reference`. Nothing here waits for a device, so
a CUDA graph can capture it.

K columns. A *quantized token* is three tensors: codes int8 ``[..., K]``, scale fp32 ``[...]``, row
sum of the codes int32 ``[...]``. A token that holds a NaN or an infinity when it is quantized gets
scale NaN and codes 0.
"""

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.checks import (
    check_device,
    check_tensor,
    check_vector,
    check_x,
)
from bitnet_kernels.cpu import rows as native_rows
from bitnet_kernels.ops.register import register, reshaped, rows


def quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each token to int8 (BitNet b1.58, arXiv 2402.17764):
    ``scale = max(max|x|, 1e-5) / 127``, ``codes = round_half_even(x / scale)``.

    Arguments:
        x: float ``[..., K]``, K >= 1. Statistics are computed in fp32, whatever the dtype, so a
            float64 beyond fp32's range counts as infinite.
    Returns:
        codes int8 ``[..., K]``, scale fp32 ``[...]``, row sum of the codes int32 ``[...]``.
    Raises:
        TypeError, ValueError: x is not floating point, or has no columns.
    """
    check_x(x)
    return _quant(x)


def rmsnorm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each token, round to its dtype and quantize: :func:`quant` of
    :func:`bitnet_kernels.reference.rmsnorm`.

    Arguments:
        x: float ``[..., K]``, K >= 1.
        weight: float ``[K]``, of any float dtype.
        eps: added to the mean square, such as 1e-5; rounded to fp32.
    Returns:
        As :func:`quant`.
    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape, or eps is negative
            or not finite.
    """
    _check_norm("x", x, weight, eps)
    return _rmsnorm_quant(x, weight, eps)


def add_rmsnorm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`rmsnorm_quant` of ``h = x + residual``, the residual stream, which is returned too.
    It is a separate function so that the number of results does not depend on an argument.

    Arguments:
        x, weight, eps: as for :func:`rmsnorm_quant`.
        residual: shape, dtype and device of x.
    Returns:
        codes, scale, row sum as :func:`quant`; h, in shape and dtype of x.
    Raises:
        TypeError, ValueError: as :func:`rmsnorm_quant`.
    """
    _check_norm("x", x, weight, eps)
    _check_like("residual", residual, "x", x)
    return _add_rmsnorm_quant(x, residual, weight, eps)


def relu2_mul_rmsnorm_quant(
    gate: Tensor, up: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rmsnorm_quant` of ``relu(gate)^2 * up``: the middle of the MLP of BitNet 2B4T (arXiv
    2504.12285). The square and the product are each rounded to the dtype.

    Arguments:
        gate: float ``[..., K]``, K >= 1; up: shape, dtype and device of gate.
        weight, eps: as for :func:`rmsnorm_quant`.
    Returns:
        As :func:`quant`.
    Raises:
        TypeError, ValueError: as :func:`rmsnorm_quant`.
    """
    _check_norm("gate", gate, weight, eps)
    _check_like("up", up, "gate", gate)
    return _relu2_mul_rmsnorm_quant(gate, up, weight, eps)


def _check_norm(name: str, x: Tensor, weight: Tensor, eps: float) -> None:
    check_x(x, name)
    check_vector("weight", weight, x.shape[-1])
    check_device(x, weight=weight)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not 0 <= eps <= torch.finfo(torch.float32).max:
        raise ValueError(f"eps: expected a number >= 0 within fp32's range, got {eps}")


def _check_like(name: str, other: Tensor, x_name: str, x: Tensor) -> None:
    check_tensor(name, other)
    if other.dtype != x.dtype:
        raise TypeError(f"{name}: expected {x.dtype} as {x_name}, got {other.dtype}")
    if other.shape != x.shape:
        raise ValueError(
            f"{name}: expected shape {list(x.shape)} as {x_name}, got {list(other.shape)}"
        )
    check_device(x, **{name: other})


def _shaped(
    x: Tensor, codes: Tensor, scale: Tensor, row_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the rows' tensors the leading dimensions of x."""
    lead = x.shape[:-1]
    return reshaped(codes, *x.shape), reshaped(scale, *lead), reshaped(row_sum, *lead)


def _fake(x: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty(x.shape[:-1], dtype=torch.int32),
    )


def _quant_cuda(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from bitnet_kernels.gpu.quant import quant as triton_quant

    return _shaped(x, *triton_quant(rows(x)))


def _rmsnorm_quant_cuda(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from bitnet_kernels.gpu.norm_quant import launch

    codes, scale, row_sum, _ = launch(rows(x), None, weight, eps, "x")
    return _shaped(x, codes, scale, row_sum)


def _add_rmsnorm_quant_cuda(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from bitnet_kernels.gpu.norm_quant import launch

    codes, scale, row_sum, h = launch(rows(x), rows(residual), weight, eps, "x + residual")
    assert h is not None
    return *_shaped(x, codes, scale, row_sum), reshaped(h, *x.shape)


def _add_rmsnorm_quant_fake(x: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake(x), x.new_empty(x.shape)


def _relu2_mul_rmsnorm_quant_cuda(
    gate: Tensor, up: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from bitnet_kernels.gpu.norm_quant import launch

    codes, scale, row_sum, _ = launch(rows(gate), rows(up), weight, eps, "relu2")
    return _shaped(gate, codes, scale, row_sum)


_quant = register("quant", reference.quant, cpu=native_rows.quant, cuda=_quant_cuda, fake=_fake)
_rmsnorm_quant = register(
    "rmsnorm_quant",
    reference.rmsnorm_quant,
    cpu=native_rows.rmsnorm_quant,
    cuda=_rmsnorm_quant_cuda,
    fake=_fake,
)
_add_rmsnorm_quant = register(
    "add_rmsnorm_quant",
    reference.add_rmsnorm_quant,
    cpu=native_rows.add_rmsnorm_quant,
    cuda=_add_rmsnorm_quant_cuda,
    fake=_add_rmsnorm_quant_fake,
)
_relu2_mul_rmsnorm_quant = register(
    "relu2_mul_rmsnorm_quant",
    reference.relu2_mul_rmsnorm_quant,
    cpu=native_rows.relu2_mul_rmsnorm_quant,
    cuda=_relu2_mul_rmsnorm_quant_cuda,
    fake=_fake,
)
