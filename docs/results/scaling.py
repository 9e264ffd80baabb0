"""What ternary costs on real text, by model size and tokens: scaling.csv, scaling.png.

    python docs/results/scaling.py --data TRAIN --held-out TEXT --hours 2     # the missing rows
    python docs/results/scaling.py table | rates | plot | fit                 # from the CSV

Ternary and full-precision models of the same shape see the same tokens in the same order. For each
size, number of tokens and arm, the learning rate of the matrices (Muon) is swept by factors of 2,
with seed 0, until a quarter, half and twice the best rate are worse. Only then other seeds follow,
at that rate. A sweep begins at the best rate of the cell that took the next smaller number of
operations. Cells of fewer than ``LEAST_STEPS`` steps need no sweep: after 260 steps ternary seeds
span 0.2 nats. A cell whose sweep is not complete is marked as not tuned. AdamW's rate, for
embedding and norms, is the library's (`bitnet.config.default_lr`), 4e-3 at all these sizes, for
both arms.

``fit`` writes bitnet/scaling.json, by which `bitnet plan` predicts: the tuned cells and, from
``LEAST`` of them on, the gap and the bits per byte of ternary models, each a product of powers of
the weights N and of the tokens per weight D/N. The intervals are those of least squares
(:func:`fit`).
"""

import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from study import BATCH, RESULTS, ROOT, WEIGHTS, Job, Row, Rows, main, read, tokens_for

CSV = RESULTS / "scaling.csv"
FIT = ROOT / "bitnet" / "scaling.json"
ARMS = {"ternary": (), "fp": ("model.linear=fp",)}
START = 0.04
"""The rate at which the first sweep begins."""
LEAST_STEPS = 900
"""Steps of a run that tells what ternary costs; after 260 ternary seeds span 0.2 nats."""
GRID = (
    # size, tokens per weight, seeds
    ("0.1M", 20.0, (0, 1, 2)),
    ("0.4M", 5.0, (0, 1, 2)),
    ("0.1M", 5.0, (0, 1, 2)),
    ("0.4M", 20.0, (0, 1, 2)),
    ("1.2M", 5.0, (0, 1, 2)),
    ("0.1M", 80.0, (0, 1, 2)),
    ("2.8M", 5.0, (0,)),
    ("1.2M", 20.0, (0,)),
    ("0.4M", 80.0, (0,)),
)
"""What is trained, the most telling for its time first."""


def job(arm: str, size: str, per_weight: float, lr: float, seed: int) -> Job:
    """One run."""
    name = f"{arm}-{size}-{per_weight:g}-{lr:g}-{seed}"
    return Job(name, arm, size, tokens_for(size, per_weight), lr, seed, ARMS[arm])


def losses_of(rows: Rows, arm: str, tokens: int, size: str) -> dict[float, float]:
    """Rate -> loss of an arm after so many tokens, seed 0, by rate."""
    return {
        float(row["lr"]): float(row["loss"])
        for row in sorted(rows, key=lambda row: float(row["lr"]))
        if (row["arm"], row["size"], row["tokens"], row["seed"]) == (arm, size, str(tokens), "0")
    }


def best_of(found: Mapping[float, float], start: float) -> float:
    """The rate with the lowest loss of a sweep; before its first run, where it begins."""
    return min(found, key=lambda lr: found[lr], default=start)


def next_rate(found: Mapping[float, float], start: float) -> float | None:
    """The rate that a sweep needs next: half the best so far, a quarter, then twice; None once all
    are worse, which completes it. A quarter too, since a sweep by one seed is not smooth."""
    best = best_of(found, start)
    return next((lr for lr in (best, best / 2, best / 4, best * 2) if lr not in found), None)


def lr_of(rows: Rows, arm: str, size: str, tokens: int) -> float:
    """The rate of an arm in a cell: the best of those tried there with seed 0; before the first
    run, that of the cell that took the next smaller number of operations (weights x tokens)."""
    here = (WEIGHTS[size] * tokens, size, tokens)
    cells = [(cell, tokens_for(cell, per_weight)) for cell, per_weight, _ in GRID]
    below = [found for found in ((WEIGHTS[s] * t, s, t) for s, t in cells) if found < here]
    start = lr_of(rows, arm, *max(below)[1:]) if below else START
    return best_of(losses_of(rows, arm, tokens, size), start)


def to_sweep(rows: Rows, arm: str, size: str, tokens: int) -> float | None:
    """The rate that the sweep of an arm in a cell needs next; None: it is complete."""
    found = losses_of(rows, arm, tokens, size)
    if found and tokens < LEAST_STEPS * BATCH:
        return None
    return next_rate(found, lr_of(rows, arm, size, tokens))


