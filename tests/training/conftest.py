"""A small run of train.py: its text, its config, and training it in this process."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.config import load_config
from bitnet.data.prepare import prepare
from bitnet.training.distributed import World
from tests.helpers.fake_wandb import FakeWandb
from tests.helpers.shared import Shared
from tests.helpers.training_script import Run, read_metrics, train

WORDS = [*"aeiou", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "quietly"]


CONFIG = """
[model]
d_model = 32
n_layers = 2
n_heads = 2
d_ff = 64
[data]
path = "{texts}/prepared"
sources = ["{texts}/texts.jsonl"]
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


@pytest.fixture(scope="session")
def config_file(shared: Shared) -> Path:
    """A model of a few thousand parameters whose data are prepared."""

    def make(folder: Path) -> None:
        (folder / "texts.jsonl").write_text(word_salad())
        (folder / "tiny.toml").write_text(CONFIG.format(texts=folder))
        prepare(load_config([folder / "tiny.toml"]).data, progress=False)

    return shared("small-run", make) / "tiny.toml"


@pytest.fixture(scope="session")
def texts(config_file: Path) -> Path:
    """The folder of the texts; they are prepared in prepared/."""
    return config_file.parent


def word_salad() -> str:
    """300 documents of seeded words as JSON lines."""
    generator = random.Random(0)
    rows = []
    for _ in range(300):
        words = [generator.choice(WORDS) for _ in range(generator.randint(5, 60))]
        rows.append(json.dumps({"text": " ".join(words) + "."}))
    return "\n".join(rows)


@pytest.fixture
def run(config_file: Path, tmp_path: Path) -> Run:
    """Trains in this process, in the test's folder; returns the lines of metrics."""

    def run(*overrides: str) -> list[dict[str, Any]]:
        config = load_config([config_file], [f"run.dir={tmp_path}", *overrides]).resolve()
        with train.locked(config.run_dir):
            train.train(config, "the command", World(torch.device("cpu")))
        return read_metrics(config.run_dir)

    return run


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWandb:
    """A wandb that talks to nobody, and no key for it."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return fake
