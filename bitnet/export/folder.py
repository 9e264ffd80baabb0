"""A model folder: what a run leaves behind, what `bitnet pack` writes and `bitnet.load` reads.

    model/
        model.safetensors   tensors; Hugging Face's BitNet names without the leading "model."
        config.json         format, version, the resolved ModelConfig, sha256 of every file
        tokenizer.model     the sentencepiece model

Weights come in two forms. *latent*: the fp32 weights of training, from which training can go on.
*packed*: each ternary matrix as ``<name>.codes``, five base-3 digits a byte (uint8
``[N, ceil(K/5)]``, 1.6 bits a weight), and ``<name>.scale`` in fp32. In memory a TernaryLinear
holds 2 bits a weight in the order kernels want; both forms hold the same integers, so converting
is exact, and the scale is stored, never estimated again: absmean of a dequantized matrix keeps the
codes and shrinks the scale by the share of nonzeros.

Nothing that is loaded can execute code (safetensors, JSON, sentencepiece's protobuf), every file is
checked against its sha256, and config.json against its own: a hand-edited rope_theta would load and
be quietly wrong. Other files in the folder are not looked at.

Saving writes a folder aside and renames it, so it appears whole or not at all. *Replacing* one
takes two renames (durable.py): killed just between them, the path is missing and the previous
version is whole in `.old-<name>` beside it; loading then says so.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitnet.durable import load_tensors, new_folder, save_tensors, sha256
from bitnet.linear import BitLinear, Kernel, TernaryLinear
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import STRICT, UserError
from bitnet.tokenizer import Tokenizer
from bitnet_kernels import pack_base3, unpack_base3

CONFIG, TENSORS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"
FORMAT, VERSION = "bitnet-train", 1
MAX_CONFIG_BYTES = 2**20
Weights = Literal["latent", "packed"]


@dataclass(frozen=True, config=STRICT)
class FolderConfig:
    """What config.json says."""

    format: Literal["bitnet-train"]
    version: Literal[1]
    weights: Weights
    model: ModelConfig
    sha256: dict[str, str]
    """Of the other files, by name."""
    config_sha256: str
    """Of all the above, as :func:`_config_sha256` spells it."""


_CONFIG = TypeAdapter(FolderConfig)


def save_model(folder: Path | str, model: Transformer, tokenizer: Tokenizer | None) -> Path:
    """Write a model folder; a model folder that is there already is replaced.

    Arguments:
        model: with fp32 weights, or packed (every BitLinear a TernaryLinear); on any device.
        tokenizer: the model's own. None: the folder has none, and only :func:`load_model` reads it.
    Returns:
        The folder.
    Raises:
        UserError: ``folder`` exists and is something else; another tokenizer's vocabulary.
        ValueError: the model's tensors are not those of its config.
        OSError: the disk is full, ...; what was there is untouched.
    """
    folder = Path(folder)
    _refuse_to_replace(folder)
    if tokenizer is not None:
        _check_vocab(tokenizer, model.config, str(folder))
    tensors = dict(model.state_dict())
    weights: Weights = "latent"
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            weights = "packed"
            del tensors[f"{name}.packed"]
            tensors[f"{name}.codes"] = pack_base3(module.codes())
    if problem := _difference(tensors, model.config, weights):
        raise ValueError(f"model: {problem}")
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    with new_folder(folder) as aside:
        save_tensors(aside / TENSORS, tensors)
        if tokenizer is not None:
            (aside / TOKENIZER).write_bytes(tokenizer.model_bytes)
        config: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "weights": weights,
            "model": dataclasses.asdict(model.config),
            "sha256": {file.name: sha256(file) for file in sorted(aside.iterdir())},
        }
        config["config_sha256"] = _config_sha256(config)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def load(
    folder: Path | str, device: torch.device | str = "cpu", kernel: Kernel = "auto"
) -> tuple[Transformer, Tokenizer]:
    """Load a model and its tokenizer from a model folder.

    Arguments:
        device: where the model goes. kernel: of the packed layers, if the model is packed.
    Raises:
        UserError: naming the file that is missing, damaged, or of another format or vocabulary.
    """
    folder = Path(folder)
    config = read_config(folder)
    if TOKENIZER not in config.sha256:
        raise UserError(f"{folder}: was saved without a tokenizer; it has no {TOKENIZER}")
    model = load_model(folder, device, kernel)
    tokenizer = Tokenizer(folder / TOKENIZER)
    _check_vocab(tokenizer, config.model, str(folder / TOKENIZER))
    return model, tokenizer


def load_model(
    folder: Path | str, device: torch.device | str = "cpu", kernel: Kernel = "auto"
) -> Transformer:
    """:func:`load` without the tokenizer, which the folder need not have. Draws no random number.

    A latent model can be trained on. A packed one gets the stored codes and scales as they are.
    """
    folder = Path(folder)
    config = read_config(folder)
    _verify(folder, config)
    try:
        tensors = load_tensors(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / TENSORS}: damaged: {error}") from error
    if config.model.tie_embeddings and "embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    if problem := _difference(tensors, config.model, config.weights):
        raise UserError(f"{folder / TENSORS}: {problem}")
    model = _on_meta(config.model)
    if config.weights == "packed":
        for name, linear in _bit_linears(model).items():
            try:
                layer = _ternary_linear(linear, name, tensors, kernel)
            except ValueError as error:
                raise UserError(f"{folder / TENSORS}: tensor {name}.codes: {error}") from error
            model.set_submodule(name, layer)
            tensors[f"{name}.packed"] = layer.packed
    model.load_state_dict(tensors, assign=True)
    if config.model.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.to(device)


def _ternary_linear(
    linear: BitLinear, name: str, tensors: dict[str, Tensor], kernel: Kernel
) -> TernaryLinear:
    """The packed layer of ``<name>.codes`` (taken out of ``tensors``) and ``<name>.scale``."""
    layer = TernaryLinear.from_codes(
        unpack_base3(tensors.pop(f"{name}.codes"), linear.in_features),
        tensors[f"{name}.scale"],
        granularity=linear.granularity,
        group_size=linear.group_size,
        kernel=kernel,
    )
    layer.rms_norm = linear.rms_norm
    return layer


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes by kind: ``embedding`` (with an untied head), ``matrices``, ``norms``, ``total``."""

    fp32: dict[str, int]
    """Were every parameter an fp32."""
    stored: dict[str, int]
    """In model.safetensors; the total is the file's, with its header."""


