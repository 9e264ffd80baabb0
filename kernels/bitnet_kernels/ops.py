"""The public operators: checked, registered with torch, dispatched to a kernel.

Each op is a ``torch.library.custom_op``: a default implementation that any device runs, one for
CUDA, and a fake one that gives shapes, so that ``torch.compile`` sees no graph break. What differs
between devices is what ``kernel="auto"`` means; every kernel gives the same int32 accumulators bit
for bit, and the same outputs.

Triton is imported only when one of its kernels runs. Without it, everything works on any device
but ``kernel="addsub"`` and ``kernel="dot"``.

M tokens, K in_features, N out_features, P = ceil(K/64)*16 packed bytes a row.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.packing import check_packed, packed_columns

KERNELS = ("auto", "addsub", "dot", "reference")
"""``addsub``: multiplication-free; ``dot``: multiplier units on decoded codes; both are Triton, for
CUDA or for the interpreter. ``reference``: torch, anywhere. ``auto``: chosen by device and M."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each token to int8: see :func:`bitnet_kernels.reference.absmax_int8`.

    Arguments:
        x: float ``[..., K]``, K >= 1. Statistics are taken in fp32 whatever the dtype, so a
            float64 beyond fp32's range counts as infinite.
    Returns:
        codes int8 ``[..., K]``, scale fp32 ``[...]``, row sum of the codes int32 ``[...]``. A token
        that holds NaN or infinity gets scale NaN and codes 0.
    Raises:
        TypeError, ValueError: x is not floating point, or has no columns.
    """
    _check_x(x)
    return _quant(x)


def ternary_matmul(x_q: Tensor, packed: Tensor, kernel: str = "auto") -> Tensor:
    """The exact integer product ``acc[m, n] = sum_k codes[n, k] * x_q[m, k]``.

    Arguments:
        x_q: int8 ``[M, K]``, K >= 1.
        packed: uint8 ``[N, P]`` from :func:`bitnet_kernels.packing.pack_ternary`.
        kernel: one of :data:`KERNELS`.
    Returns:
        int32 ``[M, N]``.
    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape, or the kernel is
            unknown or cannot run here.
    """
    if x_q.dtype != torch.int8:
        raise TypeError(f"x_q: expected int8, got {x_q.dtype}")
    if x_q.dim() != 2 or x_q.shape[1] == 0:
        raise ValueError(f"x_q: expected shape [M, K] with K >= 1, got {list(x_q.shape)}")
    _check_kernel(kernel)
    check_packed(packed, packed_columns(x_q.shape[1]), x_q.shape[1])
    _check_device(x_q, packed=packed)
    return _matmul(x_q, packed, kernel)


def ternary_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    kernel: str = "auto",
    group_size: int = 128,
) -> Tensor:
    """Quantize, multiply, rescale: ``y = ((acc * s_x) * scale) + bias`` in fp32, then one cast.

    Arguments:
        x: float ``[..., K]``, K >= 1; see :func:`quant` for float64, NaN and infinity (the outputs
            of such a token are NaN).
        packed: uint8 ``[N, P]`` from :func:`bitnet_kernels.packing.pack_ternary`.
        scale: fp32 ``[]`` (one a tensor), ``[N]`` (one a row) or ``[N, ceil(K/group_size)]`` (one
            a group of ``group_size`` columns; only the reference computes it).
        bias: float ``[N]`` or None; added after the rescale, never scaled.
        kernel: one of :data:`KERNELS`.
    Returns:
        ``[..., N]`` in x's dtype. It has no backward: packed weights are for inference.
    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape, or the kernel is
            unknown or cannot run here.
    """
    _check_x(x)
    _check_kernel(kernel)
    check_packed(packed, packed_columns(x.shape[-1]), x.shape[-1])
    _check_device(x, packed=packed, scale=scale)
    n = packed.shape[0]
    if scale.dtype != torch.float32:
        raise TypeError(f"scale: expected float32, got {scale.dtype}")
    if scale.dim() == 2:
        if group_size < 1:
            raise ValueError(f"group_size: expected at least 1, got {group_size}")
        if kernel in ("addsub", "dot"):
            raise ValueError(
                f"kernel: {kernel!r} has no group-wise scales; use 'auto' or 'reference'"
            )
        groups = -(-x.shape[-1] // group_size)
        if scale.shape[0] != n or scale.shape[1] != groups:
            raise ValueError(f"scale: expected shape [{n}, {groups}], got {list(scale.shape)}")
    elif scale.dim() > 2 or (scale.dim() == 1 and scale.shape[0] != n):
        raise ValueError(
            f"scale: expected shape [], [{n}] or [{n}, ceil(K/group_size)], got {list(scale.shape)}"
        )
    if bias is not None:
        if bias.dtype not in _FLOATS:
            raise TypeError(f"bias: expected a float dtype, got {bias.dtype}")
        if bias.dim() != 1 or bias.shape[0] != n:
            raise ValueError(f"bias: expected shape [{n}], got {list(bias.shape)}")
        _check_device(x, bias=bias)
    return _linear(x, packed, scale, bias, kernel, group_size)


def _check_x(x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape [..., K] with K >= 1, got {list(x.shape)}")


def _check_kernel(kernel: str) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"kernel: {kernel!r} is none of {', '.join(KERNELS)}")


def _check_device(x: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"{name}: is on {other.device}, but the activations on {x.device}")


def _auto_on_cuda(m: int) -> str:
    """The kernel for M = ``m`` tokens: adding beats tensor cores while the weights' bytes, not the
    arithmetic, are what takes time. A measured table replaces this rule with the GPU benchmarks."""
    if find_spec("triton") is None:
        return "reference"
    return "addsub" if m <= 8 else "dot"


def _triton_matmul(kernel: str, device: torch.device) -> Callable[..., Tensor]:
    """The launch function of a Triton kernel; ValueError where it cannot run."""
    if find_spec("triton") is None:
        raise ValueError(f"kernel: {kernel!r} needs Triton, which is not installed; use 'auto'")
    from bitnet_kernels.gpu import addsub, common, dot

    if device.type != "cuda" and not common.INTERPRETED:
        raise ValueError(
            f"kernel: {kernel!r} runs on CUDA tensors; for {device.type} tensors use 'auto', or "
            "set TRITON_INTERPRET=1 before Triton is imported"
        )
    return {"addsub": addsub.matmul, "dot": dot.matmul}[kernel]


def _run_matmul(x_q: Tensor, packed: Tensor, kernel: str) -> Tensor:
    if kernel == "reference":
        return reference.ternary_matmul(x_q, packed).contiguous()
    return _triton_matmul(kernel, x_q.device)(x_q, packed)


def _run_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, kernel: str, group_size: int
) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    if kernel == "reference":
        y = reference.ternary_linear(tokens, packed, scale, bias, group_size)
    else:
        matmul = _triton_matmul(kernel, x.device)
        from bitnet_kernels.gpu.common import Rescale
        from bitnet_kernels.gpu.quant import quant as triton_quant

        x_q, s_x, _ = triton_quant(tokens)
        y = matmul(x_q, packed, Rescale(s_x, scale, bias, x.dtype))
    return y.reshape(*x.shape[:-1], packed.shape[0])


@torch.library.custom_op("bitnet::quant", mutates_args=())
def _quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.quant(x.contiguous())


@_quant.register_kernel("cuda")
def _quant_cuda(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if find_spec("triton") is None:
        return reference.quant(x.contiguous())
    from bitnet_kernels.gpu.quant import quant as triton_quant

    codes, scale, row_sum = triton_quant(x.reshape(-1, x.shape[-1]))
    lead = x.shape[:-1]
    return codes.reshape(x.shape), scale.reshape(lead), row_sum.reshape(lead)


@_quant.register_fake
def _quant_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty(x.shape[:-1], dtype=torch.int32),
    )


@torch.library.custom_op("bitnet::ternary_matmul", mutates_args=())
def _matmul(x_q: Tensor, packed: Tensor, kernel: str) -> Tensor:
    return _run_matmul(x_q, packed, "reference" if kernel == "auto" else kernel)


@_matmul.register_kernel("cuda")
def _matmul_cuda(x_q: Tensor, packed: Tensor, kernel: str) -> Tensor:
    return _run_matmul(x_q, packed, _auto_on_cuda(x_q.shape[0]) if kernel == "auto" else kernel)


@_matmul.register_fake
def _matmul_fake(x_q: Tensor, packed: Tensor, kernel: str) -> Tensor:
    return x_q.new_empty((x_q.shape[0], packed.shape[0]), dtype=torch.int32)


@torch.library.custom_op("bitnet::ternary_linear", mutates_args=())
def _linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, kernel: str, group_size: int
) -> Tensor:
    kernel = "reference" if kernel == "auto" else kernel
    return _run_linear(x, packed, scale, bias, kernel, group_size)


@_linear.register_kernel("cuda")
def _linear_cuda(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, kernel: str, group_size: int
) -> Tensor:
    if kernel == "auto":
        kernel = "reference" if scale.dim() == 2 else _auto_on_cuda(x.numel() // x.shape[-1])
    return _run_linear(x, packed, scale, bias, kernel, group_size)


@_linear.register_fake
def _linear_fake(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, kernel: str, group_size: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _no_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "bitnet::quant and bitnet::ternary_linear have no backward: packed weights are for "
        "inference. Train with bitnet.BitLinear and pack afterwards, or call under torch.no_grad()."
    )


_quant.register_autograd(_no_backward)
_linear.register_autograd(_no_backward)
