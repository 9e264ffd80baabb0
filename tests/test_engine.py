"""The engine: against the model run by hand, and its bookkeeping against a cache of tokens.

The first half runs real models. The second replaces the decoder by `Columns`, whose cache holds
the tokens themselves and whose next token is a hash of all a row holds: a column that is stale,
missing or another row's changes every token after it.
"""

import gc
import math
import random
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet.engine import engine as engine_module
from bitnet.engine.decoder import Decoder
from bitnet.engine.engine import Engine
from bitnet.engine.prefix import keep, place, share
from bitnet.engine.sampling import choose, draw, next_token_probabilities, uniforms
from bitnet.engine.text import TextStream, encode_prompt
from bitnet.generate import generate
from bitnet.linear import BitLinear, pack
from bitnet.model import ModelConfig, Transformer, as_transformer
from bitnet.qat.adapters import AdapterConfig, add_adapters
from bitnet.qat.prepare import prepare
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError
from bitnet.tokenizer import Tokenizer, train_tokenizer
from bitnet.tokenizer_json import JsonTokenizer

VOCAB, CONTEXT = 61, 48


def model_of(kind: str) -> Transformer:
    """Far from ties: what is likely depends on all the tokens, and the margins are wide."""
    torch.manual_seed(0)
    linear: Any = "ternary" if kind in ("ternary", "packed") else "fp"
    config = ModelConfig(
        d_model=32, n_heads=4, n_kv_heads=2, n_layers=2, vocab_size=VOCAB, max_seq_len=CONTEXT,
        tie_embeddings=False, linear=linear,
    )  # fmt: skip
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.ndim == 1 else 15.0)
    if kind == "packed":
        return as_transformer(pack(model))
    if kind == "qat":
        return as_transformer(prepare(model, Recipe(weights="int", bits=4)))
    if kind == "lora":
        add_adapters(model, AdapterConfig(kind="lora", rank=4))
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_prompts(n: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [1, 2, longest, *(rng.randint(1, longest) for _ in range(n - 3))]
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


@torch.no_grad()
def by_hand(model: Transformer, prompt: list[int], n: int, margin: float = 2e-5) -> list[int]:
    """Greedy by running the whole sequence again for each token: no cache, no batch, no engine.

    Ends at a choice closer than ``margin`` of the logits' size, which says nothing. fp32 sums of
    K <= 128 terms added up in another order differ by some sqrt(K) 2^-24 = 7e-7 of their size, a
    dozen of them one after the other by 1e-5. Where activations are rounded to int8, such a
    difference now and then moves one by a step of 1/127, and the logits by some 1e-3.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    ids = list(prompt)
    for _ in range(n):
        logits = model(torch.tensor([ids]))[0, -1]
        first, second = logits.topk(2).values.tolist()
        if first - second < margin * float(logits.abs().max()):
            break
        ids.append(int(logits.argmax()))
    for module, mode in training.items():
        module.training = mode
    return ids[len(prompt) :]


PROMPTS = random_prompts(20)
N = 6


@pytest.fixture(scope="module", params=["fp", "ternary", "packed"])
def model_and_texts(request: pytest.FixtureRequest) -> tuple[Transformer, list[list[int]], Any]:
    """A model, 20 prompts of 1 to 30 tokens and their continuations, no choice of which is close;
    the prompts are searched with the oracle alone."""
    model = model_of(request.param)
    margin = 2e-5 if request.param == "fp" else 4e-3
    prompts, texts = [], []
    for prompt in random_prompts(200):
        if len(text := by_hand(model, prompt, N, margin)) == N:
            prompts.append(prompt)
            texts.append(text)
        if len(prompts) == 20:
            return model, prompts, texts
    raise AssertionError(f"only {len(prompts)} prompts without a close choice")


@pytest.mark.parametrize("max_batch", [1, 8])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_tokens_equal_the_model_run_by_hand(
    model_and_texts: tuple[Transformer, list[list[int]], Any], max_batch: int, chunk: int
) -> None:
    model, prompts, texts = model_and_texts
    assert len({len(prompt) for prompt in prompts}) > 10
    assert len({tuple(text) for text in texts}) > 15  # two prompts may lead into the same loop
    engine = Engine(model, max_batch=max_batch, chunk=chunk)  # waves of 1, and of 8, 8 and 4
    assert engine.generate(prompts, N) == texts
    assert engine.generate(prompts[::-1], N) == texts[::-1]  # in a used cache
    assert list(engine.stream(prompts[2], N)) == texts[2]


@pytest.mark.parametrize("kind", ["fp", "packed", "qat", "lora"])
def test_reused_prefixes_change_no_token(kind: str) -> None:
    model = model_of(kind)
    engine = Engine(model, max_batch=4, chunk=7)
    system = PROMPTS[2][:20]
    first = [[*system, 3], [*system, 5, 8], [7, 9], [*system[:11], 2, 2]]
    answers = engine.generate(first, 8)
    assert answers == [by_hand(model, prompt, 8) for prompt in first]
    assert engine.stats.reused_tokens == 20 + 11  # the second and the fourth prompt, in the call
    conversation = [*first[0], *answers[0], 17, 4]
    second = [
        conversation,  # a whole earlier conversation, its last token never fed
        [*first[1][:15], 1, 1, 1],  # departs in the middle
        [*system, 5, 8, answers[1][0], 60],
    ]
    answers = engine.generate(second, 8)
    assert answers == [by_hand(model, prompt, 8) for prompt in second]
    assert engine.stats.reused_tokens == (21 + 7) + 15 + 23
    assert engine.generate(second, 8) == Engine(model, max_batch=4).generate(second, 8) == answers
    assert engine.stats.reused_tokens == sum(len(prompt) - 1 for prompt in second)


@pytest.mark.parametrize("kind", ["qat", "lora", "ternary"])
def test_a_model_in_training_is_sampled_and_left_as_it_was(kind: str) -> None:
    model = model_of(kind).train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    texts = [by_hand(model, prompt, 4) for prompt in PROMPTS[:3]]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert generate(model, PROMPTS[:3], 4) == texts
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model(torch.tensor([PROMPTS[2]])).sum().backward()  # still has its gradients
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=float(parameter.std()) or 0.1)
    texts = [by_hand(model, prompt, 4) for prompt in PROMPTS[:3]]
    assert generate(model, PROMPTS[:3], 4) == texts  # of the weights as they are now


def test_nothing_is_kept_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Decoder]] = []

    def make(*args: Any, **options: Any) -> Decoder:
        decoder = Decoder(*args, **options)
        made.append(weakref.ref(decoder))
        return decoder

    monkeypatch.setattr(engine_module, "Decoder", make)
    model = model_of("ternary").train()
    gc.disable()  # what only a collection would free lives too long
    try:
        generate(model, PROMPTS[:2], 3, temperature=1.0)
        assert [decoder() for decoder in made] == [None]
    finally:
        gc.enable()


def test_a_stream_changes_modes_only_while_it_computes() -> None:
    model = model_of("ternary").train()
    engine = Engine(model)
    stream = engine.stream([5, 6], 4)
    tokens = []
    for token in stream:
        tokens.append(token)
        assert all(module.training for module in model.modules())
        assert torch.is_grad_enabled()
    assert tokens == by_hand(model, [5, 6], 4)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.95, "seed": 4}])
def test_an_interrupted_stream_leaves_the_engine_usable(options: dict[str, Any]) -> None:
    model = model_of("packed")
    engine = Engine(model, max_batch=2, chunk=7)
    (whole,) = Engine(model).generate([PROMPTS[2]], N, **options)
    stream = engine.stream(PROMPTS[2], N, **options)
    assert [next(stream) for _ in range(4)] == whole[:4]
    stream.close()  # type: ignore[attr-defined]
    assert list(engine.stream(PROMPTS[2], N, **options)) == whole
    assert engine.stats.reused_tokens == len(PROMPTS[2]) - 1
    assert engine.generate([[*PROMPTS[2], *whole[:3], 1], [4]], 5) == [
        by_hand(model, [*PROMPTS[2], *whole[:3], 1], 5),
        by_hand(model, [4], 5),
    ]


def test_broken_logits_do_not_poison_the_rows() -> None:
    """NaN keys and values of a token whose embedding is damaged stay behind no later prompt."""
    model = model_of("fp")
    with torch.no_grad():
        model.embed_tokens.weight[60] = math.nan
    engine = Engine(model, max_batch=2, chunk=7)
    for bad in ([60], [3] * 20 + [60], [60] * 40):
        with pytest.raises(UserError, match="logits for token 0 after prompt 1 are NaN"):
            engine.generate([[1, 2], bad], 3)
        with pytest.raises(UserError, match="are NaN or infinite"):
            next(engine.stream(bad, 3))
    prompts = [[3] * 25, [1, 2]]
    assert engine.generate(prompts, 6) == [by_hand(model, prompt, 6) for prompt in prompts]


def test_weights_are_quantized_once_and_never_by_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, quantize, calls = model_of("ternary"), BitLinear.quantize, 0

    def counted(self: BitLinear) -> Any:
        nonlocal calls
        calls += 1
        return quantize(self)

    monkeypatch.setattr(BitLinear, "quantize", counted)
    engine = Engine(model)
    n_layers = sum(isinstance(module, BitLinear) for module in model.modules())
    assert calls == n_layers == 14
    assert len(list(engine.stream([1, 2], 5))) == 5
    engine.generate([[1, 2], [3]], 5)
    assert calls == n_layers


def test_callbacks_run_in_the_callers_modes() -> None:
    model = model_of("qat").train()
    engine = Engine(model, max_batch=2)
    modes: set[tuple[bool, bool]] = set()

    def look(row: int, token: int) -> None:
        modes.update((part.training, torch.is_grad_enabled()) for part in model.modules())

    assert engine.generate([[5, 6]], 4, on_token=look) == [by_hand(model, [5, 6], 4)]
    assert modes == {(True, True)}


@pytest.mark.parametrize("kind", ["packed", "fp"])
def test_an_engine_does_not_keep_the_model(kind: str) -> None:
    model = model_of(kind)
    expected = by_hand(model, [5, 6], 4)
    engine = Engine(model, max_batch=2)
    attention = model.layers[0].self_attn
    fused = attention.q_proj.packed if kind == "packed" else attention.q_proj.weight  # type: ignore[attr-defined]
    gone = [weakref.ref(one) for one in (model, model.layers[1], attention, fused)]
    del model, attention, fused
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4
    assert engine.generate([[5, 6]], 4) == [expected]


def test_an_engine_refuses_a_model_that_changed() -> None:
    model = model_of("fp")
    engine = Engine(model)
    stream = engine.stream([1, 2], 3)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    for call in (lambda: engine.generate([[1, 2]], 3), lambda: next(stream)):
        with pytest.raises(UserError, match="weights changed"):
            call()
    assert Engine(model).generate([[1, 2]], 3) == [by_hand(model, [1, 2], 3)]


def test_an_engine_refuses_a_model_that_a_fused_optimizer_changed() -> None:
    """Such a step does not raise torch's count of changes (torch 2.13)."""
    model = model_of("fp")
    engine = Engine(model)
    tokens = torch.tensor([[1, 2, 3]])
    model(tokens).sum().backward()
    assert engine.generate([[1, 2]], 3)
    torch.optim.AdamW(model.parameters(), fused=True).step()
    with pytest.raises(UserError, match="weights changed"):
        engine.generate([[1, 2]], 3)


# The bookkeeping


class Columns:
    """A decoder whose cache holds tokens, as strict as its interface: columns past a row's length
    are worth nothing, and each step writes one there, into every row of its bucket."""

    following: ClassVar[Callable[[tuple[int, ...]], int]]
    prefilled: ClassVar[list[tuple[int, ...]]] = []
    fail_at_step: ClassVar[int] = -1

    def __init__(self, model: Transformer, max_batch: int, max_len: int, **options: Any) -> None:
        self.chunk = options["chunk"]
        self.device = torch.device("cpu")
        self.max_batch, self.max_len = max_batch, max_len
        self.rows = [[-1] * max_len for _ in range(max_batch)]
        self.lengths = torch.zeros(max_batch, dtype=torch.int32)
        self.active = torch.ones(max_batch, dtype=torch.int32)
        self.tokens = torch.zeros(max_batch, dtype=torch.int64)
        self.chosen = torch.zeros(max_batch, dtype=torch.int64)
        self.logits = torch.full((max_batch, VOCAB), -math.inf)
        self.steps = 0
        self.modules: tuple[torch.nn.Module, ...] = ()

    def _answer(self, row: int, length: int) -> None:
        token = type(self).following(tuple(self.rows[row][:length]))
        self.logits[row] = torch.nn.functional.one_hot(torch.tensor(token), VOCAB).float() * 50
        self.chosen[row] = self.tokens[row] = token

    def step(self, batch: int) -> None:
        self.steps += 1
        assert 1 <= batch <= self.max_batch
        bucket = min(self.max_batch, 1 << (batch - 1).bit_length())
        for row in range(bucket):
            length = int(self.lengths[row])
            if length == self.max_len:
                assert not self.active[row]
                continue
            self.rows[row][length] = int(self.tokens[row])
            if self.steps == self.fail_at_step:
                continue
            if row < batch:
                self._answer(row, length + 1)
            self.lengths[row] += self.active[row]
        if self.steps == self.fail_at_step:
            raise KeyboardInterrupt

    def prefill(self, tokens: Tensor, n_valid: list[int]) -> None:
        assert tokens.dtype == torch.int64
        assert tokens.shape == (len(n_valid), max(n_valid))
        assert len(n_valid) <= self.max_batch
        assert 1 <= max(n_valid) <= self.chunk
        self.prefilled.append(tuple(n_valid))
        for row, n in enumerate(n_valid):
            begin = int(self.lengths[row])
            assert begin + n <= self.max_len
            self.rows[row][begin : begin + n] = tokens[row, :n].tolist()
            self.lengths[row] += n
            if n:
                self._answer(row, begin + n)

    def check_weights(self) -> None: ...

    def copy_prefix(self, source: int, target: int, n: int) -> None:
        assert source != target
        self.rows[target] = self.rows[source][:n] + [-1] * (self.max_len - n)
        self.lengths[target] = n

    def set_length(self, row: int, n: int) -> None:
        assert -1 not in self.rows[row][:n]
        self.lengths[row] = n


def hashed(ids: tuple[int, ...]) -> int:
    assert -1 not in ids
    return hash(ids) % VOCAB


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> type[Columns]:
    monkeypatch.setattr(engine_module, "Decoder", Columns)
    monkeypatch.setattr(Columns, "following", staticmethod(hashed), raising=False)
    monkeypatch.setattr(Columns, "prefilled", [])
    return Columns


def config_only(context: int = CONTEXT) -> Transformer:
    return Transformer(ModelConfig(d_model=2, n_layers=1, vocab_size=VOCAB, max_seq_len=context))


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
    """Each turn of three conversations, one prompt a call, computes only what is new in it; also
    where the caller goes on from fewer tokens than were generated."""
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


def test_keep() -> None:
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


# Sampling


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.8}])
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    """Chi-square of 2^17 draws: a right sampler exceeds df + 5 sqrt(2 df) once in a million."""
    logits = torch.randn(1, 37, generator=torch.Generator().manual_seed(1)) * 1.5
    probabilities = next_token_probabilities(logits, 0.8, **options)[0].double()
    n = 2**17
    numbers = uniforms(5, n)
    drawn = torch.cat(
        [choose(logits.expand(512, -1), 0.8, uniforms_B=u, **options) for u in numbers.split(512)]
    )
    counts = drawn.bincount(minlength=37).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * n
    assert expected.min() > 5
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    df = int(possible.sum()) - 1
    assert chi_square < df + 5 * math.sqrt(2 * df)


