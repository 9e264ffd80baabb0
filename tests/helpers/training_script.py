"""train.py as a module: it is in no package, so it is loaded by its path. Not a test module."""

import importlib.util
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "train.py"

_spec = importlib.util.spec_from_file_location("train", TRAIN)
assert _spec is not None
assert _spec.loader is not None
train = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train)
