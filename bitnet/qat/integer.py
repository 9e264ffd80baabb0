"""Integer layers: packed codes, scales, and the arithmetic of a microcontroller.

    layer = integer_layer(qat_layer, qat_layer.quantize())      after QAT
    layer = integer_layer(qat_layer, codes)                     with codes of GPTQ, AWQ, ...

An integer layer holds no float weights. Its outputs equal the QAT layer's in eval mode to the last
bit, since both call the same product on the same codes (product.py). Codes are packed bit by bit
into rows of bytes and unpacked in each forward.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.dequantized import dequantized
from bitnet.linear import TernaryLinear
from bitnet.modules import check_forward
from bitnet.placement import CalledLayer, by_its_kind, is_unusual
from bitnet.qat.activations import activation_codes
from bitnet.qat.grid import Codes, dequantize
from bitnet.qat.layers import (
    ProductLayer,
    QATConv1d,
    QATConv2d,
    QATEmbedding,
    QATLayer,
    QATLinear,
)
from bitnet.qat.product import ConvOp
from bitnet.qat.recipe import Recipe
from bitnet.quant import output_dtype

_BLOCK = 8
"""Codes per block: 8 codes of b bits fill b whole bytes."""


def pack_bits(codes: Tensor, bits: int, offset: int) -> Tensor:
    """Pack ``codes + offset``, each an unsigned number of ``bits`` bits, without gaps.

    The bits of a row are counted from the lowest bit of its first byte: code k takes bits
    ``k * bits`` to ``k * bits + bits - 1``, its lowest bit first.

    Arguments:
        codes: int8 ``[N, K]``. bits: 1 to 8. offset: makes the lowest code 0.
    Returns:
        uint8 ``[N, ceil(K * bits / 8)]``; bits past the last code are 0.
    Raises:
        TypeError, ValueError: a wrong dtype or shape; a code that does not fit.
    """
    _check_bits(bits)
    if codes.dtype != torch.int8:
        raise TypeError(f"codes: expected int8, got {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes: expected shape [N, K], got {list(codes.shape)}")
    if codes.is_meta:
        shape = len(codes), _row_bytes(codes.shape[1], bits)
        return torch.empty(shape, dtype=torch.uint8, device="meta")
    digits = codes.to(torch.int64) + offset
    if bool(((digits < 0) | (digits >= 2**bits)).any()):
        raise ValueError(
            f"codes: expected values in {-offset} .. {2**bits - 1 - offset} ({bits} bits), got "
            f"{int(codes.min())} .. {int(codes.max())}"
        )
    digits = F.pad(digits, (0, -codes.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    words = torch.zeros_like(digits[..., 0])
    for i in range(_BLOCK):
        words |= digits[..., i] << bits * i
    packed = torch.stack([(words >> 8 * j) & 255 for j in range(bits)], -1).to(torch.uint8)
    return packed.flatten(1)[:, : _row_bytes(codes.shape[1], bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, offset: int, columns: int) -> Tensor:
    """The inverse of :func:`pack_bits`: uint8 ``[N, ceil(K * bits / 8)]`` -> int8 ``[N, K]``,
    K = ``columns``."""
    _check_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected uint8, got {packed.dtype}")
    if packed.dim() != 2 or packed.shape[1] != _row_bytes(columns, bits):
        raise ValueError(
            f"packed: expected shape [N, {_row_bytes(columns, bits)}] for {columns} columns of "
            f"{bits} bits, got {list(packed.shape)}"
        )
    octets = F.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    words = torch.zeros(octets.shape[:-1], dtype=torch.int64, device=packed.device)
    for j in range(bits):
        words |= octets[..., j].to(torch.int64) << 8 * j
    codes = torch.empty((*words.shape, _BLOCK), dtype=torch.int8, device=packed.device)
    for i in range(_BLOCK):
        codes[..., i] = ((words >> bits * i) & 2**bits - 1) - offset
    return codes.flatten(1)[:, :columns].contiguous()


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: expected 1 .. 8, got {bits}")


def _row_bytes(columns: int, bits: int) -> int:
    return -(-columns * bits // 8)


class IntLayer(CalledLayer, nn.Module):
    """Packed codes and scales in place of a weight; :func:`integer_layer` makes the right subclass.

    Arguments:
        layer: the QAT layer, which gives recipe, bias, dtype and mode; not changed.
        found: codes of its weight, int8 ``[N, K]``, with scale and zero point.
    State:
        ``packed`` uint8 ``[N, ceil(K * storage_bits / 8)]``; ``scale`` fp32 ``[]``, ``[N]`` or
        ``[N, G]``; ``zero_point`` int8 of that shape, or None; ``bias`` ``[N]`` or None;
        ``input_scale`` fp32 ``[]`` and ``input_zero_point`` int32 ``[]`` if activations are static.
        Scales stay fp32 under ``.to(dtype)``.
    Attributes:
        dtype: of the original weight; changes with ``.to(dtype)``, as :attr:`weight` does.
    Raises:
        ValueError: codes, scale or zero point that do not fit the recipe; a scale that is not
        finite; static activations that are not calibrated.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, layer: QATLayer, found: Codes) -> None:
        super().__init__()
        recipe = layer.recipe
        _check_codes(found, recipe)
        codes, scale, zero_point = found
        self.recipe, self.columns, self.dtype = recipe, codes.shape[1], layer.weight.dtype
        if self._odd and not codes.is_meta:
            codes = (codes - 1) >> 1
        self.register_buffer("packed", pack_bits(codes, self._bits, self._offset))
        self.register_buffer("scale", scale.detach().clone())
        zero = None if zero_point is None else zero_point.detach().to(torch.int8)
        self.register_buffer("zero_point", zero)
        input_scale, input_zero_point = layer.input_range()
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero_point", input_zero_point)
        bias = getattr(layer, "bias", None)  # an embedding has none
        constant = None if bias is None else nn.Parameter(bias.detach().clone(), False)
        self.register_parameter("bias", constant)
        self.train(layer.training)

    @property
    def _bits(self) -> int:
        return self.recipe.quantizer.storage_bits

    @property
    def _odd(self) -> bool:
        """Whether codes are odd numbers (-3, -1, 1, 3; -1, 1), stored as (code - 1) / 2."""
        return self.recipe.quantizer.levels.step == 2

    @property
    def _offset(self) -> int:
        return 1 << (self._bits - 1)

    def _unpack(self, packed: Tensor) -> Tensor:
        codes = unpack_bits(packed, self._bits, self._offset, self.columns)
        return 2 * codes + 1 if self._odd else codes

    def quantize(self) -> Codes:
        """The given codes int8 ``[N, K]``, scale, and zero point int32 or None."""
        zero = None if self.zero_point is None else self.zero_point.to(torch.int32)
        return Codes(self._unpack(self.packed), self.scale, zero)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the shape of the torch layer's, computed when its values are
        used (:mod:`bitnet.dequantized`)."""
        return dequantized(self._dequantize, self._weight_shape, self.dtype, self.packed.device)

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return len(self.packed), self.columns

    def _dequantize(self) -> Tensor:
        return dequantize(*self.quantize(), self.recipe.group_size)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight as stored: packed codes, scales and zero points."""
        zeros = 0 if self.zero_point is None else self.zero_point.nbytes
        return self.packed.nbytes + self.scale.nbytes + zeros

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: getattr(self, name) for name in ("scale", "input_scale")}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        super()._apply(fn, recurse)
        for name, before in kept.items():  # .to(dtype), .half(): move, but do not round
            after = getattr(self, name)
            if after is not None and after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        """Shape, recipe and bytes."""
        return (
            f"{self.packed.shape[0]}x{self.columns}, bias={self.bias is not None}, "
            f"recipe={self.recipe}, weight_bytes={self.weight_bytes}"
        )


