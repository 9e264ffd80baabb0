"""Activation quantizers: "absmax" computes a scale per token, "static" uses a scale fixed
beforehand.

    value = (codes - zero_point) * scale        codes int8, scale fp32, zero_point int32 or none

"absmax" is symmetric and has one scale per token (for convolutions, per sample). "static" has one
scale for all tokens, from an observed range (observers.py), symmetric or affine. Rounding is half
to even, and scales are clamped like those of weights (quantizers.py).

Shapes: M tokens, K in_features.
"""

import torch
from torch import Tensor

from bitnet.qat.grid import (
    Codes,
    affine_scale,
    code_range,
    symmetric_scale,
    to_int8,
    unclamped,
    within,
)
from bitnet.qat.recipe import Recipe
from bitnet.qat.straight_through import Quantized, StraightThrough


@torch.no_grad()
def absmax_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes per token: ``scale = max(max|x|, 1e-5) / Qp``, ``codes = round(x / scale)``.

    With 8 bits it is :func:`bitnet_kernels.reference.absmax_int8`. A token with NaN or infinity
    gets scale NaN and codes 0.

    Arguments:
        x: float ``[..., K]``, K >= 1.
    Returns:
        codes int8 ``[..., K]``, scale fp32 ``[...]``.
    """
    x = x.float()
    scale = symmetric_scale(x.abs().amax(-1), bits)
    return to_int8((x / scale.unsqueeze(-1)).round(), code_range(bits, True)), scale


@torch.no_grad()
def static_range(
    low: Tensor, high: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of codes that represent [low, high], widened to hold 0 exactly.

    Arguments:
        low, high: fp32 ``[]`` (or any one shape).
    Returns:
        scale fp32; zero_point int32, or None for symmetric codes. A range that is not finite gives
        scale NaN.
    """
    low, high = low.float(), high.float()
    if symmetric:
        return symmetric_scale(torch.maximum(low.abs(), high.abs()), bits), None
    return affine_scale(low, high, bits)


@torch.no_grad()
def static_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Codes under the scale and zero point of :func:`static_range`: float ``[...]`` -> int8.

    Values outside the range, including infinities, get the code of the nearest end; NaN gets the
    code of 0.
    """
    codes = unclamped(x.nan_to_num(0.0), scale, zero_point)
    return to_int8(codes, code_range(bits, zero_point is None))


def activation_codes(
    x: Tensor,
    recipe: Recipe,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    per_sample: bool = False,
) -> Codes:
    """Codes of activations by ``recipe.activations`` and ``recipe.activation_bits``.

    Arguments:
        x: float ``[..., K]``.
        scale, zero_point: of :func:`static_range`; required for "static", otherwise an error.
        per_sample: for "absmax": one scale per index of the first axis, as a convolution needs,
            instead of one per token.
    Returns:
        codes int8 of x's shape; scale fp32: "absmax" ``x.shape[:-1]`` or ``x.shape[:1]``, "static"
        ``[]``; the zero point. NaN or infinity in x makes its scale NaN (the only scale of static
        activations), since codes would hide it.
    Raises:
        ValueError: "none" has no codes; a missing or superfluous scale. TypeError: x is not
        floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if recipe.weights_only:
        raise ValueError("recipe: activations 'none' have no codes")
    if (scale is None) == recipe.static:
        raise ValueError("scale: expected for static activations, and only for them")
    bits = recipe.activation_bits
    if scale is None:
        codes, scale = absmax_codes(x.flatten(1) if per_sample else x, bits)
        return Codes(codes.reshape(x.shape), scale, zero_point)
    codes = static_codes(x, scale, zero_point, bits)
    return Codes(codes, torch.where(x.isfinite().all(), scale, torch.nan), zero_point)


def fake_quantize_activation(
    x: Tensor,
    recipe: Recipe,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    per_sample: bool = False,
) -> Quantized:
    """:func:`activation_codes` and their value. The gradient is the identity; for "static", it is 0
    outside the range.

    Arguments, errors: as :func:`activation_codes`.
    """
    codes, used, _ = activation_codes(x, recipe, scale, zero_point, per_sample)
    passes = None
    if scale is not None:
        with torch.no_grad():
            levels = code_range(recipe.activation_bits, zero_point is None)
            passes = within(unclamped(x, scale, zero_point), levels)
    per_value = used.reshape(*used.shape, *(x.dim() - used.dim()) * [1]) if used.dim() else used
    hat = StraightThrough.apply(x, codes, per_value, zero_point, passes)
    return Quantized(codes, used, zero_point, hat)
