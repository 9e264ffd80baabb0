"""Telemetry against closed forms (Gaussian, uniform), hand-made weights, and doing no harm."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet.linear import BitLinear, replace_linear, weights_quantized
from bitnet.model import ModelConfig, Transformer
from bitnet.qat import Recipe, prepare
from bitnet.quant import quantize_input
from bitnet.training.telemetry import Telemetry


def layer_of(weight: Tensor, **options: Any) -> BitLinear:
    layer = BitLinear(weight.shape[1], weight.shape[0], bias=False, **options)
    layer.weight.data = weight.clone()
    return layer


def small_model() -> nn.Sequential:
    """With a layer in high precision, as a language model's head is."""
    layers = [nn.Linear(48, 64), nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 9), nn.Linear(9, 7)]
    model = nn.Sequential(*layers)
    replace_linear(model, skip=("4",))
    return model


def test_gaussian_weights_and_inputs() -> None:
    # |W| > mean|W|/2 fails with probability 2 Phi(s) - 1, s = sqrt(2/pi)/2; the band around the
    # threshold has 2 (Phi(1.05 s) - Phi(0.95 s)); a Gaussian's kurtosis is 3.
    def phi(z: float) -> float:
        return (1 + math.erf(z / math.sqrt(2))) / 2

    s = math.sqrt(2 / math.pi) / 2
    telemetry = Telemetry(layer_of(0.02 * torch.randn(500, 1000)))
    reading = telemetry.read(torch.randn(64, 1000))
    assert reading["ternary/zeros"] == pytest.approx(2 * phi(s) - 1, abs=0.003)
    assert reading["ternary/dead_zone"] == pytest.approx(
        2 * (phi(1.05 * s) - phi(0.95 * s)), abs=0.001
    )
    assert reading["ternary/gamma"] == pytest.approx(0.02 * 2 * s, rel=0.01)
    assert reading["ternary/gamma_drift"] == 0
    assert reading["ternary/act_kurtosis"] == pytest.approx(3, abs=0.1)
    assert "ternary/flip_rate" not in reading


def test_uniform_weights_and_inputs() -> None:
    telemetry = Telemetry(BitLinear(400, 400))  # nn.Linear's initialization is uniform
    reading = telemetry.read(torch.rand(64, 400))
    assert reading["ternary/zeros"] == pytest.approx(0.25, abs=0.005)
    assert reading["ternary/dead_zone"] == pytest.approx(0.025, abs=0.002)
    assert reading["ternary/act_kurtosis"] == pytest.approx(9 / 5, abs=0.03)


def test_hand_made() -> None:
    # mean|W| = 1, threshold 0.5, dead zone [0.475, 0.525]: 0.5 and -0.48 are inside.
    layer = layer_of(torch.tensor([[2.0, -2.0, 0.5, -0.48], [0.02, 1.0, 1.0, -1.0]]))
    telemetry = Telemetry(layer)
    inputs = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])  # +-127: 2 of 8
    reading = telemetry.read(inputs)
    assert reading["ternary/zeros"] == 3 / 8
    assert reading["ternary/dead_zone"] == 2 / 8
    assert reading["ternary/gamma"] == 1
    assert reading["ternary/act_clipped"] == 2 / 8
    # by the definition of kurtosis, in Python's floats
    x = inputs.flatten().tolist()
    mean = sum(x) / 8
    second, fourth = (sum((v - mean) ** power for v in x) / 8 for power in (2, 4))
    assert reading["ternary/act_kurtosis"] == pytest.approx(fourth / second**2, rel=1e-5)

    layer.weight.data = 1.5 * torch.tensor([[2.0, -2.0, 0.5, 0.58], [0.02, 1.0, -1.0, -0.9]])
    reading = telemetry.read(inputs)  # -0.48 (0) became 0.58 (+1), 1.0 (+1) became -1.0 (-1)
    assert reading["ternary/flip_rate"] == 2 / 8
    assert reading["ternary/gamma_drift"] == pytest.approx(0.5)
    assert telemetry.read(inputs)["ternary/flip_rate"] == 0


@pytest.mark.parametrize("granularity", ["row", "group"])
def test_scales_are_spread(granularity: str) -> None:
    """Each row (group of 3 columns) times its own constant is the same ternary matrix."""
    weight = torch.randn(6, 10)
    columns = 10 if granularity == "row" else 3
    for part in weight.split(columns, 1):
        part /= part.abs().mean(1, keepdim=True)
    plain = [(part.abs() - 0.5).abs() <= 0.025 for part in weight.split(columns, 1)]
    for part, factor in zip(weight.split(columns, 1), (0.1, 3.0, 20.0, 0.5), strict=False):
        part *= factor * torch.arange(1, 7).unsqueeze(1)
    telemetry = Telemetry(layer_of(weight, granularity=granularity, group_size=3))
    reading = telemetry.read(torch.randn(2, 10))
    assert reading["ternary/dead_zone"] == pytest.approx(torch.cat(plain, 1).float().mean().item())


def test_layers_and_weighted_means() -> None:
    model = nn.Sequential(layer_of(torch.ones(3, 8)), layer_of(torch.eye(3)))
    reading = Telemetry(model).read(torch.randn(4, 8))
    assert set(reading["ternary/layers"]) == {"0", "1"}
    assert reading["ternary/layers"]["0"]["zeros"] == 0
    assert reading["ternary/layers"]["1"]["zeros"] == pytest.approx(6 / 9, abs=1e-4)
    assert reading["ternary/zeros"] == pytest.approx(6 / 33)


