"""The figures of ``bitnet bench decode``: one row per contender and case, in CSV and in tables.

This file computes ratios, round by round (bitnet/bench/decode.py says why), to the *fastest* dtype
of the baseline and the fastest setting of transformers, the strongest opponents that were measured.
The baseline has the same shape with full-precision layers; its contenders are named ``baseline-*``.
Rows of contenders beside llama.cpp have a table of their own (bitnet/bench/peers_table.py).
"""

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from bitnet.bench.decode_worker import LLAMA, Case, Job, Turn
from bitnet.bench.rows import (
    Figures,
    as_figures,
    counted,
    distinct,
    origin,
    provenance,
    read_all,
    text,
)
from bitnet.model import ModelConfig
from bitnet.summary import human
from bitnet_kernels.bench import machine
from bitnet_kernels.bench.machine import Machine
from bitnet_kernels.bench.timing import quantile

PATTERN = "decode_*.csv"
NOTHING = "No figures yet."


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender in one case. None: not known. Quartiles are over the rounds."""

    device: str
    """The GPU or CPU by name."""
    threads: int | None
    """CPU threads."""
    model: str
    """A size of :data:`SIZES`, or a folder's name."""
    weights: str
    """"trained" if they come from a folder, else "random"; the baseline's are always random."""
    parameters: int
    contender: str
    dtype: str
    batch: int
    prompt: int
    new: int
    """Tokens generated per row."""
    seed: int
    rounds: int
    first_ms: float
    """Time until every row has its first token, median."""
    first_ms_p25: float
    first_ms_p75: float
    tokens_s: float
    """Decoded tokens per second of all rows together, without the first ones, median."""
    tokens_s_p25: float
    tokens_s_p75: float
    over_baseline: float | None
    """Median of the ratios, round by round, of ``tokens_s`` to the baseline's (in the dtype with
    the higher median); and their quartiles."""
    over_baseline_p25: float | None
    over_baseline_p75: float | None
    over_transformers: float | None
    """The same relative to the fastest contender of transformers."""
    over_transformers_p25: float | None
    over_transformers_p75: float | None
    first_over_baseline: float | None
    """The same for the time to the first token: above 1 is faster."""
    first_over_transformers: float | None
    over_llama_cpp: float | None
    """The same relative to the fastest contender of llama.cpp, with the smallest and the largest
    ratio of a round."""
    over_llama_cpp_min: float | None
    over_llama_cpp_max: float | None
    first_over_llama_cpp: float | None
    """The same for the time to the first token, which is spent on the prompt, relative to the
    contender of llama.cpp that is fastest there: above 1 is faster."""
    first_over_llama_cpp_min: float | None
    first_over_llama_cpp_max: float | None
    agreement: float | None
    """Mean share of a row's tokens before the first that differs from those of ours-auto, or, if
    that is missing, of our first contender. Contenders with the same weights agree until rounding
    changes a close choice; the baseline has other weights."""
    peak_bytes: int | None
    """Peak during generation: memory of the tensors on a GPU, of the process on a CPU."""
    base_bytes: int | None
    """Memory of the process before its model is made: the interpreter and torch."""
    weight_bytes: int
    """Bytes of the layers' matrices and norms."""
    head_bytes: int
    """Bytes of head and embedding."""
    cache_bytes: int
    """Bytes of the KV cache, which stays allocated between generations."""
    joules_token: float | None
    """Energy of the whole board per decoded token."""
    torch: str
    triton: str
    transformers: str
    llama_cpp: str
    """Version of llama-cpp-python, which brings its own llama.cpp."""
    driver: str
    commit: str
    code: str
    """Hash of the sources: rows with a different hash are measured again."""
    date: str
    command: str


COLUMNS = tuple(field.name for field in fields(Row))
KEY = ("device", "threads", "model", "weights", "contender", "batch", "prompt", "new", "rounds")
"""The subject of a row: a file has one row per subject."""
VERSION = ("seed", "torch", "triton", "transformers", "llama_cpp", "driver", "code")
"""Code and settings: a row with a different version is measured again."""


