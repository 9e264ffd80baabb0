"""The log of a run: ``metrics.jsonl``, the console and trackers, behind :class:`RunLog`.

``metrics.jsonl`` is the record: one JSON object per line, each with its ``step``. It stays exact
after a kill because of an order, not a lock:

    append(step s) ... sync() -> checkpoint of step s becomes durable      while training
    rewind(s) -> train on from s                                           on resume

A line is in the file before the checkpoint that covers it. Lines past the checkpoint are deleted
before their steps run again. So no SIGKILL, at any moment, loses or doubles a step. The console and
the trackers (trackers.py) are views: they may be cut off at any time, and their failure is one
warning, never the end of a run.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import rich.console
from pydantic import Field
from pydantic.dataclasses import dataclass
from rich.live import Live
from rich.text import Text

from bitnet.durable import write_atomic
from bitnet.progress import Reports
from bitnet.schema import STRICT, Count, Positive, UserError, read_file
from bitnet.training.trackers import TensorBoard, Tracker, Wandb
from bitnet_kernels.bench.machine import commit


@dataclass(frozen=True, config=STRICT)
class LogConfig:
    """The ``[log]`` section: what is logged, how often and where to."""

    every: Positive = 10
    """Steps between lines of metrics.jsonl (and of the console if it is not a terminal)."""
    telemetry_every: Count = 100
    """Steps between readings of the ternary weights (zeros, flips, ...); 0 turns them off."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """offline: kept in the run folder for `wandb sync`; online: needs an API key; disabled: off."""
    wandb_project: Annotated[str, Field(min_length=1)] = "bitnet"
    """The wandb project."""
    tensorboard: bool = False
    """Also write TensorBoard files, to tensorboard/ in the run folder; needs the package."""


class MetricsFile:
    """``metrics.jsonl``, append-only between rewinds.

    Arguments:
        path: of the file; the first write creates it and its folder.
    Raises:
        UserError: from any method, if the file cannot be written (permissions, a full disk).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line and pass it to the operating system at once: it survives a kill of the
        process, and after :meth:`sync` a crash of the machine.

        Floats are written with all their digits and read back bit for bit. JSON has no NaN and
        no infinity; both become ``null``.

        Arguments:
            row: ``step`` (int: completed steps) and any other values that JSON can hold.
        """
        assert type(row.get("step")) is int, "a line without its step cannot be rewound"
        line = memoryview(json.dumps(_json_value(row), allow_nan=False).encode() + b"\n")
        with _user_error(self.path):
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.path, b"")  # so that the name survives a power cut too
            with self.path.open("ab", buffering=0) as file:
                while line:
                    line = line[file.write(line) :]

    def sync(self) -> None:
        """Wait until every line is on disk; call before a checkpoint becomes durable."""
        with _user_error(self.path):
            if self.path.exists():
                with self.path.open("rb") as file:
                    os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Keep exactly the complete lines with a step <= ``step``; atomic (write aside, rename).

        Call once before the first append, with the checkpoint's step, or with -1 if there is no
        checkpoint. Deletes everything that a killed process left past it, even half a last line.

        Raises:
            UserError: a line before the kept ones is not a JSON object with a step; a kill cannot
                cause that damage.
        """
        with _user_error(self.path):
            data = read_file(self.path, 2**30) if self.path.exists() else b""
        kept, damaged = [], 0
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            line_step = _step_of(line)
            if line_step is None:
                damaged = damaged or number
            elif line_step <= step:
                if damaged:
                    raise UserError(
                        f"{self.path}: line {damaged} is not a JSON object with a step; "
                        "delete that line, or move the file away"
                    )
                kept.append(line + b"\n")
        if (new := b"".join(kept)) == data:
            return
        with _user_error(self.path):
            write_atomic(self.path, new)


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return value


def _step_of(line: bytes) -> int | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else None


@contextmanager
def _user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


_CONTROL_CODES = (*range(9), *range(11, 32), *range(127, 160))  # all but tab and newline
_PRINTABLE = dict.fromkeys(_CONTROL_CODES, "\N{REPLACEMENT CHARACTER}")


_LONG_WAIT = 0.01
"""Waiting for data is shown from this share of the time on."""


