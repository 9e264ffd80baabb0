"""The quickstart model and its full-precision baseline on the same tokens: quickstart.csv.

    python docs/results/quickstart.py          # about 30 minutes on 2 idle cores; adds to the CSV
    python docs/results/quickstart.py --threads 1 --seeds 0
    python docs/results/quickstart.py --threads 1 --kinds fp --muon-lr 0.01    # another rate
    python docs/results/overview.py            # draws the README's picture from it

Three seeds of each take turns, so that a machine that slows down slows both. A seed decides the
initial weights and the order of the data: both models of a seed see the same tokens in the same
order. Quality is that of the whole validation split. The ternary model is packed and proved equal
first (``bitnet pack``), and the packed one is evaluated. Each run is written when it is done, and a
run that the CSV has from this CPU is left out, so a command that was cut off goes on. The number of
threads decides the order of sums, and so the last digits. Rows at another rate than the
config's are there to compare rates; the README's figures leave them out.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from bitnet.bench import rows
from bitnet.config import load_config
from bitnet.data.loader import TokenDataset, sequential_windows
from bitnet.evaluate import evaluate_windows
from bitnet.export.folder import load, sizes
from bitnet_kernels.bench import machine

ROOT = Path(__file__).parent.parent.parent
CSV = Path(__file__).parent / "quickstart.csv"
CONFIGS = {"ternary": "configs/quickstart.toml", "fp": "configs/fp/quickstart.toml"}
COLUMNS = (
    *("device", "threads", "linear", "muon_lr", "seed", "tokens", "bits_per_byte", "loss"),
    *("tokens_per_second", "peak_memory_bytes", "fp32_bytes", "stored_bytes"),
    *("fp32_matrix_bytes", "stored_matrix_bytes", "torch", "commit", "date", "command"),
)


def rate_of(kind: str) -> float:
    """The Muon rate of a config."""
    return load_config([ROOT / CONFIGS[kind]]).resolve().optim.muon_lr


def measure(kind: str, rate: float, seed: int, threads: int, folder: Path) -> rows.Figures:
    """Train one run in ``folder``; return its row of the CSV."""
    options = [f"run.seed={seed}", f"train.threads={threads}"]
    if rate != rate_of(kind):
        options.append(f"optim.muon_lr={rate:g}")
    command = ["train.py", CONFIGS[kind], *options]
    places = [f"run.dir={folder}", "run.name=run", "log.wandb=disabled"]
    commit = machine.commit()
    subprocess.run([sys.executable, *command, *places], cwd=ROOT, check=True)
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    model_folder = run / "model"
    if kind == "ternary":
        packing = [sys.executable, "-m", "bitnet", "pack", str(model_folder)]
        subprocess.run(packing, cwd=ROOT, check=True)
        model_folder = run / "model-packed"
    model, tokenizer = load(model_folder)
    stored = sizes(model_folder)
    validation = TokenDataset(ROOT / "data/python-stdlib", "val")
    windows = sequential_windows(validation, model.config.max_seq_len)
    result = evaluate_windows(model, windows, tokenizer.count_bytes)
    return rows.as_figures(
        {
            "device": machine.describe(torch.device("cpu")).name,
            "threads": threads,
            "linear": kind,
            "muon_lr": f"{rate:g}",
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
            "torch": torch.__version__,
            "commit": commit,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": shlex.join(command),
        }
    )


def main() -> None:
    """Run all that the CSV does not have."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=CONFIGS, default=[*CONFIGS])
    parser.add_argument("--muon-lr", type=float, help="instead of the config's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = machine.describe(torch.device("cpu")).name
    for seed in options.seeds:
        for kind in options.kinds:
            rate = options.muon_lr or rate_of(kind)
            key = (device, kind, f"{rate:g}", str(seed))
            done = rows.read(CSV, COLUMNS)
            if any(
                tuple(row[k] for k in ("device", "linear", "muon_lr", "seed")) == key
                for row in done
            ):
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = measure(kind, rate, seed, options.threads, Path(folder))
            rows.write(CSV, [*rows.read(CSV, COLUMNS), row], COLUMNS)


if __name__ == "__main__":
    main()
