"""A recipe says what to quantize, and how: the ``[quant]`` section of a config.

    Recipe(weights="int", bits=4, granularity="group")              4-bit weights, int8 activations
    Recipe(weights="absmean", granularity="tensor")                 BitNet b1.58, W1.58A8
    Recipe(weights="int", bits=8, activations="static")             for a microcontroller

Fake quantization (layers.py), the PTQ baselines (ptq.py) and the integer form (integer.py) all read
the same recipe, so only the method differs. select.py finds the layers of a model that a recipe
quantizes.
"""

from dataclasses import fields
from difflib import get_close_matches
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from bitnet.qat.quantizers import WEIGHT_QUANTIZERS, Absmean, WeightQuantizer
from bitnet.quant import GradMask, Granularity
from bitnet.schema import STRICT, ListOf, Positive

NONE = "none"
"""The name of full-precision weights, or activations."""
ActivationQuantizer = Literal["none", "absmax", "static"]
ObserverKind = Literal["minmax", "moving_average", "percentile", "mse"]
ModuleKind = Literal["linear", "conv1d", "conv2d", "embedding"]


def _matrices() -> list[ModuleKind]:
    return ["linear", "conv1d", "conv2d"]


def _known_quantizer(name: object) -> object:
    names = [NONE, *WEIGHT_QUANTIZERS]
    if name in names:
        return name
    near = get_close_matches(str(name), names, 1, 0.4)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise ValueError(f"expected {', '.join(map(repr, names[:-1]))} or {names[-1]!r}{hint}")


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """The ``[quant]`` section: weights, activations, granularity, and which modules."""

    weights: Annotated[str, BeforeValidator(_known_quantizer)] = NONE
    """"none": full precision; "int": symmetric or affine integers of `bits`; ternary: "absmean"
    (BitNet b1.58), "absmedian", "twn", "seq_ternary"; "sign": 1 bit; learned scales: "lsq" of
    `bits`, "seq" of 2 bits"""
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    """bits per weight for "int" and "lsq"; the other quantizers have a fixed number"""
    symmetric: bool = True
    """weights "int": codes around 0; false: affine, with a zero point"""
    granularity: Granularity = "row"
    """one weight scale per "tensor", "row" (output channel) or "group" of columns"""
    group_size: Positive = 128
    """columns per group, for granularity "group"."""
    alpha: Annotated[float, Field(gt=0, lt=2)] = 0.5
    """ternary threshold in units of the statistic ("absmean", "absmedian"); "twn" has 0.7"""
    grad_mask: GradMask = "none"
    """weights without a gradient: "none" (all weights get one), "clip" (saturated weights) or
    "trust" (weights far from their quantized value); see bitnet/qat/quantizers.py"""
    grad_mask_c: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """bound of that mask in units of the scale"""
    activations: ActivationQuantizer = "absmax"
    """"absmax": one scale per token, from its values; "static": one fixed scale, from observers;
    "none": weights only"""
    activation_bits: Annotated[int, Field(ge=4, le=8)] = 8
    """bits per activation"""
    activation_symmetric: bool = True
    """static activations: codes around 0; false: affine, with a zero point"""
    observer: ObserverKind = "moving_average"
    """static activations: how to find their range"""
    observer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """observers "moving_average" and "percentile": weight of the old range in each update"""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """observer "percentile": percentage of the values inside the range"""
    modules: ListOf[ModuleKind] = Field(default_factory=_matrices)
    """kinds of modules to quantize"""
    include: ListOf[str] = Field(default_factory=list)
    """names, paths or patterns of modules to quantize; empty: all"""
    skip: ListOf[str] = Field(default_factory=list)
    """names, paths or patterns of modules to keep in full precision"""
    keep_first_last: bool = True
    """keep the model's first and last layer (of any kind) in full precision"""

    @property
    def enabled(self) -> bool:
        """Whether anything is quantized."""
        return self.weights != NONE

    @cached_property
    def quantizer(self) -> WeightQuantizer:
        """The weight quantizer with this recipe's options. Raises ValueError for weights "none"."""
        if not self.enabled:
            raise ValueError(f"recipe: weights {NONE!r} have no quantizer")
        options = {field.name: getattr(self, field.name) for field in fields(WeightQuantizer)}
        return WEIGHT_QUANTIZERS[self.weights](**options)

    @property
    def weight_bits(self) -> float:
        """Bits of information per weight; 32 in full precision."""
        return self.quantizer.weight_bits if self.enabled else 32.0

    @property
    def weights_only(self) -> bool:
        """Whether activations stay in full precision."""
        return self.activations == NONE

    @property
    def static(self) -> bool:
        """Whether the activations have a fixed scale, from an observer."""
        return self.activations == "static"

    @property
    def is_ternary_linear(self) -> bool:
        """Whether a linear layer of this recipe becomes a :class:`bitnet.TernaryLinear`: ternary
        weights, 8-bit dynamic activations."""
        dynamic = self.activations == "absmax" and self.activation_bits == 8
        return self.enabled and self.quantizer.ternary and dynamic

    @property
    def is_bitnet(self) -> bool:
        """Whether a layer of this recipe computes the same as :class:`bitnet.BitLinear`."""
        absmean = self.enabled and isinstance(self.quantizer, Absmean) and self.alpha == 0.5
        return absmean and self.is_ternary_linear

    def __str__(self) -> str:
        """A short form for tables: ``W4A8 int row``."""
        if not self.enabled:
            return "full precision"
        bits = f"{self.weight_bits:.3g}"
        activations = "A16" if self.weights_only else f"A{self.activation_bits}"
        grain = f"group {self.group_size}" if self.granularity == "group" else self.granularity
        static = ", static activations" if self.static else ""
        return f"W{bits}{activations} {self.weights} {grain}{static}"
