"""calibrate: ranges in full precision, kinds of batches, and what it refuses."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitnet.qat.layers import QATLayer
from bitnet.qat.observers import Observer
from bitnet.qat.prepare import (
    calibrate,
    convert,
    prepare,
)
from bitnet.qat.recipe import Recipe
from tests.helpers.qat_net import Net, ids


def test_calibration_finds_ranges_in_full_precision() -> None:
    recipe = Recipe(weights="int", bits=2, activations="static", observer="minmax")
    model = Net()
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0])
        )
        for name, module in model.named_modules()
        if name in ("conv1", "conv2", "mlp.0", "mlp.2")
    ]
    batches = [ids(1), ids(2), (ids(3), 0.5)]
    for batch in batches:
        model(*batch) if isinstance(batch, tuple) else model(batch)
    for handle in handles:
        handle.remove()
    prepare(model, recipe)
    model.mlp.eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QATLayer)}
    layers["conv1"].lambda_w = 0.25
    calibrate(model, iter(batches))
    assert layers.keys() == seen.keys()
    for name, layer in layers.items():
        assert layer.input_observer is not None
        low, high = layer.input_observer.range()
        values = np.concatenate([x.detach().numpy().ravel() for x in seen[name]])
        assert (low.item(), high.item()) == (values.min(), values.max())
        assert layer.input_observer.n_seen.item() == 3
        assert not layer._forward_pre_hooks
    assert model.training
    assert not model.mlp.training
    assert (layers["conv1"].lambda_w, layers["conv1"].lambda_a) == (0.25, 1.0)


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.spare = (nn.Linear(3, 3) for _ in range(3))
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mid(input=self.first(x)))


def test_calibration_refuses() -> None:
    recipe = Recipe(weights="int", activations="static")
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="has no QAT layers; prepare it first"):
        calibrate(TwoWays(), [x])
    model = prepare(TwoWays(), recipe)
    with pytest.raises(ValueError, match="batches: the calibration set is empty"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="spare: was never called during calibration"):
        calibrate(model, [x])
    model = prepare(TwoWays(), Recipe(weights="int", activations="static", skip=["spare"]))
    with pytest.raises(ValueError, match="mid: its input held NaN or infinity"):
        calibrate(model, [x, x * float("nan")])
    calibrate(model, [x])  # what was wrong before does not count again
    model.eval()
    assert torch.equal(model(x), convert(copy.deepcopy(model))(x))
    broken = prepare(TwoWays(), recipe)
    with pytest.raises(RuntimeError):
        calibrate(broken, [torch.randn(2, 4)])
    assert broken.training
    assert not any(m._forward_pre_hooks for m in broken.modules())
    calibrate(prepare(TwoWays(), Recipe(weights="int")), [])  # dynamic: nothing to find


def test_calibration_that_would_do_nothing_is_refused() -> None:
    x = torch.randn(2, 3)
    model = prepare(TwoWays(), Recipe(weights="int", activations="static", skip=["spare"]))
    observer = model.get_submodule("mid.input_observer")
    assert isinstance(observer, Observer)
    calibrate(model, [x])
    before = observer.range()[1].clone()
    observer.frozen = True
    with pytest.raises(ValueError, match=r"mid: its observer is frozen; set input_observer.frozen"):
        calibrate(model, [100 * x])
    observer.frozen = False
    with pytest.raises(ValueError, match=r"mid: its input was empty in every batch"):
        calibrate(model, [x[:0], x[:0]])
    assert torch.equal(observer.range()[1], before)
    calibrate(model, [x[:0], x])  # one that counts is enough
    assert int(observer.n_seen) == 2


@pytest.mark.parametrize("activations", ["absmax", "static"])
def test_a_batch_is_a_tensor_or_a_tuple(activations: Any) -> None:
    x = torch.randn(4, 3)
    model = prepare(TwoWays(), Recipe(weights="int", activations=activations, skip=["spare"]))
    with pytest.raises(TypeError, match=r"batches: .*got one Tensor; pass \[tensor\]"):
        calibrate(model, x)
    if activations == "static":
        for batch in ([x, x], {"x": x}):
            with pytest.raises(
                TypeError, match=r"a batch is a tensor or a tuple .*got a (list|dict)"
            ):
                calibrate(model, [batch])  # type: ignore[list-item]
        assert model.training
    calibrate(model, (x, (x,)))
