"""``bitnet bench``: time the kernels, and draw tables and plots from the figures.

The work is done in :mod:`bitnet_kernels.bench`; here are options, progress, files and plots.
"""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console

from bitnet.bench import decode_table, train_rows
from bitnet.bench.exact import COLUMNS, check_all
from bitnet.bench.rows import Figures, write
from bitnet.cli.bench_decode import decode_command
from bitnet.cli.bench_train import (
    RESULTS,
    Device,
    Threads,
    ending,
    progress,
    results_path,
    say,
    train_command,
    valid_names,
)
from bitnet.cli.common import pick_device
from bitnet.progress import Reports, plain_console, reporting
from bitnet.schema import UserError
from bitnet_kernels.bench import estimate as estimating
from bitnet_kernels.bench import machine, report, rows
from bitnet_kernels.bench.contenders import DTYPES, choices, missing
from bitnet_kernels.bench.exact import small_cases, timed_cases
from bitnet_kernels.bench.run import CACHES, Bench, Choice, Group, common_columns, groups
from bitnet_kernels.bench.shapes import (
    GOAL_TOKENS,
    GOALS,
    MODELS,
    TOKENS,
    parse_shape,
    shapes_of,
)
from bitnet_kernels.bench.verify import Inexact
from bitnet_kernels.dispatch import key_of
from bitnet_kernels.sass import ARCHS

