import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from torch import Tensor

from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.engine.decoder import Decoder
from bitnet.engine.engine import Engine
from bitnet.engine.request import SamplingFields, SamplingParams
from bitnet.engine.sampling import next_token_probabilities
from bitnet.engine.text import TextStream
from bitnet.export.folder import save_model
from bitnet.generate import encode_prompt, generate
from bitnet.linear import pack
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError
from tests.helpers.decoding import greedy_by_hand

EOS = 1


def markov(table: Tensor, max_seq_len: int = 16) -> Transformer:
    """A model whose next-token logits are a table's row for the last token, to fp32's precision:
    its layers add nothing, the embedding is one-hot, and the head holds the table.

    NaN in a row of the table makes all its logits NaN; an infinite row makes them overflow.
    """
    n = len(table)
    width = n + n % 2
    config = ModelConfig(d_model=width, n_layers=1, vocab_size=n, max_seq_len=max_seq_len,
                         linear="fp", tie_embeddings=False, norm_eps=1e-9)  # fmt: skip
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.zero_()
        finite = table.nan_to_num(nan=0.0, posinf=3e38, neginf=-3e38)
        scale = torch.where(finite.abs() < 1e38, width**0.5, 1.0)  # of a normalized one-hot vector
        model.embed_tokens.weight.copy_(torch.eye(n, width))
        model.embed_tokens.weight[table.isnan().any(1)] = math.nan
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :n] = (finite / scale).t()
    return model


def chain(successor: list[int]) -> Tensor:
    """Logits under which token i is followed by successor[i]."""
    return torch.nn.functional.one_hot(torch.tensor(successor), len(successor)).float()


def small_model(**fields: Any) -> Transformer:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2}
    model = Transformer(
        ModelConfig(vocab_size=61, max_seq_len=40, tie_embeddings=False, **shape, **fields)
    )
    with torch.no_grad():  # far from ties, and what a token says depends on those before it
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.ndim == 1 else 15.0)
    return model


PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [3, 60, 2], [20] * 12]


# Against the model without a cache


@pytest.mark.parametrize("linear", ["fp", "ternary"])
@pytest.mark.parametrize("placement", ["sub_norm", "in_linear"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[3:], PROMPTS], ids=["1", "12", "mixed"])
def test_greedy_texts_are_those_of_the_model(
    linear: Any, placement: Any, prompts: list[list[int]]
) -> None:
    model = small_model(linear=linear, norm_placement=placement).double().eval()
    texts = [greedy_by_hand(model, prompt, 20)[0] for prompt in prompts]
    assert len({tuple(text) for text in texts}) == len(prompts)
    assert len(set(texts[0])) > 3  # not one token over and over
    assert generate(model, prompts, 20) == texts


def test_packed_weights_give_the_same_tokens() -> None:
    model = small_model()
    expected = generate(model, PROMPTS, 20)
    packed = pack(model)
    assert isinstance(packed, Transformer)
    assert generate(packed, PROMPTS, 20) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_the_others(temperature: float) -> None:
    model = small_model(linear="fp")
    together = generate(model, PROMPTS, 18, temperature=temperature, top_p=0.95, seed=5)
    alone = [
        generate(model, [prompt], 18, temperature=temperature, top_p=0.95, seed=5 + row)[0]
        for row, prompt in enumerate(PROMPTS)
    ]
    assert together == alone


