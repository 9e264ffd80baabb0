"""Byte-level BPE behind our interface: nothing is lost, bytes are exact, no specials from text."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet.data.loader import DataConfig, TokenDataset
from bitnet.data.prepare import prepare
from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.data.tokenizer_json import (
    JsonTokenizer,
    _byte_marks,
    load_tokenizer,
    tokenizer_path,
    with_eos,
)
from bitnet.engine.text import TextStream
from bitnet.schema import UserError
from tests.helpers.tokenizer_file import byte_pairs

pytest.importorskip("tokenizers")
TEXT = "to be or not to be, that is the question: whether 'tis nobler — naïve café\n"
HOSTILE = [
    "",
    " ",
    "  two  ",
    "\0",
    "\r\n\t",
    "<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>",
    "Ġ Ċ \u2581",
    "e\u0301 é ﬁ①Å",
    "日本語 👩‍👩‍👧 \ufeff\ufffd",
    "\U0010ffff\u0000",
    TEXT * 50,
]


@cache
def made(*added: str) -> bytes:
    return byte_pairs(TEXT, *added)


def changed(**entries: Any) -> bytes:
    return json.dumps(json.loads(made()) | entries).encode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(made())
    return tmp_path / "tokenizer.json"


def test_nothing_is_lost(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, JsonTokenizer)
    draw = random.Random(0)
    texts = HOSTILE + [
        "".join(chr(draw.choice([draw.randrange(128), draw.randrange(0xD800)])) for _ in range(40))
        for _ in range(200)
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2} & set(ids), "a special token from text"
        assert tokenizer.count_bytes([tokenizer.eos_id, *ids]) == len(text.encode())
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_batch(texts) == tokenizer.encode_batch(texts, threads=1)
    assert tokenizer.encode_batch([]) == []


def test_ids_are_the_library_s_own(path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    plain = Backend.from_file(str(path))
    assert load_tokenizer(path).encode(TEXT) == plain.encode(TEXT).ids


def test_token_bytes_of_each_token(path: Path) -> None:
    """Against the bytes that the decoder makes of pairs: a lone token may be no UTF-8."""
    tokenizer = load_tokenizer(path)
    assert tokenizer.token_bytes.dtype == np.int64
    assert tokenizer.token_bytes.shape == (300,)
    assert tokenizer.token_bytes[:3].tolist() == [0, 0, 0]
    for token in range(3, 300):
        text = tokenizer.decode([token])
        if "\ufffd" not in text:
            assert tokenizer.token_bytes[token] == len(text.encode())
    single = sum(int(size) == 1 for size in tokenizer.token_bytes)
    assert single == 256


def test_decode_leaves_out_specials_and_knows_its_range(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("to be")
    assert tokenizer.decode([0, *ids, 2]) == "to be"
    assert tokenizer.decode([]) == ""
    for outside in (-1, 300):
        with pytest.raises(IndexError, match="there are 300"):
            tokenizer.decode([outside])


def test_streaming_holds_back_unfinished_characters(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    text = "x 日👧é — naïve"
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" not in "".join(pieces)


def test_the_end_token_is_the_post_processors_or_a_usual_name(path: Path) -> None:
    """What the post-processor appends comes first, then the first usual name that is special."""
    assert load_tokenizer(path).eos_id == 0
    for number, name in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]):
        path.write_bytes(with_eos(made(), name))
        assert load_tokenizer(path).eos_id == number
        assert load_tokenizer(path).encode("to be") == JsonTokenizer(path, made()).encode("to be")
    assert with_eos(with_eos(made(), "<|im_end|>"), "<|im_end|>") == with_eos(made(), "<|im_end|>")
    with pytest.raises(ValueError, match="no added token 'nothing'"):
        with_eos(made(), "nothing")
    ordinary = [token | {"special": False} for token in json.loads(made())["added_tokens"]]
    path.write_bytes(changed(added_tokens=ordinary))
    with pytest.raises(UserError, match="no end-of-document token"):
        load_tokenizer(path)


def test_truncation_and_padding_of_the_file_are_switched_off(path: Path) -> None:
    padding = {
        "strategy": {"Fixed": 512},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_bytes(changed(padding=padding, truncation=cut))
    assert load_tokenizer(path).decode(load_tokenizer(path).encode(TEXT)) == TEXT
    assert load_tokenizer(path).encode_batch([TEXT, "a"]) == [
        JsonTokenizer(path, made()).encode(text) for text in (TEXT, "a")
    ]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split(text: str, behavior: str) -> dict[str, Any]:
    """A pre-tokenizer that splits at ``text``, then byte-level."""
    at = {"type": "Split", "pattern": {"String": text}, "behavior": behavior, "invert": False}
    return {"type": "Sequence", "pretokenizers": [at, BYTE_LEVEL | {"use_regex": False}]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer NFC"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        (
            {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
            "normalizer Strip",
        ),
        # what no probe meets
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": "qzq"}, "content": ""}},
            "normalizer Replace",
        ),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [{"type": "Prepend", "prepend": "a"}],
                }
            },
            "normalizer Prepend",
        ),
        ({"pre_tokenizer": split("qzq", "Removed")}, "pre_tokenizer Split may remove text"),
        (
            {"pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": "q"}},
            "pre_tokenizer CharDelimiterSplit may remove text",
        ),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True}}, "is not byte-level"),
        ({"pre_tokenizer": None}, "is not byte-level"),
        (
            {
                "decoder": {
                    "type": "Sequence",
                    "decoders": [
                        BYTE_LEVEL,
                        {"type": "Replace", "pattern": {"String": "qzq"}, "content": ""},
                    ],
                }
            },
            r"decoder ByteLevel \+ Replace",
        ),
    ],
    ids=str,
)
def test_lossy_tokenizers_are_refused(path: Path, entries: dict[str, Any], message: str) -> None:
    path.write_bytes(changed(**entries))
    with pytest.raises(UserError, match=r"tokenizer\.json: .*" + message) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_parts_that_lose_nothing_are_accepted(path: Path) -> None:
    """Splitters that keep what they split at (Llama 3 has one), an empty list of normalizers, no
    dropout: all of the text comes back, from encodings that stay the same."""
    for entries in (
        {"pre_tokenizer": split("be", "Isolated")},
        {"pre_tokenizer": split(" ", "MergedWithNext")},
        {"normalizer": {"type": "Sequence", "normalizers": []}},
        {"decoder": {"type": "Sequence", "decoders": [BYTE_LEVEL]}},
        {"model": json.loads(made())["model"] | {"dropout": 0.0}},
    ):
        path.write_bytes(changed(**entries))
        tokenizer = load_tokenizer(path)
        for text in HOSTILE:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dropout", 0.5, r"BPE has dropout 0\.5"),
        ("continuing_subword_prefix", "##", "has continuing_subword_prefix; only byte-level BPE"),
        ("end_of_word_suffix", "</w>", "has end_of_word_suffix; only byte-level BPE"),
    ],
)
def test_other_bpe_is_refused(
    path: Path, capfd: pytest.CaptureFixture[str], key: str, value: Any, message: str
) -> None:
    path.write_bytes(changed(model=json.loads(made())["model"] | {key: value}))
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)
    assert capfd.readouterr().err == "", "the library's panic"


def test_a_panic_of_the_library_is_a_damaged_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        pass

    def panics(_: str) -> None:
        raise Panic("index out of bounds")

    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setattr(tokenizers, "Tokenizer", type("Backend", (), {"from_str": panics}))
    with pytest.raises(UserError, match=r"a damaged one: index out of bounds"):
        load_tokenizer(path)


def test_special_tokens_that_text_could_become_are_refused(path: Path) -> None:
    def with_special(piece: str, **model: Any) -> bytes:
        content = json.loads(made())
        content["model"] |= model
        number = content["model"]["vocab"].get(piece, 300)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": number, "content": piece, "special": True, **flags}
        content["added_tokens"] = [*content["added_tokens"], token]
        return json.dumps(content).encode()

    merged = json.loads(made())["model"]["merges"][-1]
    for piece in ("b", "".join(merged)):
        path.write_bytes(with_special(piece))
        with pytest.raises(UserError, match="could become its special token"):
            load_tokenizer(path)
    # in the vocabulary, but no merge leads to it: only ignore_merges finds it, as a whole word
    vocab = json.loads(made())["model"]["vocab"] | {"zebra": 300}
    path.write_bytes(with_special("zebra", vocab=vocab))
    for text in ("zebra", " zebra", *HOSTILE):
        ids = load_tokenizer(path).encode(text)
        assert load_tokenizer(path).decode(ids) == text
    path.write_bytes(with_special("zebra", vocab=vocab, ignore_merges=True))
    with pytest.raises(UserError, match="could become its special token 'zebra'"):
        load_tokenizer(path)
    path.write_bytes(changed(model=json.loads(made())["model"] | {"ignore_merges": True}))
    for text in HOSTILE:
        assert load_tokenizer(path).decode(load_tokenizer(path).encode(text)) == text


def test_added_tokens_that_lose_text_are_refused(path: Path) -> None:
    path.write_bytes(made("hello", "  ", "日本"))
    tokenizer = load_tokenizer(path)
    for text in ("say hello  日本\n", "  hello"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    path.write_bytes(made("ö"))  # a letter of the byte alphabet: the decoder takes it for a byte
    with pytest.raises(UserError, match="the tokenizer turns ' ö '"):
        load_tokenizer(path)
    content = json.loads(made("hello"))
    content["added_tokens"][-1]["lstrip"] = True
    path.write_bytes(json.dumps(content).encode())
    with pytest.raises(UserError, match="the tokenizer turns ' hello '"):
        load_tokenizer(path)


def test_a_byte_without_a_token_is_named(path: Path) -> None:
    """The library would drop it: SmolLM2's vocabulary is such a one."""
    content = json.loads(made())
    del content["model"]["vocab"]["Ć"]  # byte 6
    path.write_bytes(json.dumps(content).encode())
    tokenizer = load_tokenizer(path)
    for text in HOSTILE:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    message = r"character 3 \('\\x06'\) cannot be encoded: .*tokenizer\.json has no .* byte 0x06"
    with pytest.raises(UserError, match=message):
        tokenizer.encode("☃ab\x06\x06")


