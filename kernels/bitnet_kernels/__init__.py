"""Ternary kernels: packed weights, int8 activations, exact int32 products.

Importing this package touches neither Triton nor a device; an operator imports a kernel's file when
that kernel first runs. The package depends on torch alone and never on ``bitnet``.
"""

import bitnet_kernels.ops.training  # noqa: F401  (registers its operators)
from bitnet_kernels.dispatch import KERNELS
from bitnet_kernels.ops.decode import decode_attention, rope_append
from bitnet_kernels.ops.int8 import int8_linear, int8_matmul
from bitnet_kernels.ops.quantize import (
    add_rmsnorm_quant,
    quant,
    relu2_mul_rmsnorm_quant,
    rmsnorm_quant,
)
from bitnet_kernels.ops.ternary import quantized_linear, ternary_linear, ternary_matmul
from bitnet_kernels.packing import (
    bit_planes,
    pack_base3,
    pack_ternary,
    unpack_base3,
    unpack_ternary,
)

__all__ = [
    "KERNELS",
    "add_rmsnorm_quant",
    "bit_planes",
    "decode_attention",
    "int8_linear",
    "int8_matmul",
    "pack_base3",
    "pack_ternary",
    "quant",
    "quantized_linear",
    "relu2_mul_rmsnorm_quant",
    "rmsnorm_quant",
    "rope_append",
    "ternary_linear",
    "ternary_matmul",
    "unpack_base3",
    "unpack_ternary",
]
