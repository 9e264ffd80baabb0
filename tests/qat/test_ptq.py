"""PTQ against references written from the papers, in float64 and without their tricks."""

import copy
import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.linear import RMSNorm, TernaryLinear
from bitnet.model import Block, ModelConfig, Transformer
from bitnet.qat.awq import awq, awq_scales, ratio_scales
from bitnet.qat.gptq import gptq, gptq_matrix
from bitnet.qat.grid import dequantize
from bitnet.qat.integer import IntLinear
from bitnet.qat.ptq import Walk, round_to_nearest, sites
from bitnet.qat.recipe import Recipe
from bitnet.qat.smoothquant import smooth, smoothing_scales, smoothquant

VOCAB, SPAN = 61, 16
ABSMEAN = {"weights": "absmean"}
Method = Callable[..., Transformer]
CALIBRATED: list[Method] = [gptq, awq, smoothquant]


def config(**changes: Any) -> ModelConfig:
    """Two layers whose widths no group of 20 divides."""
    shape: dict[str, Any] = {
        "linear": "fp",
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 4,
        "d_ff": 56,
        "vocab_size": VOCAB,
        "max_seq_len": SPAN,
    }
    return ModelConfig(**(shape | changes))


def text_like(n_windows: int, seed: int = 0) -> Tensor:
    """Tokens int64 ``[n_windows, SPAN + 1]`` of a random chain with few successors."""
    generator = torch.Generator().manual_seed(99)
    successors = torch.randint(0, VOCAB, (VOCAB, 3), generator=generator)
    generator.manual_seed(seed)
    rows = [torch.randint(0, VOCAB, (n_windows,), generator=generator)]
    for _ in range(SPAN):
        pick = torch.randint(0, 3, (n_windows,), generator=generator)
        rows.append(successors[rows[-1], pick])
    return torch.stack(rows, 1)


def loss_of(model: Transformer, windows: Tensor) -> float:
    with torch.no_grad():
        logits = model(windows[:, :-1])
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


