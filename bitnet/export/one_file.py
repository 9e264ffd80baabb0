"""A whole model in one safetensors file: weights, config and tokenizer.

    model.safetensors
        header    the tensors' dtypes, shapes and offsets; metadata "bitnet": the content of a
                  folder's config.json (contents.py), with the checksums of the tensors
        tensors   as in a folder; and the tokenizer's file, and the chat template's if there is one,
                  as uint8 [n], under the file's name

Ternary matrices are packed as in a folder: five base-3 digits per byte, 1.6 bits per weight, and an
fp32 scale. Loading checks the sha256 of every tensor, listed in the description, and the
description's own. So damaged, exchanged and added tensors are found. Nothing in the file can
execute code.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from bitnet.data import chat_template
from bitnet.data.chat_template import parse_chat_template
from bitnet.data.tokenizer import Tokenizer
from bitnet.data.tokenizer_json import TOKENIZER_FILES, JsonTokenizer
from bitnet.durable import each_tensor, new_file, save_tensors
from bitnet.export.contents import (
    FULL_PRECISION,
    FolderConfig,
    assemble,
    check_layers,
    check_vocab,
    describe,
    kinds_of,
    parse,
    stored_form,
)
from bitnet.linear import Kernel
from bitnet.model import Transformer
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError, check_file, nearest, user_input

KEY = "bitnet"
"""Key of the metadata."""
FILES = (*TOKENIZER_FILES, chat_template.FILE)
"""Names of tensors that hold the bytes of a file."""
_MAX_DESCRIPTION = 2**24
"""Largest description in bytes; it lists each tensor."""


def save_one_file(
    path: Path | str,
    model: Transformer,
    tokenizer: Tokenizer | None,
    quant: Recipe = FULL_PRECISION,
) -> Path:
    """Write a model as one file, completely or not at all. Arguments and errors are as for
    :func:`bitnet.export.folder.save_model`. Replaces an existing file."""
    path = Path(path)
    weights, tensors = stored_form(model, quant)
    if tokenizer is not None:
        check_vocab(tokenizer, model.config, str(path))
        files = {tokenizer.file_name: tokenizer.model_bytes}
        if tokenizer.chat_template is not None:
            files[chat_template.FILE] = tokenizer.chat_template.to_json()
        for name, data in files.items():
            tensors[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    checksums = {name: _sha256(tensors[name]) for name in sorted(tensors)}
    description = json.dumps(describe(model, weights, quant, checksums))
    with new_file(path) as aside:
        save_tensors(aside, tensors, {KEY: description})
        aside.chmod(0o644)  # files of safetensors are readable by the owner only
    return path


def read_description(path: Path) -> FolderConfig:
    """Read the description of a file after checking its size and its tensors' names. Raises
    UserError if it is missing, damaged or of another program."""
    check_file(path)
    damaged = f"{path}: not a safetensors file, or a damaged one"
    with user_input(damaged), safe_open(path, "pt") as file:
        metadata, names = file.metadata() or {}, set(file.keys())
    if KEY not in metadata:
        raise UserError(
            f"{path}: has no description of a model in its header: it is not one that this program "
            "wrote as a whole model; the weights of a folder are loaded by the folder's name"
        )
    if len(metadata[KEY]) > _MAX_DESCRIPTION:
        raise UserError(f"{path}: damaged: its description is larger than {_MAX_DESCRIPTION} bytes")
    config = parse(metadata[KEY], str(path))
    for name in sorted(config.sha256.keys() - names):
        raise UserError(f"{path}: damaged: tensor {name} is missing")
    for name in sorted(names - config.sha256.keys()):
        near = nearest(name, config.sha256, 0)
        raise UserError(f"{path}: damaged: unknown tensor {name}; the nearest is {near}")
    check_layers(path, config.model, str(path))
    return config


def load_one_file(path: Path, kernel: Kernel = "auto") -> tuple[Transformer, Tokenizer | None]:
    """Load a model, on the CPU, and its tokenizer, if the file has one.

    Raises:
        UserError: the file is damaged, or of another format or vocabulary.
    """
    config = read_description(path)
    files: dict[str, bytes] = {}

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in each_tensor(path):
            if _sha256(tensor) != config.sha256[name]:
                raise UserError(f"{path}: damaged: tensor {name} is not that of its sha256")
            if name in FILES:
                files[name] = tensor.numpy().tobytes()
            else:
                yield name, tensor

    try:
        kinds = kinds_of(load_file(path))  # a memory mapping: no value is read
        for name in FILES:
            kinds.pop(name, None)
        model = assemble(config, kinds, read(), kernel, path, str(path))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged: {error}") from error
    kinds_of_tokenizer = zip(TOKENIZER_FILES, (Tokenizer, JsonTokenizer), strict=True)
    tokenizer = next((kind(path, files[n]) for n, kind in kinds_of_tokenizer if n in files), None)
    if tokenizer is None:
        return model, None
    check_vocab(tokenizer, config.model, str(path))
    if chat_template.FILE in files:
        tokenizer.chat_template = parse_chat_template(path, files[chat_template.FILE])
    return model, tokenizer


def _sha256(tensor: Tensor) -> str:
    """The sha256 of a tensor's bytes, dtype and shape."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    checksum = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    checksum.update(data.numpy().data)
    return checksum.hexdigest()