def test_seed_decides_and_the_global_generator_is_left_alone() -> None:
    model = small_model()
    state = torch.get_rng_state()
    first = generate(model, PROMPTS, 20, temperature=1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert generate(model, PROMPTS, 20, temperature=1.0, seed=3) == first
    assert generate(model, PROMPTS, 20, temperature=1.0, seed=4) != first


def test_params_and_keywords_say_the_same() -> None:
    """A keyword replaces a field of the params; a name that is no field is an error."""
    model = small_model()
    params = SamplingParams(temperature=1.0, top_k=20, top_p=0.95, seed=3)
    expected = generate(model, PROMPTS, 20, temperature=1.0, top_k=20, top_p=0.95, seed=3)
    assert generate(model, PROMPTS, 20, params) == expected
    assert generate(model, PROMPTS, 20, replace(params, seed=9), seed=3) == expected
    engine = Engine(model, max_batch=4)
    assert engine.generate(PROMPTS, 20, params) == expected
    assert list(engine.stream(PROMPTS[0], 20, params)) == expected[0]
    assert set(SamplingFields.__annotations__) == {field.name for field in fields(SamplingParams)}
    for call in (engine.generate, engine.stream):
        with pytest.raises(TypeError, match="temprature"):
            call([[1]], 2, temprature=1.0)  # type: ignore[arg-type, operator]


def test_training_mode_is_restored() -> None:
    model = small_model().train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    generate(model, [[2]], 2)
    assert [module.training for module in model.modules()] == modes


# Where rows end


def run(model: Transformer, prompts: list[list[int]], n: int, **options: Any) -> tuple[Any, ...]:
    tokens: list[tuple[int, int]] = []
    stops: dict[int, str] = {}
    new = generate(
        model,
        prompts,
        n,
        on_token=lambda row, token: tokens.append((row, token)),
        on_stop=lambda row, reason: stops.update({row: reason}),
        **options,
    )
    for row, ids in enumerate(new):
        assert [token for r, token in tokens if r == row] == ids
    return new, tokens, stops


def test_rows_end_at_eos_each_for_itself() -> None:
    model = markov(chain([2, 1, 3, 4, 1]))  # 0 -> 2 -> 3 -> 4 -> EOS = 1 -> 1 -> ...
    new, tokens, stops = run(model, [[4], [0], [0, 3], [2]], 3, eos_id=EOS)
    assert new == [[], [2, 3, 4], [4], [3, 4]]
    assert tokens == [(1, 2), (2, 4), (3, 3), (1, 3), (3, 4), (1, 4)]
    assert stops == {0: "eos", 1: "length", 2: "eos", 3: "eos"}


def test_without_an_eos_id_length_alone_ends_a_row() -> None:
    new, _, stops = run(markov(chain([2, 1, 3, 4, 1])), [[4], [2]], 3)
    assert new == [[1, 1, 1], [3, 4, 1]]
    assert stops == {0: "length", 1: "length"}


def test_nothing_is_computed_once_all_rows_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(Decoder, "step", lambda self, batch: steps.append(batch))
    assert generate(markov(chain([1, 1])), [[0], [0, 0]], 10, eos_id=EOS) == [[], []]
    assert steps == []


def test_the_context_limit_ends_a_row_and_says_so() -> None:
    model = markov(chain([0, 0]), max_seq_len=8)
    new, _, stops = run(model, [[0] * 7, [0], [0] * 5], 4)
    assert [len(ids) for ids in new] == [1, 4, 3]
    assert stops == {0: "context", 1: "length", 2: "context"}


def test_a_real_model_fills_its_context() -> None:
    model = small_model().double().eval()
    new, _, stops = run(model, [[5] * 39, [5]], 100)
    assert stops == {0: "context", 1: "context"}
    assert new == [greedy_by_hand(model, [5] * n, 40 - n)[0] for n in (39, 1)]


def test_an_empty_prompt_is_the_start_of_a_document() -> None:
    model = markov(chain([0, 3, 0, 2]))
    assert generate(model, [[], [3]], 2, eos_id=EOS) == [[3, 2], [2, 0]]
    assert generate(model, [], 2) == []
    assert generate(model, [[0], [1]], 0) == [[], []]


def test_rows_of_the_model_that_are_no_tokens_are_never_chosen() -> None:
    table = torch.tensor([[1.0, 2.0, 3.0, 1e6]] * 4)
    assert generate(markov(table), [[0]], 2) == [[3, 3]]
    assert generate(markov(table), [[0]], 2, vocab_size=3) == [[2, 2]]
    sampled = generate(markov(table), [[0]] * 50, 2, vocab_size=3, temperature=1.0)
    assert {token for ids in sampled for token in ids} == {0, 1, 2}


# Mistakes


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[0] * 16], {}, "prompt 0 has 16 tokens and leaves no room in the model's context of 16"),
        ([[0], [3, 4, 5]], {}, "prompt 1 holds token ids 3 to 5; the model has 0 to 4"),
        ([[-1]], {}, "prompt 0 holds token ids -1"),
        ([[0], []], {}, "prompt 1 is empty"),
        ([[0]], {"temperature": -0.1}, "temperature must be"),
        ([[0]], {"temperature": math.nan}, "temperature must be"),
        ([[0]], {"temperature": math.inf}, "temperature must be"),
        ([[0]], {"top_k": -1}, "top_k must be"),
        ([[0]], {"top_p": 0.0}, "top_p must be"),
        ([[0]], {"top_p": 1.1}, "top_p must be"),
        ([[0]], {"top_p": math.nan}, "top_p must be"),
        ([[0]], {"max_new_tokens": -1}, "max_new_tokens must be"),
        ([[0]], {"seed": -1}, "seed must be"),
        ([[0]], {"seed": 2**62 + 1}, "seed must be"),
        ([[0]], {"vocab_size": -1}, r"vocab_size must be 0 \(all\) to 5"),
        ([[0]], {"vocab_size": 6}, r"vocab_size must be 0 \(all\) to 5"),
        ([[0]], {"eos_id": 5}, "eos_id must be 0 to 4"),
        ([[0]], {"eos_id": -1}, "eos_id must be 0 to 4"),
        ([[0]], {"stop": "ab"}, "stop must be a list of strings"),
        ([[0]], {"stop": ["a", ""]}, "stop must be a list of strings, none empty"),
        ([[0]], {"stop": ["a"]}, "tokenizer; it has none"),
        ([[0], [1.5]], {}, "prompt 1 must be a list of token ids"),
        ([[0], "ab"], {}, "prompt 1 must be a list of token ids"),
        ([0, 1], {}, "prompt 0 must be a list of token ids, got 0"),
        (None, {}, "prompts must be a list of lists"),
        ("ab", {}, "prompts must be a list of lists"),
        ([[0]], {"stop": None}, "stop must be a list of strings"),
        ([[0]], {"stop": 5}, "stop must be a list of strings"),
        ([[0]], {"stop": b"a"}, "stop must be a list of strings"),
        ([[0]], {"temperature": "a"}, "temperature must be a number, got 'a'"),
        ([[0]], {"temperature": True}, "temperature must be a number, got True"),
        ([[0]], {"top_p": None}, "top_p must be a number, got None"),
        ([[0]], {"top_k": 2.5}, "top_k must be an integer, got 2.5"),
        ([[0]], {"top_k": True}, "top_k must be an integer, got True"),
        ([[0]], {"vocab_size": 2.5}, "vocab_size must be an integer"),
        ([[0]], {"seed": 1.5}, "seed must be an integer"),
        ([[0]], {"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
        ([[0]], {"max_new_tokens": True}, "max_new_tokens must be an integer"),
        ([[0]], {"eos_id": 1.5}, "eos_id must be an integer"),
        ([[0]], {"eos_id": False}, "eos_id must be an integer"),
        ([[0]], {"params": None}, "params must be a SamplingParams, got None"),
        ([[0]], {"params": {"top_k": 1}}, "params must be a SamplingParams, got {'top_k': 1}"),
        ([[0]], {"params": SamplingParams}, "params must be a SamplingParams, got <class"),
    ],
)
def test_mistakes_are_named(prompts: list[list[int]], options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(markov(chain([0] * 5)), prompts, **{"max_new_tokens": 3} | options)


@pytest.mark.parametrize("eos_id", [torch.tensor(EOS), np.int32(EOS), [torch.tensor(EOS)]])
def test_integers_of_other_libraries_end_a_text(eos_id: Any) -> None:
    new = generate(markov(chain([2, 0, 1])), [[0]], 9, eos_id=eos_id, seed=np.uint8(255))
    assert new == [[2]]


def test_sampling_params_are_plain_values() -> None:
    ids = [np.int64(2), torch.tensor(EOS)]
    params = SamplingParams(
        top_k=np.int64(3), seed=np.uint8(255), eos_id=ids, vocab_size=np.int8(5)
    )  # type: ignore[arg-type]
    ids.append(np.int64(4))
    assert params == SamplingParams(top_k=3, seed=255, eos_id=(2, EOS), vocab_size=5)
    assert params.seed + 1 == 256, "a uint8 would be 0, or an error"
    assert hash(params) == hash(SamplingParams(top_k=3, seed=255, eos_id=(2, EOS), vocab_size=5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    table = chain([0, 1, 2])
    table[2] = bad
    with pytest.raises(UserError, match="logits for token 0 after prompt 1 are NaN or infinite"):
        generate(markov(table), [[0], [2]], 3, temperature=temperature)


def test_broken_logits_of_a_finished_row_disturb_no_one() -> None:
    table = chain([0, 1, 1])
    table[1] = math.nan  # what follows EOS is never looked at
    for temperature in (0.0, 1e-6):
        new = generate(markov(table), [[2], [0]], 3, temperature=temperature, eos_id=EOS)
        assert new == [[], [0, 0, 0]]


# Sampling


def brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Temperature, top-k, top-p one token at a time in float64, most likely first."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    order = order[:top_k] if top_k else order
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in order}
    total = sum(weights.values())
    kept: dict[int, float] = {}
    for i in order:
        if sum(kept.values()) >= top_p * total:
            break
        kept[i] = weights[i]
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 37, 100])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 1.0])
def test_probabilities_equal_brute_force(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(5, 37, generator=torch.Generator().manual_seed(0)) * 2
    got = next_token_probabilities(logits, temperature, top_k, top_p)
    expected = [brute_force(row, temperature, top_k, top_p) for row in logits.tolist()]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-7)
    assert ((got == 0).numpy() == (np.array(expected) == 0)).all()


