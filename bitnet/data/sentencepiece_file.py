"""Read the vocabulary of a sentencepiece model file, and make such a file from a vocabulary.

The file is a protobuf message, ModelProto. Only the fields that a BPE model needs are handled here,
so the project does not require the protobuf package, which reads all of them. sentencepiece reads
every file written here before it is used.

    ModelProto       pieces = 1, trainer_spec = 2, normalizer_spec = 3
    SentencePiece    piece = 1, score = 2, type = 3
    TrainerSpec      model_type = 3 (BPE = 2), byte_fallback = 35, eos_piece = 47
    NormalizerSpec   name = 1, add_dummy_prefix = 3, remove_extra_whitespaces = 4

A message is a series of fields. Each is a number (8 * field + wire type), then a number for wire
type 0, 8 bytes for 1, 4 bytes for 5, or a length and that many bytes for 2. Numbers have 7 bits per
byte, the lowest first; the high bit is set if more follow.
Source: google/sentencepiece, src/sentencepiece_model.proto; protobuf.dev, "Encoding".
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces. GGUF numbers them in the same way."""


class Piece(NamedTuple):
    """An entry of the vocabulary; its index is its id."""

    text: str
    score: float
    """Of two possible merges, the one whose piece has the higher score comes first."""
    kind: int


def read_pieces(model: bytes) -> list[Piece]:
    """The vocabulary of a model file. Raises ValueError if it is damaged."""
    found = []
    for field, value in _fields(model):
        if field != 1:
            continue
        assert isinstance(value, bytes)
        piece = dict(_fields(value))
        text, score, kind = piece.get(1, b""), piece.get(2, bytes(4)), piece.get(3, NORMAL)
        if not (isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int)):
            raise ValueError("a piece is no piece")
        found.append(Piece(text.decode(), struct.unpack("<f", score)[0], kind))
    return found


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: a number's value, or the bytes of anything else."""
    at = 0
    while at < len(message):
        tag, at = _number(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _number(message, at)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = _number(message, at)
        elif not size:
            raise ValueError(f"has a field of wire type {kind}")
        if at + size > len(message):
            raise ValueError("ends within a field")
        yield tag >> 3, message[at : at + size]
        at += size


def _number(message: bytes, at: int) -> tuple[int, int]:
    """A number and the position after it."""
    value = shift = 0
    while shift < 64:
        if at >= len(message):
            raise ValueError("ends within a number")
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("has a number of more than 64 bits")


def make_model(pieces: Sequence[Piece], eos: str, dummy_prefix: bool) -> bytes:
    """A BPE model file with byte fallback that changes no text.

    Arguments:
        eos: the text of the end-of-document token.
        dummy_prefix: whether a space is put before each text.
    """
    entries = [
        _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _flag(3, kind))
        for text, score, kind in pieces
    ]
    trainer = _flag(3, 2) + _flag(4, len(pieces)) + _flag(35, 1) + _field(47, eos.encode())
    normalizer = _field(1, b"identity") + _flag(3, int(dummy_prefix)) + _flag(4, 0) + _flag(5, 1)
    return b"".join((*entries, _field(2, trainer), _field(3, normalizer)))


def _field(field: int, value: bytes) -> bytes:
    return _varint(8 * field + 2) + _varint(len(value)) + value


def _flag(field: int, value: int) -> bytes:
    return _varint(8 * field) + _varint(value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
