"""The decoder against the plain model without a cache; and the models that it refuses."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.engine.cuda import CudaRunner
from bitnet.engine.decoder import Decoder
from bitnet.engine.modules import ModuleRunner
from bitnet.engine.state import State
from bitnet.engine.weights import ModelWeights, Modules, packed_copy
from bitnet.linear import TernaryLinear, weights_quantized
from bitnet.model import Block, ModelConfig, Transformer
from bitnet_kernels.cpu import native
from tests.helpers.decoding import (
    CONTEXT,
    PACKABLE,
    VARIANTS,
    VOCAB,
    check_row,
    greedy,
    make_prompts,
    packed_model,
    prefill,
    small_model,
)
from tests.helpers.native_reference import compare
from tests.helpers.runners import RUNNERS, Runner, runner

__all__ = ["runner"]  # a fixture
LENGTHS = [1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 21, 4, 6, 1, 30, 11, 12, 31, 33, 10]


CALLED_AS_MODULES = {"group", "in_linear", "dense in_linear", "qkv_bias", "dense qkv_bias"}
"""Variants whose layers no fused step knows."""


@pytest.mark.parametrize(
    ("name", "variant", "packed"),
    [
        (name, variant, packed)
        for name in RUNNERS
        for variants, packed in ((VARIANTS, False), (PACKABLE, True))
        for variant in variants
        if name == "modules" or variant not in CALLED_AS_MODULES
    ],
)
def test_a_decoder_computes_what_the_model_does(name: str, variant: str, packed: bool) -> None:
    """20 prompts (or 8), one by one and 8 at a time: prefilled in chunks of 16 tokens, then 23
    steps."""
    runner = RUNNERS[name]
    model = runner.model(packed, **VARIANTS[variant])
    n_prompts = 20 if variant in ("ternary", "dense") else 8
    prompts = make_prompts([*LENGTHS[: n_prompts - 1], 50])
    for rows in (1, 8):
        decoder = runner.decoder(model, 8, CONTEXT, chunk=16)
        for start in range(0, len(prompts), rows):
            for row in range(rows):
                decoder.set_length(row, 0)
            batch = prompts[start : start + rows]
            texts, logits = greedy(decoder, batch, 24)
            assert len({tuple(tokens) for tokens in texts}) == len(batch)
            for row, (prompt, tokens) in enumerate(zip(batch, texts, strict=True)):
                assert tokens == logits[row].argmax(-1).tolist()
                runner.check(model, prompt + tokens[:-1], decoder, row, logits[row])


@pytest.mark.parametrize("cache_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", [name for name in RUNNERS if name != "modules"])
def test_a_native_step_attends_as_the_reference(name: str, cache_dtype: Any) -> None:
    """Softly, in one layer, where bounds are tight enough to be sure of half of the tokens' codes;
    with every instruction set that this CPU runs."""
    model, prompts = packed_model(**VARIANTS["row"], n_layers=1), make_prompts([3, 20, 50])
    before = native.used()
    try:
        for instructions in native.available():
            native.use(instructions)
            decoder = RUNNERS[name].decoder(model, 3, chunk=16, cache_dtype=cache_dtype)
            texts, logits = greedy(decoder, prompts, 20)
            for row, (prompt, tokens) in enumerate(zip(prompts, texts, strict=True)):
                ids = prompt + tokens[:-1]
                compare(model, ids, decoder._state, row, logits[row], sure=0.4)
    finally:
        native.use(before)


@pytest.mark.parametrize("cache_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("head", ["float", "bf16", "int8"])
@pytest.mark.parametrize("name", [name for name in RUNNERS if name != "modules"])
def test_a_native_step_in_fewer_bits(name: str, head: Any, cache_dtype: Any) -> None:
    """Keys, values and the weights of the head are rounded; activations only for a head of int8."""
    model, prompts = RUNNERS[name].model(), make_prompts([3, 20, 50])
    decoder = RUNNERS[name].decoder(model, 3, head=head, chunk=16, cache_dtype=cache_dtype)
    texts, logits = greedy(decoder, prompts, 20)
    if head == "bf16":
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.bfloat16())
    for row, (prompt, tokens) in enumerate(zip(prompts, texts, strict=True)):
        compare(model, prompt + tokens[:-1], decoder._state, row, logits[row], 0.8, head == "int8")


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_one_token_are_equal_to_the_last_bit(variant: str, dtype: torch.dtype) -> None:
    """By modules: attention over one column returns its value; the rest is the same arithmetic."""
    model = small_model(dtype, **VARIANTS[variant])
    decoder = Decoder(model, 2, 8, kernel="reference")
    for token in range(0, VOCAB, 7):
        with torch.no_grad():
            expected = model(torch.tensor([[token]]))[0, -1].float()
        decoder.set_length(0, 0)
        decoder.tokens[0] = token
        decoder.step(1)
        assert torch.equal(decoder.logits[0], expected)
        decoder.prefill(torch.tensor([[0], [token]]), [0, 1])
        assert torch.equal(decoder.logits[1], expected)
        decoder.set_length(1, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("linear", ["ternary", "fp"])
def test_models_of_16_bits(linear: Any, dtype: torch.dtype) -> None:
    """For the same tokens, the logits stay near those of the model: by a few units in the last
    place (2^-8 for bf16) of logits of 3, and by the int8 codes that flip."""
    model = small_model(dtype, linear=linear)
    (prompt,) = make_prompts([40])
    decoder = Decoder(model, 1, CONTEXT, kernel="reference")
    decoder.prefill(torch.tensor([prompt[:20]]), [20])
    ours = [decoder.logits[0].clone()]
    for token in prompt[20:]:
        decoder.tokens[0] = token
        decoder.step(1)
        ours.append(decoder.logits[0].clone())
    with torch.no_grad():
        expected = model(torch.tensor([prompt]))[0, 19:].float()
    error = (torch.stack(ours) - expected).norm() / expected.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.02)


def test_the_model_may_be_dropped() -> None:
    model = small_model()
    (prompt,) = make_prompts([9])
    expected, _ = greedy(Decoder(small_model(), 1, CONTEXT), [prompt], 10)
    decoder = Decoder(model, 1, CONTEXT)
    latent, whole = weakref.ref(model.layers[0].mlp.up_proj.weight), weakref.ref(model)
    del model
    gc.collect()
    assert latent() is None
    assert whole() is None
    assert greedy(decoder, [prompt], 10)[0] == expected


def test_weights_are_shared_with_the_model() -> None:
    """Those of a packed or a dense model take no memory a second time."""
    for variant in ("ternary", "row", "dense", "silu, qk_norm"):
        model = packed_model(**VARIANTS[variant])
        own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        weights = ModelWeights.of(packed_copy(model), fused=False)
        assert {tensor.data_ptr() for tensor in weights.tensors()} <= own


def test_fused_weights_are_those_of_the_layers() -> None:
    for variant, packed in (("ternary", True), ("row", True), ("row", False), ("dense", False)):
        model = (packed_model if packed else small_model)(**VARIANTS[variant])
        apart, fused = (ModelWeights.of(packed_copy(model), one) for one in (False, True))
        for ours, theirs in zip(apart.layers, fused.layers, strict=True):
            assert (len(ours.qkv), len(theirs.qkv)) == (3, 1)
            for parts, (whole,) in ((ours.qkv, theirs.qkv), (ours.gate_up, theirs.gate_up)):
                for name in ("packed", "scale") if variant != "dense" else ("weight",):
                    tensors: list[Any] = [getattr(part, name) for part in parts]
                    if name == "scale":
                        rows = [part.packed.shape[0] for part in parts]  # type: ignore[union-attr]
                        tensors = [one.expand(n) for one, n in zip(tensors, rows, strict=True)]
                    assert torch.equal(torch.cat(tensors), getattr(whole, name))


@pytest.mark.parametrize("variant", ["in_linear", "group"])
def test_modules_hold_their_own_codes(variant: str) -> None:
    """Not the codes that weights_quantized() holds for a while, which a captured step must not
    read."""
    model = small_model(**VARIANTS[variant])
    decoder = Decoder(model, 1, 8)
    assert len(decoder.modules) == 2 * 7
    assert all(type(module) is TernaryLinear for module in decoder.modules)
    assert Decoder(small_model(), 1, 8).modules == ()
    adapter = torch.nn.Sequential(model.layers[0].mlp.down_proj)
    model.layers[0].mlp.down_proj = adapter  # type: ignore[assignment]
    assert adapter in Decoder(model, 1, 8).modules
    weights, state = (
        ModelWeights.of(packed_copy(model), fused=True),
        State.empty(model.config, 1, 8, torch.float32, torch.device("cpu")),
    )
    runner = CudaRunner(model.config, weights, state, (1,), "auto")
    with weights_quantized(model):
        assert runner.held() == [adapter[0]._cached_codes]


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "norm", "layers.0.mlp.up_proj"])
@pytest.mark.parametrize("linear", ["ternary", "fp"])
def test_a_model_that_changed_is_told(linear: str, name: str) -> None:
    model = small_model(linear=linear)
    decoder = Decoder(model, 1, 8)
    decoder.step(1)
    decoder.check_weights()
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(1.5)  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match="model: its weights changed since they were read"):
        decoder.check_weights()
    with pytest.raises(ValueError, match="make a new engine"):
        decoder.prefill(torch.tensor([[1]]), [1])
    Decoder(model, 1, 8).prefill(torch.tensor([[1]]), [1])


def test_one_token_a_row_is_a_step(runner: Runner) -> None:
    """Equal to the last bit, whichever rows are active."""
    prompts = make_prompts([3, 9, 5])
    stepped, filled = (runner.decoder(runner.model(), 3) for _ in range(2))
    for decoder in (stepped, filled):
        prefill(decoder, prompts, 16)
    tokens = torch.tensor([[4], [5], [6]])
    filled.active[1] = 0
    filled.prefill(tokens, [1, 1, 1])
    stepped.tokens.copy_(tokens[:, 0])
    stepped.step(3)
    assert torch.equal(filled.logits, stepped.logits)
    assert torch.equal(filled._state.kv, stepped._state.kv)
    assert filled.lengths.tolist() == [4, 10, 6]
    assert filled.active.tolist() == [1, 0, 1]


def test_a_prefill_computes_neighbouring_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as they have as many tokens, about a chunk in all; none is padded."""
    model = small_model(torch.float64)
    decoder = Decoder(model, 7, CONTEXT, chunk=16)
    advance, runs = ModuleRunner._advance, []

    def recorded(self: ModuleRunner, rows: slice, tokens: Tensor) -> None:
        runs.append([rows.start, *tokens.shape])
        advance(self, rows, tokens)

    monkeypatch.setattr(ModuleRunner, "_advance", recorded)
    tokens = torch.randint(VOCAB, (7, 8), generator=torch.Generator().manual_seed(0))
    counts = [8, 8, 8, 2, 0, 5, 5]
    decoder.prefill(tokens, counts)
    assert runs == [[0, 2, 8], [2, 1, 8], [3, 1, 2], [5, 2, 5]]
    for row, n in enumerate(counts):
        if n:
            check_row(model, tokens[row, :n].tolist(), decoder.logits[row : row + 1])


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_a_token_next_to_nothing(size: float) -> None:
    """Its scale is the least possible one, not that of its largest value: codes are coarse or 0."""
    model = packed_model(norm_placement="pre_norm")
    with torch.no_grad():
        model.embed_tokens.weight[3] *= size
        expected = model(torch.tensor([[3]]))[0, -1]
    decoder = Decoder(model, 1, 8, kernel="reference")
    decoder.tokens.fill_(3)
    decoder.step(1)
    assert expected.isfinite().all()
    assert torch.equal(decoder.logits[0], expected)


