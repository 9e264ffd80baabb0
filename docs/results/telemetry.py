"""Does telemetry say early that the learning rate is wrong? telemetry.csv, telemetry.png.

    python docs/results/telemetry.py --data TRAIN --held-out TEXT   # the rates that are missing
    python docs/results/telemetry.py collect                        # telemetry.csv, from runs/study
    python docs/results/telemetry.py table | plot                   # from the CSVs

The ternary model with 0.1M weights is trained on 20 tokens per weight at rates of the matrices from
far too low to far too high, one seed (rates.csv). From metrics.jsonl of each: the training loss,
and zeros, flip rate and dead zone every ``EVERY`` steps (bitnet/training/telemetry.py). Beside them
stand the runs of scaling.py at 80 tokens per weight, which are read every 50 steps. ``collect``
keeps the readings of runs whose folders are gone. A number predicts if, after a fifth of the run,
it tells a bad rate from a good one.
"""

import json
import statistics
import sys
from pathlib import Path

import scaling
from study import RESULTS, ROOT, Job, Row, Rows, main, read, tokens_for, write

CSV = RESULTS / "telemetry.csv"
RATES_CSV = RESULTS / "rates.csv"
RATES = (0.0025, 0.01, 0.04, 0.16, 0.64, 0.005, 0.02, 0.08, 0.32)
SIZE, PER_WEIGHT, LONG = "0.1M", 20.0, 80.0
EVERY = 20
"""Steps between two readings."""
EARLY = 0.2
"""The share of a run after which the table reads it."""
NUMBERS = ("zeros", "flip_rate", "dead_zone")
COLUMNS = ("tokens_per_weight", "lr", "step", "steps", "loss", *NUMBERS)


def jobs(_: Rows) -> list[Job]:
    """A run per rate."""
    tokens = tokens_for(SIZE, PER_WEIGHT)
    options = (f"log.telemetry_every={EVERY}",)
    return [Job(f"rate-{lr:g}", "ternary", SIZE, tokens, lr, 0, options) for lr in RATES]


def collect() -> list[Row]:
    """The readings of the runs that have ended, with the mean loss of the last five lines."""
    found, kept = list[Row](), read(CSV)
    for row in ends():
        path = ROOT / "runs" / "study" / row["name"] / "metrics.jsonl"
        if not path.exists():
            found += [one for one in kept if of(one, row)]
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if "loss" in line]
        for i, line in enumerate(steps):
            if "ternary/zeros" not in line:
                continue
            loss = statistics.fmean(one["loss"] for one in steps[max(0, i - 4) : i + 1])
            numbers = {name: line.get(f"ternary/{name}") for name in NUMBERS}
            shown = {
                name: "" if value is None else f"{value:.5f}" for name, value in numbers.items()
            }
            head = {key: row[key] for key in ("tokens_per_weight", "lr")}
            head |= {"step": str(line["step"]), "steps": str(steps[-1]["step"])}
            found.append({**head, "loss": f"{loss:.5f}", **shown})
    return found


def ends() -> list[Row]:
    """The finished runs of both lengths, the short ones first, by rate."""
    of_scaling = [
        row
        for row in read(scaling.CSV)
        if (row["arm"], row["size"], row["seed"]) == ("ternary", SIZE, "0")
        and float(row["tokens_per_weight"]) == LONG
    ]
    return sorted(
        [*read(RATES_CSV), *of_scaling],
        key=lambda row: (float(row["tokens_per_weight"]), float(row["lr"])),
    )


def of(reading: Row, run: Row) -> bool:
    """Whether a reading is of a run."""
    return all(reading[key] == run[key] for key in ("tokens_per_weight", "lr"))


def after(rows: Rows, run: Row, share: float) -> Row | None:
    """The first reading of a run after a share of it; None: its telemetry was not kept."""
    return next(
        (
            row
            for row in rows
            if of(row, run) and int(row["step"]) >= share * int(row["steps"]) and row["flip_rate"]
        ),
        None,
    )


def table() -> str:
    """Markdown: readings after a fifth of the run, beside the loss at its end."""
    rows, runs = read(CSV), ends()
    lines = [
        "| tokens per weight | learning rate | held-out loss at the end | loss after 20% | zeros "
        "| flips | dead zone |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in runs:
        early, length = after(rows, row, EARLY), row["tokens_per_weight"]
        if early is None:
            continue
        best = min(float(run["loss"]) for run in runs if run["tokens_per_weight"] == length)
        mark = " (best)" if float(row["loss"]) == best else ""
        lines.append(
            f"| {length} | {row['lr']}{mark} | {float(row['loss']):.3f} "
            f"| {float(early['loss']):.2f} "
            f"| {float(early['zeros']):.3f} | {float(early['flip_rate']):.4f} "
            f"| {float(early['dead_zone']):.4f} |"
        )
    return "\n".join(lines)


def plot(out: Path) -> Path:
    """Loss, flip rate, zeros and dead zone over the run, a curve per rate."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [row for row in read(CSV) if float(row["tokens_per_weight"]) == PER_WEIGHT]
    rates = sorted({row["lr"] for row in rows}, key=float)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    titles = {"loss": "training loss", "flip_rate": "flip rate", "zeros": "zeros"}
    titles |= {"dead_zone": "dead zone"}
    for axis, (column, title) in zip(figure.subplots(1, 4), titles.items(), strict=True):
        for i, lr in enumerate(rates):
            points = [row for row in rows if row["lr"] == lr and row[column]]
            shares = [100 * int(row["step"]) / int(row["steps"]) for row in points]
            color = colormaps["viridis"](i / max(1, len(rates) - 1))
            axis.plot(shares, [float(row[column]) for row in points], color=color, label=lr)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("% of the run")
        if column == "flip_rate":
            axis.set_yscale("log")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside right center",
        fontsize=8,
        title="rate",
        frameon=False,
    )
    figure.savefig(out, dpi=130, metadata={"Software": ""})
    return out


if __name__ == "__main__":
    words = sys.argv[1:]
    if words == ["collect"]:
        write(CSV, collect(), COLUMNS)
    elif words == ["table"]:
        print(table())
    elif words == ["plot"]:
        print(plot(CSV.with_suffix(".png")))
    else:
        main(RATES_CSV, jobs, __doc__ or "")
