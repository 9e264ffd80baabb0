"""The contents of a model on disk, the same in a folder (folder.py) and in one file (one_file.py).

There is a description (:class:`FolderConfig`): the resolved config, the form of the weights,
checksums, and the description's own checksum. And there are tensors under the names of our modules.
Loading first builds the described modules, without memory and without random numbers. It compares
the tensors' names, shapes and dtypes with theirs, and only then reads values. So a damaged file
cannot make it allocate memory of a wrong size.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitnet.data.tokenizer import Tokenizer
from bitnet.linear import BitLinear, Kernel, TernaryLinear
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.grid import within
from bitnet.qat.integer import IntLayer
from bitnet.qat.layers import QATLayer
from bitnet.qat.prepare import convert, prepare
from bitnet.qat.recipe import Recipe
from bitnet.schema import STRICT, UserError, check_file, nearest, user_input, with_new_keys
from bitnet_kernels import pack_base3, pack_ternary, unpack_base3
from bitnet_kernels.packing import packed_columns

FORMAT, VERSION = "bitnet-train", 1
MAX_FILE_BYTES = 2**28
"""Largest size in bytes of a part that is not a tensor of the model, such as a tokenizer."""
_BLOCK = 64
"""Rows of a matrix unpacked at a time."""
FULL_PRECISION = Recipe()
Weights = Literal["latent", "packed", "integer"]
Kinds = dict[str, tuple[torch.dtype, torch.Size]]
"""Tensors' dtypes and shapes, by name."""
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
    """sha256 of all other fields, by :func:`_config_sha256`."""
    quant: Recipe = FULL_PRECISION
    """The recipe that quantizes the model; absent from the file if there is none."""
    document_separator: Annotated[int, Field(ge=0)] | None = None
    """The token between documents, if training kept documents apart; evaluation then does too.
    Otherwise absent from the file."""


_CONFIG = TypeAdapter(FolderConfig)


def stored_form(model: Transformer, quant: Recipe) -> tuple[Weights, dict[str, Tensor]]:
    """The form of a model's weights, and its tensors as stored in a file.

    Raises:
        ValueError: the model's layers or tensors do not match its config and ``quant``, so that a
            different model would be loaded; names the first one.
    """
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
        structure = structure_of(model.config, weights, quant)
    except UserError as error:
        raise ValueError(f"quant: {error}") from error
    kinds = kinds_of(tensors)
    if problem := _misfit(modules, structure, weights) or _difference(kinds, structure, weights):
        raise ValueError(f"model: {problem}")
    for name in _second_names(structure):
        del tensors[name]
    return weights, tensors


def describe(
    model: Transformer, weights: Weights, quant: Recipe, checksums: Mapping[str, str]
) -> dict[str, Any]:
    """The description of a model, for JSON."""
    separator = model.document_separator
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "weights": weights,
        "model": dataclasses.asdict(model.config),
        **({"quant": dataclasses.asdict(quant)} if quant.enabled else {}),
        **({} if separator is None else {"document_separator": separator}),
        "sha256": dict(checksums),
    }
    return config | {"config_sha256": _config_sha256(config)}


def parse(data: bytes | str, where: str) -> FolderConfig:
    """Read and check a description. Raises UserError, beginning with ``where``, if it is damaged
    or of another program."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged: not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f'{where}: not a model folder of this project ("format" is not "{FORMAT}")')
    if raw.get("version") != VERSION:
        raise UserError(
            f"{where}: has format version {raw.get('version')!r}, this program reads {VERSION}"
        )
    try:
        config = _CONFIG.validate_json(json.dumps(with_new_keys(raw)))
    except ValidationError as error:
        raise UserError(f"{where}: {_first_error(error)}") from error
    if config.config_sha256 != _config_sha256(raw):
        raise UserError(f"{where}: damaged or edited: its content is not that of its config_sha256")
    return config


def assemble(
    config: FolderConfig,
    kinds: Kinds,
    read: Iterable[tuple[str, Tensor]],
    kernel: Kernel,
    path: Path,
    where: str,
) -> Transformer:
    """Build the model from a description and tensors, on the CPU.

    Arguments:
        kinds: of the tensors, by name.
        read: their values, in any order; an OSError or SafetensorError passes through.
        kernel: of the packed layers.
        path: of the tensors. where: of the description. Both are for messages.
    Raises:
        UserError: description and tensors do not match, or a value is invalid.
    """
    try:
        model = structure_of(config.model, config.weights, config.quant)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    model.document_separator = config.document_separator
    coded, tied = _coded(model, config.weights), _second_names(model)
    aliases = {name: kinds[first] for name, first in tied.items() if first in kinds}
    if problem := _difference(kinds | aliases, model, config.weights):
        raise UserError(f"{path}: {problem}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in read:
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
                    f"{path}: tensor {name}.packed: holds a code outside of "
                    f"{levels[0]} .. {levels[-1]}, the codes of {module.recipe}"
                )
    return model


def _repacked(codes: Tensor, in_features: int) -> Tensor:
    """The quarter-planes uint8 ``[N, ceil(K/64)*16]`` of base-3 codes uint8 ``[N, ceil(K/5)]``.

    Works in blocks of rows. C's allocator keeps memory that is freed between two weights for the
    process, so the freed memory must not be whole matrices with a byte per weight.
    """
    packed = codes.new_empty(len(codes), packed_columns(in_features))
    for rows, part in zip(packed.split(_BLOCK), codes.split(_BLOCK), strict=True):
        rows.copy_(pack_ternary(unpack_base3(part, in_features)))
    return packed


def _ternary_linear(linear: BitLinear | TernaryLinear, kernel: Kernel) -> TernaryLinear:
    """The packed layer, without memory, that replaces a BitLinear."""
    layer = TernaryLinear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        device="meta",
        granularity=linear.granularity,
        group_size=linear.group_size,
        kernel=kernel,
    )
    layer.rms_norm = linear.rms_norm
    return layer


class _NoRandomNumbers(TorchFunctionMode):
    """Skips the drawing of initial weights. On meta tensors it would draw nothing, but torch would
    import its compiler: 900 modules, two seconds and 150 MB."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def structure_of(config: ModelConfig, weights: Weights, quant: Recipe) -> Transformer:
    """The model's modules without memory and without drawing initial weights. BitLinears stand in
    for the TernaryLinears of a packed model. Raises UserError for a recipe that does not fit."""
    if (weights == "integer") > quant.enabled or (weights == "packed" and quant.enabled):
        raise UserError(f'weights "{weights}" and quant.weights "{quant.weights}" disagree')
    with torch.device("meta"), _NoRandomNumbers():
        model = Transformer(config).float()  # torch's default dtype may differ
        if quant.enabled:
            try:
                prepare(model, quant)
                if weights == "integer":
                    convert(model)
            except ValueError as error:
                raise UserError(f"quant: {error}") from error
    return model


