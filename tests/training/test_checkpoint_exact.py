"""Optimizers and random number generators go on exactly where they were."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitnet.training.checkpoint import load, load_newest, save
from bitnet.training.muon import Muon
from bitnet.training.state import (
    flatten,
    load_optimizer,
    optimizer_tensors,
    rng_state,
    set_rng_state,
    unflatten,
)

MakeOptimizer = Callable[..., torch.optim.Optimizer]


def train(make: MakeOptimizer, root: Path) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
    """Six steps with every generator in use and a checkpoint after the third, from which it goes
    on where there is one."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(5, 9, bias=False), nn.ReLU(), nn.Linear(9, 3, bias=False))
    first, second = model.parameters()
    optimizer = make([{"params": [first], "lr": 1 / 70}, {"params": [second]}], lr=1 / 30)
    start, losses = 0, []
    if (loaded := load_newest(root)) is not None:
        model.load_state_dict(loaded.tensors["model"])
        load_optimizer(optimizer, model, loaded, "optim", loaded.state["optim"])
        set_rng_state(loaded.state["rng"])
        start = loaded.step
    for step in range(start, 6):
        if step == 3 and loaded is None:
            tensors, structure = optimizer_tensors(optimizer, model)
            groups = {"model": model.state_dict(), "optim": tensors}
            save(root, step, groups, {"optim": structure, "rng": rng_state()})
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        loss = (model(torch.randn(4, 5)) - random.gauss()).square().mean() + np.random.randn()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.AdamW, betas=(0.9, 0.95), amsgrad=True),
        partial(Muon, weight_decay=0.1),
        torch.optim.SGD,  # without momentum, its states are None
    ],
)
def test_resumed_training_is_bit_identical(tmp_path: Path, make: MakeOptimizer) -> None:
    model, optimizer, losses = train(make, tmp_path)
    resumed_model, resumed_optimizer, resumed_losses = train(make, tmp_path)
    assert resumed_losses == losses[3:]
    for whole, resumed in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(whole, resumed)
    tensors, structure = optimizer_tensors(optimizer, model)
    resumed_tensors, resumed_structure = optimizer_tensors(resumed_optimizer, resumed_model)
    assert resumed_structure == structure
    assert resumed_tensors.keys() == tensors.keys()
    assert all(torch.equal(resumed_tensors[name], tensor) for name, tensor in tensors.items())


def test_state_dicts_are_exact(tmp_path: Path) -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0), "ü.a": torch.ones(2).bfloat16()}, 1: {}},
        "groups": [{"betas": (0.9, 1 / 3, ()), "none": None, "flag": False, "list": []}],
        "floats": (5e-324, float("inf"), -0.0, 1e22, 0.1 + 0.2),
        "ints": [2**80, -1, True],
        "same names": {"a.b": 1, "a": {"b": 2}, "dict": {}, "tensor": "text", "tuple": 3},
    }
    tensors: dict[str, Tensor] = {}
    structure = flatten(state, "state", tensors)
    save(tmp_path, 1, {"optim": tensors}, {"optim": structure})
    loaded = load(tmp_path / "step_00000001")
    back = unflatten(loaded.state["optim"], loaded.tensors["optim"])
    assert repr(back) == repr(state), "types and signs of zero too"


def test_what_needs_pickle_is_refused() -> None:
    with pytest.raises(TypeError, match=r"optimizer\.groups\.0\.hook: .* function"):
        flatten({"groups": [{"hook": lambda: None}]}, "optimizer", {})


def test_a_cast_of_the_state_is_refused(tmp_path: Path) -> None:
    """PyTorch gives a state its parameter's dtype, silently."""

    def adam(dtype: torch.dtype) -> tuple[torch.optim.Optimizer, nn.Module]:
        model = nn.Linear(3, 1, bias=False, dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(3, dtype=dtype)).backward()
        optimizer.step()
        return optimizer, model

    tensors, structure = optimizer_tensors(*adam(torch.bfloat16))
    loaded = load(save(tmp_path, 1, {"optim": tensors}, {}))
    load_optimizer(*adam(torch.bfloat16), loaded, "optim", structure)
    with pytest.raises(ValueError, match=r"exp_avg: saved as torch\.bfloat16, loaded as"):
        load_optimizer(*adam(torch.float32), loaded, "optim", structure)


def test_generators_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.gauss(), np.random.randn(), torch.randn(()).item(), random.random()]

    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()  # both Gaussians now have a second half pending
    state = json.loads(json.dumps(rng_state()))
    expected = [draw() for _ in range(700)]  # past the end of a Mersenne Twister block
    set_rng_state(state)
    assert [draw() for _ in range(700)] == expected
    assert state == json.loads(json.dumps(state)), "setting does not change what was given"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_generators_go_on_where_they_were() -> None:
    torch.cuda.manual_seed_all(1)
    state = json.loads(json.dumps(rng_state()))
    expected = torch.randn(9, device="cuda")
    set_rng_state(state)
    assert torch.equal(torch.randn(9, device="cuda"), expected)
