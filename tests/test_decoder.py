"""The decoder against the plain model, run on the whole sequence for each token, with no cache."""

import copy
import gc
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bitnet.engine.decoder import Decoder
from bitnet.engine.device import Graphs
from bitnet.engine.plan import ModelPlan, Modules, quantized_head
from bitnet.engine.state import State
from bitnet.linear import BitLinear, TernaryLinear, pack, weights_quantized
from bitnet.model import ModelConfig, Transformer, as_transformer
from bitnet_kernels import bit_planes
from bitnet_kernels.reference import int_mm_takes_any_int8

VOCAB, CONTEXT = 61, 150
VARIANTS: dict[str, dict[str, Any]] = {
    "ternary": {},
    "dense": {"linear": "fp"},
    "row": {"granularity": "row", "norm_placement": "pre_norm", "n_kv_heads": 4},
    "silu, qk_norm": {"activation": "silu", "qk_norm": True, "n_kv_heads": 1},
    "in_linear": {"norm_placement": "in_linear"},  # as modules
    "group": {"granularity": "group", "group_size": 8},  # as modules
    "dense in_linear": {"linear": "fp", "norm_placement": "in_linear"},  # as modules
}
LENGTHS = [1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 21, 4, 6, 1, 30, 11, 12, 31, 33, 10]


def small_model(dtype: torch.dtype = torch.float32, **fields: Any) -> Transformer:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2}
    shape |= {"d_ff": 44, "vocab_size": VOCAB, "max_seq_len": CONTEXT, "tie_embeddings": False}
    model = Transformer(ModelConfig(**shape | fields))
    with torch.no_grad():  # far from ties, and what a token says depends on those before it
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 15.0)
    return model.to(dtype).eval()


def packed_model(dtype: torch.dtype = torch.float32, **fields: Any) -> Transformer:
    return as_transformer(pack(small_model(dtype, **fields)))


def make_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def by_hand(model: Transformer, prompt: list[int], n: int) -> tuple[list[int], Tensor]:
    """n greedy tokens by running the whole sequence for each; the logits they were taken from."""
    ids, logits = list(prompt), []
    for _ in range(n):
        logits.append(model(torch.tensor([ids]))[0, -1].float())
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


@torch.no_grad()
def logits_behind(model: Transformer, prompt: list[int], tokens: list[int]) -> Tensor:
    """What each of ``tokens`` is chosen from: one run, since attention is causal."""
    return model(torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1 :].float()


def prefill(decoder: Any, prompts: list[list[int]], chunk: int) -> None:
    """In pieces; a row that has no tokens left is handed 0 of them."""
    for start in range(0, max(map(len, prompts)), chunk):
        pieces = [prompt[start : start + chunk] for prompt in prompts]
        longest = max(map(len, pieces))
        padded = [piece + [0] * (longest - len(piece)) for piece in pieces]
        decoder.prefill(torch.tensor(padded), [len(piece) for piece in pieces])


def greedy(decoder: Decoder, prompts: list[list[int]], n: int) -> tuple[list[list[int]], Tensor]:
    """Tokens of each row, and logits ``[B, n, V]``."""
    b = len(prompts)
    prefill(decoder, prompts, decoder.chunk)
    chosen, logits = [decoder.chosen[:b].tolist()], [decoder.logits[:b].clone()]
    for _ in range(n - 1):
        decoder.step(b)
        chosen.append(decoder.chosen[:b].tolist())
        logits.append(decoder.logits[:b].clone())
    return [list(row) for row in zip(*chosen, strict=True)], torch.stack(logits, 1)


