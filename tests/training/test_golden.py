"""Golden losses: 50 steps of a small model, kept as text, for the ternary model and its baseline.

A change of the maths that no other test knows of shows here. After one that is meant to be:

    PYTHONPATH=. .venv/bin/python tests/training/test_golden.py > tests/training/golden_losses.txt

All is in fp64, from weights that are drawn as integers, with RoPE's angles in fp64. Another CPU
sums in another order, which moves a value by 1e-15. The quantizers round to fp32 (gamma after a
mean in fp64) and exact sums follow. A value would have to lie within 1e-15 of a border to be
rounded to the other side, so the losses are the same to 1e-8 under every instruction set. Each of
the mutants below moves them by 1e-3 and more. Rounding of exact halves is no mutant to be seen
here; test_reference has them.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

import bitnet.model
import bitnet.quant
from bitnet.model import ModelConfig, Transformer
from bitnet.training.distributed import World
from bitnet.training.optim import OptimConfig, build_optimizer
from bitnet.training.step import split, train_step
from tests.helpers.double import rotary64

GOLDEN = Path(__file__).with_name("golden_losses.txt")
STEPS, VOCABULARY, SEQ_LEN = 50, 96, 33
Linear = Literal["ternary", "fp"]
LINEARS: tuple[Linear, ...] = ("ternary", "fp")


def batches() -> list[Tensor]:
    """``[8, SEQ_LEN + 1]`` a step: each token is a fixed map of the one before, or in one of four
    cases a random one. Integer arithmetic of one seed: the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS, 8, SEQ_LEN + 1)
    tokens = torch.randint(VOCABULARY, shape, generator=generator)
    surprise = torch.randint(4, shape, generator=generator) == 0
    for t in range(SEQ_LEN):
        known = (tokens[..., t] * 5 + 7) % VOCABULARY
        tokens[..., t + 1] = torch.where(surprise[..., t + 1], tokens[..., t + 1], known)
    return list(tokens)


def train(linear: Linear, steps: int = STEPS) -> list[float]:
    """The loss of each step, of the first ``steps`` of a run of STEPS."""
    shape = {"d_model": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96}
    model = Transformer(
        ModelConfig(linear=linear, vocab_size=VOCABULARY, max_seq_len=SEQ_LEN, **shape)
    )
    model.double()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                integers = torch.randint(-1024, 1025, parameter.shape, generator=draw)
                parameter.copy_(integers.double() * (0.035 / 1024))
    config = OptimConfig(lr=4e-3)
    optimizers = build_optimizer(model, config)
    losses = []
    for step, tokens in enumerate(batches()[:steps]):
        batch = split(tokens[:, :-1], tokens[:, 1:], 4)
        here = nullcontext(), World(torch.device("cpu"))
        losses.append(train_step(model, optimizers, batch, step, STEPS, config, *here).loss)
    return losses


def golden() -> dict[str, list[float]]:
    rows = [line.split() for line in GOLDEN.read_text().splitlines() if line[0] != "#"]
    return {
        name: [float(loss) for loss in column]
        for name, column in zip(LINEARS, zip(*rows, strict=True), strict=True)
    }


CLOSE_STEPS, CLOSE = 5, 1e-8


@pytest.fixture(autouse=True)
def angles_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitnet.model, "rotary", rotary64)


def test_the_full_precision_twin() -> None:
    assert train("fp") == pytest.approx(golden()["fp"], abs=CLOSE, rel=0)


def test_the_ternary_model() -> None:
    losses, expected = train("ternary"), golden()["ternary"]
    assert losses == pytest.approx(expected, abs=CLOSE, rel=0)
    assert expected[-1] < expected[0] - 1


def alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold of 0.51 gamma for the weights."""
    plain = bitnet.quant.absmean_ternary
    monkeypatch.setattr(bitnet.quant, "absmean_ternary", lambda *args: plain(*args, alpha=0.51))


def steps_of_128(monkeypatch: pytest.MonkeyPatch) -> None:
    """s_x = max|x| / 128."""

    def absmax_int8(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        scale = x.abs().amax(-1) / 128
        return (x / scale.unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8), scale

    monkeypatch.setattr(bitnet.quant, "absmax_int8", absmax_int8)


def no_gamma_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """dx = dy @ codes."""
    monkeypatch.setattr(
        bitnet.quant, "input_gradient", lambda dy, codes, *_: dy @ codes.to(dy.dtype)
    )


def gamma_backward_one_percent_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """dx = 1.01 dy @ W_hat."""
    plain = bitnet.quant.input_gradient
    monkeypatch.setattr(bitnet.quant, "input_gradient", lambda *args: 1.01 * plain(*args))


@pytest.mark.parametrize(
    "mutate", [alpha, steps_of_128, no_gamma_backward, gamma_backward_one_percent_off]
)
def test_a_change_of_the_maths_shows(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    pairs = zip(train("ternary", CLOSE_STEPS), golden()["ternary"], strict=False)
    assert max(abs(a - b) for a, b in pairs) > 1e-3


if __name__ == "__main__":
    bitnet.model.rotary = rotary64
    print(
        "# Losses of tests/training/test_golden.py, which says how to make them anew and how close "
        "they"
    )
    print(f"# must be. Columns: {', '.join(LINEARS)}; a row a step.")
    for row in zip(*(train(linear) for linear in LINEARS), strict=True):
        print("  ".join(f"{loss:.9f}" for loss in row))
