"""The quickstart model and its full-precision twin on the same tokens: quickstart_twins.csv.

    python docs/results/compare_twins.py          # about 20 minutes on 2 cores; writes the CSV
    python docs/results/compare_twins.py table    # prints the README's table from the CSV

Three seeds of each, alternating, so that a machine that slows down slows both. A seed decides the
initial weights and the order of the data; the twins of a seed see the same tokens in the same
order. Quality is measured on the whole validation split, of the packed model where there is one.
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
from bitnet.summary import human

ROOT = Path(__file__).parent.parent.parent
CSV = Path(__file__).parent / "quickstart_twins.csv"
CONFIGS = {"ternary": "configs/quickstart.toml", "fp": "configs/fp/quickstart.toml"}
SEEDS = (0, 1, 2)


def measure(kind: str, seed: int, folder: Path) -> dict[str, str | int | float]:
    """Train one run in ``folder`` and measure what it left."""
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


def table() -> str:
    """The README's table, from the CSV: medians over the seeds, and the spread of the quality."""
    with CSV.open() as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| | bits per byte (3 seeds) | tokens/s | peak memory | layers' matrices | whole model |",
        "|---|---|---|---|---|---|",
    ]
    for kind, name in (("fp", "full precision"), ("ternary", "ternary (packed)")):
        runs = [row for row in rows if row["linear"] == kind]

        def median(key: str, runs: list[dict[str, str]] = runs) -> float:
            return statistics.median(float(row[key]) for row in runs)

        quality = sorted(float(row["bits_per_byte"]) for row in runs)
        lines.append(
            f"| {name} | {median('bits_per_byte'):.3f} ({quality[0]:.3f} to {quality[-1]:.3f}) "
            f"| {median('tokens_per_second'):,.0f} | {human(median('peak_memory_bytes'), 'B')} "
            f"| {human(median('stored_matrix_bytes'), 'B')} "
            f"| {human(median('stored_bytes'), 'B')} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all, or print the table."""
    if sys.argv[1:] == ["table"]:
        print(table())
        return
    rows = []
    for seed in SEEDS:
        for kind in CONFIGS:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(kind, seed, Path(folder)))
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(table())


if __name__ == "__main__":
    main()
