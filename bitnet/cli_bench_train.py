"""``bitnet bench train``: options, progress and files around :mod:`bitnet.bench.train`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bitnet.bench.rows import merge, read, write
from bitnet.bench.train import SIZES, VARIANTS, Reply, choose_variants, race, variant_config
from bitnet.bench.train_rows import COLUMNS, KEY, as_text, figures, table
from bitnet.bench.worker import WorkerDied, sigterm_exits
from bitnet.cli_convert import pick_device
from bitnet.config import Config, load_config
from bitnet.schema import UserError
from bitnet_kernels.bench import machine
from bitnet_kernels.bench.shapes import choose

RESULTS = Path("docs/results")
QUICK = ("fp", "naive", "ours")

# options that every benchmark has, in one wording
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N. auto: a GPU if any.")]
Threads = Annotated[int, typer.Option(help="Of the CPU. 0: torch's choice.", min=0, max=1024)]
Seed = Annotated[int, typer.Option(help="Of weights and tokens.", min=0, max=1 << 30)]


def train_command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION.KEY=VALUE]",
            help="Of the config, for every variant, such as optim.optimizer=muon.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A model's shape by its size: {', '.join(SIZES)} (8 layers, 2,048 wide); "
            "repeatable. Default: 15m, on a GPU 350m.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(
            help="Or a config, such as configs/15m.toml; repeatable. Its data are not read."
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(VARIANTS)}; repeatable. Default: all but ours-int8 and torchao eager."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="A micro-batch. 0: the config's.", min=0, max=1 << 24)
    ] = 0,
    micro_batches: Annotated[
        int, typer.Option(help="A step. 0: the config's.", min=0, max=1 << 20)
    ] = 0,
    steps: Annotated[int, typer.Option(help="Timed steps of each. 0: 10.", min=0)] = 0,
    warmup: Annotated[int, typer.Option(help="Steps before those. 0: 2.", min=0)] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16. auto: bf16 on a GPU.")] = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"Does it work? {', '.join(QUICK)}, 3 steps of one sequence, unless others are "
            "named.",
        ),
    ] = False,
    out: Annotated[
        str, typer.Option(help="CSV file. Default: docs/results/train_<device>.csv.")
    ] = "",
) -> None:
    """Time a training step: ternary, its full-precision twin, and other implementations.

    \b
    fp         nn.Linear: the full-precision twin
    naive      BitLinear as papers print it, fake quantization in floats
    ours       BitLinear of this package
    ours-int8  the same with model.int8_backward = "both", an approximation
    torchao    torchao's bitnet_training, where that package is installed
    ...-compiled: by torch.compile

    Each variant has a process of its own; they take turns, a step each, so that a machine that
    slows down slows all alike. Speed is told by the ratios within a round, beside peak memory,
    loss and compile time. Rows are written when a model is done; those of an earlier run that
    measured the same thing are replaced.

    A step is train.py's, as long as the config says: 131,072 tokens for configs/15m.toml, a minute
    and a half on 2 cores. Shorter ones: bitnet bench train --tokens 2048 --micro-batches 2

    On a GPU, all there is to know: bitnet bench train --size 350m --size 1b
    """
    target = pick_device(device)
    names = list(variant or (QUICK if quick else ()))
    chosen, absent = choose_variants(names)
    console = Console()
    for line in absent:
        console.print(line, highlight=False)
    steps, warmup = steps or (3 if quick else 10), warmup or (1 if quick else 2)
    if threads:
        torch.set_num_threads(threads)
    (dtype,) = _valid("--dtype", [dtype], ("auto", "fp32", "bf16"))
    asked = _Asked(tokens, micro_batches, steps + warmup, target, dtype, threads, seed, quick)
    subjects = _subjects(config or [], size or [], "350m" if target.type == "cuda" else "15m")
    runs = {  # every mistake is found before anything is timed
        label: asked.configs(paths, [*given, *(overrides or [])], chosen)
        for label, (paths, given) in subjects.items()
    }
    here = machine.describe(target)
    folder = RESULTS if RESULTS.is_dir() else Path()
    path = Path(out) if out else folder / f"train_{here.slug}.csv"
    kept = read(path, COLUMNS)
    _, no_energy = machine.find_meter(target)
    if no_energy:
        console.print(no_energy, highlight=False)
    for label, configs in runs.items():
        try:
            with sigterm_exits():
                replies = _race(console, label, configs, steps, warmup)
        except KeyboardInterrupt:
            console.print(f"stopped; models that were done are in {path}", highlight=False)
            raise typer.Exit(130) from None
        except WorkerDied as death:
            print(f"error: {death}", file=sys.stderr)
            raise typer.Exit(1) from None
        name = " ".join([label, *(overrides or [])])
        new = [as_text(row) for row in figures(name, here, configs, replies, warmup)]
        kept = merge(kept, new, KEY)
        write(path, kept, COLUMNS)
        console.print(table(new), highlight=False, markup=False, soft_wrap=True)
    console.print(f"figures: {path}", highlight=False)


def _valid(option: str, values: list[str], valid: tuple[str, ...]) -> list[str]:
    try:
        return [choose(option, value, valid) for value in values]
    except ValueError as error:
        raise UserError(str(error)) from error


def _subjects(
    configs: list[Path], sizes: list[str], default: str
) -> dict[str, tuple[list[Path], list[str]]]:
    """Label -> config files and overrides."""
    if not configs and not sizes:
        sizes = [default]
    sizes = _valid("--size", sizes, tuple(SIZES))
    labels = {size: "1b-8-layers" if size == "1b" else size for size in sizes}
    named: dict[str, tuple[list[Path], list[str]]] = {str(path): ([path], []) for path in configs}
    return named | {labels[size]: ([], SIZES[size]) for size in sizes}


class _Asked(NamedTuple):
    """Options as given; zeros are the config's."""

    tokens: int
    micro_batches: int
    total_steps: int
    device: torch.device
    dtype: str
    threads: int
    seed: int
    quick: bool

    def configs(
        self, paths: Sequence[Path], overrides: list[str], variants: list[str]
    ) -> dict[str, Config]:
        """Variant -> its config, which says all that a worker has to know."""
        base = load_config(paths, overrides).resolve()
        seq_len, train = base.data.seq_len, base.train
        tokens = self.tokens or seq_len * (1 if self.quick else train.micro_batch)
        if tokens % seq_len:
            near = max(1, round(tokens / seq_len)) * seq_len
            raise UserError(
                f"--tokens: {tokens} is not a multiple of data.seq_len = {seq_len}; the nearest "
                f"that is: {near}"
            )
        usual = 1 if self.quick else max(1, round(train.batch_tokens / tokens))
        n = self.micro_batches or usual
        bf16 = "bf16" in (self.dtype, train.dtype) or self.device.type == "cuda"
        mine = [
            f"train.micro_batch={tokens // seq_len}",
            f"train.batch_tokens={tokens * n}",
            f"train.steps={max(train.steps, self.total_steps)}",
            "train.tokens=0",
            f"train.device={self.device}",
            f"train.dtype={self.dtype if self.dtype != 'auto' else 'bf16' if bf16 else 'fp32'}",
            f"train.threads={self.threads}",
            f"run.seed={self.seed}",
        ]
        return {name: variant_config(paths, [*overrides, *mine], name) for name in variants}


def _race(
    console: Console, label: str, configs: Mapping[str, Config], steps: int, warmup: int
) -> dict[str, list[Reply]]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task(label, total=len(configs) * (steps + warmup))
        begun = -1

        def tick(name: str) -> None:
            nonlocal begun
            begun += 1
            bar.update(task, description=f"{label} {name}", completed=begun)

        replies = race(configs, steps, warmup, tick)
        bar.update(task, description=label, completed=begun + 1)
    return replies
