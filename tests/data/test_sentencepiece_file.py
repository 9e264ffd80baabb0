"""The vocabulary in a sentencepiece file: what sentencepiece says of it, and a file of it."""

import struct
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from bitnet.data.sentencepiece_file import BYTE, CONTROL, UNKNOWN, make_model, read_pieces
from bitnet.data.tokenizer import Tokenizer, train_tokenizer

TEXT = "to be or not to be, that is the question\n\tx  = 10 # naïve ☃\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([TEXT * 20], 320, tmp_path_factory.mktemp("t") / "tokenizer.model", 1)


def test_pieces_are_those_of_sentencepiece(tokenizer: Tokenizer) -> None:
    theirs = SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    pieces = read_pieces(tokenizer.model_bytes)
    assert len(pieces) == theirs.get_piece_size() == 320
    for i, (text, score, kind) in enumerate(pieces):
        assert text == theirs.id_to_piece(i)
        assert score == theirs.get_score(i)
        assert (kind == CONTROL) == theirs.is_control(i)
        assert (kind == UNKNOWN) == theirs.is_unknown(i)
        assert (kind == BYTE) == theirs.is_byte(i)


def test_a_file_of_the_same_vocabulary(tokenizer: Tokenizer) -> None:
    pieces = read_pieces(tokenizer.model_bytes)
    made = make_model(pieces, "</s>", dummy_prefix=True)
    assert read_pieces(made) == pieces
    again = Tokenizer(Path("again"), made)
    assert (again.eos_id, again.prefixes_space) == (tokenizer.eos_id, True)
    for text in (TEXT, "  a  b", "\n\n", "é\0\U0001f600", " ", "</s><unk>", "\u2581x"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text
    without = Tokenizer(Path("without"), make_model(pieces, "</s>", dummy_prefix=False))
    assert not without.prefixes_space
    assert without.encode(" to be") == tokenizer.encode("to be")


def test_damage_is_an_error(tokenizer: Tokenizer) -> None:
    whole = tokenizer.model_bytes
    for damaged, message in (
        (whole[:100], "ends within"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "more than 64 bits"),
        (b"\x0a\x80", "ends within a number"),
        (b"\x0b", "wire type 3"),
        (b"\x0a\x02\x08\x01", "no piece"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "utf-8"),
        (b"\x0a\x02\x10" + struct.pack("<B", 1), "no piece"),
    ):
        with pytest.raises(ValueError, match=message):
            read_pieces(damaged)
