"""Charts as HTML: curves and heat maps, in SVG without text.

The plot area is an SVG that is stretched to the available width; its lines keep their thickness.
The labels are HTML around it, so they keep their size on a narrow screen. Colors are CSS classes
(``c0`` ... for curves, ``h0`` ... for cells), which the page defines for light and dark.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

Points = Sequence[tuple[float, float]]
LEVELS, COLORS = 8, 6
"""Numbers of colors of a heat map and of curves."""
MOST_LABELS = 42
"""Most rows of a heat map that are all labeled; of more rows, only those that begin a block are."""


class Line(NamedTuple):
    """A curve of a chart."""

    points: Points
    color: int
    label: str = ""
    """Its label in the legend; "" for none."""
    style: str = ""
    """"dots": a dot at each point."""


def line_chart(
    title: str, lines: Sequence[Line], x_name: str, *, note: str = "", zero: bool = False
) -> str:
    """Curves over a common x axis; "" if there is no point.

    Arguments:
        note: text under the title. zero: the y axis includes 0, which has a line.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    x_max = max(x for line in lines for x, _ in line.points) or 1
    low, high = _range(lines, x_max, zero)
    paths = "".join(_path(line, x_max, low, high) for line in reversed(lines))  # the first on top
    grid, labels = "", ""
    for y in ticks(low, high, 5):
        share = (high - y) / (high - low)
        kind = "zero" if zero and y == 0 else "grid"
        grid += f'<path class="{kind}" d="M0 {1000 * share:.0f}h1000"/>'
        labels += f'<span class="y" style="top:{share:.1%}">{_short(y, high - low)}</span>'
    for x in ticks(0, x_max, 5):
        labels += f'<span class="x" style="left:{x / x_max:.1%}">{_count(x)}</span>'
    legend = "".join(
        f'<span class="key {_color(line)}"><i></i>{escape(line.label)}</span>'
        for line in lines
        if line.label
    )
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {escape(note)}"
        f'<span class="legend">{legend}</span></figcaption>'
        f'<div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{grid}{paths}</svg>{labels}</div>'
        f'<p class="axis">{escape(x_name)}</p></figure>'
    )


def _range(lines: Sequence[Line], x_max: float, zero: bool) -> tuple[float, float]:
    """Bounds of y. In the first twentieth of a run the loss falls from that of random weights,
    which would flatten the rest. So this part of a curve with many points may leave the plot."""
    values = [
        y for line in lines for x, y in line.points if x > x_max / 20 or len(line.points) < 20
    ]
    values = values or [y for line in lines for _, y in line.points]
    low, high = min(values), max(values)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    span, size = high - low, max(abs(low), abs(high))
    margin = span * 0.06 if span > 1e-9 * size else size * 0.1 or 1.0
    return low - margin * (low != 0 or not zero), high + margin


def _path(line: Line, x_max: float, low: float, high: float) -> str:
    def place(x: float, y: float) -> str:
        share = min(max((high - y) / (high - low), -1.0), 2.0)
        return f"{1000 * x / x_max:.1f} {1000 * share:.1f}"

    steps = "L".join(place(x, y) for x, y in line.points)
    classes = f"line {_color(line)}"
    drawn = f'<path class="{classes}" d="M{steps}"/>'
    if line.style == "dots" and len(line.points) <= 100:
        dots = "".join(f"M{place(x, y)}h0" for x, y in line.points)
        drawn += f'<path class="dot {_color(line)}" d="{dots}"/>'
    return drawn


def _color(line: Line) -> str:
    return f"c{line.color % COLORS}"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within bounds, at most ``most`` + 1: multiples of 1, 2 or 5 times a power of
    ten."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _short(value: float, span: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(span))) if span < 20 else 0
    return f"{value:,.{min(digits, 8)}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _count(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}"


def heat_map(title: str, rows: Mapping[str, Points], x_name: str, note: str = "") -> str:
    """A row of cells per name, over a common x axis; "" if there is no point.

    A cell reaches from the previous x of its row to its own. Values are shares, shown in percent.
    """
    rows = {name: points for name, points in rows.items() if points}
    if not rows:
        return ""
    values = [y for points in rows.values() for _, y in points]
    x_max = max(x for points in rows.values() for x, _ in points) or 1
    low, high = min(values), max(values)
    cells: dict[int, list[str]] = {}
    height = 1000 / len(rows)
    for number, points in enumerate(rows.values()):
        before = 0.0
        for x, y in points:
            level = int((y - low) / (high - low or 1) * LEVELS)
            left, right = 1000 * before / x_max, 1000 * x / x_max
            box = f"M{left:.1f} {number * height:.2f}H{right:.1f}v{height:.2f}H{left:.1f}z"
            cells.setdefault(min(level, LEVELS - 1), []).append(box)
            before = x
    drawn = "".join(f'<path class="h{n}" d="{"".join(cells[n])}"/>' for n in sorted(cells))
    scale = "".join(f'<i class="h{level}"></i>' for level in range(LEVELS))
    labels = "".join(
        f'<span class="y" style="top:{(number + 0.5) / len(rows):.2%}">{escape(label)}</span>'
        for number, label in _labels(list(rows))
    )
    for x in ticks(0, x_max, 5):
        labels += f'<span class="x" style="left:{x / x_max:.1%}">{_count(x)}</span>'
    tall = min(max(len(rows) * 15, 120), 720)
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {escape(note)}"
        f'<span class="legend">{low:.1%} <span class="scale">{scale}</span> {high:.1%}</span>'
        f'</figcaption><div class="plot heat" style="height:{tall}px">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{drawn}</svg>{labels}</div>'
        f'<p class="axis">{escape(x_name)}</p></figure>'
    )


def _labels(names: list[str]) -> list[tuple[int, str]]:
    """Row number and label, for every row or for those that begin a block."""
    short = [_short_name(name) for name in names]
    if len(names) <= MOST_LABELS:
        return list(enumerate(short))
    blocks = [name.partition(" ")[0] for name in short]
    begin = [n for n, block in enumerate(blocks) if n == 0 or block != blocks[n - 1]]
    each = math.ceil(len(begin) / MOST_LABELS)
    return [(n, blocks[n][:20]) for n in begin[::each]]


def _short_name(name: str) -> str:
    """``layers.3.self_attn.q_proj`` -> ``3 q``; for any other name, its end."""
    words = name.split(".")
    number = next((word for word in words if word.isdigit()), "")
    return f"{number} {words[-1].removesuffix('_proj')}".strip()[-24:]
