"""What every config dataclass and every user-facing error share."""

from typing import Annotated, TypeVar

from pydantic import BeforeValidator, ConfigDict


class UserError(ValueError):
    """A mistake of the user's that one line explains: it names the file, the key and, where there
    is one, the nearest valid name. The command line prints the line and exits with code 2."""


STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
"""Config dataclasses: no unknown keys, no silent conversions ("1" is not 1), and the string under
each field is its documentation, which ``--help`` prints."""

_Item = TypeVar("_Item")
ListOf = Annotated[list[_Item], BeforeValidator(lambda v: list(v) if isinstance(v, tuple) else v)]
"""A list, or in Python a tuple."""