def _check_codes(found: Codes, recipe: Recipe) -> None:
    codes, scale, zero_point = found
    if codes.dim() != 2:
        raise ValueError(f"codes: expected shape [N, K], got {list(codes.shape)}")
    shape = list(recipe.quantizer.scale_shape(*codes.shape))
    if scale.dtype != torch.float32 or list(scale.shape) != shape:
        raise ValueError(
            f"scale: expected float32 {shape} for granularity {recipe.granularity!r}, got "
            f"{scale.dtype} {list(scale.shape)}"
        )
    if (zero_point is not None) != recipe.quantizer.affine:
        raise ValueError("zero_point: expected for affine weights, and only there")
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(
            f"zero_point: expected the scale's shape {shape}, got {list(zero_point.shape)}"
        )
    if scale.is_meta:
        return
    if zero_point is not None and not bool(((zero_point >= -128) & (zero_point <= 127)).all()):
        raise ValueError("zero_point: expected values in -128 .. 127")
    if not bool(scale.isfinite().all()):
        raise ValueError("weight: holds NaN or infinity; such a layer has no integer form")


class _IntProduct(IntLayer):
    """A linear layer or a convolution."""

    def __init__(self, layer: ProductLayer, found: Codes) -> None:
        super().__init__(layer, found)
        self.op = layer.op

    def forward(self, input: Tensor) -> Tensor:
        """The QAT layer's forward in eval mode; no gradient for the weights."""
        if is_unusual(input):
            return by_its_kind(self, input)
        x, recipe = self.op.batched(input), self.recipe
        w, dtype = self.quantize(), output_dtype(input)
        if recipe.weights_only:
            y = self.op.floating(x, dequantize(*w, recipe.group_size), self.bias, dtype)
        else:
            static = self.input_scale, self.input_zero_point
            x_codes = activation_codes(x, recipe, *static, self.op.per_sample)
            y = self.op.exact(x_codes, w, self.bias, dtype, recipe.group_size)
        return self.op.unbatched(y, input)


