"""A run as read from its folder: config.toml, metrics.jsonl and the sizes of its models.

metrics.jsonl may be from a run in progress, cut off within a line, damaged, or larger than memory.
So it is read line by line. A line that is not a JSON object with a step is counted and skipped.
Each number becomes a :class:`Curve`, which never holds more than a fixed number of points.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitnet.config import Config, load_config
from bitnet.export.folder import TENSORS
from bitnet.progress import reporting
from bitnet.schema import UserError, check_file, nearest, user_input

NUMBERS = (
    *("loss", "val_loss", "val_bpb", "lr", "tokens_per_second", "mfu", "peak_memory_bytes"),
    *("skipped", "ternary/zeros", "ternary/flip_rate"),
)
"""The numbers that are read from a line, if it has them."""
OF_LAYERS = ("zeros", "flip_rate")
"""The numbers that are read for each layer."""
LONGEST_LINE = 2**24
"""Bytes; a longer line is skipped."""
MOST_LAYERS = 4096
MOST_SAMPLES = 12
LONGEST_SAMPLE = 2_000
"""Characters."""


class Curve:
    """Points (step, value) in order of the steps, at most ``limit`` of them.

    If there is a point too many, each two adjacent points become one: the later step, with the mean
    of both values. So memory is bounded, and a noisy curve becomes smooth instead of sparse. Later
    points are collected in groups of the same size.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit, self._group = limit, 1
        self._points: list[tuple[int, float]] = []
        self._open: list[tuple[int, float]] = []

    def add(self, step: int, value: float) -> None:
        """Append a point."""
        self._open.append((step, value))
        if len(self._open) < self._group:
            return
        self._points.append(_mean(self._open))
        self._open.clear()
        if len(self._points) > self._limit:
            whole = len(self._points) // 2 * 2
            self._open = self._points[whole:] * self._group  # one point stands for a group
            self._points = [_mean(self._points[i : i + 2]) for i in range(0, whole, 2)]
            self._group *= 2

    def points(self) -> list[tuple[int, float]]:
        """All points."""
        return [*self._points, *([_mean(self._open)] if self._open else [])]


def _mean(points: Sequence[tuple[int, float]]) -> tuple[int, float]:
    return points[-1][0], math.fsum(value / len(points) for _, value in points)


@dataclass
class RunRecord:
    """What is known about a run."""

    folder: Path
    config: Config
    """The resolved config."""
    name: str = ""
    """The run's name, which is unique in a report."""
    step: int = 0
    """The last step in metrics.jsonl."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """By a name of :data:`NUMBERS`; a name without a point is missing."""
    layers: dict[str, dict[str, Curve]] = field(default_factory=dict)
    """By a name of :data:`OF_LAYERS`, then by layer."""
    samples: list[tuple[int, str]] = field(default_factory=list)
    """Step and text of the first and the last evaluations."""
    unread: int = 0
    """Lines that are damaged or out of order."""
    stored: dict[str, int] = field(default_factory=dict)
    """Bytes of the weights in the run's model folders, by the folder's name."""

    def points(self, name: str) -> list[tuple[int, float]]:
        """The points of a name in :data:`NUMBERS`; [] if there are none."""
        return self.curves[name].points() if name in self.curves else []

    def last(self, name: str) -> float | None:
        """The last value of a number."""
        points = self.points(name)
        return points[-1][1] if points else None

    def tokens(self, step: int) -> int:
        """Tokens trained on after a step."""
        return step * self.config.train.batch_tokens

    @property
    def finished(self) -> bool:
        """Whether the last step was reached."""
        return self.step >= self.config.train.steps


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read the folders of runs, each once, in their order.

    Raises:
        UserError: one of them is not a run's folder, or has no line to show yet.
    """
    records = [read_run(folder) for folder in dict.fromkeys(folders)]
    names = [record.name for record in records]
    for record in records:
        if names.count(record.name) > 1:
            record.name = _printable(str(record.folder))
    return records


def read_run(folder: Path) -> RunRecord:
    """Read the folder of a run; it may be in progress.

    Raises:
        UserError: it is not a run's folder, or has no line to show yet.
    """
    config_file, metrics = folder / "config.toml", folder / "metrics.jsonl"
    with user_input(str(folder)):
        missing = next((file for file in (config_file, metrics) if not file.exists()), None)
        siblings = [path.parent.name for path in folder.parent.glob("*/metrics.jsonl")]
    if missing:
        near = nearest(folder.name, siblings)
        hint = f"; the nearest run is {folder.parent / near}" if near else ""
        raise UserError(f"{folder}: is no folder of a run: it has no {missing.name}{hint}")
    config = load_config([config_file])
    if not (config.train.steps and config.train.batch_tokens and config.model.n_layers):
        raise UserError(f"{config_file}: is not the resolved config that a run writes")
    record = RunRecord(folder, config, _printable(config.run.name or folder.name))
    check_file(metrics)
    with reporting(f"reading {metrics}"), user_input(str(metrics)):
        for line in _lines(metrics):
            _take(record, line)
    if not record.curves:
        raise UserError(f"{metrics}: holds no line of metrics yet")
    for model in ("model", "model-packed"):
        weights = folder / model / TENSORS
        if weights.is_file():
            record.stored[model] = weights.stat().st_size
    return record


def _lines(path: Path) -> Iterator[bytes]:
    """Whole lines; b"" for a line that is too long. Bytes after the last newline are skipped: they
    are still being written, or were when the run was killed."""
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE):
            if line.endswith(b"\n"):
                yield line
            elif len(line) == LONGEST_LINE:
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield b""


def _take(record: RunRecord, line: bytes) -> None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    step = row.get("step") if isinstance(row, dict) else None
    if type(step) is not int or not record.step <= step <= 2**53:
        record.unread += 1
        return
    record.step = step
    for name in NUMBERS:
        if (value := _number(row.get(name))) is not None:
            record.curves.setdefault(name, Curve()).add(step, value)
    layers = row.get("ternary/layers")
    for layer, numbers in layers.items() if isinstance(layers, dict) else ():
        layer = _printable(layer)
        for name in OF_LAYERS if isinstance(numbers, dict) else ():
            curves = record.layers.setdefault(name, {})
            value = _number(numbers.get(name))
            if value is not None and (layer in curves or len(curves) < MOST_LAYERS):
                curves.setdefault(layer, Curve(limit=64)).add(step, value)
    if isinstance(sample := row.get("sample"), str) and sample:
        record.samples.append((step, _printable(sample[:LONGEST_SAMPLE])))
        if len(record.samples) > MOST_SAMPLES:
            del record.samples[1]


def _printable(text: str) -> str:
    """The text without control characters, which could reverse a page's text, and without halves of
    characters: they are replaced."""
    return "".join(one if one.isprintable() or one in "\n\t" else "\ufffd" for one in text)


def _number(value: Any) -> float | None:
    """A finite number; None for anything else (JSON's null stands for NaN)."""
    if type(value) not in (int, float):
        return None
    try:
        return number if math.isfinite(number := float(value)) else None
    except OverflowError:
        return None
