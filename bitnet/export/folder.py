"""A model folder: written by a run and by `bitnet pack`, read by `bitnet.load`.

    model/
        model.safetensors   tensors; Hugging Face's BitNet names without the leading "model."
        config.json         format, version, the resolved ModelConfig, sha256 of every file
        tokenizer.model     the sentencepiece model (or tokenizer.json, of that kind)
        chat_template.json  of a chat model: how messages become text (bitnet/data/chat_template.py)

Weights come in three forms. *latent*: the fp32 weights of training; training can continue from
them. *packed*: each ternary matrix as ``<name>.codes``, five base-3 digits per byte (uint8
``[N, ceil(K/5)]``, 1.6 bits per weight), and ``<name>.scale`` in fp32. In memory a TernaryLinear
holds 2 bits per weight in the order that kernels need. Both forms hold the same integers, so
converting is exact. The scale is stored and never computed again: absmean of a dequantized matrix
keeps the codes but multiplies the scale by the share of nonzeros.
*integer*: the model was quantized by a recipe (bitnet/qat/recipe.py), stored as ``quant`` in
config.json. There are codes of the recipe's bits, scales and zero points as in
bitnet/qat/integer.py, and ternary matrices as in *packed*. A latent model may have a recipe too: it
is prepared for or comes from quantization-aware training, with observers and learned scales.
Loading repeats ``prepare`` and ``convert`` without memory, then fills the modules.

Loading executes no code (safetensors, JSON, sentencepiece's protobuf). Every file is checked
against its sha256, and config.json against its own: a hand-edited rope_theta would load and be
silently wrong. Other files in the folder are ignored.

Saving writes a folder aside and renames it, so it appears complete or not at all. *Replacing* one
takes two renames (durable.py). If the process is killed between them, the path is missing and the
previous version is complete in `.old-<name>` beside it; loading then says so.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bitnet.data import chat_template
from bitnet.data.chat_template import ChatTemplate, read_chat_template
from bitnet.data.tokenizer import Tokenizer
from bitnet.data.tokenizer_json import TOKENIZER_FILES, load_tokenizer
from bitnet.durable import each_tensor, new_folder, save_tensors, sha256
from bitnet.export.contents import (
    FORMAT,
    FULL_PRECISION,
    MAX_FILE_BYTES,
    FolderConfig,
    assemble,
    check_layers,
    check_vocab,
    describe,
    kinds_of,
    parse,
    stored_form,
)
from bitnet.export.one_file import FILES, load_one_file, read_description
from bitnet.linear import Kernel
from bitnet.model import Transformer
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError, check_file, read_file, user_input

CONFIG, TENSORS = "config.json", "model.safetensors"
MAX_CONFIG_BYTES = 2**20


def save_model(
    folder: Path | str,
    model: Transformer,
    tokenizer: Tokenizer | None,
    quant: Recipe = FULL_PRECISION,
) -> Path:
    """Write a model folder, replacing one that exists.

    Arguments:
        model: with fp32 weights, or packed (every BitLinear a TernaryLinear), or prepared or
            converted by ``quant``; on any device.
        tokenizer: the model's own. None: the folder has none, and only :func:`load_model` reads it.
        quant: the recipe that the model was prepared with; not for a model without quantizers.
    Returns:
        The folder.
    Raises:
        UserError: ``folder`` exists and is something else; a tokenizer with another vocabulary.
        ValueError: the model's layers or tensors do not match its config and ``quant``, so that a
            different model would be loaded; names the first one.
        OSError: the disk is full, ...; the old folder is untouched.
    """
    folder = Path(folder)
    _refuse_to_replace(folder)
    if tokenizer is not None:
        check_vocab(tokenizer, model.config, str(folder))
    weights, tensors = stored_form(model, quant)
    with new_folder(folder) as aside:
        save_tensors(aside / TENSORS, tensors)
        if tokenizer is not None:
            (aside / tokenizer.file_name).write_bytes(tokenizer.model_bytes)
            if tokenizer.chat_template is not None:
                (aside / chat_template.FILE).write_bytes(tokenizer.chat_template.to_json())
        checksums = {file.name: sha256(file) for file in sorted(aside.iterdir())}
        config = describe(model, weights, quant, checksums)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def load(
    folder: Path | str, device: torch.device | str = "cpu", kernel: Kernel = "auto"
) -> tuple[Transformer, Tokenizer]:
    """Load a model and its tokenizer from a model folder, or from one file (one_file.py).

    Arguments:
        device: device of the model. kernel: of the packed layers, if the model is packed.
    Raises:
        UserError: a file is missing, damaged, or of another format or vocabulary; names the file.
    """
    folder = Path(folder)
    if folder.is_file():
        model, found = load_one_file(folder, kernel)
        if found is None:
            raise UserError(f"{folder}: was saved without a tokenizer")
        return model.to(device), found
    config = read_config(folder)
    names = [name for name in TOKENIZER_FILES if name in config.sha256]
    if not names:
        raise UserError(
            f"{folder}: was saved without a tokenizer; it has no {' or '.join(TOKENIZER_FILES)}"
        )
    model = load_model(folder, device, kernel)
    tokenizer = load_tokenizer(folder / names[0])
    check_vocab(tokenizer, config.model, str(tokenizer.path))
    if chat_template.FILE in config.sha256:
        tokenizer.chat_template = chat_template_of(folder)
    return model, tokenizer


def chat_template_of(folder: Path | str) -> ChatTemplate | None:
    """The chat template of a model folder; None if it has none, or there is no such folder ("").
    Raises UserError for a damaged file."""
    path = Path(folder) / chat_template.FILE
    return read_chat_template(path) if folder and path.is_file() else None


def load_model(
    folder: Path | str, device: torch.device | str = "cpu", kernel: Kernel = "auto"
) -> Transformer:
    """As :func:`load`, without the tokenizer, which may be missing. Draws no random number.

    A latent model can be trained further (with a recipe, it is prepared by the recipe, with the
    state of its observers). A packed or integer model gets the stored codes and scales unchanged.
    """
    folder = Path(folder)
    if folder.is_file():
        return load_one_file(folder, kernel)[0].to(device)
    config = read_config(folder)
    _verify(folder, config)
    path = folder / TENSORS
    try:
        kinds = kinds_of(load_file(path))  # a memory mapping: no value is read
        model = assemble(config, kinds, each_tensor(path), kernel, path, str(folder / CONFIG))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged: {error}") from error
    return model.to(device)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes by kind: ``embedding`` (with an untied head), ``matrices``, ``norms`` (with biases),
    ``total``."""

    fp32: dict[str, int]
    """Bytes if every parameter were fp32."""
    stored: dict[str, int]
    """Bytes in model.safetensors; the total includes the file's header."""


