"""Every quantizer of the QAT lab: from floats to integer codes and scales, and the way back.

    value = (codes - zero_point) * scale        codes int8, scale fp32, zero_point int32 or none

| weights       | codes               | scale                                | source           |
|---------------|---------------------|--------------------------------------|------------------|
| "int"         | -Qp..Qp             | max abs(W) / Qp, Qp = 2^(b-1) - 1    |                  |
| "int", affine | -2^(b-1)..2^(b-1)-1 | (max - min) / (2^b - 1), 0 in range  | arXiv 1712.05877 |
| "absmean"     | -1, 0, 1            | mean abs(W)                          | arXiv 2402.17764 |
| "absmedian"   | -1, 0, 1            | median abs(W)                        | arXiv 2407.09527 |
| "twn"         | -1, 0, 1            | mean of abs(W) > 0.7 mean abs(W)     | arXiv 1605.04711 |
| "sign"        | -1, 1               | mean abs(W)                          | arXiv 1603.05279 |
| "lsq"         | -2^(b-1)..2^(b-1)-1 | learned step                         | arXiv 1902.08153 |
| "seq"         | -3, -1, 1, 3        | learned alpha / 4                    | arXiv 2502.02631 |
| "seq_ternary" | -1, 0, 1            | learned alpha * 2/3                  | arXiv 2502.02631 |

Rounding is half to even, statistics are fp32. A statistic is clamped to >= 1e-5 (the statistic, not
the scale), so zeros divide by nothing; NaN or infinity under a scale makes that scale NaN.

The gradient is *straight-through*: the quantized value takes the place of the float, and what
arrives for it is handed on to the float, except where a mask says that moving the float would not
have moved the value. One autograd function does it, not `x + (q(x) - x).detach()`, which rounds
once more. The learned scales have gradients of their own, see :class:`_LearnedStep`.

Shapes: M tokens, K in_features, N out_features, G = ceil(K / group_size) groups of columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet.qat.grid import (
    affine_scale,
    clamped,
    code_range,
    count,
    dequantize,
    reduce,
    spread,
    symmetric_scale,
    ternary_codes,
    to_int8,
    unclamped,
    values,
    within,
)
from bitnet.qat.recipe import LEARNED, TERNARY, Recipe
from bitnet.quant import absmean_ternary
from bitnet_kernels.reference import EPS

TWN_ALPHA = 0.7
"""Threshold of TWN in units of mean|W| (arXiv 1605.04711, eq. 6)."""
SEQ_CLIP = 1 - 1e-2
"""Where SEQ clips W / alpha: short of 1, so that rounding stays on the outermost level."""
_UNIT = {"lsq": 1.0, "seq": 1 / 4, "seq_ternary": 2 / 3}
"""The scale of a learned quantizer in units of its parameter."""

__all__ = [
    "Quantized",
    "absmax_codes",
    "dequantize",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "initial_step",
    "round_codes",
    "static_codes",
    "static_range",
    "weight_codes",
    "weight_range",
    "weight_scale",
]


class Quantized(NamedTuple):
    """A quantized tensor: ``hat = (codes - zero_point) * scale``.

    ``hat`` is computed in fp32, cast to the input's dtype, and differentiable. codes (int8, the
    input's shape), scale (fp32) and zero_point (int32 in the shape of scale, None for symmetric
    codes) carry no gradient.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    hat: Tensor


def weight_range(recipe: Recipe) -> tuple[int, int]:
    """The lowest and the highest code of the recipe's weights."""
    if recipe.weights == "none":
        raise ValueError("recipe: weights 'none' has no codes")
    if recipe.weights in TERNARY or recipe.weights == "sign":
        return -1, 1
    if recipe.weights == "seq":
        return -3, 3
    return code_range(recipe.bits, recipe.weights == "int" and recipe.symmetric)


