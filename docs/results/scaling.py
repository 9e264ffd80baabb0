"""What ternary costs on real text, by model size and tokens: scaling.csv, scaling.png.

    python docs/results/scaling.py --data TRAIN --held-out TEXT --hours 2     # the missing rows
    python docs/results/scaling.py table | plot | fit                         # from the CSV

Ternary and full-precision models of the same shape see the same tokens in the same order. The
learning rate of the matrices (Muon) is swept for each arm at 0.1M weights and 5 tokens per weight,
one seed, by factors of 2, and on past an end that is the best. Other sizes get the same rate, since
the spectral norm of Muon's update does not depend on the width. That fails for full precision at
0.4M weights, where half the rate is better; such sizes are marked (:func:`badly_tuned`). AdamW's
rate, for embedding and norms, is the library's (`bitnet.config.default_lr`), 4e-3 at all these
sizes, for both arms.

``fit`` writes bitnet/scaling.json: the cells, of which `bitnet plan` tells, and from ``LEAST``
cells on a fit of the gap, linear in doublings of the weights N and of the tokens per weight D/N.
Over so small a range a power law is no better founded. The intervals are a bootstrap over seeds:
each cell's mean moves by the pooled spread of its seeds.
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from study import RESULTS, ROOT, WEIGHTS, Job, Row, Rows, main, read, tokens_for

CSV = RESULTS / "scaling.csv"
FIT = ROOT / "bitnet" / "scaling.json"
ARMS = {"ternary": (), "fp": ("model.linear=fp",)}
SWEEP = {"ternary": (0.02, 0.04, 0.01), "fp": (0.01, 0.02, 0.005)}
"""Rates of the matrices that are tried first."""
FIRST = ("0.1M", 5.0)
"""Where the rates are swept."""
CHECKED = ("0.4M", 5.0)
"""Where the rates on both sides of the chosen one are trained too: does the rule hold there?"""
GRID = (
    # size, tokens per weight, seeds
    ("0.1M", 5.0, (1, 2)),
    ("0.1M", 20.0, (0, 1, 2)),
    ("0.4M", 5.0, (0, 1, 2)),
    ("0.1M", 80.0, (0,)),
    ("1.2M", 5.0, (0,)),
    ("0.4M", 20.0, (0, 1, 2)),
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
        if (size, per_weight) == CHECKED:
            for arm in ARMS:
                for factor in (2.0, 0.5) if not left[arm] else ():
                    lr = best_lr(rows, arm) * factor
                    wanted.append(job(arm, size, per_weight, lr, 0))
    return wanted


def badly_tuned(rows: Rows) -> set[str]:
    """The sizes at which an arm does better at another rate than the one carried there: their gaps
    measure the rate as well."""
    first = {(r["arm"], r["size"], r["tokens"]): r for r in of_grid(rows) if r["seed"] == "0"}
    found = set()
    for row in rows:
        chosen = first.get((row["arm"], row["size"], row["tokens"]))
        if chosen and row["seed"] == "0" and float(row["loss"]) < float(chosen["loss"]):
            found.add(row["size"])
    return found


def of_grid(rows: Rows) -> list[Row]:
    """The rows at the chosen rates."""
    return [row for row in rows if float(row["lr"]) == best_lr(rows, row["arm"])]


class Cell(NamedTuple):
    """Both arms at one size and number of tokens, in the seeds that both have."""

    size: str
    weights: int
    per_weight: float
    ternary: list[float]
    """nats per token of each seed"""
    fp: list[float]

    def gaps(self) -> list[float]:
        """Ternary minus full precision, in nats, by seed."""
        return [ternary - fp for ternary, fp in zip(self.ternary, self.fp, strict=True)]


def cells(rows: Rows) -> list[Cell]:
    """The cells of the grid for which both arms have a seed, by size and tokens."""
    losses: dict[tuple[str, int], dict[str, dict[str, Row]]] = {}
    for row in of_grid(rows):
        arms = losses.setdefault((row["size"], int(row["tokens"])), {})
        arms.setdefault(row["arm"], {})[row["seed"]] = row
    found = []
    for (size, tokens), arms in losses.items():
        both = sorted(arms.get("ternary", {}).keys() & arms.get("fp", {}).keys())
        if not both:
            continue
        found.append(
            Cell(
                size,
                WEIGHTS[size],
                tokens / WEIGHTS[size],
                [float(arms["ternary"][seed]["loss"]) for seed in both],
                [float(arms["fp"][seed]["loss"]) for seed in both],
            )
        )
    return sorted(found, key=lambda cell: (cell.weights, cell.per_weight))


AT = (WEIGHTS["0.4M"], 5.0)
"""Where the constant of a fit stands: weights, tokens per weight."""


def design(points: list[Cell]) -> np.ndarray:
    """1, doublings of the weights, doublings of the tokens per weight: ``[cells, 3]``."""
    rows = [
        (1.0, math.log2(cell.weights / AT[0]), math.log2(cell.per_weight / AT[1]))
        for cell in points
    ]
    return np.array(rows)


LEAST = 5
"""Cells that a fit of three coefficients needs, over two sizes and two numbers of tokens."""


def fit(points: list[Cell], draws: int = 4000) -> dict[str, Any]:
    """The gap by least squares over the cells' means; {} if there are too few cells.

    Returns:
        ``coefficients`` [3] in nats: at ``AT``, for a doubling of the weights, for a doubling of
        the tokens per weight; their 95% ``intervals`` [3, 2]; the ``misfit`` (root mean square of
        what remains at the cells, by degrees of freedom) and the pooled ``seed_spread``, a standard
        deviation.
    """
    x = design(points)
    if len(points) < LEAST or np.linalg.matrix_rank(x) < x.shape[1]:
        return {}
    means = np.array([statistics.fmean(cell.gaps()) for cell in points])
    counts = np.array([len(cell.gaps()) for cell in points])
    squares = [sum((g - statistics.fmean(c.gaps())) ** 2 for g in c.gaps()) for c in points]
    spread = math.sqrt(sum(squares) / max(1, int((counts - 1).sum())))
    solve = np.linalg.pinv(x)
    best = solve @ means
    free = len(points) - x.shape[1]
    misfit = math.sqrt(float(((means - x @ best) ** 2).sum()) / free)
    noise = np.random.default_rng(0).normal(size=(draws, len(points)))
    drawn = (means + noise * spread / np.sqrt(counts)) @ solve.T
    return {
        "coefficients": best.tolist(),
        "intervals": np.quantile(drawn, (0.025, 0.975), axis=0).T.tolist(),
        "misfit": misfit,
        "seed_spread": spread,
    }


def summary(rows: Rows) -> dict[str, Any]:
    """What bitnet/scaling.json holds; floats to 6 digits, so that all machines write the same."""
    badly = badly_tuned(rows)
    points = [cell for cell in cells(rows) if cell.size not in badly]
    found = {
        "commit": rows[0]["commit"],
        "cells": [
            {
                "weights": cell.weights,
                "tokens_per_weight": cell.per_weight,
                "seeds": len(cell.fp),
                "gap": statistics.median(cell.gaps()),
                "low": min(cell.gaps()),
                "high": max(cell.gaps()),
            }
            for cell in points
        ],
        "fit": fit(points),
    }
    rounded: dict[str, Any] = json.loads(
        json.dumps(found), parse_float=lambda text: float(f"{float(text):.6g}")
    )
    return rounded


def trilm(weights: float) -> tuple[float, float]:
    """Loss of TriLM and of its full-precision models (arXiv 2407.12327), 99M to 3.9B parameters,
    300B tokens."""
    return 185 * weights**-0.26 + 1.76, 159 * weights**-0.26 + 1.67


PARETOQ = ((125e6, 1.32), (1.5e9, 1.14))
"""Parameters, and ternary over full-precision perplexity, of ParetoQ (arXiv 2502.02631): MobileLLM,
with QAT for the last tenth of the tokens."""


def table(rows: Rows | None = None) -> str:
    """Markdown: the gap of each cell, the median and range of the seeds, beside published fits."""
    rows = read(CSV) if rows is None else rows
    points, badly = cells(rows), badly_tuned(rows)
    lines = [
        "| weights in matrices | tokens per weight | full precision | ternary, packed "
        "| gap, nats per token | gap | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in points:
        gaps = sorted(cell.gaps())
        shown = f"{statistics.median(gaps):+.4f}"
        if len(gaps) > 1:
            shown += f" ({gaps[0]:+.4f} to {gaps[-1]:+.4f})"
        share = 100 * statistics.fmean(gaps) / statistics.fmean(cell.fp)
        size = f"{cell.size}, badly tuned" if cell.size in badly else cell.size
        lines.append(
            f"| {size} | {cell.per_weight:.0f} | {statistics.fmean(cell.fp):.3f} "
            f"| {statistics.fmean(cell.ternary):.3f} | {shown} | {share:+.1f}% | {len(gaps)} |"
        )
    for weights in (99e6, 3.9e9):
        ternary, full = trilm(weights)
        name, share = f"TriLM, {weights / 1e6:,.0f}M parameters", 100 * (ternary / full - 1)
        lines.append(
            f"| *{name}* | *{300e9 / weights:,.0f}* | *{full:.2f}* | *{ternary:.2f}* "
            f"| *{ternary - full:+.2f}* | *{share:+.0f}%* | |"
        )
    for weights, ratio in PARETOQ:
        lines.append(
            f"| *ParetoQ, {weights / 1e6:,.0f}M parameters* | | | | *{math.log(ratio):+.2f}* | | |"
        )
    return "\n".join(lines)


def plot(rows: Rows, out: Path) -> Path:
    """The gap against tokens per weight, with the range of seeds, and the fit at each size."""
    from matplotlib.figure import Figure

    points, figure = cells(rows), Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    line = fit(points)
    for i, size in enumerate(dict.fromkeys(cell.size for cell in points)):
        of = [cell for cell in points if cell.size == size]
        places = [cell.per_weight for cell in of]
        middle = [statistics.median(cell.gaps()) for cell in of]
        low = [m - min(cell.gaps()) for m, cell in zip(middle, of, strict=True)]
        high = [max(cell.gaps()) - m for m, cell in zip(middle, of, strict=True)]
        label = f"{size} weights"
        axes.errorbar(
            places,
            middle,
            [low, high],
            marker="o",
            lw=0,
            elinewidth=1.5,
            capsize=4,
            label=label,
            color=f"C{i}",
        )
        if line:
            a, b, c = line["coefficients"]
            ends = [min(p.per_weight for p in points), max(p.per_weight for p in points)]
            at = a + b * math.log2(WEIGHTS[size] / AT[0])
            heights = [at + c * math.log2(d / AT[1]) for d in ends]
            axes.plot(ends, heights, color=f"C{i}", lw=1, alpha=0.6)
    axes.axhline(0, color="0.6", lw=0.8)
    axes.set_xscale("log", base=2)
    ticks = sorted({round(cell.per_weight) for cell in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("tokens per weight")
    axes.set_ylabel("ternary minus full precision, nats per token")
    title = "Median and range of seeds" + ("; lines: the fit" if line else "")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150, metadata={"Software": ""})
    return out


def draw(words: list[str]) -> None:
    """What the words name, from the CSV."""
    rows = read(CSV)
    for word in words:
        if word == "table":
            print(table(rows))
        elif word == "plot":
            print(plot(rows, CSV.with_suffix(".png")))
        else:
            text = json.dumps(summary(rows), indent=1) + "\n"
            FIT.write_text(text, encoding="utf-8")
            print(text)


if __name__ == "__main__":
    if sys.argv[1:] and {*sys.argv[1:]} <= {"table", "plot", "fit"}:
        draw(sys.argv[1:])
    else:
        main(CSV, jobs, __doc__ or "")
