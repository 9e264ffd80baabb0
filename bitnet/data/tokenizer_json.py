"""The second kind of tokenizer: byte-level BPE as a Hugging Face tokenizer.json.

Imported models have it (SmolLM2, Llama 3). Its vocabulary is made of *bytes*, each written as one
printable character (GPT-2's alphabet: " " is "Ġ"), so a token's length in characters is its length
in bytes. Further requirements:

- *No loss.* A normalizer (NFC, lower case), a prefixed space or a splitter that removes its
  separators changes the scored text. A few probes cannot find them all, so the file may hold only
  parts known to lose nothing (:func:`_unfit`). The probes, as for sentencepiece, check the rest.
  The library silently drops a byte that is not a token (SmolLM2's vocabulary lacks six control
  characters and the rare planes of Unicode), so encoding rejects a text with such a byte.
- *One encoding.* BPE with dropout gives a different encoding in each call, and is rejected.
- *No specials from text.* A literal "<|im_end|>" in a text is encoded as those bytes, not as the
  control token: a document must not be able to end itself. A special token that merges can produce
  is rejected, since ordinary text would become it.
- *An end-of-document token*, for which the format has no field. It is the token that the file's
  post-processor puts after a text, else the first of the usual names. :func:`with_eos` writes the
  first form. A chat model has several tokens that end a text (Llama 3's <|eot_id|>): the
  post-processor's template lists the others without placing them.

The `hf` extra installs the `tokenizers` package that runs it.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.data.tokenizer import Tokenizer, check_text, read_model
from bitnet.schema import UserError, user_input

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
"""The names that a folder's tokenizer may have."""
_SPLITTERS = ("ByteLevel", "Split", "Digits", "Punctuation")
"""Pre-tokenizers that only cut, unless their options add or remove something."""
_MAX_IDS = 2**24
"""Largest number of ids that a model may have."""
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")


def load_tokenizer(path: Path | str) -> Tokenizer:
    """A tokenizer of either kind, told apart by the file's content.

    Raises:
        UserError: the file is missing, damaged, neither kind, or a tokenizer that loses text.
    """
    path = Path(path)
    if path.suffix == ".json" or read_model(path).lstrip()[:1] == b"{":
        return JsonTokenizer(path)
    return Tokenizer(path)


def tokenizer_path(folder: Path) -> Path:
    """The path of a folder's tokenizer; if it has none, the path where one should be."""
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return found[0] if found else folder / TOKENIZER_FILES[0]


