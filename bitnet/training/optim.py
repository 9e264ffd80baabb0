"""Optimizers, and the schedules of the learning rate (LR) and the weight decay (WD).

Ternary training needs other settings than full precision. These are from published runs (BitNet
b1.58 Training Tips with 2402.17764, TriLM 2407.12327). Only the side of a threshold on which a
latent weight lies matters, so the LR is 6-8 times the full-precision peak. WD keeps weights near
the thresholds, where they can still flip. It is switched off after 50-67% of the run so that the
codes settle. The LR decays to zero: at a high LR codes keep flipping, and the loss falls only once
they stop. The default LR schedule is warmup-stable-decay ("wsd"). Its flat part does not depend on
the length of the run, so a run can be extended. ``two_stage`` is the schedule of the papers. There
is no average of the weights over time: rounding an average of latent weights gives codes that no
step ever trained (+0.12 to +1.07 bits per byte).

A schedule is a pure function of (step, total steps, config), so a resumed run needs no scheduler
state. ``torch.optim.lr_scheduler`` would keep such state and does not schedule WD.

There are two optimizers. AdamW updates everything. ``muon`` gives the hidden matrices to Muon
(momentum, then Newton-Schulz iterations that bring the singular values of the update near 1, in
bitnet/training/muon.py) and leaves embeddings, head and norms to AdamW: few tokens touch a row of
an embedding matrix, and orthogonalizing over such rows has no meaning.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from bitnet.schema import STRICT, Count
from bitnet.training.muon import Muon, ShardedMuon

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Momentum = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    """The ``[optim]`` section: optimizer, learning rate and weight decay with their schedules."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw updates everything; muon updates the hidden matrices and leaves the rest to adamw"""
    lr: _NotNegative = 0.0
    """peak learning rate of AdamW; 0 = chosen by model size (bitnet inspect prints it)"""
    beta1: _Momentum = 0.9
    """AdamW: decay of the mean gradient"""
    beta2: _Momentum = 0.95
    """AdamW: decay of the mean squared gradient"""
    eps: _Positive = 1e-8
    """AdamW: added to the root of the mean square"""
    weight_decay: _NotNegative = 0.1
    """peak weight decay, decoupled: each step multiplies a matrix by 1 - lr * weight_decay"""
    grad_clip: _NotNegative = 1.0
    """largest norm of the whole gradient; 0 = no clipping"""
    lr_schedule: Literal["wsd", "cosine", "linear", "two_stage", "constant"] = "wsd"
    """wsd: flat, then linear to the minimum over the last decay_fraction; cosine, linear: decay
    over the whole run; two_stage: linear, times second_stage_ratio from halfway on; constant"""
    warmup_steps: Count = 0
    """steps of linear warmup; 0 = 5% of the run, at most 375; 1 = none"""
    decay_fraction: _Fraction = 0.33
    """wsd: share of the run, at its end, in which the learning rate decays"""
    min_lr_fraction: _Fraction = 0.0
    """final learning rate, as a share of the peak"""
    second_stage_ratio: _Fraction = 2 / 3
    """two_stage: peak of the second half over the peak of the first (1.5e-3 -> 1e-3 is 2/3)"""
    wd_schedule: Literal["constant", "zero_at", "cosine"] = "zero_at"
    """weight decay. constant; zero_at: constant, then 0 from wd_zero_fraction on; cosine: a half
    cosine that reaches 0 at wd_zero_fraction"""
    wd_zero_fraction: _Fraction = 0.6
    """share of the run after which weight decay is 0 (zero_at, cosine)"""
    muon_lr: _NotNegative = 0.0
    """muon: peak learning rate of the hidden matrices; 0 = 0.02, or 0.002 from a saved model. Small
    batches and long runs want less (docs/evidence.md)"""
    muon_momentum: _Momentum = 0.95
    """muon: decay of the mean gradient (Nesterov)"""
    muon_ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """muon: Newton-Schulz iterations (the ternary parameter-golf record used 3)"""


