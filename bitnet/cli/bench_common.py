"""Shared code of the benchmarks: options, result files, progress, and how they end."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Never

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bitnet.bench.rows import RESULTS
from bitnet.cli.common import pick_device, valid_names
from bitnet.durable import check_output
from bitnet.progress import Reports
from bitnet.schema import UserError
from bitnet_kernels.bench.shapes import MODELS, parse_shape, shapes_of

MAX_TOKENS = 1 << 20
NOT_WRITTEN = "nothing is written; --out FILE keeps the figures"

Threads = Annotated[
    int, typer.Option(help="Threads of the CPU. 0: torch's choice.", min=0, max=1024)
]
Seed = Annotated[int, typer.Option(help="Seed of weights and tokens.", min=0, max=1 << 30)]
Shapes = Annotated[
    list[str] | None, typer.Option(help="N x K of a matrix, such as 4096x14336; repeatable.")
]
Models = Annotated[
    list[str] | None,
    typer.Option(help=f"The matrices of a model: {', '.join(MODELS)}; repeatable."),
]
Tokens = Annotated[
    list[int] | None, typer.Option(help="Tokens; repeatable.", min=1, max=MAX_TOKENS)
]


def bench_device(name: str, threads: int = 0) -> torch.device:
    """:func:`pick_device`; a GPU given by number becomes the current device, to which streams,
    graphs and events belong. ``threads``: of torch on the CPU; 0: torch's choice."""
    device = pick_device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    if threads:
        torch.set_num_threads(threads)
    return device


def given_shapes(shapes: list[str] | None, models: list[str] | None) -> list[tuple[int, int]]:
    """(N, K) of the given shapes and of the models' matrices, without duplicates."""
    try:
        parsed = [parse_shape(text) for text in shapes or ()]
    except ValueError as error:
        raise UserError(str(error)) from error
    named = shapes_of(valid_names("--model", models or (), MODELS))
    return list(dict.fromkeys([*parsed, *named]))


def results_path(out: str, name: str) -> Path:
    """The file ``out``, else ``name`` beside the published results or in the current folder.

    Creates the file's folder.

    Raises:
        UserError: the file cannot be written. Raised before measuring, which may take hours.
    """
    path = Path(out) if out else (RESULTS if RESULTS.is_dir() else Path()) / name
    check_output("--out", path)
    return path


def progress(console: Console) -> Progress:
    """The progress bar of every benchmark. It estimates the remaining time from the last hour
    instead of the usual half minute, since a step may take longer than that."""
    return Reports(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=3600,
    )


def say(console: Console, text: str) -> None:
    """Print lines unchanged, for any terminal width."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def ending(console: Console, kept: Callable[[], str], *failures: type[Exception]) -> Iterator[None]:
    """End a benchmark that stops early.

    Ctrl-C ends it with exit code 130 and a line that contains ``kept()``, which describes the
    file's rows ("" if none). One of the ``failures`` ends it with exit code 1 and its message.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(console, f"stopped; {kept() or 'nothing is written'}")
        raise typer.Exit(130) from None
    except failures as error:
        fail(str(error), error)


def fail(message: str, cause: BaseException) -> Never:
    """End the command with exit code 1 and the message on stderr, without a traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1) from cause
