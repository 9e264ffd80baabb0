"""Rows of CSV files: text, under the columns that a benchmark declares."""

import csv
import io
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bitnet.durable import write_atomic
from bitnet.schema import UserError, read_file
from bitnet_kernels.bench import machine

RESULTS = Path("docs/results")
"""Folder of the published CSV files in a checkout."""
Figures = dict[str, str]
"""A row: column -> text."""


def text(value: Any) -> str:
    """The text of a figure in a file: eight digits of a float, "" for None."""
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def as_figures(columns: Mapping[str, Any]) -> Figures:
    """A row as text."""
    return {column: text(value) for column, value in columns.items()}


def provenance() -> dict[str, str]:
    """Columns of every row: the versions, the date and the command of the measurement."""
    return {
        "torch": torch.__version__,
        "triton": machine.package_version("triton"),
        "commit": machine.commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["bitnet", *sys.argv[1:]]),
    }


def counted(count: int, noun: str) -> str:
    """``"1 thread"``, ``"2 threads"``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(share: float, digits: int = 0) -> str:
    """A share of a limit: ``"87%"``. A share above 100% is marked, ``"~104%"``: the limit was
    measured too low, which happens on a busy machine."""
    return f"{'~' if share > 1 else ''}{share:.{digits}%}"


def distinct(rows: Sequence[Figures], column: str) -> str:
    """The values of a column, each once; a file may hold rows of several runs."""
    return ", ".join(dict.fromkeys(row[column] for row in rows if row[column]))


def origin(rows: Sequence[Figures]) -> str:
    """The commit, if the package was part of a checkout, and the date."""
    commit, date = distinct(rows, "commit"), distinct(rows, "date")
    return f"commit {commit}, {date}" if commit else date


def read(path: Path, columns: tuple[str, ...]) -> list[Figures]:
    """The rows of a file; none if there is no file.

    Raises:
        UserError: the file has other columns, or is damaged.
    """
    if not path.exists():
        return []
    try:
        text = io.StringIO(read_file(path).decode("utf-8"), newline="")
        rows = list(csv.DictReader(text, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}; move the file away or name another: --out") from error
    if not rows or any(tuple(row) != columns or None in row.values() for row in rows):
        raise UserError(
            f"{path}: has other columns than this benchmark's; move it away or name another: --out"
        )
    return rows


def read_all(folder: Path, pattern: str, columns: tuple[str, ...]) -> list[Figures]:
    """The rows of a folder's files. Raises UserError as :func:`read`."""
    return [row for path in sorted(folder.glob(pattern)) for row in read(path, columns)]


def merge(old: Sequence[Figures], new: Sequence[Figures], key: Sequence[str]) -> list[Figures]:
    """``old`` rows, replaced by ``new`` rows that agree in the columns ``key``; the other new rows
    follow. Keys include what makes a figure more reliable, such as the number of steps, so that a
    short run does not replace a long one."""
    merged = {tuple(row[column] for column in key): row for row in (*old, *new)}
    return list(merged.values())


def write(path: Path, rows: Sequence[Figures], columns: tuple[str, ...]) -> None:
    """Replace a file by these rows, completely or not at all."""
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lines.getvalue().encode())
