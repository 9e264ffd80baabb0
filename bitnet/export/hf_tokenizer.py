"""Write a tokenizer as Hugging Face's files, with the same ids as here.

Our tokenizer.json is written with one change: as in :func:`encode_prompt`, the end-of-document
token is put *before* a text, not after it. A sentencepiece model is written as a tokenizer.json
too, because different versions of transformers read a bare tokenizer.model differently and give
other ids:

    text -> "▁" before it, "▁" for each space -> BPE with byte fallback -> ids

sentencepiece joins two neighbours if the result is a piece, best score first. tokenizers needs each
pair of parts in a list of merges, so every way to cut a piece into two pieces is a merge, in the
order of the scores. :func:`save_tokenizer` does not assume that both give the same ids: it compares
them on probes, and raises if they differ.

A special token's name in a text is text here, as in training (``split_special_tokens``). In a model
with a chat template it is the token: transformers renders a chat to one text and encodes that. Only
a literal U+2581, sentencepiece's mark for a space, becomes a space in transformers, and bytes here.
tokenizer.model is written too: :func:`bitnet.export.hf.load_hf` makes our tokenizer from it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from bitnet.data.tokenizer import Tokenizer
from bitnet.data.tokenizer_json import JsonTokenizer, with_eos
from bitnet.export.hf_config import check_keys, read_json
from bitnet.schema import UserError, read_file, user_input

PROBES = (
    "to be or not",
    " two  three   spaces  ",
    "a\nb\n\n\nc\r\n",
    "\tif x:\n\t\treturn  1\n        pass",
    "naïve café, 你好, привет, e\u0301",
    "emoji 😀👩‍👩‍👧 \U0001fae0",
    "\0\x01\x7f\ufffd\U0010ffff",
    "<s></s><unk><0x0A><|endoftext|>",
    "1234567890 3.14 0x1f",
    "------====....    ......aaaaaaa",
    "",
    " ",
    "\n",
)
"""Texts to compare two tokenizers on."""
_SPACE = "\u2581"


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder; also tokenizer.model and
    chat_template.jinja if the tokenizer has them.

    Raises:
        UserError: the files would give other ids (named); or the `hf` extra is missing.
    """
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise UserError(
            'writing a tokenizer.json needs the hf extra: pip install "bitnet-train[hf]"'
        ) from error
    with user_input(f"{tokenizer.path}: cannot be written as a tokenizer.json"):
        eos, content = _content(tokenizer)
        content["post_processor"] = _eos_before(eos, tokenizer.eos_id)
        text = json.dumps(content, ensure_ascii=False)
        backend = Backend.from_str(text)
        backend.encode_special_tokens = True
    for probe in probes(tokenizer):
        ids = backend.encode(probe, add_special_tokens=False).ids
        if ids != (ours := tokenizer.encode(probe)):
            raise UserError(
                f"{tokenizer.path}: has no tokenizer.json with its ids: {probe!r} is {ours}, and "
                f"would be {ids} (only sentencepiece models of type bpe, and byte-level BPE, have)"
            )
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if not isinstance(tokenizer, JsonTokenizer):
        (folder / tokenizer.file_name).write_bytes(tokenizer.model_bytes)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # it takes tokenizer.json unchanged
        **_special_tokens(tokenizer, eos),
        "split_special_tokens": tokenizer.chat_template is None,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": 10**30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    if tokenizer.chat_template is not None:
        source = tokenizer.chat_template.source.encode()  # bytes keep its own line ends
        (folder / "chat_template.jinja").write_bytes(source)


def _special_tokens(tokenizer: Tokenizer, eos: str) -> dict[str, str | None]:
    """The tokens that transformers knows by name, and passes to a chat template by that name.

    Raises:
        UserError: the template has a token that the vocabulary lacks; transformers would add it
            with an id that the model does not have.
    """
    if (template := tokenizer.chat_template) is None:
        return {"bos_token": eos, "eos_token": eos, "pad_token": eos}
    for name, token in template.tokens.items():
        if token not in tokenizer.specials:
            raise UserError(
                f"{tokenizer.path}: its chat template has the {name} {token!r}, which is no "
                "special token of the vocabulary"
            )
    return {"bos_token": None, "eos_token": eos, "pad_token": eos, **template.tokens}


def probes(tokenizer: Tokenizer) -> Iterator[str]:
    """:data:`PROBES`, without characters whose bytes the vocabulary lacks."""
    for probe in PROBES:
        try:
            tokenizer.encode(probe)
        except UserError:
            continue
        yield probe


