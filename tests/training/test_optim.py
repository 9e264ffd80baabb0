import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from bitnet.model import ModelConfig, Transformer
from bitnet.training.optim import (
    OptimConfig,
    Optimizers,
    build_optimizer,
    clip_gradients,
    learning_rate_factor,
    param_groups,
    warmup_steps,
    weight_decay_at,
)

KINDS = ("wsd", "cosine", "linear", "two_stage", "constant")


def schedule(**fields: Any) -> OptimConfig:
    return OptimConfig(lr=1.0, **fields)


def small_model(**fields: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(depth=2, d_model=32, vocab_size=40, max_seq_len=16, **fields))


# Schedules


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # 1000 steps, warmup 10: (step, factor), by hand from the formulas of the papers
        (
            {"lr_schedule": "wsd", "decay_fraction": 0.25},
            {0: 0.1, 4: 0.5, 9: 1, 10: 1, 749: 1, 750: 1, 751: 249 / 250, 875: 0.5, 999: 1 / 250},
        ),
        (
            {"lr_schedule": "wsd", "decay_fraction": 0.25, "min_lr_fraction": 0.2},
            {0: 0.1, 750: 1, 875: 0.6, 999: 0.2 + 0.8 / 250},
        ),
        ({"lr_schedule": "wsd", "decay_fraction": 0.0}, {0: 0.1, 10: 1, 999: 1}),
        (
            {"lr_schedule": "linear"},
            {0: 0.1, 9: 1, 10: 1, 505: 0.5, 901: 0.1, 999: 1 / 990},
        ),
        (
            {"lr_schedule": "cosine"},
            {
                0: 0.1,
                9: 1,
                10: 1,
                340: 0.75,
                505: 0.5,
                670: 0.25,
                999: math.sin(math.pi / 1980) ** 2,
            },
        ),
        ({"lr_schedule": "cosine", "min_lr_fraction": 0.1}, {10: 1, 505: 0.55}),
        (
            {"lr_schedule": "two_stage"},
            {0: 0.1, 10: 1, 499: 501 / 990, 500: 500 / 990 * 2 / 3, 505: 1 / 3, 999: 2 / 3 / 990},
        ),
        (
            {"lr_schedule": "two_stage", "second_stage_ratio": 0.5, "min_lr_fraction": 0.1},
            {10: 1, 505: 0.1 + 0.9 * 0.25},
        ),
        ({"lr_schedule": "constant"}, {0: 0.1, 8: 0.9, 9: 1, 10: 1, 999: 1}),
    ],
)
def test_learning_rate_at_named_steps(fields: dict[str, Any], expected: dict[int, float]) -> None:
    config = schedule(warmup_steps=10, **fields)
    got = {step: learning_rate_factor(step, 1000, config) for step in expected}
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"wd_schedule": "constant"}, {0: 0.1, 60: 0.1, 99: 0.1}),
        ({"wd_schedule": "zero_at", "wd_zero_fraction": 0.5}, {0: 0.1, 49: 0.1, 50: 0.0, 99: 0.0}),
        ({"wd_schedule": "zero_at", "wd_zero_fraction": 0.0}, {0: 0.0, 99: 0.0}),
        ({"wd_schedule": "zero_at", "wd_zero_fraction": 1.0}, {0: 0.1, 99: 0.1}),
        (
            {"wd_schedule": "cosine", "wd_zero_fraction": 0.6},
            {0: 0.1, 20: 0.075, 30: 0.05, 40: 0.025, 60: 0.0, 99: 0.0},
        ),
        ({"wd_schedule": "cosine", "wd_zero_fraction": 0.0}, {0: 0.0}),
        ({}, {59: 0.1, 60: 0.0}),  # the default: zero at 60%
    ],
)
def test_weight_decay_at_named_steps(fields: dict[str, Any], expected: dict[int, float]) -> None:
    got = {step: weight_decay_at(step, 100, schedule(**fields)) for step in expected}
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-17)


