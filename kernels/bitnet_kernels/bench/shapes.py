"""The matrices to time: those of real models from 0.1B to 70B, and those that have a goal.

A layer has four matrices, fused as inference fuses them: q, k and v in one, gate and up in one.
N out_features, K in_features, M tokens.
"""

import re
from difflib import get_close_matches
from typing import NamedTuple


class Layer(NamedTuple):
    """The sizes that determine the matrices of a transformer layer."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> (N, K)."""
        attention = self.n_heads * self.head_dim
        return {
            "qkv": (attention + 2 * self.n_kv_heads * self.head_dim, self.d_model),
            "o": (self.d_model, attention),
            "gate+up": (2 * self.d_ff, self.d_model),
            "down": (self.d_model, self.d_ff),
        }


MODELS = {
    "125m": Layer(768, 12, 3, 64, 2048),
    "350m": Layer(1280, 20, 5, 64, 3456),
    "700m": Layer(1536, 24, 6, 64, 4096),
    "bitnet-2b4t": Layer(2560, 20, 5, 128, 6912),
    "llama3-8b": Layer(4096, 32, 8, 128, 14336),
    "llama3-70b": Layer(8192, 64, 8, 128, 28672),
}
"""125m to 700m are this project's configs; the others were published by their authors (BitNet
2B4T, arXiv 2504.12285; Llama 3, arXiv 2407.21783)."""

TOKENS = tuple(2**i for i in range(13))
"""M = 1 .. 4096."""


class Goal(NamedTuple):
    """A ratio to the 16-bit matmul: the least that counts as reached, and the desired one."""

    floor: float
    stretch: float


_SMALL = (
    Goal(3, 4.5),
    Goal(2.3, 3.5),
    Goal(2.3, 3.5),
    Goal(1.8, 2.8),
    Goal(1.1, 1.5),
    Goal(1.2, 1.7),
)
_LARGE = (Goal(4, 6), Goal(3, 5), Goal(3, 5), Goal(2.3, 4), Goal(1.2, 1.6), Goal(1.3, 1.7))
_LARGEST = (Goal(5.5, 7.5), Goal(4, 6.5), Goal(4, 6.5), Goal(3, 5), Goal(1.3, 1.7), Goal(1.4, 1.75))
GOAL_TOKENS = (1, 8, 16, 64, 512, 4096)
GOALS = {
    (2560, 6912): dict(zip(GOAL_TOKENS, _SMALL, strict=True)),
    (4096, 4096): dict(zip(GOAL_TOKENS, _SMALL, strict=True)),
    (4096, 14336): dict(zip(GOAL_TOKENS, _LARGE, strict=True)),
    (8192, 28672): dict(zip(GOAL_TOKENS, _LARGEST, strict=True)),
}
"""(N, K) -> M -> the project's goals on an H100 with CUDA graphs and a cold L2 cache."""


def parse_shape(text: str) -> tuple[int, int]:
    """``"4096x14336"`` -> (4096, 14336); raises a ValueError that shows the form."""
    if match := re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text.strip().lower()):
        return int(match[1]), int(match[2])
    raise ValueError(f"--shape: {text!r} is not NxK (out_features x in_features), as in 4096x14336")


def _one_of(option: str, value: str, valid: tuple[str, ...]) -> str:
    """``value`` if valid; else a ValueError that names the option and the nearest valid value."""
    if value in valid:
        return value
    near = get_close_matches(value.lower(), valid, 1, 0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"{option}: {value!r} is unknown; {hint}(valid: {', '.join(valid)})")


def shapes_of(models: list[str]) -> list[tuple[int, int]]:
    """The distinct (N, K) of the models' layers, smallest first; ValueError for unknown models."""
    names = [_one_of("--model", name, tuple(MODELS)) for name in models]
    found = {shape for name in names for shape in MODELS[name].matrices().values()}
    return sorted(found, key=lambda shape: (shape[0] * shape[1], shape))


def users(n: int, k: int) -> str:
    """The models that have this matrix, as in ``"llama3-8b down"``; empty if none has."""
    return ", ".join(
        f"{model} {name}"
        for model, layer in MODELS.items()
        for name, shape in layer.matrices().items()
        if shape == (n, k)
    )
