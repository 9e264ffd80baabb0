"""``bitnet inspect CONFIG.toml``: sizes and costs of a config."""

from typing import Annotated

import typer

from bitnet.cli.common import is_file, split_args
from bitnet.config import load_config
from bitnet.export.folder import CONFIG
from bitnet.progress import plain_console
from bitnet.schema import UserError
from bitnet.summary import tables


def inspect_config(
    args: Annotated[list[str], typer.Argument(metavar="CONFIG.toml... [SECTION.KEY=VALUE...]")],
) -> None:
    """Print a config's shapes, parameters, FLOPs, memory and energy.

    The tables also show which values model.depth chose. Nothing is built or downloaded.

    Try: bitnet inspect configs/15m.toml model.depth=8
    """
    if folder := next((arg for arg in args if is_file(f"{arg}/{CONFIG}")), ""):
        raise UserError(f"{folder}: is a model folder: bitnet inspect model {folder}")
    for table in tables(load_config(*split_args(args))):
        plain_console().print(table)
