"""The matmul operators: checked, registered with torch, dispatched to a kernel.

Each op is a ``torch.library.custom_op``: one implementation, which dispatches by device, and a fake
one that gives shapes, so that ``torch.compile`` sees no graph break. What differs between devices
is what ``kernel="auto"`` means; every kernel gives the same int32 accumulators bit
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
    check_columns,
    check_count,
    check_device,
    check_tensor,
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
        x_q: int8 ``[M, K]``, 1 <= K < 2^24, so that int32 holds every sum.
        packed: uint8 ``[N, P]`` from :func:`bitnet_kernels.packing.pack_ternary`.
        kernel: one of :data:`bitnet_kernels.KERNELS`.
        planes: :func:`bitnet_kernels.packing.bit_planes` of ``packed``, a second layout that
            ``"popcount"`` reads. Without it ``"addsub"`` is ``"sad"``. Planes of other weights give
            the product with those.
    Returns:
        int32 ``[M, N]``.
    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape, or the kernel is
            unknown or cannot run here.
    """
    _check_codes(x_q)
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
    check_columns("x", x.shape[-1])
    check_packed(packed, packed_columns(x.shape[-1]), x.shape[-1])
    check_device(x, packed=packed, scale=scale)
    _check_kernel(kernel, packed, planes)
    check_count("group_size", group_size)
    n = packed.shape[0]
    if scale.dim() == 2:
        _check_dtype("scale", scale, torch.float32)
        if kernel not in ("auto", "reference"):
            raise ValueError(
                f"kernel: {kernel!r} has no group-wise scales; use 'auto' or 'reference'"
            )
        groups = -(-x.shape[-1] // group_size)
        if scale.shape[0] != n or scale.shape[1] != groups:
            raise ValueError(f"scale: expected shape [{n}, {groups}], got {list(scale.shape)}")
    else:
        _check_scale(scale, n, " or [N, ceil(K/group_size)]")
    if bias is not None:
        check_vector("bias", bias, n)
        check_device(x, bias=bias)
    _check_out_dtype(out_dtype)
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
    """:func:`ternary_linear` of tokens that are quantized already, by :func:`bitnet_kernels.quant`
    or one of the fused quantizers: several layers may share them.

    Arguments:
        x_q: int8 ``[..., K]``, 1 <= K < 2^24.
        s_x, row_sum: fp32 and int32 ``[...]``, the scale and the sum of the codes of each token.
        packed, scale, bias, kernel, planes: as for :func:`ternary_linear`, without group-wise
            scales.
        out_dtype: float dtype of the outputs.
    Returns:
        ``[..., N]``: ``((acc * s_x) * scale) + bias`` in fp32, then one cast.
    Raises:
        TypeError, ValueError: as :func:`ternary_linear`. A row sum that is not that of the codes is
            not noticed, and gives wrong outputs.
    """
    _check_codes(x_q)
    check_packed(packed, packed_columns(x_q.shape[-1]), x_q.shape[-1])
    check_device(x_q, packed=packed, s_x=s_x, row_sum=row_sum, scale=scale)
    for name, one, dtype in (("s_x", s_x, torch.float32), ("row_sum", row_sum, torch.int32)):
        _check_dtype(name, one, dtype)
        if one.shape != x_q.shape[:-1]:
            shape = list(x_q.shape[:-1])
            raise ValueError(f"{name}: expected shape {shape}, got {list(one.shape)}")
    _check_kernel(kernel, packed, planes)
    _check_scale(scale, packed.shape[0])
    if bias is not None:
        check_vector("bias", bias, packed.shape[0])
        check_device(x_q, bias=bias)
    _check_out_dtype(out_dtype)
    return _quantized(x_q, s_x, row_sum, packed, scale, bias, kernel, planes, out_dtype)


def _check_codes(x_q: Tensor) -> None:
    check_tensor("x_q", x_q)
    _check_dtype("x_q", x_q, torch.int8)
    if x_q.dim() == 0 or x_q.shape[-1] == 0:
        raise ValueError(f"x_q: expected shape [..., K] with K >= 1, got {list(x_q.shape)}")
    check_columns("x_q", x_q.shape[-1])


def _check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        expected = str(dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")


def _check_scale(scale: Tensor, n: int, more: str = "", name: str = "scale") -> None:
    _check_dtype(name, scale, torch.float32)
    if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != n):
        raise ValueError(f"{name}: expected shape [] or [{n}]{more}, got {list(scale.shape)}")


def _check_out_dtype(out_dtype: torch.dtype | None) -> None:
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype: expected a float dtype, got {type(out_dtype).__name__}")
    if out_dtype not in (None, *FLOATS):
        raise TypeError(f"out_dtype: expected a float dtype, got {out_dtype}")


def _check_kernel(kernel: str, packed: Tensor, planes: Tensor | None) -> None:
    check_choice("kernel", kernel, KERNELS)
    if planes is None:
        if kernel == "popcount":
            raise ValueError("planes: kernel 'popcount' needs them; see bit_planes(packed)")
        return
    check_tensor("planes", planes)
    _check_dtype("planes", planes, torch.int32)
    shape = [packed.shape[0], 2, plane_words(packed.shape[1])]
    if list(planes.shape) != shape:
        raise ValueError(f"planes: expected shape {shape}, got {list(planes.shape)}")
    check_device(packed, planes=planes)


def _usable(device: torch.device) -> bool:
    """Whether the Triton kernels run well on a device: CUDA from compute capability 8.0."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


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
    if device.type == "cuda" and not _usable(device):
        raise ValueError(f"kernel: {kernel!r} needs compute capability 8.0 or later; use 'auto'")


def _resolved(kernel: str, device: torch.device) -> str:
    """What ``"auto"`` means: the reference but on CUDA with Triton, where the tables decide."""
    return "reference" if kernel == "auto" and not _usable(device) else kernel


def shaped_result(y: Tensor, *shape: int) -> Tensor:
    """A fresh result in its final shape, with the memory of ``y``, which nobody keeps. It is no
    view for autograd, which forbids in-place operators on a view that a custom function returns."""
    result: Tensor = torch.ops.aten._unsafe_view(y.contiguous(), shape)
    return result


@torch.library.custom_op("bitnet::ternary_matmul", mutates_args=())
def _matmul(x_q: Tensor, packed: Tensor, kernel: str, planes: Tensor | None) -> Tensor:
    kernel = _resolved(kernel, x_q.device)
    if kernel == "reference":
        return reference.ternary_matmul(x_q, packed).contiguous()
    _check_triton(kernel, x_q.device)
    from bitnet_kernels.gpu.matmul import matmul, plan

    (m, k), n = x_q.shape, packed.shape[0]
    return matmul(*plan(kernel, m, n, k, planes is not None, x_q.device), x_q, packed, planes)


@_matmul.register_fake
def _matmul_fake(x_q: Tensor, packed: Tensor, kernel: str, planes: Tensor | None) -> Tensor:
    return x_q.new_empty((x_q.shape[0], packed.shape[0]), dtype=torch.int32)


@torch.library.custom_op("bitnet::quantized_linear", mutates_args=())
def _quantized(
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
    lead, k, n = x_q.shape[:-1], x_q.shape[-1], packed.shape[0]
    tokens, s_x, row_sum = x_q.reshape(-1, k), s_x.reshape(-1), row_sum.reshape(-1)
    kernel = _resolved(kernel, x_q.device)
    if kernel == "reference":
        acc = reference.ternary_matmul(tokens, packed)
        y = reference.rescale(acc, s_x, scale, bias, out_dtype)
        return shaped_result(y, *lead, n)
    _check_triton(kernel, x_q.device)
    from bitnet_kernels.gpu.common import Rescale
    from bitnet_kernels.gpu.matmul import matmul, plan

    choice = plan(kernel, tokens.shape[0], n, k, planes is not None, x_q.device)
    rescale = Rescale(s_x.contiguous(), scale, bias, out_dtype)
    y = matmul(*choice, tokens, packed, planes, row_sum.contiguous(), rescale)
    return shaped_result(y, *lead, n)


@_quantized.register_fake
def _quantized_fake(
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
    return x_q.new_empty((*x_q.shape[:-1], packed.shape[0]), dtype=out_dtype)


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
    tokens = x.reshape(-1, x.shape[-1])
    kernel = "reference" if scale.dim() == 2 else _resolved(kernel, x.device)
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
    return shaped_result(y, *x.shape[:-1], packed.shape[0])


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


_quantized.register_autograd(no_backward)
_linear.register_autograd(no_backward)
