"""Where post-training quantization (PTQ) ends and quantization-aware training (QAT) begins.

    python docs/results/boundary.py                        # under an hour on 2 cores
    python docs/results/boundary.py configs/60m.toml       # the same study of another config
    python docs/results/boundary.py table | plot           # from the CSV that was written

For each seed: train the config's full-precision model, quantize it by each PTQ method at each bit
width, and train it on for a fifth of its steps: once per bit width with fake quantization, and once
in full precision. That *control* sees the same tokens in the same order at the same learning rates.
PTQ is compared with the model it started from and QAT with the control, so the gain of more
training does not count as a gain of QAT. Everything is measured on the whole validation split, QAT
models in their converted, integer form.

Each row is written as soon as it is measured; the same command continues where it was stopped.
"""

import csv
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from bitnet.config import Config, load_config
from bitnet.data.loader import Loader, TokenDataset, sequential_windows
from bitnet.data.prepare import prepare
from bitnet.durable import write_atomic
from bitnet.evaluate import EvalResult, evaluate_windows
from bitnet.export.folder import load_model
from bitnet.linear import pack
from bitnet.model import Transformer, as_transformer
from bitnet.qat.awq import awq
from bitnet.qat.gptq import gptq
from bitnet.qat.prepare import convert
from bitnet.qat.ptq import round_to_nearest
from bitnet.qat.recipe import Recipe
from bitnet.qat.smoothquant import smoothquant

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = (0, 1, 2)
EXTRA = 0.2
"""Steps of QAT and of the control, as a share of the pretraining's."""
CALIBRATION = 64
"""Windows of the training split that PTQ sees."""
BITS = (8.0, 6.0, 4.0, 3.0, 2.0, 1.58)

Ptq = Callable[[Transformer, Recipe, Tensor], Transformer]
PTQ: dict[str, tuple[str, Ptq]] = {
    "RTN": ("none", lambda model, recipe, _: round_to_nearest(model, recipe)),
    "GPTQ": ("none", gptq),
    "AWQ": ("none", awq),
    "SmoothQuant": ("absmax", smoothquant),
}
"""Method -> (its activations, function). The first three are weight-only, as published."""


def ptq_recipe(bits: float, activations: str) -> Recipe:
    """One scale per row, for every method."""
    if bits < 2:
        return Recipe(weights="absmean", activations=activations)  # type: ignore[arg-type]
    return Recipe(weights="int", bits=int(bits), activations=activations)  # type: ignore[arg-type]


def qat_options(bits: float) -> list[str]:
    """[quant] of QAT: LSQ to 3 bits and SEQ at 2 (what ParetoQ found best), absmean below; int8
    activations always."""
    if bits < 2:
        return ["quant.weights=absmean"]
    if bits == 2:
        return ["quant.weights=seq"]
    return ["quant.weights=lsq", f"quant.bits={int(bits)}"]


class Study:
    """The runs of one config, and the CSV that they fill."""

    def __init__(self, config_path: str) -> None:
        self.path = config_path
        self.config = load_config([config_path], ["model.linear=fp"]).resolve()
        self.csv = csv_of(config_path)
        self.rows = read(self.csv) if self.csv.exists() else []
        self.lock = Lock()
        os.chdir(ROOT)  # where train.py's relative paths begin
        self.data = prepare(self.config.data)

    def done(self, seed: int, bits: float, method: str) -> bool:
        """Whether the CSV has this row."""
        key = (str(seed), f"{bits:g}", method)
        return any((row["seed"], row["bits"], row["method"]) == key for row in self.rows)

    def evaluate(self, model: Transformer) -> EvalResult:
        """Evaluate a model on the whole validation split."""
        val = TokenDataset(self.data, "val")
        windows = sequential_windows(val, self.config.data.seq_len)
        return evaluate_windows(model, windows, val.tokenizer().count_bytes)

    def calibration(self, seed: int) -> Tensor:
        """Windows of the training split, int64 ``[CALIBRATION, T]``."""
        train = TokenDataset(self.data, "train")
        loader = Loader(train, self.config.data.seq_len, CALIBRATION, 1000 + seed)
        return loader.batch(0)[0].long()

    def model(self, name: str) -> Path:
        """The folder of a run's model."""
        return ROOT / "runs" / Path(self.path).stem / name.replace(".", "_") / "model"

    def train(self, name: str, seed: int, *options: str) -> Path:
        """Run train.py to its end (at once if it has ended); the folder of its model."""
        run = self.model(name).parent
        common = [f"run.dir={run.parent}", f"run.name={run.name}", f"run.seed={seed}"]
        settings = ["model.linear=fp", "log.wandb=disabled", "train.threads=1"]
        command = [sys.executable, "train.py", self.path, *settings, *common, *options]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        return self.model(name)

    def add(self, seed: int, bits: float, method: str, result: EvalResult, begun: float) -> None:
        """Append a row to the CSV."""
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        row = {
            "commit": commit,
            "torch": torch.__version__,
            "config": self.path,
            "seed": str(seed),
            "bits": f"{bits:g}",
            "method": method,
            "loss": f"{result.loss:.6f}",
            "perplexity": f"{result.perplexity:.4f}",
            "bits_per_byte": f"{result.bits_per_byte:.6f}",
            "seconds": f"{time.perf_counter() - begun:.1f}",
        }
        with self.lock:
            self.rows.append(row)
            text = io.StringIO()
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            write_atomic(self.csv, text.getvalue().encode())
        print(json.dumps(row), flush=True)


