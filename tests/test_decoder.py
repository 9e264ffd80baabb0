"""The decoder against the plain model, run on the whole sequence for each token, with no cache."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bitnet.engine.decoder import Decoder
from bitnet.engine.device import Graphs
from bitnet.engine.plan import ModelPlan
from bitnet.engine.state import State
from bitnet.linear import BitLinear, pack
from bitnet.model import ModelConfig, Transformer, as_transformer

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
    del model
    assert greedy(decoder, [prompt], 10)[0] == [expected]


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
    assert sizes["workspace"] > 4 * 3 * VOCAB
    tied = Decoder(small_model(tie_embeddings=True), 1, CONTEXT).memory()
    assert (tied["head"], tied["embedding"]) == (0, 4 * VOCAB * d)
    sizes = Decoder(model, 1, CONTEXT, head="int8").memory()
    assert sizes["head"] == VOCAB * (d + 4)


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
        if head == "int8" and not torch.cpu._is_vnni_supported():
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


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch: expected 1 to 64, got 0"),
        ({"max_batch": 65}, "max_batch: expected 1 to 64, got 65"),
        ({"max_len": CONTEXT + 1}, "max_len: expected 1 to the model's context of 150, got 151"),
        ({"chunk": 0}, "chunk: expected >= 1"),
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
    assert decoder.lengths.tolist() == [0, 0]
