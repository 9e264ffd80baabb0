"""Check config.json of a Hugging Face checkpoint key by key, and turn it into our sizes.

transformers (extra `hf`) supplies the defaults of a model type: offline, without remote code.
Features that our model does not have are errors that name the feature.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from bitnet.export.hf_quantization import Kind, read_kind
from bitnet.export.llama import Shape, check_type
from bitnet.schema import UserError, read_file, user_input

_ROPE_KEYS = {"rope_type", "rope_theta", "type"}
_ACTIVATIONS: dict[str, Literal["relu2", "silu"]] = {
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
}
_MAX_JSON_BYTES = 2**26
"""Largest config.json or index, in bytes; the shard index of a large model has a few MB."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for anything else."""
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
    "quantization_config": ("an object or null", _or_none(_is(dict))),
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
"""Keys of a config.json -> the type that our model needs, and the check."""


def check_keys(path: Path, content: dict[str, Any]) -> None:
    """Raise UserError, naming the key, for the first key of a config.json with a wrong type."""
    for key, (wanted, check) in _KEYS.items():
        if key in content and not check(content[key]):
            shown = json.dumps(content[key])
            shown = shown if len(shown) < 60 else f"{shown[:60]}..."
            raise UserError(f"{path}: {key}: cannot be read: is {shown}, expected {wanted}")


def read_config(source: Path, master_weights: bool) -> tuple[Any, Kind | None]:
    """transformers' config of the folder, with all defaults of its model type, and how the matrices
    are stored (None: in full precision)."""
    path = source / "config.json"
    content = read_json(path)
    check_type(source, str(content.get("model_type")))
    check_keys(path, content)
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
    kind = read_kind(source, content, master_weights)
    with user_input(f"{path}: cannot be read"):
        return transformers.CONFIG_MAPPING[content["model_type"]].from_dict(content), kind


def shape_of(theirs: Any, source: Path, kind: Kind | None) -> Shape:
    """The model's sizes. Raises UserError for anything that our model cannot have."""
    rope = dict(getattr(theirs, "rope_parameters", None) or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    heads = theirs.num_attention_heads
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    kv_heads = theirs.num_key_value_heads or heads
    window = getattr(theirs, "sliding_window", None)
    o_bias = theirs.model_type != "qwen2" and bool(getattr(theirs, "attention_bias", False))
    biased = theirs.model_type == "qwen2" or o_bias
    refused = {
        f"rotary positions of type {rope_type!r}": rope_type != "default",
        "rotary positions with " + ", ".join(sorted(map(str, rope.keys() - _ROPE_KEYS))): bool(
            rope.keys() - _ROPE_KEYS
        ),
        "mlp_bias": getattr(theirs, "mlp_bias", False),
        f"hidden_act {theirs.hidden_act!r}": theirs.hidden_act not in _ACTIVATIONS,
        f"heads of {head_dim} ({heads} of them in a hidden_size of {theirs.hidden_size})": (
            head_dim * heads != theirs.hidden_size
        ),
        "biases beside codes, by which 'autobitlinear' multiplies the scale": (
            biased and kind == "offline"
        ),
        f"{kv_heads} key-value heads for {heads} heads": heads % kv_heads != 0,
        f"a sliding_window of {window}": window is not None
        and window < theirs.max_position_embeddings,
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
        activation=_ACTIVATIONS[theirs.hidden_act],
        sub_norm=theirs.model_type == "bitnet",
        qk_norm=theirs.model_type == "qwen3",
        qkv_bias=biased,
        o_bias=o_bias,
        ternary=kind is not None,
        coded=kind in ("offline", "packed"),
    )
