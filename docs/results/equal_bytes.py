"""What a byte of the model buys: ternary beside 4 and 16 bits of the same size: equal_bytes.csv.

    python docs/results/equal_bytes.py --data TRAIN --held-out TEXT --hours 1   # the missing rows
    python docs/results/equal_bytes.py table                                    # from the CSV

The ternary models are those of scaling.py with 0.4M weights. Beside each, after the same tokens: a
model whose matrices are trained for int4 (LSQ, a scale per row, int8 activations), and one in full
precision, with so much fewer weights that all parameters take about as many bytes. Matrices count
1.6, 4 and 16 bits per weight, embedding and norms 16 in each; scales of rows are counted.
"""

import statistics
import sys
from pathlib import Path

import scaling
from scaling import ARMS
from study import SHAPE, Job, Row, Rows, main, read, tokens_for

CSV = Path(__file__).resolve().parent / "equal_bytes.csv"
SIZE = "0.4M"
PER_WEIGHT = (5.0, 20.0)
"""Tokens per weight of the ternary model; the others see as many tokens."""
SEEDS = (0, 1, 2)
SHAPES: dict[str, tuple[str, ...]] = {
    "int4": (
        *(f"model.{key}" for key in ("n_layers=2", "d_model=104", "n_heads=4", "n_kv_heads=1")),
        *("model.d_ff=296", "model.linear=fp", "quant.weights=lsq", "quant.bits=4"),
    ),
    "16 bits": (*SHAPE["0.1M"], "model.linear=fp"),
}
"""Shapes that store as many bytes as the ternary model: 104 and 64 wide instead of 128."""


def jobs(_: Rows) -> list[Job]:
    """The runs beside the ternary ones, once the sweep of scaling.py is complete."""
    found = read(scaling.CSV)
    if any(scaling.to_sweep(found, arm) for arm in ARMS):
        raise SystemExit("scaling.py comes first: its sweep chooses the learning rates")
    lr = scaling.best_lr(found, "fp")
    return [
        Job(
            name=f"{arm.replace(' ', '-')}-{per_weight:g}-{seed}",
            arm=arm,
            size=SIZE,
            tokens=tokens_for(SIZE, per_weight),
            lr=lr,
            seed=seed,
            options=options,
        )
        for per_weight in PER_WEIGHT
        for seed in SEEDS
        for arm, options in SHAPES.items()
    ]


def beside() -> list[Row]:
    """The rows of the ternary models, of scaling.csv."""
    rows = scaling.of_grid(read(scaling.CSV))
    return [row for row in rows if (row["arm"], row["size"]) == ("ternary", SIZE)]


def table(rows: Rows | None = None) -> str:
    """Markdown: bytes and bits per byte of text, the median and range of the seeds."""
    rows = [*beside(), *read(CSV)] if rows is None else rows
    lines = [
        "| tokens | model | weights in matrices | bytes | bits per byte of text | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for tokens in sorted({int(row["tokens"]) for row in rows}):
        for arm in ("ternary", *SHAPES):
            of = [row for row in rows if (row["arm"], row["tokens"]) == (arm, str(tokens))]
            if not of:
                continue
            values = sorted(float(row["bits_per_byte"]) for row in of)
            lines.append(
                f"| {tokens / 1e6:.1f}M | {arm} | {int(of[0]['weights']):,} "
                f"| {int(of[0]['stored_bytes']):,} | {statistics.median(values):.4f} "
                f"({values[0]:.4f} to {values[-1]:.4f}) | {len(of)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print(table())
    else:
        main(CSV, jobs, __doc__ or "")
