"""One optimizer step: forward and backward over micro-batches, clip, check, update.

The step assumes only that ``model(tokens, targets)`` is the mean loss. So the model may be wrapped
(``torch.compile``, DistributedDataParallel): the wrapper's forward runs. The optimizations of a
ternary step work inside a wrapper too: each weight is quantized once for all micro-batches
(:func:`bitnet.linear.weights_quantized`), layers with the same input share its codes
(:func:`bitnet.linear.shared_input`), and logits are computed in chunks
(:func:`bitnet.loss.head_loss`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitnet.linear import weights_quantized
from bitnet.training.distributed import World, exchange
from bitnet.training.optim import (
    OptimConfig,
    Optimizers,
    clip_gradients,
    learning_rate_factor,
    weight_decay_at,
)

MicroBatch = tuple[Tensor, Tensor]
"""Tokens, and the token that follows each: both int64 ``[B, T]``."""
Losses = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(model, tokens, targets) -> the cross-entropy to report, and the loss to minimize."""


class StepResult(NamedTuple):
    """The numbers of a step."""

    loss: float
    """Mean cross-entropy of the whole batch before the update, in nats."""
    grad_norm: float
    """Norm of all gradients, before clipping."""
    lr_factor: float
    """Factor of the peak learning rates."""
    weight_decay: float
    """Weight decay, before it is scaled per optimizer."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are finite; if not, there was no update."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def cross_entropy(model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The usual :data:`Losses`: minimize the cross-entropy, which the model's forward computes."""
    loss: Tensor = model(tokens_BT, targets_BT)
    return loss, loss


def train_step(
    model: nn.Module,
    optimizers: Optimizers,
    micro_batches: Sequence[MicroBatch],
    step: int,
    total_steps: int,
    config: OptimConfig,
    autocast: AbstractContextManager[object],
    world: World,
    losses: Losses = cross_entropy,
) -> StepResult:
    """Update a model once, unless the loss or a gradient is not finite.

    Arguments:
        model: in training mode, wrapped or not.
        optimizers: of its parameters.
        micro_batches: this process's share of the batch, in parts of equal size.
        step: the number of the update, from 0 to ``total_steps`` - 1.
        config: the schedules and ``grad_clip``.
        autocast: around each forward.
        losses: computes the losses of a micro-batch.
    """
    loss = world.mean(add_gradients(model, micro_batches, autocast, losses))
    grad_norm = clip_gradients(model.parameters(), config.grad_clip)
    result = StepResult(
        float(loss),
        float(grad_norm),
        learning_rate_factor(step, total_steps, config),
        weight_decay_at(step, total_steps, config),
    )
    if result.finite:
        optimizers.set_schedule(result.lr_factor, result.weight_decay)
        optimizers.step()
    optimizers.zero_grad()
    return result


def add_gradients(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    autocast: AbstractContextManager[object],
    losses: Losses,
) -> Tensor:
    """Add the gradients of the mean loss over micro-batches to ``.grad``.

    Arguments: as in :func:`train_step`.
    Returns:
        The mean cross-entropy: ``[]``.
    """
    n, parts = len(micro_batches), list[Tensor]()
    with weights_quantized(model):
        for i, (tokens_BT, targets_BT) in enumerate(micro_batches, 1):
            with exchange(model, last=i == n):
                with autocast:
                    loss, objective = losses(model, tokens_BT, targets_BT)
                parts.append(loss.detach() / n)
                (objective / n).backward()
    return reduce(torch.add, parts)


def split(tokens_BT: Tensor, targets_BT: Tensor, size: int) -> list[MicroBatch]:
    """Split a batch into micro-batches of ``size`` sequences."""
    return list(zip(tokens_BT.split(size), targets_BT.split(size), strict=True))


def compiled(model: nn.Module) -> nn.Module:
    """A model whose forward, including the loss, is one compiled graph; the weights are shared."""
    _name_cpu_in_cache()
    wrapped = torch.compile(model, fullgraph=True)
    assert isinstance(wrapped, nn.Module)
    return wrapped


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile the forward of each block separately, in place: the code that divides weights over
    processes runs before and after a block."""
    _name_cpu_in_cache()
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)


def _name_cpu_in_cache() -> None:
    """Make torch's cache of compiled graphs distinguish CPUs by vector width.

    torch (2.13) keeps compiled graphs in a folder, under a key that does not include the vector
    width of the CPU. A graph compiled for AVX-512 would then run, with wrong numbers or a
    segmentation fault, on an AVX2 machine that shares the folder or under ATEN_CPU_CAPABILITY=avx2.
    So this adds the width to the key, as torch's own tag.
    """
    width, tag = torch.backends.cpu.get_cpu_capability(), torch.compiler.config.cache_key_tag
    if width not in tag.split():
        torch.compiler.config.cache_key_tag = f"{tag} {width}".strip()
