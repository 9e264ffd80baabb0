"""What a byte of the model buys: ternary beside 4 and 16 bits of the same size: equal_bytes.csv.

    python docs/results/equal_bytes.py --data TRAIN --held-out TEXT --hours 1   # the missing rows
    python docs/results/equal_bytes.py table                                    # from the CSV

The ternary models are those of scaling.py with 0.4M weights. Beside each, on the same tokens: two
whose matrices are trained for int4 (a scale per row, learned as in LSQ or from the largest weight,
absmax; int8 activations), and one in full precision, with so much fewer weights that all parameters
take about as many bytes. Matrices count 1.6, 4 and 16 bits per weight, embedding and norms 16 in
each; scales of rows are counted.
"""

import statistics
import sys
from pathlib import Path

import scaling
from study import SHAPE, Job, Row, Rows, main, read, tokens_for

CSV = Path(__file__).resolve().parent / "equal_bytes.csv"
SIZE = "0.4M"
PER_WEIGHT = 5.0
"""Tokens per weight of the ternary model; the others see as many tokens."""
TOKENS = tokens_for(SIZE, PER_WEIGHT)
SEEDS = (0, 1, 2)
INT4 = (
    *(f"model.{key}" for key in ("n_layers=2", "d_model=104", "n_heads=4", "n_kv_heads=1")),
    *("model.d_ff=296", "model.linear=fp", "quant.bits=4"),
)
SHAPES: dict[str, tuple[str, ...]] = {
    "int4, absmax": (*INT4, "quant.weights=int"),
    "16 bits": (*SHAPE["0.1M"], "model.linear=fp"),
    "int4": (*INT4, "quant.weights=lsq"),
}
"""Shapes that store as many bytes as the ternary model: 104 and 64 wide instead of 128."""


SHOWN = {"int4": "int4, LSQ"}
"""Names of the table where they are not those of the arms."""


def jobs(rows: Rows) -> list[Job]:
    """The runs beside the ternary ones. The rates of int4 are swept as those of scaling.py are; 16
    bits has the shape of scaling.py's baseline with 0.1M weights, and its rate after 20 tokens per
    weight, which are nearly as many."""
    found = read(scaling.CSV)
    if not scaling.swept(found, SIZE, TOKENS):
        raise SystemExit("scaling.py comes first: its sweep chooses the learning rates")
    start, wanted = scaling.lr_of(found, "fp", SIZE, TOKENS), []
    rates = {"16 bits": scaling.lr_of(found, "fp", "0.1M", tokens_for("0.1M", 20.0))}
    for arm in (arm for arm in SHAPES if arm not in rates):
        missing = scaling.next_rate(sweep(rows, arm), start)
        if missing is None:
            rates[arm] = scaling.best_of(sweep(rows, arm), start)
        else:
            wanted.append(job(arm, missing, 0))
    return wanted + [job(arm, rates[arm], seed) for arm in SHAPES if arm in rates for seed in SEEDS]


def sweep(rows: Rows, arm: str) -> dict[float, float]:
    """Rate -> loss of an arm."""
    return scaling.losses_of(rows, arm, TOKENS, SIZE)


def job(arm: str, lr: float, seed: int) -> Job:
    """One run."""
    name = f"{arm.replace(', ', '-').replace(' ', '-')}-{PER_WEIGHT:g}-{lr:g}-{seed}"
    return Job(name, arm, SIZE, TOKENS, lr, seed, SHAPES[arm])


def beside() -> list[Row]:
    """The rows of the ternary models, of scaling.csv."""
    rows = scaling.of_grid(read(scaling.CSV))
    ours = ("ternary", SIZE, str(TOKENS))
    return [row for row in rows if (row["arm"], row["size"], row["tokens"]) == ours]


def chosen(rows: Rows) -> list[Row]:
    """The rows at the best rate of each arm."""
    best = {arm: scaling.best_of(sweep(rows, arm), 0.0) for arm in SHAPES}
    return [row for row in rows if float(row["lr"]) == best[row["arm"]]]


def table(rows: Rows | None = None) -> str:
    """Markdown: bytes and bits per byte of text, the median and range of the seeds."""
    rows = [*beside(), *chosen(read(CSV))] if rows is None else rows
    lines = [
        "| tokens | model | weights in matrices | bytes | bits per byte of text | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for tokens in sorted({int(row["tokens"]) for row in rows}):
        after = [row for row in rows if row["tokens"] == str(tokens)]
        for arm in ("ternary", *SHAPES):
            of = [row for row in after if row["arm"] == arm]
            if not of:
                continue
            values = sorted(float(row["bits_per_byte"]) for row in of)
            shown = f"{statistics.median(values):.3f}"
            if len(values) > 1:
                shown += f" ({values[0]:.3f} to {values[-1]:.3f})"
            lines.append(
                f"| {tokens / 1e6:.1f}M | {SHOWN.get(arm, arm)} | {int(of[0]['weights']):,} "
                f"| {int(of[0]['stored_bytes']):,} | {shown} | {len(of)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print(table())
    else:
        main(CSV, jobs, __doc__ or "")
