"""Small trained models, calibration tokens and correlated inputs. Not a test module."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet.linear import TernaryLinear
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.awq import awq
from bitnet.qat.gptq import gptq
from bitnet.qat.integer import IntLinear
from bitnet.qat.recipe import Recipe
from bitnet.qat.smoothquant import smoothquant

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


def correlated(rows: int, columns: int) -> Tensor:
    """Inputs whose channels share a few causes, of unequal size."""
    mix = torch.randn(columns // 3, columns) * torch.rand(columns).mul(4).exp()
    return torch.randn(rows, columns // 3) @ mix + 0.3 * torch.randn(rows, columns)


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
SHAPES = [
    {},
    {"norm_placement": "pre_norm"},
    {"norm_placement": "pre_norm", "n_kv_heads": 2, "activation": "silu"},
    {"norm_placement": "pre_norm", "n_kv_heads": 1, "qk_norm": True},
    {"n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False},
]


def integer_layers(model: Transformer) -> dict[str, IntLinear | TernaryLinear]:
    modules = model.layers.named_modules()
    return {n: m for n, m in modules if isinstance(m, IntLinear | TernaryLinear)}


def codes_of(model: Transformer) -> dict[str, Tensor]:
    return {
        name: layer.codes() if isinstance(layer, TernaryLinear) else layer.quantize()[0]
        for name, layer in integer_layers(model).items()
    }
