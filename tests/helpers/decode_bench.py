"""A model of 24 columns for the tests of bitnet bench decode. Not a test module."""

import csv
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bitnet.bench import decode as bench_decode
from bitnet.bench.decode_table import Outcome
from bitnet.bench.decode_worker import Job, Turn
from bitnet.bench.rows import Figures
from bitnet.model import ModelConfig

Bitnet = Callable[..., tuple[int, str, str]]
TINY: dict[str, Any] = {
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "d_ff": 37,
    "vocab_size": 61,
}
RUN = ("--size", "tiny", "--contender", "ours-auto", "--new", "5", "--prompt", "9")


def tiny(**fields: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, "max_seq_len": 32, **fields}).resolve()


def job(contender: str, config: ModelConfig | None = None, **fields: Any) -> Job:
    shape = dataclasses.asdict(config or tiny())
    return Job(
        contender, shape, **{"folder": "", "seed": 0, "device": "cpu", "threads": 1, **fields}
    )


@pytest.fixture
def bench(bitnet: Bitnet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bitnet:
    """Runs ``bitnet bench decode --out tmp_path/decode.csv ...`` on a model of 24 columns."""
    monkeypatch.setitem(bench_decode.SIZES, "tiny", TINY)
    out = tmp_path / "decode.csv"
    return partial(bitnet, "bench", "decode", "--device", "cpu", "--out", out)


def read(path: Path) -> list[Figures]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def turns(*pairs: tuple[float, float]) -> list[Turn]:
    return [Turn(first, rest, None, [[1, 2, 3], [4, 5, 6]]) for first, rest in pairs]


def outcome(made: list[Turn], joules: float | None = None) -> Outcome:
    return Outcome(made, {"weights": 10, "head": 3, "embedding": 4, "cache": 5}, 99, joules, 9)
