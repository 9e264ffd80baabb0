"""The decoder against the plain model, without a cache; and the models that it refuses."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.engine.cpu import CpuRunner
from bitnet.engine.cuda import CudaRunner
from bitnet.engine.decoder import Decoder
from bitnet.engine.state import State
from bitnet.engine.weights import ModelWeights, Modules
from bitnet.linear import TernaryLinear, pack, weights_quantized
from bitnet.model import Block, ModelConfig, Transformer
from tests.helpers.decoding import (
    CONTEXT,
    PACKABLE,
    VARIANTS,
    VOCAB,
    greedy,
    make_prompts,
    packed_model,
    prefill,
    small_model,
)
from tests.helpers.layerwise import compare, watched

LENGTHS = [1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 21, 4, 6, 1, 30, 11, 12, 31, 33, 10]


@pytest.mark.parametrize(
    ("variant", "packed"),
    [(variant, False) for variant in VARIANTS] + [(variant, True) for variant in PACKABLE],
)
def test_each_layer_computes_what_the_models_does(variant: str, packed: bool) -> None:
    """20 prompts (or 8), one by one and 8 at a time: prefilled in chunks of 16 tokens, then 23
    steps. One row passes the 64th position, where the calls are recorded anew. Compared layer by
    layer, head included, within the bounds of tests/helpers/layerwise.py."""
    model = small_model(**VARIANTS[variant])
    if packed:
        pack(model)
    n_prompts = 20 if variant in ("ternary", "dense") else 8
    prompts = make_prompts([*LENGTHS[: n_prompts - 1], 50])
    for rows in (1, 8):
        decoder = Decoder(model, 8, CONTEXT, chunk=16)
        with watched(decoder) as seen:
            for start in range(0, len(prompts), rows):
                for row in range(rows):
                    decoder.set_length(row, 0)
                batch = prompts[start : start + rows]
                texts, logits = greedy(decoder, batch, 24)
                assert len({tuple(tokens) for tokens in texts}) == len(batch)
                for row, (prompt, tokens) in enumerate(zip(batch, texts, strict=True)):
                    assert tokens == logits[row].argmax(-1).tolist()
                    last = range(len(prompt) - 1, len(prompt) + 23)
                    gave = torch.stack([seen["lm_head"][row, at].gave for at in last])
                    assert torch.equal(gave, logits[row])
                    compare(model, seen, row, torch.tensor(prompt + tokens[:-1]))


@pytest.mark.parametrize("part", ["eps", "query", "code"])
def test_a_layer_that_computes_otherwise_is_found(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eps 1.5 times as large; the queries of a head longer by 2^-12; one code off by one."""
    rms, rotated, quantized = CpuRunner._rms, CpuRunner._rotated, CpuRunner._quantized

    def other_rms(self: Any, calls: Any, x: Tensor, norm: Any, out: Tensor) -> None:
        rms(self, calls, x, norm._replace(eps=1.5 * norm.eps), out)

    def other_query(self: Any, calls: Any, *args: Any) -> Tensor:
        y = rotated(self, calls, *args)
        calls.add(y[:, 0].mul_, 1 + 2**-12)
        return y

    def other_code(self: Any, calls: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantized(self, calls, x)
        calls.add(codes.view(-1)[:1].add_, 1)
        return codes, scale

    others = {"eps": other_rms, "query": other_query, "code": other_code}
    names = {"eps": "_rms", "query": "_rotated", "code": "_quantized"}
    monkeypatch.setattr(CpuRunner, names[part], others[part])
    model, (prompt,) = small_model(), make_prompts([30])
    decoder = Decoder(model, 1, CONTEXT)
    with watched(decoder) as seen:
        (tokens,), _ = greedy(decoder, [prompt], 4)
    with pytest.raises(AssertionError, match="times the bound"):
        compare(model, seen, 0, torch.tensor(prompt + tokens[:-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_one_token_are_equal_to_the_last_bit(variant: str, dtype: torch.dtype) -> None:
    """Attention over one column returns its value; the rest is the same arithmetic."""
    model = small_model(dtype, **VARIANTS[variant])
    decoder = Decoder(model, 2, 8)
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
    """For the same tokens, the logits stay near those of the model, whose attention rounds
    probabilities to the dtype: by a few units in the last place (2^-8 for bf16) of logits of 3,
    and by the int8 codes that flip."""
    model = small_model(dtype, linear=linear)
    (prompt,) = make_prompts([40])
    decoder = Decoder(model, 1, CONTEXT)
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
    model = packed_model()
    (prompt,) = make_prompts([9])
    expected, _ = greedy(Decoder(packed_model(), 1, CONTEXT), [prompt], 10)
    decoder = Decoder(model, 1, CONTEXT)
    for module in model.layers.modules():
        for buffer in module.buffers(recurse=False):
            buffer.zero_()
    del model, module, buffer
    assert greedy(decoder, [prompt], 10)[0] == expected


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
        ModelWeights.of(model, packed=True),
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


def test_one_token_a_row_is_a_step() -> None:
    """Equal to the last bit, whichever rows are active."""
    prompts = make_prompts([3, 9, 5])
    stepped, filled = (Decoder(packed_model(), 3, CONTEXT) for _ in range(2))
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


def test_a_prefill_reads_its_matrices_once_for_several_rows() -> None:
    """As long as their tokens fit the chunk; a row without tokens separates two runs."""
    model = packed_model()
    decoder = Decoder(model, 6, CONTEXT, chunk=16)
    runs: list[list[int]] = []
    tokens = torch.randint(VOCAB, (6, 8), generator=torch.Generator().manual_seed(0))
    counts = [8, 3, 5, 2, 0, 8]
    with watched(decoder) as seen:
        runner: Any = decoder._runner
        chunk = runner._chunk

        def recorded(tokens: Tensor, pieces: Any) -> Any:
            runs.append([piece.row for piece in pieces])
            return chunk(tokens, pieces)

        runner._chunk = recorded
        decoder.prefill(tokens, counts)
    assert runs == [[0, 1, 2], [3], [5]]
    for row, n in enumerate(counts):
        if n:
            compare(model, seen, row, tokens[row, :n])
            assert torch.equal(decoder.logits[row], seen["lm_head"][row, n - 1].gave)


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_a_token_next_to_nothing(size: float) -> None:
    """Its scale is the least possible one, not that of its largest value: codes are coarse or 0."""
    model = packed_model(norm_placement="pre_norm")
    with torch.no_grad():
        model.embed_tokens.weight[3] *= size
        expected = model(torch.tensor([[3]]))[0, -1]
    decoder = Decoder(model, 1, 8)
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
    assert isinstance(decoder._weights.layers[1].gate_up, Modules)
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
    with pytest.raises(ValueError, match="model: expected fp32, bf16 or fp16"):
        Decoder(small_model(torch.float64), 1, 8)
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
def test_a_matrix_of_one_column(packed: bool) -> None:
    """torch's int8 product on a CPU is wrong there."""
    model = packed_model(d_ff=1) if packed else small_model(d_ff=1)
    (prompt,) = make_prompts([5])
    decoder = Decoder(model, 1, CONTEXT)
    with watched(decoder) as seen:
        (tokens,), _ = greedy(decoder, [prompt], 4)
    compare(model, seen, 0, torch.tensor(prompt + tokens[:-1]))


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