class IntLinear(_IntProduct):
    """``nn.Linear`` in integers: float ``[..., K]`` -> ``[..., N]``."""


class _IntConv(_IntProduct):
    op: ConvOp

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return len(self.packed), self.op.in_channels // self.op.groups, *self.op.kernel


class IntConv1d(_IntConv):
    """``nn.Conv1d`` in integers: ``[B, C, L]`` or ``[C, L]``."""


class IntConv2d(_IntConv):
    """``nn.Conv2d`` in integers: ``[B, C, H, W]`` or ``[C, H, W]``."""


class IntEmbedding(IntLayer):
    """``nn.Embedding`` of packed rows: int ``[...]`` -> ``[..., K]`` in ``dtype``."""

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows; only the requested rows are unpacked."""
        rows = input.flatten()
        scale, zero_point = self.scale, self.zero_point
        if scale.dim():
            scale = scale.index_select(0, rows)
            zero_point = None if zero_point is None else zero_point.index_select(0, rows)
        codes = self._unpack(self.packed.index_select(0, rows))
        values = dequantize(codes, scale, zero_point, self.recipe.group_size)
        return values.to(self.dtype).reshape(*input.shape, self.columns)


_FORMS: dict[type[QATLayer], type[IntLayer]] = {
    QATLinear: IntLinear,
    QATConv1d: IntConv1d,
    QATConv2d: IntConv2d,
    QATEmbedding: IntEmbedding,
}


def integer_layer(layer: QATLayer, found: Codes) -> nn.Module:
    """The inference form of a QAT layer with the given codes, which need not be its own (GPTQ).

    Ternary linear layers with 8-bit dynamic activations become :class:`bitnet.TernaryLinear`, which
    has kernels; all others become the ``Int`` form of their kind.

    Raises:
        ValueError: as :class:`IntLayer`; a subclass that overrides forward.
    """
    kind = next(kind for kind in _FORMS if isinstance(layer, kind))
    check_forward(layer, kind)
    if isinstance(layer, QATLinear) and layer.recipe.is_ternary_linear:
        _check_codes(found, layer.recipe)
        ternary = _ternary(layer, found)
        ternary.dtype = layer.weight.dtype
        return ternary.train(layer.training)
    return _FORMS[kind](layer, found)


def _ternary(layer: QATLinear, found: Codes) -> TernaryLinear:
    recipe, bias = layer.recipe, layer.bias
    if not found.codes.is_meta:
        return TernaryLinear.from_codes(
            found.codes,
            found.scale,
            bias,
            granularity=recipe.granularity,
            group_size=recipe.group_size,
        )
    ternary = TernaryLinear(
        layer.in_features,
        layer.out_features,
        bias is not None,
        "meta",
        granularity=recipe.granularity,
        group_size=recipe.group_size,
    )
    if bias is not None:
        ternary.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return ternary
