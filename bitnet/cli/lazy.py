"""Groups of commands that import a command's module only when the command is looked up.

So ``bitnet generate`` imports neither PTQ nor the benchmarks. ``--help`` of a group shows the first
line of each command, so it imports them all.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class Commands(Mapping[str, Any]):
    """Commands by name, in the order of ``--help``.

    Arguments:
        homes: name -> ``"module:object"``. The object is a command's function, a command
            or a group.
    """

    def __init__(self, homes: Mapping[str, str]) -> None:
        self._homes = homes
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            module, _, attribute = self._homes[name].partition(":")
            found = getattr(import_module(module), attribute)
            made = isinstance(found, TyperCommand | TyperGroup)
            self._loaded[name] = found if made else command(name, found)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


def command(name: str, function: Any, **options: Any) -> Any:
    """Make a click command from a function with Typer's annotations; ``options`` as Typer's."""
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command(name, **options)(function)
    return typer.main.get_command(app)


def group(homes: Mapping[str, str], help_text: str, cls: type = TyperGroup, **options: Any) -> Any:
    """Make a group that shows its help when no command is given.

    Arguments:
        homes: as for :class:`Commands`.
        cls: the group's class. options: further arguments of the class.
    """
    return cls(
        name=None,
        commands=Commands(homes),
        help=help_text,
        no_args_is_help=True,
        rich_markup_mode=None,
        **options,
    )
