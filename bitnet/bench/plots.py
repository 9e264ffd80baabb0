"""Plots of the kernels' figures, and of our engine beside llama.cpp, if matplotlib is
installed."""

from pathlib import Path
from typing import Any

from bitnet.bench import decode_table, peers_table
from bitnet.bench.rows import Figures, counted
from bitnet_kernels.bench import report
from bitnet_kernels.bench.report import View
from bitnet_kernels.bench.rows import Row
from bitnet_kernels.bench.shapes import GOALS

_BESIDE = {"decode": "over_llama_cpp", "prefill": "first_over_llama_cpp"}
_LABELS = {"speedup": "ratio to 16-bit", "roofline": "share of the roofline"}


def draw(folder: Path, figures: list[Row]) -> bool:
    """Write the PNGs of every device into a folder; without matplotlib none, and return False."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    for view in report.views(figures, "measured") + report.views(figures, "estimate"):
        shapes = [shape for shape in view.shapes() if shape in GOALS] or view.shapes()[-4:]
        for kind in report.FIGURES:
            curves = {shape: report.curves(view, kind, shape) for shape in shapes}
            if not any(curves.values()):
                continue
            picture = Figure(figsize=(4 * len(shapes), 3.4), layout="constrained")
            picture.suptitle(f"{view.device}, {view.source}: {_LABELS[kind]}")
            axes = picture.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
            for axis, (shape, lines) in zip(axes, curves.items(), strict=True):
                _draw_shape(axis, view, kind, shape, lines)
            picture.savefig(folder / report.image_name(view, kind), dpi=110)
    beside = peers_table.beside(decode_table.load(folder))
    for device in dict.fromkeys(row["device"] for row in beside):
        picture = Figure(figsize=(9, 3.6), layout="constrained")
        picture.suptitle(f"{device}: ratio to llama.cpp, median and range")
        rows = [row for row in beside if row["device"] == device]
        for axis, (title, column) in zip(
            picture.subplots(1, 2, sharey=True), _BESIDE.items(), strict=True
        ):
            axis.set(title=title, ylabel=f"{title}, ratio")
            _draw_beside(axis, rows, column)
        picture.savefig(folder / peers_table.image_name(device), dpi=110)
    return True


def _draw_beside(axis: Any, rows: list[Figures], column: str) -> None:
    """A bar per contender, in a group per model, threads and batch."""
    groups = list(dict.fromkeys(_group(row) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for row in (row for row in rows if row["contender"] == name):
            value, low, high = (float(row[f"{column}{part}"]) for part in ("", "_min", "_max"))
            place = groups.index(_group(row)) + (i - (len(names) - 1) / 2) * width
            error = [[value - low], [high - value]]
            axis.bar(place, value, width, yerr=error, color=f"C{i}", label=name)
    axis.axhline(1.0, color="gray", linewidth=0.8)
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    shown = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(shown.values(), shown.keys(), fontsize=7)


def _group(row: Figures) -> str:
    batch = "" if row["batch"] == "1" else f"\nbatch {row['batch']}"
    return f"{row['model']}\n{counted(int(row['threads']), 'thread')}{batch}"


def _draw_shape(
    axis: Any,
    view: View,
    kind: str,
    shape: tuple[int, int],
    lines: dict[str, list[tuple[int, float]]],
) -> None:
    """One matrix: a curve over M per kernel, and the goal if there is one."""
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    if kind == "speedup":
        axis.axhline(1.0, color="gray", linewidth=0.8)
        if view.has_goals and shape in GOALS:
            floors = [(m, goal.floor) for m, goal in GOALS[shape].items()]
            axis.plot(*zip(*floors, strict=True), "k--", label="floor")
    axis.set(title=f"{shape[0]} x {shape[1]}", xlabel="M", ylabel=_LABELS[kind])
    axis.set_xscale("log", base=2)
    axis.set_xticks(view.tokens(), [str(m) for m in view.tokens()])
    axis.set_ylim(bottom=0)
    if lines:
        axis.legend()
