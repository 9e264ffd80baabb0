"""Exact, crash-safe checkpoints: a run that is killed at any moment resumes as if it had not been.

A checkpoint is a folder of data only (safetensors and JSON; no pickle, so loading executes no
code):

    checkpoints/step_00000100/
        model.safetensors, optimizer_0.safetensors, ...    one file per named group of tensors
        state.json                                         counters, generators, config, ...
        manifest.json                                      size and sha256 of each; written last

**It appears whole or not at all** (written under another name, fsynced, renamed: durable.py). Old
checkpoints are deleted only when the new one is durable.

**It is checked before it is used.** Loading compares every file with the manifest, and the
manifest with its own canonical spelling, so that any flipped bit is found. A damaged checkpoint is
reported and the next older one is used. If none is whole, that is an error, never a fresh start.

**Best needs no marker.** Each manifest carries the validation loss, and the best checkpoint is the
smallest of them: there is no second file to fall out of step with the folders in a crash.

The alternative, `torch.save`, is one pickle: it executes code when loaded, and a torn write is
found only where unpickling happens to fail.
"""

import dataclasses
import json
import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from torch import Tensor

from bitnet.durable import load_tensors, new_folder, recover, remove_folder, save_tensors, sha256
from bitnet.schema import STRICT, Positive, UserError, check_file, read_file

MANIFEST = "manifest.json"
STATE = "state.json"
_MAX_BYTES = 2**26
"""Largest file that is read, except tensors."""


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: Positive = 500
    """Steps between checkpoints. One is always written at the end and when the run is stopped."""
    keep_last: Positive = 2
    """How many of the newest are kept. If the newest is damaged, a run resumes from the second."""
    keep_best: bool = True
    """Also keep the one with the lowest validation loss."""


class DamagedError(UserError):
    """A checkpoint that is not as it was written; the message names the folder and the file."""


@dataclasses.dataclass
class Checkpoint:
    """What :func:`load` returns. Tensors are on the CPU and own their memory."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    val_loss: float | None
    damaged: list[str] = dataclasses.field(default_factory=list)
    """One message for each newer checkpoint that :func:`load_newest` had to skip."""


@dataclass(frozen=True, config=STRICT)
class _File:
    bytes: int
    sha256: str


@dataclass(frozen=True, config=STRICT)
class _Manifest:
    step: int
    val_loss: float | None
    aliases: dict[str, dict[str, str]]
    """Group -> name -> the name under which the same memory (a tied weight) is stored."""
    files: dict[str, _File]
    format: Literal["bitnet-checkpoint"] = "bitnet-checkpoint"
    version: Literal[1] = 1


_MANIFEST = TypeAdapter(_Manifest)


def _steps(root: Path) -> dict[int, Path]:
    """Step -> folder, newest first."""
    found = {}
    for path in root.glob("step_*"):
        match = re.fullmatch(r"step_(\d{8,})", path.name)
        if match and path.name == f"step_{int(match[1]):08d}":
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    val_loss: float | None = None,
) -> Path:
    """Write the checkpoint of ``step``, durably. One that exists already is replaced.

    Arguments:
        root: the folder of checkpoints; created where missing.
        tensors: group (an identifier: it names the file) -> name -> tensor.
        state: JSON values. Floats come back exactly (their shortest repr is written).
        val_loss: validation loss at this step, None where it was not measured. The best checkpoint
            is the one with the lowest; a loss that is not finite is never the best.
    Returns:
        The checkpoint's folder.
    Raises:
        OSError: the disk is full, ...; earlier checkpoints are untouched, nothing is left behind.
    """
    path = root / f"step_{step:08d}"
    for group in tensors:
        if not group.isidentifier():
            raise ValueError(f"tensors: a group's name must be an identifier, got {group!r}")
    with new_folder(path) as folder:
        aliases = {}
        for group, named in tensors.items():
            aliases[group] = save_tensors(folder / f"{group}.safetensors", named)
        (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        files = {f.name: _File(f.stat().st_size, sha256(f)) for f in sorted(folder.iterdir())}
        loss = val_loss if val_loss is not None and math.isfinite(val_loss) else None
        manifest = _Manifest(step=step, val_loss=loss, aliases=aliases, files=files)
        (folder / MANIFEST).write_bytes(_MANIFEST.dump_json(manifest, indent=1))
    return path


def _read_manifest(path: Path) -> _Manifest:
    data = read_file(path / MANIFEST, _MAX_BYTES)
    try:
        manifest = _MANIFEST.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(".".join(map(str, (*first["loc"], first["msg"])))) from error
    if _MANIFEST.dump_json(manifest, indent=1) != data:
        raise ValueError("it is not spelled as it was written")
    if path.name != f"step_{manifest.step:08d}":
        raise ValueError(f"it is the manifest of step {manifest.step}")
    return manifest


def load(path: Path) -> Checkpoint:
    """Load one checkpoint folder, having checked every file of it.

    Raises:
        DamagedError: a file is missing, added, truncated, altered or unreadable.
    """
    name = MANIFEST
    try:
        present = {entry.name for entry in path.iterdir()}
        if MANIFEST not in present:
            raise ValueError("it is missing")
        manifest = _read_manifest(path)
        for name in sorted(present ^ {*manifest.files, MANIFEST}):
            raise ValueError("it is not in the manifest" if name in present else "it is missing")
        for name, expected in manifest.files.items():
            check_file(path / name, None if name.endswith(".safetensors") else _MAX_BYTES)
            if (size := (path / name).stat().st_size) != expected.bytes:
                raise ValueError(f"it has {size} bytes, {expected.bytes} were written")
            if sha256(path / name) != expected.sha256:
                raise ValueError("its sha256 is not that of what was written")
        tensors: dict[str, dict[str, Tensor]] = {}
        for group, aliases in manifest.aliases.items():
            if (name := f"{group}.safetensors") not in manifest.files:
                raise ValueError("it is not in the manifest")
            named = load_tensors(path / name)
            tensors[group] = named | {alias: named[stored] for alias, stored in aliases.items()}
        name = STATE
        state = json.loads(read_file(path / name, _MAX_BYTES))
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: damaged: {name}: it is missing") from error
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"{path}: damaged: {name}: {reason}") from error
    return Checkpoint(path, manifest.step, tensors, state, manifest.val_loss)


def load_newest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint, with a message in ``damaged`` for each that was skipped; None
    where there are no checkpoints. Changes nothing on the disk.

    Raises:
        UserError: there are checkpoints and none is whole.
    """
    damaged: list[str] = []
    for path in _steps(root).values():
        try:
            checkpoint = load(path)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        checkpoint.damaged = damaged
        return checkpoint
    if damaged:
        raise UserError(
            f"{root}: no checkpoint is whole; restore one, or delete the folder to start again: "
            + "; ".join(damaged)
        )
    return None


