"""A model folder: what a run leaves behind, what `bitnet pack` writes and `bitnet.load` reads.

    model/
        model.safetensors   tensors; Hugging Face's BitNet names without the leading "model."
        config.json         format, version, the resolved ModelConfig, sha256 of every file
        tokenizer.model     the sentencepiece model (or tokenizer.json, of that kind)
        chat_template.json  of a chat model: how messages become text (bitnet/data/chat_template.py)

Weights come in three forms. *latent*: the fp32 weights of training, from which training can go on.
*packed*: each ternary matrix as ``<name>.codes``, five base-3 digits per byte (uint8
``[N, ceil(K/5)]``, 1.6 bits per weight), and ``<name>.scale`` in fp32. In memory a TernaryLinear
holds 2 bits per weight in the order that kernels need. Both forms hold the same integers, so
converting is exact. The scale is stored and never estimated again: absmean of a dequantized matrix
keeps the codes and shrinks the scale by the share of nonzeros.
*integer*: the model was quantized by a recipe (bitnet/qat/recipe.py), which stands in config.json
as ``quant``: codes of so many bits, scales and zero points as bitnet/qat/integer.py holds them, and
a ternary matrix as in *packed*. A latent model may have a recipe too: it is prepared for
quantization-aware training or comes from it, with observers and learned scales. Loading repeats
what made the modules (``prepare``, ``convert``) without memory and fills them.

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
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitnet.data import chat_template
from bitnet.data.chat_template import ChatTemplate, read_chat_template
from bitnet.data.tokenizer import Tokenizer
from bitnet.data.tokenizer_json import TOKENIZER_FILES, load_tokenizer
from bitnet.durable import each_tensor, new_folder, save_tensors, sha256
from bitnet.linear import BitLinear, Kernel, TernaryLinear
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.grid import within
from bitnet.qat.integer import IntLayer
from bitnet.qat.layers import QATLayer
from bitnet.qat.prepare import convert, prepare
from bitnet.qat.recipe import Recipe
from bitnet.schema import (
    STRICT,
    UserError,
    check_file,
    nearest,
    read_file,
    user_input,
    with_new_keys,
)
from bitnet_kernels import pack_base3, pack_ternary, unpack_base3
from bitnet_kernels.packing import packed_columns

CONFIG, TENSORS = "config.json", "model.safetensors"
FORMAT, VERSION = "bitnet-train", 1
MAX_CONFIG_BYTES = 2**20
_MAX_FILE_BYTES = 2**28
"""Largest size in bytes of a file other than model.safetensors, such as a tokenizer."""
_BLOCK = 64
"""Rows of a matrix that are unpacked at a time."""
FULL_PRECISION = Recipe()
Weights = Literal["latent", "packed", "integer"]
_QUANTIZED = (BitLinear, TernaryLinear, QATLayer, IntLayer)


@dataclass(frozen=True, config=STRICT)
class FolderConfig:
    """The content of config.json."""

    format: Literal["bitnet-train"]
    version: Literal[1]
    weights: Weights
    model: ModelConfig
    sha256: dict[str, str]
    """sha256 of the other files, by name."""
    config_sha256: str
    """Of all the others, as :func:`_config_sha256` spells it."""
    quant: Recipe = FULL_PRECISION
    """The recipe that quantizes the model; absent from the file if there is none."""
    document_separator: Annotated[int, Field(ge=0)] | None = None
    """The token between documents that training kept apart, as an evaluation does. Absent
    from the file if they were not."""


_CONFIG = TypeAdapter(FolderConfig)


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
        quant: the recipe that the model was prepared with; of a model without quantizers, none.
    Returns:
        The folder.
    Raises:
        UserError: ``folder`` exists and is something else; another tokenizer's vocabulary.
        ValueError: the model's layers or tensors are not those of its config and ``quant``, so that
            another model would be loaded; the first is named.
        OSError: the disk is full, ...; what was there is untouched.
    """
    folder = Path(folder)
    _refuse_to_replace(folder)
    if tokenizer is not None:
        _check_vocab(tokenizer, model.config, str(folder))
    modules = dict(model.named_modules())
    quantized = any(isinstance(m, TernaryLinear | IntLayer) for m in modules.values())
    weights: Weights = "latent"
    if quantized:
        weights = "integer" if quant.enabled else "packed"
    tensors = dict(model.state_dict())
    for name, module in modules.items():
        if isinstance(module, TernaryLinear):
            del tensors[f"{name}.packed"]
            tensors[f"{name}.codes"] = pack_base3(module.codes())
    try:
        structure = _structure(model.config, weights, quant)
    except UserError as error:
        raise ValueError(f"quant: {error}") from error
    if problem := _misfit(modules, structure, weights) or _difference(tensors, structure, weights):
        raise ValueError(f"model: {problem}")
    for name in _second_names(structure):
        del tensors[name]
    separator = model.document_separator
    with new_folder(folder) as aside:
        save_tensors(aside / TENSORS, tensors)
        if tokenizer is not None:
            (aside / tokenizer.file_name).write_bytes(tokenizer.model_bytes)
            if tokenizer.chat_template is not None:
                (aside / chat_template.FILE).write_bytes(tokenizer.chat_template.to_json())
        config: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "weights": weights,
            "model": dataclasses.asdict(model.config),
            **({"quant": dataclasses.asdict(quant)} if quant.enabled else {}),
            **({} if separator is None else {"document_separator": separator}),
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
    names = [name for name in TOKENIZER_FILES if name in config.sha256]
    if not names:
        raise UserError(
            f"{folder}: was saved without a tokenizer; it has no {' or '.join(TOKENIZER_FILES)}"
        )
    model = load_model(folder, device, kernel)
    tokenizer = load_tokenizer(folder / names[0])
    _check_vocab(tokenizer, config.model, str(tokenizer.path))
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

    A latent model can be trained on (one with a recipe is prepared by it, its observers where they
    were). A packed or integer one gets the stored codes and scales as they are.
    """
    folder = Path(folder)
    config = read_config(folder)
    _verify(folder, config)
    path = folder / TENSORS
    try:
        model = _structure(config.model, config.weights, config.quant)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    model.document_separator = config.document_separator
    coded, tied = _coded(model, config.weights), _second_names(model)
    tensors: dict[str, Tensor] = {}
    try:
        headers = load_file(path)  # a mapping: of a tensor only its dtype and shape are read
        headers |= {name: headers[first] for name, first in tied.items() if first in headers}
        if problem := _difference(headers, model, config.weights):
            raise UserError(f"{path}: {problem}")
        del headers
        for name, tensor in each_tensor(path):
            if config.weights != "latent" and (problem := _bad_value(name, tensor)):
                raise UserError(f"{path}: {problem}")
            layer, _, kind = name.rpartition(".")
            if kind == "codes" and layer in coded:
                try:
                    tensors[f"{layer}.packed"] = _repacked(tensor, coded[layer].in_features)
                except ValueError as error:
                    raise UserError(f"{path}: tensor {name}: {error}") from error
            else:
                tensors[name] = tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged: {error}") from error
    tensors |= {name: tensors[first] for name, first in tied.items()}
    for name, linear in coded.items():
        model.set_submodule(name, _ternary_linear(linear, kernel))
    model.load_state_dict(tensors, assign=True)
    for name, first in tied.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(first))
    for name, module in model.named_modules():
        if isinstance(module, IntLayer):
            levels = module.recipe.quantizer.levels
            if not bool(within(module.quantize().codes, levels).all()):
                raise UserError(
                    f"{folder / TENSORS}: tensor {name}.packed: holds a code outside of "
                    f"{levels[0]} .. {levels[-1]}, the codes of {module.recipe}"
                )
    return model.to(device)


def _repacked(codes: Tensor, in_features: int) -> Tensor:
    """The quarter-planes uint8 ``[N, ceil(K/64)*16]`` of base-3 codes uint8 ``[N, ceil(K/5)]``.

    In blocks of rows. What C's allocator gets back between two weights that stay, it keeps for the
    process: that must not be whole matrices of a byte per weight.
    """
    packed = codes.new_empty(len(codes), packed_columns(in_features))
    for rows, part in zip(packed.split(_BLOCK), codes.split(_BLOCK), strict=True):
        rows.copy_(pack_ternary(unpack_base3(part, in_features)))
    return packed


def _ternary_linear(linear: BitLinear | TernaryLinear, kernel: Kernel) -> TernaryLinear:
    """The packed layer, without memory, that stands in a BitLinear's place."""
    layer = TernaryLinear(
        linear.in_features,
        linear.out_features,
        bias=False,
        device="meta",
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
    """If every parameter were fp32."""
    stored: dict[str, int]
    """In model.safetensors; the total includes the file's header."""


def sizes(folder: Path | str) -> Sizes:
    """Sizes of a model folder's weights on the disk. Raises as :func:`load_model`."""
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


class _NoRandomNumbers(TorchFunctionMode):
    """Skips the drawing of initial weights. For those of meta tensors, which draw nothing, torch
    would import its compiler: 900 modules, two seconds and 150 MB."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _structure(config: ModelConfig, weights: Weights, quant: Recipe) -> Transformer:
    """The model's modules without memory, and without drawing initial weights; BitLinears stand
    where a packed model has its TernaryLinears. Raises UserError for a recipe that does not fit."""
    if (weights == "integer") > quant.enabled or (weights == "packed" and quant.enabled):
        raise UserError(f'weights "{weights}" and quant.weights "{quant.weights}" disagree')
    with torch.device("meta"), _NoRandomNumbers():
        model = Transformer(config).float()  # whatever torch's default dtype is
        if quant.enabled:
            try:
                prepare(model, quant)
                if weights == "integer":
                    convert(model)
            except ValueError as error:
                raise UserError(f"quant: {error}") from error
    return model


def _second_names(model: Transformer) -> dict[str, str]:
    """Parameters that have two names (a tied head's): the second, not stored, to the first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in named if first[id(p)] != name}


def _coded(model: Transformer, weights: Weights) -> dict[str, BitLinear | TernaryLinear]:
    """The layers that are stored as base-3 codes."""
    if weights == "latent":
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BitLinear | TernaryLinear)
    }


