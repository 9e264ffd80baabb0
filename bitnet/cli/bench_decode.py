"""``bitnet bench decode``: options, progress and files around :mod:`bitnet.bench.decode`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console

from bitnet.bench import peers_table
from bitnet.bench.decode import (
    PEERS,
    SIZES,
    Inexact,
    Race,
    fitting,
    free_bytes,
    held_bytes,
    refusals,
    usual,
)
from bitnet.bench.decode_profile import COLUMNS as PROFILE_COLUMNS
from bitnet.bench.decode_profile import Profile, measure, write_profile
from bitnet.bench.decode_table import (
    COLUMNS,
    KEY,
    NOTHING,
    Subject,
    common_columns,
    figures,
    stored,
    table,
)
from bitnet.bench.decode_worker import CONTENDERS, LLAMA, Case, Job
from bitnet.bench.rows import Figures, merge, read, write
from bitnet.bench.worker import WorkerDied
from bitnet.cli.bench_common import (
    NOT_WRITTEN,
    Seed,
    bench_device,
    ending,
    progress,
    results_path,
    say,
)
from bitnet.cli.common import Device, valid_names
from bitnet.engine.decoder import LARGEST_BATCH
from bitnet.export.folder import read_config
from bitnet.model import ModelConfig
from bitnet.progress import plain_console, reporting
from bitnet.schema import UserError
from bitnet.summary import human
from bitnet_kernels.bench import machine
from bitnet_kernels.bench.machine import Machine


class _Usual(NamedTuple):
    """The default measurements."""

    sizes: tuple[str, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    new: int
    rounds: int


CPU = _Usual(("60m", "110m"), (1, 8), (128,), 32, 5)
GPU = _Usual(("700m", "2b"), (1, 8, 32), (128,), 128, 7)
_BITNETS = tuple(size for size in SIZES if not size.endswith("-silu"))
ALL = _Usual(_BITNETS, (1, 8, 32), (128, 2048), 128, 7)
BESIDE = _Usual(("110m-silu", "730m-silu"), (1,), (128,), 64, 7)
QUICK = _Usual(("60m",), (1,), (32,), 8, 2)
PROFILE = _Usual(("110m",), (1,), (128,), 16, 1)

Sizes = Annotated[
    list[str] | None,
    typer.Option(
        help=f"A model's shape by its size: {', '.join(SIZES)}; repeatable. Default: 60m and "
        "110m, on a GPU 700m and 2b.",
        show_default=False,
    ),
]
Contenders = Annotated[
    list[str] | None,
    typer.Option(help=f"{', '.join(CONTENDERS)}; repeatable. Default: all that can run here."),
]
Batches = Annotated[
    list[int] | None,
    typer.Option(
        help="Rows generated together; repeatable. Default: 1, 8, on a GPU also 32.",
        min=1,
        max=LARGEST_BATCH,
        show_default=False,
    ),
]
Prompts = Annotated[
    list[int] | None,
    typer.Option(
        help="Tokens per prompt; repeatable. Default: 128.",
        min=1,
        max=1 << 20,
        show_default=False,
    ),
]
New = Annotated[
    int, typer.Option(help="Tokens to generate per row. 0: 32, on a GPU 128.", min=0, max=1 << 20)
]
Rounds = Annotated[
    int,
    typer.Option(help="Timed generations per contender. 0: 5, on a GPU 7.", min=0, max=10_000),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="A short check that it works: ours-auto and the baseline, 60m, 8 tokens, 2 rounds, "
        "unless others are named. Writes nothing without --out.",
    ),
]
Everything = Annotated[
    bool, typer.Option("--all", help="Every size, batch 1, 8, 32, prompt 128 and 2048.")
]
Threads = Annotated[
    list[int] | None,
    typer.Option(
        help="Threads of the CPU. 0: torch's choice.", min=0, max=1024, show_default=False
    ),
]
Peers = Annotated[
    bool,
    typer.Option(
        "--peers",
        help="Beside llama.cpp, on the same weights: shapes that GGUF carries, 1 and 2 threads. "
        'Needs pip install "bitnet-train[peers]".',
    ),
]
Profiled = Annotated[
    bool,
    typer.Option("--profile", help="Where the time of one contender's step goes, by operation."),
]
Out = Annotated[
    str,
    typer.Option(
        help="CSV file. Default: docs/results/decode_<device>.csv; of a profile, "
        "docs/results/profile_decode_<device>.csv."
    ),
]


def decode_command(
    size: Sizes = None,
    model: Annotated[
        str, typer.Option(help="Or a folder with a ternary model. Weights are random otherwise.")
    ] = "",
    contender: Contenders = None,
    batch: Batches = None,
    prompt: Prompts = None,
    new: New = 0,
    rounds: Rounds = 0,
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    quick: Quick = False,
    everything: Everything = False,
    peers: Peers = False,
    profile: Profiled = False,
    out: Out = "",
) -> None:
    """Time generation against baseline, transformers, llama.cpp.

    Each contender runs in its own process. They take turns, one generation each, so that a machine
    that slows down slows all of them. Results are the time to the first token, tokens per second
    after it, memory, and on a GPU joules per token, with the ratios within a round. Rows are
    written after each case: Ctrl-C loses at most one case, and the same command continues where it
    stopped. Rows in the file that the same source code measured are shown and not measured again.

    ours-auto is the engine of `bitnet generate`; -dot and -addsub force a kernel; -bf16-head and
    -int8-head are --head on a CPU, with keys and values in bf16. baseline is the same shape with
    nn.Linear layers in the same engine. transformers is generate() of its BitNet class
    (autobitlinear) on the same ternary weights, greedy. llama.cpp (--peers) has these weights as
    GGUF, TQ2_0 with an fp16 head, without and with (-fa) flash attention; its logits are compared
    with ours before anything is timed. --threads can be repeated; --peers takes 1 and 2.

    On a GPU: bitnet bench decode --size 700m --size 2b --size 8b
    """
    if everything + quick + peers + profile > 1:
        raise UserError("--all, --quick, --peers and --profile exclude each other")
    if peers and model:
        raise UserError("--peers and --model exclude each other: GGUF has no fp32 scales")
    if model and size:
        raise UserError("--model and --size exclude each other")
    if profile and len(threads or ()) > 1:
        raise UserError("--profile: one --threads")
    target = bench_device(device)
    counts = tuple(dict.fromkeys(threads or ((1, 2) if peers else (0,))))
    asked = GPU if target.type == "cuda" else CPU
    for chosen, given in ((everything, ALL), (quick, QUICK), (peers, BESIDE), (profile, PROFILE)):
        asked = given if chosen else asked
    asked_for = [*(contender or PEERS), LLAMA] if peers else contender or []
    names, lines = _contenders(asked_for, target, quick, profile)
    cases = [
        Case(rows, tokens, new or asked.new)
        for tokens in dict.fromkeys(prompt or asked.prompts)
        for rows in dict.fromkeys(batch or asked.batches)
    ]
    if min(case.new for case in cases) < 2:
        raise UserError("--new: 1 leaves nothing to time after the first token; the nearest is 2")
    sizes = valid_names("--size", size or [], tuple(SIZES)) or asked.sizes
    subjects = _subjects(model, sizes, cases)
    if peers:
        for one in subjects:
            if why := refusals([LLAMA], target, one.config).get(LLAMA):
                raise UserError(f"--peers: {one.name}: {why}")
    here = machine.describe(target)
    name = f"{'profile_' if profile else ''}decode_{here.slug}.csv"
    path = results_path(out, name) if out or not quick else None
    run = _Run(plain_console(), here, names, cases, rounds or asked.rounds, seed, path)
    if profile:
        run.use(counts[0])
        _profile(run, subjects)
    else:
        run.measure(subjects, counts, lines)


def _contenders(
    given: list[str], device: torch.device, quick: bool, profile: bool
) -> tuple[list[str], list[str]]:
    """The contenders to measure, and lines to print about them."""
    if names := valid_names("--contender", given, CONTENDERS):
        return names, []
    if profile:
        return ["ours-auto"], []
    if not quick:
        return list(usual(device)), []
    dtype = "bf16" if device.type == "cuda" else "fp32"
    line = f"--quick leaves transformers out; --contender transformers-{dtype} times it"
    return ["ours-auto", f"baseline-{dtype}"], [line]


def _subjects(folder: str, sizes: Sequence[str], cases: Sequence[Case]) -> list[Subject]:
    if not folder:
        shapes = {size: ModelConfig(**SIZES[size], max_seq_len=1).resolve() for size in sizes}
        return [Subject(size, config, "") for size, config in shapes.items()]
    config = read_config(Path(folder)).model
    if config.linear != "ternary":
        raise UserError(f"--model: {folder} is not ternary (model.linear = {config.linear!r})")
    longest = max(case.prompt + case.new for case in cases)
    if longest > config.max_seq_len:
        raise UserError(
            f"--prompt, --new: {longest} tokens in all exceed the context of {folder}, which is "
            f"{config.max_seq_len}"
        )
    return [Subject(Path(folder).resolve().parent.name + "/" + Path(folder).name, config, folder)]


@dataclasses.dataclass
class _Run:
    """The settings of a command, the same for every model, and the rows of its results."""

    console: Console
    here: Machine
    names: list[str]
    cases: list[Case]
    rounds: int
    seed: int
    path: Path | None
    """None: nothing is written."""
    threads: int = 0
    """0: torch's choice."""
    usual: int = dataclasses.field(default_factory=torch.get_num_threads)
    """Torch's choice."""
    kept: list[Figures] = dataclasses.field(default_factory=list)
    """The file's rows."""
    shown: list[Figures] = dataclasses.field(default_factory=list)
    """The rows of this command, measured now or before."""

    def say(self, text: str) -> None:
        """Print one line or several."""
        say(self.console, text)

    def use(self, threads: int) -> None:
        """Use this number of threads from now on. 0: torch's choice."""
        self.threads = threads
        torch.set_num_threads(threads or self.usual)
        self.here = machine.describe(self.here.device)

    def measure(self, subjects: Sequence[Subject], counts: Sequence[int], lines: list[str]) -> None:
        """Measure all models with each number of threads. Print ``lines``, then each result, then
        the tables."""
        self.kept = read(self.path, COLUMNS) if self.path else []
        _, no_energy = machine.find_meter(self.here.device)
        todo = [
            (subject, self.fitting(subject, self.jobs(subject, lines), lines))
            for subject in subjects
        ]
        for line in filter(None, dict.fromkeys([no_energy, *lines])):  # no argument is wrong
            self.say(line)
        for subject, jobs in todo:
            for count in counts:
                self.use(count)
                self.race(subject, [replace(job, threads=count) for job in jobs])
        drawn = (table(self.shown), peers_table.table(self.shown))
        self.say("")
        self.say("\n\n".join(text for text in drawn if text != NOTHING) or NOTHING)
        self.say("")
        self.say(f"figures: {self.path}" if self.path else NOT_WRITTEN)

    def kept_so_far(self) -> str:
        """The line about the file that a stopped command prints."""
        return f"the same command goes on from {self.path}" if self.path and self.shown else ""

    def jobs(self, subject: Subject, lines: list[str]) -> list[Job]:
        """The contenders that can run; ``lines`` gets the reasons why others cannot."""
        no = refusals(self.names, self.here.device, subject.config)
        lines += [f"{name} is left out: {why}" for name, why in no.items()]
        config = dataclasses.asdict(subject.config)
        jobs = [
            Job(name, config, subject.folder, self.seed, str(self.here.device), self.threads)
            for name in self.names
            if name not in no
        ]
        if not jobs:
            why = "; ".join(dict.fromkeys(no.values()))
            raise UserError(f"--contender: none of {', '.join(self.names)} can run here: {why}")
        return jobs

    def race(self, subject: Subject, jobs: list[Job]) -> None:
        """Show a model's cases that are in the file. Measure the others; write the file after
        each."""
        common = common_columns(self.here, self.rounds)
        before = [stored(subject, case, jobs, common, self.kept) for case in self.cases]
        todo = [case for case, rows in zip(self.cases, before, strict=True) if not rows]
        if len(todo) < len(self.cases):
            self.say("measured already by these sources; --out elsewhere repeats it:")
        for rows in filter(None, before):
            self._show(rows)
        if not todo:
            return
        bar = progress(self.console)
        task = bar.add_task(subject.name, total=len(todo) * len(jobs) * (self.rounds + 1))
        begun, at = -1, todo[0]

        def tick(text: str) -> None:
            nonlocal begun
            begun += 1
            where = f"{subject.name}, batch {at.batch}, prompt {at.prompt}: {text}"
            bar.update(task, description=where, completed=begun)

        stops = ending(self.console, self.kept_so_far, WorkerDied, Inexact)
        with stops, bar, Race(jobs, tick) as race:
            for at in todo:
                outcomes = race.run(at, self.rounds)
                new = figures(subject, at, jobs, outcomes, common)
                if self.path:
                    self.kept = merge(self.kept, new, KEY)
                    write(self.path, self.kept, COLUMNS)
                self._show(new)
            bar.update(task, description=subject.name, completed=begun + 1)

    def _show(self, rows: list[Figures]) -> None:
        self.shown += rows
        self.say(_line(rows))

    def fitting(self, subject: Subject, jobs: list[Job], lines: list[str]) -> list[Job]:
        """The jobs that fit into memory together; ``lines`` gets the others."""
        sizes = [held_bytes(job, subject.config, self.cases) for job in jobs]
        free = free_bytes(self.here.device)
        kept = fitting(jobs, sizes, free)
        for job, size in zip(jobs, sizes, strict=True):
            if job not in kept:
                lines.append(
                    f"{subject.name}: {job.contender} is left out: it needs about "
                    f"{human(size, 'B')}, and the others leave too little of the "
                    f"{human(free or 0, 'B')} that are free"
                )
        if not kept:
            raise UserError(f"{subject.name} does not fit into memory; choose a smaller --size")
        return kept