@pytest.mark.parametrize("linear", ["ternary", "fp"])
def test_hooks_of_a_layer_are_called(linear: str) -> None:
    model = small_model(linear=linear)
    model.layers[1].mlp.up_proj.register_forward_hook(lambda _, __, y: y * 3)
    with torch.no_grad():
        expected = model(torch.tensor([[5]]))[0, -1]
    decoder = Decoder(model, 1, 8)
    decoder.tokens.fill_(5)
    decoder.step(1)
    assert isinstance(decoder._weights.layers[1].gate_up[1], Modules)
    assert torch.equal(decoder.logits[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_and_mode_do_not_matter(dtype: torch.dtype) -> None:
    model, (prompt,) = packed_model(), make_prompts([9])
    expected = greedy(Decoder(model, 1, CONTEXT), [prompt], 5)[1]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.inference_mode(), torch.device("meta"):
            decoder = Decoder(model, 1, CONTEXT)
        assert torch.equal(greedy(decoder, [prompt], 5)[1], expected)
    finally:
        torch.set_default_dtype(before)
    decoder.active[0] = 0  # outside of inference mode


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "missing", lambda: "the native CPU library is missing")


@pytest.mark.usefixtures("no_library")
def test_a_missing_library_is_told() -> None:
    with pytest.warns(UserWarning, match="library is missing: generation is several"):
        decoder = Decoder(packed_model(), 1, 8)
    assert type(decoder._runner) is ModuleRunner


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch: expected 1 to 64, got 0"),
        ({"max_batch": 65}, "max_batch: expected 1 to 64, got 65"),
        ({"max_len": CONTEXT + 1}, "max_len: expected 1 to the model's context of 150, got 151"),
        ({"chunk": 0}, "chunk: expected >= 1"),
        ({"chunk": 1.5}, "chunk: expected an int, got 1.5"),
        ({"max_batch": True}, "max_batch: expected an int, got True"),
        ({"max_len": 8.0}, "max_len: expected an int, got 8.0"),
        ({"cache_dtype": "fp8"}, "cache_dtype: expected one of auto, fp32, bf16, int8, got 'fp8'"),
        ({"head": "fp8"}, "head: expected one of"),
        ({"kernel": "fast"}, "kernel: expected one of"),
    ],
)
def test_arguments_out_of_range(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(small_model(), **{"max_batch": 1, "max_len": 8} | options)


def test_models_that_a_step_cannot_repeat() -> None:
    model = small_model()
    model.layers[1].mlp.ffn_sub_norm = torch.nn.LayerNorm(44)
    with pytest.raises(ValueError, match=r"layers.1.mlp.ffn_sub_norm: expected an RMSNorm"):
        Decoder(model, 1, 8)

    class Other(Transformer):
        def forward(self, tokens: Tensor, targets: Any = None, cache: Any = None) -> Tensor:
            return tokens

    with pytest.raises(ValueError, match="model: expected a Transformer"):
        Decoder(Other(ModelConfig(vocab_size=5, max_seq_len=8)), 1, 8)
    with pytest.raises(ValueError, match="model: expected fp32, bf16, fp16, or on a CPU fp64"):
        Decoder(small_model(torch.float8_e5m2), 1, 8)
    model = small_model()
    model.lm_head = torch.nn.Sequential(model.lm_head)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="head: 'bf16' needs a lm_head that is a plain"):
        Decoder(model, 1, 8, head="bf16")