def _misfit(
    modules: Mapping[str, nn.Module], structure: Transformer, weights: Weights
) -> str | None:
    """The first layer for which loading would build one that computes something else, even if the
    tensors are the same; None if there is none."""
    expected = dict(structure.named_modules())
    for name, module in modules.items():
        if (other := expected.get(name)) is None:
            continue  # its tensors, if any, are unknown
        kind, wanted = type(module), type(other)
        if weights != "latent" and wanted is BitLinear:
            wanted = TernaryLinear
        if kind is not wanted and (issubclass(kind, _QUANTIZED) or issubclass(wanted, _QUANTIZED)):
            return f"{name} is {kind.__name__}; the config and quant want {wanted.__name__}"
        want = _options(other)
        for option, value in _options(module).items():
            if option in want and value != want[option]:
                return f"{name} has {option} = {value}; the config and quant want {want[option]}"
    return None


def _options(module: nn.Module) -> dict[str, Any]:
    """The settings by which a quantized layer computes, besides its tensors."""
    if isinstance(module, QATLayer | IntLayer):
        return {f"quant.{key}": v for key, v in dataclasses.asdict(module.recipe).items()}
    names = ("granularity", "group_size", "grad_mask", "grad_mask_c")
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _difference(
    tensors: Mapping[str, Tensor], structure: Transformer, weights: Weights
) -> str | None:
    """How the tensors differ from those of such a model; None if they do not."""
    expected = {name: (t.dtype, t.shape) for name, t in structure.state_dict().items()}
    for name, linear in _coded(structure, weights).items():
        expected.pop(f"{name}.weight" if isinstance(linear, BitLinear) else f"{name}.packed")
        columns = -(-linear.in_features // 5)
        expected[f"{name}.codes"] = (torch.uint8, torch.Size((linear.out_features, columns)))
        if isinstance(linear, BitLinear):
            scale = _ternary_linear(linear, "auto").scale
            expected[f"{name}.scale"] = (scale.dtype, scale.shape)
    for name in sorted(expected.keys() - tensors.keys()):
        return f"tensor {name} is missing"
    for name in sorted(tensors.keys() - expected.keys()):
        return f"unknown tensor {name}; the nearest is {nearest(name, expected, 0)}"
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            return (
                f"tensor {name} is {tensor.dtype} {list(tensor.shape)}; the config wants "
                f"{dtype} {list(shape)}"
            )
    return None


def _bad_value(name: str, tensor: Tensor) -> str | None:
    """Why a tensor's values can be no packed model's; None if they can."""
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    low, high = (float(value) for value in tensor.aminmax())  # of a NaN, both are NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"tensor {name} holds NaN or infinity"
    if name.endswith("scale") and not low > 0:
        return f"tensor {name} holds a scale of 0 or below"
    return None


def _check_vocab(tokenizer: Tokenizer, config: ModelConfig, where: str) -> None:
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{config.vocab_size}"
        )


