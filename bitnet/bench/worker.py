"""A process that is measured, both of its ends: the benchmark asks, and the worker answers.

One that is measured has a process of its own, since peak memory is a process's and a compiler
leaves much behind. The two ends talk in lines of JSON over pipes: a request is ``[method,
*values]``, and so is what the worker's method of that name is called with. One that is not asked
waits for a line, and so takes no time from the others.

A worker leads a process group of its own: Ctrl-C reaches the parent alone, and closing a worker
ends what it started too, such as a compiler's helpers. A parent that is killed outright leaves
workers that end with their turn, when there is nothing left to read.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


class WorkerDied(RuntimeError):
    """A worker ended by itself; the message names it and gives its last words."""


class Worker:
    """The parent's end of a worker. :meth:`close` ends it, whatever it is doing.

    Arguments:
        name: what messages call it, unique in the folder.
        module, arguments: what is run, ``python -m module *arguments``; it calls :func:`serve`.
        folder: for its error output.
        fewer: the options that make less of what is alive together, for whom memory was short.
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        fewer: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self._fewer, self._said = name, fewer, folder / f"{name}.txt"
        with self._said.open("wb") as said:
            self.process: subprocess.Popen[str] = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                encoding="utf-8",
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def ask(self, method: str, *values: float | str) -> Any:
        """What the worker's method returns, as JSON has it. WorkerDied if it ends instead."""
        requests, replies = self._pipes()
        with suppress(BrokenPipeError):
            requests.write(json.dumps([method, *values]) + "\n")
            requests.flush()
        line = replies.readline()
        if not line.endswith("\n"):
            raise WorkerDied(self._last_words())
        return json.loads(line)

    def kill(self) -> None:
        """End it and what it started; from another thread than the one that asks, which then gets
        WorkerDied."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it and what it started."""
        self.kill()
        self.process.wait()
        for pipe in self._pipes():
            with suppress(BrokenPipeError):
                pipe.close()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def _last_words(self) -> str:
        code = self.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        said = self._said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        hint = ""
        if code == -signal.SIGKILL or any("OutOfMemory" in line for line in said):
            hint = f"\nout of memory? All are alive together: fewer {self._fewer}"
        tail = "".join(f"\n  {line}" for line in said[-5:])
        return f"{self.name}: its process ended ({how}){tail}{hint}"


def serve(make: Callable[[], Mapping[str, Callable[..., Any]]]) -> None:
    """The worker's end: answers until its standard input is closed, as the parent's end does.

    Arguments:
        make: gives the methods by name; called when what a library prints no longer is a reply.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    methods = make()
    for line in sys.stdin:
        method, *values = json.loads(line)
        print(json.dumps(methods[method](*values)), file=replies, flush=True)
