"""``bitnet bench kernels``: time every kernel against the 16-bit matmul.

:mod:`bitnet_kernels.bench` measures; this file has options, progress and files.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from bitnet.cli.bench_common import (
    Models,
    Shapes,
    Threads,
    Tokens,
    bench_device,
    ending,
    fail,
    given_shapes,
    progress,
    results_path,
    say,
)
from bitnet.cli.common import Device, valid_names
from bitnet.cli.shell import exhausted
from bitnet.progress import plain_console, reporting
from bitnet.schema import UserError
from bitnet_kernels.bench import estimate as estimating
from bitnet_kernels.bench import machine, rows
from bitnet_kernels.bench.contenders import DTYPES, choices, missing
from bitnet_kernels.bench.run import CACHES, Bench, Group, Selection, common_columns, groups
from bitnet_kernels.bench.shapes import GOAL_TOKENS, GOALS, MODELS, TOKENS, shapes_of
from bitnet_kernels.bench.verify import Inexact
from bitnet_kernels.sass import ARCHS

ESTIMATES = "kernels_estimate.csv"
"""A separate file: otherwise every machine without a GPU would have these rows."""


def kernels_command(
    shape: Shapes = None,
    model: Models = None,
    m: Tokens = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="A kernel, family or package: auto, addsub, dot, ...; repeatable."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Dtype of the activations: bf16, fp16, fp32; repeatable."),
    ] = None,
    cache: Annotated[list[str] | None, typer.Option(help="cold or hot. Default: both.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every model's matrices, M = 1 .. 4096, bf16 and fp16.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One matrix, M = 1 and 16.")] = False,
    out: Annotated[
        str, typer.Option(help="CSV file. Default: docs/results/kernels_<device>.csv.")
    ] = "",
    device: Device = "auto",
    threads: Threads = 0,
    replays: Annotated[
        int, typer.Option(help="Timed replays per contender.", min=20, max=10_000)
    ] = 20,
    energy: Annotated[
        bool, typer.Option(help="Measure energy on a GPU: half a second per contender, cold.")
    ] = True,
    estimate: Annotated[
        bool | None,
        typer.Option(
            "--estimate/--no-estimate",
            help="Also what GPUs would take by a static model, to kernels_estimate.csv beside the "
            "other file. Default: where there is no GPU.",
            show_default=False,
        ),
    ] = None,
    arch: Annotated[
        list[str] | None, typer.Option(help="GPU of the estimate, sm_80, ...; default sm_90.")
    ] = None,
) -> None:
    """Time every kernel against the 16-bit matmul.

    Only exact kernels are timed. Contenders take turns in one run, in CUDA graphs on a GPU, with
    weights read from memory (cold) or from the cache (hot). The CSV is written after each group of
    contenders: Ctrl-C loses at most one group, and the same command continues where it stopped.

    Example: bitnet bench kernels --model bitnet-2b4t --m 1 --m 16
    """
    if everything and quick:
        raise UserError("--all and --quick exclude each other")
    target = bench_device(device, threads)
    archs = tuple(valid_names("--arch", arch or ["sm_90"], ARCHS))
    asked = _Asked(
        tuple(given_shapes(shape, model)),
        tuple(dict.fromkeys(m or ())),
        tuple(valid_names("--kernel", kernel or choices(), choices())),
        tuple(valid_names("--dtype", dtype or (), DTYPES)),
        tuple(valid_names("--cache", cache or CACHES, CACHES)),
        replays,
        energy,
    )
    here = machine.describe(target)
    path = results_path(out, f"kernels_{here.slug}.csv")
    kept = _read(path)
    console = plain_console()
    meter, why = machine.find_meter(target)
    for line in filter(None, [*missing(asked.kernels, target), why]):
        say(console, line)
    choice = asked.choice(target.type, everything, quick)
    _measure(console, path, kept, Bench(here, choice, meter=meter, say=partial(say, console)))
    if estimate or (estimate is None and target.type != "cuda"):
        aside = path.with_name(ESTIMATES)
        _estimate(console, aside, archs, asked.choice("cuda", everything, quick))
    say(console, f"figures: {path}; tables and plots: bitnet bench report")


class _Asked(NamedTuple):
    """Options as given; the device chooses empty ones."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    kernels: tuple[str, ...]
    dtypes: tuple[str, ...]
    caches: tuple[str, ...]
    replays: int
    energy: bool

    def choice(self, kind: str, everything: bool, quick: bool) -> Selection:
        """The cases to measure; by default as many as a CPU can do in minutes, and more on a
        GPU."""
        gpu = kind == "cuda"
        shapes: tuple[tuple[int, int], ...]
        if everything:
            shapes, tokens = tuple(shapes_of(list(MODELS))), TOKENS
            dtypes: tuple[str, ...] = ("bf16", "fp16") if gpu else ("bf16", "fp32")
        else:
            shapes = tuple(GOALS) if gpu else ((2560, 6912), (4096, 4096))
            tokens = GOAL_TOKENS if gpu else (1, 8, 16, 64)
            dtypes = ("bf16",) if gpu else ("bf16", "fp32")
        if quick:
            shapes, tokens = shapes[:1], (1, 16)
        return Selection(
            self.shapes or shapes,
            self.tokens or tokens,
            self.kernels,
            self.dtypes or dtypes,
            caches=self.caches,
            replays=self.replays,
            energy=self.energy,
        )


