"""Weight quantizers: from floats to integer codes and scales, and back.

    value = (codes - zero_point) * scale        codes int8, scale fp32, zero_point int32 or None

| name          | codes               | scale                                | source           |
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

Each row is a class, and :data:`WEIGHT_QUANTIZERS` maps the names to the classes. A recipe's
quantizer (:attr:`bitnet.qat.recipe.Recipe.quantizer`) is a frozen object that holds the recipe's
options for weights and has a method for every question about them; no other file compares names.
docs/qat.md, "Add a quantizer", shows how to add one.

Rounding is half to even, statistics are fp32. A statistic is clamped to >= 1e-5 (the statistic, not
the scale), so weights of zeros cause no division by zero. NaN or infinity among the weights of a
scale makes that scale NaN.

straight_through.py has the gradient; :class:`_LearnedStep` has the gradient of learned scales.

Shapes: N out_features, K in_features, G = ceil(K / group_size) groups of columns. A scale has the
shape ``[]``, ``[N]`` or ``[N, G]`` by granularity.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitnet.qat.grid import (
    Codes,
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
    within,
)
from bitnet.qat.straight_through import Quantized, StraightThrough
from bitnet.quant import GradMask, Granularity, absmean_ternary
from bitnet_kernels.reference import EPS

TWN_ALPHA = 0.7
"""Threshold of TWN in units of mean|W| (arXiv 1605.04711, eq. 6)."""
SEQ_CLIP = 1 - 1e-2
"""SEQ clips W / alpha here: below 1, so that rounding stays on the outermost level."""


@dataclass(frozen=True, kw_only=True)
class WeightQuantizer:
    """Quantizes float weights ``[N, K]``. Each subclass is one row of the table above.

    A subclass defines :attr:`levels`, :meth:`statistic` and :meth:`codes`. The fields are the keys
    of ``[quant]`` for weights (see :class:`bitnet.qat.recipe.Recipe`). A quantizer uses only the
    fields that it needs.
    """

    bits: int = 4
    symmetric: bool = True
    granularity: Granularity = "row"
    group_size: int = 128
    alpha: float = 0.5
    grad_mask: GradMask = "none"
    grad_mask_c: float = 1.0

    learned: ClassVar[bool] = False
    """Whether the scale is a parameter, passed to the methods as ``step``."""
    ternary: ClassVar[bool] = False
    """Whether codes are -1, 0, 1 in 1.58 bits, the form for the ternary kernels."""
    rounds_columns: ClassVar[bool] = False
    """Whether GPTQ and AWQ may use it: each code depends only on its own weight and a scale."""

    @property
    def levels(self) -> range:
        """Every code, in ascending order."""
        raise NotImplementedError

    def statistic(self, w: Tensor) -> Tensor:
        """The scale of finite fp32 weights ``[N, K]``, before it is clamped; see :meth:`reduce`."""
        raise NotImplementedError

    def codes(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """int8 codes of fp32 weights for a given scale. With :attr:`rounds_columns` the weights may
        be any columns ``[N, K']``, with the scales of their groups."""
        raise NotImplementedError

    @property
    def affine(self) -> bool:
        """Whether codes have zero points."""
        return False

    @property
    def storage_bits(self) -> int:
        """Bits per weight if codes are packed one by one: 2 for ternary codes."""
        return (len(self.levels) - 1).bit_length()

    @property
    def weight_bits(self) -> float:
        """Bits of information per weight."""
        return 1.58 if self.ternary else float(self.storage_bits)

    def reduce(self, x: Tensor, statistic: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Compute a statistic, a function of (tensor, dim), of the values of each scale:
        ``[N, K]`` -> ``[]``, ``[N]`` or ``[N, G]``."""
        return reduce(x, self.granularity, self.group_size, statistic)

    def spread(self, per_scale: Tensor, like: Tensor) -> Tensor:
        """Make scales or zero points broadcastable to the weights ``like``."""
        return spread(per_scale, self.group_size, like)

    @torch.no_grad()
    def scale(self, weight: Tensor, step: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scale (fp32) and zero point (int32 in the shape of the scale, or None) of a weight.

        Arguments:
            weight: float ``[N, K]``, N, K >= 1.
            step: the parameter of a learned scale, in the shape of the scale, with any sign; None
                for other quantizers.
        Raises:
            ValueError: a weight that is not a non-empty matrix; a step that is missing,
            superfluous or of a wrong shape. TypeError: a weight that is not floating point.
        """
        self._check(weight, step)
        w = weight.float()
        absmax = self.reduce(w.abs(), Tensor.amax)
        return torch.where(absmax.isfinite(), clamped(self.statistic(w)), torch.nan), None

    @torch.no_grad()
    def quantize(self, weight: Tensor, step: Tensor | None = None) -> Codes:
        """Codes int8 ``[N, K]``, scale and zero point of a weight, without gradient. Arguments and
        errors as for :meth:`scale`."""
        scale, zero_point = self.scale(weight, step)
        return Codes(self.codes(weight.float(), scale, zero_point), scale, zero_point)

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        """The shape of the scale of a weight ``[N, K]``."""
        groups = -(-k // self.group_size)
        return {"tensor": (), "row": (n,), "group": (n, groups)}[self.granularity]

    def without_values(self, weight: Tensor) -> Codes:
        """Codes, scale and zero point of a weight without memory: only shapes and dtypes.

        torch implements most operators for meta tensors in Python: :meth:`quantize` would import
        torch's compiler, which takes seconds, and then take 50 ms per layer. Errors as for
        :meth:`scale`.
        """
        _check_weight(weight)
        shape = self.scale_shape(*weight.shape)
        scale = torch.empty(shape, dtype=torch.float32, device="meta")
        zero = torch.empty(shape, dtype=torch.int32, device="meta") if self.affine else None
        return Codes(torch.empty(weight.shape, dtype=torch.int8, device="meta"), scale, zero)

    def fake_quantize(self, weight: Tensor, step: Tensor | None = None) -> Quantized:
        """:meth:`quantize` and the codes' value, differentiable in the weight and the step.

        The weight gets the gradient of its value where :meth:`mask` is true. Arguments and errors
        as for :meth:`scale`.
        """
        found = self.quantize(weight, step)
        zero = None if found.zero_point is None else self.spread(found.zero_point, weight)
        hat = StraightThrough.apply(
            weight, found.codes, self.spread(found.scale, weight), zero, self.mask(weight, found)
        )
        return Quantized(*found, hat)

    @torch.no_grad()
    def mask(self, weight: Tensor, found: Codes) -> Tensor | None:
        """The weights that receive a gradient, bool ``[N, K]``; None if all do.

        By ``grad_mask``: "clip" as :meth:`unsaturated`; "trust" where
        |W - W_hat| <= grad_mask_c * scale (QuEST, arXiv 2502.05003).
        """
        if self.grad_mask == "none":
            return None
        if self.grad_mask == "clip":
            return self.unsaturated(weight, found)
        return self._within_c_scales(weight.float() - dequantize(*found, self.group_size), found)

    def unsaturated(self, weight: Tensor, found: Codes) -> Tensor | None:
        """The mask "clip": where |W| <= grad_mask_c * scale; None if all weights pass."""
        return self._within_c_scales(weight.float(), found)

    def _within_c_scales(self, w: Tensor, found: Codes) -> Tensor:
        return w.abs() <= self.grad_mask_c * self.spread(found.scale, w)

    def initial_step(self, weight: Tensor) -> Tensor:
        """The first value of a learned scale's parameter: fp32 in the shape of the scale.

        Raises ValueError for quantizers without a learned scale, and as :meth:`scale`.
        """
        raise ValueError(f"{type(self).__name__} has no learned scale")

    def _check(self, weight: Tensor, step: Tensor | None) -> None:
        if (step is not None) != self.learned:
            raise ValueError("step: expected for the learned quantizers, and only for them")
        _check_weight(weight)


class Int(WeightQuantizer):
    """Integers of ``bits`` bits around 0, or affine ones with a zero point."""

    rounds_columns = True

    @property
    def levels(self) -> range:
        """-Qp .. Qp; affine also -Qp - 1."""
        return code_range(self.bits, self.symmetric)

    @property
    def affine(self) -> bool:
        """Whether codes have zero points: if not symmetric."""
        return not self.symmetric

    @torch.no_grad()
    def scale(self, weight: Tensor, step: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scale from the largest magnitude, or from minimum and maximum."""
        self._check(weight, step)
        w = weight.float()
        if self.affine:
            low, high = self.reduce(w, Tensor.amin), self.reduce(w, Tensor.amax)
            return affine_scale(low, high, self.bits)
        return symmetric_scale(self.reduce(w.abs(), Tensor.amax), self.bits), None

    def codes(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The nearest."""
        return to_int8(unclamped(w, scale, zero_point, self.group_size), self.levels)

    def unsaturated(self, weight: Tensor, found: Codes) -> Tensor:
        """Where the weight rounds to a code without being clamped."""
        _, scale, zero_point = found
        return within(unclamped(weight, scale, zero_point, self.group_size), self.levels)


class _Ternary(WeightQuantizer):
    ternary = True

    @property
    def levels(self) -> range:
        """-1, 0, 1."""
        return range(-1, 2)


class Absmedian(_Ternary):
    """Ternary: the sign of weights whose magnitude exceeds ``alpha`` times the median magnitude."""

    def statistic(self, w: Tensor) -> Tensor:
        """The median magnitude; for an even count the lower of the middle two."""
        return self.reduce(w.abs(), lambda x, dim: x.median(dim).values)

    def codes(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """0 up to the threshold."""
        return ternary_codes(w, self.alpha * self.spread(scale, w))


class Absmean(Absmedian):
    """Ternary, by :func:`bitnet.quant.absmean_ternary`, to the last bit: BitNet b1.58."""

    rounds_columns = True

    @torch.no_grad()
    def scale(self, weight: Tensor, step: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The mean magnitude."""
        return self.quantize(weight, step).scale, None

    @torch.no_grad()
    def quantize(self, weight: Tensor, step: Tensor | None = None) -> Codes:
        """Codes and scale in one call."""
        self._check(weight, step)
        found = absmean_ternary(weight, self.granularity, self.group_size, self.alpha)
        return Codes(*found, None)


class TWN(_Ternary):
    """Ternary: the scale is the mean magnitude of the weights that are kept."""

    def _threshold(self, w: Tensor) -> Tensor:
        return TWN_ALPHA * self.spread(clamped(self.reduce(w.abs(), Tensor.mean)), w)

    def statistic(self, w: Tensor) -> Tensor:
        """The mean magnitude above the threshold."""
        magnitude = w.abs()
        kept = magnitude > self._threshold(w)
        total = self.reduce(magnitude * kept, Tensor.sum)
        return total / self.reduce(kept.float(), Tensor.sum).clamp(min=1)

    def codes(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """0 up to the threshold, which depends on the weights, not on the scale."""
        return ternary_codes(w, self._threshold(w))


class Sign(WeightQuantizer):
    """1 bit: the sign; 0 counts as positive."""

    @property
    def levels(self) -> range:
        """-1, 1."""
        return range(-1, 2, 2)

    def statistic(self, w: Tensor) -> Tensor:
        """The mean magnitude."""
        return self.reduce(w.abs(), Tensor.mean)

    def codes(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """-1 below 0, else 1."""
        return torch.where(w >= 0, 1, -1).to(torch.int8)


class LearnedScale(WeightQuantizer):
    """Codes with ``scale = unit * |step|``; the step is a parameter of either sign.

    A subclass defines :attr:`levels`, :attr:`unit`, :attr:`floor`, :meth:`first`, :meth:`inside`
    and :meth:`codes`.
    """

    learned = True
    unit: ClassVar[float] = 1.0
    """The scale in units of the step."""

    @property
    def floor(self) -> float:
        """The smallest |step|; smaller ones are clamped to it."""
        return EPS

    def first(self, magnitude: Tensor) -> Tensor:
        """The first step for the weights' magnitudes, fp32 ``[N, K]``; see :meth:`reduce`."""
        raise NotImplementedError

    def inside(self, v: Tensor) -> Tensor:
        """Where ``v = W / scale`` is inside the range that the codes cover, bool."""
        raise NotImplementedError

    @torch.no_grad()
    def initial_step(self, weight: Tensor) -> Tensor:
        """The first value of the step: fp32 in the shape of the scale."""
        _check_weight(weight)
        return self.first(weight.float().abs())

    @torch.no_grad()
    def scale(self, weight: Tensor, step: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``unit * max(|step|, floor)``: an optimizer may move a step to 0 or below."""
        self._check(weight, step)
        assert step is not None
        absmax = self.reduce(weight.float().abs(), Tensor.amax)
        if step.shape != absmax.shape:
            raise ValueError(f"step: expected shape {list(absmax.shape)}, got {list(step.shape)}")
        magnitude = step.float().abs()
        finite = absmax.isfinite() & magnitude.isfinite()
        return torch.where(finite, self.unit * magnitude.clamp(min=self.floor), torch.nan), None

    def fake_quantize(self, weight: Tensor, step: Tensor | None = None) -> Quantized:
        """As :meth:`WeightQuantizer.fake_quantize`, with the gradients of :class:`_LearnedStep`:
        the weight's gradient is 0 outside the range, for any mask."""
        codes, scale, _ = self.quantize(weight, step)
        return Quantized(codes, scale, None, _LearnedStep.apply(weight, step, codes, scale, self))

    def unsaturated(self, weight: Tensor, found: Codes) -> None:
        """None: :class:`_LearnedStep` masks saturated weights in any case."""


class LSQ(LearnedScale):
    """Integers of ``bits`` bits with a learned scale, |step|."""

    @property
    def levels(self) -> range:
        """-Qp - 1 .. Qp."""
        return code_range(self.bits, False)

    @property
    def floor(self) -> float:
        """The |step| for which the highest code has the value 1e-5."""
        return EPS / self.levels[-1]

    def first(self, magnitude: Tensor) -> Tensor:
        """``2 mean|W| / sqrt(Qp)`` (arXiv 1902.08153, section 2.1)."""
        mean = clamped(self.reduce(magnitude, Tensor.mean))
        return 2 * mean / mean.new_full((), self.levels[-1]).sqrt()

    def codes(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The nearest."""
        return to_int8((w / self.spread(scale, w)).round(), self.levels)

    def inside(self, v: Tensor) -> Tensor:
        """Between the outermost codes."""
        return (v > self.levels[0]) & (v < self.levels[-1])


class SEQTernary(LearnedScale):
    """Ternary with a learned scale (ParetoQ's "stretched elastic quantization")."""

    ternary = True
    unit = 2 / 3

    @property
    def levels(self) -> range:
        """-1, 0, 1."""
        return range(-1, 2)

    def first(self, magnitude: Tensor) -> Tensor:
        """``max|W|`` (arXiv 2502.02631)."""
        return clamped(self.reduce(magnitude, Tensor.amax))

    def round(self, v: Tensor) -> Tensor:
        """The nearest code to ``v = W / scale``, as a float."""
        return v.round()

    def codes(self, w: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The nearest code to W / alpha, which is clipped to -0.99 .. 0.99."""
        end = SEQ_CLIP / self.unit
        return to_int8(self.round((w / self.spread(scale, w)).clamp(-end, end)), self.levels)

    def inside(self, v: Tensor) -> Tensor:
        """Where |W / alpha| <= 0.99."""
        return v.abs() <= SEQ_CLIP / self.unit


class SEQ(SEQTernary):
    """2 bits with a learned scale, without a code for 0 (ParetoQ): values -1.5, -0.5, 0.5, 1.5 in
    units of alpha / 2, which are the odd codes in units of alpha / 4."""

    ternary = False
    unit = 1 / 4

    @property
    def levels(self) -> range:
        """-3, -1, 1, 3."""
        return range(-3, 4, 2)

    def round(self, v: Tensor) -> Tensor:
        """The nearest odd number."""
        return 2 * (v / 2 - 0.5).round() + 1


WEIGHT_QUANTIZERS: dict[str, type[WeightQuantizer]] = {
    "int": Int,
    "absmean": Absmean,
    "absmedian": Absmedian,
    "twn": TWN,
    "sign": Sign,
    "lsq": LSQ,
    "seq": SEQ,
    "seq_ternary": SEQTernary,
}
"""The quantizers by their names in ``quant.weights``."""


class _LearnedStep(torch.autograd.Function):
    """``hat = codes * scale`` with a learned scale (arXiv 1902.08153, eqs. 3-5; 2502.02631).

    For the gradient, rounding is the addition of a constant. With v = W / scale

        inside the range:    d hat / dW = 1    d hat / d scale = codes - v
        outside it:          d hat / dW = 0    d hat / d scale = codes

    where the range is lowest < v < highest for "lsq" and |W / alpha| <= 0.99 for "seq". The step's
    gradient is multiplied by g = 1 / sqrt(n Qp), with n weights per scale and Qp the highest value
    in units of the step. This keeps the step's updates in proportion to the weights' updates. A
    step below the floor gets the gradient too, or it could never grow again.

    The backward needs the weight, which exists anyway, the int8 codes, and scales.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        step: Tensor,
        codes: Tensor,
        scale: Tensor,
        quantizer: LearnedScale,
    ) -> Tensor:
        ctx.save_for_backward(weight, step, codes, scale)
        ctx.quantizer = quantizer
        return dequantize(codes, scale, None, quantizer.group_size).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, codes, scale = ctx.saved_tensors
        quantizer: LearnedScale = ctx.quantizer
        unit = quantizer.unit
        v = weight.float() / quantizer.spread(scale, weight)
        inside = quantizer.inside(v)
        dweight = dstep = None
        if ctx.needs_input_grad[0]:
            passes = quantizer.mask(weight, Codes(codes, scale, None))
            dweight = dy * (inside if passes is None else inside & passes)
        if ctx.needs_input_grad[1]:
            dscale = quantizer.reduce(dy.float() * (codes - v * inside), Tensor.sum)
            n = count(weight, quantizer.granularity, quantizer.group_size)
            g = (n * (unit * quantizer.levels[-1])).rsqrt()
            dstep = (dscale * (unit * g)).to(step.dtype)
            dstep = torch.where(step < 0, -dstep, dstep)
        return dweight, dstep, None, None, None


def _check_weight(weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor, got {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected a non-empty [N, K], got {list(weight.shape)}")
