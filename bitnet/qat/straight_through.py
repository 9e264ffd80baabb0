"""The straight-through estimator: the value of codes, with the gradient of the float.

The quantized value replaces the float in the forward. The backward passes its gradient to the
float, except where a mask says that a change of the float would not have changed the value. One
autograd function does it, not ``x + (q(x) - x).detach()``, which rounds once more.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet.qat.grid import values


class Quantized(NamedTuple):
    """A quantized tensor: ``hat = (codes - zero_point) * scale``.

    ``hat`` is computed in fp32, cast to the input's dtype, and differentiable. codes (int8, the
    input's shape), scale (fp32) and zero_point (int32 in the shape of scale, None for symmetric
    codes) have no gradient.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    hat: Tensor


class StraightThrough(torch.autograd.Function):
    """Forward: the value of the codes. Backward: the gradient goes to ``x`` where the mask is true.

    The value is computed here: autograd treats a tensor that a function gets and returns as a view,
    and forbids in-place operators on it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        passes: Tensor | None,
    ) -> Tensor:
        """float x of any shape, the rest broadcastable to it -> the value in x's dtype."""
        ctx.save_for_backward(passes)
        return values(codes, scale, zero_point).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dx = dy where the mask is true."""
        (passes,) = ctx.saved_tensors
        return (dy if passes is None else dy * passes), *(4 * [None])
