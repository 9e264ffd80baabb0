"""Charts read back from their paths."""

import random
import re

import pytest

from bitnet.report.charts import Line, heat_map, line_chart, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 200, [0, 50, 100, 150, 200]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (2.7, 3.5, [2.8, 3.0, 3.2, 3.4]),
        (-0.06, 0.04, [-0.06, -0.04, -0.02, 0, 0.02, 0.04]),
        (0, 1e9, [0, 2e8, 4e8, 6e8, 8e8, 1e9]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_ticks_are_few_and_within_bounds() -> None:
    generator = random.Random(0)
    for _ in range(500):
        low = generator.uniform(-1, 1) * 10 ** generator.randint(-6, 9)
        span = abs(low) * 10 ** generator.uniform(-6, 6)
        found = ticks(low, low + span, 5)
        assert 1 <= len(found) <= 6
        assert low - 1e-6 * span <= min(found) <= max(found) <= low + 1.000001 * span


def points_of(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path)]


def test_a_line_goes_through_its_points() -> None:
    html = line_chart("T", [Line([(0, 1.0), (50, 2.0), (100, 3.0)], 1, "a<b", "dots")], "steps")
    (path,) = re.findall(r'class="line c1" d="([^"]*)"', html)
    (x0, y0), (x1, y1), (x2, y2) = points_of(path)
    assert (x0, x1, x2) == (0, 500, 1000)
    assert 0 < y2 < y1 < y0 < 1000  # the largest on top
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    (dots,) = re.findall(r'class="dot c1" d="([^"]*)"', html)
    assert dots.count("h0") == 3
    assert "a&lt;b" in html
    assert "a<b" not in html


@pytest.mark.parametrize(
    "points",
    [
        [(5, 2.0)],
        [(0, 0.0)],
        [(1, 7.0), (2, 7.000000000000001)],
        [(1, -1e300), (2, 1e300)],
        [(1, 1e-300)],
    ],
)
def test_curves_without_a_range(points: list[tuple[float, float]]) -> None:
    for zero in (False, True):
        html = line_chart("T", [Line(points, 0), Line([], 1)], "steps", zero=zero)
        assert "nan" not in html
        assert "inf" not in html.replace("info", "")


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("T", [Line([], 0)], "steps") == ""
    assert heat_map("T", {"a": []}, "steps") == ""


def test_an_early_peak_does_not_flatten_a_long_curve() -> None:
    curve = [(x, 100.0 if x == 1 else 2 + 1 / x) for x in range(1, 101)]
    html = line_chart("T", [Line(curve, 0)], "steps")
    points = points_of(re.findall(r'class="line c0" d="([^"]*)"', html)[0])
    assert points[0][1] == -1000  # above the plot
    assert points[9][1] < 500 < points[60][1]


def test_a_heat_map_covers_its_area_with_the_right_levels() -> None:
    rows = {"layers.0.q_proj": [(10, 0.0), (20, 0.5)], "layers.1.q_proj": [(10, 0.25), (20, 1.0)]}
    html = heat_map("T", rows, "steps")
    cells = {
        level: re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)v([\d.]+)H[\d.]+z", path)
        for level, path in re.findall(r'<path class="h(\d)" d="([^"]*)"', html)
    }
    corners = {
        level: [(float(x), float(y)) for x, y, _, _ in boxes] for level, boxes in cells.items()
    }
    assert corners == {"0": [(0, 0)], "2": [(0, 500)], "4": [(500, 0)], "7": [(500, 500)]}
    area = sum((float(r) - float(x)) * float(h) for c in cells.values() for x, _, r, h in c)
    assert area == pytest.approx(1e6)
    assert "0.0%" in html
    assert "100.0%" in html
    assert [label for label in ("0 q", "1 q") if f">{label}<" in html] == ["0 q", "1 q"]


def test_a_heat_map_of_many_layers_labels_blocks() -> None:
    rows = {f"layers.{b}.{n}_proj": [(1, 0.1 * n)] for b in range(60) for n in range(7)}
    html = heat_map("T", rows, "steps")
    assert html.count('class="y"') == 30
    assert ">58<" in html
