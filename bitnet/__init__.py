"""Ternary (BitNet b1.58) language models: layers, models, and what turns one into the other.

from bitnet import BitLinear, replace_linear, pack, load
"""

from bitnet.export.folder import load
from bitnet.linear import BitLinear, TernaryLinear, pack, replace_linear, weights_quantized
from bitnet.model import Transformer

__all__ = [
    "BitLinear",
    "TernaryLinear",
    "Transformer",
    "load",
    "pack",
    "replace_linear",
    "weights_quantized",
]
