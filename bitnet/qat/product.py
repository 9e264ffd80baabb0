"""The exact integer product of a quantized layer, and the float product that gives its gradient.

With codes ``x_q``, ``w_q`` and zero points ``z_x``, ``z_w`` (0 where symmetric), a linear layer is

    acc = sum_k (x_q[m,k] - z_x) * (w_q[n,k] - z_w[n])                 integers, exact
        = sum_k x_q w_q  -  z_x sum_k w_q  -  z_w (sum_k x_q - K z_x)
    y   = ((acc.float() * s_x[m]) * s_w[n]) (+ bias[n])                fp32 in this order, one cast

This is the rule of ternary layers (docs/quantization.md) for any codes: since ``acc`` is exact,
fake quantization in training and integers in inference agree to the last bit, on every device. With
group-wise scales each group of columns is rescaled separately, and the terms are added in ascending
order. A convolution is the same product on the patches of its input (im2col); padding adds ``z_x``,
the code of the real number 0.

Shapes: M tokens, K in_features, N out_features, G groups of columns; B samples, C channels. For a
convolution K = C / groups * kernel_height * kernel_width, and M = B * output_height * output_width.
"""

from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bitnet.qat.grid import Codes
from bitnet.quant import output_dtype
from bitnet_kernels import reference
from bitnet_kernels.cpu import int_mm

_INT32_K = (2**31 - 1) // 255**2
"""The largest K for which int32 holds the sum of products (of codes minus zero points)."""

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact ``a @ b.mT`` for any int8 codes.

    Arguments:
        a: int8 ``[..., M, K]``; b: int8 ``[..., N, K]`` with the same leading dimensions.
    Returns:
        ``[..., M, N]`` int32; int64 for K > 33025, where zero points could overflow int32.
    """
    if a.device.type == "cuda" and a.dim() > 2:
        return torch.stack([int_matmul(*pair) for pair in zip(a, b, strict=True)])
    matmul = int_mm.int8_matmul if a.device.type == "cuda" else reference.int8_matmul
    dtype = torch.int32 if a.shape[-1] <= _INT32_K else torch.int64
    slices = zip(a.split(_INT32_K, -1), b.split(_INT32_K, -1), strict=True)
    acc = matmul(*next(slices)).to(dtype)
    for a_k, b_k in slices:
        acc = acc + matmul(a_k, b_k)
    return acc


def quantized_linear(
    x: Codes, w: Codes, bias: Tensor | None, dtype: torch.dtype, group_size: int = 128
) -> Tensor:
    """The integer product and its rescale; see the top of this file.

    With ternary codes and no zero points it equals ``bitnet_kernels.reference.scaled_matmul``.

    Arguments:
        x: codes ``[..., M, K]``, scale ``[M]`` or ``[]``, zero_point ``[]`` or None.
        w: codes ``[..., N, K]`` with the same leading dimensions; scale and zero_point per tensor
            ``[]``, per row ``[..., N]`` or per group of ``group_size`` columns ``[..., N, G]``.
        bias: ``[..., N]`` or None, added after the rescale, in fp32.
    Returns:
        ``dtype`` ``[..., M, N]``.
    """
    if w.scale.dim() < w.codes.dim():
        return _rescaled(x, w, bias, dtype)
    y = torch.zeros((), device=x.codes.device, dtype=torch.float32)
    x_groups, w_groups = x.codes.split(group_size, -1), w.codes.split(group_size, -1)
    for i, (x_g, w_g) in enumerate(zip(x_groups, w_groups, strict=True)):
        zero = None if w.zero_point is None else w.zero_point[..., i]
        group = Codes(w_g, w.scale[..., i], zero)
        y = y + _rescaled(x._replace(codes=x_g), group, None, torch.float32)
    return (y if bias is None else y + _across_rows(bias.float())).to(dtype)


def _rescaled(x: Codes, w: Codes, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    acc = int_matmul(x.codes, w.codes)
    if x.zero_point is not None:
        acc = acc - x.zero_point * _across_rows(w.codes.sum(-1, dtype=acc.dtype))
    if w.zero_point is not None:
        sums = x.codes.sum(-1, keepdim=True, dtype=acc.dtype)
        if x.zero_point is not None:
            sums = sums - x.codes.shape[-1] * x.zero_point
        acc = acc - sums * _across_rows(w.zero_point)
    bias = None if bias is None else _across_rows(bias)
    return reference.rescale(acc, x.scale, _across_rows(w.scale), bias, dtype)


def _across_rows(per_output: Tensor) -> Tensor:
    """``[..., N]`` -> ``[..., 1, N]``; a scalar stays a scalar."""
    return per_output.unsqueeze(-2) if per_output.dim() else per_output


class Op(Protocol):
    """The arithmetic of a kind of layer: in integers, in floats, and the float gradients.

    Here a layer's weight is the matrix ``[N, K]``; its input and output are batched.
    """

    @property
    def per_sample(self) -> bool:
        """Whether dynamic activations have one scale per sample instead of one per token."""

    def batched(self, x: Tensor) -> Tensor:
        """Check an input's dtype and shape, and give it the one leading dimension that the other
        methods expect. Raises TypeError, ValueError."""

    def unbatched(self, y: Tensor, x: Tensor) -> Tensor:
        """The output in the form for the original input ``x``."""

    def exact(
        self, x: Codes, w: Codes, bias: Tensor | None, dtype: torch.dtype, group_size: int
    ) -> Tensor:
        """:func:`quantized_linear` of the layer."""

    def floating(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The float operation in ``dtype``."""

    def gradients(self, dy: Tensor, x: Tensor, w: Tensor, needs: list[bool]) -> _Gradients:
        """The gradients of :meth:`floating` for x, w and the bias, computed in dy's dtype."""


