"""train.py as a module and as a process, and what it wrote. Not a test module.

train.py is in no package, so it is loaded by its path.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).parents[2] / "train.py"

_spec = importlib.util.spec_from_file_location("train", TRAIN)
assert _spec is not None
assert _spec.loader is not None
train = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train)

Run = Callable[..., list[dict[str, Any]]]
"""Trains with overrides of the config; returns the lines of metrics."""
TIMED = ("tokens_per_second", "data_wait", "mfu", "peak_memory_bytes")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def exact(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without the fields that are measured, not computed."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def torchrun(n: int, *args: str) -> str:
    """Train with ``n`` processes, on one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    done = subprocess.run(
        [sys.executable, *(launcher if n > 1 else []), str(TRAIN), *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def spawn(args: list[str], wrapper: str = "", **environment: str) -> subprocess.Popen[str]:
    """Start train.py; ``wrapper`` is code that runs it after a change."""
    command = [str(TRAIN), *args]
    if wrapper:
        command = ["-c", f"import sys; sys.argv = {command!r}\n{wrapper}"]
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def kill_at(process: subprocess.Popen[str], metrics: Path, step: int, delay: float) -> None:
    """SIGKILL once the metrics hold ``step`` and a moment has passed."""
    wanted = f'{{"step": {step},'
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and wanted in metrics.read_text():
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        time.sleep(0.001)
    process.communicate()
