"""The report as a picture, for a README; needs matplotlib, which is an optional dependency."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet.durable import write_atomic
from bitnet.report import verdict
from bitnet.report.runs import RunRecord
from bitnet.schema import UserError, user_input


def draw(runs: Sequence[RunRecord], path: Path) -> None:
    """Write a PNG: the headline, validation loss, flip rate and zeros.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--png: needs matplotlib: pip install 'bitnet-train[plots]'") from error
    name, unit = verdict.evaluations(runs[0])
    panels = [
        ("validation loss", unit, name, 1),
        ("flip rate between readings", "% of the codes", "ternary/flip_rate", 100),
        ("codes that are 0", "% of the codes", "ternary/zeros", 100),
    ]
    panels = [panel for panel in panels if any(run.points(panel[2]) for run in runs)]
    comparisons = [one for other in runs[1:] if (one := verdict.compare(runs[0], other))]
    figure: Any = Figure(figsize=(max(6, 4 * len(panels)), 4.2), layout="constrained")
    title = textwrap.fill(verdict.headline(runs[0], comparisons), 32 * len(panels) + 30)
    figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    for axis, (title, label, key, factor) in zip(
        figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False
    ):
        for number, run in enumerate(runs):
            if points := run.points(key):
                steps, values = zip(*points, strict=True)
                x = [run.tokens(step) for step in steps]
                y = [factor * value for value in values]
                axis.plot(x, y, color=f"C{number}", marker=".", label=_plain(run.name))
        axis.set(title=title, xlabel="tokens", ylabel=label)
        for text in axis.legend().get_texts():
            text.set_parse_math(False)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    with user_input(f"--png: cannot write {path}"):
        write_atomic(path, image.getvalue())


def _plain(name: str) -> str:
    """A label that matplotlib shows as it is; it would hide one that begins with an underscore."""
    return f" {name}" if name.startswith("_") else name
