"""Import a pretrained Llama-family model as our Transformer, to quantize it or to train it further.

    model, tokenizer = load_hf("SmolLM2-135M/")           # config.json, weights, tokenizer.json
    model, tokenizer = load_hf("SmolLM2-135M-Q4_1.gguf")  # one file, its weights made fp32

What our model does not have (biases, scaled rotary positions, sliding windows, other head sizes) is
refused by name: such a model would load and silently compute something else. Adapters (LoRA) are
refused too: alone they are no model, and next to one it is unknown whether they are merged in.

This module reads folders, bitnet/export/gguf.py reads GGUF files; bitnet/export/llama.py lists what
they must hold. transformers (extra `hf`) supplies a config.json's defaults: offline, without remote
code. Weights come from safetensors only, never from a pickle or from a file outside the folder,
even if an index of shards names one.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bitnet.data.tokenizer_json import JsonTokenizer, with_eos
from bitnet.export.gguf import load_gguf
from bitnet.export.llama import Shape, Stored, build, check_tensors, check_type
from bitnet.model import Transformer
from bitnet.schema import UserError, check_file, nearest, read_file, user_input

_ROPE_KEYS = {"rope_type", "rope_theta", "type"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_JSON_BYTES = 2**26
"""Largest config.json or index in bytes; the index of a large model's shards has a few MB."""
_WEIGHTS = "model.safetensors"


def load_hf(source: Path | str) -> tuple[Transformer, JsonTokenizer]:
    """Import a Llama-family checkpoint. Nothing in the model is random.

    Arguments:
        source: a local Hugging Face folder (safetensors), or a .gguf file.
    Returns:
        the model (fp32, ``linear="fp"``), and its tokenizer, whose end-of-document token is the
        checkpoint's own; where it has several ends, ``eos_ids`` has them all.
    Raises:
        UserError: something is missing or damaged, or the model's maths is not ours; the `hf`
            extra is not installed.
    """
    source = Path(source)
    if source.suffix.lower() == ".gguf" and source.is_file():
        return load_gguf(source)
    _check_files(source)
    theirs = _read_config(source)
    shape = _shape(theirs, source)
    stored = _stored(source)
    check_tensors(source, shape, stored)
    tokenizer = _tokenizer(source)
    return build(source, shape, stored, tokenizer), tokenizer


def add_sub_norms(model: Transformer) -> Transformer:
    """Add BitNet's extra norms (``sub_norm``), of weight 1, before o_proj and down_proj, with which
    a model can be trained on as a ternary one (BitDistill, arXiv 2510.13998). The result shares the
    weights; it computes something else until it is trained.

    Raises:
        UserError: the model's norms are not placed as Llama's (``pre_norm``).
    """
    if model.config.norm_placement != "pre_norm":
        raise UserError(
            f"sub-norm: the model has model.norm_placement = {model.config.norm_placement!r}; "
            "only a 'pre_norm' model can be given sub-norms"
        )
    with torch.device("meta"):
        wider = Transformer(dataclasses.replace(model.config, norm_placement="sub_norm"))
    tensors = dict(model.state_dict())
    for name, tensor in wider.state_dict().items():
        if name not in tensors:
            device = model.norm.weight.device
            tensors[name] = torch.ones(tensor.shape, dtype=torch.float32, device=device)
    wider.load_state_dict(tensors, assign=True)
    if wider.config.tie_embeddings:
        wider.lm_head.weight = wider.embed_tokens.weight
    return wider.train(model.training)


def _check_files(source: Path) -> None:
    if not source.exists():
        near = nearest(source.name, _names(source.parent))
        hint = f"; did you mean {source.with_name(near)}?" if near else ""
        raise UserError(f"{source}: no such model{hint}")
    if not source.is_dir():
        raise UserError(f"{source}: expected a Hugging Face folder or a .gguf file")
    check_no_adapter(source)
    for name in ("config.json", "tokenizer.json"):
        if not (source / name).is_file():
            raise UserError(f"{source}: has no {name}; it is not a folder that can be imported")
    if not any(source.glob("*.safetensors")):
        raise UserError(
            f"{source}: has no .safetensors; weights in pickle form (.bin, .pt) are not read, "
            "since reading a pickle can run code"
        )


