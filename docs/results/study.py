"""Runs of a study, each a row of a CSV: train.py trains, the packed model is evaluated.

scaling.py, ablations.py and equal_bytes.py name the runs and call :func:`main`; they share the
data, the held-out text and the options. A run whose row is there is not run again, and one that was
cut off resumes from its checkpoint. ``command`` of a row trains the same model again, after any of
the scripts has prepared data/study; with one thread it gives the same bits on the same machine.

Held-out documents that share a document or a run of 200 characters with the training text are left
out (overlap.py); the others are evaluated in ``WINDOWS`` windows, spread evenly.
"""

import argparse
import csv
import io
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from overlap import search
from torch import Tensor

from bitnet.config import load_config
from bitnet.data.loader import INDEX, TokenDataset
from bitnet.data.prepare import prepare
from bitnet.data.sources import documents
from bitnet.data.tokenizer import Tokenizer
from bitnet.data.windows import text_windows
from bitnet.durable import sha256, write_atomic
from bitnet.evaluate import EvalResult, evaluate_windows
from bitnet.export.folder import load_model
from bitnet.linear import pack
from bitnet.model import Transformer, as_transformer
from bitnet.qat.layers import QATLinear
from bitnet.qat.prepare import convert
from bitnet_kernels.bench import machine
from bitnet_kernels.cpu import native

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).resolve().parent
CONFIG = "docs/results/study.toml"
BATCH = 2048
"""Tokens of a step in study.toml."""
WINDOWS = 1024
"""Held-out windows that a model is evaluated on: 262,144 tokens."""
WEIGHTS = {"0.1M": 106_496, "0.4M": 393_216, "1.2M": 1_179_648, "2.8M": 2_818_048}
"""Weights in the matrices of each size; its name."""
SHAPE = {
    "0.1M": ("model.depth=1", "model.n_layers=2"),
    "0.4M": ("model.depth=2",),
    "1.2M": ("model.depth=3",),
    "2.8M": ("model.depth=4",),
}
COLUMNS = (
    "name",
    "arm",
    "size",
    "weights",
    "tokens",
    "tokens_per_weight",
    "lr",
    "seed",
    "loss",
    "bits_per_byte",
    "stored_bytes",
    "held_out_tokens",
    "seconds",
    "commit",
    "torch",
    "python",
    "cpu",
    "kernels",
    "threads",
    "data",
    "command",
)
Row = dict[str, str]
Rows = Sequence[Row]


@dataclass(frozen=True)
class Job:
    """A run to be made."""

    name: str
    """its folder, and the key of its row"""
    arm: str
    size: str
    tokens: int
    lr: float
    """``optim.muon_lr``; AdamW's where that trains all"""
    seed: int
    options: tuple[str, ...] = ()
    """more keys of the config"""
    script: str = "train.py"
    steps_as: float = 1.0
    """time of a step over that of the ternary model"""
    after: tuple[str, ...] = ()
    """runs whose models it needs"""
    rate_key: str = "optim.muon_lr"

    def words(self) -> list[str]:
        """The arguments of its command, after ``python``."""
        steps = math.ceil(self.tokens / BATCH)
        own = [*SHAPE[self.size], *self.options, f"{self.rate_key}={self.lr:g}"]
        run = ["run.dir=runs/study", f"run.name={self.name}", f"run.seed={self.seed}"]
        return [self.script, CONFIG, *own, f"train.steps={steps}", *run]


def tokens_for(size: str, per_weight: float) -> int:
    """Tokens of a run with so many per weight, in whole steps."""
    return math.ceil(WEIGHTS[size] * per_weight / BATCH) * BATCH


Jobs = Callable[[Rows], list[Job]]
"""The runs of a study in the order of their importance, as far as the rows so far decide them."""


def read(path: Path) -> list[Row]:
    """The rows of a study; none before the first."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Rows, columns: Sequence[str] = COLUMNS) -> None:
    """Replace a CSV as a whole."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def link_data(text: str) -> list[str]:
    """Link the training text as data/study/train...; options for another kind of file than that of
    study.toml."""
    suffixes = "".join(Path(text).suffixes[-2:])
    link = ROOT / "data" / "study" / f"train{suffixes}"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(Path(text).resolve())
    if link.resolve() != Path(text).resolve():
        raise SystemExit(f"{link.parent}: belongs to {link.resolve()}; remove it for another text")
    name = f"data/study/{link.name}"
    return [] if suffixes == ".jsonl.xz" else [f'data.sources=["{name}"]']


