"""Small models, and folders edited as by another program. Not a test module."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.export.folder import load
from bitnet.linear import TernaryLinear, pack
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.prepare import calibrate, convert, prepare
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError

VOCAB = 300


def make(seed: int = 0, **fields: Any) -> Transformer:
    """A tiny model with odd sizes (in_features 24 and 37: not multiples of 5 or 64)."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"depth": 2, "d_model": 24, "n_heads": 2, "n_kv_heads": 1, "d_ff": 37}
    model = Transformer(ModelConfig(**shape, vocab_size=VOCAB, max_seq_len=32, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # norms are ones until trained
    return model


def packed(model: Transformer) -> Transformer:
    result = pack(copy.deepcopy(model))
    assert isinstance(result, Transformer)
    return result


def tokens() -> Tensor:
    return torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))


def ternary_layers(model: Transformer) -> dict[str, TernaryLinear]:
    return {n: module for n, module in model.named_modules() if isinstance(module, TernaryLinear)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sign(folder: Path, change: Callable[[dict[str, Any]], None] = lambda config: None) -> None:
    """Edit config.json and make every checksum agree, as somebody else's program would."""
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = {
        name: sha256((folder / name).read_bytes()) for name in names(folder) - {"config.json"}
    }
    del config["config_sha256"]
    change(config)
    config["config_sha256"] = sha256(json.dumps(config, sort_keys=True).encode())
    (folder / "config.json").write_text(json.dumps(config))


RECIPES = [
    Recipe(weights="int", bits=4),
    Recipe(weights="int", bits=3, symmetric=False, granularity="group", group_size=16),
    Recipe(weights="int", bits=8, activations="static", activation_symmetric=False),
    Recipe(weights="absmean", granularity="tensor"),
    Recipe(weights="absmean", granularity="group", group_size=16, skip=["*.down_proj"]),
    Recipe(weights="sign", granularity="tensor", activations="none"),
    Recipe(weights="lsq", bits=3, keep_first_last=False, modules=["linear", "embedding"]),
    Recipe(weights="seq", activations="static", observer="mse", keep_first_last=False),
]


def prepared(recipe: Recipe, **fields: Any) -> Transformer:
    """A model in the middle of its QAT: observers have seen data, learned scales have moved."""
    model = make(**{"linear": "fp", **fields})
    prepare(model, recipe)
    if recipe.activations == "static":
        calibrate(model, [tokens()])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_step"):
                parameter.mul_(1.1)
    return model


def same_state(ours: Transformer, theirs: Transformer) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def converted(recipe: Recipe) -> Transformer:
    model = convert(prepared(recipe))
    assert isinstance(model, Transformer)
    return model


def fails(folder: Path, message: str) -> None:
    """Check that loading fails with ``message`` in one line."""
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
