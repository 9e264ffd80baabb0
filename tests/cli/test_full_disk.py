"""Commands that write, on a full disk: one line, and what was there stays as it was.

A limit on the size of files stands for the disk, as in ``ulimit -f``."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitnet.bench import pages
from bitnet.cli import inspect_kernels
from bitnet_kernels.bench import rows
from tests.helpers.folders import write_folders

Bitnet = Callable[..., tuple[int, str, str]]
LIMIT = 64
"""Bytes of a file that still fit: fewer than any output has."""
COMMANDS = {
    "prepare": "prepare {root}/text.txt --path {out} --tokenizer {root}/tokenizer.model",
    "pack": "pack {root}/model --tokens 1 --out {out}",
    "convert": "convert {root}/fp quant.weights=int --out {out}",
    "export": "export {root}/model --to hf --out {out}",
    "ptq --out": "ptq {root}/fp --text {root}/text.txt --methods rtn --bits 8 --eval-tokens 64 "
    "--out {out}",
    "ptq --csv": "ptq {root}/fp --text {root}/text.txt --methods rtn --bits 8 --eval-tokens 64 "
    "--csv {out}",
}

REPLACING = ("pack", "ptq --csv")
"""Commands that replace an earlier output; the others refuse to."""


@contextmanager
def full_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder: Path) -> dict[str, bytes]:
    """By name; without locks, which stay, since removing one would race."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("full")
    write_folders(root)
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(
    command: str, bitnet: Bitnet, root: Path, tmp_path: Path
) -> None:
    words = COMMANDS[command].format(root=root, out=tmp_path / "out").split()
    for _ in range(2 if command in REPLACING else 1):
        before = files(tmp_path)
        with full_disk():
            code, _, err = bitnet(*words)
        assert code == 2, err
        assert "Traceback" not in err
        *_, line = err.splitlines()
        assert line.startswith("error: ")
        assert line.endswith("File too large")
        assert files(tmp_path) == before
        code, _, err = bitnet(*words)
        assert code == 0, err
        assert files(tmp_path)


def test_pages_and_tables_are_replaced_whole(tmp_path: Path) -> None:
    report: Any = SimpleNamespace(sm=90, _asdict=lambda: {"name": "x" * LIMIT})
    writers: dict[str, Callable[[], None]] = {
        "page": lambda: pages.write(tmp_path, {"page": "x" * LIMIT + "\n"}),
        "table": lambda: inspect_kernels.write_csv(tmp_path / "table", [report]),
        "kernels": lambda: rows.write(tmp_path / "kernels", []),
    }
    for name, write in writers.items():
        (tmp_path / name).write_text("old")
        with full_disk(), pytest.raises(OSError, match="File too large"):
            write()
        assert files(tmp_path)[name] == b"old"
        write()
        assert (tmp_path / name).stat().st_size > LIMIT
    assert set(files(tmp_path)) == set(writers)
