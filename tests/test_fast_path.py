"""What is quantized once gives what quantizing it every time gives, to the last bit; and the scope
that holds a weight's codes notices when they are no longer true."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bitnet.model
from bitnet import weights_quantized
from bitnet.linear import BitLinear, pack, replace_linear, shared_tokens
from bitnet.model import ModelConfig, Transformer
from bitnet.optim import OptimConfig, build_optimizer
from bitnet.quant import (
    TernaryWeight,
    Tokens,
    absmean_ternary,
    dequantize,
    output_dtype,
    quantize_tokens,
    quantize_weight,
    stochastic_int8,
    ternary_linear_ste,
)
from bitnet_kernels import reference

SMALL: dict[str, Any] = {
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 40,
    "vocab_size": 50,
    "max_seq_len": 16,
}


def small(**options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**(SMALL | options)))


@contextmanager
def plain_path() -> Iterator[None]:
    """Every BitLinear on its own: its input and its weight quantized in each call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitnet.model, "shared_tokens", lambda x, *_: x)
        yield


def batch(step: int) -> Tensor:
    return torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(step))


def next_token_loss(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(
    model: Transformer, steps: int, fast: bool, forward: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Losses and gradients of ``steps`` optimizer steps of two micro-batches, in order."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    seen = []
    for step in range(steps):
        with weights_quantized(model) if fast else plain_path():
            for micro in range(2):
                loss = next_token_loss(
                    model if forward is None else forward, batch(2 * step + micro)
                )
                (loss / 2).backward()
                seen.append(loss.detach())
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


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
    fast, plain = train(small(**options), steps, True), train(small(**options), steps, False)
    assert_same(fast, plain)
    losses = torch.stack([value for value in fast if value.dim() == 0])
    assert not torch.equal(losses[:2], losses[-2:])  # it trained


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
        y = layer(quantize_tokens(x) if quantized else x)
        y.square().sum().backward()
        assert x.grad is not None
        assert layer.weight.grad is not None
        results.append([y.detach(), x.grad, layer.weight.grad.clone()])
        layer.zero_grad()
    assert_same(*results)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 5), (3,)])
def test_shape_of_tokens(leading: tuple[int, ...]) -> None:
    tokens = quantize_tokens(torch.randn(*leading, 7))
    assert tokens.codes.shape == (*leading, 7)
    assert tokens.scale.shape == leading
    assert not tokens.scale.requires_grad
    assert BitLinear(7, 5)(tokens).shape == (*leading, 5)


def test_errors_of_tokens() -> None:
    with pytest.raises(TypeError, match="input: expected a floating-point tensor"):
        quantize_tokens(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"input: expected shape \[..., 8\]"):
        BitLinear(8, 3)(quantize_tokens(torch.ones(2, 4)))
    with pytest.raises(TypeError, match="input: expected a tensor"):
        BitLinear(8, 3, norm=True)(quantize_tokens(torch.ones(2, 8)))


def test_who_gets_shared_tokens() -> None:
    x, layers = torch.randn(3, 8), [BitLinear(8, 4), BitLinear(8, 2)]
    assert isinstance(shared_tokens(x, *layers), Tokens)
    assert shared_tokens(x, *layers, nn.Linear(8, 4)) is x
    assert shared_tokens(x, *layers, BitLinear(8, 4, norm=True)) is x
    seen: list[Any] = []
    kinds = ("forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook")
    for kind in kinds:
        handle = getattr(layers[1], f"register_{kind}")(lambda _, *args: seen.append(args))
        assert shared_tokens(x, *layers) is x
        handle.remove()
    for kind in (*kinds[:3], "full_backward_pre_hook"):
        register = getattr(nn.modules.module, f"register_module_{kind}")
        handle = register(lambda _, *args: seen.append(args))
        assert shared_tokens(x, *layers) is x
        handle.remove()
    assert isinstance(shared_tokens(x, *layers), Tokens)

    class Scaled(BitLinear):
        def forward(self, input: Any) -> Tensor:
            return super().forward(2 * input)

    assert shared_tokens(x, *layers, Scaled(8, 4)) is x
    inner = layers[0].forward
    layers[0].forward = lambda input: inner(2 * input)  # type: ignore[method-assign]
    assert shared_tokens(x, *layers) is x


