"""Rows and verdicts of comparing PTQ methods."""

import math

from bitnet.model import ModelConfig, Transformer
from bitnet.qat.comparison import Row, grown, matrix_bytes, recipe_of, verdicts
from bitnet.qat.ptq import round_to_nearest
from bitnet.qat.recipe import Recipe


def test_sizes_are_what_the_layers_hold() -> None:
    model = Transformer(ModelConfig(linear="fp", depth=1, vocab_size=32, max_seq_len=8))
    config = model.config
    weights = config.num_parameters()["matrices"]
    rows = sum(n for n, _ in config.matrices().values())
    assert matrix_bytes(model) == 4 * weights
    for bits, exact in (("8", 8), ("6", 6), ("3", 3), ("1.58", 2)):
        quantized = round_to_nearest(model, recipe_of(bits, 0, 8))
        assert matrix_bytes(quantized) == weights * exact // 8 + 4 * rows


def test_recipes_of_the_command_line() -> None:
    assert recipe_of("1.58", 0, 8) == Recipe("absmean", granularity="row")
    assert recipe_of("3", 64, 0) == Recipe(
        "int", bits=3, granularity="group", group_size=64, activations="none"
    )


def row(method: str, bits: float, growth: float) -> Row:
    return Row(method, bits, 0.0, 0.0, growth, 0.0, 0.0, 0.0, 1, "")


def test_verdicts_go_by_the_best_method_and_the_stated_thresholds() -> None:
    rows = [row("full precision", 32, 0)]
    rows += [row("rtn", 8, 0.2), row("gptq", 8, 0.0099), row("awq", 8, math.nan)]
    rows += [row("rtn", 4, 0.01), row("rtn", 3, 0.0999), row("rtn", 2, 0.1)]
    rows += [row("rtn", 1.58, math.inf), row("rtn", 6, math.nan)]
    assert list(verdicts(rows)) == [
        "8 bits: PTQ is enough (gptq: perplexity +0.99%)",
        "4 bits: QAT is likely worth it (rtn: perplexity +1.00%)",
        "3 bits: QAT is likely worth it (rtn: perplexity +9.99%)",
        "2 bits: QAT needed (rtn: perplexity +10.00%)",
        "1.58 bits: QAT needed (rtn: perplexity xinf)",
        "6 bits: QAT needed (rtn: perplexity xnan)",
    ]
    assert grown(-0.001) == "-0.10%"
    assert grown(30.2) == "x31.2"
