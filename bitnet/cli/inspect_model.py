"""``bitnet inspect model FOLDER``: cost per generated token of a trained or packed model."""

from typing import Annotated

import typer

from bitnet.cli.common import Folder
from bitnet.energy import zero_share
from bitnet.export.folder import load_model, read_config
from bitnet.progress import plain_console
from bitnet.schema import UserError
from bitnet.summary import energy_tables


def inspect_model(
    folder: Folder,
    context: Annotated[
        int, typer.Option(help="Positions in view. 0: the model's longest.", min=0, max=1 << 40)
    ] = 0,
) -> None:
    """Print operations, bytes and energy per generated token.

    Zeros are counted in the real codes. The tables compare the 16-bit and the ternary model of the
    same shape; the folder may hold either. For a full-precision model they assume the expected
    share of zeros. Models of other bit widths are an error: their products are multiplications.

    Try: bitnet inspect model runs/quickstart/model-packed
    """
    recipe = read_config(folder).quant
    if recipe.enabled and not recipe.quantizer.ternary:
        raise UserError(f"{folder}: is {recipe}; these tables are of ternary and 16-bit models")
    model = load_model(folder)
    context = context or model.config.max_seq_len
    for table in energy_tables(model.config, context, zero_share(model)):
        plain_console().print(table)
