"""Shared parts of config dataclasses and user-facing errors, and the check of a user's input.

Code that may fail in any way on a user's file or value (a parser, a tokenizer library, a regular
expression) is called inside :func:`user_input`, and files are read by :func:`read_file`. Any
failure there becomes one line that names the file or key.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field

_CONTROL_CODES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


class UserError(ValueError):
    """A user's mistake, explained in one line: it names the file, the key and, if there is one, the
    nearest valid name. The command line prints the line and exits with code 2.

    The message is always one line, whatever names it contains: line breaks become spaces. Other
    control characters, and bytes of a file name that are not UTF-8, become their codes.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(part.strip() for part in message.splitlines())
        line = line.translate(_CONTROL_CODES).encode(errors="backslashreplace").decode()
        super().__init__(line)


@contextmanager
def user_input(what: str) -> Iterator[None]:
    """Turn any exception of the block into a :class:`UserError` that begins with ``what``.

    ``what`` names the file or the key. A UserError passes unchanged, and so do Ctrl-C and exits.
    Anything else is caught, even a BaseException, by which libraries written in Rust report a
    panic. The original stays as the cause, so that ``BITNET_DEBUG=1`` shows it.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}") from error
    except RecursionError as error:
        raise UserError(f"{what}: is nested too deeply") from error
    except BaseException as error:
        raise UserError(f"{what}: {str(error) or type(error).__name__}") from error


def check_file(path: Path, limit: int | None = None) -> None:
    """Raise UserError, naming the path, unless it is a regular file of at most ``limit`` bytes.

    Nothing is opened: a FIFO would wait for its writer, and a device may never end.
    """
    with user_input(str(path)):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link to {path.readlink()}, which does not exist")
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"{path}: is a folder, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: is not a regular file (a FIFO, a socket or a device)")
        if limit is not None and status.st_size > limit:
            raise UserError(f"{path}: has {status.st_size:,} bytes; at most {limit:,} are read")


def read_file(path: Path, limit: int = 2**28) -> bytes:
    """Return the bytes of a regular file of at most ``limit`` bytes. Raises UserError as
    :func:`check_file` does, and if the file cannot be read."""
    check_file(path, limit)
    with user_input(str(path)):
        return path.read_bytes()


def nearest(name: str, valid: Iterable[str], similarity: float = 0.6) -> str:
    """The valid name with the spelling nearest to ``name``, for the hint in an error message.

    Arguments:
        similarity: the minimum, from 0 (any name) to 1 (the same name).
    Returns:
        "" if no valid name is that similar.
    """
    return next(iter(get_close_matches(name, list(valid), 1, similarity)), "")


def debugging() -> bool:
    """Whether errors should show their traceback: ``BITNET_DEBUG=1`` or ``--debug``."""
    return os.environ.get("BITNET_DEBUG", "") not in ("", "0")


STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
"""Config dataclasses: no unknown keys and no silent conversions ("1" is not 1). The string under
each field is its documentation; ``--help`` prints it."""

Count = Annotated[int, Field(ge=0, le=2**53)]
"""A number of steps, tokens, ... A float holds every integer up to 2^53."""
Positive = Annotated[int, Field(ge=1, le=2**53)]
"""A :data:`Count` of 1 or more."""

RENAMED = {
    "quant.gradient": "quant.grad_mask",
    "quant.gradient_c": "quant.grad_mask_c",
}
"""Renamed keys, old to new. In a config or on the command line the old key is an error that names
the new one. :func:`with_new_keys` reads saved files."""


def with_new_keys(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config (section -> key -> value) with the keys of :data:`RENAMED` renamed."""
    renamed = dict(saved)
    for old, new in RENAMED.items():
        section, old_key = old.split(".")
        table, new_key = renamed.get(section), new.split(".")[1]
        if isinstance(table, Mapping):
            renamed[section] = {new_key if key == old_key else key: v for key, v in table.items()}
    return renamed


_Item = TypeVar("_Item")
ListOf = Annotated[list[_Item], BeforeValidator(lambda v: list(v) if isinstance(v, tuple) else v)]
"""A list, or in Python a tuple."""