@pytest.mark.parametrize(
    ("total", "chosen", "expected"),
    [(1, 0, 0), (19, 0, 0), (20, 0, 1), (1000, 0, 50), (7500, 0, 375), (10**6, 0, 375), (10, 7, 7)],
)
def test_warmup_is_a_twentieth_of_a_short_run(total: int, chosen: int, expected: int) -> None:
    assert warmup_steps(total, schedule(warmup_steps=chosen)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("total", [1, 2, 3, 7, 100, 2001])
@pytest.mark.parametrize("warmup", [0, 1, 5, 10_000])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_learning_rate_rises_then_falls(kind: Any, total: int, warmup: int, floor: float) -> None:
    config = schedule(lr_schedule=kind, warmup_steps=warmup, min_lr_fraction=floor)
    factors = [learning_rate_factor(step, total, config) for step in range(total)]
    ramp = min(warmup_steps(total, config), total)
    assert all(0 < factor <= 1 for factor in factors)
    steps = np.diff(factors)
    peak = int(np.argmax(factors))
    assert (steps[:peak] > 0).all()
    assert (steps[peak:] <= 0).all()
    if total >= 100 and warmup < total:
        assert max(factors) == pytest.approx(1)
    if total == 2001 and warmup < total and kind != "constant":
        assert factors[-1] == pytest.approx(floor, abs=2 / 660)  # one step before the floor
        # no jumps but the one that two_stage asks for
        jumps = np.flatnonzero(np.abs(steps[ramp:]) > 2 / 660) + ramp
        assert list(jumps) == ([1000] if kind == "two_stage" else [])


@pytest.mark.parametrize("function", [learning_rate_factor, weight_decay_at])
@pytest.mark.parametrize(("step", "total"), [(-1, 10), (10, 10), (0, 0)])
def test_steps_outside_the_run_are_refused(
    function: Callable[[int, int, OptimConfig], float], step: int, total: int
) -> None:
    with pytest.raises(ValueError, match="step must be"):
        function(step, total, schedule())


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": -1e-3},
        {"lr": math.inf},
        {"lr": math.nan},
        {"lr": "1e-3"},
        {"lrr": 1},
        {"optimizer": "sgd"},
        {"beta2": 1.0},
        {"eps": 0.0},
        {"decay_fraction": 1.5},
        {"decay_fraction": math.nan},
        {"warmup_steps": 1.5},
        {"muon_lr": -0.01},
        {"muon_ns_steps": 100},
    ],
)
def test_config_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OptimConfig(**fields)


