"""``bitnet export``: write a trained model in the format of another program."""

import os
from pathlib import Path
from typing import Annotated

import typer

from bitnet.cli.common import Folder, valid_names
from bitnet.export.facts import read_facts
from bitnet.export.folder import load
from bitnet.export.formats import FORMATS
from bitnet.export.source import check_finite
from bitnet.export.verification import Verification
from bitnet.progress import plain_console, reporting
from bitnet.schema import UserError


def _formats() -> str:
    """Formats and kinds, for ``--help``."""
    lines = []
    for name, format in FORMATS.items():
        lines.append(f"{name}: {format.about}")
        lines += [f"    --kind {kind}: {about}" for kind, about in format.kinds.items()]
    return "\n".join(lines)


def export_command(
    folder: Folder,
    to: Annotated[str, typer.Option("--to", help=f"The format: {', '.join(FORMATS)}.")] = "",
    out: Annotated[str, typer.Option(help="The folder or file to write.")] = "",
    kind: Annotated[
        str, typer.Option(help="The variant of the format. Default: its first, see above.")
    ] = "",
    verify: Annotated[
        bool, typer.Option("--verify", help="Read it back, and compare logits and tokens.")
    ] = False,
) -> None:
    """Write a trained model in the format of another program."""
    format = FORMATS[_one_of("--to", to, list(FORMATS))]
    kind = _one_of("--kind", kind, list(format.kinds)) if kind else next(iter(format.kinds))
    if not out:
        raise UserError("name what to write with --out, such as --out exported")
    if os.path.lexists(out):
        raise UserError(f"--out {out}: exists already; choose another path")
    ours, tokenizer = load(folder)
    check_finite(ours, folder)
    with reporting(f"exporting to {to}"):
        format.save(ours, tokenizer, Path(out), kind, read_facts(folder))
    console = plain_console(soft_wrap=True)
    console.print(f"{out}: {to}, {kind}: {format.kinds[kind]}")
    if verify:
        with reporting("verifying"):
            result = format.verify(ours, tokenizer, Path(out))
        for line in _report(result):
            console.print(line)
        if not result.holds:
            raise typer.Exit(1)


export_command.__doc__ = f"""{export_command.__doc__}

    What a format cannot carry is refused, with the settings that it can. Nothing is left behind by
    an export that fails. --verify compares codes and scales, and then the logits of the program
    that the format belongs to, if that is installed. Exit code 1 if they differ.

    \b
    {_formats().replace(chr(10), chr(10) + "    ")}

    Try: bitnet export runs/quickstart --to hf --out exported --verify
    """


def _one_of(option: str, name: str, valid: list[str]) -> str:
    """Return a valid name. Raises UserError, with the nearest valid name, for any other."""
    if not name:
        raise UserError(f"name the format with {option}: {', '.join(valid)}")
    return valid_names(option, [name], valid)[0]


def _report(result: Verification) -> list[str]:
    lines = [f"compared: {line}" for line in result.compared]
    lines += [f"not compared: {line}" for line in result.skipped]
    lines += [f"DIFFERS: {line}" for line in result.differences]
    return [*lines, "verified" if result.holds else "the export is not the model"]