def test_a_packed_layer_takes_tokens() -> None:
    layer, x = BitLinear(8, 4), torch.randn(3, 8)
    packed = pack(copy.deepcopy(layer))
    with torch.no_grad():
        assert torch.equal(packed(quantize_tokens(x)), layer(x))


def test_a_hook_in_the_model_sees_a_tensor_and_changes_nothing() -> None:
    seen: list[Tensor] = []
    model = small()
    model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert_same(train(model, 1, fast=True), train(small(), 1, fast=True))
    assert [tensor.shape for tensor in seen] == 2 * [(2, 16, 24)]


# -- The scope ---------------------------------------------------------------------------------


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


# -- Transforms: torch.compile, torch.func, export ----------------------------------------------


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiled_once_for_all_steps() -> None:
    """Codes that change every step are inputs of the graph: one graph for all steps in the scope,
    one more outside of it."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ours = train(model, 4, True, compiled)
    assert len(graphs) == 1
    for value, expected in zip(ours, train(small(), 4, False), strict=True):
        # the same operations; sums of gradients may be added in another order
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    for _ in range(2):
        next_token_loss(compiled, batch(0)).backward()
        assert len(graphs) == 2
        with weights_quantized(model):
            next_token_loss(compiled, batch(0)).backward()
        assert len(graphs) == 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("int8_backward", ["input", "both"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_int8_backward_compiles_whole(int8_backward: Any, granularity: Any) -> None:
    layer = BitLinear(24, 8, granularity=granularity, int8_backward=int8_backward)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 24, requires_grad=True)
    y = compiled(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


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
        assert_same(list(gradients.values()), list(expected))


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


def test_export_keeps_the_integers() -> None:
    model = small().eval()
    tokens = batch(0)[:, :16]
    with torch.no_grad():
        exported = torch.export.export(model, (tokens,))
        assert torch.equal(exported.module()(tokens), model(tokens))
    assert "int8_linear" in exported.graph_module.code


# -- The backward in int8 ------------------------------------------------------------------------


def exact_gradients(x: Tensor, w: Tensor, dy: Tensor, granularity: Any) -> tuple[Tensor, Tensor]:
    """float64: dy @ W_hat and dy.T @ x_hat."""
    codes, gamma = absmean_ternary(w, granularity)
    x_q, s_x = reference.absmax_int8(x)
    x_hat = x_q.double() * s_x.double()[:, None]
    return dy.double() @ dequantize(codes, gamma).double(), dy.double().t() @ x_hat


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("int8_backward", ["input", "both"])
def test_int8_backward_is_right_on_average(granularity: Any, int8_backward: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    m, n, k, draws = 13, 21, 9, 300
    x = torch.randn(m, k, generator=generator, requires_grad=True)
    w = torch.randn(n, k, generator=generator, requires_grad=True)
    # rows and columns of very different size, as gradients have; some far below any epsilon
    dy = torch.randn(m, n, generator=generator) * torch.logspace(-12, 0, m)[:, None]
    dy *= torch.logspace(0, -2, n)
    torch.manual_seed(4)
    sums = [torch.zeros(m, k, dtype=torch.float64), torch.zeros(n, k, dtype=torch.float64)]
    for _ in range(draws):
        y = ternary_linear_ste(x, w, granularity=granularity, int8_backward=int8_backward)
        for total, gradient in zip(sums, torch.autograd.grad(y, (x, w), dy), strict=True):
            total += gradient.double() / draws
    dx, dw = exact_gradients(x.detach(), w.detach(), dy, granularity)
    # A rounding has variance <= s^2 / 4, s = max / 127 of its row. dx adds n of them, times a code
    # (times gamma); dW adds m of them, times x_q. 6 standard deviations of a mean of the draws, and
    # 2^-15 of the largest term for fp32's rounding of x/s + u (u has 24 bits, |x/s| up to 127).
    _, gamma = absmean_ternary(w.detach(), granularity)
    folded = (dy * gamma).abs().amax(1, keepdim=True).double()
    bound = folded / 127 * (6 * n**0.5 / 2 / draws**0.5 + n * 2**-15)
    assert ((sums[0] - dx).abs() <= bound).all()
    if int8_backward == "both":
        _, s_x = reference.absmax_int8(x.detach())
        largest = (dy * s_x[:, None]).abs().amax(0).double()[:, None]
        bound = largest * (6 * m**0.5 / 2 / draws**0.5 + m * 2**-15)  # |x_q| <= 127
        assert ((sums[1] - dw).abs() <= bound).all()
    else:
        torch.testing.assert_close(sums[1], dw, rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_by_hand() -> None:
    x = torch.tensor([[127.0, 0.25, -0.25, 3.0], [0.0, 0.0, 0.0, 0.0], [1e-42, 0.0, 0.0, -1e-42]])
    torch.manual_seed(0)
    draws = [stochastic_int8(x) for _ in range(4000)]
    for codes, scale in draws:
        assert scale[0] == 1
        assert codes[0, [0, 3]].tolist() == [127, 3]  # integers stay what they are
        assert codes[1].tolist() == [0, 0, 0, 0]
    mean = torch.stack([codes[0].double() for codes, _ in draws]).mean(0)
    # 0.25 is 1 in a quarter of the draws: 6 sigma = 6 sqrt(0.1875 / 4000)
    assert mean[1].item() == pytest.approx(0.25, abs=0.042)
    assert mean[2].item() == pytest.approx(-0.25, abs=0.042)
    again = stochastic_int8(x)[0]
    torch.manual_seed(0)
    assert torch.equal(draws[0][0], stochastic_int8(x)[0])  # torch's generator decides
    assert again.dtype == torch.int8


def test_int8_backward_of_zero_and_of_gradients_that_are_not_finite() -> None:
    layer = BitLinear(6, 5, bias=False, int8_backward="both")
    x = torch.randn(4, 6, requires_grad=True)
    layer(x).backward(torch.zeros(4, 5))
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert not x.grad.any()
    assert not layer.weight.grad.any()
    for bad in (float("nan"), float("inf")):
        x.grad = layer.weight.grad = None
        dy = torch.ones(4, 5)
        dy[2, 1] = bad
        layer(x).backward(dy)
        assert x.grad is not None
        assert x.grad.isnan().any(1).tolist() == [False, False, True, False]
        assert layer.weight.grad is not None
        assert layer.weight.grad.isnan().all(1).tolist() == [False, True, False, False, False]
    x = torch.randn(0, 6, requires_grad=True)
    layer.weight.grad = None
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


def test_int8_backward_adds_slices_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers below 127 with 127 among them are codes themselves: nothing is lost, whatever the
    slices."""
    monkeypatch.setattr(bitnet.quant, "_TOKENS_A_SUM", 4)
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-127, 128, (10, 6), generator=generator).float()
    dy = torch.randint(-127, 128, (10, 5), generator=generator).float()
    x[:, 0] = 127
    dy[::4] = dy[1::4] = 127
    dy[8:] = 127
    w = torch.randn(5, 6, generator=generator, requires_grad=True)
    ternary_linear_ste(x, w, int8_backward="both").backward(dy)
    assert w.grad is not None
    assert torch.equal(w.grad, dy.t() @ x)


