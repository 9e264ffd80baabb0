"""A model of a few thousand weights for the tests of bitnet bench train. Not a test module."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bitnet.bench.rows import Figures
from bitnet.bench.rows import read as read_rows
from bitnet.bench.train_rows import COLUMNS
from bitnet.cli import bench_train as cli_bench_train

Bitnet = Callable[..., tuple[int, str, str]]
TINY = """
[model]
depth = 1
d_model = 40
n_heads = 2
[data]
vocab_size = 261
seq_len = 12
[optim]
lr = 0.01
warmup_steps = 1
lr_schedule = "constant"
[train]
batch_tokens = 144
micro_batch = 4
steps = 100
"""


def read(path: Path) -> list[Figures]:
    return read_rows(path, COLUMNS)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def bitnet(bitnet: Bitnet, monkeypatch: pytest.MonkeyPatch) -> Bitnet:
    """Runs ``bitnet bench train ...`` on the CPU, with a peak of 1 TFLOP/s instead of a measured
    one; returns exit code, stdout and stderr."""
    monkeypatch.setattr(cli_bench_train, "peak_flops", lambda device, dtype: (1e12, "by hand"))
    return partial(bitnet, "bench", "train", "--device", "cpu", "--threads", "1")


def variants(*names: str) -> list[str]:
    """The options that name these variants."""
    return [word for name in names for word in ("--variant", name)]