def held_out(train: str, text: str) -> list[str]:
    """The held-out documents that share nothing with the training text. The search is made once:
    its findings go to overlap.csv, the documents to data/study."""
    key = f"{sha256(Path(train))[:8]}-{sha256(Path(text))[:8]}"
    kept = ROOT / "data" / "study" / f"held_out-{key}.json"
    if not kept.exists():
        texts = list(documents([text], "text"))
        report = search(documents([train], "text"), texts)
        rows = [
            {
                "held_out_document": str(i),
                "characters": str(len(body)),
                "same_document": str(int(i in report.same_documents)),
                "shared_runs": str(sum(found.held_out == i for found in report.shared)),
                "longest_run": str(
                    max((found.length for found in report.shared if found.held_out == i), default=0)
                ),
                "begins": next(
                    (
                        found.text
                        for found in sorted(report.shared, key=lambda f: -f.length)
                        if found.held_out == i
                    ),
                    "",
                ),
                "evaluated": str(int(i not in report.affected())),
                "training_documents": str(report.train_documents),
                "training_characters": str(report.train_characters),
            }
            for i, body in enumerate(texts)
        ]
        write(RESULTS / "overlap.csv", rows, list(rows[0]))
        clean = [body for i, body in enumerate(texts) if i not in report.affected()]
        write_atomic(kept, json.dumps(clean).encode())
    clean_texts: list[str] = json.loads(kept.read_bytes())
    return clean_texts


