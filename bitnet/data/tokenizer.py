"""Text to token ids and back, byte for byte: sentencepiece BPE with byte fallback.

A language model is scored in bits per byte of the original text, so the tokenizer must lose
nothing: ``decode(encode(text)) == text`` for every str. So there is no normalization
(``identity``), no removal of whitespace, and a token for each of the 256 bytes, for characters
missing from the vocabulary. Loading checks this on a few hostile strings and rejects a lossy
sentencepiece model.

Properties of sentencepiece, and how this module handles them:

- *Dummy prefix.* sentencepiece puts a space before each text, so that a word has the same token at
  the start of a text as after a space. llama.cpp and Hugging Face expect it, so it is kept;
  ``decode`` removes it. The text does not have this byte: ``token_bytes`` of an encoded text add
  up to one more than its bytes. :meth:`Tokenizer.count_bytes` leaves it out.
- *U+2581 (lower one eighth block)* is sentencepiece's mark for a space, so a literal U+2581 would
  decode to a space. It gets its three byte tokens instead.
- *The trainer* skips a "sentence" that is long or holds U+2585, and puts the dummy prefix before
  each. So it gets whole documents, cut at such characters, without a length limit and without the
  prefix except at the start of a document. It then counts the strings that ``encode`` will see,
  including newlines and indentation. Training line by line, as is common, costs 5% more tokens on
  Python source, because ``):\\n`` or ``\\n\\n`` cannot become a token.
- *Threads.* The model file stores their number. It is reset, so that a file and its hash depend
  only on text and vocabulary size.

A space after another character always starts a new token (a piece has spaces only at its start, or
is all spaces). A text cut there has the same tokens as the whole text, so long texts are encoded in
segments, in parallel, in time linear in their length.

Files are patched by appending: in protobuf, the last value of a field counts.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from bitnet.data.chat_template import ChatTemplate, Message
from bitnet.data.tokenizer_training import train_model
from bitnet.durable import write_atomic
from bitnet.schema import UserError, nearest, read_file, user_input

_SPACE = "\u2581"
_SEGMENT = 4096
"""Number of characters after which a text is cut at the next possible place."""
_CUT = re.compile("(?<=[^ ]) ")
_UNTRAINABLE = re.compile("[\0\u2581\u2585]+")
_PREFIX_ON, _PREFIX_OFF = b"\x1a\x02\x18\x01", b"\x1a\x02\x18\x00"
"""ModelProto.normalizer_spec.add_dummy_prefix (fields 3 and 3) = true, false."""
_DEFAULT_THREADS = b"\x12\x03\x80\x01\x10"
"""ModelProto.trainer_spec.num_threads (fields 2 and 16) = 16."""
_PROBES = (
    "a",
    " a  b\n\n c\t\r\n",
    "\n",
    "\0",
    "é e\u0301 ﬁ \u3000 \U0001f600",
    "<s></s><unk><0x0A>",
    "\u2581",
)


class Tokenizer:
    """A lossless sentencepiece model with an end-of-document token.

    The other kind, a Hugging Face tokenizer.json, is a subclass with the same interface;
    :func:`bitnet.data.tokenizer_json.load_tokenizer` tells them apart.

    Arguments:
        path: the file. With ``model_bytes`` it need not exist, and is only named in errors.
        model_bytes: the file's contents; None = read them.
    Attributes:
        file_name: the name of the file in a model or data folder.
        path: the model file.
        model_bytes: its contents.
        vocab_size: number of ids, V.
        eos_id: the end-of-document token; ``encode`` never produces it.
        eos_ids: all tokens that end a generated text, ``eos_id`` first.
        specials: the control tokens, which text never encodes to: name -> id.
        chat_template: the chat template that the model was trained with; None if unknown.

    Raises:
        UserError: the file is missing, is not a sentencepiece model, has no end-of-sentence token,
            or does not decode every text to itself.
    """

    file_name = "tokenizer.model"
    chat_template: ChatTemplate | None = None
    _prefix = ""
    _advice = (
        "train it with byte_fallback, normalization_rule_name=identity, "
        "remove_extra_whitespaces=false"
    )

    def __init__(self, path: Path | str, model_bytes: bytes | None = None) -> None:
        self.path = Path(path)
        self.model_bytes = read_model(self.path) if model_bytes is None else model_bytes
        with user_input(f"{self.path}: not a sentencepiece model, or a damaged one"):
            self._load()

    def _load(self) -> None:
        self._decoder = _processor(self.path, self.model_bytes)
        self._encoder = _processor(self.path, self.model_bytes + _PREFIX_OFF)
        self.vocab_size: int = self._decoder.get_piece_size()
        self.eos_id: int = self._decoder.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{self.path}: the tokenizer has no end-of-sentence token (eos_id)")
        self.eos_ids: tuple[int, ...] = (self.eos_id,)
        control = filter(self._decoder.is_control, range(self.vocab_size))
        self.specials = {self._piece(token): token for token in control}
        first = self._decoder.encode("a")[:1]
        self._prefix = " " if first and self._piece(first[0]).startswith(_SPACE) else ""
        self._separable = not any(
            re.search(f"[^{_SPACE}]{_SPACE}", self._piece(i)) for i in range(self.vocab_size)
        )
        self._space_mark = [self._decoder.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]
        self._check_lossless()

    def _check_lossless(self, more: Sequence[str] = ()) -> None:
        for probe in (*_PROBES, *more):
            if (back := self.decode(self.encode(probe))) != probe:
                raise UserError(
                    f"{self.path}: the tokenizer turns {probe!r} into {back!r}; {self._advice}"
                )

    def special_id(self, name: str) -> int | None:
        """The id of a control token by its name, such as "</s>"; None if there is none."""
        return self.specials.get(name)

    def encode_chat(self, template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
        """The ids of a chat up to the assistant's next answer. The template's special tokens become
        these tokens; in a message, their names stay text.

        Raises:
            UserError: the template rejects the messages; a text that cannot be encoded.
        """
        parts = template.segments(messages, self.specials)
        return [
            token
            for part in parts
            for token in ([part] if isinstance(part, int) else self.encode(part))
        ]

    def _piece(self, token: int) -> str:
        return self._decoder.id_to_piece(token)

    @property
    def prefixes_space(self) -> bool:
        """Whether a space is put before each text (the dummy prefix)."""
        return bool(self._prefix)

    @cached_property
    def hash(self) -> str:
        """sha256 of the model file, in hex."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int64 ``[V]``: number of UTF-8 bytes of each id, 0 for control ids.

        They add up to the text's bytes plus one for the dummy prefix; see :meth:`count_bytes`.
        """
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token in range(self.vocab_size):
            if self._decoder.is_byte(token):
                sizes[token] = 1
            elif not (self._decoder.is_control(token) or self._decoder.is_unknown(token)):
                sizes[token] = len(self._piece(token).replace(_SPACE, " ").encode())
        return sizes

    def count_bytes(self, tokens: Any) -> int:
        """Exact number of UTF-8 bytes of text in ``tokens[1:]``.

        The dummy prefix is not a byte of the document. It is recognized by the end-of-document
        token before it, so put one first if a document begins:
        ``count_bytes([eos_id, *encode(text)]) == len(text.encode())``.

        Arguments:
            tokens: integers ``[T + 1]``, a sequence, array or CPU tensor.
        """
        ids = np.asarray(tokens)
        total = int(self.token_bytes[ids[1:]].sum())
        if self._prefix:
            total -= int(((ids[:-1] == self.eos_id) & (ids[1:] != self.eos_id)).sum())
        return total

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without end-of-document token; none for the empty text.

        Raises:
            UserError: the text holds a lone surrogate, which has no UTF-8.
        """
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """:meth:`encode` of each text, in parallel.

        Arguments:
            texts: B strings.
            threads: 0 = one per core.
        """
        split = [self._segments(text) for text in texts]
        flat = [part for parts in split for part in parts if part != _SPACE]
        encoded = iter(self._encoder.encode(flat, num_threads=threads or os.cpu_count() or 1))
        return [
            list(
                chain.from_iterable(
                    self._space_mark if part == _SPACE else next(encoded) for part in parts
                )
            )
            for parts in split
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some ids, without dummy prefix and control tokens; bytes that are not UTF-8
        become U+FFFD.

        Raises:
            IndexError: an id outside ``range(V)``.
        """
        return self._decoder.decode(list(tokens))

    def _segments(self, text: str) -> list[str]:
        """Parts whose ids, joined, are the text's; a literal U+2581 is a separate part."""
        check_text(text)
        if not text:
            return []
        parts: list[str] = []
        for part in re.split(f"({_SPACE})", self._prefix + text):
            parts += _cut(part) if self._separable and part != _SPACE else [part]
        return parts


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, out: Path, threads: int = 0
) -> Tokenizer:
    """Train a BPE tokenizer and write it to ``out``, completely or not at all.

    Ids: 0 unknown (never produced), 1 begin, 2 end of document, 3..258 the bytes, then merges in
    the order they were learned, then single characters. Digits are never merged; runs of spaces
    are. The same texts in the same order give the same file.

    Arguments:
        texts: documents, any number and length; the trainer, a separate process, holds them in
            memory.
        vocab_size: number of ids in total.
        threads: 0 = one per core; does not change the result.
    Raises:
        UserError: there are too few texts for this vocabulary, or it is too small for the texts.
        OSError: ``out`` cannot be written.
    """
    options: dict[str, str | int | bool] = {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "max_sentence_length": 2**30,
        "num_threads": min(threads or os.cpu_count() or 1, 128),
        "minloglevel": 2,
    }
    try:
        model = train_model(_sentences(texts), options)
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    patched = SentencePieceProcessor(model_proto=model + _PREFIX_ON + _DEFAULT_THREADS)
    write_atomic(out, patched.serialized_model_proto())
    return Tokenizer(out)


