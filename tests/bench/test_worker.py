"""The two ends of a process that is measured: what they say to each other, and how it ends."""

import signal
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from bitnet.bench.worker import Worker, WorkerDied
from bitnet.cli.bench import bench_group as group
from bitnet.cli.shell import signals_exit

TALKER = """
import os, sys
from bitnet.bench.worker import serve

def make():
    print("a library's greeting")
    return {"add": add, "where": lambda: os.environ["WHERE"]}

def add(*values):
    print("a library's remark")
    return sum(values)

serve(make)
print("heard the last of it", file=sys.stderr)
"""


def test_a_worker_answers_and_ends_with_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prints are no replies; the worker ends when nothing is left to read, as when its parent is
    killed."""
    (tmp_path / "talker.py").write_text(TALKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = Worker("talker", "talker", [], tmp_path, "of them", {"WHERE": "there"})
    with closing(worker):
        assert worker.ask("add", 1, 2, 4.5) == 7.5
        assert worker.ask("add") == 0
        assert worker.ask("where") == "there"
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        assert worker.process.wait() == 0
    said = (tmp_path / "talker.txt").read_text().splitlines()
    assert said == [
        "a library's greeting",
        *["a library's remark"] * 2,
        "heard the last of it",
    ]


DEATHS = [
    ("printf '[1'; exit 0", "it: its process ended (exit code 0)"),  # in the middle of a reply
    (
        "echo torch.OutOfMemoryError: 3 GiB >&2; exit 1",
        "it: its process ended (exit code 1)\n  torch.OutOfMemoryError: 3 GiB\n"
        "out of memory? All are alive together: fewer --these",
    ),
    ("kill -9 $$", "(signal 9)\nout of memory?"),
]


@pytest.mark.parametrize(("last", "message"), DEATHS, ids=["half", "memory", "killed"])
def test_a_death_is_told_with_the_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str, message: str
) -> None:
    script = tmp_path / "worker.sh"
    script.write_text(f"#!/bin/sh\nread line\n{last}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with (
        closing(Worker("it", "module", [], tmp_path, "--these")) as worker,
        pytest.raises(WorkerDied) as caught,
    ):
        worker.ask("turn")
    assert message in str(caught.value)


def test_sigterm_leaves_through_the_blocks_around_it() -> None:
    before, closed = signal.getsignal(signal.SIGTERM), list[str]()

    def close() -> None:
        signal.raise_signal(signal.SIGTERM)  # an impatient second one
        closed.append("closed")

    def work() -> None:
        with signals_exit(), ExitStack() as stack:
            stack.callback(close)
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("SIGTERM was ignored")

    with pytest.raises(SystemExit) as caught:
        work()
    assert (caught.value.code, closed) == (143, ["closed"])
    assert signal.getsignal(signal.SIGTERM) is before


def test_options_of_one_name_are_said_in_the_same_words() -> None:
    """Across bench train, decode and kernels; defaults and choices differ."""
    helps: dict[str, list[str]] = {}
    for name in ("train", "decode", "kernels"):
        for option in group.commands[name].params:
            helps.setdefault(str(option.name), []).append(str(getattr(option, "help", "")))
    for name, count in {"device": 3, "threads": 3, "seed": 2}.items():
        assert len(helps[name]) == count
        assert len(set(helps[name])) == 1, helps[name]
    starts = {"size": "A model's shape by its size: ", "out": "CSV file. Default: docs/results/"}
    for name, start in starts.items():
        assert len(helps[name]) >= 2
        assert all(text.startswith(start) for text in helps[name])
