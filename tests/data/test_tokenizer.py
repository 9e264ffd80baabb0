"""Nothing is lost, bytes are counted exactly, and bad files and vocabularies are named."""

import errno
import hashlib
import os
import random
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.schema import UserError

CODE = """def double(values):
    result = []
    for value in values:
        if value > 10:
            result.append(2 * value)
    return result


class Thing:
    pass
"""
PROSE = "The cat sat on the mat.  Two spaces, 1234 digits, and naïve café.\r\n\tA tab.\n\n"

HOSTILE = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t",
    "\0",
    "a\0b",
    "\r\n",
    " leading",
    "  two  ",
    "trailing ",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    " ⁇ ",
    "\u2581",
    "\u2581\u2581 \u2581x",
    "x \u2581 y\u2581",
    "\u2585",
    "\ufeffbom",
    "\ufffd",
    "é",
    "e\u0301",
    "ﬁ①Å",
    "日本語のテキスト",
    "مرحبا",
    "👩‍👩‍👧‍👦 🇫🇷",
    "\U0010ffff\ue000\uffff",
    "\u00a0\u3000\u2028\u2029\x85\x0b\x0c",
    "\x7f\x1b[0m",
    CODE,
    PROSE,
]
LOSSY = {
    "normalization_rule_name",
    "remove_extra_whitespaces",
    "byte_fallback",
    "treat_whitespace_as_suffix",
}
ALPHABET = " \n\t\r\0ab1.<>/s\u2581\u2585\u2047é日😀\u0301\ufeff"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([CODE, PROSE] * 5, 350, tmp_path_factory.mktemp("t") / "t.model")


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randrange(40))) for _ in range(count)]


def reference(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)


def test_roundtrip_is_exact(tokenizer: Tokenizer) -> None:
    for text in HOSTILE + random_texts(500, 1):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_equals_sentencepiece_where_that_is_exact(tokenizer: Tokenizer) -> None:
    plain = reference(tokenizer)
    for text in HOSTILE + random_texts(500, 2):
        if "\u2581" not in text:
            assert tokenizer.encode(text) == plain.encode(text)
            assert tokenizer.decode(plain.encode(text)) == plain.decode(plain.encode(text))


