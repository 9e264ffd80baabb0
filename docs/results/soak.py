"""Many steps of a toy model, watched from outside: soak.csv.

    python docs/results/soak.py                 # 20,000 steps, minutes on one core; adds a row
    python docs/results/soak.py 4000 2          # 4,000 steps of two processes under torchrun
    python docs/results/soak.py table           # prints the table from the CSV

Once per half second the resident memory, open files and threads of each process are read from
/proc. Growth is what the last fifth of the samples has over the second fifth (medians; the first
fifth warms up). A checkpoint is written every 100 steps, an evaluation runs every 500. In the end
metrics.jsonl must hold every step once, in order.
"""

import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent.parent
CSV = Path(__file__).parent / "soak.csv"
CONFIG = """
[model]
d_model = 32
n_layers = 1
n_heads = 2
d_ff = 64
[data]
path = "{folder}/prepared"
sources = ["{folder}/texts.txt"]
vocab_size = 280
val_fraction = 0.1
seq_len = 32
[train]
device = "cpu"
batch_tokens = 64
micro_batch = 1
steps = {steps}
[eval]
every = 500
max_tokens = 640
sample_tokens = 8
[checkpoint]
every = 100
[log]
every = 1
wandb = "disabled"
[run]
dir = "{folder}"
name = "soak"
"""


class Sample(NamedTuple):
    """One look at a process."""

    rss: float
    """Resident memory in MB."""
    files: int
    threads: int


def look(pid: int) -> Sample | None:
    """A process as it is now; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines())
    if "VmRSS" not in fields:  # a zombie
        return None
    return Sample(int(fields["VmRSS"].split()[0]) / 1024, files, int(fields["Threads"]))


def trainers(pid: int, processes: int) -> list[int]:
    """The processes that train: that one, or under torchrun its children."""
    if processes == 1:
        return [pid]
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def watch(folder: Path, steps: int, processes: int) -> dict[int, list[Sample]]:
    """Train ``steps`` steps in ``folder``/soak; returns the samples of each process by its id, from
    its first step on."""
    dice = random.Random(0)
    words = [f"{dice.choice('aeiou')}{dice.randrange(99)}" for _ in range(5000)]
    (folder / "texts.txt").write_text(
        "\n\n".join(" ".join(dice.choices(words, k=40)) for _ in range(200))
    )
    (folder / "soak.toml").write_text(CONFIG.format(folder=folder, steps=steps))
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(several if processes > 1 else []), str(ROOT / "train.py")]
    metrics, found = folder / "soak" / "metrics.jsonl", dict[int, list[Sample]]()
    with (folder / "out.txt").open("w") as out:
        job = subprocess.Popen(
            [*command, str(folder / "soak.toml")],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            while job.poll() is None:
                time.sleep(0.5)
                for pid in trainers(job.pid, processes) if metrics.exists() else ():
                    if (sample := look(pid)) is not None:
                        found.setdefault(pid, []).append(sample)
        finally:
            job.terminate()
            job.wait()
    if job.returncode:
        raise RuntimeError((folder / "out.txt").read_text())
    return found


def whole(metrics: Path, steps: int) -> bool:
    """Whether the file holds every step once, in order."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))


def fifth(samples: list[Sample], which: int) -> Sample:
    """Medians of a fifth of the samples, the first being 0."""
    part = samples[which * len(samples) // 5 : (which + 1) * len(samples) // 5]
    rss, files, threads = (statistics.median(values) for values in zip(*part, strict=True))
    return Sample(rss, int(files), int(threads))


def measure(steps: int, processes: int, folder: Path) -> list[dict[str, str | int | float]]:
    """A row for each process, by its number of samples and id."""
    begin = time.monotonic()
    found = watch(folder, steps, processes)
    minutes = (time.monotonic() - begin) / 60
    rows: list[dict[str, str | int | float]] = []
    for samples in found.values():
        early, late = fifth(samples, 1), fifth(samples, 4)
        rows.append(
            {
                "steps": steps,
                "processes": processes,
                "process": len(rows),
                "minutes": round(minutes, 1),
                "samples": len(samples),
                "checkpoints": steps // 100,
                "rss_mb": round(early.rss, 1),
                "rss_mb_end": round(late.rss, 1),
                "files": early.files,
                "files_end": late.files,
                "threads": early.threads,
                "threads_end": late.threads,
                "metrics_whole": "yes" if whole(folder / "soak/metrics.jsonl", steps) else "no",
            }
        )
    return rows


def git(*words: str) -> str:
    """The output of git."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def machine() -> dict[str, str | int]:
    """What a row says of the code (the last commit that changed it) and of the machine."""
    code = ["--", "bitnet", "kernels", "train.py"]
    commit = git("log", "-1", "--format=%h", *code) + "-dirty" * bool(git("diff", "HEAD", *code))
    cpus = os.cpu_count() or 1
    return {
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {cpus} CPUs",
    }


def table() -> str:
    """The table of docs/distributed.md, from the CSV."""
    with CSV.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| steps | process | checkpoints | memory, MB | open files | threads | every step once |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        pairs = [f"{row[key]} to {row[f'{key}_end']}" for key in ("rss_mb", "files", "threads")]
        lines.append(
            f"| {int(row['steps']):,} | {int(row['process']) + 1} of {row['processes']} | "
            f"{row['checkpoints']} | {' | '.join(pairs)} | {row['metrics_whole']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and add rows, or print the table."""
    words = sys.argv[1:]
    if words != ["table"]:
        given = [int(word) for word in words]
        steps, processes = (*given, *(20_000, 1)[len(given) :])
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(steps, processes, Path(folder))
        command = " ".join(["python docs/results/soak.py", *words])
        rows = [machine() | row | {"command": command} for row in rows]
        old = []
        if CSV.exists():
            with CSV.open(encoding="utf-8") as file:
                old = list(csv.DictReader(file))
        kept = [row for row in old if row["processes"] != str(processes)]
        with CSV.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *rows])
    print(table())


if __name__ == "__main__":
    main()