def test_top_p_among_the_top_k_sorts_no_vocabulary() -> None:
    sorted_widths = []

    class Sorts(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "sort" in func.__name__:
                sorted_widths.append(args[0].shape[-1])
            return func(*args, **kwargs or {})

    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    with Sorts():
        cut = next_token_probabilities(logits, 0.8, 50, 0.9)
        next_token_probabilities(logits, 0.8, 0, 0.9)
    assert sorted_widths == [1000]  # of the second call alone
    assert (cut > 0).sum(-1).max() <= 50


def test_draw_inverts_the_distribution() -> None:
    quarters = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])  # sums exact in binary
    numbers = [0.0, 0.2499999, 0.25, 0.7499999, 0.75, 1 - 2**-50]
    drawn = draw(quarters.expand(6, -1), torch.tensor(numbers, dtype=torch.float64))
    assert drawn.tolist() == [1, 1, 3, 3, 4, 4]
    third = torch.full((1, 3), 1 / 3)  # fp32: adds up to a little more than 1
    last = torch.tensor([1 - 2**-50], dtype=torch.float64)
    assert draw(third, last).tolist() == [2]
    assert draw(third * 0.999, last).tolist() == [2]


def test_numbers_of_a_seed_are_a_sequence() -> None:
    long = uniforms(3, 1000)
    for n in (1, 5, 15, 16, 17, 100):
        assert torch.equal(uniforms(3, n), long[:n])
    assert not torch.equal(uniforms(4, 1000), long)
    assert 0 <= float(long.min()) < float(long.max()) < 1


