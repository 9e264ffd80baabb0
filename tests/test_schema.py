"""The gate for a user's input: any failure is one line that names the file or key."""

import os
from pathlib import Path

import pytest

from bitnet.schema import UserError, check_file, debugging, nearest, read_file, user_input


class Panic(BaseException):
    """Stands for what a library written in Rust raises: it is no Exception."""


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (ValueError("bad digit"), "a.toml: run.seed: bad digit"),
        (Panic("called unwrap"), "a.toml: run.seed: called unwrap"),
        (KeyError(), "a.toml: run.seed: KeyError"),
        (RecursionError("maximum recursion depth"), "a.toml: run.seed: is nested too deeply"),
        (PermissionError(13, "Permission denied"), "a.toml: run.seed: Permission denied"),
        (UserError("another line"), "another line"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_exception_becomes_the_line(raised: BaseException, line: str) -> None:
    with pytest.raises(UserError) as caught, user_input("a.toml: run.seed"):
        raise raised
    assert str(caught.value) == line
    if not isinstance(raised, UserError):
        assert caught.value.__cause__ is raised


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_ctrl_c_and_exits_pass(raised: type[BaseException]) -> None:
    with pytest.raises(raised), user_input("a.toml"):
        raise raised


def test_only_regular_files_of_a_sane_size_are_read(tmp_path: Path) -> None:
    file, fifo, sparse = tmp_path / "file", tmp_path / "fifo", tmp_path / "sparse"
    file.write_bytes(b"12345")
    os.mkfifo(fifo)
    with sparse.open("wb") as handle:
        handle.truncate(20 * 2**30)
    assert read_file(file) == b"12345"
    assert read_file(file, 5) == b"12345"
    for path, words in (
        (fifo, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "is a folder"),
        (sparse, "has 21,474,836,480 bytes"),
        (tmp_path / "missing", "No such file"),
    ):
        with pytest.raises(UserError, match=f"^{path}: .*{words}"):
            read_file(path)
    with pytest.raises(UserError, match="at most 4 are read"):
        check_file(file, 4)


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_debugging(value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITNET_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("BITNET_DEBUG", value)
    assert debugging() is expected


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a\nb.toml: no\r\n  such file\n", "a b.toml: no such file"),
        ("\x1b[31m\0\x7f.toml: \x85 \u2028x", "\\x1b[31m\\x00\\x7f.toml:  x"),
        ("two  spaces, é😀", "two  spaces, é😀"),
        (os.fsdecode(b"\xff.toml: no"), "\\udcff.toml: no"),
    ],
)
def test_a_message_is_one_line_whatever_a_name_in_it_holds(message: str, line: str) -> None:
    assert str(UserError(message)) == line


def test_nearest() -> None:
    valid = ("weights", "bits", "group_size")
    assert nearest("weigths", valid) == "weights"
    assert nearest("zzz", valid) == ""
    assert nearest("b", valid, 0) == "bits"
    assert nearest("weights", [], 0) == ""
