"""The body of a GPU step, run on a CPU: not captured, with the operators' CPU implementations."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.engine.cuda import CudaRunner
from bitnet.engine.decoder import Decoder
from bitnet.engine.state import State
from bitnet.engine.weights import ModelWeights, packed_copy, quantized_head
from bitnet.model import Transformer
from bitnet_kernels import bit_planes, pack_ternary
from tests.helpers.decoding import CONTEXT, VARIANTS, make_prompts, packed_model, prefill
from tests.helpers.native_reference import compare, hard_attention


@pytest.mark.parametrize("cache", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gpu_body_gives_the_same(variant: str, cache: torch.dtype) -> None:
    """Three rows in a bucket of four."""
    model = packed_model(**VARIANTS[variant])
    decoder = Decoder(model, 4, CONTEXT, cache_dtype="fp32" if cache != torch.int8 else "int8")
    state = State.empty(model.config, 4, CONTEXT, cache, torch.device("cpu"))
    runner = CudaRunner(
        model.config, ModelWeights.of(packed_copy(model), fused=True), state, (4,), "auto"
    )
    prompts = make_prompts([3, 20, 9])
    errors = []
    with torch.inference_mode():
        for either in (decoder, runner):
            prefill(either, prompts, 8)
        runner.batch.fill_(3)
        for step in range(12):
            assert state.lengths.tolist() == decoder.lengths.tolist()
            assert state.chosen[:3].tolist() == state.logits[:3].argmax(-1).tolist()
            live = slice(0 if step <= 6 else 1, 3)  # row 0, once ended, may see anything
            expected = decoder.logits[live]
            errors.append(float((state.logits[live] - expected).norm() / expected.norm()))
            state.active[0] = decoder.active[0] = int(step < 6)
            state.tokens.copy_(decoder.tokens)  # the same inputs, should a choice differ
            decoder.step(3)
            runner.step_body(4)
    assert state.lengths.tolist() == [9, 32, 21, 0]
    assert state.logits[3].count_nonzero() == 0
    # The norms round in another order, which sometimes flips an int8 code: 1 / 127 of one of 32
    # inputs.
    assert max(errors) < 2e-2
    assert sorted(errors)[len(errors) // 2] < 1e-2


@torch.inference_mode()
def generated(model: Transformer, cache: torch.dtype) -> Iterator[tuple[list[int], State, Tensor]]:
    """Three prompts, prefilled in chunks of 8, and 20 greedy steps in a bucket of four: the tokens
    of each row, the state, and the row's last 21 logits."""
    state = State.empty(model.config, 4, CONTEXT, cache, torch.device("cpu"))
    weights = ModelWeights.of(packed_copy(model), fused=True)
    runner = CudaRunner(model.config, weights, state, (4,), "auto")
    prompts, logits = make_prompts([3, 20, 9]), []
    prefill(runner, prompts, 8)
    runner.batch.fill_(3)
    for _ in range(20):
        logits.append(state.logits[:3].clone())
        for row, token in enumerate(state.tokens[:3].tolist()):
            prompts[row].append(token)
        runner.step_body(4)
    logits.append(state.logits[:3].clone())
    for row, ids in enumerate(prompts):
        yield ids, state, torch.stack(logits, 1)[row]


CACHES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("variant", ["ternary", "row"])
def test_the_gpu_body_is_the_reference(variant: str, cache: torch.dtype) -> None:
    """To the last bit, but for the head's sums: with hard attention."""
    model = hard_attention(packed_model(**VARIANTS[variant]))
    for row, (ids, state, logits) in enumerate(generated(model, cache)):
        compare(model, ids, state, row, logits, sure=0.9)


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_the_gpu_body_attends_as_the_reference(cache: torch.dtype) -> None:
    """In one layer, where bounds are tight enough to be sure of half of the tokens' codes."""
    model = packed_model(**VARIANTS["row"], n_layers=1)
    for row, (ids, state, logits) in enumerate(generated(model, cache)):
        compare(model, ids, state, row, logits, sure=0.4)


@torch.inference_mode()
@pytest.mark.parametrize("part", ["eps", "weight", "query", "value", "logits"])
def test_a_step_that_computes_otherwise_is_found(part: str) -> None:
    """An eps 1.5 times as large; one weight of the last layer; a query longer by 2^-12; one value
    that is held; the logits of one token."""
    model = packed_model(**VARIANTS["row"], n_layers=1)
    for row, (ids, state, logits) in enumerate(generated(model, torch.float32)):
        compare(model, ids, state, row, logits, sure=0.4)
        other = copy.deepcopy(model)
        layer: Any = other.layers[0]
        if part == "eps":
            layer.input_layernorm.eps *= 1.5
        elif part == "weight":
            codes = layer.mlp.down_proj.codes()
            codes[3, 5] = (codes[3, 5] + 2) % 3 - 1
            layer.mlp.down_proj.packed = pack_ternary(codes)
        elif part == "query":
            layer.self_attn.q_proj.scale[:8] *= 1 + 2**-12
        elif part == "value":
            state.kv[0, 1, row, 2, 1] = torch.nextafter(
                state.kv[0, 1, row, 2, 1], torch.tensor(9.0)
            )
        else:
            logits[:, 7] += 1e-3
        with pytest.raises(AssertionError, match="times the bound"):
            compare(other, ids, state, row, logits, sure=0)


def runner_of(model: Transformer, max_len: int, head: str = "float") -> tuple[CudaRunner, State]:
    """A runner of two rows, and its state."""
    weights = ModelWeights.of(packed_copy(model), fused=True)
    if head == "int8":
        weights = replace(weights, head=quantized_head(weights.head, "int8"))
    state = State.empty(model.config, 2, max_len, torch.float32, torch.device("cpu"))
    return CudaRunner(model.config, weights, state, (2,), "auto"), state


@torch.inference_mode()
def test_the_gpu_body_tells_a_damaged_row_and_stops_a_full_one() -> None:
    model = packed_model()
    model.embed_tokens.weight[7] = torch.nan
    runner, state = runner_of(model, 4)
    runner.prefill(torch.tensor([[1, 7], [2, 3]]), [2, 2])
    assert state.chosen.tolist() == [-1, int(state.logits[1].argmax())]
    assert state.tokens.tolist()[0] == 0
    runner.batch.fill_(2)
    for _ in range(3):
        runner.step_body(2)
    assert state.lengths.tolist() == [4, 4]
    held = state.kv[:, :, 1, :, :4].clone()
    runner.step_body(2)
    assert torch.equal(state.kv[:, :, 1, :, :4], held)


@torch.inference_mode()
def test_the_gpu_body_with_a_head_of_int8() -> None:
    """An 8-bit head changes the logits by about a hundredth of their norm."""
    model, logits = packed_model(), {}
    for head in ("float", "int8"):
        runner, state = runner_of(model, 8, head)
        runner.prefill(torch.tensor([[1, 2], [3, 4]]), [2, 2])
        logits[head] = state.logits
    error = (logits["int8"] - logits["float"]).norm() / logits["float"].norm()
    assert 0 < error < 0.03


def test_the_gpu_body_with_bit_planes() -> None:
    model = packed_model()
    weights = ModelWeights.of(packed_copy(model), fused=True, planes=True)
    qkv: Any = weights.layers[0].qkv[0]
    assert torch.equal(qkv.planes, bit_planes(qkv.packed))
    assert ModelWeights.of(packed_copy(model), fused=True).layers[0].qkv[0].planes is None  # type: ignore[union-attr]
