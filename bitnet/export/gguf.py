"""Import a Llama-family model from one GGUF file, with its weights dequantized to fp32.

The `gguf` package reads and dequantizes. This module maps the names, reorders the rows of q_proj
and k_proj (llama.cpp rotates neighbouring channels by one angle, Llama and our model channels i and
i + E/2; its converter interleaves the rows), builds the tokenizer, and refuses other models. Every
key of the architecture and every tensor must be one that our model has, so that nothing is left out
silently.

The tokenizer of a GGUF is its vocabulary, its merges and the name of how text is split before
merging (``tokenizer.ggml.pre``), for which llama.cpp has a regular expression. _SPLITS lists the
names that are known here; a file with another name is refused. A file without the key was made
before April 2024, when llama.cpp split all such texts as GPT-2 does.
Source of names and expressions: llama.cpp, src/llama-vocab.cpp, and the models' tokenizer.json.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.data.chat_template import ChatTemplate, template_of
from bitnet.data.tokenizer_json import JsonTokenizer, with_eos
from bitnet.export.llama import Shape, Stored, build, check_tensors
from bitnet.model import Transformer
from bitnet.schema import UserError, check_file, nearest, user_input

_NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Part of a layer in a file -> ours."""
_READ = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length"),
    *("tensor_data_layout", "attention.sliding_window"),
}
"""Keys of the architecture that are read, are checked, or do not affect the computation."""
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1,
    "residual_scale": 1,
    "rope.scaling.factor": 1,
    "rope.scaling.finetuned": False,
    "rope.scaling.type": "none",
    "rope.scale_linear": 1,
    "use_parallel_residual": False,
}
"""Keys of other architectures -> the value at which they compute what ours does."""
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
"""Kinds of tokens. Text never becomes a token of the first kind."""
_MAX_READS = 2**22
"""Most numbers and strings in the metadata; Llama 4's vocabulary and merges are 1.5 million."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _ENDING + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START, _REST_SLASH = r"[^\r\n\p{L}\p{N}]?", _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_TEKKEN = f"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _REST_SLASH
_GPT4O = (
    f"{_START}{_UPPER}*{_LOWER}+{_ENDING}?|{_START}{_UPPER}+{_LOWER}*{_ENDING}?"
    r"|\p{N}{1,3}" + _REST_SLASH
)
_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "mellum"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "minerva-7b"),
        (r"\p{N}", _GPT2),
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), (_LLAMA3,)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
"""``tokenizer.ggml.pre`` -> expressions; each cuts its matches out of what the one before left."""
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken"}
"""Values of ``pre`` for which a word that is a token is not merged from its parts."""


def load_gguf(source: Path) -> tuple[Transformer, JsonTokenizer]:
    """Import a .gguf file of the architecture "llama"; as :func:`bitnet.export.hf.load_hf`."""
    check_file(source)
    reader = _reader(source)
    keys = _Keys(source, reader)
    shape = _shape(keys)
    stored = _stored(source, reader, shape)
    check_tensors(source, shape, stored)
    tokenizer = _tokenizer(keys)
    return build(source, shape, stored, tokenizer), tokenizer


def _reader(source: Path) -> Any:
    """gguf's reader of the file. It trusts the file's counts, so they are checked as it reads."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            f'{source}: reading GGUF needs the hf extra: pip install "bitnet-train[hf]"'
        ) from error

    class Checked(GGUFReader):
        reads = 0

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            found = super()._get(offset, dtype, count, override_order)
            self.reads += 1
            if len(found) != int(count):
                raise ValueError("the file ends before what its header promises")
            if self.reads > _MAX_READS:
                raise ValueError("its metadata has too many items")
            return found

    with user_input(f"{source}: not a GGUF file, or a damaged one"):
        reader = Checked(source)
        if reader.byte_order != "I":
            raise ValueError("its numbers are of the other byte order")
        end = 0
        for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.field.parts[-1][0])):
            begin = int(tensor.field.parts[-1][0])
            if begin < end or begin % int(reader.alignment):
                raise ValueError(f"tensor {tensor.name} begins inside of another")
            if math.prod(map(int, tensor.shape)) != tensor.n_elements:
                raise ValueError(f"tensor {tensor.name} has an impossible shape")
            end = begin + tensor.n_bytes
    return reader