def windows_of(texts: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> list[Tensor]:
    """``WINDOWS`` windows spread over all documents, int64 ``[seq_len + 1]`` each."""
    every = [window for text in texts for window in text_windows(tokenizer, text, seq_len)]
    whole = [window for window in every if len(window) == seq_len + 1]
    count = min(WINDOWS, len(whole))
    return [whole[i * len(whole) // count] for i in range(count)]


def integers(model: Transformer) -> Transformer:
    """The model in the form that is stored: packed, or converted from QAT."""
    if model.config.linear == "ternary":
        return as_transformer(pack(model))
    if any(isinstance(module, QATLinear) for module in model.modules()):
        return as_transformer(convert(model))
    return model


def stored_bytes(model: Transformer, bits: float) -> int:
    """Bytes of all parameters: matrices at ``bits`` per weight, the rest at 16, and an fp32 scale
    for each row of a matrix of integers (ternary: one for each matrix)."""
    counts = model.config.num_parameters()
    matrices = counts["matrices"]
    total = matrices * bits / 8 + 2 * (counts["total"] - matrices)
    shapes = [p.shape for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    if bits < 2:
        total += 4 * 7 * model.config.n_layers
    elif bits < 16:
        total += 4 * sum(shape[0] for shape in shapes)
    return round(total)


class Study:
    """The rows, and the processes that make them."""

    def __init__(self, path: Path, jobs: Jobs, arguments: argparse.Namespace) -> None:
        os.chdir(ROOT)
        torch.set_num_threads(1)
        self.path, self.jobs, self.arguments = path, jobs, arguments
        self.end = time.monotonic() + 3600 * arguments.hours
        self.lock, self.running = threading.Lock(), set[str]()
        self.failed = set[str]()
        self.options = link_data(arguments.data)
        config = load_config([CONFIG], self.options)
        folder = prepare(config.data)
        self.data = sha256(folder / INDEX)[:12]
        tokenizer = TokenDataset(folder, "train").tokenizer()
        texts = held_out(arguments.data, arguments.held_out)
        self.windows = windows_of(texts, tokenizer, config.data.seq_len)
        self.count_bytes = tokenizer.count_bytes
        self.commit = commit()

    def rows(self) -> list[Row]:
        """The rows so far."""
        return read(self.path)

    def evaluate(self, model: Transformer) -> EvalResult:
        """Evaluate on the held-out windows."""
        return evaluate_windows(model, self.windows, self.count_bytes)

    def next(self) -> Job | None:
        """Take the first job that is not done, is not running and fits into the time."""
        rows = self.rows()
        done = {row["name"] for row in rows}
        for job in self.jobs(rows):
            if job.name in done or job.name in self.running or job.name in self.failed:
                continue
            if not done.issuperset(job.after) or not self.wanted(job) or not self.fits(job, rows):
                continue
            self.running.add(job.name)
            return job
        return None

    def wanted(self, job: Job) -> bool:
        """Whether ``--only`` names it."""
        only = self.arguments.only
        return not only or any(word in job.name for word in only)

    def fits(self, job: Job, rows: Rows) -> bool:
        """Whether it ends in time, as fast as runs of its size have been."""
        same = [
            float(row["seconds"]) / float(row["tokens"]) for row in rows if row["size"] == job.size
        ]
        seconds = job.tokens * statistics.median(same) * job.steps_as if same else 0.0
        return time.monotonic() + seconds < self.end

    def work(self) -> None:
        """One of the processes: a job after the other."""
        while time.monotonic() < self.end:
            with self.lock:
                job = self.next()
                others = bool(self.running)
            if job is not None:
                try:
                    self.make(job)
                except Exception:
                    self.failed.add(job.name)
                    print(f"{job.name}: {traceback.format_exc()}", flush=True)
                finally:
                    with self.lock:
                        self.running.discard(job.name)
            elif others:  # its row may decide what comes next
                time.sleep(1)
            else:
                return

    def make(self, job: Job) -> None:
        """Train, evaluate, add the row."""
        words = [*job.words(), *self.options]
        folder = ROOT / "runs" / "study" / job.name
        code = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": code}
        output = ROOT / "runs" / f"{job.name}.txt"
        output.parent.mkdir(exist_ok=True)
        with output.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                stdout=file,
                stderr=file,
                env=environment,
                text=True,
            )
            try:
                process.wait(max(0.0, self.end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.terminate()  # it saves a checkpoint
                process.wait()
        if process.returncode:
            self.failed.add(job.name)
            print(f"{job.name}: ended with {process.returncode}; see {output}", flush=True)
            return
        model = integers(load_model(folder / "model"))
        result = self.evaluate(model)
        row = self.row(job, load_model(folder / "model"), result, words, steps_of(folder))
        with self.lock:
            write(self.path, [*self.rows(), row])
        print(f"{job.name}: {result.loss:.4f} nats per token", flush=True)

    def row(
        self, job: Job, model: Transformer, result: EvalResult, words: list[str], steps: list[Row]
    ) -> Row:
        """The row of a run."""
        tokens_per_second = statistics.median(float(s["tokens_per_second"]) for s in steps)
        weights = model.config.num_parameters()["matrices"]
        tokens = int(steps[-1]["tokens"])
        values = {
            "name": job.name,
            "arm": job.arm,
            "size": job.size,
            "weights": weights,
            "tokens": tokens,
            "tokens_per_weight": f"{tokens / weights:.3g}",
            "lr": f"{job.lr:g}",
            "seed": job.seed,
            "loss": repr(result.loss),
            "bits_per_byte": repr(result.bits_per_byte),
            "stored_bytes": stored_bytes(model, bits_of(model)),
            "held_out_tokens": result.tokens,
            "seconds": round(tokens / tokens_per_second),
            "commit": self.commit,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu": machine.describe(torch.device("cpu")).name,
            "kernels": native.used() or "torch",  # which round sums in different orders
            "threads": 1,
            "data": self.data,
            "command": shlex.join(["python", *words]),
        }
        return {key: str(value) for key, value in values.items()}


def bits_of(model: Transformer) -> float:
    """Bits per weight in files."""
    if model.config.linear == "ternary":
        return 1.6
    recipes = [m.recipe for m in model.modules() if isinstance(m, QATLinear)]
    if not recipes:
        return 16
    return 1.6 if recipes[0].weight_bits < 2 else recipes[0].weight_bits


def steps_of(folder: Path) -> list[Row]:
    """The lines of metrics.jsonl that tell of steps."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def commit() -> str:
    """The commit of the code that trains, marked where files of it differ."""
    own = ("study.py", "study.toml", "overlap.py", "bf16_latents.py")
    paths = ["bitnet", "kernels", "train.py", *(f"docs/results/{name}" for name in own)]
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *paths], check=False)
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")


def main(path: Path, jobs: Jobs, about: str) -> None:
    """The command line of a study's script: make the rows that the CSV lacks."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--data", required=True, help="training text: .jsonl (.gz .xz .zst), .txt")
    parser.add_argument("--held-out", required=True, help="text to evaluate on")
    parser.add_argument("--hours", type=float, default=8.0, help="stop after so many hours")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--only", nargs="*", help="only runs whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="list the runs that remain; run none")
    arguments = parser.parse_args()
    if arguments.list:
        rows = read(path)
        done = {row["name"] for row in rows}
        for job in jobs(rows):
            if job.name not in done:
                print(job.name, f"{job.tokens:,} tokens")
        return
    study = Study(path, jobs, arguments)
    threads = [threading.Thread(target=study.work) for _ in range(arguments.processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = [
        job.name for job in jobs(study.rows()) if job.name not in {r["name"] for r in study.rows()}
    ]
    print(f"{len(left)} runs remain" + (f": {' '.join(left)}" if left else ""))
    if study.failed:
        raise SystemExit(f"failed: {' '.join(sorted(study.failed))}")
