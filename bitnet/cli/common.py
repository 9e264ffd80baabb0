"""Shared code of the commands: arguments, options, names, texts, devices, tables."""

import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bitnet.config import describe
from bitnet.data.tokenizer import Tokenizer
from bitnet.export.folder import load
from bitnet.export.source import find_model
from bitnet.linear import Kernel, pack
from bitnet.model import Transformer, as_transformer
from bitnet.presets import OVERLAYS, presets
from bitnet.progress import plain_console
from bitnet.schema import UserError, nearest, read_file
from bitnet_kernels import pack_ternary, ternary_matmul


def model_of(path: Path) -> Path:
    """The model folder of an argument; for a run, its ``model`` folder, reported on stderr."""
    found = find_model(path)
    if found != path:
        print(f"{path} is a run: taking {found}", file=sys.stderr)
    return found


Folder = Annotated[
    Path,
    typer.Argument(
        help="A model folder, such as runs/quickstart/model, or a run.", callback=model_of
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N. auto: a GPU if there is one.")]
KernelOption = Annotated[Kernel, typer.Option(help="Kernel of a packed model's layers.")]


def is_file(path: str) -> bool:
    """Whether ``path`` is a file; False for a word too long for a path."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file() raises OSError


def split_args(args: list[str]) -> tuple[list[str], list[str]]:
    """Split arguments into config files and ``section.key=value`` overrides.

    A word with ``=`` that ends in ``.toml`` is a config file if that file exists. A word with
    neither is a config file too, or else the name of a config in the package.

    Raises:
        UserError: there is no config of that name, or it is an overlay without its other settings.
    """
    paths, overrides, names = list[str](), list[str](), list[str]()
    for word in args:
        if word.endswith(".toml") and ("=" not in word or is_file(word)):
            paths.append(word)
        elif "=" in word:
            overrides.append(word)
        elif is_file(word):
            paths.append(word)
        else:
            paths.append(str(_preset(word)))
            names.append(word)
    if len(paths) == 1 and names and (overlay := OVERLAYS.get(names[0])):
        given = {override.partition("=")[0].strip() for override in overrides}
        if not given.intersection(overlay.keys):
            raise UserError(f"{names[0]}: needs {overlay.needs}: bitnet train {overlay.usage}")
    return paths, overrides


def _preset(name: str) -> Path:
    found = presets()
    if name not in found:
        near = _nearest_name(name.lower(), list(found))
        whole = ", ".join(one for one in found if one not in OVERLAYS)
        more = "; ".join(f"{one}, with {OVERLAYS[one].needs}" for one in found if one in OVERLAYS)
        raise UserError(
            f"{name!r}: expected section.key=value (such as optim.lr=1e-3), a .toml file or one of "
            f"{whole}; {more}" + (f"; did you mean {near}?" if near else "")
        )
    return found[name]


def config_help() -> str:
    """The text for ``--help``: every config key with its default and meaning."""
    sections: dict[str, list[str]] = {}
    for name, key, default, text in describe():
        value = f'"{default}"' if isinstance(default, str) else str(default).replace("'", '"')
        lines = sections.setdefault(name, [f"[{name}]"])
        lines.append(f"  {key} = {value.lower() if isinstance(default, bool) else value}")
        lines += [f"      {line}" for line in textwrap.wrap(text, 72)]
    # click does not wrap a paragraph that begins with \b
    keys = ["\b\n" + "\n".join(lines) for lines in sections.values()]
    return "\n\n".join(["Keys of a config, with their defaults:", *keys])


def valid_names(option: str, names: Iterable[str], valid: Iterable[str]) -> list[str]:
    """Return the names without duplicates.

    Raises:
        UserError: a name is not valid. The error names ``option`` and the nearest valid name.
    """
    names, valid = list(dict.fromkeys(names)), list(valid)
    for name in names:
        if name not in valid:
            near = _nearest_name(name.lower(), valid)
            hint = f"; did you mean {near}?" if near else ""
            raise UserError(f"{option}: {name!r} is none of {', '.join(valid)}{hint}")
    return names


def _nearest_name(name: str, valid: list[str]) -> str:
    """The valid name nearest to a wrong one; "" if none is similar.

    Numbers and sizes are compared by their ratio (100m: 110m), other names by their beginning
    (ours: ours-auto), then by their first word, then by spelling.
    """
    wanted = _number(name)
    numbers = {one: number for one in valid if (number := _number(one))}
    if wanted and numbers:
        return min(numbers, key=lambda one: abs(math.log(numbers[one] / wanted)))
    if beginning := [one for one in valid if one.startswith(name)]:
        return beginning[0]
    family = [one for one in valid if one.partition("-")[0] == name.partition("-")[0]]
    return nearest(name, family or valid, 0.3)


def _number(text: str) -> float | None:
    """``"1.58"`` -> 1.58, ``"15m"`` and ``"15"`` -> 15, ``"1b"`` -> 1000; None if not a number."""
    if match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([kmb]?)", text):
        return float(match[1]) * {"k": 1e-3, "": 1, "m": 1, "b": 1e3}[match[2]]
    return None


def wide_console() -> Console:
    """A console for wide tables: at least 120 columns if the output is a file or a pipe."""
    console = plain_console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    return console


def read_text(path: Path) -> str:
    """Read a text file. Raises UserError, naming the file, if it is empty or not UTF-8."""
    try:
        text = read_file(path, 2**30).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from error
    if not text.strip():
        raise UserError(f"{path}: is empty")
    return text


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
    """Load a model and its tokenizer onto a device; packed layers use the kernel.

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


def packed_bf16(model: Transformer, kernel: Kernel) -> Transformer:
    """Cast a model to bf16, the dtype of the GPU kernels. Ternary layers are packed first, so that
    their codes and scales come from the fp32 weights."""
    if model.config.linear == "ternary":
        model = as_transformer(pack(model, kernel))
    return model.to(torch.bfloat16)
