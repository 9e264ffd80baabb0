"""The memory of a decoder; caches and heads with fewer bits."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.engine.decoder import Decoder
from tests.helpers.decoding import (
    CONTEXT,
    VARIANTS,
    VOCAB,
    make_prompts,
    packed_model,
    prefill,
    small_model,
)


def test_memory_by_kind() -> None:
    model = packed_model(n_kv_heads=2)
    sizes = Decoder(model, 3, CONTEXT, cache_dtype="int8").memory()
    d, kv, f, layers, columns = 32, 16, 44, 2, 192  # 150 + 1 columns, rounded up to 64
    rows = d + 2 * kv + d + 2 * f + d  # of 64 codes, 4 to a byte
    norms = layers * 4 * (3 * d + f) + 4 * d
    assert sizes["weights"] == layers * (rows * 16 + 7 * 4) + norms  # and 7 scales
    assert sizes["head"] == sizes["embedding"] == 4 * VOCAB * d
    assert sizes["cache"] == layers * 2 * 3 * columns * (kv + 2 * 4)
    tied = Decoder(small_model(tie_embeddings=True), 1, CONTEXT).memory()
    assert (tied["head"], tied["embedding"]) == (0, 4 * VOCAB * d)


def test_memory_of_an_int8_head() -> None:
    sizes = Decoder(packed_model(), 1, CONTEXT, head="int8").memory()
    assert sizes["head"] == VOCAB * (32 + 4)


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
        decoder = Decoder(model, 1, CONTEXT, head=head, kernel="reference")  # type: ignore[arg-type]
        decoder.prefill(torch.tensor([[5]]), [1])
        assert torch.equal(decoder.logits, logits)
