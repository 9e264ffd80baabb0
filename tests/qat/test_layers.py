"""QAT layers against numpy in int64 and plain autograd."""

import copy
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.linear import BitLinear
from bitnet.qat import product
from bitnet.qat.activations import fake_quantize_activation
from bitnet.qat.grid import Codes
from bitnet.qat.layers import QATConv1d, QATConv2d, QATEmbedding, QATLinear
from bitnet.qat.observers import make_observer
from bitnet.qat.prepare import convert, prepare, with_bitlinears
from bitnet.qat.product import ConvOp
from bitnet.qat.recipe import Recipe
from tests.helpers.qat_oracles import Activations, Granularity, conv_oracle, oracle, random_codes

CONVS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 4, "padding": "same", "dilation": 2, "bias": False},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
    {"kernel_size": 3, "padding": 2, "groups": 4, "dilation": 2},
]


def convolutions() -> list[tuple[nn.Conv1d | nn.Conv2d, Tensor]]:
    made: list[tuple[nn.Conv1d | nn.Conv2d, Tensor]] = []
    for options in CONVS:
        made.append((nn.Conv1d(4, 8, **options), torch.randn(3, 4, 11)))
        made.append((nn.Conv2d(4, 8, **options), torch.randn(2, 4, 7, 9)))
    uneven: dict[str, Any] = {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0)}
    made.append((nn.Conv2d(2, 6, **uneven, dilation=(1, 3), groups=2), torch.randn(2, 2, 5, 8)))
    return made


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_convolution_patch_by_patch(granularity: Granularity) -> None:
    for conv, x in convolutions():
        n, k = conv.weight.flatten(1).shape
        shape = {"tensor": (), "row": (n,), "group": (n, -(-k // 5))}[granularity]
        for affine in (False, True):
            zero_w = torch.randint(-128, 128, shape, dtype=torch.int32) if affine else None
            zero_x = torch.randint(-128, 128, (), dtype=torch.int32) if affine else None
            w = Codes(random_codes(n, k), torch.rand(shape), zero_w)
            scale = torch.rand(()) if affine else torch.rand(len(x))
            codes = Codes(random_codes(*x.shape), scale, zero_x)
            y = ConvOp.of(conv).exact(codes, w, conv.bias, torch.float32, 5).detach()
            assert np.array_equal(y.numpy(), conv_oracle(codes, w, conv.bias, 5, conv)), conv


def layers() -> list[tuple[Any, Any, Tensor]]:
    """(float layer, QAT class, input)"""
    made: list[tuple[Any, Any, Tensor]] = [
        (nn.Linear(13, 5), QATLinear, torch.randn(6, 13)),
        (nn.Linear(1, 3, bias=False), QATLinear, torch.randn(2, 1)),
    ]
    for conv, x in convolutions():
        made.append((conv, QATConv1d if isinstance(conv, nn.Conv1d) else QATConv2d, x))
    return made


QUANTIZERS: list[dict[str, Any]] = [
    {"weights": "int", "bits": 3},
    {"weights": "int", "bits": 8, "symmetric": False},
    {"weights": "absmean"},
    {"weights": "sign"},
    {"weights": "lsq", "bits": 4},
    {"weights": "seq"},
]


@pytest.mark.parametrize("options", QUANTIZERS, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("activations", ["absmax", "static", "affine"])
def test_forward_is_the_integer_product(
    options: dict[str, Any], granularity: Granularity, activations: str
) -> None:
    recipe = Recipe(
        **options,
        granularity=granularity,
        group_size=5,
        activations="absmax" if activations == "absmax" else "static",
        activation_symmetric=activations != "affine",
        activation_bits=5,
        observer="minmax",
    )
    for module, qat, x in layers()[:6]:
        layer = qat.from_float(module, recipe)
        if activations != "absmax":
            layer(0.8 * x)  # some values of x lie outside the range
            layer.eval()
        w = Codes(*layer.quantize())
        found = fake_quantize_activation(
            x, recipe, *layer.input_range(), per_sample=qat is not QATLinear
        )
        codes = Codes(found.codes, found.scale, found.zero_point)
        if qat is QATLinear:
            expected = oracle(codes, w, module.bias, 5)
        else:
            expected = conv_oracle(codes, w, module.bias, 5, module)
        assert np.array_equal(layer(x).detach().numpy(), expected)


def test_scale_of_a_token_and_of_a_sample() -> None:
    """Hand-computed: 4 bits, so the largest value of each token or sample has code 7."""
    recipe = Recipe(weights="int", bits=8, activation_bits=4)
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[127.0, -127.0]])
    layer = QATLinear.from_float(linear, recipe)
    x = torch.tensor([[7.0, 0.4], [14.0, 3.2]])  # scales 1 and 2
    assert torch.equal(layer(x), torch.tensor([[7.0 * 127], [10.0 * 127]]))
    conv = nn.Conv1d(2, 1, 1, bias=False)
    conv.weight.data = torch.tensor([[[127.0], [-127.0]]])
    samples = QATConv1d.from_float(conv, recipe)
    x = torch.tensor([[[7.0, 1.3], [0.4, -2.0]], [[14.0, 1.3], [3.2, -2.0]]])
    expected = torch.tensor([[[7.0, 3.0]], [[10.0, 4.0]]]) * 127
    assert torch.equal(samples(x), expected)


def reference_gradients(
    layer: Any, module: Any, x: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """By plain autograd of the float operation, on leaves that hold the quantized values."""
    w_hat = layer.recipe.quantizer.fake_quantize(layer.weight.flatten(1), layer.weight_step).hat
    per_sample = not isinstance(module, nn.Linear)
    x_hat = fake_quantize_activation(
        x, layer.recipe, *layer.input_range(), per_sample=per_sample
    ).hat
    twin = copy.deepcopy(module)
    twin.weight.data = w_hat.detach().reshape(module.weight.shape).clone()
    x_leaf = x_hat.detach().clone().requires_grad_()
    twin(x_leaf).backward(dy)
    assert x_leaf.grad is not None
    return x_leaf.grad, twin.weight.grad, None if twin.bias is None else twin.bias.grad


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("activations", ["absmax", "static"])
def test_gradients_are_those_at_the_quantized_values(activations: Activations) -> None:
    recipe = Recipe(weights="int", bits=3, activations=activations, observer="minmax")
    for module, qat, x in layers():
        layer = qat.from_float(copy.deepcopy(module), recipe)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        dy = torch.randn_like(y)
        y.backward(dy)
        dx, dw, db = reference_gradients(layer, module, x, dy)
        # the identity from there on: no value lies outside the range of min-max
        torch.testing.assert_close(leaf.grad, dx, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.weight.grad, dw, rtol=1e-5, atol=1e-5)
        if db is not None:
            torch.testing.assert_close(layer.bias.grad, db, rtol=1e-5, atol=1e-5)


def test_no_gradient_outside_a_static_range_and_for_saturated_weights() -> None:
    recipe = Recipe(weights="absmean", grad_mask="clip", activations="static", observer="minmax")
    layer = QATLinear.from_float(nn.Linear(8, 3), recipe)
    layer(torch.rand(50, 8))
    assert layer.input_observer is not None
    layer.input_observer.frozen = True
    x = (3 * torch.rand(4, 8)).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert torch.equal(x.grad == 0, x > layer.input_observer.high)
    mask = layer.weight.abs() <= layer.quantize()[1].unsqueeze(1)
    assert torch.equal(layer.weight.grad != 0, mask)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("gradient", ["none", "clip", "trust"])
def test_bitnet_recipe_is_bitlinear_to_the_bit(
    granularity: Granularity, gradient: Literal["none", "clip", "trust"]
) -> None:
    recipe = Recipe(weights="absmean", granularity=granularity, group_size=16, grad_mask=gradient)
    for shape in [(1, 1, 1), (5, 7, 33), (4, 3, 300)]:
        m, n, k = shape
        expected = BitLinear(k, n, granularity=granularity, group_size=16, grad_mask=gradient)
        linear = nn.Linear(k, n)
        linear.load_state_dict(expected.state_dict())
        layer = QATLinear.from_float(linear, recipe)
        x1, dy = torch.randn(2, m, k), torch.randn(2, m, n)
        x2 = x1.clone()
        for module, x in ((expected, x1), (layer, x2)):
            module(x.requires_grad_()).backward(dy)
        assert torch.equal(expected(x1), layer(x2))
        pairs = [(x1, x2), (expected.weight, layer.weight), (expected.bias, layer.bias)]
        for a, b in pairs:
            assert a.grad is not None
            assert b.grad is not None
            assert torch.equal(a.grad, b.grad)


def test_the_general_path_gives_bitnet_values_too() -> None:
    """Only its gradients are rounded in another order."""
    recipe = Recipe(weights="absmean", granularity="group", group_size=16)
    layer = QATLinear.from_float(nn.Linear(40, 6), recipe)
    x = torch.randn(9, 40)
    values = []
    for bits in (8, 7):
        layer.recipe = Recipe(
            weights="absmean", granularity="group", group_size=16, activation_bits=bits
        )
        values.append(layer(x))
    assert not torch.equal(*values)
    assert not layer.recipe.is_bitnet
    found = fake_quantize_activation(x, recipe)
    codes = Codes(found.codes, found.scale, None)
    w = Codes(*layer.quantize())
    y = product.exact_product(layer.op, codes, found.hat, w, layer.weight, layer.bias, 16)
    assert torch.equal(y, values[0])


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.9},
        {"activation_bits": 7},
        {"activations": "static"},
        {"activations": "none"},
        {"weights": "absmedian"},
    ],
)
def test_what_is_not_quite_bitnet_computes_by_its_own_recipe(change: dict[str, Any]) -> None:
    options = {"weights": "absmean", "granularity": "tensor"}
    assert Recipe(**options).is_bitnet  # type: ignore[arg-type]
    recipe = Recipe(**options | change)  # type: ignore[arg-type]
    assert not recipe.is_bitnet
    layer = QATLinear.from_float(nn.Linear(40, 6, bias=False), recipe)
    assert with_bitlinears(nn.Sequential(layer)) is None
    if recipe.activations == "absmax":
        x = torch.randn(9, 40)
        found = fake_quantize_activation(x, recipe)
        w_codes, scale, _ = layer.quantize()
        expected = oracle(
            Codes(found.codes, found.scale, None), Codes(w_codes, scale, None), None, 1
        )
        assert np.array_equal(layer(x).detach().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_learned_scales_are_not_rounded_by_a_cast(dtype: torch.dtype) -> None:
    """As little as the scales of the integer layers, which they become."""
    recipe = Recipe(weights="lsq", bits=8, activations="none", keep_first_last=False)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(1e-4)  # steps of 3e-6, which fp16 has to two digits
    model[1].weight = model[0].weight
    prepare(model, recipe)
    step = model[0].weight_step
    assert isinstance(step, nn.Parameter)
    model(torch.randn(3, 8)).sum().backward()
    assert step.grad is not None
    value, gradient = step.detach().clone(), step.grad.clone()
    assert 0 < value.min() < value.max() < 1e-5
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    assert model[0].weight_step is model[1].weight_step is step
    assert torch.equal(step, value)
    assert torch.equal(step.grad, gradient)
    assert model(torch.randn(3, 8, dtype=dtype)).dtype == dtype
    model(torch.randn(3, 8, dtype=dtype)).sum().backward()
    assert torch.equal(convert(copy.deepcopy(model))[0].scale, model[0].quantize()[1])  # type: ignore
    assert model.to("meta")[0].weight_step.is_meta
    assert model[0].weight_step.dtype == torch.float32


def test_an_observer_that_saw_nothing_has_no_range() -> None:
    """Not in eval mode, nor in training once it no longer moves; the message says which layer."""
    recipe = Recipe(weights="int", activations="static")
    layer = QATLinear.from_float(nn.Linear(4, 3), recipe)
    observer, x = layer.input_observer, torch.randn(2, 4)
    assert observer is not None
    message = r"input_observer: has seen no input; .*\(a QATLinear of weight \[3, 4\]\)"
    for training, frozen in ((False, False), (True, True)):
        layer.train(training)
        observer.frozen = frozen
        with pytest.raises(ValueError, match=message):
            layer(x)
    observer.frozen = False
    layer(x)
    observer.frozen = True
    assert torch.equal(layer(x), layer.eval()(x))
    assert observer.calibrated()
    observer.load_state_dict(make_observer(recipe).state_dict())
    with pytest.raises(ValueError, match=message):  # what was known of the old state is forgotten
        layer(x)


@pytest.mark.parametrize("activations", ["none", "absmax", "static"])
def test_convolutions_take_empty_batches_but_no_empty_samples(activations: Activations) -> None:
    """No samples are an empty batch; samples without a position are an error, as in torch."""
    recipe = Recipe(weights="int", activations=activations)
    convs = [
        (QATConv1d.from_float(nn.Conv1d(2, 3, 1), recipe), (2, 5), (2, 0)),
        (QATConv2d.from_float(nn.Conv2d(2, 3, 3, padding=2), recipe), (2, 4, 4), (2, 4, 0)),
    ]
    for conv, size, empty in convs:
        conv(torch.randn(1, *size))
        assert conv(torch.randn(0, *size)).shape[:2] == (0, 3)
        for shape in ((2, *empty), empty):
            with pytest.raises(ValueError, match="input: expected sizes of at least 1"):
                conv(torch.randn(*shape))


def test_lambdas_lead_from_the_float_layer_to_the_quantized_one() -> None:
    recipe = Recipe(weights="int", bits=2, activation_bits=4)
    for module, qat, x in layers()[:4]:
        layer = qat.from_float(module, recipe)
        quantized = layer(x)
        layer.lambda_w = layer.lambda_a = 0.0
        assert torch.equal(layer(x), module(x))
        w_hat = recipe.quantizer.fake_quantize(module.weight.flatten(1)).hat.view_as(module.weight)
        x_hat = fake_quantize_activation(x, recipe, per_sample=qat is not QATLinear).hat
        twin = copy.deepcopy(module)
        for layer.lambda_w, layer.lambda_a in [(0.25, 0.0), (0.0, 1.0), (0.5, 0.75), (1.0, 0.0)]:
            mixed = module.weight + layer.lambda_w * (w_hat - module.weight)
            twin.weight.data = mixed.detach()
            expected = twin(x + layer.lambda_a * (x_hat - x))
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
        layer.lambda_w, layer.lambda_a = 1 - 1e-7, 1.0
        torch.testing.assert_close(layer(x), quantized, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_weights_only_is_the_float_operation_on_w_hat() -> None:
    recipe = Recipe(weights="int", bits=3, activations="none")
    for module, qat, x in layers():
        layer = qat.from_float(copy.deepcopy(module), recipe)
        w_hat = recipe.quantizer.fake_quantize(module.weight.flatten(1)).hat
        module.weight.data = w_hat.detach().view_as(module.weight)
        torch.testing.assert_close(layer(x), module(x), rtol=1e-6, atol=1e-6)
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        twin = x.clone().requires_grad_()
        module(twin).square().sum().backward()
        torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.weight.grad, module.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", ["none", "absmax", "static"])
@pytest.mark.parametrize("lambda_", [1.0, 0.5])
def test_under_autocast_outputs_are_bf16_and_gradients_fp32(
    activations: Activations, lambda_: float
) -> None:
    recipe = Recipe(weights="int", bits=8, activations=activations)
    for module, qat, x in layers()[:4]:
        layer = qat.from_float(module, recipe)
        layer.lambda_w = layer.lambda_a = lambda_
        full = layer(x)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(leaf)
        assert y.dtype == torch.bfloat16
        if lambda_ == 1 and activations != "none":  # one cast of the same fp32 value
            assert torch.equal(y, full.bfloat16())
        y.float().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert layer.weight.grad.dtype == torch.float32
        module.zero_grad()


def test_learned_steps_learn() -> None:
    x = torch.randn(50, 16)
    for weights in ("lsq", "seq", "seq_ternary"):
        recipe = Recipe(weights=weights, bits=3)  # type: ignore[arg-type]
        layer = QATLinear.from_float(nn.Linear(16, 4), recipe)
        assert layer.weight_step is not None
        assert layer.weight_step.shape == (4,)
        layer(x).square().sum().backward()
        assert layer.weight_step.grad is not None
        assert bool((layer.weight_step.grad != 0).any())
        start = layer.weight_step.detach().clone()
        with torch.no_grad():
            layer.weight.mul_(3)
        layer.initialize_step()
        torch.testing.assert_close(layer.weight_step.detach(), 3 * start)
    plain = QATLinear.from_float(nn.Linear(16, 4), Recipe(weights="int"))
    plain.initialize_step()
    assert plain.weight_step is None
    assert set(plain.state_dict()) == {"weight", "bias"}


def test_observers_watch_in_training_only_and_until_frozen() -> None:
    recipe = Recipe(weights="int", activations="static", observer="minmax")
    layer = QATLinear.from_float(nn.Linear(3, 2), recipe)
    observer = layer.input_observer
    assert observer is not None
    with pytest.raises(ValueError, match=r"input_observer: has seen no input; run calibrate\(\)"):
        layer.eval()(torch.ones(1, 3))
    layer.train()
    layer.lambda_w = layer.lambda_a = 0.0
    layer(torch.tensor([[1.0, -2.0, 3.0]]))
    assert (observer.low.item(), observer.high.item()) == (-2.0, 3.0)
    layer.eval()(torch.full((1, 3), 9.0))
    assert observer.high.item() == 3.0
    observer.frozen = True
    layer.train()(torch.full((1, 3), 9.0))
    assert observer.high.item() == 3.0
    assert "input_observer.low" in layer.state_dict()


def test_a_bad_token_spoils_only_itself() -> None:
    """With static activations its whole batch: a code would hide it."""
    dynamic = Recipe(weights="int", bits=4)
    static = Recipe(weights="int", bits=4, activations="static")
    for module, qat, x in [layers()[0], layers()[2], layers()[3]]:
        bad = x.clone()
        bad[1].view(-1)[2] = float("nan")
        layer = qat.from_float(module, dynamic)
        y, good = layer(bad), layer(x)
        assert y[1].isnan().all()
        others = [i for i in range(len(x)) if i != 1]
        assert torch.equal(y[others], good[others])
        layer = qat.from_float(module, static)
        layer(x)
        assert layer.eval()(bad).isnan().all()


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 0, 5), (2, 3, 5)])
@pytest.mark.parametrize("activations", ["none", "absmax"])
def test_any_leading_dimensions_are_kept(
    leading: tuple[int, ...], activations: Activations
) -> None:
    layer = QATLinear.from_float(nn.Linear(7, 5), Recipe(weights="int", activations=activations))
    x = torch.randn(*leading, 7, requires_grad=True)
    y = layer(x)
    assert y.shape == (*leading, 5)
    assert y.is_contiguous()
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(layer(x.detach().reshape(-1, 7)).reshape(y.shape), y)