def test_probabilities_at_the_edges() -> None:
    ties = torch.zeros(1, 4)
    assert int((next_token_probabilities(ties, 1.0, top_k=3) > 0).sum()) == 3
    assert int((next_token_probabilities(ties, 1.0, top_p=0.5) > 0).sum()) == 2
    assert int((next_token_probabilities(ties, 1.0, top_p=0.51) > 0).sum()) == 3
    tiny = next_token_probabilities(torch.tensor([[-1e30, 3e4, 2e4]]), 1e-30)
    assert tiny.tolist() == [[0, 1, 0]]
    masked = next_token_probabilities(torch.tensor([[-math.inf, 0.0, 0.0]]), 1.0, top_p=0.99)
    assert masked.tolist() == [[0, 0.5, 0.5]]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.7}])
def test_samples_follow_the_distribution(options: dict[str, Any]) -> None:
    logits = [0.3, -1.0, 1.2, 0.1, 0.9, -0.2]
    rows = 2000
    model = markov(torch.tensor([logits] * 6))
    new = generate(model, [[0]] * rows, 2, temperature=0.8, seed=11, **options)
    expected = brute_force(logits, 0.8, **{"top_k": 0, "top_p": 1.0} | options)
    for position in (0, 1):
        counts = Counter(ids[position] for ids in new)
        for token, probability in enumerate(expected):
            deviation = math.sqrt(rows * probability * (1 - probability))
            assert abs(counts[token] - rows * probability) <= 4 * deviation
    pairs = Counter((a, b) for a, b in new)  # successive draws are independent
    both = expected[2] * expected[4]
    assert abs(pairs[2, 4] - rows * both) <= 4 * math.sqrt(rows * both * (1 - both))


