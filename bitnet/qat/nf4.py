"""NF4, the 4-bit float of QLoRA (arXiv 2305.14314), and frozen linear layers.

    blocks of 64 weights in row order, across row boundaries; the last may be shorter
    absmax = max|w| of the block, fp32             level = the nearest of 16 to w / absmax
    w_hat  = LEVELS[code] * absmax

The levels are quantiles of a normal distribution: Phi^-1 at 9 and at 8 points evenly spaced from
1/2 to 0.9677083 (the mean of 1 - 1/30 and 1 - 1/32), the second half negated, 0 once, all divided
by the largest. There are 8 levels above 0 and 7 below it; each is the nearest level for 2 to 9% of
Gaussian weights. 0, -1 and 1 are exact, so a block's largest weight is exact too.

A weight takes 4 bits and 1/64 of an fp32, 0.5625 bytes. The paper also quantizes the absmax values,
which would save another 0.05 bytes; this is left out, so absmax stays exact. Codes, bytes and
absmax have the layout of bitsandbytes (two codes per byte, the first in the high half), so either
program can load the other's tensors.

A frozen layer keeps its codes and dequantizes them for each product, forward and backward:
y = x @ W_hat.T, dx = dy @ W_hat, no dW. So W_hat exists for only one layer at a time.

N out_features, K in_features.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bitnet.dequantized import dequantized
from bitnet.placement import CalledLayer, by_its_kind, is_unusual
from bitnet.quant import output_dtype

BLOCK = 64
"""Number of weights that share an absmax."""
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The published fp32 values (arXiv 2305.14314, appendix E), by code."""

_MIDPOINTS = torch.tensor(
    [(a + b) / 2 for a, b in pairwise(LEVELS)], dtype=torch.float32, device="cpu"
)
_PAIRS = torch.tensor(  # [256, 2]: byte -> two levels
    [(a, b) for a in LEVELS for b in LEVELS], dtype=torch.float32, device="cpu"
)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """Codes and block scales of a weight.

    A value exactly on the fp32 midpoint of two levels goes to the lower level. A block of zeros has
    absmax 0 and the code of level 0.

    Arguments:
        weight: float tensor of any shape and memory order; read in row order, as fp32.
    Returns:
        packed: uint8 ``[ceil(numel / 2)]``, two codes per byte, the first in the high half; an odd
            count ends with a code of level 0. absmax: fp32 ``[ceil(numel / 64)]``. The shape.
    Raises:
        TypeError: ``weight`` is not floating point. ValueError: it holds a NaN or an infinity (on
        the meta device there are no values to check).
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor, got {weight.dtype}")
    flat = weight.detach().flatten().float()
    blocks = pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    if not weight.is_meta and not bool(absmax.isfinite().all()):
        raise ValueError("weight: holds NaN or infinity; such a weight has no NF4 form")
    units = blocks / torch.where(absmax > 0, absmax, 1.0).unsqueeze(1)
    # bucketize counts the midpoints below each value: this count is the nearest level's code
    codes = torch.bucketize(units, _MIDPOINTS.to(units.device), out_int32=True).to(torch.uint8)
    high, low = codes.view(-1, 2).unbind(1)
    return ((high << 4) | low)[: math.ceil(len(flat) / 2)], absmax, weight.shape


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The codes 0..15 as uint8 of ``shape``, which index :data:`LEVELS`."""
    codes = torch.stack((packed >> 4, packed & 15), 1)
    return codes.flatten()[: shape.numel()].view(shape)


def dequantize(packed: Tensor, absmax: Tensor, shape: torch.Size) -> Tensor:
    """``LEVELS[code] * absmax``: the results of :func:`quantize` -> fp32 of ``shape``.

    Raises:
        ValueError: the sizes of ``packed`` and ``absmax`` do not fit ``shape``.
    """
    count = shape.numel()
    sizes = (math.ceil(count / 2),), (math.ceil(count / BLOCK),)
    if (packed.shape, absmax.shape) != sizes:
        raise ValueError(
            f"packed, absmax: expected sizes {sizes[0][0]} and {sizes[1][0]} for shape "
            f"{list(shape)}, got {list(packed.shape)} and {list(absmax.shape)}"
        )
    whole = pad(packed, (0, len(absmax) * BLOCK // 2 - len(packed)))
    pairs = _PAIRS.to(packed.device, non_blocking=True)  # 2 KB: the host does not wait for it
    units = pairs.index_select(0, whole.int()).view(-1, BLOCK)
    return (units * absmax.unsqueeze(1)).flatten()[:count].view(shape)


class _FrozenProduct(torch.autograd.Function):
    """x @ W_hat.T for a weight that is dequantized for each product and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: "FrozenLinear", dtype: torch.dtype) -> Tensor:
        ctx.base, ctx.dtypes = base, (x.dtype, dtype)
        return x.to(dtype) @ base.dequantize().to(dtype).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x_dtype, dtype = ctx.dtypes
        return (dy.to(dtype) @ ctx.base.dequantize().to(dtype)).to(x_dtype), None, None


class FrozenLinear(CalledLayer, nn.Module):
    """A linear layer of stored codes. It passes gradients to its input; its weight has none.

    It multiplies floats, in the autocast dtype or the input's dtype.
    """

    SCALE = ""
    """Name of the buffer that stays fp32 under ``.to(dtype)``."""
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        self.train(linear.training)

    def codes(self) -> Tensor:
        """The stored codes ``[N, K]``."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """W_hat, fp32 ``[N, K]``."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """W_hat in ``dtype``, computed when its values are used (:mod:`bitnet.dequantized`)."""
        shape = self.out_features, self.in_features
        device = getattr(self, self.SCALE).device
        return dequantized(self.dequantize, shape, self.dtype, device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, input: Tensor) -> Tensor:
        """float ``[..., K]`` -> ``[..., N]``, differentiable in the input."""
        if is_unusual(input):
            return by_its_kind(self, input)
        dtype = output_dtype(input)
        y: Tensor = _FrozenProduct.apply(input, self, dtype)
        return y if self.bias is None else y + self.bias.to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenLinear":
        scale = getattr(self, self.SCALE)
        super()._apply(fn, recurse)
        if (moved := getattr(self, self.SCALE)).dtype != torch.float32:  # move, but do not round
            setattr(self, self.SCALE, scale.to(moved.device))
        return self

    def extra_repr(self) -> str:
        """Show the sizes and the stored bytes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight_bytes={self.weight_bytes}"
        )


class NF4Linear(FrozenLinear):
    """A frozen linear layer in NF4 (see the top of this file), 0.5625 bytes per weight.

    State: ``packed`` uint8 ``[ceil(NK / 2)]``, ``absmax`` fp32 ``[ceil(NK / 64)]``, ``bias``.
    Raises ValueError if the weights are not finite.
    """

    SCALE = "absmax"
    packed: Tensor
    absmax: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        packed, absmax, self.shape = quantize(linear.weight)
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)

    def codes(self) -> Tensor:
        """uint8 0..15 ``[N, K]``, which index :data:`LEVELS`."""
        return unpack(self.packed, self.shape)

    def dequantize(self) -> Tensor:
        """W_hat, fp32 ``[N, K]``."""
        return dequantize(self.packed, self.absmax, self.shape)
