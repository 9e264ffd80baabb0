"""The cost of the int8 backward in loss: int8_backward.csv.

    python docs/results/int8_backward.py                        # 15 to 30 minutes on one core
    python docs/results/int8_backward.py configs/15m.toml       # the same study of another config
    python docs/results/int8_backward.py table | plot           # from the CSV that was written

Gradients that are rounded to int8 at random are right on average but noisier. For each seed the
config is trained with model.int8_backward = none, input and both, for STEPS steps, with the same
initial weights and the same tokens in the same order. Training amplifies the last bits of a sum, so
a fourth run shows which differences mean nothing: "none" with micro-batches of one sequence, which
changes only the order of sums. Runs are kept in runs/int8_backward and not trained again.
"""

import csv
import io
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from bitnet.durable import write_atomic

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = "configs/quickstart.toml"
SHAPE = {"model.depth": 3, "model.n_layers": 3}
"""Of the quickstart model until 2026-11-30, of which the CSV is."""
REORDERED = "none, micro_batch 1"
VARIANTS = {
    "none": {"model.int8_backward": "none"},
    REORDERED: {"model.int8_backward": "none", "train.micro_batch": 1},
    "input": {"model.int8_backward": "input"},
    "both": {"model.int8_backward": "both"},
}
SEEDS = (0, 1, 2)
STEPS, EVERY = 200, 5
LAST = 50
"""Steps at the end whose mean loss the table shows."""

Row = dict[str, str]


def csv_of(config: str) -> Path:
    """Where a config's rows go."""
    name = "" if config == CONFIG else f"_{Path(config).stem}"
    return Path(__file__).parent / f"int8_backward{name}.csv"


def train(config: str, variant: str, seed: int) -> list[Row]:
    """Run train.py to its end (at once if it has ended); its losses."""
    name = variant.replace(", ", "-").replace(" ", "")
    run = ROOT / "runs" / "int8_backward" / f"{Path(config).stem}-{name}-{seed}"
    options = VARIANTS[variant] | {
        "run.dir": run.parent,
        "run.name": run.name,
        "run.seed": seed,
        "train.steps": STEPS,
        "train.tokens": 0,
        "train.threads": 1,
        "log.every": EVERY,
        "log.wandb": "disabled",
        "eval.every": STEPS,
        "eval.sample_tokens": 0,
    }
    if config == CONFIG:
        options |= SHAPE
    words = [f"{key}={value}" for key, value in options.items()]
    command = [sys.executable, "train.py", config, *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    common = {
        "commit": commit,
        "torch": torch.__version__,
        "config": config,
        "seed": str(seed),
        "variant": variant,
    }
    return [
        common | {"step": str(line["step"]), "loss": f"{line['loss']:.6f}"}
        for line in lines
        if "loss" in line
    ]


def run(config: str) -> None:
    """All runs, one after the other; the CSV is written after each."""
    rows: list[Row] = []
    for seed in SEEDS:
        for variant in VARIANTS:
            rows += train(config, variant, seed)
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_atomic(csv_of(config), text.getvalue().encode())
            print(f"{config}, {variant}, seed {seed}: {rows[-1]['loss']}", flush=True)


def curve(rows: list[Row], variant: str, seed: str) -> dict[int, float]:
    """Step -> loss."""
    mine = [row for row in rows if (row["variant"], row["seed"]) == (variant, seed)]
    return {int(row["step"]): float(row["loss"]) for row in mine}


def read(path: Path) -> list[Row]:
    """The rows."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(path: Path | None = None) -> str:
    """The mean loss over the last steps of each seed, and its distance to "none"."""
    rows = read(path or csv_of(CONFIG))
    seeds = sorted({row["seed"] for row in rows})
    steps = max(int(row["step"]) for row in rows)
    lines = [
        "| int8_backward | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---" * (len(seeds) + 1) + "|",
    ]
    base: dict[str, float] = {}
    for variant in VARIANTS:
        cells = []
        for seed in seeds:
            losses = curve(rows, variant, seed)
            mean = statistics.mean(loss for step, loss in losses.items() if step > steps - LAST)
            base.setdefault(seed, mean)
            cells.append(
                f"{mean:.4f}" + (f" ({mean - base[seed]:+.4f})" if variant != "none" else "")
            )
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: Path) -> Path:
    """The curves, and below them their distances to "none"; one line per seed."""
    from matplotlib import pyplot

    rows = read(path)
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for i, variant in enumerate(VARIANTS):
        for j, seed in enumerate(sorted({row["seed"] for row in rows})):
            losses, base = curve(rows, variant, seed), curve(rows, "none", seed)
            style = {
                "color": f"C{i}",
                "lw": 1.0,
                "alpha": 0.8,
                "label": variant if j == 0 else None,
            }
            top.plot(list(losses), list(losses.values()), **style)
            if i:
                bottom.plot(list(losses), [losses[step] - base[step] for step in losses], **style)
    top.set_ylabel("training loss, nats a token")
    bottom.set_ylabel("minus that of none")
    bottom.set_xlabel("step")
    bottom.axhline(0, color="0.6", lw=0.8)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=120, metadata={"Software": ""})
    return out


def main() -> None:
    """Run all, or draw from the CSV."""
    words = sys.argv[1:]
    verbs = [word for word in words if word in ("table", "plot")]
    config = next((word for word in words if word.endswith(".toml")), CONFIG)
    if not verbs:
        run(config)
    if "plot" in verbs or not verbs:
        print(plot(csv_of(config)))
    if "table" in verbs or not verbs:
        print(table(csv_of(config)))


if __name__ == "__main__":
    main()
