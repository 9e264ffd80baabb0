"""Generation on the device that is here: captured steps, tokens, memory."""

import gc
import importlib
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from bitnet.engine.cuda import CudaRunner
from bitnet.engine.decoder import Decoder
from bitnet.engine.engine import Engine
from bitnet.engine.state import State
from bitnet.engine.weights import ModelWeights, packed_copy, quantized_head
from bitnet.linear import BitLinear, pack
from bitnet.model import Transformer, as_transformer
from tests.helpers.decoding import VARIANTS, greedy, make_prompts, prefill, small_model
from tests.helpers.on_device import OWN_WARNINGS, device, no_waits, size
from tests.helpers.small_training import assert_same

__all__ = ["device"]  # a fixture
pytestmark = OWN_WARNINGS


MAX_LEN = 270
MODEL = {"max_seq_len": MAX_LEN} | size({}, {"d_model": 320, "d_ff": 700, "vocab_size": 1003})


class Setup(NamedTuple):
    """A model and how a step keeps things, and how far its logits may be from the plain model's,
    as a share of their norm."""

    fields: Mapping[str, Any] = MappingProxyType({})
    limit: float = 5e-2
    """The norms add in another order, which now and then moves an int8 code by one, 1 / 127 of one
    input of a layer, and with it others behind it: up to 2.3% of the norm was seen."""
    dtype: torch.dtype = torch.float32
    cache: torch.dtype = torch.float32
    head: str = "float"
    bias: bool = False


SETUPS = {
    **{name: Setup(fields) for name, fields in VARIANTS.items() if "dense" not in name},
    "dense": Setup({"linear": "fp"}, 1e-4),  # fp32 sums in another order
    "bias": Setup(bias=True),
    # 2^-8 a rounding, a dozen of them in a row, and the int8 codes that these move.
    "bf16": Setup(dtype=torch.bfloat16, cache=torch.bfloat16, head="bf16", limit=0.1),
    "int8 cache": Setup(cache=torch.int8, limit=0.1),  # half of 1/127 of the head's largest
    "int8 head": Setup(head="int8", limit=0.1),
}


def model_on(device: torch.device, setup: Setup = SETUPS["ternary"]) -> Transformer:
    """Packed; as likely to be torn between tokens at any width as tests/helpers/decoding.py's."""
    model = small_model(**MODEL, **setup.fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.startswith("embed"):
                parameter.mul_((32 / model.config.d_model) ** 0.5)
        for layer in model.layers if setup.bias else ():
            mlp: Any = layer.mlp
            old, mlp.down_proj = mlp.down_proj, BitLinear(model.config.d_ff, model.config.d_model)
            mlp.down_proj.weight = old.weight
            mlp.down_proj.bias.uniform_(-0.3, 0.3)
    model = model.to(device, setup.dtype).eval()
    dense = model.config.linear == "fp"
    return model if dense else as_transformer(pack(model, kernel="reference"))


def runner_of(model: Transformer, setup: Setup) -> CudaRunner:
    """Eight rows in four buckets."""
    weights = ModelWeights.of(packed_copy(model), fused=True)
    if setup.head != "float":
        weights = replace(weights, head=quantized_head(weights.head, setup.head))  # type: ignore[arg-type]
    state = State.empty(model.config, 8, MAX_LEN, setup.cache, weights.embedding.device)
    return CudaRunner(model.config, weights, state, (1, 2, 4, 8), "auto")


def advance(runner: CudaRunner, batch: int, captured: bool) -> None:
    """A step; ``captured`` on a GPU."""
    if captured and runner.batch.device.type == "cuda":
        runner.step(batch)
        return
    runner.batch.fill_(batch)
    runner.step_body(next(bucket for bucket in runner.buckets if bucket >= batch))


@torch.inference_mode()
@pytest.mark.parametrize("name", SETUPS)
def test_captured_steps_are_those_that_are_not(device: torch.device, name: str) -> None:
    """Bit by bit, buckets in turns, rows that end among them."""
    model, runs = model_on(device, SETUPS[name]), []
    prompts = make_prompts([50, 3, 1, 17, 9, 20, 2, 33])
    for captured in (True, False):
        runner = runner_of(model, SETUPS[name])
        prefill(runner, prompts, 24)
        kept, state = [], runner.state
        for i, batch in enumerate([1, 3, 8, 8, 1, 3, 2, 8] * size(1, 6)):
            state.active[1] = i < 5
            advance(runner, batch, captured)
            kept += [state.logits.clone(), state.tokens.clone(), state.lengths.clone()]
        runs.append([*kept, state.kv, *([] if state.scale is None else [state.scale])])
        assert state.logits.isfinite().all()
    assert_same(*runs)


@torch.inference_mode()
@pytest.mark.parametrize("name", SETUPS)
def test_a_steps_logits_are_near_the_models(device: torch.device, name: str) -> None:
    """Three rows in a bucket of four, fed the same tokens as the plain modules, which run the whole
    sequence at once."""
    setup = SETUPS[name]
    model, runner = model_on(device, setup), runner_of(model_on(device, setup), setup)
    prompts, steps = make_prompts([3, 50, 9]), 16
    fed = torch.randint(61, (3, steps))
    prefill(runner, prompts, 24)
    kept = []
    for step in range(steps):
        runner.state.tokens[:3].copy_(fed[:, step])
        advance(runner, 3, captured=True)
        kept.append(runner.state.logits[:3].clone())
    assert runner.state.lengths.tolist() == [3 + steps, 50 + steps, 9 + steps, 0, 0, 0, 0, 0]
    assert not runner.state.logits[3:].any()  # computed, and not kept
    assert not runner.state.kv[:, :, 3:].any()
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt + fed[row].tolist()], device=device)
        want = model(ids)[0, len(prompt) :].float()
        ours = torch.stack(kept)[:, row]
        assert ((ours - want).norm(dim=1) / want.norm(dim=1)).max() < setup.limit, row