def swept(rows: Rows, size: str, tokens: int) -> bool:
    """Whether both arms are swept in a cell."""
    return all(to_sweep(rows, arm, size, tokens) is None for arm in ARMS)


def jobs(rows: Rows) -> list[Job]:
    """The runs of the grid; of a cell and arm that is not swept, the rate that its sweep needs."""
    wanted = []
    for size, per_weight, seeds in GRID:
        tokens = tokens_for(size, per_weight)
        left = {arm: to_sweep(rows, arm, size, tokens) for arm in ARMS}
        wanted += [job(arm, size, per_weight, lr, 0) for arm, lr in left.items() if lr is not None]
        wanted += [
            job(arm, size, per_weight, lr_of(rows, arm, size, tokens), seed)
            for seed in seeds
            for arm in ARMS
            if left[arm] is None
        ]
    return wanted


def of_grid(rows: Rows) -> list[Row]:
    """The rows at the chosen rates."""
    return [
        row
        for row in rows
        if float(row["lr"])
        == best_of(losses_of(rows, row["arm"], int(row["tokens"]), row["size"]), 0.0)
    ]


class Cell(NamedTuple):
    """Both arms at one size and number of tokens, in the seeds that both have."""

    size: str
    tokens: int
    ternary: list[float]
    """nats per token of each seed"""
    fp: list[float]
    bits_per_byte: list[float]
    """of the ternary models"""
    tuned: bool
    """whether its sweeps are complete"""

    @property
    def weights(self) -> int:
        """Weights in the matrices."""
        return WEIGHTS[self.size]

    @property
    def per_weight(self) -> float:
        """Tokens per weight."""
        return self.tokens / self.weights

    @property
    def measured(self) -> bool:
        """Whether it tells what ternary costs: tuned, and long enough for that."""
        return self.tuned and self.tokens >= LEAST_STEPS * BATCH

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
                tokens,
                [float(arms["ternary"][seed]["loss"]) for seed in both],
                [float(arms["fp"][seed]["loss"]) for seed in both],
                [float(arms["ternary"][seed]["bits_per_byte"]) for seed in both],
                swept(rows, size, tokens),
            )
        )
    return sorted(found, key=lambda cell: (cell.weights, cell.per_weight))


AT = (WEIGHTS["0.4M"], 20.0)
"""Where the constant of a fit stands: weights, tokens per weight."""
LEAST = 5
"""Cells that a fit of three coefficients needs, over two sizes and two numbers of tokens."""
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Quantiles of Student's t, 95% two-sided, for 1, 2, ... degrees of freedom (any table of them)."""


def design(points: list[Cell]) -> np.ndarray:
    """1, doublings of the weights, doublings of the tokens per weight: ``[cells, 3]``."""
    rows = [
        (1.0, math.log2(cell.weights / AT[0]), math.log2(cell.per_weight / AT[1]))
        for cell in points
    ]
    return np.array(rows)


def squared(x: np.ndarray, coefficients: np.ndarray, means: np.ndarray) -> float:
    """The squared error of exp(x c)."""
    return float(((np.exp(x @ coefficients) - means) ** 2).sum())


def fit(points: list[Cell], seeds: list[list[float]]) -> dict[str, Any] | None:
    """Values of the cells' seeds as exp(x c), with the rows x of :func:`design`: least squares over
    the cells' means, by Gauss-Newton steps that are halved until they help. None: too few cells.

    Returns:
        ``coefficients`` c [3]: logarithm of the value at ``AT``, change per doubling of the weights
        and of the tokens per weight. ``covariance`` [3, 3] of them: ``deviation``^2 (J'J)^-1, with
        J the derivatives by c. ``deviation``: of a cell's mean from the fit, by degrees of freedom,
        and at least what the spread of seeds explains, so that few cells that happen to fit do not
        make it sure. ``t``: Student's, for 95%. A new cell lies within t sqrt(deviation^2 + j
        covariance j') of the fit, j its derivatives.
    """
    x = design(points)
    if len(points) < LEAST or np.linalg.matrix_rank(x) < x.shape[1]:
        return None
    means = np.array([statistics.fmean(values) for values in seeds])
    counts = np.array([len(values) for values in seeds])
    squares = sum(len(v) * statistics.pvariance(v) for v in seeds)
    of_seeds = squares / max(1, int((counts - 1).sum())) * float(np.mean(1 / counts))
    # logarithms to begin with; a mean below a twentieth of the largest would say too much there
    best = np.linalg.pinv(x) @ np.log(np.maximum(means, means.max() / 20))
    for _ in range(100):
        values = np.exp(x @ best)
        step = np.linalg.pinv(x * values[:, None]) @ (means - values)
        while np.abs(step).max() > 1e-9 and squared(x, best + step, means) > squared(
            x, best, means
        ):
            step = step / 2
        best = best + step
        if np.abs(step).max() <= 1e-9:
            break
    values = np.exp(x @ best)
    free = len(points) - x.shape[1]
    variance = max(squared(x, best, means) / free, of_seeds)
    slopes = x * values[:, None]
    return {
        "coefficients": best.tolist(),
        "covariance": (variance * np.linalg.inv(slopes.T @ slopes)).tolist(),
        "deviation": math.sqrt(variance),
        "t": T95[free - 1],
    }


