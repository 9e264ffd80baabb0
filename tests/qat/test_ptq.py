"""The PTQ methods on whole models: copies, losses, calibration, and what is refused."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from bitnet.linear import TernaryLinear
from bitnet.model import Block, Transformer
from bitnet.qat.awq import awq
from bitnet.qat.gptq import gptq
from bitnet.qat.integer import IntLinear
from bitnet.qat.ptq import Walk, round_to_nearest
from bitnet.qat.recipe import Recipe
from bitnet.qat.smoothquant import smoothquant
from tests.helpers.ptq import (
    ABSMEAN,
    CALIBRATED,
    SHAPES,
    SPAN,
    VOCAB,
    Method,
    codes_of,
    config,
    integer_layers,
    loss_of,
    text_like,
)


@pytest.mark.parametrize("method", [round_to_nearest, *CALIBRATED])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", ["int", "absmean"])
@torch.no_grad()
def test_methods_return_integer_copies(
    method: Method, shape: dict[str, Any], weights: Any, calibration: Tensor
) -> None:
    model = Transformer(config(**shape))
    state = copy.deepcopy(model.state_dict())
    recipe = Recipe(weights, bits=8, granularity="group", group_size=20, skip=["layers.1.mlp.*"])
    result = method(model, recipe, calibration[:4])
    assert len(integer_layers(result)) == 11
    expected = TernaryLinear if weights == "absmean" else IntLinear
    assert all(type(layer) is expected for layer in integer_layers(result).values())
    assert type(result.get_submodule("layers.1.mlp.up_proj")) is nn.Linear
    assert type(result.lm_head) is nn.Linear
    assert (result.lm_head.weight is result.embed_tokens.weight) == model.config.tie_embeddings
    assert not result.training
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    again = codes_of(method(model, recipe, calibration[:4]))
    assert all(torch.equal(codes, again[name]) for name, codes in codes_of(result).items())
    if weights == "int":
        model.eval()
        difference = (result(calibration) - model(calibration)).abs().max()
        assert float(difference) < 0.06 * float(model(calibration).abs().max())


def test_better_methods_lose_less(trained: Transformer, calibration: Tensor) -> None:
    """On a model with outlier channels at 4 bits: PTQ's order as published."""
    windows = text_like(64, 2)
    recipe = Recipe("int", bits=4)
    loss = {m.__name__: loss_of(m(trained, recipe, calibration), windows) for m in CALIBRATED}
    full, rounded = loss_of(trained, windows), loss_of(round_to_nearest(trained, recipe), windows)
    assert full < 0.5 * loss_of(Transformer(config()), windows)
    assert rounded > full + 0.02
    assert max(loss.values()) < rounded
    assert min(loss.values()) < full + 0.5 * (rounded - full)


