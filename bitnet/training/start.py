"""Start the processes of a run together: in the same start, with the same config and code.

The processes share only torchrun's key-value store so far. :func:`name_start` distinguishes this
start of the processes from earlier ones. :func:`agree` compares their settings: processes with
different learning rates, or different versions of a layer, would train a model that nobody asked
for. With different strategies they would wait for each other forever.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import bitnet_kernels
from bitnet.schema import UserError

LIMIT = 600.0
"""Seconds that processes wait for each other at the start, unless ``distributed.timeout`` is more:
imports from a busy file system take minutes. torchrun waits for its machines equally long."""
SOURCES = (Path(__file__).parents[1], Path(bitnet_kernels.__file__).parent)
"""The folders of ``bitnet`` and ``bitnet_kernels``."""
POLL = 0.1
"""Seconds between reads of the store. (Waiting in the store itself would block signals.)"""


def name_start(store: Any, rank: int, size: int, limit: float) -> str:
    """A name for this start of the processes: the same on all of them, and never used before.

    torchrun may keep its store when it restarts the processes. Values left by the earlier start,
    such as addresses, then look like answers. So each process writes a random word. The main one
    repeats the words that it reads until each process has confirmed that it saw its own.

    Raises:
        UserError: after ``limit`` seconds some processes have not started; the error names them.
    """
    word, deadline = secrets.token_hex(8), time.monotonic() + limit
    store.set(f"word/{rank}", word)
    missing = set(range(1, size)) if rank == 0 else {0}
    while time.monotonic() < deadline:
        if rank == 0:
            keys = [f"word/{r}" for r in range(size)]
            heard = [store.get(key).decode() for key in keys if store.check([key])]
            store.set("heard", " ".join(heard))
            missing = {r for r in missing if not store.check([f"joined/{word}/{r}"])}
            if not missing:
                return word
        elif store.check(["heard"]):
            name, *others = store.get("heard").decode().split()
            if word in others:
                store.set(f"joined/{name}/{rank}", "")
                return name
        time.sleep(POLL)
    raise _not_started(missing, size, limit)


def agree(store: Any, rank: int, size: int, facts: Mapping[str, str], limit: float) -> None:
    """Compare the facts of all processes with the main one's.

    Arguments:
        store: of this start alone. facts: name -> value, of this process.
    Raises:
        UserError: on all processes, if a fact differs; it names the first process that differs.
    """
    store.set(f"facts/{rank}", json.dumps(facts))
    if rank == 0:
        verdict = ""
        for other in range(1, size):
            theirs = json.loads(_take(store, f"facts/{other}", other, size, limit))
            verdict = verdict or _difference(other, theirs, facts)
        store.set("verdict", json.dumps(verdict))
    else:
        verdict = json.loads(_take(store, "verdict", 0, size, limit))
    if verdict:
        raise UserError(verdict)


def facts_of(config: Mapping[str, Mapping[str, Any]], device: torch.device) -> dict[str, str]:
    """The facts that must be the same on all processes.

    Arguments:
        config: section -> key -> value. device: of this process; only its type counts.
    """
    facts = {f"{s}.{key}": repr(value) for s, keys in config.items() for key, value in keys.items()}
    return facts | {"device": device.type, "torch": torch.__version__, "source code": source_hash()}


def source_hash(roots: Sequence[Path] = SOURCES) -> str:
    """The first digits of a sha256 of the names and contents of all Python files in folders."""
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _difference(rank: int, theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Describe in one line how a process differs from the main one; "" if it does not."""
    keys = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
    if not keys:
        return ""
    pairs = [f"{key} = {theirs.get(key)}, rank 0 with {ours.get(key)}" for key in keys]
    return (
        f"rank {rank} was started with {'; with '.join(pairs)}: start all processes with the same "
        "config, code and torch"
    )


def _take(store: Any, key: str, rank: int, size: int, limit: float) -> str:
    """Read a process's value from the store; UserError if it is missing after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise _not_started({rank}, size, limit)
        time.sleep(POLL)
    return str(store.get(key).decode())


def _not_started(missing: set[int], size: int, limit: float) -> UserError:
    names = ", ".join(map(str, sorted(missing)))
    return UserError(f"rank {names} of {size} has not started after {limit:g} s")