class Console:
    """A live line on a terminal; elsewhere (a pipe, a CI log) a plain line every ``every`` steps.

    rich decides which, and honours NO_COLOR, TERM and FORCE_COLOR. Use as a context manager: the
    terminal's cursor comes back however the run ends.

    Arguments:
        total_steps: of the run. start_step: where this process resumed.
        every: steps between plain lines; the last step has one too.
        quiet: print nothing at all.
        file: default stdout.
        clock: seconds, for the ETA; wall time of this process, including evaluations and
            checkpoints.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        every: int = 1,
        quiet: bool = False,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps, self.start_step, self.every = total_steps, start_step, every
        self._clock, self._start = clock, clock()
        self._val_bpb = math.nan
        self._last_line = -1
        self._rich = rich.console.Console(
            file=file, quiet=quiet, markup=False, highlight=False, emoji=False
        )
        terminal = self._rich.is_terminal and not self._rich.is_dumb_terminal and not quiet
        self._live = Live(console=self._rich, refresh_per_second=4) if terminal else None
        self._reports = Reports(console=self._rich, disable=True)  # lines, but no bars
        self._doing = self._reports.add_task("starting", total=None)

    def __enter__(self) -> "Console":
        if self._live is not None:
            self._live.start()
        self._reports.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._reports.stop()
        if self._live is not None:
            self._live.stop()

    def progress(self, step: int, row: Mapping[str, Any]) -> None:
        """Show a step, once or more. Uses those of the row's ``loss``, ``val_bpb`` (the last one
        seen stays), ``tokens_per_second``, ``data_wait`` (if it is 1% or more) and ``lr`` that are
        there."""
        self._val_bpb = row.get("val_bpb", self._val_bpb)
        done = step - self.start_step
        seconds = (self._clock() - self._start) * (self.total_steps - step) / max(done, 1)
        fields = [f"step {step}/{self.total_steps}"]
        if "loss" in row:
            fields.append(f"loss {row['loss']:.4f}")
        fields.append(f"ETA {_duration(seconds)}" if done > 0 else "ETA ?")
        if not math.isnan(self._val_bpb):
            fields.append(f"val {self._val_bpb:.3f} bpb")
        if "tokens_per_second" in row:
            wait = row.get("data_wait", 0.0)
            waits = f", {wait:.0%} of the time waiting for data" if wait >= _LONG_WAIT else ""
            fields.append(f"{row['tokens_per_second']:,.0f} tok/s{waits}")
        if "lr" in row:
            fields.append(f"lr {row['lr']:.2e}")
        if self._live is None:
            due = step % self.every == 0 or step == self.total_steps
            if due and step != self._last_line:
                self.print("  ".join(fields))
                self._last_line = step
            return
        while len(fields) > 1 and len("  ".join(fields)) > self._rich.width:
            fields.pop()  # the most important fields come first
        self._live.update(Text("  ".join(fields), no_wrap=True, overflow="ellipsis"))

    def print(self, text: str, style: str = "") -> None:
        """Print lines (above the live line). Replaces control characters, which a generated sample
        may hold, and characters that the stream cannot encode."""
        encoding = self._rich.encoding
        text = text.translate(_PRINTABLE).encode(encoding, "replace").decode(encoding)
        self._rich.print(Text(text, style=style), soft_wrap=True)
        self._reports.reset(self._doing)

    def doing(self, what: str) -> None:
        """Name the work that begins. Without a terminal, a line on stderr shows it after some time
        without another line."""
        self._reports.update(self._doing, description=what)

    def warn(self, text: str) -> None:
        """Print a warning line."""
        self.print(f"warning: {text}", style="yellow")


class RunLog:
    """All outputs of a run, ``metrics.jsonl``, trackers and the console, as one object.

    Use as a context manager: however the run ends, trackers are closed (as failed, if an exception
    ends it) and the terminal's cursor comes back. ``print``, ``warn`` and ``doing`` are those of
    :class:`Console`.

    Arguments:
        config: of the run. folder: of the run.
        step: completed steps; later lines of metrics.jsonl are deleted. None: a new run.
        total_steps: of the run.
        silent: write and print nothing; for all processes except the main one.
    """

    def __init__(
        self,
        config: LogConfig,
        folder: Path,
        step: int | None,
        total_steps: int,
        silent: bool = False,
    ) -> None:
        self._config, self._folder, self._step = config, folder, step
        self._file = None if silent else MetricsFile(folder / "metrics.jsonl")
        if self._file is not None:
            self._file.rewind(-1 if step is None else step)
        self._console = Console(total_steps, step or 0, every=config.every, quiet=silent)
        self._trackers: list[Tracker] = []
        self._shown: dict[str, Any] = {}
        self.print, self.warn = self._console.print, self._console.warn
        self.doing = self._console.doing

    def __enter__(self) -> "RunLog":
        self._console.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for tracker in self._trackers:
                tracker.finish(0 if kind is None else 1)
        finally:
            self._console.__exit__()

    def track(self, name: str, settings: Mapping[str, Any]) -> None:
        """Start the trackers, under the run's name and with its resolved config and commit.

        Raises:
            UserError: ``log.tensorboard`` is set, but the package is missing.
        """
        if self._file is None:
            return
        settings = {"commit": commit(), **settings}
        if self._config.tensorboard:
            first = 0 if self._step is None else self._step + 1
            board = TensorBoard(self._folder / "tensorboard", settings, first, self.warn)
            self._trackers.append(board)
        if (mode := self._config.wandb) != "disabled":
            project = self._config.wandb_project
            self._trackers.append(Wandb(mode, project, self._folder, name, settings, self.warn))

    def row(self, row: Mapping[str, Any], *, record: bool) -> None:
        """Show numbers of ``row["step"]``, in addition to those shown before.

        Arguments:
            record: also write them to metrics.jsonl and to the trackers.
        """
        step = row["step"]
        if record and self._file is not None:
            self._file.append(row)
            for tracker in self._trackers:
                tracker.log(row, step)
        self._shown |= row
        self._console.progress(step, self._shown)

    def sync(self) -> None:
        """Wait until every line of metrics.jsonl is on disk; call before a checkpoint."""
        if self._file is not None:
            self._file.sync()


def _duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{int(seconds) % 60:02}s"
