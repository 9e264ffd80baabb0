"""Quantization-aware training (QAT) and its baselines: from full precision to true integers.

    from bitnet.qat import Recipe, calibrate, convert, prepare

    prepare(model, Recipe(weights="int", bits=4))     layers that quantize in their forward
    ...train...
    convert(model)                                    layers that hold integers

docs/qat.md is the guide. The PTQ baselines are in ptq.py, gptq.py, awq.py and smoothquant.py.
"""

from bitnet.qat.prepare import (
    bitlinear_twin,
    calibrate,
    convert,
    fold_batch_norm,
    prepare,
    size_report,
)
from bitnet.qat.recipe import Recipe

__all__ = [
    "Recipe",
    "bitlinear_twin",
    "calibrate",
    "convert",
    "fold_batch_norm",
    "prepare",
    "size_report",
]
