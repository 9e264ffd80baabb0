"""The tools of the tests: folders that a run shares, and the time limit of tests/machines.py."""

import time
from pathlib import Path

import pytest

from tests.helpers.shared import shared_folder
from tests.machines import count, run_suite


def test_a_shared_folder_is_made_once_and_anew_after_a_failure(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / f"{len(made)}").touch()
        if len(made) == 1:
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        shared_folder(tmp_path / "shared", "model", make)
    for _ in range(2):
        folder = shared_folder(tmp_path / "shared", "model", make)
        assert [path.name for path in folder.iterdir()] == ["2"]
    assert made == [folder, folder]


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    assert run_suite({}, tmp_path / "log.txt", limit=0.01) is None
    assert time.monotonic() - start < 10


def test_counts_come_from_pytests_last_line() -> None:
    summary = "3 failed, 6012 passed, 14 errors in 5000.57s (1:23:20)"
    assert [count(summary, what) for what in ("passed", "failed", "error")] == [6012, 3, 14]
    assert count("no tests ran", "passed") == 0
