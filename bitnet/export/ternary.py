"""Convert ternary matrices between our model and files of other formats.

Out: a layer's codes and its one scale, from a BitLinear (as its forward computes them) or a
TernaryLinear (as stored). In: a matrix of dense floats. Its signs are the codes, and its only
absolute value is the scale. N rows, K columns.
"""

import torch
from torch import Tensor, nn

from bitnet.linear import BitLinear, TernaryLinear
from bitnet.schema import UserError


def codes_and_scale(layer: nn.Module, where: str) -> tuple[Tensor, Tensor]:
    """Codes int8 ``[N, K]`` and the scale fp32 ``[]`` of a ternary layer, on the CPU.

    Raises:
        UserError: the layer is not ternary, or has a bias, a norm or more than one scale; or the
            scale is not a finite number above 0. The error begins with ``where``.
    """
    if not isinstance(layer, BitLinear | TernaryLinear):
        raise UserError(f"{where}: expected a ternary layer")
    if layer.bias is not None or layer.rms_norm is not None:
        what = "a bias" if layer.bias is not None else "a norm inside"
        raise UserError(f"{where}: has {what}, which the format does not have")
    if isinstance(layer, BitLinear):
        codes, scale = layer.quantize()
    else:
        codes, scale = layer.codes(), layer.scale
    if scale.dim():
        raise UserError(f"{where}: has {scale.numel()} scales; the format has one per matrix")
    if not (bool(scale.isfinite()) and float(scale) > 0):
        raise UserError(f"{where}: has the scale {float(scale)}")
    return codes.cpu(), scale.cpu()


def ternary_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 ``[N, K]`` and the scale fp32 ``[]`` of a matrix of -s, 0 and s (of zeros alone:
    s = 1). Raises ValueError for other values."""
    size = values.abs()
    scale = size.max() if values.numel() and bool(size.any()) else values.new_ones(())
    if bool(((size != 0) & (size != scale)).any()):
        raise ValueError("its weights are not all -s, 0 or s: it is no ternary matrix")
    return values.sign().to(torch.int8), scale