@pytest.fixture(scope="module")
def trained() -> Transformer:
    """A model that has learned the chain, with a few channels made large, as in large models."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Transformer(config())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(150):
        windows = text_like(16, 1000 + step)
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for block in model.layers:
            for site in sites(cast(Block, block)):
                scales = torch.ones(site.linears(cast(Block, block))[0].in_features)
                scales[:3] = 1 / 30
                site.fold(cast(Block, block), scales)
    return model.eval()


@pytest.fixture(scope="module")
def calibration() -> Tensor:
    return text_like(48, 1)[:, :-1]


def correlated(rows: int, columns: int) -> Tensor:
    """Inputs whose channels share a few causes, of unequal size."""
    mix = torch.randn(columns // 3, columns) * torch.rand(columns).mul(4).exp()
    return torch.randn(rows, columns // 3) @ mix + 0.3 * torch.randn(rows, columns)


# GPTQ -------------------------------------------------------------------------------------------


def grid(w: Tensor, recipe: Recipe) -> Callable[[Tensor], Tensor]:
    """Finds scales in ``w``, float64 ``[N, K]``; returns the rounding of a column ``[N]``."""
    reduced = w.flatten()[None] if recipe.granularity == "tensor" else w
    if recipe.weights == "absmean":
        gamma = reduced.abs().mean(1)
        return lambda v: gamma * (v.sign() * (v.abs() > recipe.alpha * gamma))
    top = 2 ** (recipe.bits - 1) - 1
    if recipe.symmetric:
        scale = reduced.abs().amax(1) / top
        return lambda v: scale * (v / scale).round().clamp(-top, top)
    low, high = reduced.amin(1).clamp(max=0), reduced.amax(1).clamp(min=0)
    scale = (high - low) / (2**recipe.bits - 1)
    zero = (-low / scale).round()  # unsigned codes 0 .. 2^b - 1, as in most texts
    return lambda v: scale * ((v / scale).round().add(zero).clamp(0, 2**recipe.bits - 1) - zero)


def brain_surgeon(
    weight: Tensor, hessian: Tensor, recipe: Recipe, damping: float, by_diagonal: bool = False
) -> Tensor:
    """arXiv 2210.17323, eqs. 2 and 3, an inverse for each column: W_hat in float64."""
    w, h = weight.double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    h += damping * h.diagonal()[~dead].mean() * torch.eye(len(h)).double()
    order = list(range(len(h)))
    if by_diagonal:
        order.sort(key=lambda j: -float(hessian[j, j]))
    size = recipe.group_size if recipe.granularity == "group" else len(h)
    rounding = {g: grid(w[:, g * size : (g + 1) * size], recipe) for g in range(-(-len(h) // size))}
    result = torch.zeros_like(w)
    for position, j in enumerate(order):
        if recipe.granularity == "group" and not by_diagonal and j % size == 0:
            rounding[j // size] = grid(w[:, j : j + size], recipe)
        result[:, j] = rounding[j // size](w[:, j])
        if dead[j]:
            continue
        free = [k for k in order[position:] if not dead[k]]
        inverse = torch.linalg.inv(h[free][:, free])
        w[:, free] -= torch.outer((w[:, j] - result[:, j]) / inverse[0, 0], inverse[0])
    return result


RECIPES = [
    Recipe(**(base | grain))  # type: ignore[operator]
    for base, grain in itertools.product(
        (
            {"weights": "int", "bits": 4},
            {"weights": "int", "bits": 2},
            {"weights": "int", "bits": 3, "symmetric": False},
            {"weights": "int", "bits": 8},
            ABSMEAN,
            {"weights": "absmean", "alpha": 0.7},
        ),
        (
            {"granularity": "tensor"},
            {"granularity": "row"},
            {"granularity": "group", "group_size": 11},
        ),
    )
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r} {r.symmetric} {r.alpha}")
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_the_optimal_brain_surgeon(recipe: Recipe, act_order: bool) -> None:
    weight, x = torch.randn(7, 30), correlated(200, 30)
    x[:, 17] = 0
    hessian = x.T @ x
    expected = brain_surgeon(weight, hessian, recipe, 0.01, act_order)
    for block_size in (1, 8, 128):
        codes, scale, zero = gptq_matrix(
            *(weight, hessian, recipe), act_order=act_order, block_size=block_size
        )
        assert codes.dtype == torch.int8
        w_hat = dequantize(codes, scale, zero, recipe.group_size).double()
        torch.testing.assert_close(w_hat, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r} {r.symmetric} {r.alpha}")
def test_gptq_never_loses_to_rounding_on_correlated_inputs(recipe: Recipe) -> None:
    weight, x = torch.randn(24, 64) / 8, correlated(500, 64)
    errors = []
    for codes in (gptq_matrix(weight, x.T @ x, recipe), recipe.quantizer.quantize(weight)):
        w_hat = dequantize(*codes, recipe.group_size)
        errors.append(float(((w_hat - weight) @ x.T).square().mean()))
    coarse = recipe.bits == 2 and recipe.weights == "int"  # 3 levels up to the largest weight
    assert errors[0] < (1 if coarse else 0.9) * errors[1]


def test_gptq_with_uncorrelated_inputs_is_rounding_to_nearest() -> None:
    recipe, weight = Recipe("int", granularity="group", group_size=8), torch.randn(5, 20)
    hessian = torch.diag(torch.rand(20) + 0.5)
    for ours, rounded in zip(
        gptq_matrix(weight, hessian, recipe), recipe.quantizer.quantize(weight), strict=True
    ):
        assert ours is rounded is None or torch.equal(ours, rounded)  # type: ignore[arg-type]


def test_gptq_where_channels_are_dead_or_constant() -> None:
    recipe, weight = Recipe("int", bits=3), torch.randn(6, 12)
    nearest = recipe.quantizer.quantize(weight)[0]
    assert torch.equal(gptq_matrix(weight, torch.zeros(12, 12), recipe)[0], nearest)
    constant = torch.ones(50, 12)  # rank 1: only damping makes it invertible
    codes, scale, _ = gptq_matrix(weight, constant.T @ constant, recipe)
    w_hat = dequantize(codes, scale, None, 128)
    assert float((w_hat - weight).sum(1).abs().max()) <= 0.51 * float(scale.max())
    x = correlated(60, 12) * 1e-6  # tiny inputs beside a dead one: damping is relative to theirs
    x[:, 4] = 0
    large = gptq_matrix(weight, (1e6 * x).T @ (1e6 * x), recipe)[0]
    assert torch.equal(gptq_matrix(weight, x.T @ x, recipe)[0], large)
    assert torch.equal(gptq_matrix(torch.zeros(6, 12), x.T @ x, recipe)[0], torch.zeros(6, 12))


def test_gptq_refuses_what_it_cannot_invert_or_round() -> None:
    weight, singular = torch.randn(3, 4), torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"damping = 0\.0; raise it"):
        gptq_matrix(weight, singular, Recipe("int"), damping=0.0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        gptq_matrix(weight, singular * torch.nan, Recipe("int"))
    with pytest.raises(ValueError, match=r"block_size, damping.*got 0, 0\.01"):
        gptq_matrix(weight, singular, Recipe("int"), block_size=0)
    with pytest.raises(ValueError, match=r"recipe\.weights = 'lsq'"):
        gptq_matrix(weight, singular, Recipe("lsq"))


# AWQ --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES[:9] + RECIPES[12:15], ids=lambda r: f"{r} {r.symmetric}")
def test_awq_finds_the_best_ratio(recipe: Recipe) -> None:
    """arXiv 2306.00978, eqs. 4 and 5: output errors on the inputs themselves, all ratios."""
    x = correlated(80, 30).double()
    weights = [torch.randn(n, 30).double() for n in (5, 9)]
    mean = x.abs().mean(0)
    size = recipe.group_size if recipe.granularity == "group" else 30

    def rounded(w: Tensor) -> Tensor:
        parts = []
        for part in w.split(size, 1):
            to_grid = grid(part, recipe)
            parts += [to_grid(part[:, j]) for j in range(part.shape[1])]
        return torch.stack(parts, 1)

    losses, tried = [], []
    for i in range(20):
        s = mean ** (i / 20)
        s = s / (s.max() * s.min()).sqrt()
        tried.append(s)
        outputs = [(x / s) @ rounded(w * s).T - x @ w.T for w in weights]
        losses.append(sum(float(y.square().sum()) for y in outputs))
    best = min(range(20), key=losses.__getitem__)
    gram = (x.T @ x).float()
    found = awq_scales([w.float() for w in weights], gram, mean.float(), recipe)
    torch.testing.assert_close(found.double(), tried[best], rtol=1e-4, atol=1e-6)
    if recipe.weights == "int":  # ternary codes clip the columns that are made larger
        assert best > 0  # else it would be rounding to nearest


def test_awq_scales_where_channels_are_dead_constant_or_tiny() -> None:
    assert torch.equal(ratio_scales(torch.zeros(5), 0.5), torch.ones(5))
    assert torch.equal(ratio_scales(torch.full((5,), 3.0), 0.5), torch.ones(5))
    scales = ratio_scales(torch.tensor([0.0, 1e-42, 1.0, 4.0]), 0.95)
    assert scales[0] == 1
    assert bool(scales.isfinite().all())
    assert float(scales[3] / scales[1]) == pytest.approx(1e4**0.95, rel=1e-3)
    zeros = torch.zeros(4, 4)
    found = awq_scales([torch.randn(3, 4)], zeros, torch.zeros(4), Recipe("int"))
    assert torch.equal(found, torch.ones(4))
    with pytest.raises(ValueError, match="n_grid"):
        awq_scales([torch.randn(3, 4)], zeros, torch.ones(4), Recipe("int"), 0)


# SmoothQuant ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothing_scales_are_the_papers(alpha: float) -> None:
    x, weights = correlated(40, 6), [torch.randn(4, 6), torch.randn(3, 6)]
    x[:, 2] = 0
    weights[0][:, 4] = weights[1][:, 4] = 0
    scales = smoothing_scales(x.abs().amax(0), weights, alpha)
    for j in range(6):
        largest = max(abs(float(w[n, j])) for w in weights for n in range(len(w)))
        peak = max(abs(float(row[j])) for row in x)
        expected = 1.0 if j in (2, 4) else peak**alpha / largest ** (1 - alpha)
        assert float(scales[j]) == pytest.approx(expected, rel=1e-5)


def test_smoothing_folds_what_the_formula_says(trained: Transformer, calibration: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    first = cast(Block, trained.layers[0])
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = first.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    trained(calibration)
    for layer in first.modules():
        layer._forward_pre_hooks.clear()
    smoothed = cast(Block, smooth(trained, calibration, 0.5).layers[0])
    a, b = first.self_attn, smoothed.self_attn
    columns = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]).abs().amax(0)
    s = (seen["self_attn.q_proj"].flatten(0, 1).abs().amax(0) / columns).sqrt()
    torch.testing.assert_close(b.k_proj.weight, a.k_proj.weight * s)
    norm, before = smoothed.input_layernorm, first.input_layernorm
    torch.testing.assert_close(norm.weight, before.weight / s)
    s = (
        seen["mlp.down_proj"].flatten(0, 1).abs().amax(0) / first.mlp.down_proj.weight.abs().amax(0)
    ).sqrt()
    torch.testing.assert_close(smoothed.mlp.down_proj.weight, first.mlp.down_proj.weight * s)


# Folding ----------------------------------------------------------------------------------------

SHAPES = [
    {},
    {"norm_placement": "pre_norm"},
    {"norm_placement": "pre_norm", "n_kv_heads": 2, "activation": "silu"},
    {"norm_placement": "pre_norm", "n_kv_heads": 1, "qk_norm": True},
    {"n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_folding_any_scales_leaves_the_function(shape: dict[str, Any]) -> None:
    model = Transformer(config(**shape))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 2)
    tokens = text_like(3)
    tokens, before = tokens[:, :-1], model(tokens[:, :-1])
    folded = 0
    for block in model.layers:
        assert isinstance(block, Block)
        for site in sites(block):
            if site.producer is not None:
                site.fold(block, torch.rand(site.linears(block)[0].in_features) * 4 + 0.2)
                folded += 1
    grouped_without_norm = shape.get("n_kv_heads", 4) < 4 and "norm_placement" in shape
    assert folded == 2 * (3 if grouped_without_norm else 4)
    torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-6)
    producers = [site.producer for site in sites(cast(Block, model.layers[0]))]
    if shape.get("norm_placement") == "pre_norm":
        assert isinstance(producers[3], nn.Linear)  # up_proj
    else:
        assert all(isinstance(producer, RMSNorm) for producer in producers)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_smoothing_leaves_the_function(shape: dict[str, Any], calibration: Tensor) -> None:
    model = Transformer(config(**shape))
    state = copy.deepcopy(model.state_dict())
    smoothed = smooth(model, calibration, 0.7)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert any(not torch.equal(t, state[name]) for name, t in smoothed.state_dict().items())
    torch.testing.assert_close(smoothed(calibration), model(calibration), rtol=1e-4, atol=1e-6)


# Whole models -----------------------------------------------------------------------------------


def integer_layers(model: Transformer) -> dict[str, IntLinear | TernaryLinear]:
    modules = model.layers.named_modules()
    return {n: m for n, m in modules if isinstance(m, IntLinear | TernaryLinear)}


def codes_of(model: Transformer) -> dict[str, Tensor]:
    return {
        name: layer.codes() if isinstance(layer, TernaryLinear) else layer.quantize()[0]
        for name, layer in integer_layers(model).items()
    }


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


def test_awq_searches_with_the_rows_that_a_matrix_will_have(
    calibration: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """o_proj's scales divide rows of v_proj, down_proj's those of up_proj: folded before these are
    searched, or their best ratio is that of other weights."""
    searched: list[tuple[list[Tensor], Tensor]] = []

    def spy(weights: list[Tensor], *args: Any) -> Tensor:
        scales = awq_scales(weights, *args)
        searched.append(([weight.detach().clone() for weight in weights], scales))
        return scales

    monkeypatch.setattr("bitnet.qat.awq.awq_scales", spy)
    torch.manual_seed(3)
    model, recipe = Transformer(config(norm_placement="pre_norm")), Recipe("int", bits=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(parameter.shape[-1]) + 0.1)
    result = awq(model, recipe, calibration[:8])
    assert len(searched) == 2 * 4
    for i, (weights, scales) in enumerate(searched):
        block, found = cast(Block, model.layers[i // 4]), result.layers[i // 4]
        (names,) = (
            site.consumers
            for site in sites(block)
            if len(site.consumers) == len(weights)
            and site.linears(block)[0].in_features == len(scales)
        )
        for name, weight in zip(names, weights, strict=True):
            codes, scale, _ = recipe.quantizer.quantize(weight * scales)
            layer = found.get_submodule(name)
            assert isinstance(layer, IntLinear)
            assert torch.equal(layer.quantize()[0], codes), name
            assert torch.equal(layer.scale, scale), name


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


def test_gptq_calibrates_on_the_outputs_of_quantized_layers(
    trained: Transformer, calibration: Tensor
) -> None:
    recipe = Recipe("int", bits=3, granularity="group", group_size=20)
    progress: list[tuple[int, int]] = []
    result = gptq(
        trained, recipe, calibration, on_layer=lambda done, of: progress.append((done, of))
    )
    assert progress == [(1, 2), (2, 2)]
    inputs: list[Tensor] = []
    layer = result.get_submodule("layers.1.self_attn.k_proj")
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    result(calibration)
    weight = trained.get_parameter("layers.1.self_attn.k_proj.weight")
    expected, *_ = gptq_matrix(weight, inputs[0].T @ inputs[0], recipe)
    assert torch.equal(codes_of(result)["1.self_attn.k_proj"], expected)


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
    torch.testing.assert_close(first[0].gram.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6)
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