def check_no_adapter(source: Path) -> None:
    """Raise UserError for a folder that holds an adapter (LoRA), alone or beside a model."""
    for name in sorted(_names(source)):
        if name.startswith("adapter_") and name.endswith((".json", ".safetensors", ".bin", ".pt")):
            raise UserError(
                f"{source}: holds an adapter ({name}), which is not imported; merge it into its "
                "base model first (peft: merge_and_unload), or take the file out if that is done"
            )


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _json(path: Path) -> dict[str, Any]:
    data = read_file(path, _MAX_JSON_BYTES)
    with user_input(f"{path}: damaged"):
        content = json.loads(data)
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged: not a JSON object")
    return content


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40


def _number(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and 0 < value < 1e300 and math.isfinite(float(value))


def _token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings"),
)
_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_SIZES, ("a positive integer", _size)),
    "num_key_value_heads": ("a positive integer or null", _or_none(_size)),
    "head_dim": ("a positive integer or null", _or_none(_size)),
    "sliding_window": ("a positive integer or null", _or_none(_size)),
    "rms_norm_eps": ("a positive number", _number),
    "rope_theta": ("a positive number", _or_none(_number)),
    "rope_scaling": ("an object or null", _or_none(_is(dict))),
    "rope_parameters": ("an object or null", _or_none(_is(dict))),
    "hidden_act": ("a string", _is(str)),
    "attention_bias": ("true or false", _is(bool)),
    "mlp_bias": ("true or false", _is(bool)),
    "tie_word_embeddings": ("true or false", _is(bool)),
    "eos_token_id": (
        "a token id, a list of them or null",
        lambda value: (
            all(map(_token_id, value))
            if isinstance(value, list)
            else value is None or _token_id(value)
        ),
    ),
}
"""Keys of a config.json, what our model needs them to be, and the check."""


def _check_keys(path: Path, content: dict[str, Any]) -> None:
    for key, (wanted, check) in _KEYS.items():
        if key in content and not check(content[key]):
            shown = json.dumps(content[key])
            shown = shown if len(shown) < 60 else f"{shown[:60]}..."
            raise UserError(f"{path}: {key}: cannot be read: is {shown}, expected {wanted}")


def _read_config(source: Path) -> Any:
    """transformers' config of the folder, with all defaults of its model type."""
    path = source / "config.json"
    content = _json(path)
    check_type(source, str(content.get("model_type")))
    _check_keys(path, content)
    for part in ("rope_scaling", "rope_parameters"):
        rope = content.get(part) or {}
        if "rope_theta" in rope and not _number(rope["rope_theta"]):
            raise UserError(f"{path}: {part}.rope_theta: cannot be read: expected a number above 0")
    if content.get("transformers_weights"):
        raise UserError(
            f"{source}: its config.json names the files of its weights (transformers_weights), "
            "which is not supported"
        )
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f'{source}: importing it needs the hf extra: pip install "bitnet-train[hf]"'
        ) from error
    with user_input(f"{path}: cannot be read"):
        return transformers.CONFIG_MAPPING[content["model_type"]].from_dict(content)


