"""Functions of the native library that only training needs: fp32 tensors on a CPU, in one pass
over memory.

:func:`takes` says whether these functions can run; else torch operators do the same. Except for
random numbers, results have the bits of the reference. Functions that sum floats add in an order
of their own, which the number of threads does not change.
"""

from ctypes import CDLL

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.cpu import native

_BLOCK = 32
"""NORM_BLOCK of ``native/train.c``."""


def takes(*tensors: Tensor) -> bool:
    """Whether the native library takes these: plain fp32 tensors on a CPU, in eager mode."""
    return native.runs_now(*tensors) and library_of(*tensors) is not None


def library_of(*tensors: Tensor) -> CDLL | None:
    """The library, if there is one and all tensors are fp32 in this machine's memory."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            return None
        if tensor.layout != torch.strided:
            return None
    return native.library()


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`bitnet_kernels.reference.norm_backward`, with sums in another order."""
    lib = library_of(dy, x, weight, r)
    if lib is None:
        return reference.norm_backward(dy, x, weight, r)
    dy, x, weight, r = dy.contiguous(), x.contiguous(), weight.contiguous(), r.contiguous()
    m, k = r.numel(), x.shape[-1]
    dx, dw = torch.empty_like(x), torch.empty_like(weight)
    scratch = x.new_empty(-(-m // _BLOCK), k)
    lib.bn_train_norm_backward(
        dy.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        r.data_ptr(),
        m,
        k,
        dx.data_ptr(),
        dw.data_ptr(),
        scratch.data_ptr(),
        native.threads(),
    )
    return dx, dw


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`bitnet_kernels.reference.gate`."""
    lib = library_of(gate, up)
    if lib is None:
        return reference.gate(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    pointers = gate.data_ptr(), up.data_ptr()
    lib.bn_gate_mul(*pointers, 1, gate.numel(), y.data_ptr(), native.threads())
    return y


def gate_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`bitnet_kernels.reference.gate_backward`."""
    lib = library_of(dy, gate, up)
    if lib is None:
        return reference.gate_backward(dy, gate, up)
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    lib.bn_train_gate_backward(
        dy.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        gate.numel(),
        dgate.data_ptr(),
        dup.data_ptr(),
        native.threads(),
    )
    return dgate, dup


def absmean(weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """:func:`bitnet_kernels.reference.absmean`."""
    lib = library_of(weight)
    if lib is None or not weight.numel():
        return reference.absmean(weight, alpha)
    weight = weight.contiguous()
    codes, gamma = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(())
    lib.bn_absmean(
        weight.data_ptr(),
        weight.numel(),
        alpha,
        codes.data_ptr(),
        gamma.data_ptr(),
        native.threads(),
    )
    return codes, gamma


def rescale_(acc: Tensor, s_x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`bitnet_kernels.reference.rescale` to fp32 of contiguous int32 ``[M, N]``, in the
    memory of ``acc``. ``bias``: fp32."""
    lib = library_of(s_x, scale, *([] if bias is None else [bias]))
    if lib is None or not acc.numel():  # an empty tensor has no address
        # Touching new memory takes half of the time, so the result reuses the memory of acc here,
        # too.
        y = acc.view(torch.float32).copy_(acc)
        return reference.rescale_(y, s_x, scale, bias, torch.float32)
    s_x, scale = s_x.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    lib.bn_train_rescale(
        acc.data_ptr(),
        s_x.data_ptr(),
        scale.data_ptr(),
        scale.dim(),
        None if bias is None else bias.data_ptr(),
        *acc.shape,
        native.threads(),
    )
    return acc.view(torch.float32)


def stochastic_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`bitnet_kernels.reference.stochastic_int8` with other random numbers: a counter-based
    generator makes them, whose seed is drawn from torch's global generator. So
    ``torch.manual_seed`` determines them, and a run that restores torch's generator repeats them,
    with any number of threads."""
    lib = library_of(x)
    if lib is None:
        return reference.stochastic_int8(x)
    x = x.contiguous()
    codes, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0])
    lib.bn_stochastic(
        x.data_ptr(), *x.shape, _seed(), codes.data_ptr(), scale.data_ptr(), native.threads()
    )
    return codes, scale


def stochastic_int8_columns(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`bitnet_kernels.reference.stochastic_int8_columns`, with random numbers as in
    :func:`stochastic_int8`."""
    lib = library_of(x, s)
    if lib is None:
        return reference.stochastic_int8_columns(x, s)
    x, s = x.contiguous(), s.contiguous()
    m, n = x.shape
    codes, scale = x.new_empty((n, m), dtype=torch.int8), x.new_empty(n)
    lib.bn_stochastic_columns(
        x.data_ptr(),
        s.data_ptr(),
        m,
        n,
        _seed(),
        codes.data_ptr(),
        scale.data_ptr(),
        native.threads(),
    )
    return codes, scale


def _seed() -> int:
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def cross_entropy_(z: Tensor, targets: Tensor, losses: Tensor) -> None:
    """Write the tokens' losses, ``logsumexp(z) - z[target]``, and overwrite their logits with the
    gradients, ``softmax(z) - onehot``. A NaN logit makes its token's loss and gradient NaN.

    Arguments:
        z: contiguous fp32 ``[M, V]``, V >= 1. targets: int64 ``[M]``. losses: fp32 ``[M]``,
        contiguous; written.
    Raises:
        RuntimeError: a target is not in 0 .. V - 1.
    """
    lib = native.library()
    assert lib is not None
    m, n = z.shape
    for target in (targets.amin(), targets.amax()) if m else ():
        if not 0 <= (index := int(target)) < n:
            raise RuntimeError(f"targets: {index} is out of bounds, expected 0 to {n - 1}")
    targets = targets.contiguous()
    lib.bn_cross_entropy(
        z.data_ptr(), targets.data_ptr(), m, n, losses.data_ptr(), native.threads()
    )
