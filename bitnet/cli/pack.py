"""``bitnet pack``: pack a trained model, and prove that it computes the same."""

import copy
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bitnet.cli.common import Folder
from bitnet.export.contents import FolderConfig
from bitnet.export.folder import CONFIG, load, read_config, save_model, sizes
from bitnet.export.proof import Proof, prove
from bitnet.export.source import check_finite
from bitnet.generate import encode_prompt
from bitnet.linear import BitLinear, pack
from bitnet.model import Transformer, as_transformer
from bitnet.progress import plain_console, reporting
from bitnet.qat.prepare import convert
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError
from bitnet.summary import human

PROMPTS = ["", "The ", "def __init__(self"]
"""Default texts for the proof."""


def pack_command(
    folder: Folder,
    out: Annotated[str, typer.Option(help="Folder to write. Default: FOLDER-packed.")] = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text for the proof; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Greedy tokens per prompt in the proof.", min=0)] = 32,
) -> None:
    """Pack a trained model, and prove that it computes the same.

    Ternary models and models with a [quant] recipe can be packed. The packed folder is read back
    from disk and compared with the trained model: codes, int32 accumulators, logits and greedy
    tokens must be equal to the last bit. Exit code 1 if not.
    """
    target = Path(out) if out else beside(folder, "-packed")
    model, tokenizer = load(folder)
    config = read_config(folder)
    check_packable(folder, config, model, target)
    check_finite(model, folder)
    longest = model.config.max_seq_len
    prompts = [encode_prompt(tokenizer, text)[:longest] for text in prompt or PROMPTS]
    room = longest - max(len(row) for row in prompts)
    packed = packed_copy(folder, config.quant, model)
    with reporting("packing and proving"):
        save_model(target, packed, tokenizer, config.quant)
        packed, _ = load(target)
        proof = prove(model, packed, prompts, min(tokens, room))
    console = plain_console()
    console.print(_sizes(target))
    _print_proof(console, proof)
    if not proof.holds:
        raise typer.Exit(1)


def beside(folder: Path, suffix: str) -> Path:
    """Such as ``FOLDER-packed``; finds the folder's name if the path ends in ``.`` or ``..``."""
    if folder.name in ("", ".."):  # Path("x/.") has the name x
        folder = folder.resolve()
    return folder.with_name(folder.name + suffix)


def check_packable(folder: Path, config: FolderConfig, model: Transformer, target: Path) -> None:
    """Raise UserError if the model has nothing to pack, or ``target`` holds a trained model."""
    if (target / CONFIG).exists() and read_config(target).weights == "latent":
        raise UserError(f"{target}: holds a trained model, which packing would overwrite")
    if config.weights != "latent":
        raise UserError(f"{folder}: is {config.weights} already; there is nothing to pack")
    if not (has_ternary_layers(model) or config.quant.enabled):
        raise UserError(f"{folder}: is full precision; bitnet ptq, or training, makes integers")


def has_ternary_layers(model: Transformer) -> bool:
    """Whether there is a BitLinear to pack."""
    return any(isinstance(module, BitLinear) for module in model.modules())


def packed_copy(folder: Path, recipe: Recipe, model: Transformer) -> Transformer:
    """A copy of the model with packed ternary layers, or the integer layers of its recipe.

    Raises:
        UserError: a layer cannot become integer. The error names the folder.
    """
    packed = copy.deepcopy(model)
    if has_ternary_layers(packed):
        packed = as_transformer(pack(packed))
    if not recipe.enabled:
        return packed
    try:
        return as_transformer(convert(packed))
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def _sizes(folder: Path) -> Table:
    before, after = sizes(folder).fp32, sizes(folder).stored
    table = Table("weights", "fp32", "packed", "ratio", title=str(folder))
    for kind, fp32 in before.items():
        ratio = f"{fp32 / max(1, after[kind]):.2f}"
        table.add_row(kind, human(fp32, "B"), human(after[kind], "B"), ratio)
    return table


def _print_proof(console: Console, proof: Proof) -> None:
    console.print(
        f"compared: {proof.matrices} matrices ({proof.weights:,} codes), "
        f"{proof.accumulators:,} int32 accumulators, {proof.logits:,} logits, "
        f"{proof.tokens} greedy tokens"
    )
    for difference in proof.differences:
        console.print(f"DIFFERS: {difference}")
    if proof.holds:
        console.print("proof: all equal, bit for bit")
