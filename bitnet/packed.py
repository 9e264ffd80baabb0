"""The product of a packed layer, differentiable in its input.

Packed weights are constants: codes and a scale, with nothing to train. The gradient of the input is
straight-through, as in BitLinear,

    dx = dy @ W_hat        W_hat = scale * codes [N, K]

so modules before or beside a packed layer can be trained: adapters (LoRA), an embedding, a prompt.
The codes are unpacked for the product and dropped. Between forward and backward nothing is kept
except what the layer holds anyway.

M tokens, K in_features, N out_features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet.quant import input_gradient
from bitnet_kernels import ternary_linear
from bitnet_kernels.packing import codes_of


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kernel: str,
    group_size: int,
    planes: Tensor | None,
) -> Tensor:
    """:func:`bitnet_kernels.ternary_linear`, with gradients of ``x`` and ``bias`` if they are
    needed. Arguments, result and errors are the same."""
    trains = x.requires_grad or (bias is not None and bias.requires_grad)
    if trains and torch.is_grad_enabled():
        return _PackedLinear.apply(x, packed, scale, bias, kernel, group_size, planes)
    return ternary_linear(x, packed, scale, bias, kernel, group_size, planes)


class _PackedLinear(torch.autograd.Function):
    """The autograd function; its formulas are at the top of this file."""

    @staticmethod
    def forward(
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        kernel: str,
        group_size: int,
        planes: Tensor | None,
    ) -> Tensor:
        return ternary_linear(x, packed, scale, bias, kernel, group_size, planes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, packed, scale, bias, _, ctx.group_size, _ = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(packed, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dx = dy @ W_hat, db = sum(dy)."""
        packed, scale = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dx = db = None
        if ctx.needs_input_grad[0]:
            codes = codes_of(packed, ctx.shape[-1])
            dx = input_gradient(dy, codes, scale, ctx.group_size).to(ctx.dtype).reshape(ctx.shape)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            wide = torch.promote_types(dy.dtype, torch.float32)
            db = dy.sum(0, dtype=wide).to(ctx.bias_dtype)
        return dx, None, None, db, None, None, None