def load_hf_tokenizer(source: Path) -> Tokenizer:
    """The checkpoint's tokenizer: tokenizer.model, if that is sentencepiece's, or tokenizer.json.

    Its end tokens must be those of config.json and generation_config.json, which are written into a
    tokenizer.json. The first end token of config.json ends a document in training.

    Qwen's tokenizer.json first converts a text to Unicode's normal form C, which loses the original
    text. Here it does not: text in any other form gets other ids, and is not changed."""
    ends, first = _ends(source)
    path = source / "tokenizer.model"
    if path.is_file() and read_file(path).startswith(b"\n"):
        return _load_sentencepiece(source, path, set(ends))
    path = source / "tokenizer.json"
    model_bytes = read_file(path)
    with user_input(f"{path}: not a tokenizer.json, or a damaged one"):
        model_bytes = _without_nfc(model_bytes)
        added = {token["id"]: token["content"] for token in json.loads(model_bytes)["added_tokens"]}
    for end in ends:
        if end not in added:
            raise UserError(
                f"{source}: its eos_token_id {end} is none of the tokenizer's added tokens: "
                "they do not belong together"
            )
    if ends:
        with user_input(f"{path}: not a tokenizer.json, or a damaged one"):
            if first is None:
                first = JsonTokenizer(path, model_bytes).eos_id
            model_bytes = with_eos(model_bytes, added[first], [added[end] for end in ends])
    tokenizer = JsonTokenizer(path, model_bytes)
    if ends and {first, *ends} != set(tokenizer.eos_ids):  # the library numbers without gaps
        raise UserError(
            f"{source}: its eos_token_id {ends} cannot be had: the tokenizer gives its added "
            "tokens other ids than the file says"
        )
    return tokenizer


def _without_nfc(model_bytes: bytes) -> bytes:
    content = json.loads(model_bytes)
    if content.get("normalizer") != {"type": "NFC"}:
        return model_bytes
    return json.dumps(content | {"normalizer": None}, ensure_ascii=False).encode()


def _ends(source: Path) -> tuple[list[int], int | None]:
    """The tokens that end a text, without duplicates; and the first one of config.json, or None."""
    ends: dict[int, None] = {}
    first: int | None = None
    for name in ("config.json", "generation_config.json"):
        if not (source / name).is_file():
            continue
        content = read_json(source / name)
        check_keys(source / name, {"eos_token_id": content.get("eos_token_id")})
        eos = content.get("eos_token_id")
        for end in eos if isinstance(eos, list) else [] if eos is None else [eos]:
            ends[end] = None
            first = end if first is None and name == "config.json" else first
    return list(ends), first


def _load_sentencepiece(source: Path, path: Path, ends: set[int]) -> Tokenizer:
    tokenizer = Tokenizer(path)
    if ends - {tokenizer.eos_id}:
        raise UserError(
            f"{source}: its eos_token_id {sorted(ends)} is not the end-of-sentence token of "
            f"tokenizer.model, {tokenizer.eos_id}"
        )
    if (source / "tokenizer.json").is_file():
        with user_input(f"{source / 'tokenizer.json'}: not a tokenizer.json, or a damaged one"):
            added = read_json(source / "tokenizer.json").get("added_tokens") or []
            more = [token["content"] for token in added if token["id"] >= tokenizer.vocab_size]
        if more:
            raise UserError(
                f"{source}: tokenizer.json adds {more[0]!r} to the tokens of tokenizer.model, "
                "which our sentencepiece tokenizer cannot have"
            )
    return tokenizer


def _content(tokenizer: Tokenizer) -> tuple[str, dict[str, Any]]:
    """The end-of-document token, and the content of a tokenizer.json."""
    if isinstance(tokenizer, JsonTokenizer):
        content = json.loads(tokenizer.model_bytes)
        names = {token["id"]: token["content"] for token in content["added_tokens"]}
        return names[tokenizer.eos_id], content
    pieces = SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    return pieces.id_to_piece(tokenizer.eos_id), _sentencepiece(pieces)


def _eos_before(eos: str, eos_id: int) -> dict[str, Any]:
    """The post-processor that puts the end-of-document token before a text."""
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [end, first],
        "pair": [end, first, end, second],
        "special_tokens": {eos: {"id": eos, "ids": [eos_id], "tokens": [eos]}},
    }


def _sentencepiece(pieces: SentencePieceProcessor) -> dict[str, Any]:
    """The content of the tokenizer.json for a sentencepiece model of type bpe."""
    numbers = range(pieces.get_piece_size())
    vocab = {pieces.id_to_piece(i): i for i in numbers}
    special = [i for i in numbers if pieces.is_control(i) or pieces.is_unknown(i)]
    fixed = {*special, *(i for i in numbers if pieces.is_byte(i) or pieces.is_unused(i))}
    ordinary = {piece: i for piece, i in vocab.items() if i not in fixed}
    ranked = sorted(ordinary, key=lambda piece: (-pieces.get_score(ordinary[piece]), vocab[piece]))
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in ordinary and piece[cut:] in ordinary
    ]
    prefix = pieces.encode("a", out_type=str)[0].startswith(_SPACE)
    spaces: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    ]
    undo: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        spaces.insert(0, {"type": "Prepend", "prepend": _SPACE})
        undo.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": pieces.id_to_piece(i), "special": True, **flags} for i in special
        ],
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": undo},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces.id_to_piece(pieces.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