class JsonTokenizer(Tokenizer):
    """A byte-level BPE tokenizer.json with the interface of ``bitnet.data.tokenizer.Tokenizer``.

    Arguments:
        path: the file. With ``model_bytes`` it need not exist, and is only named in errors.
        model_bytes: the file's contents; None = read them.
    Raises:
        UserError: the file is missing, damaged, not byte-level BPE, loses text or has no
            end-of-document token; or the `hf` extra is not installed.
    """

    file_name = "tokenizer.json"
    _advice = "look at its added tokens, which may strip the spaces beside them (lstrip, rstrip)"

    def __init__(self, path: Path | str, model_bytes: bytes | None = None) -> None:
        self.path = Path(path)
        self.model_bytes = read_model(self.path) if model_bytes is None else model_bytes
        with user_input(f"{self.path}: not a tokenizer.json, or a damaged one"):
            self._load()

    def _load(self) -> None:
        self._backend = _backend(self.path, self.model_bytes)
        pieces: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(pieces.values(), default=-1) + 1
        specials = {
            token.content: number
            for number, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        }
        eos_id = self._eos(specials)
        if eos_id is None:
            raise UserError(
                f"{self.path}: the tokenizer has no end-of-document token: neither one that its "
                f"post_processor appends nor a special one of {', '.join(_EOS_NAMES)}"
            )
        self.eos_id = eos_id
        listed = _listed(self.model_bytes)
        ends = [number for name, number in specials.items() if name in listed]
        self.eos_ids = (eos_id, *sorted(set(ends) - {eos_id}))
        self._pieces = pieces
        self.specials = specials
        ordinary = self._backend.get_vocab(with_added_tokens=False)
        self._bytes = bytes(b for b, mark in _byte_marks().items() if mark in ordinary)
        self._check_lossless([f" {name} " for name in self._ordinary_added()])

    def _ordinary_added(self) -> list[str]:
        """Added tokens that are not special: text can encode to them, and they may strip spaces."""
        added = self._backend.get_added_tokens_decoder().values()
        return [token.content for token in added if not token.special]

    def _eos(self, specials: dict[str, int]) -> int | None:
        bare = self._backend.encode("a", add_special_tokens=False).ids
        dressed = self._backend.encode("a").ids
        if len(dressed) > len(bare) and dressed[-1] in specials.values():
            return dressed[-1]
        return next((specials[name] for name in _EOS_NAMES if name in specials), None)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int64 ``[V]``: number of UTF-8 bytes of each id; 0 for special and unused ids."""
        alphabet, specials = set(_byte_marks().values()), set(self.specials.values())
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, token in self._pieces.items():
            if token not in specials:
                # as in the decoder: a piece with any foreign character is literal text
                mapped = alphabet.issuperset(piece)
                sizes[token] = len(piece) if mapped else len(piece.encode())
        return sizes

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """:meth:`encode` of each text, in parallel.

        Arguments:
            texts: B strings.
            threads: 1 = one after the other; for any other number the library uses its one pool,
                of one thread per core (or RAYON_NUM_THREADS).
        Raises:
            UserError: a lone surrogate, or a byte that the vocabulary lacks.
        """
        for text in texts:
            check_text(text)
            self._check_bytes(text)
        with user_input(f"{self.path}: the text cannot be encoded"):  # a costly regex may panic
            if threads == 1:
                return [self._backend.encode(text, add_special_tokens=False).ids for text in texts]
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encoded]

    def _check_bytes(self, text: str) -> None:
        if lacking := text.encode().translate(None, self._bytes):
            place, character = next(
                (i, c) for i, c in enumerate(text) if c.encode().translate(None, self._bytes)
            )
            raise UserError(
                f"text: character {place} ({character!r}) cannot be encoded: {self.path} has no "
                f"token for the byte 0x{lacking[0]:02x}; take it out of the text"
            )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some ids, without special tokens; bytes that are not UTF-8 become U+FFFD.

        Raises:
            IndexError: an id outside ``range(V)``.
        """
        ids = list(tokens)
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            raise IndexError(f"token ids {min(ids)} to {max(ids)}; there are {self.vocab_size}")
        return self._backend.decode(ids, skip_special_tokens=True)


def with_eos(model_bytes: bytes, eos: str, ends: Sequence[str] = ()) -> bytes:
    """Change the post-processor of a tokenizer.json so that it puts the special token ``eos`` after
    a text and does nothing else. :class:`JsonTokenizer` looks for this form first.

    Arguments:
        ends: all tokens that end a generated text, with or without ``eos``.
    Raises:
        ValueError: not a tokenizer.json, or one without such a token.
    """
    content = json.loads(model_bytes)
    added: list[dict[str, Any]] = content["added_tokens"]
    listed = {}
    for name in (eos, *ends):
        token = next((token for token in added if token["content"] == name), None)
        if token is None:
            raise ValueError(f"eos: the tokenizer has no added token {name!r}")
        token["special"] = True
        listed[name] = {"id": name, "ids": [token["id"]], "tokens": [name]}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, end],
        "pair": [first, end, second, end],
        "special_tokens": listed,
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _listed(model_bytes: bytes) -> set[str]:
    """Special tokens that the post-processor's template lists but places nowhere."""
    template = json.loads(model_bytes).get("post_processor") or {}
    if template.get("type") != "TemplateProcessing":
        return set()
    steps = [step for key in ("single", "pair") for step in template[key]]
    placed = {step["SpecialToken"]["id"] for step in steps if "SpecialToken" in step}
    return set(template["special_tokens"]) - placed


