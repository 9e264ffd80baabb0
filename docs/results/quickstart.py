"""The quickstart model and its full-precision baseline on the same tokens: quickstart.csv.

    python docs/results/quickstart.py          # about 20 minutes on 2 cores; writes the CSV
    python docs/results/overview.py            # draws the README's picture from it

Three seeds of each take turns, so that a machine that slows down slows both. A seed decides the
initial weights and the order of the data: both models of a seed see the same tokens in the same
order. Quality is that of the whole validation split; the ternary model is packed first.
"""

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bitnet.data.loader import TokenDataset, sequential_windows
from bitnet.evaluate import evaluate_windows
from bitnet.export.folder import load, save_model, sizes
from bitnet.linear import pack
from bitnet.model import Transformer

ROOT = Path(__file__).parent.parent.parent
CSV = Path(__file__).parent / "quickstart.csv"
CONFIGS = {"ternary": "configs/quickstart.toml", "fp": "configs/fp/quickstart.toml"}
SEEDS = (0, 1, 2)


def measure(kind: str, seed: int, folder: Path) -> dict[str, str | int | float]:
    """Train one run in ``folder``; return its row of the CSV."""
    command = [sys.executable, "train.py", CONFIGS[kind], f"run.dir={folder}", "run.name=run"]
    options = [f"run.seed={seed}", "log.wandb=disabled"]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    model, tokenizer = load(run / "model")
    if kind == "ternary":
        packed = pack(model)
        assert isinstance(packed, Transformer)
        model = packed
    stored = sizes(save_model(folder / "stored", model, tokenizer))
    validation = TokenDataset(ROOT / "data/python-stdlib", "val")
    windows = sequential_windows(validation, model.config.max_seq_len)
    result = evaluate_windows(model, windows, tokenizer.count_bytes)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "commit": commit,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "config": CONFIGS[kind],
        "linear": kind,
        "seed": seed,
        "tokens": steps[-1]["tokens"],
        "bits_per_byte": result.bits_per_byte,
        "loss": result.loss,
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steps),
        "peak_memory_bytes": steps[-1]["peak_memory_bytes"],
        "fp32_bytes": stored.fp32["total"],
        "stored_bytes": stored.stored["total"],
        "fp32_matrix_bytes": stored.fp32["matrices"],
        "stored_matrix_bytes": stored.stored["matrices"],
    }


def main() -> None:
    """Run all."""
    rows = []
    for seed in SEEDS:
        for kind in CONFIGS:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(kind, seed, Path(folder)))
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
