"""Quantizers and the straight-through estimator of BitNet b1.58 (arXiv 2402.17764).

    gamma = max(mean|W|, 1e-5)            one per tensor, row, or group of columns; fp32
    codes = +1 where W >  gamma/2         the exact form of clamp(round(W / gamma), -1, +1):
            -1 where W < -gamma/2         no division, ties at gamma/2 go to 0
             0 elsewhere
    s_x   = max(max|x|, 1e-5) / 127       one per token; x_q = round(x / s_x) in int8
    y     = (codes @ x_q) * s_x * gamma   the int32 sum is exact, so every path gives the same bits

Both roundings have zero gradient almost everywhere, so the backward is *straight-through*: it
computes the gradients of y = x_hat @ W_hat.T and passes them to x and to the latent W unchanged. It
is one autograd function, not the `x + (q(x) - x).detach()` idiom: bf16 rounds that sum again, and
1.8% of the resulting weights are not ternary. The function saves int8 codes and scales for the
backward, never float tensors of that size.

A quantized tensor can be reused, with the same bits: all layers that share an input can take its
codes (:func:`quantize_input`); all forwards until a weight changes can take the weight's codes
(:func:`quantize_weight`).

A scale always *multiplies* codes here. absmean is not idempotent: quantizing W_hat again multiplies
the scale by mean|codes|. So a quantized weight is stored as codes and scale.

Shapes: M tokens, K in_features, N out_features, G = ceil(K / group_size) groups of columns.
"""

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import torch.distributed
from einops import repeat
from torch import Tensor
from torch.autograd.function import once_differentiable

import bitnet_kernels
from bitnet_kernels import reference
from bitnet_kernels.cpu.gradients import takes_input_gradient, takes_weight_gradient
from bitnet_kernels.cpu.int_mm import codes_matmul, scaled_matmul
from bitnet_kernels.cpu.training import rescale_, takes
from bitnet_kernels.reference import absmax_int8, clamped_mean

if TYPE_CHECKING:  # some builds of torch lack it
    from torch.distributed import ProcessGroup

Granularity = Literal["tensor", "row", "group"]
GradMask = Literal["none", "clip", "trust"]
Int8Backward = Literal["none", "input", "both"]

_ops = torch.ops.bitnet
"""The operators of bitnet_kernels without their checks: torch.compile refuses some of the checks
inside a backward."""
_TOKENS_PER_SUM = 2**16
"""Most tokens in one int32 sum. Products are at most 128^2, so a sum stays within half of int32's
range."""


class QuantizedInput(NamedTuple):
    """Activations quantized once for several layers; see :func:`quantize_input`."""

    values: Tensor
    """float ``[..., K]``: the input itself, which receives the gradients"""
    codes: Tensor
    """int8 ``[..., K]``"""
    scale: Tensor
    """fp32 ``[...]``"""


class TernaryWeight(NamedTuple):
    """A weight quantized once for several forwards; see :func:`quantize_weight`."""

    codes: Tensor
    """int8 ``[N, K]`` in {-1, 0, +1}"""
    gamma: Tensor
    """fp32 ``[]``, ``[N]`` or ``[N, G]``"""
    transposed: Tensor | None = None
    """int8 ``[K, N]``: the transposed codes, for a backward that multiplies integers"""


def quantize_input(x: Tensor) -> QuantizedInput:
    """Quantize each token of a float ``[..., K]`` to int8 by absmax, once for all layers that take
    the same input. Gradients flow through ``values``, which is x.

    Raises TypeError if x is not floating point.
    """
    _check_float(x)
    with torch.no_grad():
        on_gpu = x.device.type == "cuda" and not torch.compiler.is_compiling()
        if on_gpu or takes(x):  # one pass; torch.compile fuses the other branch itself
            codes, scale, _ = bitnet_kernels.quant(x)
        else:
            codes, scale = absmax_int8(x)
    return QuantizedInput(x, codes, scale)


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    int8_backward: Int8Backward = "none",
    gamma: Tensor | None = None,
) -> TernaryWeight:
    """Quantize a latent weight by :func:`absmean_ternary`, without gradient, and transpose the
    codes if ``int8_backward`` needs them. ``gamma``: use this scale; the weight may then be a part
    of the matrix that it was computed for. Raises what :func:`absmean_ternary` raises."""
    check_int8_backward(int8_backward, granularity)
    if gamma is None:
        codes, gamma = absmean_ternary(weight, granularity, group_size)
    else:
        codes = ternary_codes(weight, gamma, group_size)
    transposed = None if int8_backward == "none" else codes.t().contiguous()
    return TernaryWeight(codes, gamma, transposed)


