"""The operators that only training needs, beside its integer products (:mod:`.int8`).

They are not public: ``bitnet.quant`` and ``bitnet.elementwise`` call them with arguments that fit,
where :func:`bitnet_kernels.cpu.training.takes` says that they are worth it (for the gradients of a
layer, :mod:`bitnet_kernels.cpu.gradients` says so). They are registered so that fake tensors,
dispatch modes and profilers see them.
"""

from typing import Any

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.cpu import gradients, training
from bitnet_kernels.ops.register import register


def _like_two(_: Tensor, a: Tensor, b: Tensor, *__: Any) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _gate_fake(gate: Tensor, _: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _absmean_fake(weight: Tensor, _: float) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(())


def _stochastic_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0])


def _stochastic_columns_fake(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    m, n = x.shape
    return x.new_empty((n, m), dtype=torch.int8), x.new_empty(n)


def _input_gradient_fake(dy: Tensor, codes: Tensor, _: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[0], codes.shape[1])


def _weight_gradient_fake(dy: Tensor, x_q: Tensor, _: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1], x_q.shape[1])


norm_backward = register(
    "norm_backward", reference.norm_backward, cpu=training.norm_backward, fake=_like_two
)
gate = register("gate", reference.gate, cpu=training.gate, fake=_gate_fake)
gate_backward = register(
    "gate_backward", reference.gate_backward, cpu=training.gate_backward, fake=_like_two
)
absmean = register("absmean", reference.absmean, cpu=training.absmean, fake=_absmean_fake)
stochastic_int8 = register(
    "stochastic_int8",
    reference.stochastic_int8,
    cpu=training.stochastic_int8,
    fake=_stochastic_fake,
)
stochastic_int8_columns = register(
    "stochastic_int8_columns",
    reference.stochastic_int8_columns,
    cpu=training.stochastic_int8_columns,
    fake=_stochastic_columns_fake,
)
input_gradient = register(
    "input_gradient",
    reference.input_gradient,
    cpu=gradients.input_gradient,
    fake=_input_gradient_fake,
)
weight_gradient = register(
    "weight_gradient",
    reference.weight_gradient,
    cpu=gradients.weight_gradient,
    fake=_weight_gradient_fake,
)
