"""``bitnet inspect CONFIG.toml``: sizes and costs of a config."""

from typing import Annotated

import typer

from bitnet.cli.common import is_file, split_args
from bitnet.config import load_config
from bitnet.export.folder import CONFIG
from bitnet.progress import plain_console
from bitnet.ranks import rank_table
from bitnet.schema import UserError
from bitnet.summary import tables


def inspect_config(
    args: Annotated[list[str], typer.Argument(metavar="CONFIG.toml... [SECTION.KEY=VALUE...]")],
    world_size: Annotated[
        int,
        typer.Option(
            help="Show what each of so many processes holds and sends instead.", min=0, max=2**20
        ),
    ] = 0,
    local_size: Annotated[
        int, typer.Option(help="Processes per machine. 0: all of them.", min=0, max=2**20)
    ] = 0,
    bandwidth: Annotated[
        float,
        typer.Option(
            help="GB/s that a process sends to another of its machine: adds seconds per step.",
            min=0,
            max=1e6,
        ),
    ] = 0,
    network: Annotated[
        float,
        typer.Option(
            help="GB/s that a process sends to one of another machine. 0: as --bandwidth.",
            min=0,
            max=1e6,
        ),
    ] = 0,
) -> None:
    """Print a config's shapes, parameters, FLOPs, memory and energy.

    The tables also show which values model.depth chose. Nothing is built or downloaded.

    Try: bitnet inspect configs/15m.toml model.depth=8

    With --world-size: memory and sent bytes per process, for each strategy.

    Try: bitnet inspect configs/700m.toml --world-size 16 --local-size 8
    """
    for arg in args:
        if is_file(f"{arg}/{CONFIG}"):
            raise UserError(f"{arg}: is a model folder: bitnet inspect model {arg}")
        if is_file(f"{arg}/config.toml"):
            raise UserError(
                f"{arg}: is a run: bitnet inspect {arg}/config.toml, or bitnet inspect model {arg}"
            )
    config = load_config(*split_args(args))
    if world_size:
        found = [rank_table(config.resolve(), world_size, local_size, bandwidth, network)]
    elif local_size or bandwidth or network:
        raise UserError("--local-size, --bandwidth and --network need --world-size")
    else:
        found = tables(config)
    for table in found:
        plain_console().print(table)