def absmean_ternary(
    weight: Tensor,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    alpha: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Ternary codes and their scale (arXiv 2402.17764, eqs. 1-3).

    The mean of the magnitudes is computed from a sum of integers. So gamma has the same bits on
    every device, in every order of summation and for any number of threads.

    Arguments:
        weight: float ``[N, K]``.
        granularity: one scale per ``"tensor"``, ``"row"`` or ``"group"`` of ``group_size`` columns
            (the last group of a row may be shorter; its mean is over its own columns).
        alpha: the threshold in units of gamma. 0.5 is rounding; TWN (arXiv 1605.04711) uses 0.7.
    Returns:
        codes int8 ``[N, K]`` in {-1, 0, +1}; gamma fp32 ``[]``, ``[N]`` or ``[N, G]``, such that
        ``codes * gamma`` approximates the weight. A NaN or an infinity among the weights of a scale
        makes that gamma NaN, and everything computed with it.
    Raises:
        TypeError, ValueError: a weight that is not a float matrix with K >= 1, an unknown
        granularity or an invalid group size.
    """
    _check_weight(weight)
    check_granularity(granularity, group_size)
    if granularity == "tensor" and takes(weight):
        codes, gamma = _ops.absmean(weight, alpha)
        return codes, gamma
    magnitude = weight_magnitude(weight)
    if granularity == "tensor":
        gamma = clamped_mean(magnitude.flatten())
    elif granularity == "row":
        gamma = clamped_mean(magnitude)
    else:
        gamma = torch.stack([clamped_mean(part) for part in magnitude.split(group_size, 1)], 1)
    return ternary_codes(weight, gamma, group_size, alpha), gamma


def weight_magnitude(weight: Tensor) -> Tensor:
    """``|W|`` in fp32, or in fp64 for an fp64 weight: the terms of the mean."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()


def ternary_codes(
    weight: Tensor, gamma: Tensor, group_size: int = 128, alpha: float = 0.5
) -> Tensor:
    """The codes of a weight whose scale is known: +1 above ``alpha * gamma``, -1 below its
    negative. Float ``[N, K]`` and fp32 ``[]``, ``[N]`` or ``[N, G]`` -> int8 ``[N, K]``."""
    w, threshold = weight.float(), alpha * gamma
    if gamma.dim() == 1:
        threshold = threshold.unsqueeze(1)
    elif gamma.dim() == 2:
        threshold = spread_groups(threshold, group_size, w.shape[1])
    codes = (w > threshold).to(torch.int8)
    codes -= (w < -threshold).to(torch.int8)
    return codes


def spread_groups(gamma: Tensor, group_size: int, in_features: int) -> Tensor:
    """One scale per column: ``[N, G]`` -> ``[N, K]``.

    A shorter last group is appended separately: if torch (2.13) compiles a slice of the repeated
    scales for a CPU, it reads wrong elements.
    """
    in_features = int(in_features)  # torch.jit.trace passes a tensor
    full, rest = in_features // group_size, in_features % group_size  # dynamo: no symbolic divmod
    columns = repeat(gamma[:, :full], "n g -> n (g columns)", columns=group_size)
    return torch.cat((columns, gamma[:, full:].expand(-1, rest)), 1) if rest else columns


def dequantize(codes: Tensor, gamma: Tensor, group_size: int = 128) -> Tensor:
    """``W_hat = codes * gamma``: int8 ``[N, K]`` and gamma of :func:`absmean_ternary` -> fp32."""
    if gamma.dim() == 1:
        gamma = gamma.unsqueeze(1)
    elif gamma.dim() == 2:
        gamma = spread_groups(gamma, group_size, codes.shape[1])
    return codes * gamma


def stochastic_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8 by stochastic rounding, so that the error is zero on average:
    ``s = max|x| / 127``, ``codes = floor(x / s + u)``, u uniform in [0, 1); the expectation of
    ``codes * s`` is x (Gupta et al., arXiv 1502.02551).

    The random numbers come from torch's global generator, or from a counter-based generator whose
    seed the global one draws (:func:`bitnet_kernels.cpu.training.stochastic_int8`). So
    ``torch.manual_seed`` fixes them, and a run resumed with torch's state repeats them.

    Arguments:
        x: float ``[M, N]``, N >= 1.
    Returns:
        codes int8 ``[M, N]``, |codes| <= 127; scale fp32 ``[M]``. A row that holds a NaN or an
        infinity has scale NaN and codes 0.
    """
    quantized: tuple[Tensor, Tensor] = (
        _ops.stochastic_int8(x) if takes(x) else reference.stochastic_int8(x)
    )
    return quantized


def _gradient_mask(
    weight: Tensor, codes: Tensor, gamma: Tensor, group_size: int, mask: GradMask, c: float
) -> Tensor:
    """The elements of a latent weight that receive a gradient: bool ``[N, K]``.

    ``clip``: where |W| <= c * gamma. ``trust``: where |W - W_hat| <= c * gamma, the trust region
    of QuEST (arXiv 2502.05003). With c = 0.5, half a quantization step, it is |W| <= 1.5 gamma.
    """
    bound = c * dequantize(torch.ones_like(codes), gamma, group_size)
    w = weight.float()
    if mask == "trust":
        w = w - dequantize(codes, gamma, group_size)
    return w.abs() <= bound


class _TernaryLinear(torch.autograd.Function):
    """y = x_hat @ W_hat.T + b forward in exact integers, straight-through backward.

    x and the weight are arguments so that they receive gradients; the forward reads their codes.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_q: Tensor,
        s_x: Tensor,
        codes: Tensor,
        gamma: Tensor,
        transposed: Tensor | None,
        group_size: int,
        mask: GradMask,
        mask_c: float,
        int8_backward: Int8Backward,
        group: "ProcessGroup | None",
        dtype: torch.dtype,
    ) -> Tensor:
        if group is not None:
            acc = codes_matmul(x_q, codes)
            torch.distributed.all_reduce(acc, group=group)
            return reference.rescale(acc, s_x, gamma, bias, dtype)
        if gamma.dim() == 2:
            return scaled_matmul(x_q, s_x, codes, gamma, bias, dtype, group_size)
        return bitnet_kernels.int8_linear(x_q, s_x, codes, gamma, bias, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, x_q, s_x, codes, gamma, transposed, *options, _, _ = inputs
        ctx.group_size, ctx.mask, ctx.mask_c, ctx.int8_backward = options
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        latent = None if ctx.mask == "none" else weight
        ctx.save_for_backward(x_q, s_x, codes, gamma, transposed, latent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dx = dy @ W_hat, dW = dy.T @ x_hat, db = sum(dy); docs/quantization.md, "Backward"."""
        x_q, s_x, codes, gamma, transposed, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            if ctx.int8_backward != "none":
                dx = _int8_input_gradient(dy, transposed, gamma)
            else:
                dx = input_gradient(dy, codes, gamma, ctx.group_size)
            dx = dx.to(x_dtype)
        if ctx.needs_input_grad[1]:
            if ctx.int8_backward == "both":
                dw = _int8_weight_gradient(dy, x_q, s_x)
            elif takes_weight_gradient(dy):
                dw = _ops.weight_gradient(dy, x_q, s_x)
            else:
                dw = dy.t() @ x_q.float().mul_(s_x.unsqueeze(1)).to(dy.dtype)
            if weight is not None:
                dw = dw * _gradient_mask(weight, codes, gamma, ctx.group_size, ctx.mask, ctx.mask_c)
            dw = dw.to(weight_dtype)
        if bias_dtype is not None and ctx.needs_input_grad[2]:
            db = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(bias_dtype)
        return dx, dw, db, *(11 * [None])


def input_gradient(dy: Tensor, codes: Tensor, gamma: Tensor, group_size: int) -> Tensor:
    """``dy @ W_hat`` for a float dy ``[M, N]``: ``[M, K]`` in the dtype of ``dy``.

    W_hat is exact in fp32. In 16 bits the codes are exact, but gamma would be rounded, in the same
    direction for every token. So gamma multiplies the result or dy instead. In fp16 it always
    multiplies dy, since the sum of N unscaled gradients may overflow."""
    if gamma.dim() < 2 and takes_input_gradient(dy):
        dx: Tensor = _ops.input_gradient(dy, codes, gamma)
        return dx
    if dy.dtype.itemsize >= 4 or gamma.dim() == 2:
        return dy @ dequantize(codes, gamma, group_size).to(dy.dtype)
    if gamma.dim() == 1 or dy.dtype == torch.float16:
        return (dy.float() * gamma).to(dy.dtype) @ codes.to(dy.dtype)
    return (dy @ codes.to(dy.dtype)).mul_(gamma)


def _int8_input_gradient(dy: Tensor, transposed: Tensor, gamma: Tensor) -> Tensor:
    """An unbiased estimate of ``dy @ W_hat``, with each token of ``dy`` quantized to int8."""
    if gamma.dim() == 1:
        dy, gamma = dy.float() * gamma, gamma.new_ones(())
    dy_q, s_dy = stochastic_int8(dy)
    return _ops.int8_linear(dy_q, s_dy, transposed, gamma, None, dy.dtype)


def _int8_weight_gradient(dy: Tensor, x_q: Tensor, s_x: Tensor) -> Tensor:
    """An unbiased estimate of ``dy.T @ x_hat``, fp32 ``[N, K]``: ``dy`` is multiplied by the
    per-token scales of x and quantized to int8 with one scale per output channel."""
    if len(dy) <= _TOKENS_PER_SUM and takes(dy):
        codes, scale = _ops.stochastic_int8_columns(dy, s_x)
        return rescale_(_ops.int8_matmul(codes, x_q.t()), scale, scale.new_ones(()), None)
    dw = torch.zeros(dy.shape[1], x_q.shape[1], device=dy.device, dtype=torch.float32)
    scaled = dy.float() * s_x.unsqueeze(1)
    if len(dy):
        for part, x_part in zip(
            scaled.split(_TOKENS_PER_SUM), x_q.split(_TOKENS_PER_SUM), strict=True
        ):
            codes, scale = stochastic_int8(part.t())
            dw += _ops.int8_matmul(codes, x_part.t()) * scale.unsqueeze(1)
    return dw


def output_dtype(x: Tensor) -> torch.dtype:
    """The output dtype of a linear layer for ``x``: autocast's dtype if autocast is on, else the
    dtype of x. Autocast does not change fp64."""
    device = x.device.type
    autocasts = device != "meta" and x.dtype != torch.float64
    if autocasts and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _check_float(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"input: expected a floating-point tensor, got {x.dtype}")


def ternary_linear_ste(
    x: Tensor | QuantizedInput,
    weight: Tensor,
    bias: Tensor | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    mask: GradMask = "none",
    mask_c: float = 1.0,
    *,
    quantized: TernaryWeight | None = None,
    int8_backward: Int8Backward = "none",
    group: "ProcessGroup | None" = None,
) -> Tensor:
    """The training forward of a ternary linear layer, differentiable straight-through.

    Arguments:
        x: float ``[..., K]`` with any leading dimensions, also empty ones; or its
            :func:`quantize_input`, which gives the same bits.
        weight: the latent float ``[N, K]``; bias: ``[N]`` or None, added after the rescale.
        granularity, group_size: of the weight's scales; see :func:`absmean_ternary`.
        mask, mask_c: which latent weights receive a gradient. ``"none"``: all. ``"clip"``: where
            |W| <= mask_c * gamma. ``"trust"``: where |W - W_hat| <= mask_c * gamma (arXiv
            2502.05003).
        quantized: the result of :func:`quantize_weight` for this weight and these options. Its
            shapes are checked, its values are not. None: the weight is quantized here.
        int8_backward: an approximation, for speed on int8 tensor cores. Incoming gradients are
            rounded stochastically to int8 (:func:`stochastic_int8`) to compute the gradient of
            the ``"input"``, or of ``"both"`` input and weight. The results are unbiased, but the
            rounding adds noise. Not for granularity "group".
        group: the processes that each hold a part of the columns of ``x`` and of the weight, both
            quantized by the scales of the whole tensor (:mod:`bitnet.sharded`). Their int32 sums
            are added before the rescale, so every process gets the whole output. Not for
            granularity "group".
    Returns:
        ``[..., N]`` in the autocast dtype where autocast is on, else in the dtype of ``x``.
    Raises:
        TypeError: ``x`` or ``weight`` is not floating point. ValueError: the weight is not a matrix
        with K >= 1; the last dimension of ``x`` is not K; an unknown option; ``int8_backward``
        with granularity "group"; ``quantized`` made with other options.
    """
    values = x.values if isinstance(x, QuantizedInput) else x
    _check_float(values)
    _check_weight(weight)
    check_granularity(granularity, group_size)
    check_mask(mask, mask_c)
    check_int8_backward(int8_backward, granularity)
    if values.dim() == 0 or values.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input: expected shape [..., {weight.shape[1]}] (in_features), "
            f"got {list(values.shape)}"
        )
    tokens = x if isinstance(x, QuantizedInput) else quantize_input(x)
    if quantized is None:
        quantized = quantize_weight(weight, granularity, group_size, int8_backward)
    else:
        _check_quantized(quantized, weight, granularity, group_size, int8_backward)
    k = weight.shape[1]
    y: Tensor = _TernaryLinear.apply(
        values.reshape(-1, k),
        weight,
        bias,
        tokens.codes.reshape(-1, k),
        tokens.scale.reshape(-1),
        *quantized,
        group_size,
        mask,
        mask_c,
        int8_backward,
        group,
        output_dtype(values),
    )
    return y if values.dim() == 2 else y.reshape(*values.shape[:-1], weight.shape[0])


def check_int8_backward(int8_backward: str, granularity: str) -> None:
    """Raise ValueError for an unknown ``int8_backward``, or for any with group-wise scales. In
    ``dy @ W_hat`` such scales vary along the summed axis and along the result, so no single integer
    product computes it."""
    if int8_backward not in (valid := get_args(Int8Backward)):
        raise ValueError(
            f"int8_backward: expected one of {', '.join(valid)}, got {int8_backward!r}"
        )
    if int8_backward != "none" and granularity == "group":
        raise ValueError(
            f"int8_backward: {int8_backward!r} does not go with granularity 'group'; use "
            "'tensor' or 'row'"
        )


def check_granularity(granularity: str, group_size: int) -> None:
    """Raise ValueError, naming the argument, for an unknown granularity or a group size < 1."""
    if granularity not in (valid := get_args(Granularity)):
        raise ValueError(f"granularity: expected one of {', '.join(valid)}, got {granularity!r}")
    if group_size < 1:
        raise ValueError(f"group_size: expected >= 1, got {group_size}")


def check_mask(mask: str, mask_c: float, prefix: str = "") -> None:
    """Raise ValueError for an unknown mask or an invalid bound; the message puts ``prefix`` before
    the arguments' names."""
    if mask not in (valid := get_args(GradMask)):
        raise ValueError(f"{prefix}mask: expected one of {', '.join(valid)}, got {mask!r}")
    if not 0 <= mask_c < math.inf:
        raise ValueError(f"{prefix}mask_c: expected a finite number >= 0, got {mask_c}")


def _check_weight(weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(f"weight: expected shape [N, K] with K >= 1, got {list(weight.shape)}")


def _check_quantized(
    quantized: TernaryWeight,
    weight: Tensor,
    granularity: Granularity,
    group_size: int,
    int8_backward: Int8Backward,
) -> None:
    """Raise ValueError if ``quantized`` was made with options other than the call's."""
    codes, gamma, transposed = quantized
    n, k = weight.shape
    shape = {"tensor": (), "row": (n,), "group": (n, -(-k // group_size))}[granularity]
    if codes.shape != weight.shape or gamma.shape != shape:
        raise ValueError(
            f"quantized: expected codes {[n, k]} and gamma {list(shape)} for granularity "
            f"{granularity!r}, got {list(codes.shape)} and {list(gamma.shape)}"
        )
    if int8_backward != "none" and transposed is None:
        raise ValueError(
            f"quantized: int8_backward {int8_backward!r} wants `transposed` too; give "
            "quantize_weight the same int8_backward"
        )
