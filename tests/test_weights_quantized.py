"""The scope that holds a weight's codes notices when they are no longer true."""

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet import weights_quantized
from bitnet.linear import BitLinear, replace_linear
from bitnet.quant import (
    ternary_linear_ste,
)
from bitnet.training.optim import OptimConfig, build_optimizer
from tests.helpers.small_training import assert_same, batch, next_token_loss, small, train


def sequence() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    replace_linear(model)
    return model


def changed_inside(model: nn.Module, change: Callable[[], Any]) -> None:
    with weights_quantized(model):
        change()


def test_a_changed_weight_is_named_at_the_end() -> None:
    model = sequence()

    def replace() -> None:
        model[0].weight = nn.Parameter(torch.randn(8, 8))

    for change in (lambda: model[0].load_state_dict(model[0].state_dict()), replace):
        with pytest.raises(RuntimeError, match=r"^0\.weight: changed inside weights_quantized"):
            changed_inside(model, change)
    layer = BitLinear(3, 2)
    with pytest.raises(RuntimeError, match=r"^model\.weight: changed"):
        changed_inside(layer, lambda: nn.init.ones_(layer.weight))
    x = torch.randn(1, 3)
    assert torch.equal(layer(x), ternary_linear_ste(x, layer.weight, layer.bias))  # and is left


def test_an_optimizer_may_not_step_inside() -> None:
    """Fused ones leave no trace in Tensor._version; the step is refused before it changes any."""
    model = sequence()
    model(torch.randn(3, 8)).sum().backward()
    before = [parameter.clone() for parameter in model.parameters()]
    steps = [
        build_optimizer(model, OptimConfig(lr=1e-2)).step,
        torch.optim.SGD(model.parameters(), 0.1).step,
        torch.optim.SGD(model[2].parameters(), 0.1).step,
    ]
    for step, name in zip(steps, ("0", "0", "2"), strict=True):
        with pytest.raises(RuntimeError, match=rf"^{name}\.weight: .*; step after the block"):
            changed_inside(model, step)
        assert_same([parameter.detach() for parameter in model.parameters()], before)
    with weights_quantized(model[0]):
        with weights_quantized(model):
            pass
        with pytest.raises(RuntimeError, match=r"^model\.weight: .*; step after the block"):
            steps[0]()
        steps[2]()  # the inner scope is left, and its codes with it
    for step in steps:
        step()  # and here no scope is
    with weights_quantized(model):
        torch.optim.SGD([model[0].bias], 0.1).step()


def test_a_weight_that_lies_elsewhere_is_a_changed_one() -> None:
    def replace_data(model: nn.Module) -> None:
        model[0].weight.data = model[0].weight.data.clone()  # type: ignore[index]

    def there_and_back(model: nn.Module) -> None:
        model.bfloat16().float()

    for change in (nn.Module.bfloat16, nn.Module.double, replace_data, there_and_back):
        model = sequence()
        with pytest.raises(RuntimeError, match=r"^0\.weight: changed"):
            changed_inside(model, lambda: change(model))  # noqa: B023
        model = sequence()

        def change_and_call() -> None:
            change(model)  # noqa: B023
            weight = model[0].weight  # noqa: B023
            with pytest.raises(RuntimeError, match=r"^0\.weight: changed"):
                model(torch.ones(1, 8, dtype=weight.dtype))  # noqa: B023

        with pytest.raises(RuntimeError, match=r"^0\.weight: changed"):
            changed_inside(model, change_and_call)


def test_a_changed_weight_is_named_in_the_next_forward() -> None:
    model, x, reached = sequence(), torch.randn(3, 8), []

    def change_and_call() -> None:
        model(x)
        nn.init.ones_(model[2].weight)
        with pytest.raises(RuntimeError, match=r"^2\.weight: changed"):
            model(x)
        reached.append("the end")

    with pytest.raises(RuntimeError, match=r"^2\.weight: changed"):
        changed_inside(model, change_and_call)
    assert reached


def test_leaving_drops_the_codes_even_by_an_error() -> None:
    model, x = sequence(), torch.randn(3, 8)

    def fail() -> None:
        nn.init.ones_(model[0].weight)  # is not reported: the error that came first is
        raise KeyError

    with pytest.raises(KeyError):
        changed_inside(model, fail)
    expected = ternary_linear_ste(x, model[0].weight, model[0].bias)
    assert torch.equal(model[0](x), expected)