@pytest.mark.parametrize("method", [gptq, awq])
def test_static_ranges_are_those_of_all_portions(
    method: Method, calibration: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnet.qat.ptq._TOKENS_AT_ONCE", 2 * SPAN)
    torch.manual_seed(4)
    model = Transformer(config(norm_placement="pre_norm"))
    windows = calibration[:6].clone()
    windows[-1] = VOCAB - 1
    with torch.no_grad():  # the last portion has the largest value
        model.embed_tokens.weight[-1].zero_()[0] = 1.0
        inputs = model.layers[0].input_layernorm(model.embed_tokens(windows))
    largest = [float(part.abs().max()) for part in (inputs[:2], inputs)]
    assert largest[0] < 0.9 * largest[1]
    recipe = Recipe("int", bits=8, activations="static", observer="minmax")
    if method is awq:  # which divides the inputs by its scales
        monkeypatch.setattr("bitnet.qat.awq.awq_scales", lambda ws, *_: torch.ones(ws[0].shape[1]))
    layer = method(model, recipe, windows).get_submodule("layers.0.self_attn.q_proj")
    assert isinstance(layer, IntLinear)
    assert layer.input_scale is not None
    assert layer.input_scale.item() == pytest.approx(largest[1] / 127, rel=1e-6)


def test_statistics_are_those_of_all_tokens(trained: Transformer) -> None:
    """The walk goes through in portions; the sums do not depend on them."""
    tokens = text_like(40, 3)[:, :-1]
    walk = Walk(trained, tokens)
    walk._rows = 7
    block = cast(Block, trained.layers[0])
    with torch.no_grad():
        first = walk.statistics(block, True)
        x = block.input_layernorm(trained.embed_tokens(tokens)).flatten(0, 1).double()
    torch.testing.assert_close(first[0].mean.double(), x.abs().mean(0))
    torch.testing.assert_close(first[0].peak.double(), x.abs().amax(0))
    # a sum of fp32 products errs by 2^-24 of the terms' sizes for each term
    error = len(x) * 2**-24 * float((x.abs().T @ x.abs() / len(x)).max())
    torch.testing.assert_close(first[0].gram.double(), x.T @ x / len(x), rtol=0, atol=error)
    assert not block.self_attn.q_proj._forward_pre_hooks


@pytest.mark.parametrize("method", CALIBRATED)
def test_dead_and_constant_channels(method: Method, calibration: Tensor) -> None:
    model = Transformer(config(norm_placement="pre_norm"))
    with torch.no_grad():
        for block in model.layers:
            block.input_layernorm.weight[:5] = 0  # type: ignore[union-attr]
            block.mlp.up_proj.weight[3] = 0  # type: ignore[union-attr]
            block.self_attn.v_proj.weight.zero_()  # type: ignore[union-attr]
        model.embed_tokens.weight[:, 9] = 1
    for recipe in (Recipe("int", bits=4), Recipe(**ABSMEAN)):  # type: ignore[arg-type]
        result = method(model, recipe, calibration[:1])
        assert bool(result(calibration).isfinite().all())


@pytest.mark.parametrize("method", [round_to_nearest, *CALIBRATED])
def test_static_activations_are_calibrated(
    method: Method, trained: Transformer, calibration: Tensor
) -> None:
    recipe = Recipe("int", bits=8, activations="static", observer="minmax")
    result = method(trained, recipe, calibration)
    windows = text_like(32, 4)
    assert loss_of(result, windows) < loss_of(trained, windows) + 0.3
    if method is round_to_nearest:
        with pytest.raises(ValueError, match="calibration: static"):
            method(trained, recipe)


@pytest.mark.parametrize("method", CALIBRATED)
def test_calibration_is_checked(method: Method, trained: Transformer) -> None:
    recipe = Recipe("int")
    tokens = text_like(2)
    for wrong, message in (
        (tokens[:0, :SPAN], r"neither of them 0, got torch\.int64 \[0, 16\]"),
        (tokens[:, :0], r"neither of them 0"),
        (tokens[0, :SPAN], r"\[windows, tokens\]"),
        (tokens[:, :SPAN].float(), r"got torch\.float32"),
        (tokens, "windows of 17 tokens exceed"),
        (tokens[:, :SPAN] + VOCAB, "not within the vocabulary of 61"),
        (tokens[:, :SPAN] - VOCAB, "not within the vocabulary of 61"),
    ):
        with pytest.raises(ValueError, match=message):
            method(trained, recipe, wrong)


@pytest.mark.parametrize("method", [round_to_nearest, *CALIBRATED])
def test_models_are_checked(method: Method, calibration: Tensor) -> None:
    recipe = Recipe("int", bits=4)
    inside = Transformer(config(norm_placement="in_linear"))
    with pytest.raises(ValueError, match="norm_placement = 'in_linear'"):
        method(inside, recipe, calibration)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is a BitLinear"):
        method(Transformer(config(linear="ternary")), recipe, calibration)
    model = Transformer(config())
    with pytest.raises(ValueError, match="is a IntLinear"):
        method(round_to_nearest(model, recipe), recipe, calibration)
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.up_proj.weight")[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        method(model, recipe, calibration)
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.up_proj.weight")[3, 4] = 0
        model.get_parameter("layers.1.input_layernorm.weight")[0] = torch.inf
    if method is not round_to_nearest:
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: its input holds NaN"):
            method(model, recipe, calibration)


def test_recipes_are_checked(trained: Transformer, calibration: Tensor) -> None:
    for method in (gptq, awq):
        with pytest.raises(ValueError, match=r"recipe\.weights = 'twn': (gptq|awq) rounds"):
            method(trained, Recipe("twn"), calibration)
        with pytest.raises(ValueError, match="selects lm_head"):
            method(trained, Recipe("int", keep_first_last=False), calibration)
    with pytest.raises(ValueError, match="alpha: expected 0 to 1"):
        smoothquant(trained, Recipe("int"), calibration, 1.5)
