"""Checks of the operators' arguments. Every message begins with the argument's name."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of activations, biases and weights."""


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a tensor with strides (not sparse, not nested)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a strided tensor, got {value.layout}")


def check_count(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless ``value`` is an integer of at least 1, or a symbolic
    one."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1 or value >= 2**31:
        raise ValueError(f"{name}: expected at least 1 and less than 2^31, got {value}")


def check_columns(name: str, columns: int) -> None:
    """Raise ValueError if sums of so many columns may overflow int32: if K * 128 >= 2^31."""
    if columns >= 2**24:
        raise ValueError(f"{name}: K = {columns} may overflow int32 sums; expected K < 2^24")


def check_x(x: Tensor, name: str = "x") -> None:
    """Raise TypeError or ValueError unless ``x`` is float ``[..., K]`` with K >= 1."""
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape [..., K] with K >= 1, got {list(x.shape)}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless ``tensor`` has the dtype."""
    check_tensor(name, tensor)
    if tensor.dtype != dtype:
        expected = str(dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")


def check_matrix(name: str, matrix: Tensor, columns: int) -> None:
    """Raise TypeError or ValueError unless ``matrix`` is int8 ``[N, columns]``."""
    check_dtype(name, matrix, torch.int8)
    if matrix.dim() != 2 or matrix.shape[1] != columns:
        raise ValueError(f"{name}: expected shape [N, {columns}], got {list(matrix.shape)}")


def check_x_q(x_q: Tensor) -> None:
    """Raise TypeError or ValueError unless ``x_q`` is int8 ``[..., K]`` with 1 <= K < 2^24."""
    check_dtype("x_q", x_q, torch.int8)
    if x_q.dim() == 0 or x_q.shape[-1] == 0:
        raise ValueError(f"x_q: expected shape [..., K] with K >= 1, got {list(x_q.shape)}")
    check_columns("x_q", x_q.shape[-1])


def check_scale(scale: Tensor, n: int, more: str = "") -> None:
    """Raise TypeError or ValueError unless ``scale`` is fp32 ``[]`` or ``[N]``; the message names
    ``more`` as allowed, too."""
    check_dtype("scale", scale, torch.float32)
    if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != n):
        raise ValueError(f"scale: expected shape [] or [{n}]{more}, got {list(scale.shape)}")


def check_vector(name: str, vector: Tensor, length: int) -> None:
    """Raise TypeError or ValueError unless ``vector`` is float ``[length]``."""
    check_tensor(name, vector)
    if vector.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a float dtype, got {vector.dtype}")
    if vector.dim() != 1 or vector.shape[0] != length:
        raise ValueError(f"{name}: expected shape [{length}], got {list(vector.shape)}")


def check_device(x: Tensor, **others: Tensor) -> None:
    """Raise ValueError unless all ``others`` are on the device of the activations ``x``."""
    for name, other in others.items():
        check_tensor(name, other)
        if other.device != x.device:
            raise ValueError(f"{name}: is on {other.device}, but the activations on {x.device}")


def check_bias(bias: Tensor | None, n: int, x: Tensor) -> None:
    """Raise TypeError or ValueError unless ``bias`` is None or float ``[N]`` on x's device."""
    if bias is not None:
        check_vector("bias", bias, n)
        check_device(x, bias=bias)


def check_out_dtype(out_dtype: torch.dtype | None) -> None:
    """Raise TypeError unless ``out_dtype`` is None or a float dtype."""
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype: expected a float dtype, got {type(out_dtype).__name__}")
    if out_dtype not in (None, *FLOATS):
        raise TypeError(f"out_dtype: expected a float dtype, got {out_dtype}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise TypeError or ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is none of {', '.join(choices)}")


def no_backward(ctx: Any, *grads: Any) -> None:
    """The backward of every operator: raises a RuntimeError that says what to do instead."""
    raise RuntimeError(
        "the operators of bitnet_kernels have no backward: packed weights are for inference. "
        "Train with bitnet.BitLinear and pack afterwards, or call under torch.no_grad()."
    )
