"""The [qat] schedule: its formulas, its edges, and what it does to prepared layers."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from bitnet.qat.layers import QATLinear
from bitnet.qat.prepare import prepare
from bitnet.qat.recipe import Recipe
from bitnet.qat.schedule import QATConfig, first_step, lambdas, optimal_share, set_step


def test_optimal_share_is_the_abstracts_fit() -> None:
    # 20, 100 and 1000 tokens a parameter at 1.58 bits: S = 101, 506, 5063
    for ratio, share in ((20, 0.233), (100, 0.339), (1000, 0.454)):
        assert optimal_share(ratio * 10**6, 10**6, 1.58) == pytest.approx(share, abs=0.002)
    assert optimal_share(10**6, 10**6, 8) == 0.0  # S = 1
    assert optimal_share(10, 10**9, 1.58) == 0.0
    assert 0 < optimal_share(2 * 10**6, 10**6, 8) < 1e-4
    shares = [optimal_share(10**n, 10**6, 4) for n in range(4, 30)]
    assert shares == sorted(shares)
    assert all(0 <= share < 1 for share in shares)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 30, 49, 100, 997])
def test_first_step_is_the_first_at_or_past_the_share(total: int) -> None:
    for i in range(101):
        share = i / 100
        wanted = next((s for s in range(total) if s / total >= share), total)
        assert first_step(share, total) == wanted


def test_lambdas_without_warmup_are_a_switch() -> None:
    config = QATConfig(start=0.5)
    assert [lambdas(s, 10, config) for s in range(10)] == [(0.0, 0.0)] * 5 + [(1.0, 1.0)] * 5
    assert lambdas(0, 10, QATConfig()) == (1.0, 1.0)


@pytest.mark.parametrize("ramp", ["linear", "cosine", "exponential"])
def test_ramps_rise_from_0_to_exactly_1(ramp: str) -> None:
    config = QATConfig(start=0.25, weight_warmup=0.5, weight_ramp=ramp)  # type: ignore[arg-type]
    values = [lambdas(s, 40, config) for s in range(40)]
    weights = [w for w, _ in values]
    assert weights[:10] == [0.0] * 10
    assert all(a < b for a, b in pairwise(weights[9:30]))
    assert weights[29:] == [1.0] * 11  # the 20th of 20 steps is the first at 1
    assert [a for _, a in values] == [0.0] * 10 + [1.0] * 30  # the activations have their own
    half = {
        "linear": 0.5,
        "cosine": 0.5,
        "exponential": (1 - math.exp(-2.5)) / (1 - math.exp(-5)),
    }[ramp]
    assert weights[19] == pytest.approx(half)


def test_a_step_outside_the_run_and_an_unresolved_start_are_errors() -> None:
    for step in (-1, 10):
        with pytest.raises(ValueError, match="step must be in"):
            lambdas(step, 10, QATConfig())
    with pytest.raises(ValueError, match="resolve the config first"):
        lambdas(0, 10, QATConfig(start="auto"))


def layers(model: nn.Module) -> list[QATLinear]:
    return [module for module in model.modules() if isinstance(module, QATLinear)]


def model(recipe: Recipe) -> nn.Module:
    torch.manual_seed(1)
    return prepare(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)), recipe)


LSQ = Recipe(weights="lsq", bits=4, granularity="row", keep_first_last=False)


def test_set_step_sets_lambdas_and_initializes_steps_at_the_switch_only() -> None:
    prepared = model(LSQ)
    config = QATConfig(start=0.5, weight_warmup=0.2)
    with torch.no_grad():
        for layer in layers(prepared):
            layer.weight.mul_(3)  # as if trained: the scales of preparation are out of date
            layer.weight_step.fill_(7.0)  # type: ignore[union-attr]
    for step in range(10):
        assert set_step(prepared, step, 10, config) == lambdas(step, 10, config)
        for layer in layers(prepared):
            assert (layer.lambda_w, layer.lambda_a) == lambdas(step, 10, config)
            assert layer.weight_step is not None
            if step < 5:
                assert (layer.weight_step == 7).all()
            elif step == 5:
                assert torch.equal(layer.weight_step, LSQ.quantizer.initial_step(layer.weight))
                with torch.no_grad():
                    layer.weight_step.fill_(9.0)  # as if learned
            else:
                assert (layer.weight_step == 9).all()


def test_without_a_stretch_of_full_precision_learned_scales_stay() -> None:
    prepared = model(LSQ)
    for layer in layers(prepared):
        with torch.no_grad():
            layer.weight_step.fill_(7.0)  # type: ignore[union-attr]
    set_step(prepared, 0, 10, QATConfig())
    assert all((layer.weight_step == 7).all() for layer in layers(prepared))  # type: ignore[union-attr]


def test_observers_watch_from_the_first_step_and_freeze() -> None:
    recipe = Recipe(weights="int", activations="static", observer="minmax", keep_first_last=False)
    prepared = model(recipe).train()
    config = QATConfig(start=0.2, freeze_observers=0.6)
    seen = []
    for step in range(10):
        set_step(prepared, step, 10, config)
        prepared(torch.randn(4, 7) * (1 + step))
        seen.append([int(layer.input_observer.n_seen) for layer in layers(prepared)])  # type: ignore
    counts = [first for first, _ in seen]
    assert counts[0] > 0
    assert counts[:6] == sorted(set(counts[:6])), "it moves in each of the first 6 steps"
    assert seen[5:] == [seen[5]] * 5, "and in none of the rest"


def test_observers_see_one_step_however_early_they_freeze() -> None:
    recipe = Recipe(weights="int", activations="static", keep_first_last=False)
    prepared = model(recipe).train()
    config = QATConfig(freeze_observers=1e-9)
    set_step(prepared, 0, 10, config)
    prepared(torch.randn(4, 7))
    set_step(prepared, 1, 10, config)
    prepared.eval()(torch.randn(4, 7))


def test_a_model_that_is_not_prepared_is_left_alone() -> None:
    plain = nn.Linear(3, 2)
    before = plain.weight.clone()
    set_step(plain, 5, 10, replace(QATConfig(), start=0.5))
    assert torch.equal(plain.weight, before)
