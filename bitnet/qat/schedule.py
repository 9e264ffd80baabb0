"""When quantization begins in a run, how it ramps up, and when observers stop: ``[qat]``.

A run has three phases, given as shares of its steps::

    0 .. start         full precision: both lambdas are 0, observers only watch
    start .. +warmup   W' = W + lambda_w (W_hat - W),   x' = x + lambda_a (x_hat - x)
    from there on      both are 1: exactly the computation of the quantized model

*When.* Quantizing from the first step wastes steps that full precision uses better; quantizing too
late leaves too few steps to adapt. "Compute-optimal QAT" (arXiv 2509.22935, the fit in its
abstract; not measured again here) finds that the best share of quantized tokens grows with S, the
run's tokens per byte of weights::

    f* = exp(-6.73 / ln S),   S = D / (N * B / 8)      D tokens, N parameters, B bits per weight

and that the learning rate should decay once, under quantization. With ``fused_cooldown`` a "wsd"
decay does not begin before quantization.

*How.* Lambda ramps come from "HF 1.58 bit" (W + lambda (q(W) - W)). Weights and activations have
separate ramps, since activations usually tolerate a sudden start.

The schedule is a pure function of (step, total steps, config), like the learning rate, so a
checkpoint holds no state for it. Learned scales and observed ranges are in the layers' state dict.
"""

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from bitnet.qat.layers import QATLayer
from bitnet.schema import STRICT

Ramp = Literal["linear", "cosine", "exponential"]
_Share = Annotated[float, Field(ge=0, le=1)]
_STEEPNESS = 5.0
"""Rate of the exponential ramp, which then reaches 1/2 after 14% of its steps."""


@dataclass(frozen=True, config=STRICT)
class QATConfig:
    """The ``[qat]`` section: the schedule of quantization over a run; see the top of this file."""

    start: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = 0.0
    """share of the run after which quantization begins; "auto": 1 - f*, for pretraining runs
    (arXiv 2509.22935, see bitnet/qat/schedule.py)"""
    weight_warmup: _Share = 0.0
    """share of the run in which weights go from full precision (lambda = 0) to quantized (1);
    0 = at once"""
    activation_warmup: _Share = 0.0
    """the same for activations"""
    weight_ramp: Ramp = "linear"
    """rise of the weights' lambda: linear, cosine (slow at both ends), exponential (fast first)"""
    activation_ramp: Ramp = "linear"
    """the same for activations"""
    freeze_observers: Annotated[float, Field(gt=0, le=1)] = 1.0
    """static activations: share of the run after which their ranges are fixed; 1 = never"""
    fused_cooldown: bool = True
    """with lr_schedule "wsd": the decay does not begin before quantization"""

    @property
    def depends_on_length(self) -> bool:
        """Whether a step's computation depends on the number of steps in the run."""
        warmup = self.weight_warmup > 0 or self.activation_warmup > 0
        return self.start != 0 or warmup or self.freeze_observers < 1


def optimal_share(tokens: int, n_parameters: int, bits: float) -> float:
    """f*, the share of a run to train quantized (arXiv 2509.22935; see the top of this file).

    Arguments:
        tokens: D, of the whole run. n_parameters: N. bits: B, per weight.
    Returns:
        From 0 (S <= 1: fewer tokens than bytes of weights, where the fit does not apply) to 1.
    """
    tokens_per_byte = tokens / (n_parameters * bits / 8)
    if tokens_per_byte <= 1:
        return 0.0
    return math.exp(-6.73 / math.log(tokens_per_byte))


def first_step(share: float, total_steps: int) -> int:
    """The first step s (from 0) with s / total_steps >= share; ``total_steps`` for a share of 1."""
    step = int(share * total_steps)
    return step + (step / total_steps < share)


def lambdas(step: int, total_steps: int, config: QATConfig) -> tuple[float, float]:
    """The lambdas of weights and activations at an update: 0 = full precision, 1 = quantized.

    With the completed share of the ramp ``p = (step - first + 1) / warmup steps``, at most 1::

        linear p      cosine (1 - cos(pi p)) / 2      exponential (1 - e^(-5p)) / (1 - e^-5)

    Arguments:
        step: the update, counted from 0. config: ``start`` is resolved.
    Raises:
        ValueError: ``step`` is outside ``0 .. total_steps - 1``, or ``start`` is still "auto".
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step must be in 0 .. total_steps - 1 = {total_steps - 1}, got {step}")
    done = step - _switch(total_steps, config) + 1
    if done <= 0:
        return 0.0, 0.0
    weights = _ramp(done, config.weight_warmup * total_steps, config.weight_ramp)
    return weights, _ramp(done, config.activation_warmup * total_steps, config.activation_ramp)


def _switch(total_steps: int, config: QATConfig) -> int:
    if config.start == "auto":
        raise ValueError('config.start is "auto": resolve the config first')
    return first_step(config.start, total_steps)


def _ramp(done: int, length: float, shape: Ramp) -> float:
    if done >= length:
        return 1.0
    p = done / length
    match shape:
        case "linear":
            return p
        case "cosine":
            return (1 - math.cos(math.pi * p)) / 2
        case "exponential":
            return math.expm1(-_STEEPNESS * p) / math.expm1(-_STEEPNESS)


def set_step(
    model: nn.Module, step: int, total_steps: int, config: QATConfig
) -> tuple[float, float]:
    """Set a prepared model's layers for an update, before its forward.

    Sets ``lambda_w`` and ``lambda_a``, and freezes or unfreezes observers (never frozen in the
    first step, since a range is needed). At the update where quantization begins after a phase of
    full precision, learned scales are initialized again from the present weights. The same weights
    give the same scales, so a run killed around this step resumes exactly. Without such a phase the
    scales stay as prepared or loaded.

    Arguments:
        model: if it is not prepared, nothing happens. step, total_steps, config: as for
            :func:`lambdas`.
    Returns:
        ``(lambda_w, lambda_a)``.
    """
    weights, activations = lambdas(step, total_steps, config)
    begins = step == _switch(total_steps, config) > 0
    frozen = step >= first_step(config.freeze_observers, total_steps)  # a share > 0: step >= 1
    for layer in model.modules():
        if not isinstance(layer, QATLayer):
            continue
        layer.lambda_w, layer.lambda_a = weights, activations
        if begins:
            layer.initialize_step()
        if layer.input_observer is not None:
            layer.input_observer.frozen = frozen
    return weights, activations
