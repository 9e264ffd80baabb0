"""``bitnet bench exact``: check that every operator is right on this device."""

import os
from collections.abc import Sequence
from contextlib import closing
from typing import Annotated

import torch
import typer

from bitnet.bench.exact import COLUMNS, check_all
from bitnet.bench.rows import Figures, write
from bitnet.cli.bench_common import (
    Shapes,
    Tokens,
    bench_device,
    ending,
    given_shapes,
    progress,
    results_path,
    say,
)
from bitnet.cli.common import Device
from bitnet.progress import plain_console
from bitnet_kernels.bench import machine
from bitnet_kernels.bench.exact import Case, small_cases, timed_cases
from bitnet_kernels.bench.run import common_columns
from bitnet_kernels.bench.shapes import GOAL_TOKENS, GOALS


def exact_command(
    shape: Shapes = None,
    m: Tokens = None,
    jobs: Annotated[
        int,
        typer.Option(help="Processes that compile. 0: one per CPU, 16 at most.", min=0, max=256),
    ] = 0,
    limit: Annotated[
        float,
        typer.Option(help="Seconds per case before its process is ended.", min=1, max=1e6),
    ] = 120.0,
    device: Device = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Single tokens, and no large products.")
    ] = False,
    out: Annotated[
        str, typer.Option(help="CSV file. Default: docs/results/exact_<device>.csv.")
    ] = "",
) -> None:
    """Check that every operator is right on this device.

    Compares a few shapes of each operator, by every kernel, with the CPU's exact arithmetic; then
    the products of --shape and --m, which `bitnet bench kernels` times. Several processes compile
    kernels in parallel. A case that crashes or hangs ends no other case. The CSV is rewritten after
    each case. Exit code 1 if anything is not exact.

    Example: bitnet bench exact --shape 2560x6912 --m 1 --m 16
    """
    shapes, target = given_shapes(shape, None), bench_device(device)
    cases = _cases(target, shapes or list(GOALS), m or GOAL_TOKENS, quick)
    here = machine.describe(target)
    path = results_path(out, f"exact_{here.slug}.csv")
    columns = common_columns(here.name) | {"device": here.name, "driver": here.driver}
    common = {name: str(columns[name]) for name in COLUMNS if name in columns}
    console, rows = plain_console(), list[Figures]()
    jobs = min(jobs or min(os.cpu_count() or 1, 16), len(cases))

    def kept_so_far() -> str:
        return f"{len(rows)} of {len(cases)} cases are in {path}" if rows else ""

    with ending(console, kept_so_far), progress(console) as bar:
        task = bar.add_task(here.name, total=len(cases))
        with closing(check_all(cases, str(target), jobs, limit)) as checked:
            for row in checked:
                rows.append(row | common)
                write(path, rows, COLUMNS)
                bar.update(task, advance=1)
                if row["exact"] == "no":
                    say(console, f"not exact: {row['why']}")
    say(console, _summary(rows))
    say(console, f"figures: {path}")
    if any(row["exact"] == "no" for row in rows):
        raise typer.Exit(1)


def _cases(
    device: torch.device, shapes: Sequence[tuple[int, int]], tokens: Sequence[int], quick: bool
) -> list[Case]:
    cases = small_cases()
    if quick:
        return [case for case in cases if case.m == 1]
    return cases + (timed_cases(shapes, tokens) if device.type == "cuda" else [])


def _summary(rows: list[Figures]) -> str:
    wrong = sum(row["exact"] == "no" for row in rows)
    absent = sum(row["exact"] == "" for row in rows)
    summary = f"{len(rows) - wrong - absent} of {len(rows)} cases are exact, {wrong} are not"
    return summary + (f", {absent} are not for this device" if absent else "")