def _second_names(model: Transformer) -> dict[str, str]:
    """Parameters with two names (a tied head): second name, which is not stored -> first name."""
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
    """The first layer that loading would rebuild with a different computation, even if the tensors
    are the same; None if there is none."""
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
    """The settings of a quantized layer's computation, apart from its tensors."""
    if isinstance(module, QATLayer | IntLayer):
        return {f"quant.{key}": v for key, v in dataclasses.asdict(module.recipe).items()}
    names = ("granularity", "group_size", "grad_mask", "grad_mask_c")
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def kinds_of(tensors: Mapping[str, Tensor]) -> Kinds:
    """Dtypes and shapes; no value is read."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _difference(tensors: Kinds, structure: Transformer, weights: Weights) -> str | None:
    """Describe how the tensors differ from those of such a model; None if they do not."""
    expected = kinds_of(structure.state_dict())
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
        found = tensors[name]
        if found != (dtype, shape):
            return (
                f"tensor {name} is {found[0]} {list(found[1])}; the config wants "
                f"{dtype} {list(shape)}"
            )
    return None


def _bad_value(name: str, tensor: Tensor) -> str | None:
    """Say why a tensor's values are impossible in a packed model; None if they are possible."""
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    low, high = (float(value) for value in tensor.aminmax())  # a NaN makes both NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"tensor {name} holds NaN or infinity"
    if name.endswith("scale") and not low > 0:
        return f"tensor {name} holds a scale of 0 or below"
    return None


def check_vocab(tokenizer: Tokenizer, config: ModelConfig, where: str) -> None:
    """Raise UserError, beginning with ``where``, for a tokenizer with a different vocabulary."""
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{config.vocab_size}"
        )


def _config_sha256(config: Mapping[str, Any]) -> str:
    """sha256 of config.json's content without this key, sorted so that layout does not matter."""
    rest = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] != "unexpected_keyword_argument":
        return f"{key}: {first['msg']}"
    sections: dict[object, type] = {"model": ModelConfig, "quant": Recipe}
    config_class = sections.get(first["loc"][0], FolderConfig)
    valid = [f.name for f in dataclasses.fields(config_class)]
    return f"unknown key {key}; the nearest is {nearest(str(first['loc'][-1]), valid, 0)}"


def check_layers(path: Path, config: ModelConfig, where: str) -> None:
    """Raise UserError if a file of tensors is larger than the config's model can be, or lacks one
    of the model's layers. ``where``: the description, for messages."""
    if not path.is_file():
        raise UserError(f"{path}: missing")
    try:
        config = config.resolve()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    # at most 16 bytes per parameter in any form: codes, scales and zero points of single columns
    check_file(path, 16 * config.num_parameters()["total"] + MAX_FILE_BYTES)
    with user_input(f"{path}: damaged"), safe_open(path, "pt") as file:
        names = file.keys()
    layers = {found[1] for name in names if (found := re.match(r"layers\.(\d+)\.", name))}
    absent = next((i for i in range(config.n_layers) if str(i) not in layers), None)
    if absent is not None:
        raise UserError(
            f"{path}: tensor layers.{absent}.* is missing; {where} has model.n_layers = "
            f"{config.n_layers}"
        )
