"""The catalog of compiled forms worth inspecting, gathered from the kernels' files."""

import pkgutil
from importlib import import_module

from bitnet_kernels import gpu
from bitnet_kernels.gpu.common import Spec


def catalog() -> list[Spec]:
    """The specs of all files of this package that have a ``specs()``; a new kernel's file needs no
    registration.

    Raises:
        ValueError: two specs have the same name.
    """
    found: list[Spec] = []
    for file in pkgutil.iter_modules(gpu.__path__, f"{gpu.__name__}."):
        found += getattr(import_module(file.name), "specs", list)()
    names = [spec.name for spec in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"more than one spec is named {', '.join(sorted(twice))}")
    return found
