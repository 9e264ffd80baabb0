"""The quantization operators: checked, registered with torch, run by Triton on CUDA, else by torch.

The definitions stand in :mod:`bitnet_kernels.reference`; every device gives the same bits. Nothing
here waits for a device, so a CUDA graph can capture it. None has a backward.

M tokens, K in_features, N out_features. A *quantized token* is three tensors: codes int8
``[..., K]``, scale fp32 ``[...]``, row sum of the codes int32 ``[...]``. Where what is quantized
holds a NaN or an infinity, its scale is NaN and its codes are 0.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.checks import (
    FLOATS,
    check_choice,
    check_device,
    check_tensor,
    check_vector,
    check_x,
    no_backward,
)

GRANULARITIES = ("tensor", "row")
"""What one gamma of :func:`absmean_ternary` covers."""


def quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each token to int8 (BitNet b1.58, arXiv 2402.17764):
    ``scale = max(max|x|, 1e-5) / 127``, ``codes = round_half_even(x / scale)``.

    Arguments:
        x: float ``[..., K]``, K >= 1. Statistics are taken in fp32 whatever the dtype, so a
            float64 beyond fp32's range counts as infinite.
    Returns:
        codes int8 ``[..., K]``, scale fp32 ``[...]``, row sum of the codes int32 ``[...]``.
    Raises:
        TypeError, ValueError: x is not floating point, or has no columns.
    """
    check_x(x)
    return _quant(x)


def rmsnorm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each token, round to its dtype, quantize: :func:`quant` of
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
    """:func:`rmsnorm_quant` of ``h = x + residual``, which is returned too: the residual stream of
    the next addition. A function of its own, so that what is returned does not hang on an argument.

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


def absmean_ternary(
    weight: Tensor, granularity: str = "tensor", transposed: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize a weight to ternary: see :func:`bitnet_kernels.reference.absmean_ternary`.

    Arguments:
        weight: float ``[N, K]``, N, K >= 1.
        granularity: one gamma a ``"tensor"`` or a ``"row"``.
        transposed: return the codes' transpose as well, which the backward wants.
    Returns:
        codes int8 ``[N, K]`` in {-1, 0, +1}; gamma fp32 ``[]`` or ``[N]``; codes int8 ``[K, N]``,
        contiguous, or None. Where the weights under a gamma hold a NaN or an infinity, gamma is NaN
        and the codes are 0.
    Raises:
        TypeError, ValueError: weight has the wrong dtype or shape, or the granularity is unknown.
    """
    check_tensor("weight", weight)
    if not isinstance(transposed, bool):
        raise TypeError(f"transposed: expected a bool, got {type(transposed).__name__}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight: expected a float dtype, got {weight.dtype}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight: expected shape [N, K], N, K >= 1, got {list(weight.shape)}")
    check_choice("granularity", granularity, GRANULARITIES)
    codes, gamma, *rest = _absmean_ternary(weight, granularity == "row", transposed)
    return codes, gamma, rest[0] if rest else None


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


