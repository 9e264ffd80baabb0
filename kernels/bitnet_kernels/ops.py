"""The matmul operators: checked, registered with torch, dispatched to a kernel.

Each op is a ``torch.library.custom_op``: a default implementation that any device runs, one for
CUDA, and a fake one that gives shapes, so that ``torch.compile`` sees no graph break. What differs
between devices is what ``kernel="auto"`` means; every kernel gives the same int32 accumulators bit
for bit, and the same outputs.

Triton is imported only when one of its kernels runs. Without it, everything works on any device
but asking for one of its kernels by name.

M tokens, K in_features, N out_features, P = ceil(K/64)*16 packed bytes a row.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.checks import (
    FLOATS,
    check_choice,
    check_device,
    check_vector,
    check_x,
    no_backward,
)
from bitnet_kernels.dispatch import KERNELS
from bitnet_kernels.packing import check_packed, packed_columns, plane_words


def ternary_matmul(
    x_q: Tensor, packed: Tensor, kernel: str = "auto", planes: Tensor | None = None
) -> Tensor:
    """The exact integer product ``acc[m, n] = sum_k codes[n, k] * x_q[m, k]``.

    Arguments:
        x_q: int8 ``[M, K]``, K >= 1.
        packed: uint8 ``[N, P]`` from :func:`bitnet_kernels.packing.pack_ternary`.
        kernel: one of :data:`bitnet_kernels.KERNELS`.
        planes: :func:`bitnet_kernels.packing.bit_planes` of ``packed``, a second layout that
            ``"popcount"`` reads, the fastest of the multiplication-free kernels. Without it
            ``"addsub"`` is ``"sad"``.
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
        x: float ``[..., K]``, K >= 1; see :func:`bitnet_kernels.quant` for float64, NaN and
            infinity (the outputs of such a token are NaN).
        packed: uint8 ``[N, P]`` from :func:`bitnet_kernels.packing.pack_ternary`.
        scale: fp32 ``[]`` (one a tensor), ``[N]`` (one a row) or ``[N, ceil(K/group_size)]`` (one
            a group of ``group_size`` columns; only the reference computes it).
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
    check_packed(packed, packed_columns(x.shape[-1]), x.shape[-1])
    check_device(x, packed=packed, scale=scale)
    _check_kernel(kernel, packed, planes)
    n = packed.shape[0]
    if scale.dtype != torch.float32:
        raise TypeError(f"scale: expected float32, got {scale.dtype}")
    if scale.dim() == 2:
        if group_size < 1:
            raise ValueError(f"group_size: expected at least 1, got {group_size}")
        if kernel not in ("auto", "reference"):
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
        check_vector("bias", bias, n)
        check_device(x, bias=bias)
    if out_dtype not in (None, *FLOATS):
        raise TypeError(f"out_dtype: expected a float dtype, got {out_dtype}")
    return _linear(x, packed, scale, bias, kernel, group_size, planes, out_dtype or x.dtype)


def _check_kernel(kernel: str, packed: Tensor, planes: Tensor | None) -> None:
    check_choice("kernel", kernel, KERNELS)
    if planes is None:
        if kernel == "popcount":
            raise ValueError("planes: kernel 'popcount' needs them; see bit_planes(packed)")
        return
    if planes.dtype != torch.int32:
        raise TypeError(f"planes: expected int32, got {planes.dtype}")
    shape = [packed.shape[0], 2, plane_words(packed.shape[1])]
    if list(planes.shape) != shape:
        raise ValueError(f"planes: expected shape {shape}, got {list(planes.shape)}")
    check_device(packed, planes=planes)


def _check_triton(kernel: str, device: torch.device) -> None:
    """ValueError where a Triton kernel cannot run."""
    if find_spec("triton") is None:
        raise ValueError(f"kernel: {kernel!r} needs Triton, which is not installed; use 'auto'")
    from bitnet_kernels.gpu.common import INTERPRETED

    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"kernel: {kernel!r} runs on CUDA tensors; for {device.type} tensors use 'auto', or "
            "set TRITON_INTERPRET=1 before Triton is imported"
        )


def _auto(device_type: str, kernel: str) -> str:
    """What ``"auto"`` means: the reference but on CUDA with Triton, where the tables decide."""
    usable = device_type == "cuda" and find_spec("triton") is not None
    return "reference" if kernel == "auto" and not usable else kernel


def _run_matmul(x_q: Tensor, packed: Tensor, kernel: str, planes: Tensor | None) -> Tensor:
    if kernel == "reference":
        return reference.ternary_matmul(x_q, packed).contiguous()
    _check_triton(kernel, x_q.device)
    from bitnet_kernels.gpu.matmul import matmul, plan

    (m, k), n = x_q.shape, packed.shape[0]
    return matmul(*plan(kernel, m, n, k, planes is not None, x_q.device), x_q, packed, planes)


def _run_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: str,
    group_size: int,
    planes: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    if kernel == "reference":
        y = reference.ternary_linear(tokens, packed, scale, bias, group_size, out_dtype)
    else:
        _check_triton(kernel, x.device)
        from bitnet_kernels.gpu.common import Rescale
        from bitnet_kernels.gpu.matmul import matmul, plan
        from bitnet_kernels.gpu.quant import quant as triton_quant

        (m, k), (n, p) = tokens.shape, packed.shape
        choice = plan(kernel, m, n, k, planes is not None, x.device)
        x_q, s_x, row_sum = triton_quant(tokens, 4 * p)
        rescale = Rescale(s_x, scale, bias, out_dtype)
        y = matmul(*choice, x_q, packed, planes, row_sum, rescale, full_range=False)
    return y.reshape(*x.shape[:-1], packed.shape[0])


@torch.library.custom_op("bitnet::ternary_matmul", mutates_args=())
def _matmul(x_q: Tensor, packed: Tensor, kernel: str, planes: Tensor | None) -> Tensor:
    return _run_matmul(x_q, packed, _auto("cpu", kernel), planes)


@_matmul.register_kernel("cuda")
def _matmul_cuda(x_q: Tensor, packed: Tensor, kernel: str, planes: Tensor | None) -> Tensor:
    return _run_matmul(x_q, packed, _auto("cuda", kernel), planes)


@_matmul.register_fake
def _matmul_fake(x_q: Tensor, packed: Tensor, kernel: str, planes: Tensor | None) -> Tensor:
    return x_q.new_empty((x_q.shape[0], packed.shape[0]), dtype=torch.int32)


@torch.library.custom_op("bitnet::ternary_linear", mutates_args=())
def _linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: str,
    group_size: int,
    planes: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    kernel = _auto("cpu", kernel)
    return _run_linear(x, packed, scale, bias, kernel, group_size, planes, out_dtype)


@_linear.register_kernel("cuda")
def _linear_cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: str,
    group_size: int,
    planes: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    kernel = "reference" if scale.dim() == 2 else _auto("cuda", kernel)
    return _run_linear(x, packed, scale, bias, kernel, group_size, planes, out_dtype)


@_linear.register_fake
def _linear_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: str,
    group_size: int,
    planes: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=out_dtype)


_linear.register_autograd(no_backward)
