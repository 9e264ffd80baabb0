"""Mutations of values, bytes and files, and a process whose memory is measured, for fuzz tests.

Not a test module.
"""

import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Fuzz = Callable[[Path, int, int], int]
"""(folder, count, seed) -> how many of ``count`` mutants were accepted."""
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 1.5, 2**24, 2**24 + 1, 2**31, 2**63, 10**9, 10**400),
    *(float("nan"), float("inf"), -float("inf"), 1e308, 1e-320, "", "x", "\0", "é😀", "../x", "1"),
    *([], [1], [[]], ["x"], {}, {"a": 1}, {"rope_type": "yarn", "factor": 2.0}, "x" * 10_000),
]


def somewhere(value: Any, rng: random.Random) -> Any:
    """The value with one part, at any depth, replaced, removed, renamed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        what = rng.randrange(6)
        if what < 3:
            return value | {key: somewhere(value[key], rng)}
        rest = {k: v for k, v in value.items() if k != key}
        return [value | {key: rng.choice(VALUES)}, rest, rest | {f"{key}x": value[key]}][what - 3]
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], somewhere(value[i], rng), *value[i + rng.randrange(2) :]]
    return rng.choice(VALUES)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The data with bytes flipped, cut, repeated or inserted."""
    what, at = rng.randrange(5), rng.randrange(max(1, len(data)))
    if what == 0:
        return data[:at]
    if what == 1:
        return data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:]
    if what == 2:
        return data[:at] + data[at // 2 :]
    changed = bytearray(data)
    for _ in range(1 if what == 3 else 20):
        if changed:
            changed[rng.randrange(min(len(changed), 2000))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def odd_file(path: Path, rng: random.Random) -> None:
    """Replace a file by a folder, a FIFO, a device, a link to itself or a 20 GB sparse file."""
    data = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    what = rng.randrange(7)
    if what == 0:
        path.mkdir()
    elif what == 1:
        os.mkfifo(path)
    elif what == 2:
        path.symlink_to(path.name)
    elif what == 3:
        path.symlink_to("/dev/zero")
    elif what < 6:
        path.write_bytes(data if what == 4 else b"")
        os.truncate(path, 20 * 10**9)


def peak() -> float:
    """This process's peak memory in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def in_a_process(function: Fuzz, root: Path, count: int) -> tuple[int, float]:
    """Run ``function(root, count, seed=0)`` in a separate process that may take at most 4 GB of
    anonymous memory; returns its result and its peak memory in GB."""
    module, name = function.__module__, function.__name__
    code = (
        "import resource, sys, warnings; warnings.simplefilter('ignore'); from pathlib import Path;"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32));"  # anonymous memory, not files
        f"from {module} import {name}; from tests.helpers.hostile import peak;"
        f"found = {name}(Path(sys.argv[1]), {count}, 0);"
        "print('\\nfound', found, peak())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=550,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found, gigabytes = run.stdout.split()[-2:]
    return int(found), float(gigabytes)