class LinearOp(NamedTuple):
    """``x @ w.T + bias``."""

    in_features: int
    out_features: int

    @property
    def per_sample(self) -> bool:
        """One scale per token."""
        return False

    def batched(self, x: Tensor) -> Tensor:
        """``[..., K]`` -> ``[M, K]``."""
        _check_float(x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"input: expected shape [..., {self.in_features}] (in_features), "
                f"got {list(x.shape)}"
            )
        return x.reshape(-1, self.in_features)

    def unbatched(self, y: Tensor, x: Tensor) -> Tensor:
        """``[M, N]`` -> ``[..., N]``."""
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.out_features)

    def exact(
        self, x: Codes, w: Codes, bias: Tensor | None, dtype: torch.dtype, group_size: int
    ) -> Tensor:
        """:func:`quantized_linear`."""
        return quantized_linear(x, w, bias, dtype, group_size)

    def floating(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``F.linear``."""
        return F.linear(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype))

    def gradients(self, dy: Tensor, x: Tensor, w: Tensor, needs: list[bool]) -> _Gradients:
        """dx = dy @ w, dw = dy.T @ x, db = sum(dy)."""
        return (
            dy @ w.to(dy.dtype) if needs[0] else None,
            dy.t() @ x.to(dy.dtype) if needs[1] else None,
            dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)) if needs[2] else None,
        )


class ConvOp(NamedTuple):
    """A convolution over ``len(kernel)`` = 1 or 2 dimensions, padded with zeros."""

    in_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    """before and after, the last dimension first, as in F.pad"""
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, module: nn.Conv1d | nn.Conv2d) -> "ConvOp":
        """Read from a module; its padding may be a name."""
        kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
        padding: list[int] = []
        for axis in reversed(range(len(kernel))):
            if module.padding == "same":
                total = dilation[axis] * (kernel[axis] - 1)
                padding += [total // 2, total - total // 2]
            else:
                padding += 2 * [0 if module.padding == "valid" else int(module.padding[axis])]
        stride, groups = tuple(module.stride), module.groups
        return cls(module.in_channels, kernel, stride, tuple(padding), dilation, groups)

    @property
    def per_sample(self) -> bool:
        """One scale per sample: patches overlap, so a pixel belongs to several tokens."""
        return True

    def batched(self, x: Tensor) -> Tensor:
        """``[C, *size]`` or ``[B, C, *size]`` -> ``[B, C, *size]``."""
        _check_float(x)
        dims = len(self.kernel)
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            raise ValueError(
                f"input: expected {self.in_channels} channels and {dims} more dimensions, with or "
                f"without a batch before them, got {list(x.shape)}"
            )
        if 0 in x.shape[-dims:]:
            raise ValueError(f"input: expected sizes of at least 1, got {list(x.shape)}")
        return x if x.dim() == dims + 2 else x.unsqueeze(0)

    def unbatched(self, y: Tensor, x: Tensor) -> Tensor:
        """``[B, N, *size]``, without B if the input had none."""
        return y if x.dim() == len(self.kernel) + 2 else y.squeeze(0)

    def exact(
        self, x: Codes, w: Codes, bias: Tensor | None, dtype: torch.dtype, group_size: int
    ) -> Tensor:
        """:func:`quantized_linear` of the patches, one product per group of channels."""
        g = self.groups
        patches, size = self._patches(x.codes, x.zero_point)
        batch = x.codes.shape[0]
        scale = x.scale
        if scale.dim():
            scale = scale.reshape(batch, *len(size) * [1]).expand(batch, *size).reshape(-1)
        y = quantized_linear(
            Codes(patches, scale, x.zero_point),
            Codes(*(None if t is None else _by_group(t, g) for t in w)),  # type: ignore[arg-type]
            None if bias is None else _by_group(bias, g),
            dtype,
            group_size,
        )
        y = y.reshape(g, batch, *size, w.codes.shape[0] // g)
        y = rearrange(y, "g b ... n -> b (g n) ...")
        # A copy in torch's memory order: autograd forbids changes of a view that _Exact returns.
        return y.clone(memory_format=torch.contiguous_format)

    def _patches(self, codes: Tensor, zero_point: Tensor | None) -> tuple[Tensor, torch.Size]:
        """int8 ``[B, C, *size]`` -> patches ``[groups, M, K]``, and the output's size."""
        if zero_point is None:
            codes = F.pad(codes, self.padding)
        else:  # adding it after the padding needs no read of its value
            codes = (F.pad(codes.int() - zero_point, self.padding) + zero_point).to(torch.int8)
        for axis, (kernel, stride, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True), 2
        ):
            codes = codes.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        dims = len(self.kernel)
        size = codes.shape[2 : 2 + dims]
        axes = "h w" if dims == 2 else "h"
        window = "kh kw" if dims == 2 else "kh"
        pattern = f"b (g c) {axes} {window} -> g (b {axes}) (c {window})"
        return rearrange(codes, pattern, g=self.groups), size

    def floating(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``F.conv1d`` or ``F.conv2d``."""
        conv = F.conv2d if len(self.kernel) == 2 else F.conv1d
        bias = None if bias is None else bias.to(dtype)
        padded, kernel = F.pad(x.to(dtype), self.padding), self._kernel(w).to(dtype)
        return conv(padded, kernel, bias, self.stride, 0, self.dilation, self.groups)

    def _kernel(self, w: Tensor) -> Tensor:
        return w.reshape(w.shape[0], self.in_channels // self.groups, *self.kernel)

    def gradients(self, dy: Tensor, x: Tensor, w: Tensor, needs: list[bool]) -> _Gradients:
        """By torch's own backward of a convolution."""
        zeros = [0] * len(self.kernel)
        dx, dw, db = torch.ops.aten.convolution_backward(
            dy,
            F.pad(x, self.padding).to(dy.dtype),
            self._kernel(w).to(dy.dtype),
            [w.shape[0]],
            self.stride,
            zeros,
            self.dilation,
            False,
            zeros,
            self.groups,
            needs,
        )
        if dx is not None:
            dx = F.pad(dx, [-p for p in self.padding])
        return dx, None if dw is None else dw.flatten(1), db


def _by_group(per_output: Tensor, groups: int) -> Tensor:
    """``[N, ...]`` -> ``[groups, N / groups, ...]``; a scalar stays a scalar."""
    return per_output.unflatten(0, (groups, -1)) if per_output.dim() else per_output


def _check_float(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"input: expected a floating-point tensor, got {x.dtype}")


class _Exact(torch.autograd.Function):
    """Forward: the exact product. Backward: the gradients of the float operation at the quantized
    values, which the quantizers' straight-through functions pass on."""

    @staticmethod
    def forward(
        ctx: Any,
        x_hat: Tensor,
        w_hat: Tensor,
        bias: Tensor | None,
        op: Op,
        dtype: torch.dtype,
        group_size: int,
        *codes: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_hat, w_hat)
        ctx.op, ctx.bias_dtype = op, None if bias is None else bias.dtype
        x, w = Codes(*codes[:3]), Codes(*codes[3:])  # type: ignore[arg-type]
        return op.exact(x, w, bias, dtype, group_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_hat, w_hat = ctx.saved_tensors
        dx, dw, db = ctx.op.gradients(dy, x_hat, w_hat, list(ctx.needs_input_grad[:3]))
        return (
            None if dx is None else dx.to(x_hat.dtype),
            None if dw is None else dw.to(w_hat.dtype),
            None if db is None else db.to(ctx.bias_dtype),
            *(9 * [None]),
        )


def exact_product(
    op: Op,
    x: Codes,
    x_hat: Tensor,
    w: Codes,
    w_hat: Tensor,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """``op.exact`` with gradients for x_hat, w_hat and the bias, in the dtype of
    :func:`bitnet.quant.output_dtype`."""
    return _Exact.apply(x_hat, w_hat, bias, op, output_dtype(x_hat), group_size, *x, *w)