def _measure(console: Console, path: Path, kept: list[rows.Row], bench: Bench) -> None:
    """Measure the groups that are not in the file yet (its rows are ``kept``); write the file after
    each group."""
    everything = list(groups(bench.choice, bench.here.device))
    todo = [group for group in everything if not bench.done(group, kept)]
    is_begun = len(todo) < len(everything)

    def kept_so_far() -> str:
        return f"the same command goes on from {path}" if is_begun else ""

    with ending(console, kept_so_far), progress(console) as bar:
        task = bar.add_task(bench.here.name, total=len(todo))
        for group in todo:
            name = f"{group.n}x{group.k} M={group.m} {group.cache}"
            bar.update(task, description=name)
            try:
                new = bench.measure(group)
            except Inexact as error:
                bar.stop()
                fail(f"not exact, so not timed: {error}", error)
            except RuntimeError as error:
                if not exhausted(error):
                    raise
                hint = f" (what is done is in {path})" if is_begun else ""
                raise UserError(
                    f"out of memory at {name}; choose smaller ones with --shape or --m{hint}"
                ) from error
            kept = rows.merge(kept, new)
            rows.write(path, kept)
            is_begun = True
            say(console, _line(group, new))
            bar.advance(task)


def _read(path: Path) -> list[rows.Row]:
    try:
        return rows.read(path)
    except ValueError as error:
        raise UserError(f"{error}; move the file away or name another with --out") from error


def _line(group: Group, new: list[rows.Row]) -> str:
    """One line that shows a group's result."""
    best: dict[str, float] = {}
    for row in new:
        if row.what != "linear" or (row.contender == "bitnet" and row.dtype == "fp32"):
            continue
        best[row.family] = max(best.get(row.family, 0.0), row.ratio_to_16bit or 0.0)
    sixteen = min(row.median_us or 0.0 for row in new if row.family == "16-bit")
    ratios = ", ".join(
        f"{name} {ratio:.2f}x" for name, ratio in best.items() if ratio and name != "16-bit"
    )
    return (
        f"{group.n}x{group.k} M={group.m} {group.cache}: 16-bit {sixteen:,.1f} us; {ratios or '-'}"
    )


def _estimate(console: Console, path: Path, archs: tuple[str, ...], choice: Selection) -> None:
    common = common_columns("") | {"driver": ""}
    try:
        with reporting("compiling kernels for GPUs that are not here"):
            new = list(
                estimating.estimates(archs, choice.shapes, choice.tokens, choice.kernels, common)
            )
    except estimating.Unavailable as reason:
        say(console, str(reason))
        return
    old = [row for row in _read(path) if row.code == common["code"]]  # drop rows of other kernels
    rows.write(path, rows.merge(old, new))
    say(console, f"estimates: {path}, {len(new)} rows, nothing was run")