def _refuse_to_replace(folder: Path) -> None:
    """Raise UserError unless the folder may be replaced, which deletes it: an empty folder, or one
    that holds nothing but our files."""
    with user_input(str(folder)):  # no path, or a circle of links
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
    return f'"{FORMAT}"'.encode() in read_file(config, _MAX_FILE_BYTES)


def _config_sha256(config: Mapping[str, Any]) -> str:
    """sha256 of config.json's content without this key; sorted, so that layout does not matter."""
    rest = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> FolderConfig:
    """Read and check config.json. Raises UserError if it is missing, damaged or foreign."""
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
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f'{path}: not a model folder of this project ("format" is not "{FORMAT}")')
    if raw.get("version") != VERSION:
        raise UserError(
            f"{path}: has format version {raw.get('version')!r}, this program reads {VERSION}"
        )
    try:
        config = _CONFIG.validate_json(json.dumps(with_new_keys(raw)))
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
    sections: dict[object, type] = {"model": ModelConfig, "quant": Recipe}
    config_class = sections.get(first["loc"][0], FolderConfig)
    valid = [f.name for f in dataclasses.fields(config_class)]
    return f"unknown key {key}; the nearest is {nearest(str(first['loc'][-1]), valid, 0)}"


def _verify(folder: Path, config: FolderConfig) -> None:
    """Check the files against their sha256. Before that, check by the header that they can belong
    to such a model: no huge file is hashed, and no million empty layers are built."""
    _check_layers(folder / TENSORS, config.model)
    for name, expected in config.sha256.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{path}: missing")
        if name != TENSORS:
            check_file(path, _MAX_FILE_BYTES)
        with user_input(f"{path}: damaged"):
            actual = sha256(path)
        if actual != expected:
            raise UserError(f"{path}: damaged: its sha256 is not that in {CONFIG}")


def _check_layers(path: Path, config: ModelConfig) -> None:
    """Raise UserError if a file of tensors is larger than the config's model can be, or lacks one
    of its layers."""
    if not path.is_file():
        raise UserError(f"{path}: missing")
    try:
        config = config.resolve()
    except UserError as error:
        raise UserError(f"{path.with_name(CONFIG)}: {error}") from error
    # in any form at most 16 bytes a parameter: codes, scales and zero points of single columns
    check_file(path, 16 * config.num_parameters()["total"] + _MAX_FILE_BYTES)
    with user_input(f"{path}: damaged"), safe_open(path, "pt") as file:
        names = file.keys()
    layers = {found[1] for name in names if (found := re.match(r"layers\.(\d+)\.", name))}
    absent = next((i for i in range(config.n_layers) if str(i) not in layers), None)
    if absent is not None:
        raise UserError(
            f"{path}: tensor layers.{absent}.* is missing; {CONFIG} has model.n_layers = "
            f"{config.n_layers}"
        )
