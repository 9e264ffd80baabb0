"""Small checkpoints whose content is a function of their step. Not a test module."""

from pathlib import Path
from typing import Any

import torch

from bitnet.training.checkpoint import save


def write(root: Path, step: int, val_loss: float | None = None) -> Path:
    """A small checkpoint whose every tensor is a function of its step."""
    groups = {"model": {"w": torch.full((7, 3), float(step))}, "optim": {"s": torch.tensor(step)}}
    return save(root, step, groups, {"step": step}, val_loss)


def is_whole(checkpoint: Any) -> bool:
    """Whether every tensor is the one of its step."""
    step = checkpoint.step
    w, s = checkpoint.tensors["model"]["w"], checkpoint.tensors["optim"]["s"]
    return bool((w == step).all()) and s.item() == step and checkpoint.state["step"] == step


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
