"""The rows of the CSV files: each figure with its subject, device, method and versions.

Measured figures and estimates of a static model are in *different columns*, so that no reader of
the file can mix them by accident; :func:`read` refuses a row that has both. After each group of
rows the whole file is replaced by a rename, so an interrupted run keeps its measurements and never
leaves half a line."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bitnet_kernels.files import write_whole

SOURCES = ("measured", "estimate")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one shape, M and state of the cache. Times in microseconds per call."""

    device: str
    """The GPU or CPU by name."""
    what: str
    """"linear": floats in and out, including the quantization of the activations; "matmul": int8
    in, int32 out; "read": the packed weights are read and added up."""
    contender: str
    """"bitnet", or the package."""
    family: str
    """"16-bit", "32-bit", "addsub", "dot", "auto", "reference", "read", or "other"."""
    formulation: str
    m: int
    n: int
    k: int
    dtype: str
    """dtype of the activations."""
    cache: str
    """"cold": the weights come from memory; "hot": from the L2 (a CPU's last level) if they fit."""
    source: str
    """One of :data:`SOURCES`."""
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    ratio_to_16bit: float | None = None
    """Median of the fastest 16-bit matmul of the same round-robin, divided by this median."""
    estimate_us: float | None = None
    estimate_ratio: float | None = None
    gb_s: float | None = None
    """Weights as stored, activations and outputs, each moved once, over the median; 10^9 bytes/s.
    """
    roofline_share: float | None = None
    """The least time that this GPU's memory and int8 (16-bit) units allow, divided by the median;
    on a CPU the time of a plain read of the packed weights in the same rounds, by the median."""
    energy_uj_token: float | None = None
    """Microjoules per token, of the whole board."""
    exact: str
    """"yes": equal to the oracle, bit for bit; else the relative error; "" for estimates."""
    skipped: str = ""
    """The reason why this contender could not be measured here; such a row has no figures."""
    replays: int | None = None
    calls: int | None = None
    """Calls per replay."""
    threads: int | None = None
    """CPU threads."""
    sm_clock_mhz: int | None = None
    torch: str
    triton: str
    driver: str
    commit: str
    code: str
    """Hash of the kernels' sources and tuning; rows with a different hash are measured again."""
    date: str
    command: str

    @property
    def key(self) -> tuple[str | int, ...]:
        """The subject of a row; a file has one row per subject."""
        subject = (self.device, self.what, self.contender, self.family, self.formulation)
        return (*subject, self.m, self.n, self.k, self.dtype, self.cache, self.source)

    @property
    def version(self) -> tuple[str | int | None, ...]:
        """The code and settings; a row with a different version is measured again."""
        return (self.code, self.torch, self.triton, self.driver, self.threads)


COLUMNS = tuple(field.name for field in fields(Row))
_MEASURED = ("median_us", "p10_us", "p90_us", "ratio_to_16bit", "gb_s", "roofline_share")
_ESTIMATED = ("estimate_us", "estimate_ratio")
_TYPES = {field.name: field.type for field in fields(Row)}


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(column: str, text: str) -> Any:
    if _TYPES[column] is str:
        return text
    if text == "" and _TYPES[column] in (float | None, int | None):
        return None
    try:
        value = int(text) if _TYPES[column] in (int, int | None) else float(text)
    except ValueError:
        raise ValueError(f"{column}: {text!r} is no number") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{column}: {text!r} is no figure")
    return value


def _check(row: Row) -> None:
    if row.source not in SOURCES:
        raise ValueError(f"source: {row.source!r} is none of {', '.join(SOURCES)}")
    foreign = _ESTIMATED if row.source == "measured" else _MEASURED
    for column in foreign:
        if getattr(row, column) is not None:
            raise ValueError(f"source: {row.source!r}, but the row has {column}")
    needed = "median_us" if row.source == "measured" else "estimate_us"
    if bool(getattr(row, needed)) == bool(row.skipped):
        raise ValueError(
            f"source: {row.source!r}, but the row has no {needed}, or a reason for none"
        )


def read(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file.

    Raises:
        ValueError: the file is damaged or not such a CSV; the message names file and line.
    """
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error}") from error
    rows = []
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(lines, [])
        if tuple(header) != COLUMNS:
            raise ValueError("is not a header of this benchmark's columns")
        for cells in lines:
            if len(cells) != len(COLUMNS):
                raise ValueError(f"has {len(cells)} of {len(COLUMNS)} columns")
            pairs = zip(COLUMNS, cells, strict=True)
            row = Row(**{column: _value(column, cell) for column, cell in pairs})
            _check(row)
            rows.append(row)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: line {max(1, lines.line_num)}: {error}") from error
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace the file by these rows, whole or not at all.

    Raises:
        ValueError: a row mixes measured and estimated figures.
        OSError: as :func:`bitnet_kernels.files.write_whole`.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        _check(row)
        writer.writerow({column: _text(value) for column, value in asdict(row).items()})
    write_whole(path, text.getvalue())


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``old``, with ``new`` rows in place of those with the same key; other ``new`` rows follow."""
    merged = {row.key: row for row in old}
    merged.update({row.key: row for row in new})
    return list(merged.values())