def pretrain(study: Study, seed: int) -> None:
    """The full-precision model of a seed."""
    begun = time.perf_counter()
    folder = study.train(f"fp-{seed}", seed)
    if not study.done(seed, 32, "FP"):
        study.add(seed, 32, "FP", study.evaluate(load_model(folder)), begun)


def post_train(study: Study, seed: int, bits: float, method: str) -> None:
    """One PTQ method at one width."""
    begun = time.perf_counter()
    activations, quantize = PTQ[method]
    full = load_model(study.model(f"fp-{seed}"))
    quantized = quantize(full, ptq_recipe(bits, activations), study.calibration(seed))
    study.add(seed, bits, method, study.evaluate(quantized), begun)


def train_on(study: Study, seed: int, bits: float, method: str) -> None:
    """QAT at one width, or the control: other tokens than the pretraining's, the same for all."""
    begun = time.perf_counter()
    quant = qat_options(bits) if method == "QAT" else []
    options = [f"train.init_from={study.model(f'fp-{seed}')}", *extra_steps(study.config), *quant]
    trained = load_model(study.train(f"{method}{bits:g}-{seed}", seed + 100, *options))
    model = integers(trained) if method == "QAT" else trained
    study.add(seed, bits, method, study.evaluate(model), begun)


def run(study: Study) -> None:
    """Run everything, two jobs at a time with one thread each: a second gains little here."""
    torch.set_num_threads(1)
    jobs = [(post_train, bits, method) for bits in BITS for method in PTQ]
    jobs += [(train_on, 32.0, "control"), *((train_on, bits, "QAT") for bits in BITS)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda seed: pretrain(study, seed), SEEDS))
        futures = [
            pool.submit(job, study, seed, bits, method)
            for seed in SEEDS
            for job, bits, method in jobs
            if not study.done(seed, bits, method)
        ]
        for future in futures:
            future.result()


def integers(model: Transformer) -> Transformer:
    """The model as ``bitnet pack`` would write it."""
    return as_transformer(pack(model) if model.config.linear == "ternary" else convert(model))


def extra_steps(config: Config) -> list[str]:
    """Options of QAT and the control: a fifth of the steps, a tenth of the learning rates."""
    steps = max(1, round(EXTRA * config.train.steps))
    return [
        f"train.steps={steps}",
        "train.tokens=0",
        f"optim.lr={config.optim.lr * QAT_LR:.3g}",
        f"optim.muon_lr={config.optim.muon_lr * QAT_LR:.3g}",
        f"eval.every={steps}",
    ]


QAT_LR = 0.1
"""Learning rates of QAT and control over the pretraining's: 10 times lower."""


def csv_of(config_path: str) -> Path:
    """Where a config's rows go."""
    return Path(__file__).parent / f"{Path(config_path).stem}.csv"


def read(path: Path) -> list[dict[str, str]]:
    """The rows."""
    with path.open() as file:
        return list(csv.DictReader(file))


def growth(rows: list[dict[str, str]], method: str, bits: float) -> list[float]:
    """Perplexity over that of the full-precision model (PTQ) or the control (QAT) of the same
    seed, for each seed: 1.02 is 2% more."""
    base = "control" if method == "QAT" else "FP"
    full = {row["seed"]: float(row["perplexity"]) for row in rows if row["method"] == base}
    return sorted(
        float(row["perplexity"]) / full[row["seed"]]
        for row in rows
        if row["method"] == method and row["bits"] == f"{bits:g}" and row["seed"] in full
    )


def table(path: Path | None = None) -> str:
    """Growth of perplexity in percent: the median of the seeds and their range."""
    rows = read(path or csv_of("boundary"))
    methods = [*PTQ, "QAT"]
    lines = ["| bits | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for bits in BITS:
        cells = []
        for method in methods:
            values = growth(rows, method, bits)
            if not values:
                cells.append("")
                continue
            low, middle, high = (
                percent(v) for v in (values[0], statistics.median(values), values[-1])
            )
            cells.append(f"{middle} ({low} to {high})")
        lines.append(f"| {bits:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(ratio: float) -> str:
    """1.02 -> "+2.0%"; large ratios as multiples."""
    return f"x{ratio:,.0f}" if ratio >= 10 else f"{100 * (ratio - 1):+.1f}%"


def plot(path: Path) -> Path:
    """Growth of perplexity against bits, medians with the range of the seeds."""
    from matplotlib import pyplot

    rows = read(path)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    places = list(range(len(BITS)))
    for method in (*PTQ, "QAT"):
        values = [[100 * (v - 1) for v in growth(rows, method, bits)] for bits in BITS]
        middle = [statistics.median(v) for v in values]
        (line,) = axes.plot(
            places, middle, marker="o", lw=2.5 if method == "QAT" else 1.2, label=method
        )
        axes.fill_between(
            places,
            [v[0] for v in values],
            [v[-1] for v in values],
            color=line.get_color(),
            alpha=0.15,
        )
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_xticks(places, [f"{bits:g}" for bits in BITS])
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("perplexity over full precision, %")
    axes.axhline(0, color="0.6", lw=0.8)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=150, metadata={"Software": ""})
    return out


def main() -> None:
    """Run all, or draw from the CSV."""
    words = sys.argv[1:]
    verbs = [word for word in words if word in ("table", "plot")]
    config = next((word for word in words if word.endswith(".toml")), "configs/boundary.toml")
    if not verbs:
        run(Study(config))
    if "plot" in verbs or not verbs:
        print(plot(csv_of(config)))
    if "table" in verbs or not verbs:
        print(table(csv_of(config)))


if __name__ == "__main__":
    main()