@torch.no_grad()
def weight_codes(
    weight: Tensor, recipe: Recipe, step: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize a weight; no gradient.

    Arguments:
        weight: float ``[N, K]``, N, K >= 1.
        recipe: which quantizer, bits and granularity.
        step: the learned parameter of "lsq" and "seq" in the shape of the scale (of any sign, see
            :func:`fake_quantize_weight`), None for the others.
    Returns:
        codes int8 ``[N, K]``; scale fp32 ``[]``, ``[N]`` or ``[N, G]`` by granularity; zero_point
        int32 of that shape, or None.
    Raises:
        ValueError: a weight that is not a non-empty matrix, a step missing, superfluous or of
        another shape. TypeError: a weight that is not floating point.
    """
    if (step is None) == (recipe.weights in LEARNED):
        raise ValueError("step: expected for the learned quantizers, and only for them")
    if step is not None:
        scale = _learned_scale(weight, recipe, step)
        return _learned_codes(weight, scale, recipe), scale, None
    if recipe.weights == "absmean":
        _check_weight(weight)
        codes, scale = absmean_ternary(weight, recipe.granularity, recipe.group_size, recipe.alpha)
        return codes, scale, None
    scale, zero_point = weight_scale(weight, recipe)
    w = weight.float()
    if recipe.weights == "int":
        codes = round_codes(w, scale, zero_point, recipe)
    elif recipe.weights == "sign":
        codes = torch.where(w >= 0, 1, -1).to(torch.int8)
    elif recipe.weights == "twn":
        codes = ternary_codes(w, _twn_threshold(w, recipe))
    else:
        codes = ternary_codes(w, recipe.alpha * spread(scale, recipe.group_size, w))
    return codes, scale, zero_point


@torch.no_grad()
def weight_scale(weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point as :func:`weight_codes` finds them in the weights' statistics.

    Raises ValueError for the learned quantizers, whose scale is not a statistic.
    """
    if recipe.weights == "none" or recipe.weights in LEARNED:
        raise ValueError(f"recipe: weights {recipe.weights!r} have no scale to be found")
    _check_weight(weight)
    if recipe.weights == "absmean":
        _, scale = absmean_ternary(weight, recipe.granularity, recipe.group_size, recipe.alpha)
        return scale, None
    w = weight.float()
    if recipe.weights == "int" and not recipe.symmetric:
        low, high = reduce(w, recipe, Tensor.amin), reduce(w, recipe, Tensor.amax)
        return affine_scale(low, high, recipe.bits)
    magnitude = w.abs()
    absmax = reduce(magnitude, recipe, Tensor.amax)
    if recipe.weights == "int":
        return symmetric_scale(absmax, recipe.bits), None
    if recipe.weights == "absmedian":
        statistic = reduce(magnitude, recipe, _median)
    elif recipe.weights == "sign":
        statistic = reduce(magnitude, recipe, Tensor.mean)
    else:
        kept = magnitude > _twn_threshold(w, recipe)
        total = reduce(magnitude * kept, recipe, Tensor.sum)
        statistic = total / reduce(kept.float(), recipe, Tensor.sum).clamp(min=1)
    return torch.where(absmax.isfinite(), clamped(statistic), torch.nan), None


def _twn_threshold(w: Tensor, recipe: Recipe) -> Tensor:
    mean = clamped(reduce(w.abs(), recipe, Tensor.mean))
    return TWN_ALPHA * spread(mean, recipe.group_size, w)


@torch.no_grad()
def initial_step(weight: Tensor, recipe: Recipe) -> Tensor:
    """Where a learned scale starts, fp32 in the shape of the scale.

    "lsq": ``2 mean|W| / sqrt(Qp)`` (arXiv 1902.08153, section 2.1); "seq", "seq_ternary":
    ``max|W|`` (arXiv 2502.02631). ValueError for the other quantizers.
    """
    if recipe.weights not in LEARNED:
        raise ValueError(f"recipe: {recipe.weights!r} has no learned scale")
    _check_weight(weight)
    magnitude = weight.float().abs()
    if recipe.weights == "lsq":
        mean = clamped(reduce(magnitude, recipe, Tensor.mean))
        return 2 * mean / mean.new_full((), weight_range(recipe)[1]).sqrt()
    return clamped(reduce(magnitude, recipe, Tensor.amax))


@torch.no_grad()
def round_codes(weight: Tensor, scale: Tensor, zero_point: Tensor | None, recipe: Recipe) -> Tensor:
    """The nearest codes under a given scale, elementwise: what GPTQ and AWQ round with.

    Arguments:
        weight: float ``[N, K']``, any columns; scale: ``[]``, ``[N]``, or ``[N, G]`` for the
            groups of those columns; zero_point: in the shape of scale, or None.
    Returns:
        codes int8 ``[N, K']``.
    Raises:
        ValueError: a quantizer other than "int" and "absmean".
    """
    if recipe.weights == "absmean":
        threshold = recipe.alpha * spread(scale, recipe.group_size, weight)
        return ternary_codes(weight.float(), threshold)
    if recipe.weights != "int":
        raise ValueError(f"recipe: {recipe.weights!r} does not round with a given scale")
    return to_int8(unclamped(weight, scale, zero_point, recipe.group_size), *weight_range(recipe))


def fake_quantize_weight(weight: Tensor, recipe: Recipe, step: Tensor | None = None) -> Quantized:
    """:func:`weight_codes` and their value, differentiable in the weight and the learned step.

    The gradient of a weight is that of its value where it passes: everywhere, or

    - ``recipe.grad_mask = "clip"``: where the weight is not saturated. "int": it rounds to a code
      of the grid; ternary and sign: |W| <= grad_mask_c * scale.
    - ``"trust"``: |W - W_hat| <= grad_mask_c * scale (QuEST, arXiv 2502.05003).
    - "lsq", "seq": inside their range in any case, see :class:`_LearnedStep`.

    Arguments, errors: as :func:`weight_codes`.
    """
    codes, scale, zero_point = quantized = weight_codes(weight, recipe, step)
    if step is not None:
        hat = _LearnedStep.apply(weight, step, codes, scale, recipe)
    else:
        zero = None if zero_point is None else spread(zero_point, recipe.group_size, codes)
        spread_scale = spread(scale, recipe.group_size, codes)
        passes = _passes(weight, *quantized, recipe)
        hat = _StraightThrough.apply(weight, codes, spread_scale, zero, passes)
    return Quantized(codes, scale, zero_point, hat)


@torch.no_grad()
def _passes(
    weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, recipe: Recipe
) -> Tensor | None:
    """The gradient mask, bool ``[N, K]``; None where all pass."""
    clip = recipe.grad_mask == "clip"
    if recipe.grad_mask == "none" or (clip and recipe.weights in LEARNED):
        return None
    if clip and recipe.weights == "int":
        codes = unclamped(weight, scale, zero_point, recipe.group_size)
        return within(codes, *weight_range(recipe))
    w = weight.float()
    if not clip:
        w = w - dequantize(codes, scale, zero_point, recipe.group_size)
    return w.abs() <= recipe.grad_mask_c * spread(scale, recipe.group_size, weight)


class _StraightThrough(torch.autograd.Function):
    """The value of the codes forward; backward its gradient goes to ``x`` where the mask lets it
    pass.

    The value is computed here: what a function is given and returns is a view to autograd, which
    forbids in-place operators on it.
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
        ctx.save_for_backward(passes)
        return values(codes, scale, zero_point).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (passes,) = ctx.saved_tensors
        return (dy if passes is None else dy * passes), *(4 * [None])


def _learned_scale(weight: Tensor, recipe: Recipe, step: Tensor) -> Tensor:
    """``unit * max(|step|, floor)``: an optimizer may move a step to 0 or below.

    By |step| its sign does not matter. The floor is that of the statistics: the highest code (of
    "lsq"), or alpha (of "seq"), stands for at least 1e-5.
    """
    _check_weight(weight)
    absmax = reduce(weight.float().abs(), recipe, Tensor.amax)
    if step.shape != absmax.shape:
        raise ValueError(f"step: expected shape {list(absmax.shape)}, got {list(step.shape)}")
    floor = EPS / weight_range(recipe)[1] if recipe.weights == "lsq" else EPS
    magnitude = step.float().abs()
    finite = absmax.isfinite() & magnitude.isfinite()
    return torch.where(finite, _UNIT[recipe.weights] * magnitude.clamp(min=floor), torch.nan)


def _learned_codes(weight: Tensor, scale: Tensor, recipe: Recipe) -> Tensor:
    v = weight.float() / spread(scale, recipe.group_size, weight)
    if recipe.weights != "lsq":
        end = SEQ_CLIP / _UNIT[recipe.weights]
        v = v.clamp(-end, end)
    # The levels of "seq" are -1.5, -0.5, 0.5, 1.5 in units of alpha / 2: odd codes of alpha / 4.
    codes = 2 * (v / 2 - 0.5).round() + 1 if recipe.weights == "seq" else v.round()
    return to_int8(codes, *weight_range(recipe))


class _LearnedStep(torch.autograd.Function):
    """``hat = codes * scale`` with a learned scale (arXiv 1902.08153, eqs. 3-5; 2502.02631).

    The gradient takes rounding for the addition of a constant, so with v = W / scale

        inside the range:    d hat / dW = 1    d hat / d scale = codes - v
        on its ends:         d hat / dW = 0    d hat / d scale = codes

    where the range of "lsq" is lowest < v < highest and that of "seq" |W / alpha| <= 0.99. The
    step's gradient is multiplied by g = 1 / sqrt(n Qp), n weights under the scale, Qp the highest
    value in units of the step, which keeps its updates in proportion to those of the weights. A
    step below the floor takes the gradient too, or it could never grow again.

    What is kept for the backward are the weight, which exists anyway, the int8 codes, and scales.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        step: Tensor,
        codes: Tensor,
        scale: Tensor,
        recipe: Recipe,
    ) -> Tensor:
        ctx.save_for_backward(weight, step, codes, scale)
        ctx.recipe = recipe
        return dequantize(codes, scale, None, recipe.group_size).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, codes, scale = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        unit = _UNIT[recipe.weights]
        lowest, highest = weight_range(recipe)
        v = weight.float() / spread(scale, recipe.group_size, weight)
        if recipe.weights == "lsq":
            inside = (v > lowest) & (v < highest)
        else:
            inside = v.abs() <= SEQ_CLIP / unit
        dweight = dstep = None
        if ctx.needs_input_grad[0]:
            passes = _passes(weight, codes, scale, None, recipe)
            dweight = dy * (inside if passes is None else inside & passes)
        if ctx.needs_input_grad[1]:
            dscale = reduce(dy.float() * (codes - v * inside), recipe, Tensor.sum)
            g = (count(weight, recipe) * (unit * highest)).rsqrt()
            dstep = (dscale * (unit * g)).to(step.dtype)
            dstep = torch.where(step < 0, -dstep, dstep)
        return dweight, dstep, None, None, None


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
    return to_int8((x / scale.unsqueeze(-1)).round(), *code_range(bits, True)), scale