def test_convolutions_without_a_batch_and_with_an_empty_one() -> None:
    recipe = Recipe(weights="int")
    for conv, x in convolutions()[:4]:
        qat = QATConv1d if isinstance(conv, nn.Conv1d) else QATConv2d
        layer = qat.from_float(conv, recipe)  # type: ignore[arg-type]
        assert torch.equal(layer(x[0]), layer(x)[0])
        assert layer(x[:0]).shape == (0, *layer(x).shape[1:])


def test_wrong_inputs_and_modules() -> None:
    recipe = Recipe(weights="int")
    linear = QATLinear.from_float(nn.Linear(4, 2), recipe)
    with pytest.raises(ValueError, match=r"input: expected shape \[..., 4\]"):
        linear(torch.ones(2, 3))
    with pytest.raises(TypeError, match="input: expected a floating-point tensor"):
        linear(torch.ones(2, 4, dtype=torch.int64))
    conv = QATConv2d.from_float(nn.Conv2d(4, 2, 3), recipe)
    with pytest.raises(ValueError, match="input: expected 4 channels and 2 more dimensions"):
        conv(torch.ones(2, 3, 5, 5))
    with pytest.raises(ValueError, match="input: expected 4 channels"):
        conv(torch.ones(4, 5))
    with pytest.raises(ValueError, match="padding_mode: only 'zeros'"):
        QATConv2d.from_float(nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), recipe)
    for embedding in (nn.Embedding(4, 2, max_norm=1.0), nn.Embedding(4, 2, sparse=True)):
        with pytest.raises(ValueError, match="max_norm or sparse gradients"):
            QATEmbedding.from_float(embedding, recipe)


