"""Vocabularies to GGUF and back: the same ids for the same text, or a refusal."""

import json
from pathlib import Path
from typing import Any

import pytest

from bitnet.data.tokenizer_json import JsonTokenizer
from bitnet.export.gguf_file import Keys, open_gguf
from bitnet.export.gguf_vocab import _SPLITS, read_tokenizer, write_tokenizer
from bitnet.schema import UserError
from tests.helpers.gguf_file import gguf, write

pytest.importorskip("tokenizers")
TEXT = "to be, that's naïve café 1234 ²½ don't\n\n  x = 10_000\t// 漢字テスト \U0001f600"


def tokenizer(path: Path, **keys: Any) -> JsonTokenizer:
    read = read_tokenizer(Keys(path, open_gguf(write(path, lambda fields: fields.update(keys)))))
    assert isinstance(read, JsonTokenizer)
    return read


def through_a_file(path: Path, ours: JsonTokenizer) -> tuple[str, JsonTokenizer]:
    """The name of the split, and the tokenizer that is read back."""
    writer = gguf.GGUFWriter(path, "bitnet")
    write_tokenizer(writer, ours, path)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    keys = Keys(path, open_gguf(path))
    read = read_tokenizer(keys)
    assert isinstance(read, JsonTokenizer)
    return keys.need("tokenizer.ggml.pre", str), read


@pytest.mark.parametrize("pre", _SPLITS)
def test_every_split_comes_back(tmp_path: Path, pre: str) -> None:
    ours = tokenizer(tmp_path / "source.gguf", **{"tokenizer.ggml.pre": pre})
    name, back = through_a_file(tmp_path / "model.gguf", ours)
    assert _SPLITS[name] == _SPLITS[pre]
    assert back.encode(TEXT) == ours.encode(TEXT)
    assert (back.eos_ids, back.vocab_size) == (ours.eos_ids, ours.vocab_size)
    assert back.special_id("<|eot|>") == ours.special_id("<|eot|>")


def edited(ours: JsonTokenizer, **changes: Any) -> JsonTokenizer:
    content = json.loads(ours.model_bytes)
    content |= {key: value for key, value in changes.items() if key != "model"}
    content["model"] |= changes.get("model", {})
    return JsonTokenizer("edited", json.dumps(content).encode())


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def test_other_spellings_of_the_same_split(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path / "source.gguf", **{"tokenizer.ggml.pre": "smollm"})
    digits = {"type": "Digits", "individual_digits": True}
    steps = {"type": "Sequence", "pretokenizers": [digits, LEVEL]}
    for step, pre in ((steps, "smollm"), (LEVEL, "gpt-2")):
        spelled = edited(ours, pre_tokenizer=step)
        name, back = through_a_file(tmp_path / "model.gguf", spelled)
        assert name == pre
        assert back.encode(TEXT) == spelled.encode(TEXT)


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**SPLIT, "pattern": p}, LEVEL]}}
        for p in ({"Regex": "[a-z]+"}, {"String": "a"})
    ]
    + [{"model": {"ignore_merges": True}}, {"pre_tokenizer": {**LEVEL, "use_regex": False}}],
)
def test_a_split_without_a_name_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    ours = edited(tokenizer(tmp_path / "source.gguf"), **changes)
    with pytest.raises(UserError, match=r"model\.gguf: GGUF has no name for the way"):
        through_a_file(tmp_path / "model.gguf", ours)
