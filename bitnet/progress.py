"""Progress of long work, on stderr: bars on a terminal, occasional lines elsewhere.

A log or a pipe gets one line per task every :data:`EVERY` seconds, counted from the task's start or
last reset. A background thread writes the lines, so the working loops contain no timing. A task
that ends sooner writes nothing.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

EVERY = 15.0
"""Seconds between lines about a task if there is no terminal."""


def plain_console(**options: Any) -> Console:
    """A console that prints names unchanged: no markup, no emoji codes.

    Arguments:
        options: the options of rich's Console.
    """
    return Console(markup=False, emoji=False, **options)


class Reports(Progress):
    """rich's ``Progress`` that also reports without a terminal.

    Arguments:
        columns, options: as rich's. console: default stderr, with bars that vanish at the end.
    """

    def __init__(
        self, *columns: str | ProgressColumn, console: Console | None = None, **options: Any
    ) -> None:
        if console is None:
            console = plain_console(stderr=True, highlight=False, soft_wrap=True)
            options = {"transient": True, "disable": not console.is_terminal} | options
        super().__init__(*columns, console=console, **options)
        self._ended = threading.Event()
        self._reporter: threading.Thread | None = None

    @classmethod
    def get_default_columns(cls) -> tuple[ProgressColumn, ...]:
        """rich's columns; a description may hold a folder's name, so it is not markup."""
        text = TextColumn("{task.description}", markup=False)
        return (text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())

    def start(self) -> None:
        """Start the display; called by ``with``."""
        super().start()
        if not self.console.is_terminal and self._reporter is None:
            self._ended.clear()
            self._reporter = threading.Thread(target=self._report, daemon=True)
            self._reporter.start()

    def stop(self) -> None:
        """Stop the display; called by ``with``."""
        self._ended.set()
        if self._reporter is not None:
            self._reporter.join()
            self._reporter = None
        super().stop()

    def _report(self) -> None:
        told: dict[TaskID, int] = {}
        while not self._ended.wait(EVERY / 15):
            for task in self.tasks:
                due = int((task.elapsed or 0) // EVERY)
                if due > told.get(task.id, 0) and not (task.finished or self.console.quiet):
                    print(_line(task), file=sys.stderr, flush=True)
                told[task.id] = due


@contextmanager
def reporting(what: str) -> Iterator[None]:
    """Report one task of unknown length while a block runs."""
    with Reports() as bars:
        bars.add_task(what, total=None)
        yield


def _line(task: Task) -> str:
    done = "" if not task.total else f", {task.completed / task.total:.0%}"
    return f"{task.description}{done} after {task.elapsed or 0:.0f} s"
