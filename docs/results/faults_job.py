"""torchrun as faults.py needs it: its processes by rank, its output, its end."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LIMIT = 900.0
"""Seconds that anything may take."""


class Job:
    """Agents of torchrun (one for each machine) that write into one file."""

    def __init__(self, out: Path) -> None:
        self._out, self._agents = out, list[subprocess.Popen[bytes]]()
        out.write_bytes(b"")

    def agent(
        self,
        own: list[str],
        args: list[str],
        endpoint: str | None = "localhost:0",
        root: Path = ROOT,
    ) -> "Job":
        """Start an agent.

        Arguments:
            own: its arguments. args: those of train.py.
            endpoint: where agents meet; None: ``own`` says it.
            root: the sources that train.py is to import.
        """
        meet = [] if endpoint is None else ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
        command = [sys.executable, "-m", "torch.distributed.run", *meet, *own]
        path = os.pathsep.join((str(root), str(root / "kernels")))
        with self._out.open("ab") as file:
            started = subprocess.Popen(
                [*command, str(root / "train.py"), *args],
                cwd=root,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            )
        self._agents.append(started)
        return self

    def text(self) -> str:
        """All that was written so far."""
        return self._out.read_text(errors="replace")

    def resumed(self) -> int | None:
        """The step at which the run went on; None if it trained nothing."""
        found = re.search(r"resumed at step (\d+)", self.text())
        return int(found[1]) if found else None

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition, while the agents run."""
        end = time.monotonic() + LIMIT
        while not condition():
            if time.monotonic() > end or any(agent.poll() is not None for agent in self._agents):
                text = self.text()
                self.stop()
                raise RuntimeError(f"the job did not come to {what}:\n{text}")
            time.sleep(0.005)

    def ranks(self, n: int) -> dict[int, int]:
        """Rank -> process id."""
        found = {}
        for agent in self._agents:
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            for child in children:
                environment = Path(f"/proc/{child}/environ").read_bytes()
                if rank := re.search(rb"(?:^|\0)RANK=(\d+)\0", environment):
                    found[int(rank[1])] = int(child)
        if len(found) != n:
            raise RuntimeError(f"{len(found)} of {n} processes:\n{self.text()}")
        return found

    def ended(self, pids: Iterable[int]) -> float:
        """Seconds until the processes have ended."""
        begin, left = time.monotonic(), set(pids)
        while left and time.monotonic() < begin + LIMIT:
            left = {pid for pid in left if _runs(pid)}
            time.sleep(0.005)
        if left:
            self.stop()
            raise RuntimeError(f"processes did not end:\n{self.text()}")
        return time.monotonic() - begin

    def finish(self) -> None:
        """Wait until the agents have ended."""
        try:
            for agent in self._agents:
                agent.wait(LIMIT)
        finally:
            self.stop()

    def stop(self) -> None:
        """End what still runs, as SIGTERM does: an agent that is killed would leave its processes
        behind."""
        for agent in self._agents:
            if agent.poll() is None:
                agent.terminate()
        for agent in self._agents:
            agent.wait(LIMIT)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def said(job: Job) -> str:
    """The line that tells a user what happened; "" where there is none."""
    text = job.text()
    for pattern in (
        r"^(error: .*)$",
        r"^(warning: .*damaged.*)$",
        r"^(stopped at step \d+ and saved)",
        r"traceback : (Signal .*)$",
        r"^((?:[\w.]+\.)?\w*(?:Error|Exception): .*)$",
    ):
        if found := re.search(pattern, text, re.MULTILINE):
            return re.sub(r"(?i)\bpid:? \d+", "PID", found[1]).strip()
    return ""


def free_port() -> str:
    """An address of this machine that nothing listens on."""
    with socket.create_server(("localhost", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"