def _shape(theirs: Any, source: Path) -> Shape:
    """The model's sizes. Raises UserError for what our model cannot have."""
    rope = dict(getattr(theirs, "rope_parameters", None) or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads = theirs.num_attention_heads
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    kv_heads = theirs.num_key_value_heads or heads
    window = getattr(theirs, "sliding_window", None)
    refused = {
        f"rotary positions of type {kind!r}": kind != "default",
        "rotary positions with " + ", ".join(sorted(map(str, rope.keys() - _ROPE_KEYS))): kind
        == "default"
        and bool(rope.keys() - _ROPE_KEYS),
        "attention_bias": getattr(theirs, "attention_bias", False),
        "mlp_bias": getattr(theirs, "mlp_bias", False),
        f"hidden_act {theirs.hidden_act!r}": theirs.hidden_act not in ("silu", "swish"),
        f"heads of {head_dim} ({heads} of them in a hidden_size of {theirs.hidden_size})": (
            head_dim * heads != theirs.hidden_size
        ),
        f"{kv_heads} key-value heads for {heads} heads": heads % kv_heads != 0,
        f"a sliding_window of {window}": window is not None
        and window < theirs.max_position_embeddings,
        "quantized weights (quantization_config)": getattr(theirs, "quantization_config", None)
        is not None,
    }
    for what, present in refused.items():
        if present:
            raise UserError(f"{source}: the model has {what}, which our model does not have")
    return Shape(
        n_layers=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_ff=theirs.intermediate_size,
        vocab_size=theirs.vocab_size,
        max_seq_len=theirs.max_position_embeddings,
        rope_theta=float(rope.get("rope_theta") or 10_000.0),
        norm_eps=float(theirs.rms_norm_eps),
        tied=theirs.tie_word_embeddings,
    )


def _stored(source: Path) -> dict[str, Stored]:
    """Every tensor of the folder, under our names, from the headers of its files."""
    files = {source / _WEIGHTS}
    shard_of: dict[str, str] = {}
    for index in sorted(source.glob("*.safetensors.index.json")):
        shards = _shards(index)
        if index.name == f"{_WEIGHTS}.index.json" and not (source / _WEIGHTS).is_file():
            shard_of, files = shards, {source / shard for shard in shards.values()}
    stored: dict[str, Stored] = {}
    for path in sorted(files):
        if not path.is_file():
            raise UserError(f"{source}: has no {path.name}, and no index of shards")
        check_file(path)
        with user_input(f"{path}: cannot be read"), safe_open(path, "pt") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in headers.items()}
        for name, (dtype, shape) in found.items():
            if name.endswith(".rotary_emb.inv_freq"):
                continue  # of old checkpoints: a constant, computed from rope_theta
            if dtype not in _FLOATS:
                raise UserError(
                    f"{path}: tensor {name} is {dtype}; expected a float weight "
                    f"({', '.join(_FLOATS)})"
                )
            if not shape:
                raise UserError(f"{path}: cannot be read: tensor {name} is a single number")
            ours = name.removeprefix("model.")
            if ours in stored or shard_of.get(name, path.name) != path.name:
                raise UserError(f"{path}: damaged: unexpected tensor {name}: it is elsewhere too")
            stored[ours] = Stored(name, tuple(shape), _reader(path, name))
    for name in sorted(shard_of):
        if name.removeprefix("model.") not in stored and not name.endswith("inv_freq"):
            raise UserError(f"{source}: damaged: missing tensor {name} in {shard_of[name]}")
    return stored


def _reader(path: Path, name: str) -> Callable[[int], Tensor]:
    def read(rows: int) -> Tensor:
        with safe_open(path, "pt") as file:
            part: Tensor = file.get_slice(name)[:rows]
            return part.to(torch.float32, copy=True)

    return read


def _shards(path: Path) -> dict[str, str]:
    """Tensor -> file, from an index of shards. Raises UserError for a file that is a pickle or
    outside the folder."""
    shards = _json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{path}: damaged: has no weight_map")
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise UserError(f"{path}: {tensor} is in {shard!r}, which is not a file of the folder")
        if not shard.endswith(".safetensors"):
            raise UserError(
                f"{path}: {tensor} is in {shard}; only .safetensors is read, since reading a "
                "pickle can run code"
            )
        if not (path.parent / shard).is_file():
            raise UserError(f"{path}: {tensor} is in {shard}, which is missing")
    return shards


def _tokenizer(source: Path) -> JsonTokenizer:
    """The checkpoint's tokenizer, with the end tokens of config.json and generation_config.json
    written into the file. The first of config.json ends a document in training."""
    path = source / "tokenizer.json"
    model_bytes = read_file(path)
    with user_input(f"{path}: not a tokenizer.json, or a damaged one"):
        added = {token["id"]: token["content"] for token in json.loads(model_bytes)["added_tokens"]}
    ends: dict[int, None] = {}
    first: int | None = None
    for name in ("config.json", "generation_config.json"):
        if not (source / name).is_file():
            continue
        content = _json(source / name)
        _check_keys(source / name, {"eos_token_id": content.get("eos_token_id")})
        eos = content.get("eos_token_id")
        for end in eos if isinstance(eos, list) else [] if eos is None else [eos]:
            if end not in added:
                raise UserError(
                    f"{source}: its eos_token_id {end} is none of the tokenizer's added tokens: "
                    "they do not belong together"
                )
            ends[end] = None
            first = end if first is None and name == "config.json" else first
    if ends:
        with user_input(f"{path}: not a tokenizer.json, or a damaged one"):
            if first is None:
                first = JsonTokenizer(path, model_bytes).eos_id
            model_bytes = with_eos(model_bytes, added[first], [added[end] for end in ends])
    tokenizer = JsonTokenizer(path, model_bytes)
    if ends and {first, *ends} != set(tokenizer.eos_ids):  # the library numbers tokens without gaps
        raise UserError(
            f"{source}: its eos_token_id {list(ends)} cannot be had: the tokenizer gives its added "
            "tokens other ids than the file says"
        )
    return tokenizer
