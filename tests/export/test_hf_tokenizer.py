"""Tokenizers as Hugging Face's files: the ids that they have here."""

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from bitnet.data.tokenizer import Tokenizer
from bitnet.data.tokenizer_json import JsonTokenizer, with_eos
from bitnet.export.hf_tokenizer import PROBES, load_hf_tokenizer, save_tokenizer
from bitnet.generate import encode_prompt
from bitnet.schema import UserError
from tests.helpers.hf_export import TEXT, tokenizer, transformers
from tests.helpers.tokenizer_file import byte_pairs

pytestmark = pytest.mark.filterwarnings("ignore")


def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_sentencepiece_gives_the_same_ids_in_transformers(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path)
    folder = tmp_path / "hf"
    folder.mkdir()
    save_tokenizer(folder, ours)
    other = theirs(folder)
    rng = random.Random(0)
    parts = [
        "to",
        "be",
        " ",
        "  ",
        "\n",
        "\t",
        "é",
        "☃",
        "😀",
        "<s>",
        "</s>",
        "<0x0A>",
        "qu",
        "    ",
    ]
    mixed = ["".join(rng.choices(parts, k=rng.randrange(30))) for _ in range(300)]
    for text in [*PROBES, *mixed]:
        ids = other(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text), text
        assert other.decode(ids) == text
        assert other(text)["input_ids"] == encode_prompt(ours, text)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=ours.model_bytes)
    for text in mixed:
        assert pieces.encode(text) == ours.encode(text)
    assert len(other) == ours.vocab_size
    assert (other.bos_token_id, other.eos_token_id) == (2, 2)
    assert load_hf_tokenizer(folder).hash == ours.hash


def test_byte_level_bpe_keeps_its_file(tmp_path: Path) -> None:
    ours = JsonTokenizer("t", with_eos(byte_pairs(TEXT), "<|endoftext|>", ["<|im_end|>"]))
    save_tokenizer(tmp_path, ours)
    other = theirs(tmp_path)
    for text in (*PROBES, "<|im_end|> and <|endoftext|>"):
        assert other(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert other(text)["input_ids"] == encode_prompt(ours, text)
    (tmp_path / "config.json").write_text('{"eos_token_id": [0, 2]}')
    assert load_hf_tokenizer(tmp_path).hash == ours.hash


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    """Its ids come from probabilities, not from merges: a tokenizer.json of merges has others."""
    prefix = str(tmp_path / "unigram")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 5),
        model_prefix=prefix,
        vocab_size=285,
        model_type="unigram",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match=r"has no tokenizer\.json with its ids: .* of type bpe"):
        save_tokenizer(tmp_path / "hf", Tokenizer(f"{prefix}.model"))


def test_ends_and_added_tokens_that_sentencepiece_lacks_are_refused(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path)
    save_tokenizer(tmp_path, ours)
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 1]}')
    with pytest.raises(UserError, match=r"eos_token_id \[1, 2\] is not the end-of-sentence token"):
        load_hf_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    path = tmp_path / "tokenizer.json"
    whole = path.read_text()
    path.write_text(whole.replace('"id": 2,', '"id": 320,', 1))
    with pytest.raises(UserError, match=r"tokenizer\.json adds '</s>' to the tokens of tokenizer"):
        load_hf_tokenizer(tmp_path)
    for content in ("[]", "{", '{"added_tokens": [3]}', '{"added_tokens": [{"id": "x"}]}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json: .*damaged"):
            load_hf_tokenizer(tmp_path)