class _Keys:
    """The file's metadata as Python values; a wrong kind is an error that names the key."""

    def __init__(self, source: Path, reader: Any) -> None:
        self.source = source
        self._fields = reader.fields

    def __iter__(self) -> Any:
        return iter(self._fields)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key, which must be of the kind (list: an array)."""
        if key not in self._fields:
            return default
        with user_input(f"{self.source}: {key}: cannot be read"):
            value = self._fields[key].contents()
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and kind in (int, float)):
            raise UserError(f"{self.source}: {key}: cannot be read: expected {kind.__name__}")
        return value

    def need(self, key: str, kind: type) -> Any:
        """As :meth:`get`. Raises UserError if the key is missing."""
        if key not in self._fields:
            raise UserError(f"{self.source}: has no {key}")
        return self.get(key, kind)

    def size(self, key: str, default: Any = None) -> Any:
        """A positive integer."""
        value = self.get(key, int, default) if default is not None else self.need(key, int)
        if not 0 < value < 2**40:
            raise UserError(f"{self.source}: {key}: cannot be read: is {value}, expected 1 or more")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self.need(key, float) if default is None else self.get(key, float, default)
        if not 0 < value < math.inf:
            raise UserError(f"{self.source}: {key}: cannot be read: is {value}, expected above 0")
        return float(value)


def _shape(keys: _Keys) -> Shape:
    """The model's sizes. Raises UserError for what our model cannot have."""
    source = keys.source
    kind = keys.get("general.type", str, "model")
    if kind != "model":
        raise UserError(f"{source}: is a GGUF of type {kind!r}, not a model; it is not imported")
    if keys.get("split.count", int, 1) > 1:
        raise UserError(f"{source}: is one part of several; join them first (llama-gguf-split)")
    arch = keys.need("general.architecture", str)
    if arch != "llama":
        raise UserError(
            f"{source}: model_type {arch!r} cannot be imported; the only supported architecture of "
            "a GGUF is 'llama'"
        )
    context = keys.size("llama.context_length")
    d_model, heads = keys.size("llama.embedding_length"), keys.size("llama.attention.head_count")
    kv_heads = keys.size("llama.attention.head_count_kv", heads)
    refused = {
        f"heads of another size ({heads} in an embedding_length of {d_model})": d_model % heads,
        f"{kv_heads} key-value heads for {heads} heads": heads % kv_heads,
    }
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        size = keys.get(f"llama.{key}", int, d_model // heads)
        refused[f"llama.{key} = {size} ({heads} heads in {d_model} channels)"] = (
            size * heads != d_model
        )
    window = keys.get("llama.attention.sliding_window", int, 0)
    refused[f"llama.attention.sliding_window = {window}"] = 0 < window < context
    for key in keys:
        name = key.removeprefix("llama.")
        if name == key or name in _READ:
            continue
        value = keys.get(key, object)
        scaled = ", scaled rotary positions are not supported" if "rope.scal" in name else ""
        shown = repr(value) if len(repr(value)) < 40 else "..."
        neutral = name in _NEUTRAL and value == _NEUTRAL[name]
        refused[f"{key} = {shown}{scaled}"] = not neutral
    for what, present in refused.items():
        if present:
            raise UserError(f"{source}: the model has {what}, which our model does not have")
    vocab = len(keys.need("tokenizer.ggml.tokens", list))
    return Shape(
        n_layers=keys.size("llama.block_count"),
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_ff=keys.size("llama.feed_forward_length"),
        vocab_size=keys.size("llama.vocab_size", vocab),
        max_seq_len=context,
        rope_theta=keys.real("llama.rope.freq_base", 10_000.0),
        norm_eps=keys.real("llama.attention.layer_norm_rms_epsilon"),
        tied=True,
    )


def _stored(source: Path, reader: Any, shape: Shape) -> dict[str, Stored]:
    """Every tensor of the file, under our names; unknown ones under their own."""
    stored = {}
    for tensor in reader.tensors:
        name, kind = str(tensor.name), tensor.tensor_type.name
        if name.endswith(".bias"):
            raise UserError(f"{source}: has biases ({name}), which our model does not have")
        if name.startswith("rope_freqs") or ".rope_freqs" in name:
            raise UserError(f"{source}: has {name}: scaled rotary positions are not supported")
        if kind in ("I8", "I16", "I32", "I64"):
            raise UserError(f"{source}: tensor {name} is {kind}; expected a float weight")
        ours = _NAMES.get(name, name)
        block, _, rest = name.removeprefix("blk.").partition(".")
        part = LAYER_NAMES.get(rest.removesuffix(".weight"))
        if name.startswith("blk.") and rest.endswith(".weight") and part and _is_number(block):
            ours = f"layers.{block}.{part}.weight"
        interleaved = {"attn_q.weight": shape.n_heads, "attn_k.weight": shape.n_kv_heads}
        heads = interleaved.get(rest, 0) if ours != name else 0
        dims = tuple(int(n) for n in reversed(tensor.shape.tolist()))
        stored[ours] = Stored(name, dims, partial(_read, tensor, heads))
    return stored


def _is_number(text: str) -> bool:
    """Whether a text is a layer's number: no sign, no leading zero."""
    return text.isascii() and text.isdecimal() and (text == "0" or text[0] != "0")


def _read(tensor: Any, heads: int, rows: int) -> Tensor:
    from gguf.quants import dequantize

    values = torch.from_numpy(dequantize(tensor.data[:rows], tensor.tensor_type).copy())
    if heads:  # llama.cpp's order of a head's rows, 0, E/2, 1, E/2 + 1, ..., put back
        values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
    return values


def _tokenizer(keys: _Keys) -> JsonTokenizer:
    """The file's tokenizer as a tokenizer.json."""
    source = keys.source
    model = keys.need("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise UserError(f"{source}: its tokenizer is {model!r}; only byte-level BPE is supported")
    pre = keys.get("tokenizer.ggml.pre", str, "gpt-2")
    if pre not in _SPLITS:
        raise UserError(
            f"{source}: tokenizer.ggml.pre = {pre[:60]!r}: how it splits text is not known here; "
            f"the nearest known is {nearest(pre, _SPLITS, 0)!r} (of {', '.join(_SPLITS)})"
        )
    tokens = _strings(keys, "tokenizer.ggml.tokens")
    merges = [merge.split(" ") for merge in _strings(keys, "tokenizer.ggml.merges")]
    kinds = keys.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise UserError(f"{source}: tokenizer.ggml.token_type: not as many as there are tokens")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{source}: tokenizer.ggml.tokens: has a token twice")
    ends = _end_tokens(keys, tokens, kinds)
    content = _tokenizer_json(pre, tokens, kinds, merges)
    with user_input(f"{source}: tokenizer: cannot be read"):
        model_bytes = json.dumps(content).encode()
        if ends:
            model_bytes = with_eos(model_bytes, ends[0], ends)
    tokenizer = JsonTokenizer(source, model_bytes)
    tokenizer.chat_template = _chat_template(keys, tokens)
    return tokenizer


def _chat_template(keys: _Keys, tokens: list[str]) -> ChatTemplate | None:
    """The file's chat template, if it has one, with the texts of its special tokens."""
    template = keys.get("tokenizer.chat_template", str, "")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: keys.get(f"tokenizer.ggml.{kind}_token_id", int) for name, kind in names.items()}
    texts = {n: tokens[i] for n, i in ids.items() if i is not None and 0 <= i < len(tokens)}
    return template_of(keys.source, template, texts) if template else None


def _end_tokens(keys: _Keys, tokens: list[str], kinds: list[Any]) -> list[str]:
    """The tokens that end a text, each once."""
    ends: dict[str, None] = {}
    for name in ("eos", "eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        end = keys.get(key, int)
        if end is None:
            continue
        if not (0 <= end < len(tokens) and kinds[end] in (_CONTROL, _USER_DEFINED)):
            raise UserError(
                f"{keys.source}: {key} = {end} is none of its control tokens: they do not belong "
                "together"
            )
        ends[tokens[end]] = None
    return list(ends)


def _tokenizer_json(
    pre: str, tokens: list[str], kinds: list[Any], merges: list[list[str]]
) -> dict[str, Any]:
    """The content of a tokenizer.json of byte-level BPE; ``pre``: how it splits text."""
    marks = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    numbered = list(enumerate(zip(tokens, kinds, strict=True)))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": kind == _CONTROL, **added}
            for i, (token, kind) in numbered
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*map(_split, _SPLITS[pre]), {"type": "ByteLevel", **marks}],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **marks},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS,
            "vocab": {token: i for i, (token, kind) in numbered if kind != _UNUSED},
            "merges": merges,
        },
    }


def _split(regex: str) -> dict[str, Any]:
    pattern = {"Regex": regex}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _strings(keys: _Keys, key: str) -> list[str]:
    values: list[str] = keys.need(key, list)
    if not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{keys.source}: {key}: cannot be read: expected an array of strings")
    return values
