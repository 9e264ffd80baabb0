"""The engine's bookkeeping of its cache: it uses nothing stale and computes nothing twice. The
tests use a cache that holds the tokens themselves."""

import random
from contextlib import suppress
from typing import Any

import pytest

from bitnet.engine.engine import Engine
from bitnet.engine.prefix import keep, place, share
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError
from tests.helpers.columns import VOCAB, Columns, columns, hashed

__all__ = ["columns"]  # a fixture
CONTEXT = 48


def config_only() -> Transformer:
    return Transformer(ModelConfig(d_model=2, n_layers=1, vocab_size=VOCAB, max_seq_len=CONTEXT))


def by_hash(prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(hashed(tuple(ids)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_calls_gives_what_a_fresh_engine_gives(
    columns: type[Columns], seed: int
) -> None:
    rng = random.Random(seed)
    engine = Engine(config_only(), max_batch=rng.choice([1, 3, 5, 8]), chunk=rng.choice([1, 4, 50]))
    known = [[rng.randrange(VOCAB)] for _ in range(4)]
    for _ in range(60):
        prompts = []
        for _ in range(rng.randint(1, 11)):
            base = rng.choice(known)
            begin = base[: rng.choice([len(base), rng.randint(0, len(base))])]
            prompts.append((begin + [rng.randrange(3) for _ in range(rng.randint(1, 9))])[:46])
        n, eos = rng.randint(1, 9), rng.choice([None, rng.randrange(VOCAB)])
        expected = []
        for prompt in prompts:
            text = by_hash(prompt, min(n, CONTEXT - len(prompt)))
            expected.append(text[: text.index(eos)] if eos in text else text)
        if rng.random() < 0.3:
            stream = engine.stream(prompts[0], n, eos_id=eos)
            taken = [token for token, _ in zip(stream, range(rng.randint(0, n)), strict=False)]
            assert taken == expected[0][: len(taken)]
        if rng.random() < 0.2:  # broken off in the middle of a step
            columns.fail_at_step = engine.decoder.steps + 2  # type: ignore[attr-defined]
            with suppress(KeyboardInterrupt):
                engine.generate(prompts, n)
            columns.fail_at_step = -1
        assert engine.generate(prompts, n, eos_id=eos) == expected
        known = [*known, *([*p, *e] for p, e in zip(prompts, expected, strict=True))][-12:]


def test_what_is_there_is_not_computed_again(columns: type[Columns]) -> None:
    engine = Engine(config_only(), max_batch=4, chunk=8)
    system = list(range(20))
    prompts = [[*system, 50], [*system, 51, 52], [9], [*system, 51, 53]]
    assert engine.generate(prompts, 3) == [by_hash(prompt, 3) for prompt in prompts]
    # 20 shared by three, then 51 shared by two, then what is each prompt's own
    assert columns.prefilled == [(4,), (8,), (8,), (0, 1), (1, 1, 1, 1)]
    assert engine.stats.prompt_tokens == 21 + 22 + 1 + 22
    assert engine.stats.reused_tokens == 20 + 21
    assert engine.stats.new_tokens == 12
    assert engine.stats.decoded_tokens == 8
    columns.prefilled.clear()
    continued = [*prompts[3], *by_hash(prompts[3], 3), 1]  # of row 3, but the one row is row 0
    assert engine.generate([continued], 3) == [by_hash(continued, 3)]
    assert columns.prefilled == [(2,)]  # the last token, which was never fed, and the new one
    assert engine.stats.reused_tokens == 24


def test_the_same_prompt_many_times_is_computed_once(columns: type[Columns]) -> None:
    engine = Engine(config_only(), max_batch=8, chunk=16)
    assert engine.generate([list(range(17))] * 19, 2) == [by_hash(list(range(17)), 2)] * 19
    assert columns.prefilled == [(16,), (1,) * 8, (1,) * 8, (1,) * 3]


@pytest.mark.parametrize("stop_after", [9, 2])
def test_conversations_that_take_turns_are_remembered(
    columns: type[Columns], stop_after: int
) -> None:
    """Each turn of three conversations, one prompt per call, computes only its new tokens; also if
    the caller continues from fewer tokens than were generated."""
    engine = Engine(config_only(), max_batch=8)
    talks = [[n] * 6 for n in range(3)]
    for turn in range(4):
        for number, talk in enumerate(talks):
            new = by_hash(talk, 3)
            assert engine.generate([talk], 3) == [new]
            if turn:
                # the last token of a turn was never fed
                assert engine.stats.reused_tokens == len(talk) - 2 - (stop_after == 9)
            talks[number] = [*talk, *new[:stop_after], 50 + turn, 7][: CONTEXT - 4]


def test_a_full_cache_forgets_the_least_recently_used(columns: type[Columns]) -> None:
    engine = Engine(config_only(), max_batch=3)
    for first in (1, 2, 3, 1, 4):  # 2 makes room for 4
        engine.generate([[first] * 9], 1)
    for first, reused in ((4, 8), (1, 8), (2, 0)):
        engine.generate([[first] * 9], 1)
        assert engine.stats.reused_tokens == reused


def test_keep_copies_over_the_least_useful_row() -> None:
    held = [[1, 2, 3], [4, 5], [1, 2], [], [6]]
    assert keep(held, [5, 5, 4, 0, 3], [1], [2, 3, 4]) == [(1, 3, 2)]
    # over its own beginning, or over nothing, else over the oldest
    assert keep(held, [5, 5, 4, 0, 3], [0], [2, 4]) == [(0, 2, 3)]
    assert keep(held, [5, 5, 4, 0, 3], [1], [2, 4]) == [(1, 4, 2)]
    assert keep(held, [2, 5, 4, 0, 3], [0, 1], [4]) == [(1, 4, 2)]  # the later one of two
    assert keep(held, [5, 2, 4, 0, 3], [1], [2, 4]) == []  # not over what was used since
    assert keep(held, [5, 5, 4, 0, 3], [0], []) == []


def test_a_call_begun_within_another_ends_that_one(columns: type[Columns]) -> None:
    engine = Engine(config_only(), max_batch=2)
    stream = engine.stream([1, 2], 9)
    assert next(stream) == by_hash([1, 2], 1)[0]
    assert engine.generate([[3]], 2) == [by_hash([3], 2)]
    with pytest.raises(UserError, match="broken off"):
        next(stream)
    with pytest.raises(UserError, match="broken off"):
        engine.generate(
            [[1], [2], [3]], 4, on_token=lambda *_: list(engine.stream([5], 1)) and None
        )
    assert engine.generate([[1, 2]], 9) == [by_hash([1, 2], 9)]


def test_the_context_is_the_engines(columns: type[Columns]) -> None:
    reasons: dict[int, str] = {}
    engine = Engine(config_only(), max_batch=2, max_len=16)
    new = engine.generate(
        [[1] * 15, [2], [3] * 12], 9, on_stop=lambda row, reason: reasons.update({row: reason})
    )
    assert [len(text) for text in new] == [1, 9, 4]
    assert reasons == {0: "context", 1: "length", 2: "context"}
    with pytest.raises(UserError, match=r"engine's max_len of 16 \(the model's context of 48\)"):
        engine.generate([[1], [2] * 16], 1)
    for options, message in (
        ({"max_len": 49}, "max_len must be 0"),
        ({"max_len": -1}, "max_len must be 0"),
        ({"max_batch": 0}, "max_batch must be 1"),
        ({"chunk": 0}, "chunk must be 1"),
    ):
        with pytest.raises(UserError, match=message):
            Engine(config_only(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"max_batch": 65}, {"cache_dtype": "fp8"}, {"head": "int4"}, {"kernel": "fast"}]
)
def test_what_the_decoder_refuses_is_the_users_mistake(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Engine(config_only(), **options)


def test_mistakes_show_before_the_first_token(columns: type[Columns]) -> None:
    engine = Engine(config_only())
    with pytest.raises(UserError, match="prompt 0 holds token ids 99"):
        engine.stream([99], 3)
    with pytest.raises(UserError, match="temperature"):
        engine.stream([9], 3, temperature=-1)
    with pytest.raises(UserError, match="stop strings and on_text need"):
        engine.generate([[9]], 3, on_text=lambda *_: None)
    assert engine.generate([], 3) == []
    assert engine.generate([[1], [2]], 0) == [[], []]
    assert columns.prefilled == []


def test_place_moves_only_what_it_must() -> None:
    held = [[1, 2, 3, 4], [5, 6, 7], [5, 6, 8, 9]]
    # the first two want each other's row, and get it; the third wants a copy of what row 0 had
    assert place(held, [[5, 6, 7, 0], [1, 2, 3, 4, 0], [1, 2, 0]]) == (
        [1, 0, 2], [3, 4, 0], [(0, 2, 2)],
    )  # fmt: skip
    assert place(held, [[5, 6, 8, 9]]) == ([0], [0], [(2, 0, 3)])  # its last token is computed
    assert share([[1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 6], [1, 2]], [0, 0, 0, 1]) == [
        [(0, 1, 2)],
        [(1, 2, 3)],
    ]


@pytest.mark.parametrize("seed", range(20))
def test_copies_never_read_what_was_overwritten(seed: int) -> None:
    rng = random.Random(seed)

    def ids() -> list[int]:
        return [rng.randrange(2) for _ in range(rng.randint(1, 7))]

    held = [ids() for _ in range(8)]
    prompts = [ids() for _ in range(rng.randint(1, 8))]
    rows, kept, copies = place(held, prompts)
    assert sorted(rows) == list(range(len(prompts)))
    prompt_in = dict(zip(rows, prompts, strict=True))
    now = {row: prompt_in[row][:n] for row, n in zip(rows, kept, strict=True)}
    assert all(held[row][: len(ids)] == ids for row, ids in now.items())
    memory = [list(row) for row in held]
    for source, target, n in copies:
        memory[target] = memory[source][:n]
        assert memory[target] == prompt_in[target][:n]
        now[target] = memory[target]
    for row, prompt in prompt_in.items():  # as much as any row had
        best = max(
            sum(1 for n in range(1, len(prompt)) if other[:n] == prompt[:n]) for other in held
        )
        assert len(now[row]) == best