def resume(root: Path) -> Checkpoint | None:
    """:func:`recover` the folder, :func:`load_newest`, and rename damaged checkpoints to
    `damaged-step_...`: they do not count as kept, and are not lost. A run calls this at its
    start."""
    recover(root)
    checkpoint = load_newest(root)
    if checkpoint is not None:
        for step, path in _steps(root).items():
            if step > checkpoint.step:
                aside = path.with_name(f"damaged-{path.name}")
                if aside.exists():
                    remove_folder(aside)
                path.rename(aside)
    return checkpoint


def best(root: Path) -> Path | None:
    """The checkpoint with the lowest validation loss (the newest of equals); None where no
    readable manifest has one."""
    losses: dict[Path, float] = {}
    for path in _steps(root).values():
        try:
            loss = _read_manifest(path).val_loss
        except (OSError, ValueError):
            continue  # a damaged one is nobody's best; loading is what reports it
        if loss is not None:
            losses[path] = loss
    return min(losses, key=losses.__getitem__, default=None)


def prune(root: Path, keep_last: int, keep_best: bool) -> None:
    """Delete all but the ``keep_last`` newest checkpoints and, if ``keep_best``, the best."""
    kept = [best(root)] if keep_best else []
    for path in list(_steps(root).values())[keep_last:]:
        if path not in kept:
            remove_folder(path)


class Stateful(Protocol):
    """Anything with PyTorch's state-dict methods, such as an optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts, lists and tuples of tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse."""
        ...


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of the same structure: tensors go to ``tensors`` under their path; tuples and dicts
    (whose keys may be integers) are tagged, since JSON has neither."""
    if isinstance(value, Tensor):
        assert name not in tensors, name
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, dict):
        items = [[key, _flatten(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: cannot be saved without pickle: {type(value).__name__}")


def _unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "tuple":
        return tuple(_unflatten(item, tensors) for item in content)
    assert tag == "dict", tag
    return {key: _unflatten(item, tensors) for key, item in content}


def optimizer_tensors(optimizer: Stateful) -> tuple[dict[str, Tensor], Any]:
    """An optimizer's state as tensors (its own memory, not copies) and JSON (all else, exactly)."""
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(optimizer.state_dict(), "optimizer", tensors)


def load_optimizer(optimizer: Stateful, tensors: Mapping[str, Tensor], structure: Any) -> None:
    """The inverse of :func:`optimizer_tensors`. The optimizer may keep the tensors it is given.

    Raises:
        ValueError: the state is of other parameters, or PyTorch cast it (it gives a state its
            parameter's dtype), so that training would not go on exactly.
    """
    optimizer.load_state_dict(_unflatten(structure, tensors))
    loaded, _ = optimizer_tensors(optimizer)
    for name, tensor in tensors.items():
        if loaded[name].dtype != tensor.dtype:
            raise ValueError(f"{name}: saved as {tensor.dtype}, loaded as {loaded[name].dtype}")


def _to_hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def rng_state() -> dict[str, Any]:
    """State of Python's, numpy's (global) and torch's generators (CPU, every CUDA device), as
    JSON."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return {
        "python": [version, list(words), gauss],
        "numpy": numpy,
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(state) for state in torch.cuda.get_rng_state_all()],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """The inverse of :func:`rng_state`. States of CUDA devices beyond those here are left out:
    nothing draws from them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"] | {"state": state["numpy"]["state"] | {"key": key}})
    torch.set_rng_state(_from_hex(state["torch"]))
    for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_from_hex(saved), device)