@torch.no_grad()
def assert_likely(
    model: Transformer, prompt: list[int], tokens: list[int], slack: float = 0.16
) -> None:
    """Each token is what the plain model chooses behind those before it, three in four at least;
    else it falls short by no more than ``slack`` of the logits' root mean square. Logits that are
    off by 2% of their norm (:class:`Setup`) are off by up to 8% in four standard deviations, the
    chosen one and the best: 16%. A token at random falls short by 200%."""
    ids = torch.tensor([prompt + tokens[:-1]], device=model.norm.weight.device)
    logits = model(ids)[0, len(prompt) - 1 :].float().cpu()
    chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    short = (logits.amax(1) - chosen) / logits.square().mean(1).sqrt()
    assert short.max() <= slack
    assert (short == 0).float().mean() >= 0.75


FP32 = {"cache_dtype": "fp32", "head": "float"}


@pytest.mark.parametrize("name", ["ternary", "dense", "group", "bias"])
def test_greedy_tokens(device: torch.device, name: str) -> None:
    """One row, three in a bucket of four, and eight; by every family of kernels the same bits."""
    model, prompts = model_on(device, SETUPS[name]), make_prompts([1, 17, 50, 3, 9, 30, 64, 5])
    kernels = ("auto", "addsub", "dot", "reference") if name == "ternary" else ("auto",)
    if device.type == "cpu":  # where the reference goes by the model's own modules
        kernels = kernels[:3]
    for batch in (1, 3, 8):
        runs = []
        for kernel in kernels:
            decoder = Decoder(model, 8, MAX_LEN, chunk=24, kernel=kernel, **FP32)  # type: ignore
            rows, logits = greedy(decoder, prompts[:batch], 24)
            runs.append([logits])
            for prompt, tokens in zip(prompts, rows, strict=False):
                assert_likely(model, prompt, tokens)
        for other in runs[1:]:
            assert_same(runs[0], other)


def test_engine(device: torch.device) -> None:
    """As it is by default, with 16 bits on a GPU; prompts in two batches, then continued."""
    model, prompts = model_on(device), make_prompts([5, 70, 1, 17, 33, 8])
    engine = Engine(model, max_batch=4, chunk=32)
    for _ in range(2):
        rows = engine.generate(prompts, 30)
        for prompt, tokens in zip(prompts, rows, strict=True):
            assert_likely(model, prompt, tokens, slack=0.3)
        prompts = [prompt + tokens for prompt, tokens in zip(prompts, rows, strict=True)]
    assert engine.stats.reused_tokens > 0


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@pytest.mark.parametrize(
    "options", [FP32, {"cache_dtype": "int8"}, {"cache_dtype": "bf16", "head": "bf16"}], ids=str
)
def test_200_steps_wait_for_nothing_and_allocate_nothing(
    device: torch.device, options: Any
) -> None:
    """Past three times 64 columns; and the tokens are right."""
    model, prompts = model_on(device), make_prompts([50, 3, 62])
    decoder = Decoder(model, 4, MAX_LEN, **options)
    prefill(decoder, prompts, 64)
    chosen = torch.zeros(201, 3, dtype=torch.int64, device=device)
    chosen[0].copy_(decoder.chosen[:3])
    decoder.step(3)  # captured
    chosen[1].copy_(decoder.chosen[:3])
    gc.collect()  # what other tests have left
    held, before = decoder.memory(), allocated(device)
    with no_waits(device):
        for step in range(2, 201):
            decoder.step(3)
            chosen[step].copy_(decoder.chosen[:3])
    assert allocated(device) <= before
    assert decoder.memory() == held
    assert decoder.lengths.tolist() == [250, 203, 262, 0]
    for row, prompt in enumerate(prompts):
        assert_likely(model, prompt, chosen[:, row].tolist(), slack=0.3)


def test_without_dependent_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that start early give the bits of kernels that do not. Where this alone fails, it is
    a race of theirs."""
    model, prompts, runs, asked = model_on(device), make_prompts([50, 3, 9]), [], []

    def run() -> None:
        decoder = Decoder(model, 4, MAX_LEN)
        _, logits = greedy(decoder, prompts, 60)
        runs.append([logits, decoder._state.kv])

    def none(device: torch.device) -> dict[str, bool]:
        asked.append(device)
        return {"enable_fp_fusion": False}

    run()
    if find_spec("triton") is not None:
        package = importlib.import_module("bitnet_kernels.gpu")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"bitnet_kernels.gpu.{module.name}")
    for name, module in list(sys.modules.items()):
        if name.startswith("bitnet_kernels.gpu.") and hasattr(module, "launch_options"):
            monkeypatch.setattr(module, "launch_options", none)
    run()
    assert_same(*runs)
    assert bool(asked) == (device.type == "cuda")
