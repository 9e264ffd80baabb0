"""Folders that all processes of a run of the tests share. Not a test module."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

Make = Callable[[Path], object]
Shared = Callable[[str, Make], Path]
"""The fixture ``shared``: the folder of a name, filled by ``make(folder)`` once per run."""


def shared_folder(root: Path, name: str, make: Make) -> Path:
    """``root / name``, which the first process to ask fills while the others wait.

    Each worker of pytest-xdist is a session, so a session fixture alone is made once per worker.
    """
    path, done = root / name, root / f"{name}.done"
    root.mkdir(exist_ok=True)
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(path, ignore_errors=True)  # what a ``make`` that failed left
            path.mkdir()
            make(path)
            done.touch()
    return path
