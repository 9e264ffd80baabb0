"""``bitnet bench train``: options, progress and files around :mod:`bitnet.bench.train`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console

from bitnet.bench.rows import as_figures, counted, merge, read, write
from bitnet.bench.train import SIZES, USUAL, VARIANTS, Reply, choose_variants, race, variant_config
from bitnet.bench.train_rows import COLUMNS, KEY, figures, table
from bitnet.bench.worker import WorkerDied
from bitnet.cli.bench_common import (
    NOT_WRITTEN,
    Seed,
    Threads,
    bench_device,
    ending,
    progress,
    results_path,
    say,
)
from bitnet.cli.common import Device, valid_names
from bitnet.config import Config, load_config
from bitnet.progress import plain_console
from bitnet.schema import UserError
from bitnet.training.throughput import peak_flops
from bitnet_kernels.bench import machine

EAGER = ("fp", "naive", "ours")
"""Variants measured by default on a CPU, where compiling a step takes minutes."""
CPU_TOKENS = 2048
"""Tokens per micro-batch with --size on a CPU, two per step: seconds instead of minutes."""
PEAK_TRIES = 5

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]",
        help="Config keys for every variant, such as optim.optimizer=muon.",
        show_default=False,
    ),
]
Sizes = Annotated[
    list[str] | None,
    typer.Option(
        help=f"A model's shape by its size: {', '.join(SIZES)} (8 layers, 2,048 wide); "
        "repeatable. Default: 15m, on a GPU 350m.",
        show_default=False,
    ),
]
Configs = Annotated[
    list[Path] | None,
    typer.Option(help="Or a config, such as configs/15m.toml; repeatable. Its data are not read."),
]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        help=f"{', '.join(VARIANTS)}; repeatable. Default: {', '.join(EAGER)}, on a GPU also all "
        "compiled ones.",
        show_default=False,
    ),
]
BatchTokens = Annotated[
    int,
    typer.Option(
        help=f"Tokens per micro-batch. 0: the config's; with --size on a CPU {CPU_TOKENS}.",
        min=0,
        max=1 << 24,
    ),
]
MicroBatches = Annotated[
    int,
    typer.Option(
        help="Micro-batches per step. 0: as many as make the config's step; with --size on a "
        f"CPU, {2 * CPU_TOKENS} tokens.",
        min=0,
        max=1 << 20,
    ),
]
Steps = Annotated[
    int, typer.Option(help="Timed steps per variant. 0: 5, on a GPU 10.", min=0, max=1 << 20)
]
Warmup = Annotated[int, typer.Option(help="Untimed steps before those. 0: 2.", min=0, max=1 << 20)]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help=f"A short check that it works: {', '.join(EAGER)}, 3 steps of one sequence, unless "
        "others are named. Writes nothing without --out.",
    ),
]


def train_command(
    overrides: Overrides = None,
    size: Sizes = None,
    config: Configs = None,
    variant: Variants = None,
    tokens: BatchTokens = 0,
    micro_batches: MicroBatches = 0,
    steps: Steps = 0,
    warmup: Warmup = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16. auto: bf16 on a GPU.")] = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    quick: Quick = False,
    out: Annotated[
        str, typer.Option(help="CSV file. Default: docs/results/train_<device>.csv.")
    ] = "",
) -> None:
    """Time a training step: ternary layers, their baseline, and others.

    \b
    fp         nn.Linear: the full-precision baseline
    naive      BitLinear as papers print it, fake quantization in floats
    ours       BitLinear of this package
    ours-int8  the same with model.int8_backward = "both", an approximation
    torchao    torchao's bitnet_training, if that package is installed
    ...-compiled: by torch.compile

    Each variant runs in its own process. They take turns, one step each, so that a machine that
    slows down slows all of them. Results are ratios of speed within a round, peak memory, loss and
    compile time. Rows are written after each model. They replace the rows of an earlier run with
    the same case and the same number of steps.

    A step is train.py's. With --size on a CPU it has 4,096 tokens, so that the default takes
    minutes. With --config it has the config's tokens: 131,072 for configs/15m.toml, a minute and a
    half on 2 cores.

    The full measurement on a GPU: bitnet bench train --size 350m --size 1b
    """
    target = bench_device(device, threads)
    on_cpu = target.type == "cpu"
    named = valid_names("--variant", variant or [], VARIANTS)
    chosen, lines = choose_variants(named or (EAGER if quick or on_cpu else USUAL))
    if on_cpu and not quick and not named:
        lines.append(f"on a CPU {', '.join(EAGER)} are measured; --variant names others")
    steps = steps or (3 if quick else 5 if on_cpu else 10)
    warmup = warmup or (1 if quick else 2)
    (dtype,) = valid_names("--dtype", [dtype], ("auto", "fp32", "bf16"))
    more = overrides or []
    asked = _Asked(tokens, micro_batches, steps + warmup, target, dtype, threads, seed, quick, more)
    subjects = _subjects(config or [], size or [], "15m" if on_cpu else "350m")
    runs = {  # finds every mistake before anything is printed or timed
        label: asked.configs(paths, given, chosen) for label, (paths, given) in subjects.items()
    }
    here = machine.describe(target)
    path = results_path(out, f"train_{here.slug}.csv") if out or not quick else None
    kept = read(path, COLUMNS) if path else []
    console = plain_console()
    _, no_energy = machine.find_meter(target)
    for label, configs in runs.items():
        lines.append(_announcement(label, configs, steps + warmup))
    for line in [*filter(None, [no_energy]), *lines]:
        say(console, line)
    saved: list[str] = []

    def kept_so_far() -> str:
        return f"{', '.join(saved)}: figures are in {path}" if saved else ""

    for label, configs in runs.items():
        with ending(console, kept_so_far, WorkerDied):
            replies, peak = _race(console, label, configs, steps, warmup)
        name = " ".join([label, *more])
        rows = figures(name, here, configs, replies, warmup, peak)
        new = [as_figures(asdict(row)) for row in rows]
        if path:
            kept = merge(kept, new, KEY)
            write(path, kept, COLUMNS)
            saved.append(label)
        say(console, table(new))
    say(console, f"figures: {path}" if path else NOT_WRITTEN)


def _announcement(label: str, configs: Mapping[str, Config], steps: int) -> str:
    train = next(iter(configs.values())).train
    return (
        f"{label}: {counted(len(configs), 'variant')} x {counted(steps, 'step')} of "
        f"{train.batch_tokens:,} tokens"
    )


def _subjects(
    configs: list[Path], sizes: list[str], default: str
) -> dict[str, tuple[list[Path], list[str]]]:
    """Label -> config files and overrides."""
    if not configs and not sizes:
        sizes = [default]
    sizes = valid_names("--size", sizes, tuple(SIZES))
    labels = {size: "1b-8-layers" if size == "1b" else size for size in sizes}
    named: dict[str, tuple[list[Path], list[str]]] = {str(path): ([path], []) for path in configs}
    return named | {labels[size]: ([], SIZES[size]) for size in sizes}


class _Asked(NamedTuple):
    """Options as given; a 0 means the config's value."""

    tokens: int
    micro_batches: int
    total_steps: int
    device: torch.device
    dtype: str
    threads: int
    seed: int
    quick: bool
    overrides: list[str]

    def configs(
        self, paths: Sequence[Path], given: list[str], variants: list[str]
    ) -> dict[str, Config]:
        """Variant -> its config, which holds everything that a worker needs.

        Arguments:
            paths, given: config files, or overrides that set the model's size.
        """
        base = load_config(paths, [*given, *self.overrides]).resolve()
        seq_len, train = base.data.seq_len, base.train
        micro, step = seq_len * train.micro_batch, train.batch_tokens
        own = ("train.micro_batch", "train.batch_tokens")
        if self.quick:
            micro = step = seq_len
        elif self.device.type == "cpu" and not paths and not _names(self.overrides, own):
            micro = max(1, CPU_TOKENS // seq_len) * seq_len
            step = 2 * micro
        tokens = self.tokens or micro
        if tokens % seq_len:
            near = max(1, round(tokens / seq_len)) * seq_len
            raise UserError(
                f"--tokens: {tokens} is not a multiple of data.seq_len = {seq_len}; the nearest "
                f"that is: {near}"
            )
        n = self.micro_batches or max(1, round(step / tokens))
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
        whole = [*given, *self.overrides, *mine]
        return {name: variant_config(paths, whole, name) for name in variants}


def _names(overrides: Sequence[str], keys: Sequence[str]) -> bool:
    return any(word.partition("=")[0].strip() in keys for word in overrides)


def _race(
    console: Console, label: str, configs: Mapping[str, Config], steps: int, warmup: int
) -> tuple[dict[str, list[Reply]], tuple[float, str]]:
    """The variants' replies, and the peak FLOP/s with its source. The peak is the best of several
    measurements before the first turns: another program may slow down one, but rarely all."""
    train = next(iter(configs.values())).train
    device = torch.device(train.device)
    dtype = torch.bfloat16 if train.dtype == "bf16" else torch.float32
    peaks: list[tuple[float, str]] = []
    with progress(console) as bar:
        task = bar.add_task(label, total=len(configs) * (steps + warmup))
        begun = -1

        def tick(name: str) -> None:
            nonlocal begun
            begun += 1
            bar.update(task, description=f"{label} {name}", completed=begun)
            if len(peaks) < PEAK_TRIES:
                peaks.append(peak_flops(device, dtype))
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # the workers need it

        replies = race(configs, steps, warmup, tick)
        bar.update(task, description=label, completed=begun + 1)
    return replies, max(peaks)
