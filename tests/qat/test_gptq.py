"""GPTQ against the optimal brain surgeon, and where inputs are dead, constant or unfit."""

import pytest
import torch
from torch import Tensor

from bitnet.model import Transformer
from bitnet.qat.gptq import gptq, gptq_matrix
from bitnet.qat.grid import dequantize
from bitnet.qat.recipe import Recipe
from tests.helpers.ptq import RECIPES, codes_of, correlated, grid


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
