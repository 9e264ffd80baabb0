"""Figures as a CSV file has them: text, under columns that a benchmark declares."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet.durable import write_atomic
from bitnet.schema import UserError, read_file

Figures = dict[str, str]
"""A row."""


def text(value: Any) -> str:
    """A figure as it stands in a file: eight digits of a float, "" for None."""
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def counted(count: int, noun: str) -> str:
    """``"1 thread"``, ``"2 threads"``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(share: float, digits: int = 0) -> str:
    """A share of a limit: ``"87%"``; more than all of it is marked, ``"~104%"``, since then the
    limit was measured too low, as on a busy machine."""
    return f"{'~' if share > 1 else ''}{share:.{digits}%}"


def distinct(rows: Sequence[Figures], column: str) -> str:
    """What rows of several runs, which may have met in one file, say in a column."""
    return ", ".join(dict.fromkeys(row[column] for row in rows if row[column]))


def origin(rows: Sequence[Figures]) -> str:
    """With which commit, where the package was part of a checkout, and when."""
    commit, date = distinct(rows, "commit"), distinct(rows, "date")
    return f"commit {commit}, {date}" if commit else date


def read(path: Path, columns: tuple[str, ...]) -> list[Figures]:
    """The rows of a file; none where there is no file.

    Raises:
        UserError: it is not a file of these columns.
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


def merge(old: Sequence[Figures], new: Sequence[Figures], key: Sequence[str]) -> list[Figures]:
    """``old`` with rows about the same thing, by the columns ``key``, replaced by ``new`` ones;
    others at the end. What makes a figure worth more, such as more steps, is part of a key: a short
    run replaces no long one."""
    merged = {tuple(row[column] for column in key): row for row in (*old, *new)}
    return list(merged.values())


def write(path: Path, rows: Sequence[Figures], columns: tuple[str, ...]) -> None:
    """Replace the file by these rows, whole or not at all."""
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lines.getvalue().encode())
