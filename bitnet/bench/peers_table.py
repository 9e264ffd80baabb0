"""The table and the plot's data of ``bitnet bench decode --peers``: our engine beside llama.cpp,
from the rows of :mod:`bitnet.bench.decode_table`."""

import re
from collections.abc import Collection, Sequence

from bitnet.bench.decode_table import NOTHING
from bitnet.bench.decode_worker import BF16_HEAD
from bitnet.bench.rows import Figures, counted, distinct, origin
from bitnet.summary import human


def beside(rows: Sequence[Figures]) -> list[Figures]:
    """The rows that were measured beside llama.cpp."""
    return [row for row in rows if row["over_llama_cpp"]]


def image_name(device: str) -> str:
    """File name of a device's plot."""
    return f"decode_peers_{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.png"


def table(rows: Sequence[Figures], images: Collection[str] = ()) -> str:
    """Markdown: for each machine and length of a run, a line on both, a table, and the machine's
    plot if its name is among ``images``. Paths are relative to docs/."""
    groups: dict[tuple[str, ...], list[Figures]] = {}
    for row in beside(rows):
        groups.setdefault((row["device"], row["new"], row["rounds"]), []).append(row)
    parts = []
    for group in groups.values():
        parts.append(_section(group))
        if (image := image_name(group[0]["device"])) in images:
            parts.append(f"![Ratios to llama.cpp](results/{image})")
    return "\n\n".join(dict.fromkeys(parts)) or NOTHING


def summary(rows: Sequence[Figures]) -> str:
    """A short summary in Markdown: a line per machine, model and number of threads, for one row and
    a prompt of 128 tokens."""
    found: dict[tuple[str, ...], dict[str, Figures]] = {}
    for row in beside(rows):
        if (row["batch"], row["prompt"]) == ("1", "128"):
            subject = row["device"], row["model"], row["threads"]
            found.setdefault(subject, {})[row["contender"]] = row
    lines = [
        "| CPU | model | threads | tokens/s | over llama.cpp | without multiplications "
        "| with `--head int8` | prompt |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for where, by_contender in sorted(found.items()):
        if (ours := by_contender.get(BF16_HEAD)) is None:
            continue
        cells = [f"{float(ours['tokens_s']):,.0f}"]
        for contender in (BF16_HEAD, "ours-addsub-bf16-head", "ours-int8-head"):
            other = by_contender.get(contender)
            cells.append(f"{float(other['over_llama_cpp']):.1f}" if other else "")
        cells.append(f"{float(ours['first_over_llama_cpp']):.1f}")
        lines.append("| " + " | ".join((*where, *cells)) + " |")
    return "\n".join(lines) if len(lines) > 2 else NOTHING


def prefill(row: Figures) -> float:
    """Prompt tokens per second."""
    return 1e3 * int(row["batch"]) * int(row["prompt"]) / float(row["first_ms"])


def _section(rows: Sequence[Figures]) -> str:
    one = rows[0]
    lines = [
        f"**{one['device']}**: torch {distinct(rows, 'torch')}, llama-cpp-python "
        f"{distinct(rows, 'llama_cpp')}; {one['new']} new tokens per row, "
        f"{counted(int(one['rounds']), 'round')}; {origin(rows)}",
        "",
        "| model | threads | batch | prompt | contender | prefill, tokens/s "
        "| over llama.cpp (range) | decode, tokens/s | over llama.cpp (range) | agrees "
        "| weights | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def _cells(row: Figures) -> list[str]:
    def ratio(column: str) -> str:
        value, low, high = (float(row[f"{column}{part}"]) for part in ("", "_min", "_max"))
        return f"{value:.2f} ({low:.2f} to {high:.2f})"

    memory = ""
    if row["peak_bytes"] and row["base_bytes"]:
        memory = human(int(row["peak_bytes"]) - int(row["base_bytes"]), "B")
    return [
        *(row[column] for column in ("model", "threads", "batch", "prompt", "contender")),
        f"{prefill(row):,.0f}",
        ratio("first_over_llama_cpp"),
        f"{float(row['tokens_s']):,.1f}",
        ratio("over_llama_cpp"),
        f"{float(row['agreement']):.0%}" if row["agreement"] else "",
        human(int(row["weight_bytes"]) + int(row["head_bytes"]), "B"),
        memory,
    ]