class Subject(NamedTuple):
    """A model to generate from."""

    name: str
    config: ModelConfig
    """The ternary model's resolved config."""
    folder: str
    """Folder of the trained model; "": random weights."""


class Outcome(NamedTuple):
    """The measurements of a contender in a case."""

    turns: list[Turn]
    memory: dict[str, int]
    peak_bytes: int | None
    joules_token: float | None
    base_bytes: int | None


def code_hash(device: str) -> str:
    """Hash of the sources of this package and of the kernels: 12 hex digits."""
    digest = hashlib.sha256(machine.code_hash(device).encode())
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def common_columns(here: Machine, rounds: int) -> dict[str, Any]:
    """Columns that all rows of a run share."""
    return {
        **provenance(),
        "device": here.name,
        "threads": here.threads,
        "rounds": rounds,
        "transformers": machine.package_version("transformers"),
        "llama_cpp": machine.package_version("llama-cpp-python"),
        "driver": here.driver,
        "code": code_hash(here.name),
    }


def figures(
    subject: Subject,
    case: Case,
    jobs: Sequence[Job],
    outcomes: Mapping[str, Outcome],
    common: Mapping[str, Any],
) -> list[Figures]:
    """The rows of a case."""
    first = {name: [turn.first_s for turn in one.turns] for name, one in outcomes.items()}
    count = case.batch * (case.new - 1)
    speed = {name: [count / turn.rest_s for turn in one.turns] for name, one in outcomes.items()}
    medians = {name: statistics.median(values) for name, values in speed.items()}
    bases = {}
    for family in ("baseline", "transformers"):
        members = [name for name in medians if name.startswith(family)]
        bases[family] = max(members, key=medians.__getitem__, default="")
    rows = []
    for job in jobs:
        name, one = job.contender, outcomes[job.contender]
        columns: dict[str, Any] = {}
        for family, base in bases.items():
            over: list[float | None] = [None] * 4
            if base:
                ratios = [a / b for a, b in zip(speed[name], speed[base], strict=True)]
                waits = [b / a for a, b in zip(first[name], first[base], strict=True)]
                over = [*(quantile(ratios, q) for q in (0.5, 0.25, 0.75)), statistics.median(waits)]
            for suffix, value in zip(("", "_p25", "_p75"), over[:3], strict=True):
                columns[f"over_{family}{suffix}"] = value
            columns[f"first_over_{family}"] = over[3]
        columns |= _over_llama_cpp(first, speed, name)
        for suffix, q in (("", 0.5), ("_p25", 0.25), ("_p75", 0.75)):
            columns[f"first_ms{suffix}"] = 1e3 * quantile(first[name], q)
            columns[f"tokens_s{suffix}"] = quantile(speed[name], q)
        row = Row(
            **common,
            **columns,
            **_subject_columns(subject, case, job),
            parameters=subject.config.num_parameters()["total"],
            dtype=str(job.dtype).removeprefix("torch."),
            agreement=_agreement(outcomes, name),
            peak_bytes=one.peak_bytes,
            base_bytes=one.base_bytes,
            weight_bytes=one.memory["weights"],
            head_bytes=one.memory["head"] + one.memory["embedding"],
            cache_bytes=one.memory["cache"],
            joules_token=one.joules_token,
        )
        rows.append(as_figures(asdict(row)))
    return rows


def _over_llama_cpp(
    first: Mapping[str, list[float]], speed: Mapping[str, list[float]], name: str
) -> dict[str, float | None]:
    """Columns of a contender beside llama.cpp: medians of the ratios, and their range."""
    columns: dict[str, float | None] = {}
    rates = {one: [1 / seconds for seconds in values] for one, values in first.items()}
    for column, values in (("over_llama_cpp", speed), ("first_over_llama_cpp", rates)):
        medians = {
            one: statistics.median(mine) for one, mine in values.items() if one.startswith(LLAMA)
        }
        base = max(medians, key=medians.__getitem__, default="")
        ratios = [a / b for a, b in zip(values[name], values[base], strict=True)] if base else []
        columns[column] = statistics.median(ratios) if ratios else None
        columns[f"{column}_min"] = min(ratios, default=None)
        columns[f"{column}_max"] = max(ratios, default=None)
    return columns


