"""A process that is measured. The benchmark's end sends requests, the worker's end answers.

Each contender has its own process, since peak memory belongs to a process and a compiler leaves
much behind. The two ends exchange lines of JSON over pipes: a request ``[method, *values]`` calls
the worker's method with the values, and the reply is the result. A worker without a request waits
for a line, and takes no time from the others.

A worker leads its own process group: Ctrl-C reaches only the parent, and closing a worker also
ends the processes that it started, such as a compiler's helpers. If the parent is killed, its
workers end after their turn, when there is nothing left to read.
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
    """Raised when a worker ended; the message names it and ends with its last lines."""


class Worker:
    """The parent's end of a worker. :meth:`close` ends the process, whatever it is doing.

    Arguments:
        name: its name in messages, unique in the folder.
        module, arguments: the program, ``python -m module *arguments``; it calls :func:`serve`.
        folder: for its error output.
        fewer: option that reduces the number of workers, for the hint when memory runs out.
        environment: variables to add to those of this process.
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
        """Call a method of the worker and return its result, as it comes back from JSON. Raises
        WorkerDied if the worker ends instead."""
        requests, replies = self._pipes()
        with suppress(BrokenPipeError):
            requests.write(json.dumps([method, *values]) + "\n")
            requests.flush()
        line = replies.readline()
        if not line.endswith("\n"):
            raise WorkerDied(self._last_words())
        return json.loads(line)

    def kill(self) -> None:
        """End the worker and what it started. For another thread than the one in :meth:`ask`, whose
        call then raises WorkerDied."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the worker and what it started."""
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
    """The worker's end: answers requests until its standard input is closed.

    Arguments:
        make: returns the methods by name. It is called after standard output has been redirected,
            so that a library's prints are not taken for replies.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    methods = make()
    for line in sys.stdin:
        method, *values = json.loads(line)
        print(json.dumps(methods[method](*values)), file=replies, flush=True)
