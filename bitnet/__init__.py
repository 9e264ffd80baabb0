"""Ternary (BitNet b1.58) language models: layers, models, and what turns one into the other.

from bitnet import BitLinear, replace_linear, coverage, pack, load, Engine

The names are imported when they are first used: torch takes seconds, and a command has to hear
Ctrl-C before (bitnet/cli/shell.py).
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet.engine.engine import Engine
    from bitnet.export.folder import load
    from bitnet.inventory import Coverage, coverage
    from bitnet.linear import BitLinear, TernaryLinear, pack, replace_linear, weights_quantized
    from bitnet.model import Transformer

__all__ = [
    "BitLinear",
    "Coverage",
    "Engine",
    "TernaryLinear",
    "Transformer",
    "coverage",
    "load",
    "pack",
    "replace_linear",
    "weights_quantized",
]

if not TYPE_CHECKING:  # a checker reads the imports above

    def __getattr__(name: str) -> Any:
        """A public name from its module, or a module of the package."""
        if name in __all__:
            homes = {"load": "export.folder", "Transformer": "model", "Engine": "engine.engine"}
            homes |= {"Coverage": "inventory", "coverage": "inventory"}
            value = getattr(import_module(f"bitnet.{homes.get(name, 'linear')}"), name)
            globals()[name] = value  # looked up once
            return value
        if not name.startswith("_") and find_spec(f"bitnet.{name}") is not None:
            return import_module(f"bitnet.{name}")
        raise AttributeError(f"module 'bitnet' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)
