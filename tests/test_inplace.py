"""In-place operators behind every layer: the bits of the same operators out of place."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.elementwise import RMSNorm, relu2_mul
from bitnet.linear import BitLinear, pack, shared_input, weights_quantized
from bitnet.loss import linear_cross_entropy
from bitnet.qat.activations import fake_quantize_activation
from bitnet.qat.adapters import AdapterConfig, add_adapters
from bitnet.qat.nf4 import NF4Linear
from bitnet.qat.prepare import calibrate, convert, prepare
from bitnet.qat.quantizers import WEIGHT_QUANTIZERS
from bitnet.qat.recipe import ActivationQuantizer, Recipe
from bitnet.quant import Granularity, Int8Backward

SHIFT = 0.25


def filled(y: Tensor) -> Tensor:
    y[..., ::2] = SHIFT
    return y


def filled_out_of_place(y: Tensor) -> Tensor:
    even = torch.arange(y.shape[-1], device=y.device) % 2 == 0
    return torch.where(even, torch.full_like(y, SHIFT), y)


def added_to_a_slice(y: Tensor) -> Tensor:
    y[..., 1:].add_(SHIFT)
    return y


def hard_dropout(y: Tensor, inplace: bool) -> Tensor:
    torch.manual_seed(1)
    return F.dropout(y, 0.5, inplace=inplace)


OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (nn.ReLU(inplace=True), nn.ReLU()),
    "+=": (lambda y: y.add_(torch.ones_like(y)), lambda y: y + torch.ones_like(y)),
    "*=": (lambda y: y.mul_(-2.5), lambda y: y * -2.5),
    "masked_fill": (
        lambda y: y.masked_fill_(y.detach() < 0, -3.0),
        lambda y: y.masked_fill(y.detach() < 0, -3.0),
    ),
    "slice": (filled, filled_out_of_place),
    "view": (added_to_a_slice, lambda y: y + SHIFT * (torch.arange(y.shape[-1]) > 0).to(y.dtype)),
    "dropout": (lambda y: hard_dropout(y, True), lambda y: hard_dropout(y, False)),
    "twice": (lambda y: F.relu_(y.neg_()), lambda y: F.relu(-y)),
}


def check(layer: nn.Module, x: Tensor, forward: Callable[..., Any] | None = None) -> None:
    """Every operator in place gives the bits that it gives out of place."""
    forward = layer if forward is None else forward
    for name, operators in OPERATORS.items():
        results = []
        for operator in operators:
            x.grad = None
            layer.zero_grad()
            torch.manual_seed(0)  # stochastic rounding in an int8 backward
            y = operator(forward(x))
            weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).reshape(y.shape)
            (y * y * weights).sum().backward()
            gradients = {n: p.grad for n, p in layer.named_parameters()} | {"input": x.grad}
            results.append((y.detach().clone(), gradients))
        (y, gradients), (expected, expected_gradients) = results
        assert torch.equal(y, expected), name
        assert any(g is not None for g in gradients.values())
        for key, gradient in gradients.items():
            other = expected_gradients[key]
            same = gradient is other if other is None else torch.equal(gradient, other)
            assert same, (name, key)


SHAPES = [(3, 8), (2, 3, 8), (8,), (0, 8)]


def an_input(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("norm", [False, True])
def test_outputs_of_bitlinear_may_be_changed_in_place(granularity: Granularity, norm: bool) -> None:
    for bias in (True, False):
        layer = BitLinear(8, 5, bias, granularity=granularity, group_size=3, norm=norm)
        for shape in SHAPES:
            check(layer, an_input(shape))


@pytest.mark.parametrize("int8_backward", ["none", "input", "both"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_every_option_of_bitlinear_allows_changes_in_place(
    int8_backward: Int8Backward, granularity: Granularity
) -> None:
    layer = BitLinear(8, 5, granularity=granularity, int8_backward=int8_backward, grad_mask="trust")
    with weights_quantized(layer):
        check(layer, an_input((3, 8)))
        check(layer, an_input((2, 3, 8)), lambda x: layer(shared_input(x, layer, layer)))
    with torch.autocast("cpu", torch.bfloat16):
        check(layer, an_input((3, 8)))


def test_a_hook_may_work_in_place() -> None:
    layer = BitLinear(8, 5)
    for hook in (lambda _, __, y: y.relu_(), lambda _, __, y: None if y.mul_(2) is y else y):
        x = an_input((3, 8))
        expected = layer(x)
        handle = layer.register_forward_hook(hook)
        y = layer(x)
        handle.remove()
        assert not torch.equal(y, expected)
        y.sum().backward()
        assert x.grad is not None


def test_an_output_can_be_detached_in_place() -> None:
    for layer in (BitLinear(8, 5), nn.Linear(8, 5)):
        y = layer(an_input((3, 8))).detach_()
        assert not y.requires_grad


def freeze(layer: nn.Module) -> None:
    if layer.input_observer is not None:
        layer.input_observer.frozen = True


@pytest.mark.parametrize("weights", WEIGHT_QUANTIZERS)
def test_qat_linear(weights: str) -> None:
    for activations in ("none", "absmax", "static"):
        for gradient in ("none", "clip", "trust"):
            recipe = Recipe(
                weights=weights,
                granularity="row",
                activations=activations,
                grad_mask=gradient,
                symmetric=weights != "int",
                keep_first_last=False,
            )
            layer = prepare(nn.Linear(8, 5), recipe)
            calibrate(layer, [torch.randn(4, 8)])
            freeze(layer)
            check(layer, an_input((2, 3, 8)))
            layer.lambda_w = layer.lambda_a = 0.5
            check(layer, an_input((3, 8)))


@pytest.mark.parametrize("activations", ["none", "absmax", "static"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_qat_convolutions(activations: ActivationQuantizer, granularity: Granularity) -> None:
    recipe = Recipe(
        weights="int",
        granularity=granularity,
        group_size=5,
        activations=activations,
        modules=["conv1d", "conv2d"],
        keep_first_last=False,
    )
    for conv, shape in (
        (nn.Conv1d(4, 6, 3, groups=2), (4, 7)),
        (nn.Conv2d(4, 6, (3, 2), padding=1), (4, 5, 4)),
    ):
        layer = prepare(conv, recipe)
        calibrate(layer, [torch.randn(2, *shape)])
        freeze(layer)
        for batch in ((), (2,)):
            check(layer, an_input((*batch, *shape)))


@pytest.mark.parametrize("weights", ["int", "lsq"])
def test_qat_embedding(weights: str) -> None:
    recipe = Recipe(weights=weights, modules=["embedding"], keep_first_last=False)
    layer = prepare(nn.Embedding(7, 5), recipe)
    ids = torch.tensor([[0, 3], [6, 3]])
    check(layer, an_input((1,)), lambda _: layer(ids))


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("base", ["nf4", "ternary"])
def test_outputs_of_adapters_may_be_changed_in_place(
    kind: Literal["lora", "qlora"], base: Literal["nf4", "ternary"]
) -> None:
    config = AdapterConfig(kind=kind, base=base, rank=2, targets=["0"])
    for bias in (True, False):
        model = add_adapters(nn.Sequential(nn.Linear(8, 5, bias)), config)
        nn.init.normal_(model[0].lora_b)
        for shape in SHAPES:
            check(model, an_input(shape))
            check(model[0].base, an_input(shape))


def test_an_adapter_beside_a_quantizing_layer() -> None:
    recipe = Recipe(weights="int", bits=4, keep_first_last=False)
    model = prepare(nn.Sequential(nn.Linear(8, 5)), recipe)
    add_adapters(model, AdapterConfig(kind="lora", rank=2, targets=["0"], train_base=True))
    check(model, an_input((2, 3, 8)))


def test_norm_and_gate() -> None:
    for shape in ((3, 8), (2, 3, 8), (8,)):
        check(RMSNorm(8), an_input(shape))
        up = torch.randn(shape)
        check(nn.Identity(), an_input(shape), lambda x, up=up: relu2_mul(x, up))


def test_quantized_values() -> None:
    recipe = Recipe(weights="int")
    x = an_input((3, 8))
    for weights in ("int", "lsq"):
        recipe = Recipe(weights=weights)
        step = torch.full((3,), 0.1, requires_grad=True) if weights == "lsq" else None
        check(nn.Identity(), x, lambda x: recipe.quantizer.fake_quantize(x, step).hat)  # noqa: B023
    check(nn.Identity(), x, lambda x: fake_quantize_activation(x, recipe).hat)


@pytest.mark.parametrize("norm", [RMSNorm(8), None])
def test_an_input_that_is_modified_after_it_was_kept_is_an_error(norm: RMSNorm | None) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    gate = x * 1
    y = relu2_mul(gate, gate * 2) if norm is None else norm(gate)
    gate.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_a_layer_keeps_is_not_its_input() -> None:
    """BitLinear keeps codes: a change of its input in place moves no gradient."""
    layer = BitLinear(8, 5, granularity="row")
    x = torch.randn(3, 8, requires_grad=True)
    layer(x * 1).square().sum().backward()
    expected = [p.grad.clone() for p in (x, *layer.parameters()) if p.grad is not None]
    x.grad = None
    layer.zero_grad()
    given = x * 1
    y = layer(given)
    given.zero_()
    y.square().sum().backward()
    gradients = [p.grad for p in (x, *layer.parameters()) if p.grad is not None]
    assert all(map(torch.equal, gradients, expected))


def test_loss() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    targets = torch.tensor([0, 6, 2, 2, 1])
    loss = linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(loss / 4, (hidden, weight))
    in_place = linear_cross_entropy(hidden, weight, targets).div_(4)
    assert all(map(torch.equal, torch.autograd.grad(in_place, (hidden, weight)), gradients))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_layers_for_inference_allow_changes_in_place(requires_grad: bool) -> None:
    layers: list[nn.Module] = [pack(BitLinear(8, 5, granularity=g)) for g in ("tensor", "row")]
    for activations in ("none", "absmax"):
        recipe = Recipe(weights="int", activations=activations, keep_first_last=False)
        layers.append(convert(prepare(nn.Linear(8, 5), recipe)))
    for layer in layers:
        for shape in SHAPES:
            x = torch.randn(shape, requires_grad=requires_grad)
            expected = F.relu(layer(x))
            assert torch.equal(F.relu_(layer(x)), expected)
            with torch.no_grad():
                assert torch.equal(F.relu_(layer(x)), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("kind", ["bitlinear", "qat"])
def test_compiled_layers_allow_changes_in_place(kind: str) -> None:
    layer: nn.Module = BitLinear(8, 5)
    if kind == "qat":
        layer = prepare(nn.Linear(8, 5), Recipe(weights="int", keep_first_last=False))
    model = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Linear(5, 2))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8)
    for m in (model, compiled):
        m(x).square().sum().backward()
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)  # native sums have an order of their own


def test_a_residual_network_trains() -> None:
    """The model of the report: in-place activations and residuals between quantized layers."""

    class Block(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.inplace = inplace
            self.a, self.b = BitLinear(8, 8, norm=True), BitLinear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(F.relu(self.a(x), inplace=self.inplace))
            if self.inplace:
                y += x
                return y
            return y + x

    models = [nn.Sequential(*(Block(inplace) for _ in range(3))) for inplace in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(4, 8)
    for model in models:
        model(x).square().mean().backward()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class Meta(Tensor):
    """What MONAI and others hand on: a tensor that stays of its class."""


@pytest.mark.parametrize("kind", ["bitlinear", "norm", "qat", "conv", "none", "nf4"])
def test_a_subclass_of_tensor_goes_through(kind: str) -> None:
    """As through nn.Linear: the output is one too, may be modified in place, and has gradients."""
    recipe = Recipe(weights="int", modules=["linear", "conv1d"], keep_first_last=False)
    layers: dict[str, Callable[[], nn.Module]] = {
        "bitlinear": lambda: BitLinear(8, 4),
        "norm": lambda: BitLinear(8, 4, norm=True),
        "qat": lambda: prepare(nn.Linear(8, 4), recipe),
        "conv": lambda: prepare(nn.Conv1d(3, 4, 3), recipe),
        "none": lambda: prepare(nn.Linear(8, 4), dataclasses.replace(recipe, activations="none")),
        "nf4": lambda: NF4Linear(nn.Linear(8, 4)),
    }
    layer = layers[kind]()
    results = []
    for cls in (Tensor, Meta):
        x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = layer(x.as_subclass(cls))
        assert type(y) is cls
        y.relu_().square().sum().backward()
        assert x.grad is not None
        results.append([y.as_subclass(Tensor), x.grad, *(p.grad for p in layer.parameters())])
        layer.zero_grad()
    assert torch.equal(results[0][0], results[1][0])
    for of_tensor, of_subclass in zip(*results, strict=True):
        if of_tensor is not None or of_subclass is not None:  # native sums have their own order
            torch.testing.assert_close(of_tensor, of_subclass)