app = typer.Typer(
    help="Measure speed, and draw the tables and plots of the documentation from the figures.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("train")(train_command)
app.command("decode")(decode_command)
MAX_TOKENS = 1 << 20
ESTIMATES = "kernels_estimate.csv"
"""Beside the measured file: machines without a GPU would each have these rows."""


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


@app.command("kernels")
def kernels_command(
    shape: Shapes = None,
    model: Models = None,
    m: Tokens = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="A kernel, family or package: auto, addsub, dot, ...; repeatable."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Of the activations: bf16, fp16, fp32; repeatable.")
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
    replays: Annotated[int, typer.Option(help="Timed replays of each.", min=20, max=10_000)] = 20,
    energy: Annotated[bool, typer.Option(help="Half a second of each on a GPU, cold.")] = True,
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

    Nothing is timed that is not exact. Contenders take turns in one run, in CUDA graphs on a GPU,
    with weights that come from memory (cold) or from the cache (hot). The CSV is written after each
    group of contenders: Ctrl-C loses one at most, and the same command goes on where it was.

    Example: bitnet bench kernels --model bitnet-2b4t --m 1 --m 16
    """
    if everything and quick:
        raise UserError("--all and --quick exclude each other")
    target = _device(device)
    if threads:
        torch.set_num_threads(threads)
    archs = _valid("--arch", arch, ARCHS) or ("sm_90",)
    asked = _Asked(
        tuple(dict.fromkeys([*_given(shape), *_shapes_of(model)])),
        tuple(dict.fromkeys(m or ())),
        _valid("--kernel", kernel, choices()) or choices(),
        _valid("--dtype", dtype, DTYPES),
        _valid("--cache", cache, CACHES) or CACHES,
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


@app.command("exact")
def exact_command(
    shape: Shapes = None,
    m: Tokens = None,
    jobs: Annotated[
        int, typer.Option(help="Processes that compile. 0: one a CPU, 16 at most.", min=0, max=256)
    ] = 0,
    limit: Annotated[
        float,
        typer.Option(help="Seconds of a case before its process is ended.", min=1, max=1e6),
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

    A few shapes of each operator, by every kernel, against the CPU's exact arithmetic; then the
    products of --shape and --m, which `bitnet bench kernels` times. Kernels are compiled side by
    side in several processes. A case that crashes or hangs ends no other. The CSV is written anew,
    after each case. Exit code 1 where something is not exact.

    Example: bitnet bench exact --shape 2560x6912 --m 1 --m 16
    """
    shapes, target = _given(shape), _device(device)
    cases = small_cases()
    if quick:
        cases = [case for case in cases if case.m == 1]
    elif target.type == "cuda":
        cases += timed_cases(shapes or tuple(GOALS), m or GOAL_TOKENS)
    here = machine.describe(target)
    path = results_path(out, f"exact_{here.slug}.csv")
    columns = common_columns(here.name) | {"device": here.name, "driver": here.driver}
    common = {name: str(columns[name]) for name in COLUMNS if name in columns}
    console, rows_had = plain_console(), list[Figures]()
    jobs = min(jobs or min(os.cpu_count() or 1, 16), len(cases))

    def kept_so_far() -> str:
        return f"{len(rows_had)} of {len(cases)} cases are in {path}" if rows_had else ""

    with ending(console, kept_so_far), progress(console) as bar:
        task = bar.add_task(here.name, total=len(cases))
        with closing(check_all(cases, str(target), jobs, limit)) as checked:
            for row in checked:
                rows_had.append(row | common)
                write(path, rows_had, COLUMNS)
                bar.update(task, advance=1)
                if row["exact"] == "no":
                    say(console, f"not exact: {row['why']}")
    wrong = sum(row["exact"] == "no" for row in rows_had)
    absent = sum(row["exact"] == "" for row in rows_had)
    say(
        console,
        f"{len(rows_had) - wrong - absent} of {len(rows_had)} cases are exact, {wrong} are not"
        + (f", {absent} are not for this device" if absent else ""),
    )
    say(console, f"figures: {path}")
    if wrong:
        raise typer.Exit(1)


class _Asked(NamedTuple):
    """Options as given; empty ones are chosen by device."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    kernels: tuple[str, ...]
    dtypes: tuple[str, ...]
    caches: tuple[str, ...]
    replays: int
    energy: bool

    def choice(self, kind: str, everything: bool, quick: bool) -> Choice:
        """What is measured: a CPU without further words gets what it can do in minutes."""
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
        return Choice(
            self.shapes or shapes,
            self.tokens or tokens,
            self.kernels,
            self.dtypes or dtypes,
            caches=self.caches,
            replays=self.replays,
            energy=self.energy,
        )


def _device(name: str) -> torch.device:
    device = pick_device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and events are of the current device
    return device


def _valid(option: str, values: list[str] | None, valid: Iterable[str]) -> tuple[str, ...]:
    return tuple(valid_names(option, values or (), tuple(valid)))


def _given(shapes: list[str] | None) -> list[tuple[int, int]]:
    try:
        return [parse_shape(text) for text in shapes or ()]
    except ValueError as error:
        raise UserError(str(error)) from error


def _shapes_of(models: list[str] | None) -> list[tuple[int, int]]:
    return shapes_of(list(_valid("--model", models, MODELS)))


def _measure(console: Console, path: Path, kept: list[rows.Row], bench: Bench) -> None:
    """Measure what the file, whose rows are ``kept``, does not have yet, writing it after each
    group."""
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
                print(f"error: not exact, so not timed: {error}", file=sys.stderr)
                raise typer.Exit(1) from error
            except (torch.OutOfMemoryError, RuntimeError) as error:
                said = str(error)
                if not isinstance(error, torch.OutOfMemoryError) and (
                    "not enough memory" not in said and "can't allocate memory" not in said
                ):
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
    """What a group came to, for those who watch."""
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


def _estimate(console: Console, path: Path, archs: tuple[str, ...], choice: Choice) -> None:
    common = common_columns("") | {"driver": ""}
    try:
        with reporting("compiling kernels for GPUs that are not here"):
            new = list(
                estimating.estimates(archs, choice.shapes, choice.tokens, choice.kernels, common)
            )
    except estimating.Unavailable as reason:
        say(console, str(reason))
        return
    old = [row for row in _read(path) if row.code == common["code"]]  # others are of other kernels
    rows.write(path, rows.merge(old, new))
    say(console, f"estimates: {path}, {len(new)} rows, nothing was run")


@app.command("tune")
def tune_command(
    shape: Shapes = None,
    model: Models = None,
    m: Tokens = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
) -> None:
    """Find the fastest kernels for shapes on this GPU, and keep them.

    Every candidate is checked, then timed; the best go to the user's cache, before the table that
    ships with the package. Minutes a shape, since each candidate is compiled.

    Example: bitnet bench tune --model bitnet-2b4t --m 1 --m 16
    """
    shapes = tuple(dict.fromkeys([*_given(shape), *_shapes_of(model)])) or tuple(GOALS)
    target = _device(device)
    if target.type != "cuda":
        raise UserError("--device: tuning times kernels on a GPU; expected cuda or cuda:N")
    if find_spec("triton") is None:
        raise UserError("tuning needs Triton, which is not installed")
    from bitnet_kernels.tune import TOKENS as TABLE_TOKENS
    from bitnet_kernels.tune import Timer, tune

    tokens = tuple(dict.fromkeys(m or TABLE_TOKENS))
    console = plain_console()
    with Reports(console=console) as bar:
        task = bar.add_task("", total=len(shapes) * len(tokens))
        begun = -1

        def progress(text: str) -> None:
            nonlocal begun
            begun += 1
            bar.update(task, description=text, completed=begun)

        capability, name = key_of(target)
        try:
            path = tune(shapes, tokens, name, capability, Timer(target), progress)
        except RuntimeError as error:
            if "is not exact" not in str(error):
                raise
            bar.stop()
            print(f"error: {error}; what went before is kept", file=sys.stderr)
            raise typer.Exit(1) from error
    say(console, f"tuned: {path}")


@app.command("report")
def report_command(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if a table is stale.")
    ] = False,
    root: Annotated[str, typer.Option(help="The checkout.")] = ".",
) -> None:
    """Draw tables and plots from docs/results/*.csv.

    The tables of kernels/README.md, docs/decoding.md and docs/training.md stand between marked
    lines and are replaced there. Plots need pip install -e ".[plots]".
    """
    folder = Path(root) / RESULTS
    if not folder.is_dir():
        raise UserError(f"--root: {root} has no {RESULTS}; name a checkout of the project")
    console = plain_console()
    try:
        figures = report.load(folder)
        if not check:
            _draw(console, folder, figures)
        images = {path.name for path in folder.glob("kernels_*.png")}
        stale = _tables(Path(root), figures, images, check)
    except ValueError as error:
        raise UserError(str(error)) from error
    for name in stale:
        say(console, f"{name}: {'stale; run bitnet bench report' if check else 'written'}")
    if not stale:
        say(console, "every table is up to date")
    elif check:
        raise typer.Exit(1)


def _tables(root: Path, figures: list[rows.Row], images: set[str], check: bool) -> list[str]:
    """Names of the files whose tables are not those of the figures; they are mended unless only
    checked."""
    marks = ("<!-- kernels:begin -->", "<!-- kernels:end -->")
    regions: list[tuple[str, tuple[str, str], Callable[[], str]]] = [
        ("kernels/README.md", marks, lambda: report.details(figures, images)),
        (
            "kernels/README.md",
            ("<!-- machine-code:begin -->", "<!-- machine-code:end -->"),
            lambda: report.machine_code(root / RESULTS / "machine_code.csv"),
        ),
    ]
    for page, mark, load, table in (
        ("docs/decoding.md", "decode", decode_table.load, decode_table.table),
        ("docs/training.md", "training", train_rows.load, train_rows.table),
    ):
        if (root / page).exists():
            around = (f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->")
            regions.append((page, around, partial(table, load(root / RESULTS))))
    stale = []
    for name, (begin, end), body in regions:
        text = (root / name).read_text(encoding="utf-8")
        fresh = report.replace(text, begin, end, body(), name)
        if fresh != text:
            stale.append(name)
            if not check:
                (root / name).write_text(fresh, encoding="utf-8")
    return list(dict.fromkeys(stale))


def _draw(console: Console, folder: Path, figures: list[rows.Row]) -> None:
    """The PNGs of every device, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(console, 'no plots: they need matplotlib (pip install -e ".[plots]")')
        return
    for view in report.views(figures, "measured") + report.views(figures, "estimate"):
        shapes = [shape for shape in view.shapes() if shape in GOALS] or view.shapes()[-4:]
        for kind in report.FIGURES:
            lines = {shape: report.curves(view, kind, shape) for shape in shapes}
            if not any(lines.values()):
                continue
            picture = Figure(figsize=(4 * len(shapes), 3.4), layout="constrained")
            label = "ratio to 16-bit" if kind == "speedup" else "share of the roofline"
            picture.suptitle(f"{view.device}, {view.source}: {label}")
            axes = picture.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
            for axis, (shape, named) in zip(axes, lines.items(), strict=True):
                for name, points in named.items():
                    axis.plot(*zip(*points, strict=True), marker="o", label=name)
                if kind == "speedup":
                    axis.axhline(1.0, color="gray", linewidth=0.8)
                    if view.has_goals and shape in GOALS:
                        floors = [(m, goal.floor) for m, goal in GOALS[shape].items()]
                        axis.plot(*zip(*floors, strict=True), "k--", label="floor")
                axis.set(title=f"{shape[0]} x {shape[1]}", xlabel="M", ylabel=label)
                axis.set_xscale("log", base=2)
                axis.set_xticks(view.tokens(), [str(m) for m in view.tokens()])
                axis.set_ylim(bottom=0)
                if named:
                    axis.legend()
            picture.savefig(folder / report.image_name(view, kind), dpi=110)
