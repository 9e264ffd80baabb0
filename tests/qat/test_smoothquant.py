"""SmoothQuant: the paper's scales, and folding them leaves the function."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from bitnet.linear import RMSNorm
from bitnet.model import Block, Transformer
from bitnet.qat.ptq import sites
from bitnet.qat.smoothquant import smooth, smoothing_scales
from tests.helpers.ptq import SHAPES, config, correlated, text_like


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