def test_embeddings_and_models_that_a_step_cannot_repeat() -> None:
    hooked, bounded, wrapped, computed = (small_model() for _ in range(4))
    hooked.embed_tokens.register_forward_hook(lambda _, __, y: y.flip(-1))
    bounded.embed_tokens.max_norm = 0.01
    wrapped.embed_tokens = torch.nn.Sequential(wrapped.embed_tokens)  # type: ignore[assignment]
    torch.nn.utils.parametrizations.weight_norm(computed.embed_tokens)
    for model in (hooked, bounded, wrapped, computed):
        with pytest.raises(ValueError, match="embed_tokens: expected a plain"):
            Decoder(model, 1, 8)

    class Other(Transformer):
        def hidden(self, tokens: Tensor, cache: Any = None) -> Tensor:
            return super().hidden(tokens, cache).flip(-1)

    with pytest.raises(ValueError, match="model: expected a Transformer with its own forward and"):
        Decoder(Other(ModelConfig(vocab_size=5, max_seq_len=8)), 1, 8)
    with torch.device("meta"):
        meta = Transformer(ModelConfig(vocab_size=5, max_seq_len=8))
    with pytest.raises(ValueError, match="model: expected it on cpu or cuda, got meta"):
        Decoder(meta, 1, 8)
    for name in ("lm_head", "layers.1.mlp.up_proj"):
        model = small_model(linear="fp")
        model.get_submodule(name).bfloat16()
        with pytest.raises(ValueError, match=f"{name}: expected torch.float32, the dtype of embed"):
            Decoder(model, 1, 8)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda _, __, y: None)
    try:
        with pytest.raises(ValueError, match="nor torch's for all modules"):
            Decoder(small_model(), 1, 8)
    finally:
        handle.remove()


