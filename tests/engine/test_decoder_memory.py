"""The memory of a decoder and the allocations of a step; caches and heads of fewer bits."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bitnet.engine.decoder import Decoder
from bitnet_kernels.cpu.int_mm import int_mm_takes_any_int8
from tests.helpers.decoding import (
    CONTEXT,
    VARIANTS,
    VOCAB,
    make_prompts,
    packed_model,
    prefill,
    small_model,
)


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


def test_memory_of_an_int8_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where the CPU has an exact int8 product, and refused where it has none."""
    model = packed_model()
    for exact in (True, False):
        monkeypatch.setattr("bitnet.engine.weights.int_mm_takes_any_int8", lambda e=exact: e)
        if exact:
            sizes = Decoder(model, 1, CONTEXT, head="int8").memory()
            assert sizes["head"] == VOCAB * (32 + 4)
        else:
            with pytest.raises(ValueError, match="head: 'int8' needs a CPU with AVX-512 VNNI"):
                Decoder(model, 1, CONTEXT, head="int8")


@pytest.mark.parametrize("options", [{}, {"cache_dtype": "int8"}, {"head": "bf16"}], ids=str)
@pytest.mark.parametrize("variant", ["ternary", "dense", "row"])
def test_memory_is_all_that_a_decoder_keeps(variant: str, options: Any) -> None:
    """Compared with the tensors that the garbage collector finds, the model's own included."""
    model = small_model(**VARIANTS[variant])
    gc.freeze()  # the objects of thousands of earlier tests take a second to look through
    try:
        decoder = Decoder(model, 3, CONTEXT, **options)
        prefill(decoder, make_prompts([62, 5, 9]), 70)
        for batch in (1, 3, 3, 3):
            decoder.step(batch)
        gc.collect()
        found = [one for one in gc.get_objects() if type(one) is Tensor]
    finally:
        gc.unfreeze()
    new = [
        tensor.untyped_storage()
        for tensor in found
        if tensor.layout == torch.strided and tensor.device.type == "cpu"
    ]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in new if storage.nbytes()}
    shared = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept = sum(n for pointer, n in sizes.items() if pointer not in shared)
    aliased = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in decoder._weights.tensors()
    }
    kept += sum(n for pointer, n in aliased.items() if pointer in shared)
    assert sum(decoder.memory().values()) == kept


@pytest.mark.parametrize(("cache_dtype", "bound"), [("bf16", 2**-8), ("int8", 0.5 / 127)])
def test_cache_in_fewer_bits(cache_dtype: Any, bound: float) -> None:
    """The first layer's keys and values are those of an fp32 cache, rounded once: by half a unit in
    the last place of bf16, or half an int8 step of the head's largest. The logits stay near."""
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
