"""What several commands share: arguments, options, texts, devices."""

import os
import textwrap
from pathlib import Path
from typing import Annotated

import torch
import typer

from bitnet.config import describe
from bitnet.data.tokenizer import Tokenizer
from bitnet.export.folder import load
from bitnet.linear import Kernel
from bitnet.model import Transformer
from bitnet.schema import UserError, read_file
from bitnet_kernels import pack_ternary, ternary_matmul

Folder = Annotated[Path, typer.Argument(help="A model folder, such as runs/quickstart/model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ... auto: a GPU if there is one.")]


def is_file(path: str) -> bool:
    """Whether ``path`` is a file; False for a word that is too long for a path."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file() raises OSError


def split_args(args: list[str]) -> tuple[list[str], list[str]]:
    """Split arguments into config files and ``section.key=value`` overrides.

    A word with ``=`` that ends in ``.toml`` is a config file if that file exists.
    """
    paths = [a for a in args if a.endswith(".toml") and ("=" not in a or is_file(a))]
    return paths, [arg for arg in args if arg not in paths]


def config_help() -> str:
    """Text for ``--help``: every config key with its default and meaning."""
    sections: dict[str, list[str]] = {}
    for name, key, default, text in describe():
        value = f'"{default}"' if isinstance(default, str) else str(default).replace("'", '"')
        lines = sections.setdefault(name, [f"[{name}]"])
        lines.append(f"  {key} = {value.lower() if isinstance(default, bool) else value}")
        lines += [f"      {line}" for line in textwrap.wrap(text, 72)]
    # a paragraph that begins with \b is not wrapped again
    keys = ["\b\n" + "\n".join(lines) for lines in sections.values()]
    return "\n\n".join(["Keys of a config, with their defaults:", *keys])


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises UserError, naming the file, if it is not UTF-8."""
    try:
        return read_file(path, 2**30).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from error


def pick_device(name: str, option: str = "--device") -> torch.device:
    """A device by name; ``"auto"`` takes a GPU if there is one.

    Raises:
        UserError: the device does not exist on this machine. The error names ``option``.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        if device.type == "cpu" and device.index:
            raise RuntimeError("CPUs have no numbers")
        torch.empty(0, device=device, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(": ")[0]
        raise UserError(
            f"{option}: {name!r} cannot be used here ({reason}); expected cpu, cuda, cuda:N or auto"
        ) from error
    return device


def load_for_inference(folder: Path, device: str, kernel: Kernel) -> tuple[Transformer, Tokenizer]:
    """Load a model and its tokenizer for a device, packed layers with the kernel.

    Raises:
        UserError: no such device or model folder, or a kernel that does not run on the device.
    """
    target = pick_device(device)
    one = torch.ones(1, 1, dtype=torch.int8, device=target)
    try:
        ternary_matmul(one, pack_ternary(one), kernel)
        return load(folder, target, kernel)
    except ValueError as error:
        raise UserError(str(error)) from error
