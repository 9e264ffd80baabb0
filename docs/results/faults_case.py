"""The runs that faults.py strikes: their config, what they come to without a fault, and mounts."""

import json
import os
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from faults_job import ROOT, Job

EVERY, FIRST, WHOLE = 10, 27, 240
"""Steps between checkpoints; steps that every run has behind it when its fault comes; steps of the
runs that nothing strikes."""
Losses = dict[int, tuple[float, float]]
"""Step -> loss and norm of the gradient."""
CONFIG = """
[model]
d_model = 32
n_layers = 2
n_heads = 2
d_ff = 64
[data]
path = "{folder}/prepared"
sources = ["{folder}/texts.txt"]
vocab_size = 320
val_fraction = 0.1
seq_len = 32
[optim]
lr = 3e-3
lr_schedule = "constant"
warmup_steps = 1
wd_schedule = "constant"
[train]
device = "cpu"
batch_tokens = 256
micro_batch = 4
[eval]
every = 1000
max_tokens = 320
sample_tokens = 0
[checkpoint]
every = 10
[log]
every = 1
wandb = "disabled"
[run]
name = "run"
"""


class Case(NamedTuple):
    """A run of two processes, in a folder of its own."""

    shared: Path
    """Where config and data are."""
    folder: Path
    strategy: str
    dice: random.Random

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def command(self, *options: str) -> list[str]:
        """train.py's arguments."""
        strategy = f"distributed.strategy={self.strategy}"
        return [str(self.shared / "run.toml"), f"run.dir={self.folder}", strategy, *options]

    def start(self, *options: str) -> Job:
        """The run under torchrun."""
        return Job(self.folder / "out.txt").agent(["--nproc-per-node=2"], self.command(*options))

    def losses(self) -> Losses:
        """Of whole lines."""
        lines = (self.run / "metrics.jsonl").read_text().split("\n")[:-1]
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}

    def step(self) -> int:
        """The newest step that metrics.jsonl has."""
        return max(self.losses())

    def newest(self) -> Path:
        """The newest checkpoint that has its name."""
        return max((self.run / "checkpoints").glob("step_*"))

    def resumed(self, job: Job) -> int:
        """The step where a running job went on."""
        job.until(lambda: job.resumed() is not None, "a new start")
        return job.resumed() or 0

    def wait(self, job: Job, step: int) -> None:
        """Until a running job has come to a step."""
        job.until(lambda: self.step() >= step, f"step {step}")


def prepare(shared: Path) -> dict[str, Losses]:
    """The data; for each strategy the run as it is after :data:`FIRST` steps, and the losses of one
    that nothing strikes. What is there already stays."""
    dice = random.Random(0)
    letters = ("aeiou", "lmnrst", "aeiou")
    words = ["".join(dice.choice(kind) for kind in letters) for _ in range(60)]
    texts = "\n\n".join(" ".join(dice.choices(words, k=40)) for _ in range(300))
    (shared / "texts.txt").write_text(texts)
    (shared / "run.toml").write_text(CONFIG.format(folder=shared))
    expected = {}
    for strategy in ("ddp", "fsdp"):
        for name, steps in ((strategy, FIRST), (f"{strategy}-whole", WHOLE)):
            case = Case(shared, shared / name, strategy, random.Random(0))
            if not (case.run / "model").exists():
                case.folder.mkdir(exist_ok=True)
                job = case.start(f"train.steps={steps}")
                job.finish()
                if "done: the model is in" not in job.text():
                    raise RuntimeError(job.text())
        expected[strategy] = case.losses()
    if not (shared / "whole.bin").exists():
        shutil.copyfile(shared / "prepared/train_00000.bin", shared / "whole.bin")
    return expected


def git(*words: str) -> str:
    """The output of git."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def machine() -> dict[str, str]:
    """What a row says of the code (the last commit that changed it) and of the machine."""
    code = ["--", "bitnet", "kernels", "train.py"]
    commit = git("log", "-1", "--format=%h", *code) + "-dirty" * bool(git("diff", "HEAD", *code))
    return {
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}",
        "command": "python docs/results/faults.py",
    }


def mount(*args: str | Path) -> None:
    """Mount in this process's namespace."""
    subprocess.run(["mount", *map(str, args)], check=True)


def own_mounts() -> None:
    """Start this script again in a mount namespace of its own, unless it has one."""
    if os.environ.get("FAULTS_MOUNTS"):
        return
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", "--mount", *user, sys.executable, *sys.argv]
    os.execvpe("unshare", command, os.environ | {"FAULTS_MOUNTS": "1"})
