"""A tokenizer as the vocabulary of a GGUF file, and back.

    ours                       tokenizer.ggml.model    how llama.cpp splits a text
    sentencepiece BPE          llama                   merges by the scores of the pieces
    tokenizer.json, bytes      gpt2                    by ``tokenizer.ggml.pre``, then by merges

A sentencepiece vocabulary is its pieces, their scores and kinds, and whether a space is put before
a text. sentencepiece and llama.cpp then give the same ids, with two exceptions in llama.cpp: a
literal U+2581 becomes a space, and a text that spells a control token, such as "</s>", may become
that token.

A byte-level vocabulary is its tokens, its merges and the name of the way to split text before
merging. llama.cpp has a regular expression for each name. _SPLITS lists the names known here; any
other name, or way to split, is an error. A file without the key was made before April 2024, when
llama.cpp split all such texts as GPT-2 does.

The token that begins a text is our end-of-document token: it precedes every document in training,
and :func:`bitnet.generate.encode_prompt` puts it before a prompt. A chat template is written too;
if it uses another token at the beginning, that token begins a text.

Source of names and expressions: llama.cpp, src/llama-vocab.cpp, and the models' tokenizer.json.
"""

import json
import math
from pathlib import Path
from typing import Any

from bitnet.data.chat_template import ChatTemplate, template_of
from bitnet.data.sentencepiece_file import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Piece,
    make_model,
    read_pieces,
)
from bitnet.data.tokenizer import Tokenizer
from bitnet.data.tokenizer_json import JsonTokenizer, with_eos
from bitnet.export.gguf_file import Keys
from bitnet.schema import UserError, nearest, user_input

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
"""``tokenizer.ggml.pre`` -> expressions; each cuts its matches out of the rest left by earlier
ones."""
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken"}
"""Values of ``pre`` for which a word that is a token is not merged from its parts."""
_ASKED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Name by which a chat template uses a token's text -> the token's kind in a file."""


def read_tokenizer(keys: Keys) -> Tokenizer:
    """The tokenizer of a file.

    Raises:
        UserError: it has none, or one that would split text differently here.
    """
    model = keys.need("tokenizer.ggml.model", str)
    kinds = {"llama": _sentencepiece, "gpt2": _byte_level}
    if model not in kinds:
        raise UserError(
            f"{keys.source}: its tokenizer is {model[:60]!r}; only 'llama' (sentencepiece) and "
            "'gpt2' (byte-level BPE) are supported"
        )
    tokenizer = kinds[model](keys)
    tokenizer.chat_template = _chat_template(keys)
    return tokenizer


def _chat_template(keys: Keys) -> ChatTemplate | None:
    """The file's chat template, if it has one, with the texts of its special tokens."""
    template = keys.get("tokenizer.chat_template", str, "")
    tokens = _strings(keys, "tokenizer.ggml.tokens")
    ids = {name: keys.get(f"tokenizer.ggml.{kind}_token_id", int) for name, kind in _ASKED.items()}
    texts = {n: tokens[i] for n, i in ids.items() if i is not None and 0 <= i < len(tokens)}
    return template_of(keys.source, template, texts) if template else None


def _sentencepiece(keys: Keys) -> Tokenizer:
    """The file's vocabulary as a sentencepiece model."""
    source = keys.source
    for key in ("remove_extra_whitespaces", "treat_whitespace_as_suffix"):
        if keys.get(f"tokenizer.ggml.{key}", bool, False):
            raise UserError(f"{source}: has tokenizer.ggml.{key} = true, which changes the text")
    if "tokenizer.ggml.precompiled_charsmap" in keys:
        raise UserError(f"{source}: its tokenizer normalizes text, which loses some of it")
    texts = _strings(keys, "tokenizer.ggml.tokens")
    scores = keys.need("tokenizer.ggml.scores", list)
    kinds = keys.need("tokenizer.ggml.token_type", list)
    for key, values in (("scores", scores), ("token_type", kinds)):
        if len(values) != len(texts):
            raise UserError(f"{source}: tokenizer.ggml.{key}: not as many as there are tokens")
    if not all(isinstance(score, float) and math.isfinite(score) for score in scores):
        raise UserError(f"{source}: tokenizer.ggml.scores: cannot be read: expected finite numbers")
    if not all(isinstance(kind, int) and NORMAL <= kind <= 6 for kind in kinds):
        raise UserError(f"{source}: tokenizer.ggml.token_type: cannot be read: expected 1 to 6")
    ends = _end_tokens(keys, texts, kinds)
    if not ends:
        raise UserError(f"{source}: has no tokenizer.ggml.eos_token_id")
    pieces = [Piece(*piece) for piece in zip(texts, scores, kinds, strict=True)]
    prefix = keys.get("tokenizer.ggml.add_space_prefix", bool, True)
    with user_input(f"{source}: tokenizer: cannot be read"):
        return Tokenizer(source, make_model(pieces, ends[0], prefix))


