"""Quantizers and the straight-through estimator of BitNet b1.58 (arXiv 2402.17764).

    gamma = max(mean|W|, 1e-5)            one a tensor, a row, or a group of columns; fp32
    codes = +1 where W >  gamma/2         the exact form of clamp(round(W / gamma), -1, +1):
            -1 where W < -gamma/2         no division, ties at gamma/2 go to 0
             0 elsewhere
    s_x   = max(max|x|, 1e-5) / 127       one a token; x_q = round(x / s_x) in int8
    y     = (codes @ x_q) * s_x * gamma   the sum in int32 is exact, so every path agrees on it

Both roundings have zero gradient almost everywhere, so the backward is *straight-through*: it
takes the gradients of y = x_hat @ W_hat.T and hands them to x and to the latent W unchanged. It is
one autograd function and not the `x + (q(x) - x).detach()` idiom, because in bf16 that sum is
itself rounded and 1.8% of the weights it yields are not ternary. What it keeps for the backward
are the int8 codes and the scales, never floats of their size.

A scale always *multiplies* codes here. absmean is not idempotent (quantizing W_hat again shrinks
the scale by mean|codes|), so whoever stores a quantized weight stores codes and scale.

Shapes: M tokens, K in_features, N out_features, G = ceil(K / group_size) groups of columns.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet_kernels.reference import EPS, absmax_int8, scaled_matmul

Granularity = Literal["tensor", "row", "group"]
GradMask = Literal["none", "clip", "trust"]


def absmean_ternary(
    weight: Tensor,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    alpha: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Ternary codes and their scale, statistics in fp32 (arXiv 2402.17764, eqs. 1-3).

    Arguments:
        weight: float ``[N, K]``.
        granularity: one scale a ``"tensor"``, a ``"row"`` or a ``"group"`` of ``group_size``
            columns (the last group of a row may be shorter; its mean is over its own columns).
        alpha: the threshold in units of gamma. 0.5 is rounding; TWN (arXiv 1605.04711) uses 0.7.
    Returns:
        codes int8 ``[N, K]`` in {-1, 0, +1}; gamma fp32 ``[]``, ``[N]`` or ``[N, G]``, such that
        ``codes * gamma`` approximates the weight. Where the weights under a scale hold a NaN or an
        infinity, that gamma is NaN (and so is all that is computed with it).
    """
    w = weight.float()
    magnitude = w.abs()
    if granularity == "tensor":
        gamma = _clamped(magnitude.mean())
        threshold = alpha * gamma
    elif granularity == "row":
        gamma = _clamped(magnitude.mean(1))
        threshold = alpha * gamma.unsqueeze(1)
    else:
        groups = [group.mean(1) for group in magnitude.split(group_size, 1)]
        gamma = _clamped(torch.stack(groups, 1))
        threshold = alpha * spread_groups(gamma, group_size, w.shape[1])
    codes = (w > threshold).to(torch.int8) - (w < -threshold).to(torch.int8)
    return codes, gamma


def _clamped(mean: Tensor) -> Tensor:
    return torch.where(mean.isfinite(), mean.clamp(min=EPS), torch.nan)


def spread_groups(gamma: Tensor, group_size: int, in_features: int) -> Tensor:
    """One scale a column: ``[N, G]`` -> ``[N, K]``."""
    return gamma.repeat_interleave(group_size, 1)[:, :in_features]


def dequantize(codes: Tensor, gamma: Tensor, group_size: int = 128) -> Tensor:
    """``W_hat = codes * gamma``: int8 ``[N, K]``, gamma as absmean_ternary gives it -> fp32."""
    if gamma.dim() == 1:
        gamma = gamma.unsqueeze(1)
    elif gamma.dim() == 2:
        gamma = spread_groups(gamma, group_size, codes.shape[1])
    return codes.float() * gamma


