"""Random weights, and values that quantizers must not turn into numbers. Not a test module."""

import math

import numpy as np
import torch
from torch import Tensor

from bitnet.qat.recipe import Recipe

BAD = [math.nan, math.inf, -math.inf]


def ends(recipe: Recipe) -> tuple[int, int]:
    levels = recipe.quantizer.levels
    return levels[0], levels[-1]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def off_tie(v: np.ndarray) -> np.ndarray:
    """Distance from the nearest number that lies halfway between two integers."""
    return np.abs(v - np.floor(v) - 0.5)
