"""Find train.py and the configs by name, in a checkout and in an installed package.

In a checkout they are at the root, outside the package: train.py is there to be read, and nothing
imports it. An installed package has no such root, so setup.py copies both unchanged into
``bitnet/checkout/`` of the wheel. So there is one source for both.
"""

import re
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parent
_CARRIED = _PACKAGE / "checkout"


def root() -> Path:
    """The folder of ``train.py`` and ``configs/``."""
    return _CARRIED if _CARRIED.is_dir() else _PACKAGE.parent


@dataclass(frozen=True)
class Overlay:
    """A config that makes a run only together with other settings."""

    needs: str
    usage: str
    """Example arguments of ``bitnet train``."""
    keys: tuple[str, ...] = ()
    """Any one of these keys gives what the overlay needs; so does another config."""


OVERLAYS = {
    "gguf": Overlay("a config before it, which gives the size and the data", "15m gguf"),
    "qat": Overlay(
        "a model to start from",
        "qat train.init_from=FOLDER data.path=FOLDER data.sources=TEXTS",
        ("train.init_from", "qat.start"),
    ),
}
"""Overlays by name."""


def presets() -> dict[str, Path]:
    """The configs by name, small ones first: ``quickstart``, ``15m``, ..., then the full-precision
    baselines ``fp/15m``, ..., then :data:`OVERLAYS`."""
    configs = root() / "configs"
    found = {
        str(path.relative_to(configs).with_suffix("")): path for path in configs.rglob("*.toml")
    }
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[bool, int, int, str]:
    size = re.search(r"\d+", name)
    unsized = 0 if name.endswith("quickstart") else 10**9
    return name in OVERLAYS, name.count("/"), int(size[0]) if size else unsized, name
