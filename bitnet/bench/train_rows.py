"""The figures of ``bitnet bench train``: rows of a CSV file, and tables drawn from them."""

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bitnet.bench.rows import Figures, counted, distinct, origin, percent, provenance, read_all
from bitnet.bench.train import COMPILED, Reply
from bitnet.config import Config
from bitnet.summary import human
from bitnet.training.throughput import mfu
from bitnet_kernels.bench import machine
from bitnet_kernels.bench.timing import quantile

PATTERN = "train_*.csv"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of one model. Figures are for the timed steps; None: not known."""

    model: str
    """The config file, or the size and the differences from it."""
    variant: str
    base: str
    """The variant that ratios refer to: fp in the same mode, else the first of this run."""
    parameters: int
    device: str
    """The GPU or CPU by name."""
    threads: int | None
    """CPU threads."""
    dtype: str
    """"fp32", or "bf16" by autocast; latent weights and optimizer are fp32."""
    seq_len: int
    tokens: int
    """Tokens per micro-batch: random tokens of the model's vocabulary, the same in every step."""
    micro_batches: int
    """Micro-batches per step."""
    warmup: int
    """Steps before the timed ones."""
    steps: int
    step_ms: float
    """Median time of a step."""
    step_ms_p25: float
    step_ms_p75: float
    tokens_s: float
    """At the median step time."""
    speedup: float
    """Median of the ratios, round by round, of the base's time to this variant's; then their range.
    """
    speedup_min: float
    speedup_max: float
    mfu: float
    """Share of ``peak_flops``, counting the operations of the full-precision baseline."""
    peak_flops: float
    peak_flops_source: str
    peak_bytes: int
    """Most memory of the tensors during a step."""
    memory_ratio: float
    """``peak_bytes`` divided by the base's."""
    resident_bytes: int | None
    """Most memory of the process during a step, on a CPU."""
    loss: float
    """At the last step, before its update, in nats per token."""
    compile_s: float | None
    """Seconds of a compiled variant's first turn, with an empty compiler cache."""
    joules_token: float | None
    """Energy of the whole board per token, median."""
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
"""The subject of a row: a file has one row per subject."""


def figures(
    label: str,
    here: machine.Machine,
    configs: Mapping[str, Config],
    replies: Mapping[str, Sequence[Reply]],
    warmup: int,
    peak: tuple[float, str],
) -> list[Row]:
    """The rows of a model, one per variant.

    Arguments:
        peak: FLOP/s that MFU is relative to, and where the number comes from.
    """
    config = next(iter(configs.values()))
    common = {**_common(label, here, config), "warmup": warmup}
    common |= {"peak_flops": peak[0], "peak_flops_source": peak[1]}
    timed = {name: list(turns[warmup:]) for name, turns in replies.items()}
    rows = []
    for name in timed:
        compiled = name.endswith(COMPILED)
        baseline = f"fp{COMPILED}" if compiled else "fp"
        base = baseline if baseline in timed else next(iter(timed))
        first = replies[name][0].turn_seconds if compiled else None
        columns = _measured(timed[name], timed[base], config, peak[0])
        rows.append(Row(**common, **columns, variant=name, base=base, compile_s=first))
    return rows


def _common(label: str, here: machine.Machine, config: Config) -> dict[str, Any]:
    """Columns that all rows of a model share."""
    tokens = config.train.micro_batch * config.data.seq_len
    return {
        **provenance(),
        "model": label,
        "parameters": config.model.num_parameters()["total"],
        "device": here.name,
        "threads": here.threads,
        "dtype": config.train.dtype,
        "seq_len": config.data.seq_len,
        "tokens": tokens,
        "micro_batches": config.train.batch_tokens // tokens,
        "torchao": machine.package_version("torchao"),
        "python": platform.python_version(),
        "driver": here.driver,
    }


def _measured(
    turns: Sequence[Reply], base: Sequence[Reply], config: Config, peak_flops: float
) -> dict[str, Any]:
    """Columns of a variant's timed turns, compared with its base's."""
    ratios = [b.seconds / t.seconds for b, t in zip(base, turns, strict=True)]
    seconds = [turn.seconds for turn in turns]
    tokens_s = config.train.batch_tokens / statistics.median(seconds)
    joules = [turn.joules for turn in turns if turn.joules is not None]
    resident = [turn.resident_bytes for turn in turns if turn.resident_bytes is not None]
    peak_bytes = max(turn.peak_bytes for turn in turns)
    return {
        "steps": len(turns),
        "step_ms": 1e3 * statistics.median(seconds),
        "step_ms_p25": 1e3 * quantile(seconds, 0.25),
        "step_ms_p75": 1e3 * quantile(seconds, 0.75),
        "tokens_s": tokens_s,
        "speedup": statistics.median(ratios),
        "speedup_min": min(ratios),
        "speedup_max": max(ratios),
        "mfu": mfu(config.model.flops_per_token(config.data.seq_len), tokens_s, peak_flops),
        "peak_bytes": peak_bytes,
        "memory_ratio": peak_bytes / max(turn.peak_bytes for turn in base),
        "resident_bytes": max(resident, default=None),
        "loss": turns[-1].loss,
        "joules_token": statistics.median(joules) / config.train.batch_tokens if joules else None,
    }


def load(folder: Path) -> list[Figures]:
    """The rows of a folder's files. Raises UserError if a file is damaged."""
    return read_all(folder, PATTERN, COLUMNS)


def table(rows: Sequence[Figures]) -> str:
    """Markdown: for each model and machine, a line that says what was run, and a table."""
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