@torch.no_grad()
def static_range(
    low: Tensor, high: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of codes that represent [low, high], widened to hold 0 exactly.

    Arguments:
        low, high: fp32 ``[]`` (or any one shape).
    Returns:
        scale fp32; zero_point int32, or None for symmetric codes. A range that is not finite has
        scale NaN.
    """
    low, high = low.float(), high.float()
    if symmetric:
        return symmetric_scale(torch.maximum(low.abs(), high.abs()), bits), None
    return affine_scale(low, high, bits)


@torch.no_grad()
def static_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Codes under the scale and zero point of :func:`static_range`: float ``[...]`` -> int8.

    What lies outside the range takes its nearest end, infinities too; NaN takes the code of 0.
    """
    codes = unclamped(x.nan_to_num(0.0), scale, zero_point)
    return to_int8(codes, *code_range(bits, zero_point is None))


def activation_codes(
    x: Tensor,
    recipe: Recipe,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of activations by ``recipe.activations`` and ``recipe.activation_bits``.

    Arguments:
        x: float ``[..., K]``.
        scale, zero_point: of :func:`static_range`, for "static" (required there) and only there.
        per_sample: for "absmax": one scale an index of the first axis (what a convolution needs)
            instead of one a token.
    Returns:
        codes int8 of x's shape; scale fp32: "absmax" ``x.shape[:-1]`` or ``x.shape[:1]``, "static"
        ``[]``; the zero point. Where x holds NaN or infinity that scale is NaN, as are all static
        ones then: codes would hide it.
    Raises:
        ValueError: "none" has no codes; a scale missing or superfluous. TypeError: x is not
        floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if recipe.activations == "none":
        raise ValueError("recipe: activations 'none' have no codes")
    if (scale is None) == (recipe.activations == "static"):
        raise ValueError("scale: expected for static activations, and only for them")
    bits = recipe.activation_bits
    if scale is None:
        codes, scale = absmax_codes(x.flatten(1) if per_sample else x, bits)
        return codes.reshape(x.shape), scale, zero_point
    codes = static_codes(x, scale, zero_point, bits)
    return codes, torch.where(x.isfinite().all(), scale, torch.nan), zero_point


def fake_quantize_activation(
    x: Tensor,
    recipe: Recipe,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    per_sample: bool = False,
) -> Quantized:
    """:func:`activation_codes` and their value, with the identity as gradient; "static": with a
    gradient of 0 outside the range.

    Arguments, errors: as :func:`activation_codes`.
    """
    codes, used, _ = activation_codes(x, recipe, scale, zero_point, per_sample)
    passes = None
    if scale is not None:
        with torch.no_grad():
            ends = code_range(recipe.activation_bits, zero_point is None)
            passes = within(unclamped(x, scale, zero_point), *ends)
    per_value = used.reshape(*used.shape, *(x.dim() - used.dim()) * [1]) if used.dim() else used
    hat = _StraightThrough.apply(x, codes, per_value, zero_point, passes)
    return Quantized(codes, used, zero_point, hat)


def _check_weight(weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor, got {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected a non-empty [N, K], got {list(weight.shape)}")


def _median(x: Tensor, dim: int) -> Tensor:
    return x.median(dim).values  # of an even count the lower of the middle two
