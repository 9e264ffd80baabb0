"""The elementwise operators between a layer's matrices: RMSNorm and the squared-ReLU gate.

Composed of torch's operators, they save every tensor that a backward reads: the norm saves its
input and the normalized input, the gate saves relu, relu^2 and ``up``. The inputs alone would be
enough. In a small model on a CPU, memory traffic costs more than arithmetic, and touching new
memory costs most. So each operator here is one autograd function that saves its inputs and
recomputes the rest in the backward, in place. The forward gives the same bits as the composition.

The functions serve plain training: eager, reverse mode. Everything else (no gradients,
torch.compile, torch.func, forward mode, tracing, double backward) uses the composition. Batched
gradients (``is_grads_batched=True``) cannot be told from single ones, and are an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import bitnet_kernels  # noqa: F401  (registers the operators)
from bitnet_kernels.cpu.training import takes

_ops = torch.ops.bitnet


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm (arXiv 1910.07467), ``x / sqrt(mean(x^2) + eps) * weight``, that computes in fp32
    and returns the dtype of its input. (torch's own mixes dtypes, with a warning, if an autocast
    layer passes bf16 to an fp32 weight.)"""

    def forward(self, x: Tensor) -> Tensor:
        """float ``[..., features]`` -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """:class:`RMSNorm` with this weight; ``eps`` None: the machine epsilon of fp32."""
    if eps is None:
        eps = torch.finfo(torch.float32).eps
    # A GPU's own operator is fused already.
    if x.device.type == "cpu" and _trains(x, weight) and x.shape[-1:] == weight.shape:
        y: Tensor = _RMSNorm.apply(x, weight, eps)[0]
        return y
    return _rms_norm(x, weight, eps)


def relu2_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``relu(gate)^2 * up`` of float tensors (the gate of BitNet 2B4T, arXiv 2504.12285)."""
    if _trains(gate, up) and gate.shape == up.shape:
        y: Tensor = _Relu2Mul.apply(gate, up)
        return y
    return _relu2_mul(gate, up)


def _trains(*inputs: Tensor) -> bool:
    """Whether this is plain training: a gradient is needed, and nothing transforms the code."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if not any(tensor.requires_grad for tensor in inputs):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    forward_mode = forward_ad._current_level >= 0
    return not (tracing or forward_mode or any(tensor.is_inference() for tensor in inputs))


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps), n = x r and g = dy w:

    y = n w      dx = r (g - n mean(g n))      dw = sum over tokens of dy n
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = _wide(x)
        r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return (wide * r).mul_(weight.to(wide.dtype)).to(x.dtype), r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(r := output[1])
        ctx.save_for_backward(x, weight, r)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        if torch.is_grad_enabled():
            eps = ctx.eps
            return *_gradients(lambda x, w: _rms_norm(x, w, eps), (x, weight), dy), None
        if takes(dy, x, weight):
            return *_ops.norm_backward(dy, x, weight, r.squeeze(-1)), None
        dy, wide_weight = dy.to(r.dtype), weight.to(r.dtype)
        n = _wide(x) * r
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = dy * wide_weight
            with torch.autocast("cpu", enabled=False):  # it treats vecdot as a matrix product
                mean = torch.linalg.vecdot(dx, n).div_(x.shape[-1]).unsqueeze(-1)
            dx = dx.addcmul_(n, mean, value=-1).mul_(r).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = n.mul_(dy).sum_to_size(weight.shape).to(weight.dtype)
        return dx, dw, None


class _Relu2Mul(torch.autograd.Function):
    """dgate = 2 relu(gate) up dy, dup = relu(gate)^2 dy."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        if takes(gate, up):
            y: Tensor = _ops.gate(gate, up)
            return y
        relu = F.relu(gate)
        return relu.mul_(relu) * up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradients(_relu2_mul, (gate, up), dy)
        if takes(dy, gate, up):
            dgate, dup = _ops.gate_backward(dy, gate, up)
            return dgate, dup
        relu = F.relu(gate)
        dgate = (dy * up).mul_(relu).mul_(2)
        # 0 where the gate is closed, even if ``up`` is infinite: 0 * inf would be NaN
        torch.ops.aten.threshold_backward.grad_input(dgate, relu, 0, grad_input=dgate)
        return dgate.to(gate.dtype), relu.mul_(relu).mul_(dy).to(up.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = _wide(x)
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(x.dtype)


def _relu2_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.relu(gate).square() * up


def _gradients(
    composition: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor
) -> tuple[Tensor, ...]:
    """Compute the gradients by torch's own operators, which can be differentiated again
    (``create_graph=True``)."""
    gradients: tuple[Tensor, ...] = torch.func.vjp(composition, *inputs)[1](dy)
    return gradients


def _wide(x: Tensor) -> Tensor:
    """``x`` in fp32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
