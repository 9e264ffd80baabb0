"""Does a row's command give the same bits again? rerun.csv.

    python docs/results/rerun.py --data TRAIN --held-out TEXT  # a row of each arm

The rows are picked at random, by a seed, among those that a CPU of this machine's name made, one of
each arm. Each is trained again in another folder by its own command, packed and evaluated. The loss
has to be the same to the last bit; another CPU may round in another order. rerun.csv keeps what
other CPUs found.
"""

import argparse
import os
import random
import shlex
import subprocess
import sys

import torch
from study import RESULTS, ROOT, Job, Row, Rows, Study, integers, read, write

from bitnet.export.folder import load_model
from bitnet_kernels.bench import machine

CSV = RESULTS / "scaling.csv"
SEED = 20261130
"""Of the choice."""
COLUMNS = ("name", "loss", "loss_again", "same_bits", "commit", "commit_again", "cpu_again")


def picked(rows: Rows, cpu: str) -> list[Row]:
    """A row of each arm, made by a CPU of this name."""
    own = sorted((row for row in rows if row["cpu"] == cpu), key=lambda row: row["name"])
    arms = sorted({row["arm"] for row in own})
    if not arms:
        raise SystemExit(f"{CSV.name}: has no row made by {cpu}")
    choose = random.Random(SEED)
    return [choose.choice([row for row in own if row["arm"] == arm]) for arm in arms]


def no_jobs(_: Rows) -> list[Job]:
    """A study that trains nothing by itself."""
    return []


def main() -> None:
    """Train both again, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--held-out", required=True)
    arguments = parser.parse_args()
    study = Study(CSV, no_jobs, argparse.Namespace(**vars(arguments), hours=8.0, only=None))
    cpu = machine.describe(torch.device("cpu")).name
    again = RESULTS / "rerun.csv"
    for row in picked(read(CSV), cpu):
        name = f"again-{row['name']}"
        words = [
            f"run.name={name}" if word.startswith("run.name=") else word
            for word in shlex.split(row["command"])[1:]
        ]
        code = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": code}
        subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True)
        model = load_model(ROOT / "runs" / "study" / name / "model")
        loss = repr(study.evaluate(integers(model)).loss)
        found = {
            "name": row["name"],
            "loss": row["loss"],
            "loss_again": loss,
            "same_bits": "yes" if loss == row["loss"] else "no",
            "commit": row["commit"],
            "commit_again": study.commit,
            "cpu_again": cpu,
        }
        others = [
            one for one in read(again) if (one["name"], one["cpu_again"]) != (row["name"], cpu)
        ]
        write(again, [*others, found], COLUMNS)
        print(*found.values())


if __name__ == "__main__":
    main()
