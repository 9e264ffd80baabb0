"""What the operators ask of their arguments. Every message begins with the argument's name."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of activations, biases and weights."""


def check_x(x: Tensor, name: str = "x") -> None:
    """Raise TypeError or ValueError unless ``x`` is float ``[..., K]`` with K >= 1."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape [..., K] with K >= 1, got {list(x.shape)}")


def check_vector(name: str, vector: Tensor, length: int) -> None:
    """Raise TypeError or ValueError unless ``vector`` is float ``[length]``."""
    if vector.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a float dtype, got {vector.dtype}")
    if vector.dim() != 1 or vector.shape[0] != length:
        raise ValueError(f"{name}: expected shape [{length}], got {list(vector.shape)}")


def check_device(x: Tensor, **others: Tensor) -> None:
    """Raise ValueError unless all are on the device of the activations ``x``."""
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"{name}: is on {other.device}, but the activations on {x.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is none of {', '.join(choices)}")


def no_backward(ctx: Any, *grads: Any) -> None:
    """The autograd rule of the operators: RuntimeError, which says what to do instead."""
    raise RuntimeError(
        "the operators of bitnet_kernels have no backward: packed weights are for inference. "
        "Train with bitnet.BitLinear and pack afterwards, or call under torch.no_grad()."
    )
