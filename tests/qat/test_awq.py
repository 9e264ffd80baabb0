"""AWQ: the best ratio, and where channels are dead, constant or tiny."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bitnet.model import Block, Transformer
from bitnet.qat.awq import awq, awq_scales, ratio_scales
from bitnet.qat.integer import IntLinear
from bitnet.qat.ptq import sites
from bitnet.qat.recipe import Recipe
from tests.helpers.ptq import RECIPES, config, correlated, grid


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
