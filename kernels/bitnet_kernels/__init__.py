"""Ternary kernels: packed weights, int8 activations, exact int32 products.

Importing this package touches neither Triton nor a device; :mod:`bitnet_kernels.ops` imports a
kernel's file when that kernel first runs. It depends on torch alone and never on ``bitnet``.
"""

from bitnet_kernels.ops import KERNELS, quant, ternary_linear, ternary_matmul
from bitnet_kernels.packing import pack_base3, pack_ternary, unpack_base3, unpack_ternary

__all__ = [
    "KERNELS",
    "pack_base3",
    "pack_ternary",
    "quant",
    "ternary_linear",
    "ternary_matmul",
    "unpack_base3",
    "unpack_ternary",
]
