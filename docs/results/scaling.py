"""What ternary costs on real text, by model size and tokens: scaling.csv, scaling.png.

    python docs/results/scaling.py --data TRAIN --held-out TEXT --hours 2     # the missing rows

Ternary and full-precision models of the same shape see the same tokens in the same order. The
learning rate of the matrices (Muon) is swept for each arm at 0.4M weights and 5 tokens per weight,
one seed, by factors of 2, and on past an end that is the best. Rule for other sizes: the same rate,
since the spectral norm of Muon's update does not depend on the width. AdamW's rate, for embedding
and norms, is the library's (`bitnet.config.default_lr`), 4e-3 at all these sizes, for both arms.
"""

from pathlib import Path

from study import Job, Row, Rows, main, tokens_for

CSV = Path(__file__).resolve().parent / "scaling.csv"
ARMS = {"ternary": (), "fp": ("model.linear=fp",)}
SWEEP = {"ternary": (0.02, 0.04, 0.01), "fp": (0.01, 0.02, 0.005)}
"""Rates of the matrices that are tried first."""
FIRST = ("0.4M", 5.0)
"""Where the rates are swept."""
GRID = (
    # size, tokens per weight, seeds
    ("0.4M", 5.0, (1, 2)),
    ("0.1M", 5.0, (0, 1, 2)),
    ("0.1M", 20.0, (0, 1, 2)),
    ("1.2M", 5.0, (0,)),
    ("0.4M", 20.0, (0,)),
    ("0.1M", 80.0, (0,)),
    ("0.4M", 20.0, (1, 2)),
    ("1.2M", 5.0, (1, 2)),
    ("0.1M", 80.0, (1, 2)),
    ("2.8M", 5.0, (0,)),
    ("0.4M", 80.0, (0,)),
    ("1.2M", 20.0, (0, 1, 2)),
    ("0.4M", 80.0, (1, 2)),
    ("2.8M", 20.0, (0,)),
    ("1.2M", 80.0, (0, 1, 2)),
    ("2.8M", 80.0, (0,)),
)
"""What is trained after the sweep, the most telling for its time first."""


def job(arm: str, size: str, per_weight: float, lr: float, seed: int) -> Job:
    """One run."""
    name = f"{arm}-{size}-{per_weight:g}-{lr:g}-{seed}"
    return Job(name, arm, size, tokens_for(size, per_weight), lr, seed, ARMS[arm])


def swept(rows: Rows, arm: str) -> dict[float, float]:
    """Rate -> loss of the runs of the sweep, by rate."""
    size, per_weight = FIRST
    tokens = str(tokens_for(size, per_weight))
    return {
        float(row["lr"]): float(row["loss"])
        for row in sorted(rows, key=lambda row: float(row["lr"]))
        if (row["arm"], row["size"], row["tokens"], row["seed"]) == (arm, size, tokens, "0")
    }


def to_sweep(rows: Rows, arm: str) -> list[float]:
    """The rates that the sweep of an arm still lacks: the first three, then what lies beyond an end
    that is the best."""
    found = swept(rows, arm)
    if missing := [lr for lr in SWEEP[arm] if lr not in found]:
        return missing
    best, ends = best_lr(rows, arm), (min(found), max(found))
    return [best / 2] if best == ends[0] else [best * 2] if best == ends[1] else []


def best_lr(rows: Rows, arm: str) -> float:
    """The rate with the lowest loss of the sweep."""
    found = swept(rows, arm)
    return min(found, key=lambda lr: found[lr])


def jobs(rows: Rows) -> list[Job]:
    """The sweep, and once an arm's is complete, its part of the grid."""
    size, per_weight = FIRST
    left = {arm: to_sweep(rows, arm) for arm in ARMS}
    wanted = [job(arm, size, per_weight, lr, 0) for arm in ARMS for lr in left[arm]]
    for size, per_weight, seeds in GRID:
        for seed in seeds:
            for arm in ARMS:
                if not left[arm]:
                    wanted.append(job(arm, size, per_weight, best_lr(rows, arm), seed))
    return wanted


def of_grid(rows: Rows) -> list[Row]:
    """The rows at the chosen rates."""
    return [row for row in rows if float(row["lr"]) == best_lr(rows, row["arm"])]


if __name__ == "__main__":
    main(CSV, jobs, __doc__ or "")