def check_text(text: str, name: str = "text") -> None:
    """Raise UserError, naming the text, if it holds a lone surrogate, which has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name}: character {error.start} is a lone surrogate ({text[error.start]!r}), "
            "which has no UTF-8"
        ) from None


def _cut(text: str) -> list[str]:
    """Cut before a space that follows another character, every 4 Ki characters or later."""
    parts, start = [], 0
    while found := _CUT.search(text, start + _SEGMENT):
        parts.append(text[start : found.start()])
        start = found.start()
    if start < len(text):
        parts.append(text[start:])
    return parts


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from _UNTRAINABLE.split(f" {text}")


def _training_error(message: str, vocab_size: int) -> UserError:
    if found := re.search(r"value <= (\d+)", message):
        return UserError(
            f"data.vocab_size = {vocab_size}: there is too little text for so many tokens; "
            f"set it to {found[1]} or less, or add text"
        )
    if found := re.search(rf"{vocab_size} vs (\d+)", message):
        return UserError(
            f"data.vocab_size = {vocab_size}: at least {found[1]} are needed (256 bytes, 3 control "
            "tokens and the characters of the text)"
        )
    if "sentences_.empty()" in message:
        return UserError("there is no text to train a tokenizer on")
    return UserError(f"data.vocab_size = {vocab_size}: sentencepiece says: {message}")


def read_model(path: Path) -> bytes:
    """A tokenizer file's bytes; raises UserError, with the nearest name, if there is none."""
    if path.exists() and not path.is_dir():
        return read_file(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a tokenizer file")
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, names)
    hint = f"; did you mean {path.with_name(near)}?" if near else ""
    raise UserError(f"{path}: no such tokenizer file{hint}")


def _processor(path: Path, model: bytes) -> SentencePieceProcessor:
    if not model.startswith(b"\n"):  # ModelProto begins with its pieces
        raise UserError(f"{path}: not a sentencepiece model, or a damaged one")
    return SentencePieceProcessor(model_proto=model)