# Against the model on whole sequences


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_the_model(variant: str, packed: bool) -> None:
    """20 prompts (or 8), one by one and 8 at a time, prefilled 16 tokens a piece. 24 more lead
    a row past the 64th column, where another tape takes over."""
    model = small_model(**VARIANTS[variant])
    if packed:
        pack(model)
    n_prompts = 20 if variant in ("ternary", "dense") else 8
    prompts = make_prompts([*LENGTHS[: n_prompts - 1], 50])
    for batch in (1, 8):
        decoder = Decoder(model, 8, CONTEXT, chunk=16)
        for start in range(0, len(prompts), batch):
            for row in range(batch):
                decoder.set_length(row, 0)
            wave = prompts[start : start + batch]
            rows, logits = greedy(decoder, wave, 24)
            assert len({tuple(tokens) for tokens in rows}) == len(wave)
            for prompt, tokens, ours in zip(wave, rows, logits, strict=True):
                expected = logits_behind(model, prompt, tokens)
                assert tokens == expected.argmax(-1).tolist()
                # fp32: sums of at most 96 terms in another order, a dozen in a row, over logits of
                # a few units; none moved an int8 code here, which would show as 1e-2.
                torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_one_token_are_equal_to_the_last_bit(variant: str, dtype: torch.dtype) -> None:
    """Attention over one column hands its value through; all else is the same arithmetic."""
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
    """Given the same tokens, the logits stay near those of the model, whose attention rounds
    probabilities to the dtype: a few units in the last place (2^-8 for bf16) of logits of 3, times
    the int8 codes that this moves."""
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
    expected, _ = by_hand(model, prompt, 10)
    decoder = Decoder(model, 1, CONTEXT)
    for module in model.layers.modules():
        for buffer in module.buffers(recurse=False):
            buffer.zero_()
    del model, module, buffer
    assert greedy(decoder, [prompt], 10)[0] == [expected]


