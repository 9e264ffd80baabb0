"""``bitnet train``: run train.py, which is also in an installed package."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from typing import Annotated

import typer

from bitnet.cli.lazy import command
from bitnet.presets import root


def train_command(
    args: Annotated[
        list[str] | None, typer.Argument(metavar="CONFIG... [SECTION.KEY=VALUE...]")
    ] = None,
) -> None:
    """Train a model: run train.py, with its arguments.

    CONFIG is a TOML file or the name of a config in the package, as in: bitnet train 15m.
    """
    spec = spec_from_file_location("__main__", root() / "train.py")
    assert spec is not None
    assert spec.loader is not None
    script, before = module_from_spec(spec), sys.modules["__main__"]
    sys.argv = ["bitnet train", *(args or ())]  # the name in the usage; runpy would set its own
    try:
        sys.modules["__main__"] = script
        spec.loader.exec_module(script)
    finally:
        sys.modules["__main__"] = before


train = command(
    "train",
    train_command,
    add_help_option=False,  # train.py's own help lists every key of a config
    context_settings={"ignore_unknown_options": True},
)
