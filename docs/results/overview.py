"""The picture at the head of the README, drawn from the CSV files of this folder.

    python docs/results/overview.py               # writes overview.svg

Four panels of horizontal bars: quality and size of the quickstart model (quickstart.csv), speed of
a training step (train_*.csv) and of decoding (decode_*.csv). Each panel names its model. The SVG
needs no plotting library, so the same figures give the same bytes, and a test compares them.
"""

import csv
import statistics
from html import escape
from pathlib import Path
from typing import NamedTuple

from bitnet.config import load_config
from bitnet.summary import human

FOLDER = Path(__file__).parent
OUT = FOLDER / "overview.svg"
CPU = "cpu-intel-r-xeon-r-processor-avx-512-bf16-2-cpus"
QUICKSTART = "AMD EPYC (AVX-512 BF16), 2 CPUs"
OURS, OTHER = "#2563eb", "#a3acb9"
WIDTH, HEIGHT = 440, 178
"""Pixels of a panel."""
LABEL, BAR, LINE = 158, 150, 26
"""Pixels: the labels' column, the longest bar, a line of the chart."""


class Bar(NamedTuple):
    """One line of a panel."""

    label: str
    value: float
    shown: str
    color: str = OTHER


class Panel(NamedTuple):
    """A title, the conditions under it, and bars that begin at zero."""

    title: str
    conditions: str
    bars: tuple[Bar, ...]


def rows(name: str, **wanted: str) -> list[dict[str, str]]:
    """Rows of a CSV whose columns have the wanted values; raises ValueError where there is none."""
    with (FOLDER / name).open(encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if wanted.items() <= row.items()]
    if not found:
        raise ValueError(f"{name}: no row has {wanted}")
    return found


def quickstart(kind: str) -> list[dict[str, str]]:
    """Rows of quickstart.csv at the rate of the config, of the CPU that has run both models."""
    config = FOLDER.parent.parent / "configs" / ("fp" if kind == "fp" else "") / "quickstart.toml"
    rate = load_config([config]).resolve().optim.muon_lr
    return rows("quickstart.csv", linear=kind, muon_lr=f"{rate:g}", device=QUICKSTART)


def quality() -> Panel:
    """Bits per byte of the packed quickstart model and of its baseline."""

    def bar(label: str, kind: str, color: str = OTHER) -> Bar:
        runs = [float(row["bits_per_byte"]) for row in quickstart(kind)]
        value = statistics.median(runs)
        spread = f" ({min(runs):.3f} to {max(runs):.3f})" if len(runs) > 1 else ", one seed"
        return Bar(label, value, f"{value:.3f}{spread}", color)

    bars = (bar("full precision", "fp"), bar("ternary, packed", "ternary", OURS))
    title = "Bits per byte on unseen files (lower is better)"
    row = quickstart("ternary")[0]
    parameters, tokens = float(row["fp32_bytes"]) / 4e6, float(row["tokens"]) / 1e6
    return Panel(title, f"{parameters:.1f}M parameters, {tokens:.1f}M tokens", bars)


def size() -> Panel:
    """Bytes of the layers' matrices and of the whole model in files."""
    fp, packed = (quickstart(kind)[0] for kind in ("fp", "ternary"))
    bars = tuple(
        Bar(label, float(row[key]), human(float(row[key]), "B"), color)
        for label, row, key, color in (
            ("layers, fp32", fp, "stored_matrix_bytes", OTHER),
            ("layers, packed", packed, "stored_matrix_bytes", OURS),
            ("whole model, fp32", fp, "stored_bytes", OTHER),
            ("whole model, packed", packed, "stored_bytes", OURS),
        )
    )
    return Panel("Size in files", "the same model; its embeddings stay in fp32", bars)


def training() -> Panel:
    """Speed of an eager training step, relative to the baseline's in the same round."""
    name = f"train_{CPU}.csv"
    variants = (
        ("full precision", "fp", OTHER),
        ("naive fake quantization", "naive", OTHER),
        ("BitLinear", "ours", OURS),
        ("gradients in int8", "ours-int8", OURS),
    )
    bars = []
    for label, variant, color in variants:
        (row,) = rows(name, variant=variant, micro_batches="2", steps="5")
        speedup = float(row["speedup"])
        bars.append(Bar(label, speedup, f"{speedup:.2f}x", color))
    return Panel("Speed of a training step", f"15M parameters, fp32, {row['device']}", tuple(bars))


def decoding() -> Panel:
    """Tokens per second of one sequence, on two threads, beside llama.cpp on the same weights."""
    name = f"decode_{CPU}.csv"
    contenders = (
        ("llama.cpp, TQ2_0", "llama.cpp", OTHER),
        ("the same, flash attention", "llama.cpp-fa", OTHER),
        ("ternary, head in bf16", "ours-bf16-head", OURS),
        ("ternary, head in int8", "ours-int8-head", OURS),
    )
    bars = []
    for label, contender, color in contenders:
        case = {"model": "110m-silu", "threads": "2", "batch": "1", "prompt": "128"}
        row = rows(name, contender=contender, **case)[-1]  # the newest
        bars.append(Bar(label, float(row["tokens_s"]), f"{float(row['tokens_s']):.0f}", color))
    conditions = f"110M parameters, random weights, batch 1, {row['device']}"
    return Panel("Decoding, tokens per second", conditions, tuple(bars))


def text(x: float, y: float, words: str, style: str = "") -> str:
    """A line of text at a position in pixels."""
    return f'<text x="{x:g}" y="{y:g}"{style}>{escape(words)}</text>'


def draw(panel: Panel, x: int, y: int) -> list[str]:
    """The elements of a panel whose upper left corner is at ``x, y``."""
    lines = [
        text(x, y + 16, panel.title, ' class="title"'),
        text(x, y + 34, panel.conditions, ' class="small"'),
    ]
    longest = max(bar.value for bar in panel.bars)
    for index, bar in enumerate(panel.bars):
        top = y + 48 + index * LINE
        width = BAR * bar.value / longest
        lines += [
            text(x + LABEL - 8, top + 13, bar.label, ' text-anchor="end"'),
            f'<rect x="{x + LABEL}" y="{top}" width="{width:.1f}" height="18" rx="2" '
            f'fill="{bar.color}"/>',
            text(x + LABEL + width + 6, top + 13, bar.shown),
        ]
    return lines


def svg() -> str:
    """The whole picture."""
    panels = (quality(), size(), training(), decoding())
    width, height = 2 * WIDTH + 40, 2 * HEIGHT + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif" '
        'font-size="13" fill="#1f2937">',
        "<style>.title{font-size:15px;font-weight:bold}.small{font-size:12px;fill:#6b7280}</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
    ]
    for index, panel in enumerate(panels):
        lines += draw(panel, 20 + index % 2 * (WIDTH + 10), 14 + index // 2 * HEIGHT)
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    OUT.write_text(svg(), encoding="utf-8")
