"""``bitnet bench report``: draw the documentation's tables and plots from the results."""

from pathlib import Path
from typing import Annotated

import typer

from bitnet.bench import pages, plots
from bitnet.bench.rows import RESULTS
from bitnet.cli.bench_common import say
from bitnet.progress import plain_console
from bitnet.schema import UserError
from bitnet_kernels.bench import report


def report_command(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if a table is stale.")
    ] = False,
    root: Annotated[str, typer.Option(help="Folder of the checkout.")] = ".",
) -> None:
    """Draw tables and plots from docs/results/*.csv.

    Replaces the tables between marked lines in README.md, kernels/README.md, docs/decoding.md and
    docs/training.md. Plots need pip install -e ".[plots]".
    """
    folder = Path(root) / RESULTS
    if not folder.is_dir():
        raise UserError(f"--root: {root} has no {RESULTS}; name a checkout of the project")
    console = plain_console()
    try:
        figures = report.load(folder)
        if not check and not plots.draw(folder, figures):
            say(console, 'no plots: they need matplotlib (pip install -e ".[plots]")')
        stale = pages.stale(Path(root), figures)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not check:
        pages.write(Path(root), stale)
    for name in stale:
        say(console, f"{name}: {'stale; run bitnet bench report' if check else 'written'}")
    if not stale:
        say(console, "every table is up to date")
    elif check:
        raise typer.Exit(1)
