"""``bitnet report``: runs as one page."""

from pathlib import Path
from typing import Annotated

import typer

from bitnet.durable import check_output, write_atomic
from bitnet.progress import plain_console
from bitnet.report import picture
from bitnet.report.page import page
from bitnet.report.runs import read_runs
from bitnet.report.verdict import compare, headline
from bitnet.schema import user_input


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN [BASELINE]...", help="Folders, such as runs/quickstart."),
    ],
    out: Annotated[str, typer.Option(help="HTML file to write. Default: RUN/report.html.")] = "",
    png: Annotated[str, typer.Option(help="Also draw the curves to this PNG file.")] = "",
) -> None:
    """Show a run, and how it compares with others, on one page.

    The page says which run is better and by how much, and whether the ternary weights have settled.
    It has curves, telemetry by layer, samples, sizes and speeds, and opens without a network. It is
    made from config.toml and metrics.jsonl; the runs may be in progress.

    Example: bitnet report runs/quickstart runs/quickstart-fp
    """
    records = read_runs(runs)
    target = Path(out) if out else runs[0] / "report.html"
    check_output("--out", target)
    if png:
        check_output("--png", Path(png))
        picture.draw(records, Path(png))
    with user_input(str(target)):
        write_atomic(target, page(records).encode())
    found = [one for other in records[1:] if (one := compare(records[0], other))]
    console = plain_console(highlight=False, soft_wrap=True)
    console.print(headline(records[0], found))
    for path in filter(None, (str(target), png)):
        console.print(f"written: {path}")