def write_tokenizer(writer: Any, tokenizer: Tokenizer, path: Path) -> None:
    """Add a tokenizer to the metadata of a file.

    Arguments:
        writer: gguf's. path: of the file, for messages.
    Raises:
        UserError: llama.cpp has no name for the way in which the tokenizer splits text.
    """
    if isinstance(tokenizer, JsonTokenizer):
        _write_byte_level(writer, tokenizer, path)
    else:
        pieces = read_pieces(tokenizer.model_bytes)
        writer.add_tokenizer_model("llama")
        writer.add_token_list([piece.text for piece in pieces])
        writer.add_token_scores([piece.score for piece in pieces])
        writer.add_token_types([piece.kind for piece in pieces])
        writer.add_add_space_prefix(tokenizer.prefixes_space)
        writer.add_bool("tokenizer.ggml.remove_extra_whitespaces", False)
    special = {"bos": tokenizer.eos_id, "eos": tokenizer.eos_id}
    if (template := tokenizer.chat_template) is not None:
        writer.add_chat_template(template.source)
        for name, kind in _ASKED.items():
            if (token := tokenizer.specials.get(template.tokens.get(name, ""))) is not None:
                special.setdefault(kind, token)
                if kind == "bos":  # the model was trained to answer with it in front
                    special[kind] = token
    for kind, token in special.items():
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", token)
    ends = (writer.add_eot_token_id, writer.add_eom_token_id)
    for add, end in zip(ends, tokenizer.eos_ids[1:], strict=False):
        add(end)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _write_byte_level(writer: Any, tokenizer: JsonTokenizer, path: Path) -> None:
    content = json.loads(tokenizer.model_bytes)
    model = content["model"]
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    kinds = [UNUSED] * tokenizer.vocab_size
    for text, i in model["vocab"].items():
        tokens[i], kinds[i] = text, NORMAL
    for token in content["added_tokens"]:
        i = token["id"]
        tokens[i], kinds[i] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if len(tokenizer.eos_ids) > 3:
        raise UserError(f"{path}: the tokenizer has {len(tokenizer.eos_ids)} ends; GGUF carries 3")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(content, path))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = model["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])


def _pre(content: dict[str, Any], path: Path) -> str:
    """The name of the way in which a tokenizer.json splits text."""
    step = content.get("pre_tokenizer") or {"type": "Sequence", "pretokenizers": []}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    splits = tuple(split for step in steps if (split := _expression(step)) is not None)
    whole = bool(content["model"].get("ignore_merges", False))
    for name, expressions in _SPLITS.items():
        if expressions == splits and (name in _WHOLE_WORDS) == whole:
            return name
    raise UserError(
        f"{path}: GGUF has no name for the way in which the tokenizer splits text "
        f"({', '.join(_SPLITS)} are known)"
    )


def _expression(step: dict[str, Any]) -> str | None:
    """The regular expression by which a step cuts; None if it does not cut, "" if in another way"""
    if step["type"] == "ByteLevel":
        return _GPT2 if step.get("use_regex", True) else None
    if step["type"] == "Digits" and step.get("individual_digits"):
        return r"\p{N}"
    isolates = step.get("behavior") == "Isolated" and not step.get("invert")
    if step["type"] == "Split" and isolates:
        return str(step["pattern"].get("Regex", ""))
    return ""


def _byte_level(keys: Keys) -> JsonTokenizer:
    """The file's tokenizer as a tokenizer.json."""
    source = keys.source
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
    return JsonTokenizer(source, model_bytes)


def _end_tokens(keys: Keys, tokens: list[str], kinds: list[Any]) -> list[str]:
    """The tokens that end a text, without duplicates."""
    ends: dict[str, None] = {}
    for name in ("eos", "eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        end = keys.get(key, int)
        if end is None:
            continue
        if not (0 <= end < len(tokens) and kinds[end] in (CONTROL, USER_DEFINED)):
            raise UserError(
                f"{keys.source}: {key} = {end} is none of its control tokens: they do not belong "
                "together"
            )
        ends[tokens[end]] = None
    return list(ends)


def _tokenizer_json(
    pre: str, tokens: list[str], kinds: list[Any], merges: list[list[str]]
) -> dict[str, Any]:
    """The content of a tokenizer.json for byte-level BPE; ``pre``: the way to split text."""
    marks = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    numbered = list(enumerate(zip(tokens, kinds, strict=True)))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": kind == CONTROL, **added}
            for i, (token, kind) in numbered
            if kind in (CONTROL, USER_DEFINED)
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
            "vocab": {token: i for i, (token, kind) in numbered if kind != UNUSED},
            "merges": merges,
        },
    }


def _split(regex: str) -> dict[str, Any]:
    pattern = {"Regex": regex}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _strings(keys: Keys, key: str) -> list[str]:
    values: list[str] = keys.need(key, list)
    if not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{keys.source}: {key}: cannot be read: expected an array of strings")
    return values
