"""Quantization-aware training (QAT) and its baselines: from full precision to true integers.

    from bitnet.qat import Recipe, calibrate, convert, prepare

    prepare(model, Recipe(weights="int", bits=4))     layers that quantize in their forward
    ...train...
    convert(model)                                    layers that hold integers

docs/qat.md is the guide. The PTQ baselines are in ptq.py, gptq.py, awq.py and smoothquant.py.
"""

from bitnet.qat.batch_norm import fold_batch_norm
from bitnet.qat.prepare import calibrate, convert, prepare
from bitnet.qat.recipe import Recipe
from bitnet.qat.sizes import size_report

__all__ = [
    "Recipe",
    "calibrate",
    "convert",
    "fold_batch_norm",
    "prepare",
    "size_report",
]
