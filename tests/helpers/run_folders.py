"""Folders of runs that nobody trained. Not a test module."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from bitnet.config import RunConfig, load_config, to_toml

LAYERS = [f"layers.{block}.{name}_proj" for block in range(2) for name in ("self_attn.q", "mlp.up")]


def write_run(folder: Path, rows: list[dict[str, Any]], *overrides: str, name: str = "") -> Path:
    """The folder, with the config.toml of a small run of 100 steps and these lines of metrics.

    Arguments:
        name: the run's name, if it differs from the folder's, which no config of ours allows.
    """
    settings = [
        *("model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.d_ff=64"),
        *("data.seq_len=32", "data.vocab_size=320", "train.batch_tokens=64", "train.micro_batch=2"),
        *("train.steps=100", "log.telemetry_every=5", *overrides),
    ]
    folder.mkdir(parents=True)
    config = load_config([], settings).resolve()
    config = dataclasses.replace(config, run=RunConfig(name=name or folder.name))
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def loss_rows(steps: range, best: float) -> list[dict[str, Any]]:
    """Training and validation losses that fall to ``best`` bits per byte at the last step."""
    rows: list[dict[str, Any]] = []
    for step in steps:
        value = best + (steps[-1] - step) / 50
        rows.append({"step": step, "loss": 3 * value, "lr": 1e-3, "tokens_per_second": 1000.0})
        text = f"sample of step {step}"
        rows.append({"step": step, "val_loss": 2 * value, "val_bpb": value, "sample": text})
    return rows


def ternary_row(step: int, zeros: float, flip_rate: float | None) -> dict[str, Any]:
    """A reading of the weights in which every layer has the model's values."""
    numbers = {"zeros": zeros} | ({} if flip_rate is None else {"flip_rate": flip_rate})
    of_model = {f"ternary/{name}": value for name, value in numbers.items()}
    return {"step": step, **of_model, "ternary/layers": dict.fromkeys(LAYERS, numbers)}
