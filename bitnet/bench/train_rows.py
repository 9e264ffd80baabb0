"""The figures of ``bitnet bench train``: rows of a CSV file, and the tables drawn from them."""

import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bitnet.bench.rows import Figures, counted, distinct, origin, percent, read, text
from bitnet.bench.train import COMPILED, Reply
from bitnet.config import Config
from bitnet.summary import human
from bitnet.training.throughput import mfu
from bitnet_kernels.bench import machine
from bitnet_kernels.bench.timing import quantile

PATTERN = "train_*.csv"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of one model. Figures are of the timed steps; None: not known."""

    model: str
    """The config file, or the size and what differs from it."""
    variant: str
    base: str
    """The variant of this run that ratios are to: fp in the same mode, else the first."""
    parameters: int
    device: str
    """The GPU or CPU by name."""
    threads: int | None
    """Of a CPU."""
    dtype: str
    """"fp32", or "bf16" by autocast; latent weights and optimizer are fp32."""
    seq_len: int
    tokens: int
    """A micro-batch, random ones of the model's vocabulary, the same in every step."""
    micro_batches: int
    """A step."""
    warmup: int
    """Steps before those that are timed."""
    steps: int
    step_ms: float
    """Median."""
    step_ms_p25: float
    step_ms_p75: float
    tokens_s: float
    """At the median."""
    speedup: float
    """Median of the ratios, round by round, of the base's time to this one's; the range: of all."""
    speedup_min: float
    speedup_max: float
    mfu: float
    """Of ``peak_flops``; by the baseline's operations, for every variant."""
    peak_flops: float
    peak_flops_source: str
    peak_bytes: int
    """Of a step: the most that tensors held."""
    memory_ratio: float
    """To the base's."""
    resident_bytes: int | None
    """Of a step on a CPU: the most that the process held."""
    loss: float
    """At the last step, in nats a token, before its update."""
    compile_s: float | None
    """Seconds of the first turn of a compiled variant, its compiler's cache empty."""
    joules_token: float | None
    """Of the whole board, median."""
    torch: str
    triton: str
    torchao: str
    python: str
    driver: str
    commit: str
    date: str
    command: str


COLUMNS = tuple(field.name for field in fields(Row))
KEY = (
    *("model", "variant", "device", "threads", "dtype", "seq_len", "tokens", "micro_batches"),
    "steps",
)
"""What a row is about: a file has one row for each."""


def figures(
    label: str,
    here: machine.Machine,
    configs: Mapping[str, Config],
    replies: Mapping[str, Sequence[Reply]],
    warmup: int,
    peak: tuple[float, str],
) -> list[Row]:
    """What the replies come to, a row a variant.

    Arguments:
        peak: FLOP/s that MFU is measured against, and where the number comes from.
    """
    some = next(iter(configs.values()))
    tokens = some.train.micro_batch * some.data.seq_len
    timed = {name: list(turns[warmup:]) for name, turns in replies.items()}
    peaks = {name: max(turn.peak_bytes for turn in turns) for name, turns in timed.items()}
    common: dict[str, Any] = {
        "model": label,
        "parameters": some.model.num_parameters()["total"],
        "device": here.name,
        "threads": here.threads,
        "dtype": some.train.dtype,
        "seq_len": some.data.seq_len,
        "tokens": tokens,
        "micro_batches": some.train.batch_tokens // tokens,
        "warmup": warmup,
        "peak_flops": peak[0],
        "peak_flops_source": peak[1],
        "torch": torch.__version__,
        "triton": machine.package_version("triton"),
        "torchao": machine.package_version("torchao"),
        "python": platform.python_version(),
        "driver": here.driver,
        "commit": machine.commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["bitnet", *sys.argv[1:]]),
    }
    rows = []
    for name, turns in timed.items():
        baseline = f"fp{COMPILED}" if name.endswith(COMPILED) else "fp"
        base = baseline if baseline in timed else next(iter(timed))
        ratios = [b.seconds / t.seconds for b, t in zip(timed[base], turns, strict=True)]
        seconds = [turn.seconds for turn in turns]
        tokens_s = some.train.batch_tokens / statistics.median(seconds)
        joules = [turn.joules for turn in turns if turn.joules is not None]
        resident = [turn.resident_bytes for turn in turns if turn.resident_bytes is not None]
        rows.append(
            Row(
                **common,
                variant=name,
                base=base,
                steps=len(turns),
                step_ms=1e3 * statistics.median(seconds),
                step_ms_p25=1e3 * quantile(seconds, 0.25),
                step_ms_p75=1e3 * quantile(seconds, 0.75),
                tokens_s=tokens_s,
                speedup=statistics.median(ratios),
                speedup_min=min(ratios),
                speedup_max=max(ratios),
                mfu=mfu(some.model.flops_per_token(some.data.seq_len), tokens_s, peak[0]),
                peak_bytes=peaks[name],
                memory_ratio=peaks[name] / peaks[base],
                resident_bytes=max(resident) if resident else None,
                loss=turns[-1].loss,
                compile_s=replies[name][0].turn_seconds if name.endswith(COMPILED) else None,
                joules_token=statistics.median(joules) / some.train.batch_tokens
                if joules
                else None,
            )
        )
    return rows


def as_text(row: Row) -> Figures:
    """As the file has it."""
    return {column: text(value) for column, value in asdict(row).items()}


def load(folder: Path) -> list[Figures]:
    """The rows of all files of a folder. UserError where one of them is damaged."""
    return [row for path in sorted(folder.glob(PATTERN)) for row in read(path, COLUMNS)]


def table(rows: Sequence[Figures]) -> str:
    """Markdown: for each model and machine a line that says what was run, and a table."""
    groups: dict[tuple[str, ...], list[Figures]] = {}
    for row in rows:
        subject = tuple(row[column] for column in KEY if column != "variant")
        groups.setdefault(subject, []).append(row)
    return "\n\n".join(_section(group) for group in groups.values()) or "No figures yet."


def _section(rows: Sequence[Figures]) -> str:
    one = rows[0]
    where = one["device"]
    if one["threads"]:
        where += f", {counted(int(one['threads']), 'thread')}"
    lines = [
        f"**{one['model']}** ({human(int(one['parameters']))} parameters), {where}, "
        f"{one['dtype']}; a step is {one['micro_batches']} x {one['tokens']} tokens; "
        f"{counted(int(one['steps']), 'step')}; torch {distinct(rows, 'torch')}, {origin(rows)}",
        "",
        "| variant | step, ms (quartiles) | tokens/s | speedup (range) | over | MFU | peak memory "
        "| process | loss | first step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms, low, high = (float(row[f"step_ms{part}"]) for part in ("", "_p25", "_p75"))
        speedup, least, most = (float(row[f"speedup{part}"]) for part in ("", "_min", "_max"))
        cells = [
            row["variant"],
            f"{ms:,.1f} ({low:,.1f} to {high:,.1f})",
            f"{float(row['tokens_s']):,.0f}",
            f"{speedup:.2f} ({least:.2f} to {most:.2f})",
            row["base"],
            percent(float(row["mfu"]), 1),
            f"{human(int(row['peak_bytes']), 'B')}, {float(row['memory_ratio']):.2f}x",
            human(int(row["resident_bytes"]), "B") if row["resident_bytes"] else "",
            f"{float(row['loss']):.4f}",
            f"{float(row['compile_s']):.0f} s" if row["compile_s"] else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
