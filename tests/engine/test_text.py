"""The text of tokens as they arrive, ended at stop strings, against decoding all tokens again."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.data.tokenizer_json import JsonTokenizer
from bitnet.engine.engine import Engine
from bitnet.engine.text import TextStream
from bitnet.generate import encode_prompt
from bitnet.model import ModelConfig, Transformer
from tests.helpers.columns import Columns, columns

__all__ = ["columns"]  # a fixture


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = "def main() -> None:\n    return  # the end of the thing.\n\n" * 50
    path = tmp_path_factory.mktemp("engine") / "tokenizer.model"
    return train_tokenizer([text], 300, path, 1)


@pytest.fixture(scope="module")
def json_tokenizer() -> Tokenizer:
    """Byte-level BPE; a few merges cross the borders of characters."""
    models = pytest.importorskip("tokenizers")
    backend = models.Tokenizer(models.models.BPE())
    backend.pre_tokenizer = models.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = models.decoders.ByteLevel()
    trainer = models.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=models.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CONTINUED] * 20, trainer)
    return JsonTokenizer("made", backend.to_str().encode())


def cut_by_bytes(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int], stop: list[str]
) -> tuple[str, list[int], bool]:
    """Text and tokens before the first stop string to be complete, by counting tokens' bytes."""
    start = tokenizer.count_bytes(prompt)
    text = tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]
    ends = [tokenizer.count_bytes([*prompt, *ids[:n]]) - start for n in range(len(ids) + 1)]
    for end in ends:
        so_far = text.encode()[:end].decode(errors="ignore")
        if found := [so_far.index(one) for one in stop if one in so_far]:
            before = len(text[: min(found)].encode())
            return text[: min(found)], ids[: sum(e <= before for e in ends) - 1], True
    return text, ids, False


STOPS = [
    ["the end"], [".\n\n"], ["\n\n"], ["e"], ["nothing like it"], ["thing.", "end of"],
    ["return  # the end of the thing.\n\nX", "# the"], ["é"], ["😀"], ["\n", " "], ["def mainly"],
    ["g.\n", ".", "hing"],
]  # fmt: skip


CONTINUED = "main() -> None:\n    return  # the end of the thing.\n\nnaïve café 😀 end"


@pytest.mark.parametrize("stop", STOPS, ids=[repr(stop)[:24] for stop in STOPS])
def test_text_and_tokens_end_before_a_stop_string(tokenizer: Tokenizer, stop: list[str]) -> None:
    prompt = encode_prompt(tokenizer, "def ")
    ids = tokenizer.encode("def " + CONTINUED)[len(prompt) - 1 :]
    assert [*prompt[1:], *ids] == tokenizer.encode("def " + CONTINUED)
    text, tokens, stops = cut_by_bytes(tokenizer, prompt, ids, stop)
    stream, printed, settled = TextStream(tokenizer, prompt, stop), "", 0
    for token in ids:
        printed += stream.push(token)
        assert text.startswith(printed)
        assert settled <= stream.settled <= len(tokens)  # nothing is taken back
        settled = stream.settled
        if stream.stopped:
            break
    assert stream.stopped == stops
    assert printed + stream.finish() == text
    assert ids[: stream.settled] == tokens


def test_only_what_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    byte = {char: tokenizer.encode(char)[-1] for char in "abcx"}
    stream = TextStream(tokenizer, encode_prompt(tokenizer, "a"), ["abab", "bc"])
    pushed = [(stream.push(byte[char]), stream.settled) for char in "bxabax"]
    assert pushed == [("", 0), ("bx", 2), ("", 2), ("", 2), ("", 2), ("abax", 6)]
    assert [stream.push(byte[char]) for char in "abc"] == ["", "", "a"]
    assert (stream.stopped, stream.settled, stream.finish()) == (True, 7, "")


