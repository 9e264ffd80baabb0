"""Training beside busy processes, before and after: busy.csv.

    python docs/results/busy.py --before DIR         # at most 8 minutes; writes the CSV
    python docs/results/busy.py --before DIR --quick # does it run? Prints only
    python docs/results/busy.py table                # prints the table from the CSV

DIR is a checkout of an older commit. The quickstart model trains in one process per variant, with
that variant's code and settings. They take turns: idle, beside one and beside two processes
that compute. Ratios are of one turn. The machine has to be idle otherwise.
"""

import csv
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CSV = Path(__file__).parent / "busy.csv"
LOADS = (0, 1, 2)
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
LIMIT = 480.0
"""Seconds of all rounds: another one begins only if it fits, by those before it."""
STEP = """
import sys, time
start = None
try:
    from bitnet.cli.shell import start
except ImportError:
    pass  # an older commit
if start is not None:
    start()
import torch
from bitnet.linear import weights_quantized
from bitnet.model import ModelConfig, Transformer
from bitnet.training.optim import OptimConfig, build_optimizer, clip_gradients
threads, seconds = int(sys.argv[1]), float(sys.argv[2])
if threads:
    torch.set_num_threads(threads)
torch.manual_seed(0)
model = Transformer(ModelConfig(depth=3, vocab_size=4096, max_seq_len=256))
optim = OptimConfig(optimizer="muon", lr=4e-3, muon_lr=0.02, muon_ns_steps=3)
optimizers = build_optimizer(model, optim)
steps, begin = -1, 0.0
while steps < 1 or time.perf_counter() - begin < seconds:
    tokens = torch.randint(4096, (4, 257))
    with weights_quantized(model):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    clip_gradients(model.parameters(), 1.0)
    optimizers.step()
    optimizers.zero_grad()
    steps += 1
    if steps == 0:  # the first one warms up
        begin = time.perf_counter()
print(1000 * (time.perf_counter() - begin) / steps)
"""


def step_ms(root: Path, threads: int, seconds: float) -> float:
    """Mean milliseconds of a step, of the code in ``root``."""
    unset = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment["PYTHONPATH"] = os.pathsep.join((str(root), str(root / "kernels")))
    command = [sys.executable, "-c", STEP, str(threads), str(seconds)]
    child = subprocess.run(
        command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(child.stdout)


def measure(before: Path, rounds: int, seconds: float) -> list[dict[str, str | int | float]]:
    """Rows: one for each load, round and variant."""
    variants = {"before": (before, 0), "after": (ROOT, 0), "after, one thread": (ROOT, 1)}
    commits = {
        root: subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
        ).stdout.strip()
        for root in (before, ROOT)
    }
    rows: list[dict[str, str | int | float]] = []
    begin = time.monotonic()
    for turn in range(rounds):
        if turn and (time.monotonic() - begin) * (turn + 1) / turn > LIMIT:
            print(f"{turn} rounds, no time for more")
            break
        for load in LOADS:
            others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(load)]
            try:
                for name, (root, threads) in variants.items():
                    row: dict[str, str | int | float] = {
                        "cpu": cpu_name(),
                        "cpus": os.cpu_count() or 1,
                        "round": turn,
                        "busy": load,
                        "variant": name,
                        "commit": commits[root],
                        "ms": round(step_ms(root, threads, seconds), 1),
                        "command": "python docs/results/busy.py --before DIR",
                    }
                    print(row, flush=True)
                    rows.append(row)
            finally:
                for other in others:
                    other.kill()
                    other.wait()
    return rows


def cpu_name() -> str:
    """The CPU's name, without what its maker adds."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return re.sub(r"\((R|TM)\)", "", found[1]) if found else platform.processor()


def table(rows: list[dict[str, str]] | None = None) -> str:
    """Median ms of a step, and the median over rounds of its speed against ``before``; of the CSV
    unless rows are given."""
    if rows is None:
        with CSV.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = [
        "| busy processes | " + " | ".join(f"{name}, ms" for name in variants) + " |",
        "|---" * (1 + len(variants)) + "|",
    ]
    for load in dict.fromkeys(row["busy"] for row in rows):
        of = {
            name: [float(r["ms"]) for r in rows if (r["busy"], r["variant"]) == (load, name)]
            for name in variants
        }
        cells = []
        for name in variants:
            pairs = zip(of["before"], of[name], strict=True)
            gain = statistics.median(old / new for old, new in pairs)
            cells.append(f"{statistics.median(of[name]):,.0f} ({gain:.2f}x)")
        lines.append(f"| {load} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the table."""
    arguments = sys.argv[1:]
    quick = "--quick" in arguments
    if arguments != ["table"]:
        if "--before" not in arguments[:-1]:
            sys.exit(f"expected --before DIR, or table; {__doc__}")
        before = Path(arguments[arguments.index("--before") + 1]).resolve()
        rows = measure(before, *((1, 0.1) if quick else (3, 8.0)))
        if quick:
            print(table([{key: str(value) for key, value in row.items()} for row in rows]))
            return
        with CSV.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(table())


if __name__ == "__main__":
    main()