def test_int8_backward_errors() -> None:
    with pytest.raises(ValueError, match="int8_backward: expected one of none, input, both"):
        BitLinear(4, 4, int8_backward="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int8_backward: 'input' does not go with granularity"):
        BitLinear(4, 4, granularity="group", int8_backward="input")
    with pytest.raises(ValueError, match="int8_backward: 'both' does not go with granularity"):
        ternary_linear_ste(
            torch.ones(1, 4), torch.ones(2, 4), granularity="group", int8_backward="both"
        )


def test_int8_backward_keeps_transposed_codes_only_where_it_wants_them() -> None:
    w = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert quantize_weight(w).transposed is None
    codes, _, transposed = quantize_weight(w, int8_backward="input")
    assert transposed is not None
    assert transposed.is_contiguous()
    assert torch.equal(transposed, codes.t())


def test_int8_backward_inside_the_scope() -> None:
    torch.manual_seed(0)
    layer = BitLinear(24, 8, bias=False, int8_backward="input")
    x, dy = torch.randn(5, 24, requires_grad=True), torch.randn(5, 8)
    (exact,) = torch.autograd.grad(ternary_linear_ste(x, layer.weight), x, dy)
    with weights_quantized(layer):
        held = layer._held_codes()
        assert held is not None
        assert held.transposed is not None
        (dx,) = torch.autograd.grad(layer(x), x, dy)
    assert not torch.equal(dx, exact)
    assert (dx - exact).norm() < 0.1 * exact.norm()  # 1/127 of the largest of 8, a rounding