def test_a_norm_with_a_hook_is_not_passed_over() -> None:
    for name in ("layers.0.input_layernorm", "layers.1.mlp.ffn_sub_norm", "norm"):
        model = small_model()
        model.get_submodule(name).register_forward_hook(lambda _, __, y: 2 * y)
        with pytest.raises(ValueError, match=f"{name}: expected an RMSNorm without hooks"):
            Decoder(model, 1, 8)


def test_what_a_module_was_given_instead_is_not_passed_over() -> None:
    class Loud(Block):
        def __call__(self, *args: Any) -> Any:
            return 1.5 * super().__call__(*args)

    loud, other = small_model(), small_model()
    loud.layers[1] = Loud(loud.config, 1)
    with pytest.raises(ValueError, match=r"layers.1: expected a Block with its own forward"):
        Decoder(loud, 1, 8)
    other.layers[0].mlp.activation = "silu"
    with pytest.raises(ValueError, match=r"layers.0.mlp.activation: expected 'relu2'.*got 'silu'"):
        Decoder(other, 1, 8)


@pytest.mark.parametrize("packed", [False, True])
def test_a_matrix_of_one_column(packed: bool, runner: Runner) -> None:
    """torch's int8 product on a CPU is wrong there."""
    model = runner.model(packed, d_ff=1)
    (prompt,) = make_prompts([5])
    decoder = runner.decoder(model, 1)
    (tokens,), (logits,) = greedy(decoder, [prompt], 4)
    runner.check(model, prompt + tokens[:-1], decoder, 0, logits)