def _line(rows: Sequence[Figures]) -> str:
    """One line that shows a case's results."""
    parts = []
    for row in rows:
        notes = []
        for family in ("baseline", "transformers", LLAMA):
            base = max(
                (one for one in rows if one["contender"].startswith(family)),
                key=lambda one: float(one["tokens_s"]),
                default=None,
            )
            ratio = row[f"over_{family.replace('.', '_')}"]
            if base and ratio and row["contender"].startswith("ours"):
                notes.append(f"{float(ratio):.2f}x {base['contender']}")
        notes.append(f"first token {float(row['first_ms']):,.0f} ms")
        parts.append(f"{row['contender']} {float(row['tokens_s']):,.1f} ({', '.join(notes)})")
    one = rows[0]
    return f"{one['model']} batch {one['batch']} prompt {one['prompt']}, tokens/s: " + ", ".join(
        parts
    )


def _profile(run: _Run, subjects: list[Subject]) -> None:
    assert run.path is not None
    if len(subjects) * len(run.cases) * len(run.names) != 1:
        raise UserError("--profile: one --contender, --size, --batch and --prompt")
    subject, case = subjects[0], run.cases[0]
    (job,) = run.jobs(subject, [])
    read(run.path, PROFILE_COLUMNS)  # raises before the work if the file holds something else
    with reporting(f"profiling {job.contender}, {subject.name}"):
        found: Profile = measure(job, case, run.here)
    common = common_columns(run.here, 1)
    write_profile(run.path, subject, case, job, found, common)
    run.console.print(found.table(), highlight=False)
    for line in filter(None, (found.summary(), found.warning(), f"figures: {run.path}")):
        run.say(line)
