"""Make the tables of kernels/README.md from rows; they are never written by hand.

A table has one device and one source: measurements and estimates never share a table, and the title
of an estimate says so. Ratios are to the fastest 16-bit matmul of the same round-robin.
"""

import csv
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from bitnet_kernels.bench.rows import Row, read
from bitnet_kernels.bench.shapes import GOAL_TOKENS, GOALS, users

PATTERN = "kernels_*.csv"
NOTHING = "No figures yet."
NOISY = "~"


class Line(NamedTuple):
    """One line of a table or plot: its name, and the rows that compete for its figure."""

    name: str
    holds: Callable[[Row], bool]


LINES = (
    Line("addsub", lambda row: row.family == "addsub"),
    Line("dot", lambda row: row.family == "dot"),
    Line("auto", lambda row: row.family == "auto"),
    Line("gemlite", lambda row: row.contender == "gemlite"),
    Line("torchao", lambda row: row.contender == "torchao"),
)


def load(folder: Path) -> list[Row]:
    """All rows of a folder's CSV files that have a figure.

    Raises:
        ValueError: a file is damaged; two files have a row for the same thing.
    """
    rows: dict[tuple[str | int, ...], Path] = {}
    kept = []
    for path in sorted(folder.glob(PATTERN)):
        for row in read(path):
            if row.key in rows:
                where = f"{row.device}, {row.formulation} at {row.n}x{row.k}, M = {row.m}"
                raise ValueError(f"{path}: {where} is in {rows[row.key].name} as well")
            rows[row.key] = path
            if not row.skipped:
                kept.append(row)
    return kept


class View(NamedTuple):
    """The rows of one table, of one device, source, state of the cache and kind of operation."""

    device: str
    source: str
    rows: list[Row]

    def ratio(self, row: Row) -> float:
        """The speedup over the 16-bit matmul."""
        ratio = row.ratio_to_16bit if self.source == "measured" else row.estimate_ratio
        assert ratio is not None  # rows.read has checked it
        return ratio

    def time(self, row: Row) -> float:
        """The median in microseconds."""
        time = row.median_us if self.source == "measured" else row.estimate_us
        assert time is not None
        return time

    def shapes(self) -> list[tuple[int, int]]:
        """(N, K), smallest first."""
        return sorted({(row.n, row.k) for row in self.rows}, key=lambda nk: (nk[0] * nk[1], nk))

    def tokens(self) -> list[int]:
        """Every M."""
        return sorted({row.m for row in self.rows})

    def best(self, line: Line, shape: tuple[int, int], m: int) -> Row | None:
        """The fastest row of a line, or None."""
        found = [row for row in self.at(shape, m) if line.holds(row)]
        return min(found, key=self.time, default=None)

    def sixteen_bit(self, shape: tuple[int, int], m: int) -> Row | None:
        """The fastest 16-bit matmul."""
        found = [row for row in self.at(shape, m) if row.family == "16-bit"]
        return min(found, key=self.time, default=None)

    def at(self, shape: tuple[int, int], m: int) -> list[Row]:
        """All rows of a shape and M."""
        return [row for row in self.rows if (row.n, row.k, row.m) == (*shape, m)]

    @property
    def has_goals(self) -> bool:
        """Whether the goals apply: they are for Hopper."""
        return self.source == "measured" and any(name in self.device for name in ("H100", "H200"))


def views(rows: Iterable[Row], source: str) -> list[View]:
    """A view of each device. Measurements show whole layers with a cold cache, and with 16-bit
    activations if there are any; estimates show the product alone."""
    rows = [row for row in rows if row.source == source and row.cache == "cold"]
    what = "linear" if source == "measured" else "matmul"
    rows = [row for row in rows if row.what == what]
    found = []
    for device in sorted({row.device for row in rows}):
        mine = [row for row in rows if row.device == device]
        if source == "measured" and any(row.dtype != "fp32" for row in mine):
            mine = [row for row in mine if row.dtype != "fp32"]
        found.append(View(device, source, mine))
    return found


def _columns(view: View) -> list[int]:
    shown = [m for m in view.tokens() if m in GOAL_TOKENS]
    return shown or view.tokens()


def _cell(view: View, row: Row | None) -> str:
    if row is None:
        return ""
    ratio = f"{view.ratio(row):.2f}{NOISY if is_noisy(row) else ''}"
    share = "" if row.roofline_share is None else f", {row.roofline_share:.0%}"
    name = "" if row.formulation == row.family else f" {row.formulation}"
    return f"{ratio}{name}{share}"


def is_noisy(row: Row) -> bool:
    """Whether the slowest tenth of the replays took over twice as long as the fastest tenth."""
    return row.p10_us is not None and row.p90_us is not None and row.p90_us > 2 * row.p10_us


