"""Checkpoints under SIGKILL at every moment, and on a full disk."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bitnet.training.checkpoint import load_newest, resume, save
from tests.helpers.checkpoints import is_whole, names, write


@pytest.mark.parametrize("nth", range(7))
@pytest.mark.parametrize("again", [False, True])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, again: bool) -> None:
    """The n-th fsync of a save (5 files, 2 folders) finds the disk full."""
    write(tmp_path, 1)
    write(tmp_path, 2)
    fsync, calls = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2 if again else 3)
    monkeypatch.undo()
    written = nth == 6 and not again  # only the last fsync failed, after the rename
    resumed = resume(tmp_path)
    assert resumed is not None
    assert resumed.step == (3 if written else 2)
    assert is_whole(resumed)
    assert names(tmp_path) == {f"step_{step:08d}" for step in range(1, resumed.step + 1)}


def test_a_tensor_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="complex128"):
        save(
            tmp_path,
            1,
            {"a": {"b": torch.eye(2)}, "c": {"d": torch.eye(2).to(torch.complex128)}},
            {},
        )
    with pytest.raises(TypeError):
        save(tmp_path, 1, {}, {"not JSON": object()})
    assert names(tmp_path) == set()


CHILD = """
import os, signal, sys
import torch
import bitnet.training.checkpoint
from bitnet.training.checkpoint import prune, resume, save

torch.set_num_threads(1)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)

def train(root, steps, kill_at):
    count = 0
    def deadly(call):
        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return counted
    for name in ("mkdir", "fsync", "rename", "chmod", "unlink", "rmdir") if kill_at else ():
        setattr(os, name, deadly(getattr(os, name)))
    resumed = resume(bitnet.training.checkpoint.Path(root))
    first = 1 if resumed is None else resumed.step  # the last step is saved again
    for step in range(first, first + steps):
        groups = {
            "model": {"w": torch.full((300, 1000), float(step))},
            "optim": {"s": torch.tensor(step)},
        }
        save(bitnet.training.checkpoint.Path(root), step, groups, {"step": step}, 1 / step)
        prune(bitnet.training.checkpoint.Path(root), 1, True)

for line in sys.stdin:
    root, steps, kill_at = line.split()
    pid = os.fork()
    if pid == 0:
        try:
            train(root, int(steps), int(kill_at))
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    print(pid, flush=True)
"""


@pytest.fixture(scope="module")
def trainer() -> Iterator[Callable[[Path, int, int], int]]:
    """Starts processes that save checkpoint after checkpoint, forked from one that has loaded
    torch; gives their ids."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def start(root: Path, steps: int, kill_at: int) -> int:
            stdin.write(f"{root} {steps} {kill_at}\n")
            stdin.flush()
            return int(stdout.readline())

        yield start


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.002)
    pytest.fail("the process is still alive")


def test_sigkill_at_random_moments(
    tmp_path: Path, trainer: Callable[[Path, int, int], int]
) -> None:
    dice, step = random.Random(0), 0
    for _ in range(8):
        pid = trainer(tmp_path, 1_000_000, 0)
        time.sleep(dice.uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)
        newest = resume(tmp_path)
        if newest is None:
            assert step == 0, "killed before the first was written"
            continue
        assert newest.damaged == []
        assert is_whole(newest)
        assert newest.step >= step
        step = newest.step
    assert step > 8


def test_sigkill_at_every_call_of_a_save(
    tmp_path: Path, trainer: Callable[[Path, int, int], int]
) -> None:
    """A save that replaces, a save that is new and their pruning, killed at every system call that
    changes the folder: then the run is started again, and no step is ever lost."""
    between_renames = 0
    for kill_at in range(1, 200):
        root = tmp_path / str(kill_at)
        write(root, 1, 1.0)
        wait_gone(trainer(root, 2, kill_at))
        finished = names(root) == {"step_00000002"}
        between_renames += load_newest(root) is None
        resumed = resume(root)
        assert resumed is not None, kill_at
        assert resumed.damaged == []
        assert resumed.step in (1, 2)
        assert is_whole(resumed)
        assert not any(name.startswith(".") for name in names(root))
        if finished:
            assert kill_at > 30
            assert between_renames == 1, "the one moment in which only the old name exists"
            break
    else:
        pytest.fail("a save makes more calls than this test counts")
