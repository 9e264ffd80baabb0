"""Ternary (BitNet b1.58) language models: layers, models, conversion and generation.

from bitnet import BitLinear, replace_linear, coverage, pack, load, Engine

Each name is imported when it is first used: importing torch takes seconds, and a command must
handle Ctrl-C before that (bitnet/cli/shell.py).
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet.engine.engine import Engine
    from bitnet.engine.request import SamplingParams
    from bitnet.export.folder import load
    from bitnet.inventory import Coverage, coverage
    from bitnet.linear import BitLinear, TernaryLinear, pack, replace_linear, weights_quantized
    from bitnet.model import Transformer

__all__ = [
    "BitLinear",
    "Coverage",
    "Engine",
    "SamplingParams",
    "TernaryLinear",
    "Transformer",
    "coverage",
    "load",
    "pack",
    "replace_linear",
    "weights_quantized",
]

_HOMES = {
    "Coverage": "inventory",
    "Engine": "engine.engine",
    "SamplingParams": "engine.request",
    "Transformer": "model",
    "coverage": "inventory",
    "load": "export.folder",
}
"""The module of each public name; all others are in bitnet.linear."""

if not TYPE_CHECKING:  # a type checker reads the imports above

    def __getattr__(name: str) -> Any:
        """Import a public name from its module, or a module of the package."""
        if name in __all__:
            value = getattr(import_module(f"bitnet.{_HOMES.get(name, 'linear')}"), name)
            globals()[name] = value  # so that each name is looked up once
            return value
        if not name.startswith("_") and find_spec(f"bitnet.{name}") is not None:
            return import_module(f"bitnet.{name}")
        raise AttributeError(f"module 'bitnet' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)