# Groups


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("placement", ["sub_norm", "pre_norm", "in_linear"])
def test_groups_partition_the_parameters(optimizer: Any, tied: bool, placement: str) -> None:
    model = small_model(tie_embeddings=tied, norm_placement=placement, qk_norm=True)
    model.norm.bias = nn.Parameter(torch.zeros(32))  # a stray bias
    groups = param_groups(model, OptimConfig(optimizer=optimizer))
    name_of = {id(p): name for name, p in model.named_parameters()}
    names = {key: [name_of[id(p)] for p in group] for key, group in groups.items()}

    everyone = sorted(name for group in names.values() for name in group)
    assert everyone == sorted(name for name, _ in model.named_parameters())
    assert ("lm_head.weight" in everyone) is not tied
    assert all("norm" in name for name in names["no_decay"])
    tables = {"embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    projections = {name for name in everyone if "_proj.weight" in name}
    assert len(projections) == 14
    if optimizer == "muon":
        assert set(names["muon"]) == projections
        assert set(names["decay"]) == tables
    else:
        assert names["muon"] == []
        assert set(names["decay"]) == projections | tables


def test_frozen_parameters_stay_out() -> None:
    model = small_model()
    model.embed_tokens.weight.requires_grad_(False)
    groups = param_groups(model, OptimConfig())
    assert all(p is not model.embed_tokens.weight for group in groups.values() for p in group)


def test_wrapped_models_keep_their_groups() -> None:
    wrapped = nn.ModuleDict({"module": small_model()})
    groups = param_groups(wrapped, OptimConfig(optimizer="muon"))
    assert len(groups["muon"]) == 14


def test_unresolved_or_impossible_configs_are_refused() -> None:
    with pytest.raises(ValueError, match="lr must be above 0"):
        build_optimizer(small_model(), OptimConfig())
    with pytest.raises(ValueError, match="muon_lr must be above 0"):
        build_optimizer(small_model(), OptimConfig(lr=0.1, optimizer="muon"))
    with pytest.raises(ValueError, match="no matrix"):
        build_optimizer(nn.Linear(3, 3), OptimConfig(lr=0.1, muon_lr=0.1, optimizer="muon"))


# Updates


class Tiny(nn.Module):
    """A matrix, a bias and a norm, with gradients that do not depend on the model."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layers = nn.Linear(5, 3, bias=False)
        self.bias = nn.Parameter(torch.randn(7, generator=generator))
        with torch.no_grad():
            self.layers.weight.copy_(torch.randn(3, 5, generator=generator))

    def draw_gradients(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return {name: p.grad for name, p in self.named_parameters() if p.grad is not None}


def test_adamw_is_the_textbook_one() -> None:
    """Against decoupled AdamW (arXiv 1711.05101, algorithm 2) in float64, on a moving schedule."""
    model = Tiny()
    config = OptimConfig(lr=3e-2, beta1=0.8, beta2=0.9, eps=1e-3)
    optimizers = build_optimizer(model, config)
    theta = {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
    mean = {name: np.zeros_like(value) for name, value in theta.items()}
    square = {name: np.zeros_like(value) for name, value in theta.items()}
    for t, (factor, decay) in enumerate([(0.5, 0.3), (1.0, 0.3), (0.7, 0.0)], start=1):
        optimizers.zero_grad()
        gradients = model.draw_gradients(t)
        optimizers.set_schedule(factor, decay)
        optimizers.step()
        lr = 3e-2 * factor
        for name, gradient in gradients.items():
            g = gradient.numpy().astype(np.float64)
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.9 * square[name] + 0.1 * g * g
            if name == "layers.weight":
                theta[name] -= lr * decay * theta[name]
            step = (mean[name] / (1 - 0.8**t)) / (np.sqrt(square[name] / (1 - 0.9**t)) + 1e-3)
            theta[name] -= lr * step
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), theta[name], rtol=0, atol=5e-7)


def test_muon_update_is_orthogonal_and_decays_as_adamw_does() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.Linear(96, 200, bias=False), "head": nn.Linear(96, 8)})
    config = OptimConfig(optimizer="muon", lr=2e-3, muon_lr=0.05)
    optimizers = build_optimizer(model, config)
    matrix, head = model["layers"].weight, model["head"].weight
    before, head_before = matrix.detach().clone(), head.detach().clone()
    gradient = torch.randn(200, 96)
    matrix.grad, head.grad = gradient.clone(), torch.zeros_like(head)
    optimizers.set_schedule(0.5, 0.1)
    optimizers.step()

    shrunk = before.double() * (1 - 0.5 * 2e-3 * 0.1)
    update = (shrunk - matrix.detach().double()) / (0.5 * 0.05)
    update /= math.sqrt(200 / 96)  # the scale of a tall matrix
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    assert s.min() > 0.6
    assert s.max() < 1.25
    # the factor nearest to the gradient among the orthogonal ones is its polar factor U V^T
    gu, _, gvh = torch.linalg.svd(gradient.double(), full_matrices=False)
    assert (u @ vh - gu @ gvh).abs().max() < 0.02
    # a zero gradient leaves AdamW's matrix to its weight decay alone: the same shrinkage
    torch.testing.assert_close(head, head_before * (1 - 0.5 * 2e-3 * 0.1))


def test_muon_shrinks_an_idle_matrix_as_adamw_does() -> None:
    model = nn.ModuleDict({"layers": nn.Linear(6, 5, bias=False)})
    optimizers = build_optimizer(model, OptimConfig(optimizer="muon", lr=2e-3, muon_lr=0.05))
    matrix = model["layers"].weight
    before = matrix.detach().clone()
    matrix.grad = torch.zeros_like(matrix)
    optimizers.set_schedule(0.5, 100.0)  # 0.9 of it stays; without the scale it would change sign
    optimizers.step()
    torch.testing.assert_close(matrix.detach(), before * (1 - 0.5 * 2e-3 * 100))


def test_muon_averages_gradients_with_nesterov_momentum() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.Linear(12, 12, bias=False)})
    optimizers = build_optimizer(
        model, OptimConfig(optimizer="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.0)
    )
    matrix = model["layers"].weight
    buffer = torch.zeros(12, 12)
    for _ in range(3):
        gradient = torch.randn(12, 12)
        before = matrix.detach().clone()
        matrix.grad = gradient.clone()
        optimizers.step()
        buffer = 0.95 * buffer + 0.05 * gradient
        lookahead = 0.95 * buffer + 0.05 * gradient
        update = (before - matrix.detach()) / 0.02
        # U f(S) V^T with f > 0: its product with the lookahead's transpose is symmetric, positive
        product = (update @ lookahead.T).double()
        asymmetry = (product - product.T).norm() / product.norm()
        assert asymmetry < 0.02  # bf16 iterations
        assert torch.linalg.eigvalsh((product + product.T) / 2).min() > -0.02 * product.norm()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_round_trip_continues_exactly(optimizer: Any) -> None:
    model, config = Tiny(), OptimConfig(lr=1e-2, muon_lr=0.02, optimizer=optimizer)
    optimizers = build_optimizer(model, config)
    model.draw_gradients(0)
    optimizers.step()
    loaded = copy.deepcopy(model)
    resumed = _resume(loaded, optimizers, config)
    for each, run in ((model, optimizers), (loaded, resumed)):
        each.draw_gradients(1)
        run.set_schedule(0.3, 0.1)
        run.step()
    for continued, reloaded in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(continued, reloaded)


def test_a_resumed_run_takes_its_rates_from_the_config_not_from_the_state() -> None:
    model = Tiny()
    optimizers = build_optimizer(model, OptimConfig(lr=1e-2))
    resumed = _resume(model, optimizers, OptimConfig(lr=3.0))
    resumed.set_schedule(0.5, 0.1)
    assert [group["lr"] for group in resumed.optimizers[0].param_groups] == [1.5, 1.5]


def _resume(model: nn.Module, saved: Optimizers, config: OptimConfig) -> Optimizers:
    resumed = build_optimizer(model, config)
    for new, old in zip(resumed.optimizers, saved.optimizers, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    return resumed


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_language_model_learns(optimizer: Any) -> None:
    model = small_model()
    optimizers = build_optimizer(model, OptimConfig(lr=1e-2, muon_lr=0.02, optimizer=optimizer))
    tokens = torch.arange(17).remainder(5).repeat(4, 1)
    losses = []
    for step in range(40):
        optimizers.set_schedule(*_at(step, 40))
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    assert all(p.grad is None for p in model.parameters())
    assert losses[-1] < 0.3 * losses[0]


def _at(step: int, total: int) -> tuple[float, float]:
    config = schedule()
    return learning_rate_factor(step, total, config), weight_decay_at(step, total, config)


# Clipping


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
def test_clipping_bounds_the_norm_of_all_gradients_together(max_norm: float) -> None:
    model = Tiny()
    model.layers.weight.grad = torch.full((3, 5), 2.0)
    model.bias.grad = torch.full((7,), -2.0)
    silent = nn.Parameter(torch.zeros(2))
    norm = clip_gradients([*model.parameters(), silent], max_norm)
    expected = 2 * math.sqrt(22)
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    scale = 1 / expected if max_norm == 1 else 1.0
    torch.testing.assert_close(model.bias.grad, torch.full((7,), -2.0 * scale))
    torch.testing.assert_close(model.layers.weight.grad, torch.full((3, 5), 2.0 * scale))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_reports_gradients_that_are_not_finite(bad: float) -> None:
    model = Tiny()
    model.draw_gradients(0)
    assert model.bias.grad is not None
    model.bias.grad[3] = bad
    assert not bool(clip_gradients(model.parameters(), 1.0).isfinite())