def test_a_shorter_sample_is_the_beginning_of_a_longer_one() -> None:
    engine = Engine(model_of("fp"), max_batch=4)
    long = engine.generate(PROMPTS[:6], 15, temperature=1.0, seed=7)
    short = Engine(model_of("fp"), max_batch=3).generate(PROMPTS[:6], 4, temperature=1.0, seed=7)
    assert [text[:4] for text in long] == short
    assert list(engine.stream(PROMPTS[5], 15, temperature=1.0, seed=12)) == long[5]


# Stop strings


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


def scripted(ids: list[int]) -> Callable[[tuple[int, ...]], int]:
    return lambda row: ids[(len(row) - 1) % len(ids)]


def test_generation_ends_at_a_stop_string(
    columns: type[Columns], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode("the end of the thing.\n\ndef")
    monkeypatch.setattr(engine_module, "Decoder", type("Wide", (Wide,), {}))
    monkeypatch.setattr(Columns, "following", staticmethod(scripted(ids)))
    model = Transformer(ModelConfig(d_model=2, n_layers=1, vocab_size=300, max_seq_len=64))
    engine = Engine(model, tokenizer, max_batch=2)
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


class Wide(Columns):
    """Columns with the tokenizer's ids."""

    def _answer(self, row: int, length: int) -> None:
        self.chosen[row] = self.tokens[row] = self.following(tuple(self.rows[row][:length]))


def test_text_held_back_is_handed_out_when_a_row_ends(
    columns: type[Columns], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [*tokenizer.encode("the thi"), tokenizer.eos_id]
    monkeypatch.setattr(engine_module, "Decoder", Wide)
    monkeypatch.setattr(Columns, "following", staticmethod(scripted(ids)))
    model = Transformer(ModelConfig(d_model=2, n_layers=1, vocab_size=300, max_seq_len=64))
    heard: list[tuple[int, str]] = []
    for n in (20, len(ids) - 1):
        new = Engine(model, tokenizer).generate(
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
    columns: type[Columns], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    ids = tokenizer.encode("the end of the thing")
    monkeypatch.setattr(engine_module, "Decoder", Wide)
    monkeypatch.setattr(Columns, "following", staticmethod(scripted(ids)))
    model = Transformer(ModelConfig(d_model=2, n_layers=1, vocab_size=300, max_seq_len=64))
    new = Engine(model, tokenizer).generate([[1], [1]], len(ids), stop=kind([" of"]))
    assert [tokenizer.decode(row) for row in new] == ["the end"] * 2
