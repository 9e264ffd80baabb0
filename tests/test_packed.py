"""Gradients through packed layers."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bitnet.linear import BitLinear, TernaryLinear, pack
from bitnet.quant import absmean_ternary, dequantize

GRANULARITIES = ["tensor", "row", "group"]


def layers(granularity: Any, **options: Any) -> tuple[BitLinear, TernaryLinear]:
    layer = BitLinear(70, 9, granularity=granularity, group_size=32, **options)
    packed = pack(copy.deepcopy(layer))
    assert isinstance(packed, TernaryLinear)
    return layer, packed


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(70,), (5, 70), (2, 3, 70), (0, 70)])
def test_the_input_gets_the_gradient_of_the_dequantized_product(
    granularity: Any, shape: tuple[int, ...]
) -> None:
    layer, packed = layers(granularity)
    x, dy = torch.randn(*shape, requires_grad=True), torch.randn(*shape[:-1], 9)
    (got,) = torch.autograd.grad(packed(x), x, dy)
    codes, gamma = absmean_ternary(layer.weight, granularity, 32)
    w_hat = dequantize(codes, gamma, 32).double()
    bound = 9 * 2**-23 * (dy.abs().double() @ w_hat.abs())  # a sum of 9 products in fp32
    assert ((got - dy.double() @ w_hat).abs() <= bound).all()
    assert torch.equal(got, torch.autograd.grad(layer(x), x, dy)[0])  # as before it was packed


def test_a_norm_inside_and_a_bias_that_trains() -> None:
    layer, packed = layers("tensor", norm=True)
    packed.requires_grad_(True)  # norm and bias; codes and scale are no parameters
    x, dy = torch.randn(2, 3, 70), torch.randn(2, 3, 9)
    packed(x).backward(dy)
    layer(x).backward(dy)
    assert packed.bias is not None
    assert packed.rms_norm is not None
    assert layer.rms_norm is not None
    assert torch.equal(packed.bias.grad, layer.bias.grad)  # type: ignore[arg-type]
    assert torch.equal(packed.rms_norm.weight.grad, layer.rms_norm.weight.grad)  # type: ignore[arg-type]


def test_autocast_and_bf16() -> None:
    _, packed = layers("row")
    x = torch.randn(4, 70, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, packed.weight.sum(0).expand(4, 70))
    half = x.detach().bfloat16().requires_grad_()
    packed(half).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    # bf16 rounds the nine scaled gradients and the sum, by 2^-9 each
    bound = 10 * 2**-9 * packed.weight.abs().sum(0)
    assert ((half.grad.float() - packed.weight.sum(0)).abs() <= bound).all()


def test_without_something_to_train_there_is_no_graph() -> None:
    _, packed = layers("tensor")
    assert not packed(torch.randn(2, 70)).requires_grad
    with torch.no_grad():
        assert not packed(torch.randn(2, 70, requires_grad=True)).requires_grad


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiled_code_has_the_same_gradient() -> None:
    _, packed = layers("tensor")
    packed.scale.fill_(0.25)  # with whole numbers around it, every sum is exact in any order
    model = nn.Sequential(nn.Linear(6, 70), packed)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, dy = torch.randint(-9, 10, (3, 6)).float(), torch.randint(-9, 10, (3, 9)).float()
    expected = (dy @ packed.weight).T @ x
    for one in (model, compiled):
        (gradient,) = torch.autograd.grad(one(x), model[0].weight, dy)
        assert torch.equal(gradient, expected)
    assert expected.count_nonzero() > 300
