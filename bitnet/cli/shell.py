"""How our programs start and end.

A user's mistake ends in one line on stderr and exit code 2. Ctrl-C ends in code 130, SIGTERM in 143
and a closed terminal (SIGHUP) in 129, each after half-written files are removed. A closed output
pipe (``| head``) ends in code 1. ``BITNET_DEBUG=1`` or ``--debug`` shows the traceback before the
line. Any other traceback is our bug.

Nothing slow is imported here: :func:`start` must run before torch is imported.
"""

import codecs
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from itertools import takewhile
from types import FrameType
from typing import Any, Never

from bitnet.schema import UserError, debugging
from bitnet.signals import drop_closed_terminal, ending_signals

SPINS = "10000"
"""GOMP_SPINCOUNT if the user sets none: how often a waiting OpenMP thread spins before it gives up
its core. libgomp's default of 300,000 takes several ms: beside busy programs, threads then mostly
wait for each other. docs/training.md has the cost on an idle machine and the gain on a busy one."""
LONGEST_LINE = 2_000
"""Longest error line in characters; the middle of a longer line is left out."""
_WIDTHS = range(20, 10_001)
"""Plausible values of COLUMNS and LINES."""


def start() -> None:
    """Call this first in a program, before the imports that take seconds.

    Until :func:`run`, Ctrl-C ends the process at once with exit code 130. If the locale supports
    only ASCII (``LC_ALL=C`` with Python's own remedies switched off), the process restarts in UTF-8
    mode: file names and arguments would otherwise be decoded wrongly. OpenMP reads its spin count
    when torch is imported; see :data:`SPINS`.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored
        signal.signal(signal.SIGINT, _leave_at_once)
    ascii_only = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if ascii_only and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _leave_at_once(number: int, frame: FrameType | None) -> Never:
    os._exit(128 + number)


def run(app: Callable[..., Any]) -> Never:
    """Run a Typer app or a click command on ``sys.argv``, without ``--debug``, and exit."""
    import typer

    usage_error: Any = typer.BadParameter.__base__
    if "--debug" in takewhile(lambda word: word != "--", sys.argv[1:]):
        sys.argv.remove("--debug")
        os.environ["BITNET_DEBUG"] = "1"
    with one_line_errors():
        try:
            sys.exit(app(standalone_mode=False))
        except usage_error as error:  # an unknown option, an invalid number
            error.message = "\n".join(map(cut, error.message.split("\n")))
            error.show()
            sys.exit(error.exit_code)
        except typer.Abort as error:  # Typer turns an EOFError into this
            raise UserError(str(error.__cause__ or "the input ended early")) from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process as the docstring of this module describes."""
    _mend_environment()
    try:
        try:
            with signals_exit():
                yield
        finally:
            if sys.stdout is not None:  # flush here, where a closed pipe can still be handled
                sys.stdout.flush()
    except UserError as error:
        _fail(error, str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not (memory := exhausted(error)):
            raise
        _fail(error, f"out of {memory}: lower train.micro_batch, or take a smaller model")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(error, f"{where}{error.strerror or error}")


def exhausted(error: Exception) -> str:
    """The memory that an error says is used up, ``"GPU memory (...)"`` or ``"memory"``; "" for any
    other error."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return f"GPU memory ({error})"
    said = ("not enough memory", "can't allocate memory")  # messages of torch's CPU allocator
    out = isinstance(error, MemoryError) or any(words in str(error) for words in said)
    return "memory" if out else ""


def _mend_environment() -> None:
    """Restore Python's handler of Ctrl-C, drop impossible terminal sizes, and make the output
    accept any character."""
    if signal.getsignal(signal.SIGINT) is _leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("COLUMNS", "LINES"):
        value = os.environ.get(name, "")
        if value and not (value.isascii() and value.isdigit() and int(value[:6]) in _WIDTHS):
            del os.environ[name]
    if isinstance(sys.stdout, TextIOWrapper):  # what it cannot encode is printed as "?"
        sys.stdout.reconfigure(errors="replace")


def _fail(error: BaseException, message: str) -> Never:
    with suppress(BrokenPipeError):
        if debugging():
            traceback.print_exception(error)
        print(f"error: {cut(str(UserError(message)))}", file=sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # a full disk: Python would try again at its end
        _drop_output()
    sys.exit(2)


def _drop_output() -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cut(line: str) -> str:
    """The line; if it is longer than :data:`LONGEST_LINE`, without its middle."""
    if len(line) <= LONGEST_LINE:
        return line
    head, mark = LONGEST_LINE * 3 // 4, " ... "
    return line[:head] + mark + line[head + len(mark) - LONGEST_LINE :]


@contextmanager
def signals_exit() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise ``SystemExit`` (143 and 129: 128 + the number, as
    in shells) instead of ending the process at once, so that ``with`` blocks for files and workers
    clean up. Works only in the main thread; in others it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = ending_signals()

    def leave(number: int, frame: FrameType | None) -> Never:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)  # a second signal would interrupt the cleanup
        drop_closed_terminal()
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