def _gradient_mask(
    weight: Tensor, codes: Tensor, gamma: Tensor, group_size: int, mask: GradMask, c: float
) -> Tensor:
    """Where the gradient of a latent weight passes.

    ``clip``: where |W| <= c * gamma. ``trust``: where |W - W_hat| <= c * gamma, the trust region
    of QuEST (arXiv 2502.05003); at c = 0.5, half a quantization step, that is |W| <= 1.5 gamma.
    """
    bound = c * dequantize(torch.ones_like(codes), gamma, group_size)
    w = weight.float()
    if mask == "trust":
        w = w - dequantize(codes, gamma, group_size)
    return w.abs() <= bound


class _TernaryLinear(torch.autograd.Function):
    """y = x_hat @ W_hat.T + b forward in exact integers, straight-through backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        granularity: Granularity,
        group_size: int,
        mask: GradMask,
        mask_c: float,
        dtype: torch.dtype,
    ) -> Tensor:
        x_q, s_x = absmax_int8(x)
        codes, gamma = absmean_ternary(weight, granularity, group_size)
        ctx.save_for_backward(x_q, s_x, codes, gamma, weight if mask != "none" else None)
        ctx.group_size, ctx.mask, ctx.mask_c = group_size, mask, mask_c
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return scaled_matmul(x_q, s_x, codes, gamma, bias, dtype, group_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """quantization.md section 2: dx = dy @ W_hat, dW = dy.T @ x_hat, db = sum(dy).

        Codes are exact in bf16 as in fp32, so the products run in the dtype of ``dy`` on the codes
        themselves; the scales are folded into the other factor or the result, in fp32.
        """
        x_q, s_x, codes, gamma, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            if gamma.dim() == 0:
                dx = (dy @ codes.to(dy.dtype)) * gamma
            elif gamma.dim() == 1:
                dx = (dy * gamma).to(dy.dtype) @ codes.to(dy.dtype)
            else:
                dx = dy @ dequantize(codes, gamma, ctx.group_size).to(dy.dtype)
            dx = dx.to(x_dtype)
        if ctx.needs_input_grad[1]:
            dw = (dy * s_x.unsqueeze(1)).to(dy.dtype).t() @ x_q.to(dy.dtype)
            if weight is not None:
                dw = dw * _gradient_mask(weight, codes, gamma, ctx.group_size, ctx.mask, ctx.mask_c)
            dw = dw.to(weight_dtype)
        if bias_dtype is not None and ctx.needs_input_grad[2]:
            db = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(bias_dtype)
        return dx, dw, db, None, None, None, None, None


def output_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer returns for ``x``: the autocast dtype where that is on, else its own."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def ternary_linear_ste(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    mask: GradMask = "none",
    mask_c: float = 1.0,
) -> Tensor:
    """The training forward of a ternary linear layer, differentiable straight-through.

    Arguments:
        x: float ``[..., K]``; any leading dimensions, empty ones too.
        weight: the latent float ``[N, K]``; bias: ``[N]`` or None, added after the rescale.
        granularity, group_size: of the weight's scale, see :func:`absmean_ternary`.
        mask, mask_c: which latent weights receive a gradient. ``"none"``: all. ``"clip"``: where
            |W| <= mask_c * gamma. ``"trust"``: where |W - W_hat| <= mask_c * gamma (arXiv
            2502.05003).
    Returns:
        ``[..., N]`` in the autocast dtype where autocast is on, else in the dtype of ``x``.
    Raises:
        TypeError: ``x`` is not floating point. ValueError: its last dimension is not K.
    """
    if not x.is_floating_point():
        raise TypeError(f"input: expected a floating-point tensor, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input: expected shape [..., {weight.shape[1]}] (in_features), got {list(x.shape)}"
        )
    rows = x.reshape(x.shape[:-1].numel(), weight.shape[1])
    y = _TernaryLinear.apply(
        rows, weight, bias, granularity, group_size, mask, mask_c, output_dtype(x)
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])