def test_text_is_decoded_from_a_border_not_from_the_start(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode(CONTINUED * 40)
    streams = [TextStream(tokenizer, [tokenizer.eos_id], stop) for stop in ((), ("zz", "  # t"))]
    decode, most = Tokenizer.decode, 0

    def counted(self: Tokenizer, tokens: list[int]) -> str:
        nonlocal most
        most = max(most, len(tokens))
        return decode(self, tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    for token in ids[:1000]:
        streams[0].push(token)
    for token in ids:
        streams[1].push(token)
        if streams[1].stopped:
            break
    assert most < 40


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_of_any_tokens_equals_their_full_decoding(
    tokenizer: Tokenizer, json_tokenizer: Tokenizer, seed: int
) -> None:
    """After each token, against everything decoded anew: random tokens, bytes that are characters
    or none, control tokens, spaces."""
    rng = random.Random(seed)
    one = tokenizer if seed % 3 else json_tokenizer
    texts = [
        "naïve 😀",
        "  \n\n the",
        "日本語 テスト\u200d",
        "\N{REPLACEMENT CHARACTER}",
        "def main",
    ]

    def draw_ids() -> list[int]:
        ids = [rng.randrange(one.vocab_size) for _ in range(rng.randint(0, 6))]
        encoded = one.encode(rng.choice(texts))
        return [*ids, *(token for token in encoded if rng.random() < 0.95)]

    prompt = [[], [one.eos_id], draw_ids(), encode_prompt(one, rng.choice(texts))][seed % 4]
    if seed % 4 == 2:  # may have ended in bytes that are no character
        prompt = [*prompt, *one.encode("x")]
    start = one.decode(prompt)
    stream, printed, expected, ids = TextStream(one, prompt), "", "", list(prompt)
    for _ in range(40):
        for token in draw_ids():
            ids.append(token)
            printed += stream.push(token)
            whole = one.decode(ids)
            for _ in range(3):
                whole = whole.removesuffix("\N{REPLACEMENT CHARACTER}")
            # bytes that become a U+FFFD of the text itself are held back a second time
            expected += whole[len(start) + len(expected) :]
            assert printed == expected
    assert printed + stream.finish() == one.decode(ids)[len(start) :]
    assert stream.finish() == ""


@pytest.mark.parametrize(
    "tail", ["\N{REPLACEMENT CHARACTER}", "x" + "\N{REPLACEMENT CHARACTER}" * 5]
)
def test_a_prompt_that_ends_in_a_replacement_character_is_not_said_again(
    tokenizer: Tokenizer, tail: str
) -> None:
    prompt = encode_prompt(tokenizer, "bad " + tail)
    stream = TextStream(tokenizer, prompt, ["zz"])
    ids = tokenizer.encode("def 😀 end")
    printed = "".join(stream.push(token) for token in ids) + stream.finish()
    assert printed == tokenizer.decode([*prompt, *ids]).removeprefix("bad " + tail) == " def 😀 end"


def test_a_prompt_that_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    emoji = tokenizer.encode("😀")[-4:]
    prompt = [*tokenizer.encode("ab"), *emoji[:2]]
    stream = TextStream(tokenizer, prompt)
    assert [stream.push(token) for token in emoji[2:]] == ["", "😀"]
    broken = TextStream(tokenizer, prompt)
    x = tokenizer.encode("ax")[-1]
    assert broken.push(x) + broken.finish() == tokenizer.decode([*prompt, x]).removeprefix("ab")


@pytest.fixture
def saying(
    columns: type[Columns], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[int]], Engine]:
    """An engine that generates these tokens, over and over."""
    model = Transformer(ModelConfig(d_model=2, n_layers=1, vocab_size=300, max_seq_len=64))

    def make(ids: list[int]) -> Engine:
        say = staticmethod(lambda row: ids[(len(row) - 1) % len(ids)])
        monkeypatch.setattr(columns, "following", say)
        return Engine(model, tokenizer, max_batch=2)

    return make


def test_generation_ends_at_a_stop_string(
    saying: Callable[[list[int]], Engine], tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("the end of the thing.\n\ndef")
    engine = saying(ids)
    for stop in (["thing"], ["nd of"], ["\n"], ["zzz"], ["the thing."], ["the", "of"]):
        prompts = [[tokenizer.eos_id], [tokenizer.eos_id, *ids[:2]]]
        heard: list[list[int]] = [[], []]
        texts, reasons = ["", ""], ["", ""]

        def on_token(row: int, token: int, heard: list[list[int]] = heard) -> None:
            heard[row].append(token)

        def on_text(row: int, text: str, texts: list[str] = texts) -> None:
            assert text
            texts[row] += text

        def on_stop(row: int, reason: str, reasons: list[str] = reasons) -> None:
            reasons[row] = reason

        n = len(ids) - 2
        new = engine.generate(
            prompts, n, stop=stop, on_token=on_token, on_text=on_text, on_stop=on_stop
        )
        for row, prompt in enumerate(prompts):
            begin = 2 * row
            text, tokens, stops = cut_by_bytes(tokenizer, prompt, ids[begin : begin + n], stop)
            assert (texts[row], new[row], reasons[row]) == (
                text, tokens, "stop" if stops else "length",
            )  # fmt: skip
            assert heard[row] == tokens
            assert list(engine.stream(prompt, n, stop=stop)) == tokens


def test_text_held_back_is_handed_out_when_a_row_ends(
    saying: Callable[[list[int]], Engine], tokenizer: Tokenizer
) -> None:
    ids = [*tokenizer.encode("the thi"), tokenizer.eos_id]
    heard: list[tuple[int, str]] = []
    for n in (20, len(ids) - 1):
        new = saying(ids).generate(
            [[]],
            n,
            eos_id=tokenizer.eos_id,
            stop=["the thing"],
            on_text=lambda *event: heard.append(event),
            on_stop=lambda *event: heard.append(event),
        )
        assert new == [ids[:-1]]
    assert heard == [(0, "the thi"), (0, "eos"), (0, "the thi"), (0, "length")]


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_stop_strings_may_come_from_an_iterator(
    saying: Callable[[list[int]], Engine], tokenizer: Tokenizer, kind: Any
) -> None:
    ids = tokenizer.encode("the end of the thing")
    new = saying(ids).generate([[1], [1]], len(ids), stop=kind([" of"]))
    assert [tokenizer.decode(row) for row in new] == ["the end"] * 2
