"""A small run of train.py: its text, its config, and training it in this process."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bitnet.config import load_config
from bitnet.data.prepare import prepare
from tests.helpers.training_script import Run, read_metrics, train

WORDS = [*"aeiou", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "quietly"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of seeded word salad."""
    folder = tmp_path_factory.mktemp("texts")
    generator = random.Random(0)
    rows = []
    for _ in range(300):
        words = [generator.choice(WORDS) for _ in range(generator.randint(5, 60))]
        rows.append(json.dumps({"text": " ".join(words) + "."}))
    (folder / "texts.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="session")
def config_file(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few thousand parameters whose data are prepared."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(
        f"""
[model]
d_model = 32
n_layers = 2
n_heads = 2
d_ff = 64
[data]
path = "{texts / "prepared"}"
sources = ["{texts / "texts.jsonl"}"]
vocab_size = 320
val_fraction = 0.1
seq_len = 32
[optim]
lr = 3e-3
[train]
device = "cpu"
batch_tokens = 256
micro_batch = 4
steps = 40
[eval]
every = 10
sample_tokens = 8
[checkpoint]
every = 7
[log]
every = 1
telemetry_every = 6
wandb = "disabled"
"""
    )
    prepare(load_config([path]).data, progress=False)
    return path


@pytest.fixture
def run(config_file: Path, tmp_path: Path) -> Run:
    """Trains in this process, in a folder of the test's own; returns the lines of metrics."""

    def run(*overrides: str) -> list[dict[str, Any]]:
        config = load_config([config_file], [f"run.dir={tmp_path}", *overrides]).resolve()
        with train.locked(config.run_dir):
            train.train(config, "the command")
        return read_metrics(config.run_dir)

    return run