def _subject_columns(subject: Subject, case: Case, job: Job) -> dict[str, Any]:
    trained = bool(subject.folder) and job.family != "baseline"
    return {
        "model": subject.name,
        "weights": "trained" if trained else "random",
        "contender": job.contender,
        "batch": case.batch,
        "prompt": case.prompt,
        "new": case.new,
        "seed": job.seed,
    }


def stored(
    subject: Subject,
    case: Case,
    jobs: Sequence[Job],
    common: Mapping[str, Any],
    kept: Sequence[Figures],
) -> list[Figures]:
    """The contenders' rows of this version; none unless every contender has one."""
    columns = (*KEY, *VERSION)
    found = {tuple(row[column] for column in columns): row for row in kept}
    asked = [{**common, **_subject_columns(subject, case, job)} for job in jobs]
    keys = [tuple(text(one[column]) for column in columns) for one in asked]
    return [found[key] for key in keys] if all(key in found for key in keys) else []


def _agreement(outcomes: Mapping[str, Outcome], name: str) -> float | None:
    ours = [one for one in outcomes if one.startswith("ours")]
    first = "ours-auto" if "ours-auto" in ours else next(iter(ours), "")
    if not first or name.startswith("baseline"):
        return None
    shares = []
    for mine, its in zip(outcomes[name].turns, outcomes[first].turns, strict=True):
        for row, other in zip(mine.tokens, its.tokens, strict=True):
            same = [a == b for a, b in zip(row, other, strict=True)]
            shares.append([*same, False].index(False) / len(same))
    return statistics.mean(shares)


def load(folder: Path) -> list[Figures]:
    """The rows of a folder's files. Raises UserError if a file is damaged."""
    return read_all(folder, PATTERN, COLUMNS)


def table(rows: Sequence[Figures]) -> str:
    """Markdown: for each machine and length of a run, a line on both and a table. Rows measured
    beside llama.cpp are left out."""
    groups: dict[tuple[str, ...], list[Figures]] = {}
    for row in rows:
        if row["over_llama_cpp"]:
            continue
        where = tuple(row[column] for column in ("device", "threads", "new", "rounds"))
        groups.setdefault(where, []).append(row)
    return "\n\n".join(_section(group) for group in groups.values()) or NOTHING


def _section(rows: Sequence[Figures]) -> str:
    one = rows[0]
    threads = f", {counted(int(one['threads']), 'thread')}" if one["threads"] else ""
    versions = [
        f"{package} {version}"
        for package in ("torch", "transformers")
        if (version := distinct(rows, package))
    ]
    lines = [
        f"**{one['device']}**{threads}: {', '.join(versions)}; {one['new']} new tokens per row, "
        f"{counted(int(one['rounds']), 'round')}; {origin(rows)}",
        "",
        "| model | batch | prompt | contender | first token, ms | tokens/s (quartiles) "
        "| over the baseline | over transformers | agrees | J/token | layers | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def _cells(row: Figures) -> list[str]:
    def ratio(family: str) -> str:
        if not row[f"over_{family}"]:
            return ""
        value, low, high = (float(row[f"over_{family}{part}"]) for part in ("", "_p25", "_p75"))
        return f"{value:.2f} ({low:.2f} to {high:.2f})"

    speed, low, high = (float(row[f"tokens_s{part}"]) for part in ("", "_p25", "_p75"))
    return [
        row["model"],
        row["batch"],
        row["prompt"],
        row["contender"],
        f"{float(row['first_ms']):,.0f}",
        f"{speed:,.1f} ({low:,.1f} to {high:,.1f})",
        ratio("baseline"),
        ratio("transformers"),
        f"{float(row['agreement']):.0%}" if row["agreement"] else "",
        f"{float(row['joules_token']):.3g}" if row["joules_token"] else "",
        human(int(row["weight_bytes"]), "B"),
        human(int(row["peak_bytes"]), "B") if row["peak_bytes"] else "",
    ]