def test_embedding_rows_and_gradients() -> None:
    recipe = Recipe(weights="int", bits=4, symmetric=False)
    module = nn.Embedding(9, 5, padding_idx=3)
    layer = QATEmbedding.from_float(module, recipe)
    ids = torch.tensor([[0, 3, 8], [8, 8, 1]])
    codes, scale, zero = (None if t is None else t.numpy() for t in layer.quantize())
    assert codes is not None
    assert scale is not None
    assert zero is not None
    values = (codes - zero[:, None]).astype(np.float32) * scale[:, None]
    assert np.array_equal(layer(ids).detach().numpy(), values[ids.numpy()])
    layer(ids).sum().backward()
    assert module.weight.grad is not None
    uses = torch.bincount(ids.flatten(), minlength=9).float()
    uses[3] = 0  # padding learns nothing
    assert torch.equal(module.weight.grad, uses.unsqueeze(1).expand(9, 5))
    layer.lambda_w = 0.0
    assert torch.equal(layer(ids), module(ids))
    layer.lambda_w = 0.5
    half = (module.weight + torch.from_numpy(values)) / 2
    torch.testing.assert_close(layer(ids), F.embedding(ids, half))


def test_low_precision_weights_and_deep_copies() -> None:
    recipe = Recipe(weights="int", bits=4)
    for dtype in (torch.bfloat16, torch.float64):
        linear = nn.Linear(9, 4).to(dtype)
        layer = QATLinear.from_float(linear, recipe)
        x = torch.randn(3, 9, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert y.dtype == dtype
        y.sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == dtype
        assert torch.equal(copy.deepcopy(layer)(x), y)
    assert "W4A8 int row" in repr(layer)
