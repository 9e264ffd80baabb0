"""torchrun and train.py: what one process writes, from two; signals, kills, mistakes and hangs.

torchrun itself starts those that it has to start again. The others have the environment that it
gives, but are forked: torchrun's three interpreters would each import torch.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.training_script import (
    TRAIN,
    Run,
    exact,
    outputs,
    read_metrics,
    spawn_ranks,
    train_ranks,
)

COMMAND = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@contextmanager
def torchrun(*args: str) -> Iterator[subprocess.Popen[str]]:
    """The agent, whose processes end with it; ``args`` are its own up to the first config."""
    own = [arg for arg in args if arg.startswith("--")]
    rest = [arg for arg in args if arg not in own]
    process = subprocess.Popen(
        [
            *COMMAND,
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
            *own,
            str(TRAIN),
            *rest,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def without_reductions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is the same whatever the order of sums, of the steps before a code turns."""
    return [{key: row[key] for key in ("step", "tokens", "lr", "wd") if key in row} for row in rows]


def wait_for_step(step: int, metrics: Path) -> None:
    deadline = time.monotonic() + 100
    while not (metrics.exists() and f'{{"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.01)


def pid_of(agent: subprocess.Popen[str], rank: int, metrics: Path, step: int) -> int:
    """A process of the agent, once the metrics hold a step."""
    wait_for_step(step, metrics)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def test_ddp_writes_what_one_process_writes(config_file: Path, tmp_path: Path, run: Run) -> None:
    """Two shares of 4 sequences are the two micro-batches of one process: to the bit."""
    expected = exact(run("run.name=one"))
    out = train_ranks(2, str(config_file), f"run.dir={tmp_path}", "run.name=two")
    assert exact(read_metrics(tmp_path / "two")) == expected
    assert out.count("step 40/40") == 1, "one process speaks"
    assert (tmp_path / "two" / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model" / "model.safetensors"
    ).read_bytes()


def test_fsdp_is_killed_and_resumes(config_file: Path, tmp_path: Path, run: Run) -> None:
    """SIGKILL of a process ends the other and torchrun starts both again: nothing is lost or
    doubled, and the run ends as one that was never killed."""
    options = ("distributed.strategy=fsdp", f"run.dir={tmp_path}", "train.steps=22")
    train_ranks(2, str(config_file), *options, "run.name=whole")
    expected = exact(read_metrics(tmp_path / "whole"))
    metrics = tmp_path / "killed" / "metrics.jsonl"
    with torchrun("--max-restarts=1", str(config_file), *options, "run.name=killed") as agent:
        os.kill(pid_of(agent, 1, metrics, 16), signal.SIGKILL)
        out, _ = agent.communicate(timeout=100)
        assert agent.returncode == 0, out
    assert "resumed at step 14" in out
    assert exact(read_metrics(tmp_path / "killed")) == expected
    alone = exact(run("run.name=one", "train.steps=22"))
    assert without_reductions(expected) == without_reductions(alone)
    losses = [[row["loss"] for row in rows if "loss" in row][:2] for rows in (expected, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5, rel=0)


def test_a_signal_to_one_process_stops_all(config_file: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    args = [str(config_file), f"run.dir={tmp_path}", "train.steps=100000"]
    with spawn_ranks(2, args) as processes:
        wait_for_step(3, metrics)
        processes[1].send_signal(signal.SIGTERM)
        out, _ = outputs(processes, timeout=60)
    assert all(process.returncode for process in processes)
    stopped = re.search(r"stopped at step (\d+) and saved", out)
    assert stopped is not None, out
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert int(stopped[1]) == last
    assert (tmp_path / "tiny" / "checkpoints" / f"step_{last:08d}").is_dir()


def test_a_mistake_is_reported_once(config_file: Path, tmp_path: Path) -> None:
    mistake = ("train.batch_tokens=288", "train.micro_batch=1")
    with spawn_ranks(2, [str(config_file), f"run.dir={tmp_path}", *mistake]) as processes:
        assert processes[0].wait(60) == 2
        processes[1].terminate()  # as torchrun does
        _, err = outputs(processes)
    assert processes[1].returncode
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: train.batch_tokens = 288 is 9 sequences of data.seq_len = 32, which 2 processes "
        "cannot share equally; the nearest that they can: 256"
    ]
    assert not (tmp_path / "tiny").exists()


@pytest.mark.slow  # torchrun waits 30 s for the process that hangs
def test_a_hang_names_the_process(config_file: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    options = ("distributed.timeout=5", "train.steps=100000", f"run.dir={tmp_path}")
    with torchrun(str(config_file), *options) as agent:
        os.kill(pid_of(agent, 1, metrics, 3), signal.SIGSTOP)
        out, _ = agent.communicate(timeout=100)
    assert "error: rank 1 of 2 ended or hangs: the others waited for it in vain" in out