# Text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = "def main() -> None:\n    return  # the end of the thing\n" * 50
    return train_tokenizer([text], 300, tmp_path_factory.mktemp("tok") / "tokenizer.model", 1)


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that puts no space before a text, unlike ours."""
    path = tmp_path_factory.mktemp("tok") / "plain"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the end of the thing is the end"] * 50),
        model_prefix=str(path),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return Tokenizer(path.with_suffix(".model"))


TEXTS = [
    "def main() -> None:\n    return 1",
    "  the end",
    "\tthe  thing \n\n",
    "smile 😀 and family 👨‍👩‍👧 done",
    "naïve café — 日本語のテキスト",
    "a real \N{REPLACEMENT CHARACTER} in the text",
    "ends with \N{REPLACEMENT CHARACTER}",
    "😀",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("which", ["tokenizer", "plain_tokenizer"])
def test_stream_prints_the_text_in_whole_characters(
    text: str, which: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(which)
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids)
    stream, printed = TextStream(tokenizer), ""
    for token in ids:
        printed += stream.push(token)
        assert decoded.startswith(printed)
    assert printed + stream.finish() == decoded
    assert stream.finish() == ""


@pytest.mark.parametrize("start", ["", "the", "the end", "the end of"])
@pytest.mark.parametrize("which", ["tokenizer", "plain_tokenizer"])
def test_stream_continues_its_prompt(
    start: str, which: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(which)
    whole = encode_prompt(tokenizer, "the end of the thing")
    prompt = encode_prompt(tokenizer, start)
    assert whole[: len(prompt)] == prompt
    stream = TextStream(tokenizer, prompt)
    printed = "".join(stream.push(token) for token in whole[len(prompt) :])
    assert printed == "the end of the thing".removeprefix(start)


def test_an_emoji_waits_for_its_last_byte(plain_tokenizer: Tokenizer) -> None:
    ids = plain_tokenizer.encode("😀!")
    stream = TextStream(plain_tokenizer)
    assert [stream.push(token) for token in ids] == ["", "", "", "😀", "!"]


def test_bytes_that_are_no_character_are_not_held_back_for_ever(
    plain_tokenizer: Tokenizer,
) -> None:
    byte = plain_tokenizer.encode("😀")[-1]  # a continuation byte with nothing to continue
    stream = TextStream(plain_tokenizer)
    printed = [stream.push(byte) for _ in range(10)]
    assert printed == [""] * 3 + ["\N{REPLACEMENT CHARACTER}"] * 7
    held_and_next = stream.push(plain_tokenizer.encode("x")[0])
    assert held_and_next == "\N{REPLACEMENT CHARACTER}" * 3 + "x"


def test_stream_of_random_tokens_adds_up_to_their_decoding(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    for length in (1, 2, 5, 50):
        for _ in range(20):
            ids = rng.integers(0, tokenizer.vocab_size, length).tolist()
            stream = TextStream(tokenizer)
            printed = "".join(stream.push(token) for token in ids) + stream.finish()
            assert printed == tokenizer.decode(ids)


def test_a_prompt_starts_as_a_document_does(tokenizer: Tokenizer) -> None:
    assert encode_prompt(tokenizer, "the end") == [tokenizer.eos_id, *tokenizer.encode("the end")]
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_id]


# The command

Bitnet = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("generate") / "model"
    model = Transformer(ModelConfig(depth=1, vocab_size=tokenizer.vocab_size, max_seq_len=64))
    save_model(path, model, tokenizer)
    return path


@pytest.mark.parametrize("more", [(), ("--prompt", "the")])
def test_the_command_ends_text_before_a_stop_string(
    bitnet: Bitnet, folder: Path, tokenizer: Tokenizer, more: tuple[str, ...]
) -> None:
    args = ("generate", folder, "--prompt", "def", *more, "--max-new-tokens", "24", "--seed", "3")
    code, whole, err = bitnet(*args)
    assert code == 0
    first = whole.removeprefix("--- 1\n").split("\n--- 2\n")[0].removesuffix("\n")
    assert first.startswith("def")
    text = first.removeprefix("def")
    prompts = [encode_prompt(tokenizer, prompt) for prompt in ("def", *more[1:])]
    assert re.fullmatch(
        rf"{sum(map(len, prompts))} prompt and {24 * len(prompts)} new tokens; "
        r"first after \d+\.\d{3} s, then \d+\.\d tokens/s\n",
        err,
    )
    middle = re.findall("[ -~]", text)[-1]  # of an untrained model's text, a whole character
    begin = text.index(middle)
    assert begin > 0
    code, out, _ = bitnet(*args, "--stop", "not there", "--stop", middle)
    assert code == 0
    assert out.startswith(("--- 1\n" if more else "") + "def" + text[:begin] + "\n")
    assert len(out) < len(whole)
    assert bitnet(*args, "--stop", "")[0] == 2


def test_the_commands_dtypes_reach_the_engine(bitnet: Bitnet, folder: Path) -> None:
    args = ("generate", folder, "--max-new-tokens", "4", "--temperature", "0")
    assert bitnet(*args, "--kv", "fp32", "--head", "float")[:2] == bitnet(*args)[:2]
    assert bitnet(*args, "--kv", "int8", "--head", "int8")[0] == 0
    assert bitnet(*args, "--kv", "int8", "--head", "bf16")[0] == 0
    code, _, err = bitnet(*args, "--kv", "fp8")
    assert code == 2
    assert "int8" in err


def test_the_guides_code_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parents[1] / "docs/generation.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", guide, re.S))
    exec(code.replace("runs/quickstart/model-packed", str(folder)), {})
    out = capsys.readouterr().out
    assert out.startswith("def main")
    assert re.search(r"\d tokens/s; \d+ reused$", out)


@pytest.mark.parametrize("prompts", [["def"], ["def", "the"]])
def test_ctrl_c_keeps_the_text_so_far(
    bitnet: Bitnet, folder: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["generate", folder, "--max-new-tokens", "20", "--temperature", "0"]
    args += [word for prompt in prompts for word in ("--prompt", prompt)]
    whole = bitnet(*args)[1]
    step, steps = Decoder.step, 0

    def interrupted(self: Decoder, batch: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        step(self, batch)

    monkeypatch.setattr(Decoder, "step", interrupted)
    code, out, err = bitnet(*args)
    assert code == 130
    assert out.endswith("\n")
    assert f"{6 * len(prompts)} new tokens" in err
    for part, of in zip(out.split("--- "), whole.split("--- "), strict=True):
        assert of.startswith(part.removesuffix("\n"))
    assert len("".join(prompts)) < len(out) < len(whole)
    # what may have become a stop string is printed all the same
    text = whole.removeprefix("--- 1\n").split("\n--- 2\n")[0].removeprefix("def")
    steps = 0
    assert bitnet(*args, "--stop", text[: len(text) - 2] + "never")[:2] == (130, out)