def summary(rows: Rows) -> dict[str, Any]:
    """What bitnet/scaling.json holds; floats to 6 digits, so that all machines write the same."""
    points = [cell for cell in cells(rows) if cell.measured]
    found = {
        "commits": sorted({row["commit"] for row in rows}),
        "at": AT,
        "cells": [
            {
                "weights": cell.weights,
                "tokens_per_weight": cell.per_weight,
                "seeds": len(cell.fp),
                "gap": statistics.median(cell.gaps()),
                "low": min(cell.gaps()),
                "high": max(cell.gaps()),
                "muon_lr": lr_of(rows, "ternary", cell.size, cell.tokens),
            }
            for cell in points
        ],
        "gap": fit(points, [cell.gaps() for cell in points]),
        "bits_per_byte": fit(points, [cell.bits_per_byte for cell in points]),
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
    """Markdown: the gap of each tuned cell, the median and range of the seeds, beside published
    fits."""
    rows = read(CSV) if rows is None else rows
    points = cells(rows)
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
        share = f"{100 * statistics.median(gaps) / statistics.fmean(cell.fp):+.1f}%"
        if not cell.measured:  # one arm may be nearer to its best rate, or seeds differ too much
            shown = share = ""
        mark = "" if cell.measured else ", too short" if cell.tuned else ", not tuned"
        lines.append(
            f"| {cell.size}{mark} | {cell.per_weight:.0f} | {statistics.fmean(cell.fp):.3f} "
            f"| {statistics.fmean(cell.ternary):.3f} | {shown} | {share} | {len(gaps)} |"
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


def rates(rows: Rows | None = None) -> str:
    """Markdown: losses of seed 0 by Muon's rate, in the cells whose runs are long enough; the best
    of a line in bold."""
    rows = read(CSV) if rows is None else rows
    tried = sorted({float(row["lr"]) for row in rows}, reverse=True)
    found = {}
    for cell in cells(rows):
        if cell.tokens >= LEAST_STEPS * BATCH:
            for arm in ("fp", "ternary"):
                place = (cell.size, f"{cell.per_weight:.0f}", arm)
                found[place] = losses_of(rows, arm, cell.tokens, cell.size)
    tried = [lr for lr in tried if any(lr in losses for losses in found.values())]
    lines = [
        "| weights | tokens per weight | model | " + " | ".join(f"{lr:g}" for lr in tried) + " |",
        "|---" * (3 + len(tried)) + "|",
    ]
    for (size, per_weight, arm), losses in found.items():
        name = "full precision" if arm == "fp" else arm
        best = min(losses.values())
        shown = [
            ""
            if lr not in losses
            else f"**{best:.3f}**"
            if losses[lr] == best
            else f"{losses[lr]:.3f}"
            for lr in tried
        ]
        lines.append(f"| {size} | {per_weight} | {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def plot(rows: Rows, out: Path) -> Path:
    """The gap of measured cells against tokens per weight, the range of seeds, and the fit."""
    from matplotlib.figure import Figure

    points = [cell for cell in cells(rows) if cell.measured]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    line = fit(points, [cell.gaps() for cell in points])
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
            ends = min(p.per_weight for p in points), max(p.per_weight for p in points)
            at = a + b * math.log2(WEIGHTS[size] / AT[0])
            along = np.geomspace(*ends, 50)
            heights = [math.exp(at + c * math.log2(d / AT[1])) for d in along]
            axes.plot(along, heights, color=f"C{i}", lw=1, alpha=0.6)
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
        if word in ("table", "rates"):
            print(table(rows) if word == "table" else rates(rows))
        elif word == "plot":
            print(plot(rows, CSV.with_suffix(".png")))
        else:
            text = json.dumps(summary(rows), indent=1) + "\n"
            FIT.write_text(text, encoding="utf-8")
            print(text)


if __name__ == "__main__":
    if sys.argv[1:] and {*sys.argv[1:]} <= {"table", "rates", "plot", "fit"}:
        draw(sys.argv[1:])
    else:
        main(CSV, jobs, __doc__ or "")
