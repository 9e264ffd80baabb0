"""How a program of ours starts and ends: exit codes, one line, no traceback."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer

from bitnet.cli.shell import LONGEST_LINE, cut, one_line_errors, run, start
from bitnet.schema import UserError, user_input

ROOT = Path(__file__).parents[1]
Captured = pytest.CaptureFixture[str]


def ended(app: Callable[..., None], monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit code of ``app`` as a separate program."""
    program = typer.Typer(rich_markup_mode=None, add_completion=False)
    program.command()(app)
    monkeypatch.setattr(sys, "argv", ["program", *words])
    monkeypatch.setenv("BITNET_DEBUG", "")  # comes back as it was
    with pytest.raises(SystemExit) as caught:
        run(program)
    return int(caught.value.code or 0)


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.toml: bad\n  value"), 2, "error: a.toml: bad value"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
        (typer.Exit(1), 1, ""),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
        (EOFError("Compressed file ended early"), 2, "error: Compressed file ended early"),
        (MemoryError(), 2, "error: out of memory: lower train.micro_batch"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you"), 2, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory"),
        (torch.OutOfMemoryError("2 GiB"), 2, "error: out of GPU memory"),
        (OSError(errno.ENOSPC, "No space left", "x.bin"), 2, "error: x.bin: No space left"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_end_has_its_code_and_at_most_one_line(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    assert ended(raising(error), monkeypatch) == code
    err = capsys.readouterr().err.lstrip()  # Typer begins a new line for an EOFError
    assert err.startswith(line)
    assert len(err.splitlines()) == bool(line)


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        ended(raising(ZeroDivisionError()), monkeypatch)


@pytest.mark.parametrize("how", ["--debug", "BITNET_DEBUG", ""])
def test_the_traceback_of_the_cause_is_shown_where_it_is_asked_for(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def command() -> None:
        with user_input("a.toml: model.depth"):
            int("x")

    if how == "BITNET_DEBUG":
        monkeypatch.setattr("bitnet.cli.shell.debugging", lambda: True)
    assert ended(command, monkeypatch, *[how] * (how == "--debug")) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: a.toml: model.depth: invalid literal")
    assert bool(before) == bool(how)
    if how:
        assert any(line.startswith("ValueError: invalid literal") for line in before)
        assert before[0].startswith("Traceback")


def test_debug_after_two_dashes_is_an_argument(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def command(words: list[str]) -> None:
        print(words, os.environ["BITNET_DEBUG"])

    assert ended(command, monkeypatch, "--", "a", "--debug") == 0
    assert capsys.readouterr().out == "['a', '--debug'] \n"
    assert ended(command, monkeypatch, "a", "--debug", "b") == 0
    assert capsys.readouterr().out == "['a', 'b'] 1\n"


def test_error_lines_are_cut_in_the_middle(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert cut("x" * LONGEST_LINE) == "x" * LONGEST_LINE
    long = cut("a" * LONGEST_LINE + "end")
    assert len(long) == LONGEST_LINE
    assert long.startswith("aaa")
    assert long.endswith(" ... " + "a" * 492 + "end")

    def command(number: int = 0) -> None:
        raise UserError("n" * 10_000)

    for words in ([], ["--number", "9x" * 5_000], ["--" + "no" * 5_000]):
        assert ended(command, monkeypatch, *words) == 2
        assert max(map(len, capsys.readouterr().err.splitlines())) <= LONGEST_LINE + 100


@pytest.mark.parametrize("value", ["0", "-5", "1", "99999999999999", "²", "x", " 80", "", "1e3"])
def test_a_size_that_no_terminal_has_is_passed_over(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COLUMNS", "LINES"):
        monkeypatch.setenv(name, value)
    with one_line_errors():
        assert not os.environ.get("COLUMNS")
        assert not os.environ.get("LINES")
    for name in ("COLUMNS", "LINES"):
        monkeypatch.setenv(name, "132")
    with one_line_errors():
        assert os.environ["COLUMNS"] == os.environ["LINES"] == "132"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cleans_up_and_the_handler_goes(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGHUP)]
    cleaned = []

    def command() -> None:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGHUP)  # shells send a second one
            cleaned.append(True)

    assert ended(command, monkeypatch) == 128 + number
    assert cleaned == [True]
    for n, handler in zip((signal.SIGTERM, signal.SIGHUP), before, strict=True):
        assert signal.signal(n, handler) is signal.SIG_DFL


def test_an_ignored_sighup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a command
    assert ended(lambda: signal.raise_signal(signal.SIGHUP), monkeypatch) == 0
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_a_closed_terminal_ends_a_command_without_an_error(tmp_path: Path) -> None:
    ours, terminal = os.openpty()
    code = (
        "with one_line_errors():\n"
        "    try:\n        print('begun', flush=True)\n        time.sleep(60)\n"
        "    finally:\n        print('x' * 10_000, flush=True)\n"
        f"        open({str(tmp_path / 'cleaned')!r}, 'x')"
    )

    def in_a_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where nohup runs the tests, it is ignored
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with (tmp_path / "errors").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", f"import time\nfrom bitnet.cli.shell import *\n{code}"],
            stdin=terminal,
            stdout=terminal,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=in_a_terminal,
        )
    os.close(terminal)
    assert os.read(ours, 100).startswith(b"begun")
    os.close(ours)
    assert process.wait(60) == 129, (tmp_path / "errors").read_text()
    assert (tmp_path / "errors").read_text() == ""
    assert (tmp_path / "cleaned").exists()


def child(code: str, *words: str, **environment: str) -> "subprocess.Popen[str]":
    """A process without torch: it has begun when it prints."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import signal, sys, time\nfrom bitnet.cli.shell import *\n{code}",
            *words,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | environment,
    )


def test_ctrl_c_during_the_imports_ends_with_130_and_nothing_said() -> None:
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # ignored in a shell's `&`
    slow = child(f"import signal\n{heard}\nstart()\nprint(flush=True)\ntime.sleep(60)")
    assert slow.stdout is not None
    slow.stdout.readline()
    begun = time.monotonic()
    slow.send_signal(signal.SIGINT)
    assert slow.communicate() == ("", "")
    assert slow.returncode == 130
    assert time.monotonic() - begun < 30


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    code = (
        "import signal\nsignal.signal(2, signal.SIG_IGN)\nstart()\nsignal.raise_signal(2)\nprint()"
    )
    assert child(code).communicate() == ("\n", "")


PRINTING = "with one_line_errors():\n    print('x' * 100_000)\n    print('y')"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    piped = child(PRINTING)
    assert piped.stdout is not None
    piped.stdout.close()
    piped.stdout = None
    assert piped.communicate()[1] == ""
    assert piped.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    full = child("sys.stdout = open('/dev/full', 'w', encoding='utf-8')\n" + PRINTING)
    assert full.communicate()[1] == "error: No space left on device\n"
    assert full.returncode == 2


POSIX = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("encoding", ["", "ascii"])
def test_a_posix_locale_takes_and_prints_any_character(encoding: str, tmp_path: Path) -> None:
    code = (
        "start()\nwith one_line_errors():\n"
        "    open(sys.argv[1], 'wb').close()\n    print(ascii(sys.argv[2]), sys.argv[2])"
    )
    file = tmp_path / "é😀"
    posix = child(code, str(file), "é", **POSIX, PYTHONIOENCODING=encoding)
    assert posix.communicate() == (f"'\\xe9' {'?' if encoding else 'é'}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["é😀"]


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_threads_give_up_their_core_soon_unless_the_user_says_otherwise(
    given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # comes back as it was
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "utf-8")
    start()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