def warmup_steps(total_steps: int, config: OptimConfig) -> int:
    """Steps of warmup: the config's, or if that is 0, 5% of the run and at most 375."""
    return config.warmup_steps or min(375, total_steps // 20)


def learning_rate_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """The factor that multiplies the peak learning rates at an update.

    With ``s`` the step, ``n`` the total, ``w`` the warmup and ``p = (s - w) / (n - w)``::

        ramp  = (s + 1) / w                                1/w at the first update, 1 at s = w - 1
        shape = wsd        (1 - s/n) / decay_fraction      1 until s/n = 1 - decay_fraction
                linear     1 - p
                cosine     (1 + cos(pi p)) / 2
                two_stage  (1 - p) * (1 while s/n < 1/2, then second_stage_ratio)
                constant   1
        factor = min(ramp, m + (1 - m) * min(1, shape)),   m = min_lr_fraction

    Every shape is 1 at ``s = w`` (or before) and would be 0 at ``s = n``, one past the last
    update. So neither the first nor the last update has a learning rate of 0. A warmup longer
    than the run never reaches the peak.

    Arguments:
        step: the update, counted from 0, less than ``total_steps``.
        total_steps: updates in the whole run, at least 1.
        config: ``lr_schedule`` and the fields it names.

    Raises:
        ValueError: ``step`` is outside ``0 .. total_steps - 1``.
    """
    _check_step(step, total_steps)
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        ramp = (step + 1) / warmup
        progress = 0.0
    else:
        ramp = 1.0
        progress = (step - warmup) / (total_steps - warmup)
    match config.lr_schedule:
        case "wsd":
            left = 1 - step / total_steps
            shape = left / config.decay_fraction if left < config.decay_fraction else 1.0
        case "linear":
            shape = 1 - progress
        case "cosine":
            shape = (1 + math.cos(math.pi * progress)) / 2
        case "two_stage":
            peak = 1.0 if 2 * step < total_steps else config.second_stage_ratio
            shape = peak * (1 - progress)
        case "constant":
            shape = 1.0
    return min(ramp, config.min_lr_fraction + (1 - config.min_lr_fraction) * shape)


def weight_decay_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """The weight decay at an update; ``z`` is ``wd_zero_fraction``.

    ``constant``: always ``weight_decay``. ``zero_at``: ``weight_decay`` while ``step/total < z``,
    then 0. ``cosine`` (BitNet 2B4T, 2504.12285): while ``step/total < z``,
    ``weight_decay * (1 + cos(pi * step/total / z)) / 2``, then 0.

    Raises:
        ValueError: ``step`` is outside ``0 .. total_steps - 1``.
    """
    _check_step(step, total_steps)
    progress = step / total_steps
    match config.wd_schedule:
        case "constant":
            return config.weight_decay
        case "zero_at":
            return config.weight_decay if progress < config.wd_zero_fraction else 0.0
        case "cosine":
            if progress >= config.wd_zero_fraction:
                return 0.0
            return config.weight_decay * (
                (1 + math.cos(math.pi * progress / config.wd_zero_fraction)) / 2
            )


def _check_step(step: int, total_steps: int) -> None:
    if not 0 <= step < total_steps:
        raise ValueError(f"step must be in 0 .. total_steps - 1 = {total_steps - 1}, got {step}")


def param_groups(model: nn.Module, config: OptimConfig) -> dict[str, list[nn.Parameter]]:
    """The parameters by optimizer: each trainable parameter is in exactly one list, once.

    ``decay``: matrices, including embeddings and head; AdamW with weight decay, as in nanoGPT and
    in GPT-NeoX, which found the TriLM learning rates. ``no_decay``: norms, biases (everything that
    is not a matrix) and the learned scales of quantizers (``weight_step``); AdamW without weight
    decay. ``muon``: the matrices of the layers (a name with a part ``layers``), empty with
    ``optimizer = "adamw"``. Tied weights count as the embedding.
    """
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "muon": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or name.rpartition(".")[2] == "weight_step":
            groups["no_decay"].append(parameter)
        elif config.optimizer == "muon" and parameter.ndim == 2 and "layers" in name.split("."):
            groups["muon"].append(parameter)
        else:
            groups["decay"].append(parameter)
    return groups


class Optimizers:
    """One or two optimizers that step together on one schedule.

    ``optimizers`` is the list to save and load. The peak learning rates are kept here, not in the
    optimizers' state: a resumed run uses the peaks of its config.
    """

    def __init__(self) -> None:
        self.optimizers: list[torch.optim.Optimizer] = []
        self._peaks: list[list[tuple[float, float]]] = []

    def add(
        self, optimizer: torch.optim.Optimizer, peak_lr: float, decay_scales: list[float]
    ) -> None:
        """Add an optimizer.

        Arguments:
            optimizer: from now on the schedule sets its groups' ``lr`` and ``weight_decay``.
            peak_lr: the learning-rate factor multiplies it.
            decay_scales: for each of its groups, a factor of the weight decay.
        """
        assert len(decay_scales) == len(optimizer.param_groups)
        self.optimizers.append(optimizer)
        self._peaks.append([(peak_lr, scale) for scale in decay_scales])

    def set_schedule(self, lr_factor: float, weight_decay: float) -> None:
        """Set this step's learning rates (peak times ``lr_factor``) and weight decay."""
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, (peak_lr, decay_scale) in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak_lr * lr_factor
                group["weight_decay"] = weight_decay * decay_scale

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients (set to None, which frees their memory)."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizers:
    """The optimizers for a model; call ``set_schedule`` before each ``step``.

    AdamW is the fused version, on the CPU too: at 4M parameters and 2 threads it takes 1.3 ms,
    against 5.6 ms for the foreach and the per-tensor versions, and is equally reproducible.

    Muon scales its update by sqrt(max(1, rows/columns)), as in Jordan's original, for which 0.02 is
    the usual LR. That LR is about ten times AdamW's, so a decoupled decay of lr * wd would be ten
    times as strong. Muon's weight decay is therefore scaled by lr / muon_lr, so that both
    optimizers shrink matrices at the same rate.

    Arguments:
        model: parameters already on their device; wrapped (compiled, distributed) or not.
        config: ``lr`` and, for Muon, ``muon_lr`` are resolved (above 0).

    Raises:
        ValueError: a learning rate is still 0, or ``muon`` finds no matrix in the model's layers.
    """
    for name in ("lr", "muon_lr") if config.optimizer == "muon" else ("lr",):
        if getattr(config, name) <= 0:
            raise ValueError(f"config.{name} must be above 0 here: resolve the config first")
    groups = param_groups(model, config)
    if config.optimizer == "muon" and not groups["muon"]:
        raise ValueError('optimizer "muon" found no matrix: no parameter name has a part "layers"')

    optimizers = Optimizers()
    adamw_groups: list[dict[str, Any]] = []
    decay_scales: list[float] = []
    for name, scale in (("decay", 1.0), ("no_decay", 0.0)):
        if groups[name]:
            adamw_groups.append({"params": groups[name]})
            decay_scales.append(scale)
    if adamw_groups:
        adamw = torch.optim.AdamW(
            adamw_groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        optimizers.add(adamw, config.lr, decay_scales)
    if groups["muon"]:
        sharded = hasattr(groups["muon"][0], "full_tensor")
        muon = (ShardedMuon if sharded else Muon)(
            groups["muon"],
            lr=config.muon_lr,
            momentum=config.muon_momentum,
            nesterov=True,
            ns_steps=config.muon_ns_steps,
            adjust_lr_fn="original",
        )
        optimizers.add(muon, config.muon_lr, [config.lr / config.muon_lr])
    optimizers.set_schedule(1.0, config.weight_decay)
    return optimizers


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that the norm of all of them together is at most ``max_norm``.

    Arguments:
        parameters: those without a gradient are skipped.
        max_norm: 0 = measure only.

    Returns:
        The norm before clipping, fp32 []. It is not finite if any gradient is not; the gradients
        are then useless, clipped or not. Reading it waits for the device; this function does not.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in with_grad if p.grad is not None])
    if hasattr(norm, "full_tensor"):  # sharded gradients: each process has a part of the sum
        norm = norm.full_tensor()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(with_grad, max_norm, norm)
    return norm