def test_a_module_that_counts_its_calls_is_no_changed_model() -> None:
    class Counting(torch.nn.Linear):
        calls: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = small_model(linear="fp")
    counting = Counting(32, 32, bias=False)
    counting.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    model.layers[0].self_attn.o_proj = counting
    decoder = Decoder(model, 1, CONTEXT)
    for prompt in ([1, 2], [3]):
        prefill(decoder, [prompt], 8)
    assert int(counting.calls) > 1
    with torch.no_grad():
        counting.weight.mul_(2)
    with pytest.raises(ValueError, match="its weights changed"):
        decoder.check_weights()


def test_a_decoder_is_not_copied() -> None:
    decoder = Decoder(small_model(), 1, 8)
    for function in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a Decoder cannot be copied or pickled"):
            function(decoder)


def test_wrong_calls() -> None:
    decoder = Decoder(small_model(), 2, 8, chunk=4)
    for batch in (0, 3):
        with pytest.raises(ValueError, match="batch: expected 1 to 2"):
            decoder.step(batch)
    with pytest.raises(ValueError, match="tokens: expected at most 4"):
        decoder.prefill(torch.zeros(1, 5, dtype=torch.int64), [5])
    with pytest.raises(ValueError, match="tokens: expected a row for each"):
        decoder.prefill(torch.zeros(1, 3, dtype=torch.int64), [3, 3])
    with pytest.raises(ValueError, match="n_valid: expected 0 to 3, got 4 for row 0"):
        decoder.prefill(torch.zeros(1, 3, dtype=torch.int64), [4])
    with pytest.raises(ValueError, match="n: row 0 holds 0 tokens, got 1"):
        decoder.set_length(0, 1)
    with pytest.raises(ValueError, match="target: expected another row"):
        decoder.copy_prefix(0, 0, 0)
    with pytest.raises(ValueError, match="source: expected 0 to 1, got 2"):
        decoder.copy_prefix(2, 0, 0)
    for token in (-1, VOCAB):
        with pytest.raises(ValueError, match=f"tokens: expected 0 to {VOCAB - 1}"):
            decoder.prefill(torch.tensor([[token]]), [1])
    for tokens in (torch.zeros(1, 2), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"tokens: expected int64 \[B, T\], got torch"):
            decoder.prefill(tokens, [1])
    assert decoder.lengths.tolist() == [0, 0]