def _backend(path: Path, model_bytes: bytes) -> Any:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise UserError(
            f'{path}: a tokenizer.json needs the hf extra: pip install "bitnet-train[hf]"'
        ) from error
    try:
        affix = _affix(json.loads(model_bytes))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a tokenizer.json, or a damaged one: {error}") from error
    if affix:  # the library panics if the vocabulary was not made with it
        raise UserError(f"{path}: has {affix}; only byte-level BPE is supported")
    try:
        backend = Backend.from_str(model_bytes.decode("utf-8"))
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= _MAX_IDS:  # before to_str, which makes an entry per id
            raise UserError(
                f"{path}: has a token of id {largest:,}; at most {_MAX_IDS:,} ids are supported"
            )
        content = json.loads(backend.to_str())  # with every default written out
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # the library's panics are not even an Exception
        raise UserError(f"{path}: not a tokenizer.json, or a damaged one: {error}") from error
    decoders = [step["type"] for step in _steps(content["decoder"], "decoders")]
    if content["model"]["type"] != "BPE" or decoders != ["ByteLevel"]:
        raise UserError(
            f"{path}: is a {content['model']['type']} tokenizer with decoder "
            f"{' + '.join(decoders) or 'none'}; only byte-level BPE is supported"
        )
    if problem := _unfit(content, backend):
        raise UserError(f"{path}: {problem}")
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _affix(content: Any) -> str:
    """The name of the setting that marks word parts (other kinds of BPE, WordPiece); "" if none."""
    model = content.get("model") if isinstance(content, dict) else None
    names = ("continuing_subword_prefix", "end_of_word_suffix")
    return next((n for n in names if isinstance(model, dict) and model.get(n)), "")


def _unfit(content: dict[str, Any], backend: Any) -> str | None:
    """Say why a byte-level BPE tokenizer loses text, or gives a text several encodings; None if it
    does neither. ``content`` is tokenizer.json as the library writes it."""
    for step in _steps(content["normalizer"], "normalizers"):
        return f"its normalizer {step['type']} changes the text"
    splitters = _steps(content["pre_tokenizer"], "pretokenizers")
    for step in splitters:
        kind = step["type"]
        if kind not in _SPLITTERS or step.get("behavior") == "Removed":
            return f"its pre_tokenizer {kind} may remove text; expected {', '.join(_SPLITTERS)}"
        if step.get("add_prefix_space"):
            return "its pre_tokenizer adds a space to the text (add_prefix_space)"
    if [step["type"] for step in splitters].count("ByteLevel") != 1:
        return "its pre_tokenizer is not byte-level: it has not exactly one ByteLevel"
    model = content["model"]
    if model["dropout"]:
        return f"its BPE has dropout {model['dropout']}: a text would have a new encoding each time"
    made = {first + second for first, second in model["merges"]}
    for token in content["added_tokens"]:
        piece = token["content"]
        known = len(piece) == 1 or (model["ignore_merges"] and _is_word(piece, backend))
        if token["special"] and (piece in made or (known and piece in model["vocab"])):
            return f"a text could become its special token {piece!r}, which BPE has as a piece too"
    return None


def _is_word(piece: str, backend: Any) -> bool:
    """Whether the pre-tokenizer keeps a piece's text as one word, alone or inside another text."""
    bytes_of = {mark: byte for byte, mark in _byte_marks().items()}
    text = bytes(bytes_of.get(mark, 0) for mark in piece).decode(errors="replace")
    around = (text, f" {text} ", f"a{text}a")
    return any(
        word == piece for one in around for word, _ in backend.pre_tokenizer.pre_tokenize_str(one)
    )


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a Sequence in order, including nested ones; any other part alone."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[key] for step in _steps(inner, key)]


def _byte_marks() -> dict[int, str]:
    """GPT-2's alphabet: printable bytes of Latin-1 map to themselves; the other bytes, in order, to
    the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + i) for i, byte in enumerate(others)
    }