@pytest.mark.parametrize("variant", ["in_linear", "group"])
def test_modules_hold_their_own_codes(variant: str) -> None:
    """Whatever codes weights_quantized() holds for a while: a captured step may not read them."""
    model = small_model(**VARIANTS[variant])
    decoder = Decoder(model, 1, 8)
    assert len(decoder.modules) == 2 * 7
    assert all(type(module) is TernaryLinear for module in decoder.modules)
    assert Decoder(small_model(), 1, 8).modules == ()
    adapter = torch.nn.Sequential(model.layers[0].mlp.down_proj)
    model.layers[0].mlp.down_proj = adapter  # type: ignore[assignment]
    assert adapter in Decoder(model, 1, 8).modules
    plan, state = (
        ModelPlan.of(model, packed=True),
        State.empty(model.config, 1, 8, torch.float32, torch.device("cpu")),
    )
    graphs = Graphs(model.config, plan, state, (1,), "auto")
    with weights_quantized(model):
        assert graphs.held() == [adapter[0]._held]


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
    """To the last bit, and whatever rows are active."""
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
    """As long as its tokens fit the chunk; a row with none of them parts two runs."""
    decoder = Decoder(packed_model(), 6, CONTEXT, chunk=16)
    runs: list[list[int]] = []
    tapes: Any = decoder._runner
    chunk = tapes._chunk

    def recorded(tokens: Tensor, pieces: Any) -> Any:
        runs.append([piece.row for piece in pieces])
        return chunk(tokens, pieces)

    tapes._chunk = recorded
    tokens = torch.randint(VOCAB, (6, 8), generator=torch.Generator().manual_seed(0))
    counts = [8, 3, 5, 2, 0, 8]
    decoder.prefill(tokens, counts)
    assert runs == [[0, 1, 2], [3], [5]]
    for row, n in enumerate(counts):
        if n:
            expected = by_hand(packed_model(), tokens[row, :n].tolist(), 1)[1][0]
            torch.testing.assert_close(decoder.logits[row], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_a_token_next_to_nothing(size: float) -> None:
    """Its scale is the least there is, not that of its largest value: coarse codes, or zeros."""
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
    assert isinstance(decoder._plan.layers[1].gate_up, Modules)
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


# What a step costs


def allocations(function: Any, *arguments: Any) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function(*arguments)
    return sum(
        event.name == "[memory]" or event.name.startswith("aten::empty")
        for event in recorded.events()
    )


@pytest.mark.parametrize("options", [{}, {"cache_dtype": "int8"}, {"cache_dtype": "bf16"}], ids=str)
@pytest.mark.parametrize("variant", ["ternary", "dense", "row", "silu, qk_norm"])
def test_a_step_allocates_nothing(variant: str, options: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder(small_model(dtype, **VARIANTS[variant]), 8, CONTEXT, **options)
        for batch in (1, 8):
            decoder.step(batch)
            assert allocations(decoder.step, batch) == 0


@pytest.mark.parametrize("options", [{}, {"cache_dtype": "int8"}, {"cache_dtype": "bf16"}], ids=str)
def test_steps_that_write_a_new_tape_allocate_nothing(options: Any) -> None:
    decoder = Decoder(small_model(), 2, CONTEXT, **options)
    prefill(decoder, make_prompts([61, 7]), 63)
    decoder.step(2)
    first = decoder._runner._steps[2]  # type: ignore[union-attr]
    for _ in range(62, 131):
        assert allocations(decoder.step, 2) == 0
    assert decoder.lengths.tolist() == [131, 77]
    (last,) = decoder._runner._steps.values()  # type: ignore[union-attr]
    assert (first[0], last[0]) == (64, 192)


def test_allocations_would_be_seen() -> None:
    decoder = Decoder(small_model(**VARIANTS["group"]), 8, CONTEXT)  # modules allocate
    decoder.step(1)
    assert allocations(decoder.step, 1) > 0
    assert allocations(torch.relu, torch.zeros(3)) > 0


def test_memory_by_kind() -> None:
    model = packed_model(n_kv_heads=2)
    sizes = Decoder(model, 3, CONTEXT, cache_dtype="int8").memory()
    d, kv, f, layers, columns = 32, 16, 44, 2, 192  # 150 + 1 columns, rounded up to 64
    rows = d + 2 * kv + d + 2 * f + d
    matrices = (d + 2 * kv + d + 2 * f) * d + d * f
    norms = layers * 4 * (3 * d + f) + 4 * d
    assert sizes["weights"] == layers * (matrices + 4 * rows) + norms
    assert sizes["head"] == sizes["embedding"] == 4 * VOCAB * d
    assert sizes["cache"] == layers * 2 * 3 * columns * (kv + 2 * 4)
    tied = Decoder(small_model(tie_embeddings=True), 1, CONTEXT).memory()
    assert (tied["head"], tied["embedding"]) == (0, 4 * VOCAB * d)
    sizes = Decoder(model, 1, CONTEXT, head="int8").memory()
    assert sizes["head"] == VOCAB * (d + 4)


@pytest.mark.parametrize("options", [{}, {"cache_dtype": "int8"}, {"head": "bf16"}], ids=str)
@pytest.mark.parametrize("variant", ["ternary", "dense", "row"])
def test_memory_is_all_that_a_decoder_keeps(variant: str, options: Any) -> None:
    """Against the tensors that the garbage collector finds; the model's own are counted too."""
    model = small_model(**VARIANTS[variant])

    def tensors() -> list[Tensor]:
        gc.collect()
        found = [one for one in gc.get_objects() if type(one) is Tensor]
        return [t for t in found if t.layout == torch.strided and t.device.type == "cpu"]

    def storages(found: list[Tensor]) -> dict[int, int]:
        parts = [tensor.untyped_storage() for tensor in found]
        return {part.data_ptr(): part.nbytes() for part in parts if part.nbytes()}

    others = tensors()  # kept alive, so that no address is used again
    before = storages(others)
    decoder = Decoder(model, 3, CONTEXT, **options)
    prefill(decoder, make_prompts([62, 5, 9]), 70)
    for batch in (1, 3, 3, 3):
        decoder.step(batch)
    shared = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    new = storages(tensors())
    kept = sum(n for pointer, n in new.items() if pointer not in shared | before.keys())
    aliased = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in decoder._plan.tensors()
    }
    kept += sum(n for pointer, n in aliased.items() if pointer in shared)
    assert sum(decoder.memory().values()) == kept


# Cache and head in fewer bits


@pytest.mark.parametrize(("cache_dtype", "bound"), [("bf16", 2**-8), ("int8", 0.5 / 127)])
def test_cache_in_fewer_bits(cache_dtype: Any, bound: float) -> None:
    """The first layer's keys and values are those of an fp32 cache, rounded once: by half a unit in
    the last place of bf16, or half a step of the head's largest; and the logits stay near."""
    model, prompts = packed_model(), make_prompts([20, 33])
    exact, low = Decoder(model, 2, CONTEXT), Decoder(model, 2, CONTEXT, cache_dtype=cache_dtype)
    for decoder in (exact, low):
        prefill(decoder, prompts, 16)
        for token in range(10):
            decoder.tokens.fill_(token)
            decoder.step(2)
    assert low.lengths.tolist() == [30, 43]
    for row, columns in enumerate(low.lengths.tolist()):
        expected = exact._state.kv[0, :, row, :, :columns]
        stored = low._state.kv[0, :, row, :, :columns].float()
        scale = low._state.scale
        if scale is not None:
            stored = stored * scale[0, :, row, :, :columns].unsqueeze(-1)
            unit = expected.abs().amax(-1, keepdim=True)
        else:
            unit = expected.abs()
        # 1e-6: the quotient and the product with the scale are rounded too.
        assert ((stored - expected).abs() <= bound * unit * (1 + 1e-6) + 1e-6).all()
    error = (low.logits - exact.logits).norm() / exact.logits.norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize("tie", [False, True])
def test_heads_in_fewer_bits(tie: bool) -> None:
    model, read = packed_model(tie_embeddings=tie), []
    model.lm_head.register_forward_pre_hook(lambda _, args: read.append(args[0][0]))
    with torch.no_grad():
        model(torch.tensor([[5]]))
    (x,), weight = read, model.lm_head.weight.detach()
    model.lm_head._forward_pre_hooks.clear()

    def codes(y: Tensor) -> tuple[Tensor, Tensor]:
        scale = y.abs().amax(1, keepdim=True) / 127
        return (y / scale).round(), scale

    (x_q, s_x), (w_q, s_w) = codes(x), codes(weight)
    expected = {
        "float": x @ weight.t(),
        "bf16": (x.bfloat16() @ weight.bfloat16().t()).float(),
        "int8": ((x_q.double() @ w_q.double().t()).float() * s_x) * s_w.t(),
    }
    for head, logits in expected.items():
        if head == "int8" and not int_mm_takes_any_int8():
            with pytest.raises(ValueError, match="head: 'int8' needs a CPU with AVX-512 VNNI"):
                Decoder(model, 1, CONTEXT, head="int8")
            continue
        decoder = Decoder(model, 1, CONTEXT, head=head)  # type: ignore[arg-type]
        decoder.prefill(torch.tensor([[5]]), [1])
        assert torch.equal(decoder.logits, logits)


# Rows


def test_rows_do_not_see_each_other() -> None:
    """A ternary head too, so that nothing hangs on how a float product is cut for its batch."""
    model = packed_model()
    head = BitLinear(32, VOCAB, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    prompts = make_prompts([9, 30, 70, 3])
    together = greedy(Decoder(model, 4, CONTEXT, chunk=11), prompts, 20)[1]
    for row, prompt in enumerate(prompts):
        alone = greedy(Decoder(model, 1, CONTEXT, chunk=11), [prompt], 20)[1][0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)
        assert torch.equal(together[row].argmax(-1), alone.argmax(-1))


def test_a_row_that_ended_keeps_what_it_holds() -> None:
    model, prompts = packed_model(), make_prompts([5, 12])
    decoder = Decoder(model, 2, CONTEXT)
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
    expected = by_hand(model, [*prompts[0], int(token)], 1)[1][0]
    assert int(logits.argmax()) == int(token)
    torch.testing.assert_close(decoder.logits[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("max_len", [63, 64, 70])
def test_a_full_row_writes_nothing(max_len: int) -> None:
    model, prompts = packed_model(), make_prompts([60, 60])
    decoder = Decoder(model, 2, max_len)
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


def test_shared_prefixes_and_truncation() -> None:
    model = packed_model()
    (prompt,) = make_prompts([40])
    decoder = Decoder(model, 3, CONTEXT)
    decoder.prefill(torch.tensor([prompt]), [40])
    decoder.copy_prefix(0, 2, 25)
    assert decoder.lengths.tolist() == [40, 0, 25]
    other = [[*prompt[:25], 1, 2, 3], [*prompt[:10], 4, 5]]
    decoder.set_length(0, 10)
    decoder.prefill(torch.tensor([[4, 5, 0], [0, 0, 0], [1, 2, 3]]), [2, 0, 3])
    for row, ids in ((2, other[0]), (0, other[1])):
        expected, logits = by_hand(model, ids, 1)
        assert decoder.chosen[row] == expected[0]
        torch.testing.assert_close(decoder.logits[row], logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache_dtype", ["fp32", "bf16", "int8"])
def test_what_an_ended_row_wrote_is_forgotten_too(cache_dtype: Any) -> None:
    """An inactive row writes a column beyond its length, of NaN here."""
    model = packed_model()
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
    decoder = Decoder(model, 1, CONTEXT, cache_dtype=cache_dtype)
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
def test_a_prefill_that_was_broken_off_leaves_nothing(cache_dtype: Any, truncated: bool) -> None:
    model = packed_model()
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
    decoder, sound = (Decoder(model, 2, CONTEXT, cache_dtype=cache_dtype) for _ in range(2))
    for one in (decoder, sound):
        one.prefill(torch.tensor([[1, 2, 3], [4, 5, 6]]), [3, 3])
    tapes: Any = decoder._runner
    head = tapes._head
    tapes._head = lambda calls, *_: calls.add(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder.prefill(torch.tensor([[7, 7, 7, 7], [7, 7, 7, 7]]), [4, 3])
    tapes._head = head
    left = decoder._state.kv if decoder._state.scale is None else decoder._state.scale
    assert left[0, :, 0, :, 3:7].isnan().all()
    for one in (decoder, sound):
        if truncated:
            one.set_length(0, 2)
        one.tokens.fill_(5)
        one.step(2)
        assert one.logits.isfinite().all()
    assert torch.equal(decoder.logits, sound.logits)
    assert torch.equal(decoder._state.kv[..., :60, :], sound._state.kv[..., :60, :])


@pytest.mark.parametrize("cache_dtype", ["fp32", "bf16", "int8"])
def test_a_damaged_row_is_told_and_harms_no_other_nor_the_next(cache_dtype: Any) -> None:
    model = packed_model()
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
        model.embed_tokens.weight[8, 3] = torch.inf
    prompts = [[1, 2, 7, 3], [1, 2, 3, 4], [8, 3]]
    decoder = Decoder(model, 3, CONTEXT, cache_dtype=cache_dtype)
    sound = Decoder(model, 3, CONTEXT, cache_dtype=cache_dtype)
    prefill(decoder, prompts, 16)
    prefill(sound, [[1], prompts[1], [2]], 16)
    assert decoder.chosen.tolist() == [-1, int(sound.chosen[1]), -1]
    assert decoder.tokens.tolist() == [0, int(sound.chosen[1]), 0]
    for _ in range(3):
        decoder.step(3)
        sound.step(3)
        assert decoder.chosen[[0, 2]].tolist() == [-1, -1]
        assert torch.equal(decoder.logits[1], sound.logits[1])
    for row in (0, 2):
        decoder.set_length(row, 0)
        decoder.prefill(torch.tensor([[1], [1], [1]][: row + 1]), [0] * row + [1])
        decoder.tokens[row] = 5
    sound.set_length(0, 0)
    sound.prefill(torch.tensor([[1]]), [1])
    sound.tokens[0] = 5
    decoder.step(3)
    sound.step(3)
    assert torch.equal(decoder.logits[0], sound.logits[0])
    assert torch.equal(decoder.logits[2], sound.logits[0])


# The body of a GPU's step, run here


@pytest.mark.parametrize("cache", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gpu_body_gives_the_same(variant: str, cache: torch.dtype) -> None:
    """Uncaptured, through the operators' CPU implementations: three rows in a bucket of four."""
    model = packed_model(**VARIANTS[variant])
    decoder = Decoder(model, 4, CONTEXT, cache_dtype="fp32" if cache != torch.int8 else "int8")
    state = State.empty(model.config, 4, CONTEXT, cache, torch.device("cpu"))
    graphs = Graphs(model.config, ModelPlan.of(model, packed=True), state, (4,), "auto")
    prompts = make_prompts([3, 20, 9])
    errors = []
    with torch.inference_mode():
        for runner in (decoder, graphs):
            prefill(runner, prompts, 8)
        graphs.batch.fill_(3)
        for step in range(12):
            assert state.lengths.tolist() == decoder.lengths.tolist()
            assert state.chosen[:3].tolist() == state.logits[:3].argmax(-1).tolist()
            live = slice(0 if step <= 6 else 1, 3)  # row 0, once ended, may see anything
            expected = decoder.logits[live]
            errors.append(float((state.logits[live] - expected).norm() / expected.norm()))
            state.active[0] = decoder.active[0] = int(step < 6)
            state.tokens.copy_(decoder.tokens)  # the same inputs, should a choice differ
            decoder.step(3)
            graphs.step_body(4)
    assert state.lengths.tolist() == [9, 32, 21, 0]
    assert state.logits[3].count_nonzero() == 0
    # The norms round in another order, which now and then moves an int8 code by one: 1 / 127 of one
    # of 32 inputs.
    assert max(errors) < 2e-2
    assert sorted(errors)[len(errors) // 2] < 1e-2


def graphs_of(model: Transformer, max_len: int, head: str = "float") -> tuple[Graphs, State]:
    """Uncaptured, of two rows."""
    plan = ModelPlan.of(model, packed=True)
    if head == "int8":
        plan = replace(plan, head=quantized_head(plan.head, "int8"))
    state = State.empty(model.config, 2, max_len, torch.float32, torch.device("cpu"))
    return Graphs(model.config, plan, state, (2,), "auto"), state


@torch.inference_mode()
def test_the_gpu_body_tells_a_damaged_row_and_stops_a_full_one() -> None:
    model = packed_model()
    model.embed_tokens.weight[7] = torch.nan
    graphs, state = graphs_of(model, 4)
    graphs.prefill(torch.tensor([[1, 7], [2, 3]]), [2, 2])
    assert state.chosen.tolist() == [-1, int(state.logits[1].argmax())]
    assert state.tokens.tolist()[0] == 0
    graphs.batch.fill_(2)
    for _ in range(3):
        graphs.step_body(2)
    assert state.lengths.tolist() == [4, 4]
    held = state.kv[:, :, 1, :, :4].clone()
    graphs.step_body(2)
    assert torch.equal(state.kv[:, :, 1, :, :4], held)


@torch.inference_mode()
def test_the_gpu_body_with_a_head_of_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of 8 bits change the logits by less than a hundredth of their norm or so."""
    monkeypatch.setattr("bitnet.engine.plan.int_mm_takes_any_int8", lambda: True)
    model, logits = packed_model(), {}
    for head in ("float", "int8"):
        graphs, state = graphs_of(model, 8, head)
        graphs.prefill(torch.tensor([[1, 2], [3, 4]]), [2, 2])
        logits[head] = state.logits
    error = (logits["int8"] - logits["float"]).norm() / logits["float"].norm()
    assert 0 < error < 0.03


def test_the_gpu_body_with_bit_planes() -> None:
    model = packed_model()
    plan = ModelPlan.of(model, packed=True, planes=True)
    qkv: Any = plan.layers[0].qkv
    assert torch.equal(qkv.planes, bit_planes(qkv.weight))
    assert ModelPlan.of(model, packed=True).layers[0].qkv.planes is None  # type: ignore[union-attr]


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
        def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
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