def table(view: View) -> str:
    """Markdown: for each shape the 16-bit matmul's time, and for each line and M the ratio, the
    kernel that won and its share of the roofline."""
    tokens = _columns(view)
    lines = [
        "| N x K | | " + " | ".join(f"M = {m}" for m in tokens) + " |",
        "|---|---|" + "---|" * len(tokens),
    ]

    def add(label: str, name: str, cells: list[str]) -> None:
        if any(cells):
            lines.append(f"| {label} | {name} | " + " | ".join(cells) + " |")

    for shape in view.shapes():
        label = f"{shape[0]} x {shape[1]}"
        if models := users(*shape):
            label += f"<br>{models}"
        base = [view.sixteen_bit(shape, m) for m in tokens]
        times = [
            f"{view.time(row):,.1f}{NOISY if is_noisy(row) else ''}" if row else "" for row in base
        ]
        add(label, "16-bit, µs", times)
        for line in LINES:
            add("", line.name, [_cell(view, view.best(line, shape, m)) for m in tokens])
        if view.has_goals and shape in GOALS:
            goals = [GOALS[shape].get(m) for m in tokens]
            add(
                "",
                "goal: floor / stretch",
                [f"{g.floor:g} / {g.stretch:g}" if g else "" for g in goals],
            )
    if any(NOISY in line for line in lines):
        lines += ["", f"{NOISY}: the 90th percentile is more than twice the 10th."]
    return "\n".join(lines)


def _title(view: View) -> str:
    def distinct(values: Iterable[object]) -> str:
        return ", ".join(sorted({str(value) for value in values if value not in ("", None)}))

    if view.source == "estimate":
        return (
            f"**{view.device}, estimate** from compiled instructions, data sheets and round "
            "figures for launches and latencies, nothing was run: the integer product against a "
            "16-bit one at its roofline"
        )
    threads = distinct(row.threads for row in view.rows)
    return (
        f"**{view.device}**{f', threads: {threads}' if threads else ''}, measured: "
        f"torch {distinct(row.torch for row in view.rows)}, "
        f"commit {distinct(row.commit for row in view.rows)}, "
        f"{distinct(row.date for row in view.rows)}"
    )


def details(rows: Iterable[Row], images: Collection[str] = ()) -> str:
    """The measured tables, then the estimates; with the plots whose names are in ``images``."""
    rows = list(rows)
    parts = []
    for view in views(rows, "measured") + views(rows, "estimate"):
        parts.append(f"{_title(view)}\n\n{table(view)}")
        parts += [
            f"![{figure} of {view.device}](../docs/results/{name})"
            for figure in FIGURES
            if (name := image_name(view, figure)) in images
        ]
    return "\n\n".join(parts) or NOTHING


FIGURES = ("speedup", "roofline")


def image_name(view: View, figure: str) -> str:
    """The PNG of a view: ``kernels_<device>_speedup.png``; an estimate's name says so."""
    slug = "".join(c if c.isalnum() else "-" for c in view.device.lower())
    slug = "-".join(part for part in slug.split("-") if part)
    return f"kernels_{'estimate_' if view.source == 'estimate' else ''}{slug}_{figure}.png"


def curves(view: View, figure: str, shape: tuple[int, int]) -> dict[str, list[tuple[int, float]]]:
    """Line -> (M, value) for a plot: the ratio, or the share of the roofline where it is known."""
    found = {}
    for line in LINES:
        points = []
        for m in view.tokens():
            row = view.best(line, shape, m)
            if row is None:
                continue
            value = view.ratio(row) if figure == "speedup" else row.roofline_share
            if value is not None:
                points.append((m, value))
        if points:
            found[line.name] = points
    return found


def replace(text: str, begin: str, end: str, body: str, where: str) -> str:
    """``text``, with everything between two marker lines replaced by ``body``.

    Raises:
        ValueError: a marker is missing, or there twice; names ``where``.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"{where}: expected one {begin} and one {end} after it")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{body}\n{end}{tail}"


def machine_code(path: Path) -> str:
    """The table of ``bitnet inspect kernels --csv`` for kernels/README.md: a row per matmul kernel.

    Raises:
        ValueError: the file is not such a CSV.
    """
    if not path.exists():
        return NOTHING
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found = [row for row in csv.DictReader(file) if row["instructions_per_weight"]]
        archs = {row["sm"]: row["gpu"] for row in found}
        cells = {(row["name"], row["sm"]): _counted(row) for row in found}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path.name}: not written by bitnet inspect kernels: {error!r}"
        ) from error
    names = dict.fromkeys(row["name"] for row in found)
    lines = [
        "Instructions per weight; registers; share of memory's speed that instruction rates allow",
        "(estimate); what multiplies data.",
        "",
        "| | " + " | ".join(f"{gpu} (sm_{sm})" for sm, gpu in archs.items()) + " |",
        "|---|" + "---|" * len(archs),
    ]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(cells.get((name, sm), "") for sm in archs) + " |")
    return "\n".join(lines)


def _counted(row: dict[str, str]) -> str:
    share = min(1.0, float(row["weights_per_clock"]) / float(row["needed_weights_per_clock"]))
    units = sorted(
        {name.partition(".")[0].split()[0] for name in row["multipliers_on_data"].split(", ")}
    )
    what = "nothing" if units == ["0"] else ", ".join(units)
    return f"{float(row['instructions_per_weight']):.2f}; {row['registers']}; {share:.0%}; {what}"