def sizes(folder: Path | str) -> Sizes:
    """What a model folder's weights take on the disk; raises as :func:`load_model`."""
    folder = Path(folder)
    config = read_config(folder)
    _verify(folder, config)
    stored = dict.fromkeys(("embedding", "matrices", "norms"), 0)
    for name, tensor in load_file(folder / TENSORS).items():
        if name.endswith("norm.weight"):
            kind = "norms"
        else:
            kind = "matrices" if name.startswith("layers.") else "embedding"
        stored[kind] += tensor.nbytes
    fp32 = {kind: 4 * count for kind, count in config.model.num_parameters().items()}
    return Sizes(fp32, stored | {"total": (folder / TENSORS).stat().st_size})


def _on_meta(config: ModelConfig) -> Transformer:
    """The model's modules without memory, and without drawing initial weights."""
    with torch.device("meta"):
        return Transformer(config)


def _bit_linears(model: Transformer) -> dict[str, BitLinear]:
    return {n: module for n, module in model.named_modules() if isinstance(module, BitLinear)}


def _difference(tensors: Mapping[str, Tensor], config: ModelConfig, weights: Weights) -> str | None:
    """How the tensors differ from those that a model of this config has; None if they do not."""
    model = _on_meta(config)
    expected = {name: (t.dtype, t.shape) for name, t in model.state_dict().items()}
    if weights == "packed":
        for name, linear in _bit_linears(model).items():
            codes, scale = linear.quantize()
            del expected[f"{name}.weight"]
            columns = -(-codes.shape[1] // 5)
            expected[f"{name}.codes"] = (torch.uint8, torch.Size((codes.shape[0], columns)))
            expected[f"{name}.scale"] = (scale.dtype, scale.shape)
    for name in sorted(expected.keys() - tensors.keys()):
        return f"tensor {name} is missing"
    for name in sorted(tensors.keys() - expected.keys()):
        near = get_close_matches(name, list(expected), 1, 0.0)
        return f"unknown tensor {name}; the nearest is {near[0]}"
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            return (
                f"tensor {name} is {tensor.dtype} {list(tensor.shape)}; the config wants "
                f"{dtype} {list(shape)}"
            )
    return None


def _check_vocab(tokenizer: Tokenizer, config: ModelConfig, where: str) -> None:
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{config.vocab_size}"
        )


def _refuse_to_replace(folder: Path) -> None:
    """Replacing deletes, so only an empty folder or one that we wrote, and nothing else, goes."""
    if folder.is_dir():
        present = {path.name for path in folder.iterdir()}
        for name in sorted(present - {CONFIG, TENSORS, TOKENIZER}):
            raise UserError(
                f"{folder}: holds {name}, which is not part of a model folder and would be "
                "deleted; choose another folder"
            )
        ours = CONFIG in present and f'"{FORMAT}"' in (folder / CONFIG).read_text("utf-8", "ignore")
        if present and not ours:
            raise UserError(
                f"{folder}: holds a model that this program did not write and that would be "
                "deleted; choose another folder"
            )
    elif folder.exists():
        raise UserError(f"{folder}: exists and is not a folder")


def _config_sha256(config: Mapping[str, Any]) -> str:
    """sha256 of config.json's content but this key: sorted, so that layout does not count."""
    rest = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> FolderConfig:
    """config.json, checked; raises UserError where there is none, or a damaged or foreign one."""
    path = folder / CONFIG
    if not path.is_file():
        old = folder.with_name(f".old-{folder.name}")
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
    try:
        data = path.read_bytes()
        raw = json.loads(data)
    except OSError as error:
        raise UserError(f"{path}: damaged: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f'{path}: not a model folder of this project ("format" is not "{FORMAT}")')
    if raw.get("version") != VERSION:
        raise UserError(
            f"{path}: has format version {raw.get('version')!r}, this program reads {VERSION}"
        )
    try:
        config = _CONFIG.validate_json(data)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_error(error)}") from error
    if config.config_sha256 != _config_sha256(raw):
        raise UserError(f"{path}: damaged or edited: its content is not that of its config_sha256")
    if TENSORS not in config.sha256:
        raise UserError(f"{path}: damaged: its sha256 does not list {TENSORS}")
    return config


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] != "unexpected_keyword_argument":
        return f"{key}: {first['msg']}"
    config_class = ModelConfig if first["loc"][0] == "model" else FolderConfig
    valid = [f.name for f in dataclasses.fields(config_class)]
    near = get_close_matches(str(first["loc"][-1]), valid, 1, 0.0)
    return f"unknown key {key}; the nearest is {near[0]}"


def _verify(folder: Path, config: FolderConfig) -> None:
    for name, expected in config.sha256.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{path}: missing")
        try:
            actual = sha256(path)
        except OSError as error:
            raise UserError(f"{path}: damaged: {error.strerror}") from error
        if actual != expected:
            raise UserError(f"{path}: damaged: its sha256 is not that in {CONFIG}")