def test_norm_inside_the_layer_counts() -> None:
    """The activations read are those that are quantized: after the layer's own norm."""
    layer = layer_of(torch.randn(8, 4), norm=True)
    assert layer.rms_norm is not None
    layer.rms_norm.weight.data = torch.tensor([1.0, 1.0, 1.0, 0.0])
    x = torch.tensor([[1.0, -1.0, 1.0, 50.0]])
    assert Telemetry(layer).read(x)["ternary/act_clipped"] == 3 / 4


def test_no_ternary_layer() -> None:
    telemetry = Telemetry(nn.Linear(4, 4))
    assert telemetry.read(torch.randn(2, 4)) == {}
    assert telemetry.state() == {}
    telemetry.load_state({})


def test_layer_that_is_not_called_and_one_called_twice() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.busy = BitLinear(5, 5), BitLinear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.busy(input=self.busy(x)) + self.busy(x[:0]).sum()

    reading = Telemetry(Odd()).read(torch.randn(9, 5))
    assert "act_kurtosis" not in reading["ternary/layers"]["idle"]
    assert reading["ternary/layers"]["busy"]["act_kurtosis"] > 0


def test_state_continues_exactly() -> None:
    model, inputs = small_model(), torch.randn(5, 48)
    straight, first = Telemetry(model), Telemetry(model)
    for telemetry in (straight, first):
        telemetry.read(inputs)
    state = {key: value.clone() for key, value in first.state().items()}
    assert state["codes.0"].dtype == torch.uint8
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    resumed = Telemetry(model)
    resumed.load_state(state)
    reading = resumed.read(inputs)
    assert reading == straight.read(inputs)
    assert 0 < reading["ternary/flip_rate"] < 1


def test_state_of_another_model() -> None:
    state = {"codes.9": torch.zeros(1, 16, dtype=torch.uint8), "gamma.9": torch.ones(())}
    with pytest.raises(ValueError, match=r"state: not of this model's layers: 'codes\.0'"):
        Telemetry(small_model()).load_state(state)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_reading_disturbs_nothing(autocast: bool) -> None:
    """The same training step with and without a reading before it, inside the autocast region:
    the same dropout mask, the same gradients (autocast's cache of cast weights must not have kept
    copies without history), bit for bit."""

    def gradients(reading: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = small_model()
        model[2].eval()  # a mixed state that must come back as it was
        inputs = torch.randn(5, 48)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if reading:
                Telemetry(model).read(inputs)
                assert [module.training for module in model] == [True, True, False, True, True]
                assert all(p.grad is None for p in model.parameters())
                assert torch.is_autocast_enabled("cpu") == autocast
                assert torch.is_autocast_cache_enabled()
                assert not any(module._forward_pre_hooks for module in model)
            model(inputs).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None] + [torch.rand(3)]

    for with_reading, without in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(with_reading, without)


def test_dropout_is_off_in_a_reading() -> None:
    model, inputs = small_model(), torch.randn(5, 48)
    assert Telemetry(model).read(inputs) == Telemetry(model.eval()).read(inputs)


def test_random_state_is_kept_from_a_model_that_draws_always() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = BitLinear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + torch.randn_like(x))

    model = Noisy()
    before = torch.get_rng_state()
    Telemetry(model).read(torch.zeros(3, 4))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore")  # of torch.compile's own tracing
def test_a_compiled_model_is_read_without_compiling_again() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model, inputs = small_model(), torch.randn(5, 48)
    model.compile(backend=backend)
    model(inputs)
    compiled = len(graphs)
    assert compiled > 0
    assert Telemetry(model).read(inputs)["ternary/act_kurtosis"] > 0
    model(inputs)
    assert len(graphs) == compiled


def test_a_failing_forward_leaves_no_trace() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="input: expected shape"):
        Telemetry(model).read(torch.randn(5, 47))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model)


def test_tokens_that_were_quantized_before_read_the_same() -> None:
    layer, x = BitLinear(40, 8), torch.randn(5, 40)

    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=quantize_input(x))

    early = Telemetry(Early()).read(x)["ternary/layers"]["layer"]
    assert early == Telemetry(layer).read(x)["ternary/layers"][""]


def test_a_reading_between_micro_batches_of_one_scope() -> None:
    """Its activations are those that training sees, and the scope does not notice it."""
    model = Transformer(ModelConfig(depth=1, vocab_size=20, max_seq_len=8))
    tokens = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(0))
    outside = Telemetry(model).read(tokens)
    with weights_quantized(model):
        assert Telemetry(model).read(tokens) == outside


def test_non_finite_weights_are_reported_not_hidden() -> None:
    layer = layer_of(torch.tensor([[1.0, math.nan], [1.0, 1.0]]))
    assert math.isnan(Telemetry(layer).read(torch.randn(3, 2))["ternary/gamma"])


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_fine_tuning_to_ternary_is_read_like_ternary_training(granularity: Any) -> None:
    layers = [nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 9)]
    ternary = replace_linear(
        copy.deepcopy(nn.Sequential(*layers)), skip=(), granularity=granularity, group_size=20
    )
    options: Any = {"keep_first_last": False, "granularity": granularity, "group_size": 20}
    tuned = prepare(nn.Sequential(*layers), Recipe(weights="absmean", **options))
    inputs = torch.randn(7, 48)
    readings = [Telemetry(model).read(inputs) for model in (ternary, tuned)]
    assert readings[0] == readings[1]
    assert set(readings[0]["ternary/layers"]) == {"0", "2"}
    other = prepare(copy.deepcopy(nn.Sequential(*layers)), Recipe(weights="int", **options))
    assert Telemetry(other).read(inputs) == {}
