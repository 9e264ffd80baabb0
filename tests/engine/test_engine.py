"""The engine against its model, which runs without a cache; in fp64 (tests/helpers/decoding.py)."""

import gc
import math
import weakref
from functools import cache
from typing import Any

import pytest
import torch

from bitnet.engine import engine as engine_module
from bitnet.engine.decoder import Decoder
from bitnet.engine.engine import Engine
from bitnet.generate import generate
from bitnet.linear import BitLinear, pack
from bitnet.model import Transformer, as_transformer
from bitnet.qat.adapters import AdapterConfig, add_adapters
from bitnet.qat.prepare import prepare
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError
from tests.helpers.decoding import greedy_by_hand, make_prompts, small_model

N = 6


def model_of(kind: str) -> Transformer:
    linear = "ternary" if kind in ("ternary", "packed") else "fp"
    model = small_model(torch.float64, linear=linear)
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


def prompts_of_all_lengths(n: int) -> list[list[int]]:
    """1 to 30 tokens long; the third is one of the longest."""
    return make_prompts([1, 2, *(30 - 7 * i % 30 for i in range(n - 2))])


PROMPTS = prompts_of_all_lengths(20)


def by_hand(model: Transformer, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens without the engine."""
    training = {module: module.training for module in model.modules()}
    tokens, _ = greedy_by_hand(model.eval(), prompt, n)
    for module, mode in training.items():
        module.training = mode
    return tokens


@cache
def texts_by_hand(kind: str) -> list[list[int]]:
    """Of :data:`PROMPTS`, each alone."""
    model = model_of(kind)
    return [by_hand(model, prompt, N) for prompt in PROMPTS]


@pytest.mark.parametrize("max_batch", [1, 8])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("kind", ["fp", "ternary", "packed"])
def test_texts_are_those_of_the_model(kind: str, max_batch: int, chunk: int) -> None:
    """Prompts in batches of 1, or of 8, 8 and 4; in a new cache and in a used one."""
    model, prompts = model_of(kind), PROMPTS
    assert len({len(prompt) for prompt in prompts}) > 10
    engine = Engine(model, max_batch=max_batch, chunk=chunk)
    texts = texts_by_hand(kind)
    assert len({tuple(text) for text in texts}) > 15  # two prompts may lead into the same loop
    assert engine.generate(prompts, N) == texts
    assert engine.generate(prompts[::-1], N) == texts[::-1]
    assert list(engine.stream(prompts[2], N)) == texts[2]


def continued(first: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
    """Prompts that share prefixes with earlier ones and their answers."""
    return [
        [*first[0], *answers[0], 17, 4],  # a whole conversation, its last token never fed
        [*first[1][:15], 1, 1, 1],  # departs in the middle
        [*first[1], answers[1][0], 60],
    ]


@pytest.mark.parametrize("kind", ["fp", "packed", "qat", "lora"])
def test_reused_prefixes_change_no_token(kind: str) -> None:
    model = model_of(kind)
    engine = Engine(model, max_batch=4, chunk=7)
    system = PROMPTS[2][:20]
    first = [[*system, 3], [*system, 5, 8], [7, 9], [*system[:11], 2, 2]]
    answers = engine.generate(first, 8)
    assert answers == [by_hand(model, prompt, 8) for prompt in first]
    assert engine.stats.reused_tokens == 20 + 11  # by the second and the fourth prompt
    second = continued(first, answers)
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
    texts = [by_hand(model, prompt, 4) for prompt in PROMPTS[:3]]  # of the weights as they are now
    assert generate(model, PROMPTS[:3], 4) == texts


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
    model = model_of("qat").train()
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
    model = model_of("fp")
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
    """NaN keys and values of a token with a damaged embedding do not reach a later prompt."""
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


@pytest.mark.parametrize("kind", ["packed", "fp", "ternary"])
def test_an_engine_does_not_keep_the_model(kind: str) -> None:
    """It shares the weights that it reads."""
    model = model_of(kind)
    expected = Engine(model, max_batch=2).generate([[5, 6]], 4)
    engine = Engine(model, max_batch=2)
    attention = model.layers[0].self_attn
    gone: list[weakref.ref[Any]] = [weakref.ref(one) for one in (model, model.layers[1], attention)]
    if kind == "ternary":
        gone.append(weakref.ref(attention.q_proj.weight))  # type: ignore[attr-defined]
    del model, attention
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)
    assert engine.generate([[5, 6]], 4) == expected


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
    """A fused step does not increase torch's count of changes (torch 2.13)."""
    model = model_of("fp")
    engine = Engine(model)
    tokens = torch.tensor([[1, 2, 3]])
    model(tokens).sum().backward()
    assert engine.generate([[1, 2]], 3)
    torch.optim.AdamW(model.parameters(), fused=True).step()
    with pytest.raises(UserError, match="weights changed"):
        engine.generate([[1, 2]], 3)