def test_the_alphabet_is_the_library_s() -> None:
    from tokenizers import pre_tokenizers

    marks = _byte_marks()
    assert set(marks.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in map(chr, range(0x80)):
        ((piece, _),) = splitter.pre_tokenize_str(text)
        assert piece == marks[ord(text)]


def test_damaged_and_foreign_files(path: Path, tmp_path: Path) -> None:
    whole = made()
    cuts = [0, 1, 100, len(whole) // 2, len(whole) - 1]
    for content in [b"junk", b"[]", b"{}", b"\xff\xfe{", b"[" * 10_000, *(whole[:c] for c in cuts)]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json") as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)
    word_level = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    path.write_bytes(changed(model=word_level, added_tokens=[]))
    with pytest.raises(UserError, match=r"WordLevel .* only byte-level BPE"):
        load_tokenizer(path)
    path.write_bytes(changed(decoder=None))
    with pytest.raises(UserError, match="decoder none"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="no such tokenizer file; did you mean"):
        load_tokenizer(tmp_path / "tokeniser.json")
    with pytest.raises(UserError, match="lone surrogate"):
        JsonTokenizer(path, made()).encode("a\ud800")


def test_ids_beyond_any_model(path: Path) -> None:
    """A table of an entry per id would take gigabytes: 8 for one token of id 10^9."""
    vocab = json.loads(made())["model"]
    for number in (2**24, 10**9, 2**32 - 1):
        path.write_bytes(changed(model=vocab | {"vocab": vocab["vocab"] | {"zzz": number}}))
        with pytest.raises(
            UserError, match=f"has a token of id {number:,}; at most 16,777,216 ids"
        ):
            load_tokenizer(path)


def test_kinds_are_told_apart_by_content(tmp_path: Path) -> None:
    ours = train_tokenizer([TEXT * 20], 300, tmp_path / "tokenizer.model")
    assert type(load_tokenizer(tmp_path / "tokenizer.model")) is Tokenizer
    (tmp_path / "renamed").write_bytes(b" \n" + made())
    assert isinstance(load_tokenizer(tmp_path / "renamed"), JsonTokenizer)
    assert tokenizer_path(tmp_path).name == "tokenizer.model"
    ours.path.unlink()
    assert tokenizer_path(tmp_path).name == "tokenizer.model", "the one that is missing"
    (tmp_path / "tokenizer.json").write_bytes(made())
    assert tokenizer_path(tmp_path).name == "tokenizer.json"


def test_without_the_extra_the_message_says_how_to_install_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r'pip install "bitnet-train\[hf\]"'):
        load_tokenizer(path)


def test_a_data_folder_keeps_the_tokenizer_and_its_bytes(path: Path, tmp_path: Path) -> None:
    """A data folder made with it: the file lies there, the ids are its own, the bytes add up."""
    text = "".join(f"{TEXT}{i} ☃ <|endoftext|>\n" for i in range(400))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    config = DataConfig(
        path=str(tmp_path / "data"),
        sources=[str(tmp_path / "text.txt")],
        tokenizer=str(path),
        threads=1,
        val_fraction=0.2,
    )
    folder = prepare(config, progress=False)
    assert (folder / "tokenizer.json").read_bytes() == made()
    assert not (folder / "tokenizer.model").exists()
    total = 0
    for split in ("train", "val"):
        dataset = TokenDataset(folder, split)  # type: ignore[arg-type]
        tokenizer = dataset.tokenizer()
        ids = dataset.tokens(0, dataset.n_tokens)
        assert (dataset.vocab_size, dataset.eos_id) == (300, 0)
        assert (ids == 0).sum() == dataset.n_documents
        assert tokenizer.count_bytes([0, *ids]) == dataset.n_bytes
        total += dataset.n_bytes
    assert total == len(text.encode())
    assert prepare(config, progress=False) == folder, "made once"
    (folder / "tokenizer.json").write_bytes(with_eos(made(), "<|im_end|>"))
    with pytest.raises(UserError, match="not the tokenizer this set was prepared with"):
        TokenDataset(folder, "val").tokenizer()


def test_a_regular_expression_too_costly_for_a_text(path: Path) -> None:
    """The library panics over it, which is not even an Exception; the file is named."""
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated"}
    steps = [split | {"invert": False}, json.loads(made())["pre_tokenizer"]]
    content = changed(pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    tokenizer = JsonTokenizer(path, content)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    for threads in (0, 1):
        with pytest.raises(UserError, match=r"text cannot be encoded: .*retry-limit"):
            tokenizer.encode_batch(["x" * 5000], threads)