def test_layers_pickled_before_int8_backward() -> None:
    layer = BitLinear(8, 4)
    old = BitLinear.__new__(BitLinear)
    old.__setstate__({k: v for k, v in layer.__getstate__().items() if k != "int8_backward"})
    x = torch.randn(3, 8)
    assert torch.equal(old(x), layer(x))


def test_quantized_with_other_options() -> None:
    x, w = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6)
    with pytest.raises(ValueError, match="quantized: int8_backward 'input' wants `transposed`"):
        ternary_linear_ste(x, w, quantized=quantize_weight(w), int8_backward="input")
    for made, wanted in (("tensor", "row"), ("row", "tensor"), ("group", "row"), ("row", "group")):
        quantized = quantize_weight(w, made)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"quantized: .* for granularity '{wanted}'"):
            ternary_linear_ste(x, w, granularity=wanted, quantized=quantized)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantized: expected codes"):
        ternary_linear_ste(x, w, quantized=quantize_weight(w[:3]))
    # what this backward does not want changes nothing
    quantized = quantize_weight(w, int8_backward="both")
    assert isinstance(quantized, TernaryWeight)
    ours, theirs = ternary_linear_ste(x, w, quantized=quantized), ternary_linear_ste(x, w)
    dy = torch.randn(3, 4)
    assert_same(list(torch.autograd.grad(ours, x, dy)), list(torch.autograd.grad(theirs, x, dy)))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_gamma_is_not_rounded_in_a_backward_of_16_bits(granularity: Any) -> None:
    """bf16 has steps of 2^-7 above 1: gamma = 1 + 38.45 * 2^-7 would lose 2^-8.5 of itself, for all
    tokens alike. Other roundings (2^-9 each) are of either sign and average out over 64 * 64."""
    generator = torch.Generator().manual_seed(0)
    gamma = 1 + 38.45 * 2**-7
    w = gamma * (2.0 * torch.randint(2, (32, 64), generator=generator) - 1)
    x = torch.randn(64, 64, generator=generator).bfloat16().requires_grad_()
    dy = torch.randn(64, 32, generator=generator).bfloat16()
    y = ternary_linear_ste(x, w, granularity=granularity)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = dy.double() @ w.double()
    assert abs((dx.double() * exact).sum() / exact.square().sum() - 1) < 2**-11


def test_a_backward_in_fp16_does_not_overflow() -> None:
    """2048 gradients of 100 sum to 204,800, beyond fp16; times a gamma of 0.01, they do not."""
    w, x = torch.full((2048, 4), 0.01), torch.ones(2, 4).half().requires_grad_()
    for granularity in ("tensor", "row"):
        y = ternary_linear_ste(x, w, granularity=granularity)  # type: ignore[arg-type]
        (dx,) = torch.autograd.grad(y, x, torch.full((2, 2048), 100.0).half())
        torch.testing.assert_close(dx.float(), torch.full((2, 4), 2048.0), rtol=2**-9, atol=0)


def test_fp64_stays_fp64_under_autocast() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert output_dtype(x) == F.linear(x, x).dtype == torch.float64
        assert output_dtype(x.float()) == torch.bfloat16


def test_int8_backward_trains() -> None:
    losses = {}
    for int8_backward in ("none", "both"):
        model = small(int8_backward=int8_backward)
        seen = train(model, 30, fast=True)
        losses[int8_backward] = torch.stack([v for v in seen if v.dim() == 0])[-10:].mean().item()
    # an approximation: near the exact run's loss, and below log(50) = 3.91, where both began
    assert losses["both"] == pytest.approx(losses["none"], abs=0.1)