def _no_triton() -> bool:
    return find_spec("triton") is None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _shaped(
    x: Tensor, codes: Tensor, scale: Tensor, row_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the rows' tensors the leading dimensions of x."""
    lead = x.shape[:-1]
    return codes.reshape(x.shape), scale.reshape(lead), row_sum.reshape(lead)


def _empty(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What every fake implementation returns for tokens of x's shape."""
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty(x.shape[:-1], dtype=torch.int32),
    )


@torch.library.custom_op("bitnet::quant", mutates_args=())
def _quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.quant(x.contiguous())


@_quant.register_kernel("cuda")
def _quant_cuda(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if _no_triton():
        return reference.quant(x.contiguous())
    from bitnet_kernels.gpu.quant import quant as triton_quant

    return _shaped(x, *triton_quant(_rows(x)))


@_quant.register_fake
def _quant_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x)


@torch.library.custom_op("bitnet::rmsnorm_quant", mutates_args=())
def _rmsnorm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return reference.rmsnorm_quant(x.contiguous(), weight, eps)


@_rmsnorm_quant.register_kernel("cuda")
def _rmsnorm_quant_cuda(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if _no_triton():
        return reference.rmsnorm_quant(x.contiguous(), weight, eps)
    from bitnet_kernels.gpu.norm_quant import launch

    codes, scale, row_sum, _ = launch(_rows(x), None, weight, eps, "x")
    return _shaped(x, codes, scale, row_sum)


@_rmsnorm_quant.register_fake
def _rmsnorm_quant_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x)


@torch.library.custom_op("bitnet::add_rmsnorm_quant", mutates_args=())
def _add_rmsnorm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.add_rmsnorm_quant(x.contiguous(), residual.contiguous(), weight, eps)


@_add_rmsnorm_quant.register_kernel("cuda")
def _add_rmsnorm_quant_cuda(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _no_triton():
        return reference.add_rmsnorm_quant(x.contiguous(), residual.contiguous(), weight, eps)
    from bitnet_kernels.gpu.norm_quant import launch

    codes, scale, row_sum, h = launch(_rows(x), _rows(residual), weight, eps, "x + residual")
    assert h is not None
    return *_shaped(x, codes, scale, row_sum), h.reshape(x.shape)


@_add_rmsnorm_quant.register_fake
def _add_rmsnorm_quant_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_empty(x), x.new_empty(x.shape)


@torch.library.custom_op("bitnet::relu2_mul_rmsnorm_quant", mutates_args=())
def _relu2_mul_rmsnorm_quant(
    gate: Tensor, up: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.relu2_mul_rmsnorm_quant(gate.contiguous(), up.contiguous(), weight, eps)


@_relu2_mul_rmsnorm_quant.register_kernel("cuda")
def _relu2_mul_rmsnorm_quant_cuda(
    gate: Tensor, up: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if _no_triton():
        return reference.relu2_mul_rmsnorm_quant(gate.contiguous(), up.contiguous(), weight, eps)
    from bitnet_kernels.gpu.norm_quant import launch

    codes, scale, row_sum, _ = launch(_rows(gate), _rows(up), weight, eps, "relu2")
    return _shaped(gate, codes, scale, row_sum)


@_relu2_mul_rmsnorm_quant.register_fake
def _relu2_mul_rmsnorm_quant_fake(
    gate: Tensor, up: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(gate)


def _absmean_reference(weight: Tensor, per_row: bool, transposed: bool) -> list[Tensor]:
    codes, gamma = reference.absmean_ternary(weight.contiguous(), "row" if per_row else "tensor")
    if not transposed:
        return [codes, gamma]
    # A clone even of one row or column: tensors that an op returns may not share memory.
    return [codes, gamma, codes.t().clone(memory_format=torch.contiguous_format)]


@torch.library.custom_op("bitnet::absmean_ternary", mutates_args=())
def _absmean_ternary(weight: Tensor, per_row: bool, transposed: bool) -> list[Tensor]:
    return _absmean_reference(weight, per_row, transposed)


@_absmean_ternary.register_kernel("cuda")
def _absmean_ternary_cuda(weight: Tensor, per_row: bool, transposed: bool) -> list[Tensor]:
    if _no_triton():
        return _absmean_reference(weight, per_row, transposed)
    from bitnet_kernels.gpu.absmean import absmean_ternary as triton_absmean

    codes, gamma, codes_t = triton_absmean(weight, per_row, transposed)
    return [codes, gamma] if codes_t is None else [codes, gamma, codes_t]


@_absmean_ternary.register_fake
def _absmean_ternary_fake(weight: Tensor, per_row: bool, transposed: bool) -> list[Tensor]:
    n, k = weight.shape
    codes = weight.new_empty((n, k), dtype=torch.int8)
    gamma = weight.new_empty((n,) if per_row else (), dtype=torch.float32)
    return [codes, gamma, codes.new_empty((k, n))] if transposed else [codes, gamma]


for _op in (
    _quant,
    _rmsnorm_quant,
    _add_rmsnorm_quant,
    _relu2_mul_rmsnorm_quant,
    _absmean_ternary,
):
    _op.register_autograd(no_backward)