def sizes(folder: Path | str) -> Sizes:
    """Sizes of a model folder's weights on the disk. Raises the errors of :func:`load_model`."""
    folder = Path(folder)
    config, path = read_config(folder), folder
    if folder.is_dir():
        _verify(folder, config)
        path = folder / TENSORS
    stored = dict.fromkeys(("embedding", "matrices", "norms"), 0)
    for name, tensor in load_file(path).items():
        if name in FILES:
            continue
        if name.endswith(("norm.weight", ".bias")):
            kind = "norms"
        else:
            kind = "matrices" if name.startswith("layers.") else "embedding"
        stored[kind] += tensor.nbytes
    fp32 = {kind: 4 * count for kind, count in config.model.num_parameters().items()}
    return Sizes(fp32, stored | {"total": path.stat().st_size})


def _refuse_to_replace(folder: Path) -> None:
    """Raise UserError unless the folder may be replaced (and so deleted): it is empty or holds only
    our files."""
    with user_input(str(folder)):  # an invalid path, or a cycle of links
        folder.resolve()
    if folder.is_dir():
        present = {path.name for path in folder.iterdir()}
        for name in sorted(present - {CONFIG, TENSORS, chat_template.FILE, *TOKENIZER_FILES}):
            raise UserError(
                f"{folder}: holds {name}, which is not part of a model folder and would be "
                "deleted; choose another folder"
            )
        ours = CONFIG in present and is_ours(folder / CONFIG)
        if present and not ours:
            raise UserError(
                f"{folder}: holds a model that this program did not write and that would be "
                "deleted; choose another folder"
            )
    elif folder.exists():
        raise UserError(f"{folder}: exists and is not a folder")


def is_ours(config: Path) -> bool:
    """Whether a config.json looks like one of ours, even a damaged one. Raises UserError if it is
    not a regular file, or larger than a config can be."""
    return f'"{FORMAT}"'.encode() in read_file(config, MAX_FILE_BYTES)


def read_config(folder: Path) -> FolderConfig:
    """Read and check config.json, or the description in a file (one_file.py). Raises UserError if
    it is missing, damaged or of another program."""
    if folder.is_file():
        return read_description(folder)
    path = folder / CONFIG
    if not path.is_file():
        old = folder.parent / f".old-{folder.name}"
        if not folder.exists() and old.is_dir():
            raise UserError(
                f"{folder}: a crash while it was replaced left its previous version in {old}; "
                "rename that back"
            )
        hint = f"; did you mean {folder / 'model'}?" if (folder / "model" / CONFIG).exists() else ""
        what = f"has no {CONFIG}: not a model folder" if folder.is_dir() else "no such model folder"
        raise UserError(f"{folder}: {what}{hint}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{path}: damaged: larger than {MAX_CONFIG_BYTES} bytes")
    data = read_file(path, MAX_CONFIG_BYTES)
    config = parse(data, str(path))
    if TENSORS not in config.sha256:
        raise UserError(f"{path}: damaged: its sha256 does not list {TENSORS}")
    return config


def _verify(folder: Path, config: FolderConfig) -> None:
    """Check the files against their sha256. First check by the header that they can belong to such
    a model, so that no huge file is hashed and no million empty layers are built."""
    check_layers(folder / TENSORS, config.model, str(folder / CONFIG))
    for name, expected in config.sha256.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{path}: missing")
        if name != TENSORS:
            check_file(path, MAX_FILE_BYTES)
        with user_input(f"{path}: damaged"):
            actual = sha256(path)
        if actual != expected:
            raise UserError(f"{path}: damaged: its sha256 is not that in {CONFIG}")
