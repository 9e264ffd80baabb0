"""The one way to register an operator with torch.

A public function checks its arguments, then calls ``torch.ops.bitnet.<name>``, which checks
nothing. That operator is a ``torch.library.custom_op``: ``torch.compile`` sees one node and no
graph break. It runs one of three implementations, which take the same arguments and give the same
bits:

    cuda         Triton, where :func:`bitnet_kernels.available.takes_triton` says so
    cpu          torch operators that are faster than the reference, if there are any: on a CPU, and
                 on CUDA without Triton
    reference    plain torch, everywhere else
"""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from bitnet_kernels.available import takes_triton
from bitnet_kernels.checks import no_backward

P = ParamSpec("P")
R = TypeVar("R")


def register(
    name: str,
    reference: Callable[P, R],
    *,
    fake: Callable[..., R],
    cpu: Callable[..., R] | None = None,
    cuda: Callable[..., R] | None = None,
    mutates: Sequence[str] = (),
) -> Callable[P, R]:
    """Register ``torch.ops.bitnet.<name>``. It has no backward.

    Arguments:
        reference: plain torch; its annotations are the operator's schema. For an operator with an
            argument ``kernel`` it is a function that chooses the implementation by that argument;
            ``cpu`` and ``cuda`` are then None.
        fake: makes empty results of the right shape, dtype and device.
        cpu, cuda: faster implementations; None where there is none. They are chosen by the device
            of the first argument, a tensor. The operator makes all results contiguous.
        mutates: names of the arguments that are written to.
    Returns:
        The operator, to be called with all arguments by position.
    """

    def run(*arguments: Any) -> Any:
        device = arguments[0].device
        implementation: Callable[..., R] = reference
        if cuda is not None and takes_triton("auto", device):
            implementation = cuda
        elif cpu is not None and device.type in ("cpu", "cuda"):
            implementation = cpu
        return _contiguous(implementation(*arguments))

    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    operator = torch.library.custom_op(f"bitnet::{name}", run, mutates_args=mutates, schema=schema)
    operator.register_fake(fake)
    if not mutates:  # torch itself refuses the backward of an operator that mutates
        operator.register_autograd(no_backward)
    return cast(Callable[P, R], operator)


def _contiguous(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.contiguous()
    return tuple(tensor.contiguous() for tensor in result)


def rows(x: Tensor) -> Tensor:
    """``[..., K]`` -> ``[M, K]``."""
    return x.reshape(-1, x.shape[-1])


def reshaped(y: Tensor, *shape: int) -> Tensor:
    """``y`` in its final shape, without a copy. The caller must not use ``y`` afterwards. For
    autograd the result is not a view, because autograd forbids in-place operators on a view that a
    custom function returns."""
    result: Tensor = torch.ops.aten._unsafe_view(y.contiguous(), shape)
    return result
