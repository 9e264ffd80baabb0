"""Grids of codes and scales: the shared arithmetic of weight and activation quantizers.

    value = (codes - zero_point) * scale        code = clamp(round(x / scale) + zero_point)

There is one scale per weight ``[N, K]`` (shape ``[]``), per row (``[N]``), or per group of
``group_size`` columns of a row (``[N, G]``, G = ceil(K / group_size); the last may be shorter).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet.quant import Granularity, spread_groups
from bitnet_kernels.reference import EPS


class Codes(NamedTuple):
    """Integers and their value: ``(codes - zero_point) * scale``."""

    codes: Tensor
    """int8"""
    scale: Tensor
    """fp32. Weights: ``[]``, ``[N]`` or ``[N, G]``. Activations: ``[M]`` (per token), ``[B]`` (per
    sample, for convolutions) or ``[]`` (static)"""
    zero_point: Tensor | None
    """int32 in the shape of scale; None if symmetric"""


def code_range(bits: int, symmetric: bool) -> range:
    """The codes of ``bits`` bits; symmetric codes leave out the lowest."""
    highest = 2 ** (bits - 1) - 1
    return range(-highest if symmetric else -highest - 1, highest + 1)


def reduce(
    x: Tensor,
    granularity: Granularity,
    group_size: int,
    statistic: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Compute a statistic, a function of (tensor, dim), of the values of each scale: ``[N, K]`` ->
    ``[]``, ``[N]`` or ``[N, G]``. A shorter last group is reduced over its own columns."""
    if granularity == "tensor":
        return statistic(x.flatten(), -1)
    if granularity == "row":
        return statistic(x, -1)
    k = x.shape[1]
    whole = k // group_size * group_size
    groups = [statistic(x[:, :whole].unflatten(1, (-1, group_size)), -1)] if whole else []
    if whole < k:
        groups.append(statistic(x[:, whole:], -1).unsqueeze(1))
    return torch.cat(groups, 1)


def count(weight: Tensor, granularity: Granularity, group_size: int) -> Tensor:
    """The number of weights per scale, fp32, broadcastable to the scale."""
    row = torch.ones(1, weight.shape[1], device=weight.device, dtype=torch.float32)
    columns = reduce(row, granularity, group_size, Tensor.sum)
    return columns * weight.shape[0] if granularity == "tensor" else columns


def spread(per_scale: Tensor, group_size: int, like: Tensor) -> Tensor:
    """Make scales (or zero points) ``[]``, ``[N]`` or ``[N, G]`` broadcastable to ``like``:
    ``[N, K]``, or any shape if there is one scale."""
    if per_scale.dim() == 2:
        return spread_groups(per_scale, group_size, like.shape[1])
    return per_scale.unsqueeze(1) if per_scale.dim() == 1 else per_scale


def clamped(statistic: Tensor) -> Tensor:
    """A statistic clamped to >= 1e-5, to be a divisor; NaN where it is not finite."""
    return torch.where(statistic.isfinite(), statistic.clamp(min=EPS), torch.nan)


def symmetric_scale(absmax: Tensor, bits: int) -> Tensor:
    """The scale that maps the largest magnitude to the highest code."""
    # Divide by a tensor: for a number, torch on CUDA would multiply by the reciprocal.
    return clamped(absmax) / absmax.new_full((), code_range(bits, True)[-1])


def affine_scale(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale fp32 and zero point int32 of codes from low to high. The range is widened to include 0,
    which one code represents exactly (arXiv 1712.05877, section 2.1)."""
    levels = code_range(bits, False)
    lowest, highest = levels[0], levels[-1]
    low = low.clamp(max=0)
    scale = clamped(high.clamp(min=0) - low) / low.new_full((), highest - lowest)
    zero_point = (lowest - (low / scale).round()).clamp(lowest, highest)
    return scale, zero_point.nan_to_num(0.0).to(torch.int32)


def unclamped(x: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int = 1) -> Tensor:
    """``round(x / scale) + zero_point``, fp32; x is ``[N, K]`` unless scale is ``[]``."""
    codes = (x.float() / spread(scale, group_size, x)).round()
    return codes if zero_point is None else codes + spread(zero_point, group_size, x)


def within(codes: Tensor, levels: range) -> Tensor:
    """Mask of the codes that need no clamping, bool."""
    return (codes >= levels[0]) & (codes <= levels[-1])


def to_int8(codes: Tensor, levels: range) -> Tensor:
    """Rounded floats, clamped, as int8; NaN (whose scale is NaN) becomes 0."""
    return codes.clamp(levels[0], levels[-1]).nan_to_num(0.0).to(torch.int8)


def ternary_codes(w: Tensor, threshold: Tensor) -> Tensor:
    """1 above the threshold, -1 below -threshold, else 0; int8."""
    return (w > threshold).to(torch.int8) - (w < -threshold).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    """``(codes - zero_point) * scale``: int8 ``[N, K]`` -> fp32 ``[N, K]``."""
    zero = None if zero_point is None else spread(zero_point, group_size, codes)
    return values(codes, spread(scale, group_size, codes), zero)


def values(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """``(codes - zero_point) * scale`` in fp32; scale and zero point are broadcast to the codes."""
    shifted = codes.float() if zero_point is None else codes.float() - zero_point
    return shifted * scale
