"""train.py as a module and as a process, and its output. Not a test module.

train.py is not in a package, so it is loaded by its path.
"""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Never

import numpy as np
import torch
from torch.distributed import TCPStore

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
    """Train with ``n`` processes with one thread each, which torchrun starts."""
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


def start(args: list[str]) -> subprocess.Popen[str]:
    """Start train.py in a new interpreter."""
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def spawn(
    args: list[str],
    wrapper: str = "",
    before: Callable[[], object] = lambda: None,
    **environment: str,
) -> subprocess.Popen[str]:
    """Start train.py; ``wrapper`` is code that runs it after a change, ``before`` is called in the
    process.

    The process is a copy of this one, which has already imported torch. It has the signals, the
    arguments and the environment of a new process, and none of this one's random state.
    """
    code = wrapper or 'import runpy, sys; runpy.run_path(sys.argv[0], run_name="__main__")'

    def program() -> Never:
        os.closerange(3, 1 << 16)  # Popen waits for an exec or for this
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        before()
        os.environ.update(environment)
        sys.argv = [str(TRAIN), *args]
        sys.orig_argv = [sys.executable, *sys.argv]
        warnings.resetwarnings()
        torch.seed()
        np.random.seed()
        random.seed()
        status = 1
        try:
            exec(code, {"__name__": "spawned"})
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    return subprocess.Popen(
        [sys.executable],  # for the error, if it cannot be started
        preexec_fn=program,
        restore_signals=False,  # what Python ignores stays ignored
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def spawn_ranks(n: int, args: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """``n`` processes of a run, with the environment that torchrun gives them and a store outside
    of them. They end with the block."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
    processes = [spawn(args, **environment, **one) for one in own]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()


def outputs(processes: list[subprocess.Popen[str]], timeout: float = 120) -> tuple[str, str]:
    """The stdout and stderr of processes, until all have ended."""
    with ThreadPoolExecutor(len(processes)) as pool:
        said = list(pool.map(lambda one: one.communicate(timeout=timeout), processes))
    return "".join(out for out, _ in said), "".join(err for _, err in said)


def train_ranks(n: int, *args: str) -> str:
    """Train with ``n`` processes with one thread each; returns what they print."""
    with spawn_ranks(n, list(args)) if n > 1 else nullcontext([spawn(list(args))]) as processes:
        out, err = outputs(processes)
    assert [process.returncode for process in processes] == [0] * n, err
    return out


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
