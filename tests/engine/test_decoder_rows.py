"""The rows of a decoder are independent; an ended or damaged row harms no other."""

from typing import Any

import pytest
import torch

from bitnet.engine.decoder import Decoder
from bitnet.engine.modules import ModuleRunner
from bitnet.linear import BitLinear
from tests.helpers.decoding import (
    CONTEXT,
    VOCAB,
    greedy,
    make_prompts,
    packed_model,
    prefill,
)
from tests.helpers.runners import Runner, runner

__all__ = ["runner"]  # a fixture


def test_rows_do_not_see_each_other(runner: Runner) -> None:
    """Each row computes what the model computes for its tokens alone; here with a ternary head."""
    model = runner.model()
    head = BitLinear(32, VOCAB, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    prompts = make_prompts([9, 30, 70, 3])
    decoder = runner.decoder(model, 4, CONTEXT, chunk=11)
    texts, logits = greedy(decoder, prompts, 20)
    for row, (prompt, tokens) in enumerate(zip(prompts, texts, strict=True)):
        runner.check(model, prompt + tokens[:-1], decoder, row, logits[row])


def test_a_row_that_ended_keeps_what_it_holds(runner: Runner) -> None:
    model, prompts = runner.model(), make_prompts([5, 12])
    decoder = runner.decoder(model, 2, CONTEXT)
    prefill(decoder, prompts, 16)
    decoder.active[0] = 0
    before, logits = decoder._state.kv[:, :, 0, :, :5].clone(), decoder.logits[0].clone()
    token = decoder.tokens[0].clone()
    for _ in range(70):
        decoder.step(2)
    assert decoder.lengths.tolist() == [5, 82]
    assert torch.equal(decoder._state.kv[:, :, 0, :, :5], before)
    decoder.active[0] = 1
    decoder.tokens[0] = token
    decoder.step(1)
    assert int(logits.argmax()) == int(token)
    runner.check(model, [*prompts[0], int(token)], decoder, 0, decoder.logits[:1])


@pytest.mark.parametrize("max_len", [63, 64, 70])
def test_a_full_row_writes_nothing(runner: Runner, max_len: int) -> None:
    model, prompts = runner.model(), make_prompts([60, 60])
    decoder = runner.decoder(model, 2, max_len)
    prefill(decoder, prompts, decoder.chunk)
    decoder.active[1] = 0
    for _ in range(max_len - 60):
        decoder.step(2)
    before = decoder._state.kv[:, :, :, :, :max_len].clone()
    for _ in range(3):
        decoder.step(2)
    assert decoder.lengths.tolist() == [max_len, 60]
    after = decoder._state.kv[:, :, :, :, :max_len]
    assert torch.equal(after[:, :, 0], before[:, :, 0])
    assert torch.equal(after[:, :, 1, :, :60], before[:, :, 1, :, :60])
    with pytest.raises(ValueError, match=f"row 0: {max_len} \\+ 1 tokens exceed max_len"):
        decoder.prefill(torch.tensor([[1]]), [1])


def test_shared_prefixes_and_truncation(runner: Runner) -> None:
    model = runner.model()
    (prompt,) = make_prompts([40])
    decoder = runner.decoder(model, 3, CONTEXT)
    decoder.prefill(torch.tensor([prompt]), [40])
    decoder.copy_prefix(0, 2, 25)
    assert decoder.lengths.tolist() == [40, 0, 25]
    decoder.set_length(0, 10)
    decoder.prefill(torch.tensor([[4, 5, 0], [0, 0, 0], [1, 2, 3]]), [2, 0, 3])
    for row, ids in ((2, [*prompt[:25], 1, 2, 3]), (0, [*prompt[:10], 4, 5])):
        runner.check(model, ids, decoder, row, decoder.logits[row : row + 1])
        assert int(decoder.chosen[row]) == int(decoder.logits[row].argmax())


@pytest.mark.parametrize("cache_dtype", ["fp32", "bf16", "int8"])
def test_what_an_ended_row_wrote_is_forgotten_too(runner: Runner, cache_dtype: Any) -> None:
    """An inactive row writes a column beyond its length; here it writes NaN."""
    model = runner.model()
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
    decoder = runner.decoder(model, 1, CONTEXT, cache_dtype=cache_dtype)
    decoder.prefill(torch.tensor([[1, 2, 3, 4, 5]]), [5])
    decoder.active[0] = 0
    decoder.tokens[0] = 7
    decoder.step(1)
    assert int(decoder.chosen[0]) == -1
    decoder.set_length(0, 2)
    decoder.active[0] = 1
    decoder.tokens[0] = 3
    decoder.step(1)
    assert decoder.logits.isfinite().all()


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("cache_dtype", ["fp32", "int8"])
def test_a_prefill_that_was_broken_off_leaves_nothing(
    cache_dtype: Any, truncated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_model()
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
    decoder, sound = (
        Decoder(model, 2, CONTEXT, cache_dtype=cache_dtype, kernel="reference") for _ in range(2)
    )
    for one in (decoder, sound):
        one.prefill(torch.tensor([[1, 2, 3], [4, 5, 6]]), [3, 3])
    with monkeypatch.context() as broken:
        broken.setattr(ModuleRunner, "_logits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.prefill(torch.tensor([[7, 7, 7, 7], [7, 7, 7, 7]]), [4, 3])
    left = decoder._state.kv if decoder._state.scale is None else decoder._state.scale
    assert left[0, :, 0, :, 3:7].isnan().all()
    for one in (decoder, sound):
        if truncated:
            one.set_length(0, 2)
        one.tokens.fill_(5)
        one.step(2)
        assert one.logits.isfinite().all()
    assert torch.equal(decoder.logits, sound.logits)


@pytest.mark.parametrize("cache_dtype", ["fp32", "bf16", "int8"])
def test_a_damaged_row_is_told_and_harms_no_other_nor_the_next(
    runner: Runner, cache_dtype: Any
) -> None:
    model = runner.model()
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
        model.embed_tokens.weight[8, 3] = torch.inf
    prompts = [[1, 2, 7, 3], [1, 2, 3, 4], [8, 3]]
    decoder = runner.decoder(model, 3, CONTEXT, cache_dtype=cache_dtype)
    sound = runner.decoder(model, 3, CONTEXT, cache_dtype=cache_dtype)
    prefill(decoder, prompts, 16)
    prefill(sound, [[1], prompts[1], [2]], 16)
    assert decoder.chosen.tolist() == [-1, int(sound.chosen[1]), -1]
    assert decoder.tokens.tolist() == [0, int(sound.chosen[1]), 0]
    for _ in range(3):
        decoder.step(3)
        sound.step(3)
        assert decoder.chosen[[0, 2]].tolist() == [-1, -1]
        assert torch.equal(decoder.logits[1], sound.logits[1])
    for one in (decoder, sound):  # both at the same place: a row's sums may depend on it
        for row in (0, 2):
            one.set_length(row, 0)
            one.prefill(torch.tensor([[1], [1], [1]][: row + 1]), [0] * row + [1])
            one.tokens[row] = 5
        one.step(3)
    assert torch.equal(decoder.logits[[0, 2]], sound.logits[[0, 2]])
