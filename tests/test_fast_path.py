"""What is quantized once gives what quantizing it every time gives, to the last bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bitnet.quant
import bitnet_kernels
from bitnet.linear import BitLinear, pack, shared_input
from bitnet.model import Transformer
from bitnet.quant import (
    QuantizedInput,
    absmean_ternary,
    quantize_input,
)
from bitnet_kernels import reference
from tests.helpers.small_training import assert_same, batch, small, train


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (50, {"n_layers": 1}),
        (8, {"granularity": "row", "norm_placement": "pre_norm", "activation": "silu"}),
        (8, {"granularity": "group", "group_size": 16, "qk_norm": True}),
        (8, {"norm_placement": "in_linear", "tie_embeddings": False}),
        (8, {"grad_mask": "trust", "grad_mask_c": 0.6}),
    ],
)
def test_fast_and_plain_training_are_one(steps: int, options: dict[str, Any]) -> None:
    model = small(**options)
    n_parameters = len(list(model.parameters()))
    fast, plain = train(model, steps, True), train(small(**options), steps, False)
    assert_same(fast, plain)
    assert len(fast) == steps * (2 + n_parameters)  # a gradient of each, and none of them nothing
    assert all(value.any() for value in fast)


def test_fast_and_plain_are_one_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(train(small(), 4, True), train(small(), 4, False))


@pytest.mark.parametrize("reentrant", [False, True])
def test_fast_and_plain_are_one_when_activations_are_recomputed(reentrant: bool) -> None:
    def recomputing(model: Transformer) -> Transformer:
        for layer in model.layers:
            inner = layer.forward
            layer.forward = lambda *args, inner=inner: checkpoint(  # type: ignore[method-assign]
                inner, *args, use_reentrant=reentrant
            )
        return model

    recomputed = train(recomputing(small()), 3, True)
    assert_same(recomputed, train(recomputing(small()), 3, False))
    assert_same(recomputed, train(small(), 3, False))


def test_each_weight_and_each_input_is_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"weights": 0, "tokens": 0}

    def counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            calls[what] += 1
            return function(*args)

        return counting

    monkeypatch.setattr(bitnet.quant, "absmean_ternary", counted("weights", absmean_ternary))
    monkeypatch.setattr(bitnet.quant, "absmax_int8", counted("tokens", reference.absmax_int8))
    monkeypatch.setattr(bitnet_kernels, "quant", counted("tokens", bitnet_kernels.quant))
    train(small(), 1, fast=True)
    assert calls == {"weights": 2 * 7, "tokens": 2 * 2 * 4}  # 2 layers; 2 micro-batches
    train(small(), 1, fast=False)
    assert calls == {"weights": 14 + 2 * 14, "tokens": 16 + 2 * 14}


def test_tokens_give_what_the_tensor_gives() -> None:
    generator = torch.Generator().manual_seed(1)
    layer = BitLinear(37, 11)
    results = []
    for quantized in (False, True):
        x = torch.randn(2, 5, 37, generator=generator.manual_seed(1), requires_grad=True)
        y = layer(quantize_input(x) if quantized else x)
        y.square().sum().backward()
        assert x.grad is not None
        assert layer.weight.grad is not None
        results.append([y.detach(), x.grad, layer.weight.grad.clone()])
        layer.zero_grad()
    assert_same(*results)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 5), (3,)])
def test_quantized_inputs_keep_their_shape(leading: tuple[int, ...]) -> None:
    tokens = quantize_input(torch.randn(*leading, 7))
    assert tokens.codes.shape == (*leading, 7)
    assert tokens.scale.shape == leading
    assert not tokens.scale.requires_grad
    assert BitLinear(7, 5)(tokens).shape == (*leading, 5)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(TypeError, match="input: expected a floating-point tensor"):
        quantize_input(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"input: expected shape \[..., 8\]"):
        BitLinear(8, 3)(quantize_input(torch.ones(2, 4)))
    with pytest.raises(TypeError, match="input: expected a tensor"):
        BitLinear(8, 3, norm=True)(quantize_input(torch.ones(2, 8)))


def test_who_gets_shared_tokens() -> None:
    x, layers = torch.randn(3, 8), [BitLinear(8, 4), BitLinear(8, 2)]
    assert isinstance(shared_input(x, *layers), QuantizedInput)
    assert shared_input(x, *layers, nn.Linear(8, 4)) is x
    assert shared_input(x, *layers, BitLinear(8, 4, norm=True)) is x
    seen: list[Any] = []
    kinds = ("forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook")
    for kind in kinds:
        handle = getattr(layers[1], f"register_{kind}")(lambda _, *args: seen.append(args))
        assert shared_input(x, *layers) is x
        handle.remove()
    for kind in kinds:
        register = getattr(nn.modules.module, f"register_module_{kind}")
        handle = register(lambda _, *args: seen.append(args))
        assert shared_input(x, *layers) is x
        handle.remove()
    assert isinstance(shared_input(x, *layers), QuantizedInput)

    class Scaled(BitLinear):
        def forward(self, input: Any) -> Tensor:
            return super().forward(2 * input)

    assert shared_input(x, *layers, Scaled(8, 4)) is x
    inner = layers[0].forward
    layers[0].forward = lambda input: inner(2 * input)  # type: ignore[method-assign]
    assert shared_input(x, *layers) is x


def test_a_packed_layer_takes_tokens() -> None:
    layer, x = BitLinear(8, 4), torch.randn(3, 8)
    packed = pack(copy.deepcopy(layer))
    with torch.no_grad():
        assert torch.equal(packed(quantize_input(x)), layer(x))


def test_a_hook_in_the_model_sees_a_tensor_and_changes_nothing() -> None:
    seen: list[Tensor] = []
    model = small()
    model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert_same(train(model, 1, fast=True), train(small(), 1, fast=True))
    assert [tensor.shape for tensor in seen] == 2 * [(2, 16, 24)]


def test_export_keeps_the_integers() -> None:
    model = small().eval()
    tokens = batch(0)[:, :16]
    with torch.no_grad():
        exported = torch.export.export(model, (tokens,))
        assert torch.equal(exported.module()(tokens), model(tokens))
    assert "int8_linear" in exported.graph_module.code