def test_nested_scopes() -> None:
    """The inner one takes what the outer one has not, and leaves the outer one's."""
    model, x = sequence(), torch.randn(3, 8)
    expected = model(x)
    with weights_quantized(model[2]):
        with weights_quantized(model):
            assert torch.equal(model(x), expected)
        nn.init.zeros_(model[0].weight)
        assert torch.equal(model[0](x), model[0].bias.expand(3, 8))
        with pytest.raises(RuntimeError, match=r"^0\.weight: changed"):
            changed_inside(model, lambda: nn.init.ones_(model[0].weight))
        with weights_quantized(model):
            pass
        assert torch.equal(model[2](model[1](model[0](x))), model(x))


def test_copies_made_inside_are_free_of_the_scope() -> None:
    model, x = sequence(), torch.randn(3, 8)
    with weights_quantized(model):
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        nn.init.normal_(other[0].weight)
        expected = ternary_linear_ste(x, other[0].weight, other[0].bias)
        assert torch.equal(other[0](x), expected)


def test_functional_call_and_computed_weights_inside_the_scope() -> None:
    layer, x = BitLinear(8, 4, bias=False), torch.randn(3, 8)
    other = torch.randn(4, 8)
    nn.utils.parametrizations.weight_norm(computed := BitLinear(8, 4))
    before = computed(x)
    with weights_quantized(nn.ModuleList([layer, computed])):
        y = torch.func.functional_call(layer, {"weight": other}, (x,))
        assert torch.equal(y, ternary_linear_ste(x, other))
        same = torch.func.functional_call(layer, dict(layer.named_parameters()), (x,))
        assert torch.equal(same, ternary_linear_ste(x, layer.weight))
        assert torch.equal(computed(x), before)
        nn.init.ones_(computed.parametrizations.weight.original0)
        assert not torch.equal(computed(x), before)


def test_scope_in_inference_mode_and_on_meta() -> None:
    with torch.inference_mode():
        model = sequence()
        expected = model(torch.ones(2, 8))
        with weights_quantized(model):
            assert torch.equal(model(torch.ones(2, 8)), expected)
    with weights_quantized(BitLinear(8, 4, device="meta")):
        pass


# Transforms: torch.compile, torch.func, export


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiled_once_for_all_steps() -> None:
    """Codes that change every step are inputs of the graph: one graph for all steps in the scope,
    one more outside of it."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    model = small(n_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ours = train(model, 4, True, compiled)
    assert len(graphs) == 1
    for value, expected in zip(ours, train(small(n_layers=1), 4, False), strict=True):
        # the same operations; sums of gradients may be added in another order
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    for _ in range(2):
        next_token_loss(compiled, batch(0)).backward()
        assert len(graphs) == 2
        with weights_quantized(model):
            next_token_loss(compiled, batch(0)).backward()
        assert len(graphs) == 2


def test_grad_of_torch_func_is_the_gradient() -> None:
    layer, x = BitLinear(8, 4), torch.randn(3, 8)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, parameters, (x,))
        return y.square().sum()

    parameters = dict(layer.named_parameters())
    for scope in (nullcontext(), weights_quantized(layer)):
        with scope:
            gradients = torch.func.grad(loss)(parameters)
        expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
        for gradient, other in zip(gradients.values(), expected, strict=True):
            torch.testing.assert_close(gradient, other)  # transforms see torch's own products


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiled_functional_call_inside_the_scope() -> None:
    layer, x, other = BitLinear(8, 4, bias=False), torch.randn(3, 8), torch.randn(4, 8)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(weight: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, {"weight": weight}, (x,))
        return y

    with weights_quantized(layer):
        assert torch.equal(call(other), ternary_linear_ste(x, other))
        assert torch.equal(call(layer.weight), ternary_linear_ste(x, layer.weight))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["export", "trace"])
def test_what_outlives_the_scope_takes_no_codes_along(how: str) -> None:
    layer, x = BitLinear(8, 4), torch.randn(3, 8)
    with torch.no_grad():
        with weights_quantized(layer):
            if how == "export":
                forward = torch.export.export(layer, (x,)).module()
            else:
                forward = torch.jit.trace(layer, (x,))
        next(p for name, p in forward.named_parameters() if name == "weight").normal_()
        weights = dict(forward.named_parameters())
        expected = ternary_linear_ste(x, weights["weight"], weights["bias"])
        assert torch.equal(forward(x), expected)
