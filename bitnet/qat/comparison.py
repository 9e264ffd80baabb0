"""Compare PTQ methods and bit widths: one row per result, one verdict per bit width.

rtn          rounds to nearest
gptq         compensates errors (arXiv 2210.17323)
awq          rescales channels by search (arXiv 2306.00978)
smoothquant  rescales channels by a formula (arXiv 2211.10438)
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from bitnet.evaluate import EvalResult
from bitnet.linear import TernaryLinear
from bitnet.model import Transformer
from bitnet.qat.awq import awq
from bitnet.qat.gptq import gptq
from bitnet.qat.integer import IntLayer
from bitnet.qat.ptq import OnLayer, round_to_nearest
from bitnet.qat.recipe import Recipe
from bitnet.qat.smoothquant import smoothquant

FULL = "full precision"
CALIBRATED: dict[str, Callable[..., Transformer]] = {
    "gptq": gptq,
    "awq": awq,
    "smoothquant": smoothquant,
}
"""Methods that need text to calibrate on."""
METHODS = ("rtn", *CALIBRATED)
BITS = ("8", "6", "4", "3", "2", "1.58")
"""Bits per weight; 1.58: ternary with BitNet's scale, mean|W|."""
ENOUGH, WORTH = 0.01, 0.10
"""Growth of perplexity: below the first, PTQ is enough; from the second on, QAT is needed."""


class Row(NamedTuple):
    """One result: a line of the table and of the CSV file."""

    method: str
    bits: float
    loss: float
    perplexity: float
    growth: float
    """perplexity divided by full precision's, minus 1"""
    bits_per_byte: float
    matrix_megabytes: float
    """size of the layers' matrices with their scales"""
    seconds: float
    """time to quantize"""
    tokens: int
    """tokens predicted in the evaluation"""
    recipe: str


def recipe_of(bits: str, group_size: int, activation_bits: int) -> Recipe:
    """The recipe of a bit width.

    Arguments:
        bits: one of BITS.
        group_size: columns per weight scale; 0: one scale per row.
        activation_bits: 4 to 8, one scale per token; 0: weights only.
    """
    return Recipe(
        weights="absmean" if bits == "1.58" else "int",
        bits=4 if bits == "1.58" else int(bits),
        granularity="group" if group_size else "row",
        group_size=group_size or 128,
        activations="absmax" if activation_bits else "none",
        activation_bits=activation_bits or 8,
    )


def quantize(
    method: str, model: Transformer, recipe: Recipe, calibration: Tensor, on_layer: OnLayer
) -> Transformer:
    """Quantize a copy of the model by one of METHODS.

    Arguments:
        calibration: int64 ``[S, T]``, for all methods except rtn. on_layer: called with the numbers
            of done and of all layers.
    """
    if method == "rtn":
        return round_to_nearest(model, recipe)
    return CALIBRATED[method](model, recipe, calibration, on_layer=on_layer)


def row_of(
    method: str,
    recipe: Recipe,
    model: Transformer,
    result: EvalResult,
    seconds: float,
    full: Row | None,
) -> Row:
    """The row of an evaluated model; ``full``: the row of full precision, None for that row."""
    before = full.perplexity if full else result.perplexity
    return Row(
        method=method,
        bits=recipe.weight_bits,
        loss=result.loss,
        perplexity=result.perplexity,
        growth=result.perplexity / before - 1,
        bits_per_byte=result.bits_per_byte,
        matrix_megabytes=matrix_bytes(model) / 1e6,
        seconds=seconds,
        tokens=result.tokens,
        recipe=str(recipe),
    )


def matrix_bytes(model: Transformer) -> int:
    """Bytes of the layers' matrices in memory, including scales and zero points."""
    total = 0
    for block in model.layers:
        for name in model.config.matrices():
            layer = block.get_submodule(name)
            if isinstance(layer, nn.Linear):
                total += layer.weight.nbytes
            elif isinstance(layer, TernaryLinear):
                total += layer.packed.nbytes + layer.scale.nbytes
            elif isinstance(layer, IntLayer):
                total += layer.weight_bytes
    return total


def grown(growth: float) -> str:
    """``+2.5%``, or ``x31`` for growth of 900% and more."""
    return f"{growth:+.2%}" if growth < 9 else f"x{growth + 1:.3g}"


def verdicts(rows: Iterable[Row]) -> Iterator[str]:
    """One line per bit width, judged by its best method."""
    quantized = [row for row in rows if row.method != FULL]
    for bits in dict.fromkeys(row.bits for row in quantized):
        of_width = [row for row in quantized if row.bits == bits]
        best = min(of_width, key=lambda row: (math.isnan(row.growth), row.growth))
        if best.growth < ENOUGH:
            verdict = "PTQ is enough"
        elif best.growth < WORTH:
            verdict = "QAT is likely worth it"
        else:  # NaN too
            verdict = "QAT needed"
        yield f"{bits:g} bits: {verdict} ({best.method}: perplexity {grown(best.growth)})"