def test_long_texts_are_cut_where_it_does_not_matter(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    plain = reference(tokenizer)
    words = [" ", "  ", "\n", "\n    ", "return", " the", "12", "日本", "\t", "):\n\n"]
    for text in ["".join(rng.choices(words, k=40_000)), "no" * 40_000, " " * 70_000, CODE * 300]:
        assert tokenizer.encode(text) == plain.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_are_counted_exactly(tokenizer: Tokenizer) -> None:
    for text in HOSTILE + random_texts(300, 4):
        ids = tokenizer.encode(text)
        assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + (text != "")
        assert tokenizer.count_bytes([tokenizer.eos_id, *ids]) == len(text.encode())


def test_bytes_of_a_stream_of_documents(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    stream = [eos]
    for text in HOSTILE[1:]:
        stream += [*tokenizer.encode(text), eos]
    expected = sum(len(text.encode()) for text in HOSTILE)
    assert tokenizer.count_bytes(stream) == expected
    for window in (1, 7, 64, len(stream)):
        starts = range(0, len(stream) - 1, window)
        pieces = [torch.tensor(stream[start : start + window + 1]) for start in starts]
        assert sum(map(tokenizer.count_bytes, pieces)) == expected
    assert tokenizer.count_bytes(np.array([eos, eos, eos])) == 0


def test_ids_are_control_bytes_then_pieces(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (350, 2)
    assert tokenizer.token_bytes.dtype == np.int64
    assert tokenizer.token_bytes.shape == (350,)
    assert list(tokenizer.token_bytes[:3]) == [0, 0, 0]
    assert list(tokenizer.token_bytes[3:259]) == [1] * 256
    for text in HOSTILE:
        assert all(3 <= token < 350 for token in tokenizer.encode(text))
    assert tokenizer.decode([1, *tokenizer.encode("hello"), 2]) == "hello"
    assert tokenizer.decode([0xE3 + 3, *tokenizer.encode(" x")]) == "\ufffd  x"
    for token in (-1, 350):
        with pytest.raises(IndexError):
            tokenizer.decode([token])


def test_code_has_short_encodings(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([CODE] * 20, 310, tmp_path / "t.model")
    pieces = {tokenizer.decode([4, token])[1:] for token in range(259, 310)}  # after a byte
    assert {"    ", "        "} <= pieces
    assert any(piece.endswith(":\n") for piece in pieces)
    digits = tokenizer.encode("1234567890")
    assert len(digits) >= 10


def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    texts = HOSTILE + random_texts(50, 5) + [CODE * 200]
    for threads in (0, 1, 2, 5):
        assert tokenizer.encode_batch(texts, threads) == [tokenizer.encode(t) for t in texts]
    assert tokenizer.encode_batch([]) == []


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"character 2 is a lone surrogate .*ud800"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode_batch(["fine", "\udfff"])


def test_training_is_deterministic_and_quiet(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from bitnet.data.tokenizer import train_tokenizer\n"
        "texts = [open(sys.argv[1]).read(), 'a\\0b \\u2585 c \\u2581', '']\n"
        "train_tokenizer(texts, 400, Path(sys.argv[2]), threads=int(sys.argv[3]))"
    )
    digests = set()
    for threads in ("1", "3"):
        out = tmp_path / f"{threads}.model"
        run = subprocess.run(
            [sys.executable, "-c", program, __file__, str(out), threads],
            capture_output=True,
            check=True,
        )
        assert (run.stdout, run.stderr) == (b"", b"")
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
        assert Tokenizer(out).hash in digests
    assert len(digests) == 1


def test_reserved_characters_do_not_cost_their_text(tmp_path: Path) -> None:
    text = "remarkable\u2585 remarkable\0 remarkable\u2581 remarkable"
    tokenizer = train_tokenizer([text] * 20, 284, tmp_path / "t.model")
    assert len(tokenizer.encode("remarkable")) <= 2
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["hello world"], 8192, r"data\.vocab_size = 8192: .* set it to 2\d\d or less"),
        ([PROSE], 200, r"data\.vocab_size = 200: at least \d+ are needed"),
        (["".join(map(chr, range(0x4E00, 0x5000)))] * 3, 300, r"at least 7\d\d are needed"),
        ([], 300, "no text to train"),
        (["", "\0\u2581"], 300, r"data\.vocab_size = 300|no text"),
    ],
)
def test_vocabularies_that_cannot_be(
    tmp_path: Path, texts: list[str], vocab_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, vocab_size, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


def test_the_feasible_maximum_that_is_named_is_feasible(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        train_tokenizer([PROSE], 5000, tmp_path / "t.model")
    maximum = int(str(error.value).split("set it to ")[1].split()[0])
    assert train_tokenizer([PROSE], maximum, tmp_path / "t.model").vocab_size == maximum


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train_tokenizer([PROSE], 300, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "bad.model"
    whole = tokenizer.model_bytes
    cuts = [0, 1, 100, len(whole) // 2, len(whole) - 1]
    for content in [b"junk", b'{"model": {}}', b"\n" * 50, *(whole[:cut] for cut in cuts)]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.model"):
            Tokenizer(path)


def test_every_truncation_is_refused_or_exact(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A cut between two pieces is a valid protobuf; it must still not load as a tokenizer."""
    path = tmp_path / "bad.model"
    whole = tokenizer.model_bytes
    for cut in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"bad\.model"):
            Tokenizer(path)


def test_missing_files_are_named_with_the_nearest(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    with pytest.raises(UserError, match=r"tokeniser\.model: no such .*tokenizer\.model\?"):
        Tokenizer(tmp_path / "tokeniser.model")
    with pytest.raises(UserError, match="no such tokenizer file"):
        Tokenizer(tmp_path / "no" / "where.model")
    with pytest.raises(UserError, match="is a folder"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
        {"eos_id": -1},
        {"add_dummy_prefix": False},
        {"split_by_whitespace": False},
        {"treat_whitespace_as_suffix": True},
    ],
)
def test_a_given_tokenizer_is_exact_or_refused(tmp_path: Path, options: dict[str, object]) -> None:
    """A model made elsewhere is refused when lossy, and exact in text and bytes when not."""
    model = BytesIO()
    base = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CODE, PROSE] * 5), model_writer=model, **(base | options)
    )
    path = tmp_path / "given.model"
    path.write_bytes(model.getvalue())
    if options.keys() & LOSSY:
        with pytest.raises(UserError, match=r"given\.model: the tokenizer turns .* into"):
            Tokenizer(path)
        return
    if "eos_id" in options:
        with pytest.raises(UserError, match="no end-of-sentence"):
            Tokenizer(path)
        return
    tokenizer = Tokenizer(path)
    plain = reference(tokenizer)
    for text in [*HOSTILE, *random_texts(100, 6), "the cat sat on " * 3000]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.count_bytes([tokenizer.eos_id, *ids]) == len(text.encode())
        if "\u2581" not in text:
            assert ids == plain.encode(text)


def test_any_damaged_byte_is_one_line(tmp_path: Path) -> None:
    """A flipped bit anywhere: the model loads, or one line names the file. sentencepiece has pieces
    that are no UTF-8, which fail only when they are read."""
    path = tmp_path / "tokenizer.model"
    data = train_tokenizer(["to be or not to be\n" * 20], 280, path, 1).model_bytes
    failed = 0
    for at in range(0, len(data), 13):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :])
        try:
            Tokenizer(path)
        except UserError as error:
            failed += str(error).startswith(f"{path}: ")
    assert failed > 100


def test_a_tokenizer_file_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        Tokenizer(path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(20 * 10**9)
    with pytest.raises(UserError, match=r"20,000,000,000 bytes; at most"):
        Tokenizer(path)
