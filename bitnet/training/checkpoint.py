"""Exact, crash-safe checkpoints: a run killed at any moment resumes as if it had never stopped.

A checkpoint is a folder of data only (safetensors and JSON; no pickle, so loading executes no
code):

    checkpoints/step_00000100/
        model.safetensors, optimizer_0.safetensors, ...    one file per named group of tensors
        tensors.json                                       tensor -> its parts and their files
        state.json                                         counters, generators, config, ...
        manifest.json                                      size and sha256 of each; written last

With several processes, each writes the parts it holds (shards.py), in its own files:
model.00000.safetensors, model.00001.safetensors, ... Any checkpoint loads into any number of
processes and any sharding, with the same values.

**It appears complete or not at all** (written under another name, fsynced, renamed: durable.py).
Old checkpoints are deleted only when the new one is durable. All processes write, and the main one
makes, names and deletes folders. So all processes must see the same folder.

**It is checked before it is used.** Loading compares every file with the manifest, and the
manifest with its own canonical spelling, so any flipped bit is found. A damaged checkpoint is
reported and the next older one is used. If none is complete, that is an error, never a fresh start.
Processes divide the files among them, and damage found by one counts for all.

**Best needs no marker.** Each manifest carries the validation loss, and the best checkpoint has the
lowest. So there is no second file that a crash could leave inconsistent with the folders.

The alternative, `torch.save`, writes one pickle: loading executes code, and an incomplete write is
found only if unpickling happens to fail. PyTorch's distributed checkpoint also keeps its list of
parts in a pickle; its planners are used here, but not its storage.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from torch import Tensor

from bitnet.durable import (
    find_aliases,
    fsync,
    new_folder,
    recover,
    remove_folder,
    save_tensors,
    sha256,
)
from bitnet.schema import STRICT, Positive, UserError, check_file, read_file
from bitnet.training import shards
from bitnet.training.distributed import World
from bitnet.training.shards import Contents, Groups, Headers

MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = "tensors.json"
_MAX_BYTES = 2**28
"""Largest file that is read, except tensors."""
_PATIENCE = timedelta(hours=1)
"""How long a thread waits until the other processes have written their parts."""
_LAST_WAIT = 60.0
"""Seconds that a run ending with an error waits for the writing thread."""
_ALONE = World(torch.device("cpu"))
_T = TypeVar("_T")


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: Positive = 500
    """Steps between checkpoints. The end or stop of a run always writes one."""
    keep_last: Positive = 2
    """Number of newest checkpoints kept. If the newest is damaged, a run resumes from the next."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    async_save: bool = True
    """On a GPU, continue training while a checkpoint is written, from a copy in CPU memory. On a
    CPU a save is never asynchronous."""


class DamagedError(UserError):
    """A checkpoint that changed after it was written; the message names the folder and the file."""


@dataclasses.dataclass
class Checkpoint:
    """A complete checkpoint. Its tensors are read on demand."""

    path: Path
    step: int
    contents: Contents
    """Where each tensor is, including aliases."""
    aliases: dict[str, dict[str, str]]
    """Group -> name -> the name under which the same memory (a tied weight) is stored."""
    state: dict[str, Any]
    val_loss: float | None
    damaged: list[str] = dataclasses.field(default_factory=list)
    """One message for each newer checkpoint that :func:`load_newest` had to skip."""

    def read_into(self, group: str, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors in place: whole tensors, or this process's parts of DTensors. Waits for no
        other process.

        Raises:
            UserError: the group and ``targets`` differ in names, shapes or dtypes.
        """
        aliases = self.aliases[group]
        if missing := sorted(self.contents[group].keys() ^ targets.keys()):
            raise UserError(f"{self.path}: {group}: {missing[0]!r} is not in both it and the run")
        stored = [(aliases.get(name, name), tensor) for name, tensor in targets.items()]
        try:
            shards.read_into(self.path, self.contents[group], stored)
        except ValueError as error:
            raise UserError(f"{self.path}: {group}: {error}") from error

    def read(self, group: str) -> dict[str, Tensor]:
        """The whole tensors of a group, on the CPU."""
        contents, aliases = self.contents[group], self.aliases[group]
        named = {name: contents[name].zeros(None) for name in contents if name not in aliases}
        named |= {alias: named[stored] for alias, stored in aliases.items()}
        self.read_into(group, named)
        return named

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Group -> name -> whole tensor, on the CPU."""
        return {group: self.read(group) for group in self.contents}


@dataclass(frozen=True, config=STRICT)
class _File:
    bytes: int
    sha256: str


@dataclass(frozen=True, config=STRICT)
class _Manifest:
    step: int
    val_loss: float | None
    aliases: dict[str, dict[str, str]]
    """Version 1: as in :class:`_Tensors`. A flipped bit in a name here would not be found."""
    files: dict[str, _File]
    format: Literal["bitnet-checkpoint"] = "bitnet-checkpoint"
    version: Literal[1, 2] = 2
    """1: written by one process, without :data:`TENSORS`."""


@dataclass(frozen=True, config=STRICT)
class _Tensors:
    contents: Contents
    """Group -> name -> where it is."""
    aliases: dict[str, dict[str, str]]
    """Group -> name -> the name under which the same memory (a tied weight) is stored."""


_MANIFEST, _TENSORS = TypeAdapter(_Manifest), TypeAdapter(_Tensors)


class _Ranks:
    """The processes of a run working together on one checkpoint.

    Arguments:
        own: make a separate process group, so that a thread may use it. All processes must make
            it, in the same order.
    """

    def __init__(self, world: World = _ALONE, own: bool = False) -> None:
        self.rank, self.size = world.rank, world.size
        self._group: dist.ProcessGroup | None = None
        if own and self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def all(self, part: Callable[[], _T]) -> list[_T]:
        """Run ``part`` on every process; returns all results, by rank.

        Raises:
            Exception: the exception of the lowest rank that raised; the other processes get it as
                a UserError.
        """
        result: _T | None = None
        error: Exception | None = None
        try:
            result = part()
        except Exception as caught:
            error = caught
        if self.size == 1:
            everyone = [(result, error)]
        else:
            told = error
            if error is not None and not isinstance(error, UserError):
                told = UserError(f"rank {self.rank}: {str(error) or type(error).__name__}")
            everyone = [(None, None)] * self.size
            dist.all_gather_object(everyone, (result, told), self._group)
        for rank, (_, failed) in enumerate(everyone):
            if failed is not None:
                raise error if rank == self.rank and error is not None else failed
        return [value for value, _ in everyone]  # type: ignore[misc]

    def main(self, part: Callable[[], _T]) -> _T:
        """Run ``part`` on the main process; every process returns its result, or raises."""
        value, *_ = self.all(part if self.rank == 0 else lambda: None)
        return value  # type: ignore[return-value]


def _steps(root: Path) -> dict[int, Path]:
    """Step -> folder, newest first."""
    found = {}
    for path in root.glob("step_*"):
        match = re.fullmatch(r"step_(\d{8,})", path.name)
        if match and path.name == f"step_{int(match[1]):08d}":
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A checkpoint to be written: the parts of this process, and the data that all share."""

    path: Path
    step: int
    parts: Groups
    """Plain tensors that this process writes."""
    contents: Contents | None
    """Contents of all processes; None for one process, whose tensors are whole."""
    aliases: dict[str, dict[str, str]]
    state: Mapping[str, Any]
    val_loss: float | None


def _prepare(
    root: Path,
    step: int,
    tensors: Groups,
    state: Mapping[str, Any],
    val_loss: float | None,
    ranks: _Ranks,
) -> _Ready:
    for group in tensors:
        if not group.isidentifier():
            raise ValueError(f"tensors: a group's name must be an identifier, got {group!r}")
    aliases = {group: find_aliases(named) for group, named in tensors.items()}
    stored = {
        group: {name: tensor for name, tensor in named.items() if name not in aliases[group]}
        for group, named in tensors.items()
    }
    contents = None
    if ranks.size == 1:
        parts = shards.local_parts(stored)
    else:
        parts, contents = shards.plan(stored, ranks.rank, lambda mine: ranks.all(lambda: mine))
    loss = val_loss if val_loss is not None and math.isfinite(val_loss) else None
    return _Ready(root / f"step_{step:08d}", step, parts, contents, aliases, state, loss)


def _write(ready: _Ready, ranks: _Ranks) -> None:
    """Write a checkpoint; all processes call it. On return the checkpoint is durable."""
    with ExitStack() as stack:
        folder = ranks.main(lambda: stack.enter_context(new_folder(ready.path)))
        written = ranks.all(lambda: _write_parts(folder, ready, ranks))

        def finish() -> None:
            _write_rest(folder, ready, written)
            stack.close()  # here the folder gets its name

        ranks.main(finish)


_Written = tuple[dict[str, _File], Headers]


def _write_parts(folder: Path, ready: _Ready, ranks: _Ranks) -> _Written:
    files, headers = dict[str, _File](), Headers()
    for group, named in ready.parts.items():
        name = f"{group}.safetensors"
        if ready.contents is not None:
            name = shards.file_name(group, ranks.rank)
            if not named:
                continue
        save_tensors(folder / name, named)
        if ranks.size > 1:  # for a process on another machine, where the main one cannot do it
            fsync(folder / name)
        files[name], headers[name] = _describe(folder / name), shards.read_header(folder / name)
    return files, headers


def _describe(path: Path) -> _File:
    return _File(path.stat().st_size, sha256(path))


def _write_rest(folder: Path, ready: _Ready, written: Sequence[_Written]) -> None:
    files = {name: file for part, _ in written for name, file in part.items()}
    headers = {name: header for _, part in written for name, header in part.items()}
    (folder / STATE).write_text(json.dumps(ready.state, indent=1), encoding="utf-8")
    files[STATE] = _describe(folder / STATE)
    contents = ready.contents
    if contents is None:
        contents = shards.whole_files(
            {group: f"{group}.safetensors" for group in ready.parts}, headers
        )
    shards.check(contents, headers)
    (folder / TENSORS).write_bytes(_TENSORS.dump_json(_Tensors(contents, ready.aliases)))
    files[TENSORS] = _describe(folder / TENSORS)
    sorted_files = dict(sorted(files.items()))
    manifest = _Manifest(step=ready.step, val_loss=ready.val_loss, aliases={}, files=sorted_files)
    (folder / MANIFEST).write_bytes(_MANIFEST.dump_json(manifest, indent=1))


def save(
    root: Path,
    step: int,
    tensors: Groups,
    state: Mapping[str, Any],
    val_loss: float | None = None,
) -> Path:
    """Write the checkpoint of ``step`` durably, from one process. Replaces an existing one.

    Arguments:
        root: the folder of checkpoints; created if missing.
        tensors: group (an identifier: it names the file) -> name -> tensor.
        state: JSON values. Floats are restored exactly (their shortest repr is written).
        val_loss: validation loss at this step, None if it was not measured. The best checkpoint has
            the lowest loss; a loss that is not finite is never the best.
    Returns:
        The checkpoint's folder.
    Raises:
        OSError: the disk is full, ...; earlier checkpoints are untouched, nothing is left behind.
    """
    ranks = _Ranks()
    ready = _prepare(root, step, tensors, state, val_loss, ranks)
    _write(ready, ranks)
    return ready.path


class Saver:
    """Writes the checkpoints of a run, by all its processes, and deletes old ones.

    With a GPU (``checkpoint.async_save``) a save copies its data to the CPU, and a thread writes it
    while training continues. The next save waits for the last one. The next call of any method
    raises a failure. A crash in the meantime loses only that checkpoint.

    On a CPU a save writes before it returns: a thread would take time from the step's own threads,
    and the copy would take memory. The end of a ``with`` block waits for the last save.

    Arguments:
        root: the folder of checkpoints, which all processes must see.
        world: the run's processes; all make a Saver and call its methods in the same order.
        background: whether a thread writes; None: if it helps.
    """

    def __init__(
        self, root: Path, config: CheckpointConfig, world: World, background: bool | None = None
    ) -> None:
        self._root, self._config = root, config
        self._ranks = _Ranks(world)
        if background is None:
            background = config.async_save and world.device.type != "cpu"
        self._thread_ranks = _Ranks(world, own=True) if background else None
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join(_LAST_WAIT)

    def save(
        self,
        step: int,
        tensors: Groups,
        state: Mapping[str, Any],
        of_each: Mapping[str, Any],
        val_loss: float | None = None,
    ) -> None:
        """Write the checkpoint of ``step``; all processes call it.

        Arguments:
            tensors: as in :func:`save`; DTensors, or tensors that are equal on all processes.
            state: JSON; only the main process's counts.
            of_each: JSON of this process; ``state["ranks"]`` will hold every process's.
            val_loss: as in :func:`save`.
        Raises:
            OSError, UserError: this checkpoint or the last one could not be written; earlier
                checkpoints are untouched.
        """
        self.wait()
        whole = {**state, "ranks": self._ranks.all(lambda: of_each)}
        ready = _prepare(self._root, step, tensors, whole, val_loss, self._ranks)
        if self._thread_ranks is None:
            self._finish(ready, self._ranks)
            return
        parts = {
            group: {name: shards.copied(tensor) for name, tensor in named.items()}
            for group, named in ready.parts.items()
        }
        copy = dataclasses.replace(ready, parts=parts)
        # A daemon: this process can end even if the others hang.
        self._thread = Thread(target=self._write, args=(copy, self._thread_ranks), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a failed background save, if there is one; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is durable. Raises the errors of :meth:`save`."""
        if self._thread is not None:
            self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        if failure is not None:
            raise failure

    def _write(self, ready: _Ready, ranks: _Ranks) -> None:
        try:
            self._finish(ready, ranks)
        except BaseException as error:
            self._failure = error

    def _finish(self, ready: _Ready, ranks: _Ranks) -> None:
        _write(ready, ranks)
        keep = self._config
        ranks.main(lambda: prune(self._root, keep.keep_last, keep.keep_best))


def _parse(adapter: TypeAdapter[_T], data: bytes) -> _T:
    try:
        return adapter.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(".".join(map(str, (*first["loc"], first["msg"])))) from error


def _read_manifest(path: Path) -> _Manifest:
    data = read_file(path / MANIFEST, _MAX_BYTES)
    manifest = _parse(_MANIFEST, data)
    if _MANIFEST.dump_json(manifest, indent=1) != data:
        raise ValueError("it is not spelled as it was written")
    if manifest.version == 2 and manifest.aliases:
        raise ValueError("it has aliases, whose place is in " + TENSORS)
    if path.name != f"step_{manifest.step:08d}":
        raise ValueError(f"it is the manifest of step {manifest.step}")
    return manifest


def load(path: Path, ranks: _Ranks | None = None) -> Checkpoint:
    """Open one checkpoint folder after checking every file in it.

    Raises:
        DamagedError: a file is missing, added, truncated, altered or unreadable.
    """
    ranks = _Ranks() if ranks is None else ranks
    manifest, tensors, state = ranks.main(lambda: _open(path))
    files = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    mine = files[ranks.rank :: ranks.size]
    found = ranks.all(lambda: _check_files(path, manifest, mine))
    headers = {name: header for part in found for name, header in part.items()}
    with _damage(path) as at:
        at.append(MANIFEST if manifest.version == 1 else TENSORS)
        if tensors is None:
            whole = {group: f"{group}.safetensors" for group in manifest.aliases}
            tensors = _Tensors(shards.whole_files(whole, headers), manifest.aliases)
        contents, aliases = tensors.contents, tensors.aliases
        if contents.keys() != aliases.keys():
            raise ValueError("the groups of tensors are not those of aliases")
        shards.check(contents, headers)
        for group, stored in contents.items():
            contents[group] = stored | {alias: stored[to] for alias, to in aliases[group].items()}
    return Checkpoint(path, manifest.step, contents, aliases, state, manifest.val_loss)


@contextmanager
def _damage(path: Path) -> Iterator[list[str]]:
    """Turn any error of the block into a DamagedError. The block appends the name of the file it is
    reading to the list."""
    at: list[str] = []
    try:
        yield at
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: damaged: {at[-1]}: it is missing") from error
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"{path}: damaged: {at[-1]}: {reason}") from error


def _open(path: Path) -> tuple[_Manifest, _Tensors | None, dict[str, Any]]:
    """The manifest, the list of tensors (None in version 1) and the state."""
    with _damage(path) as at:
        at.append(MANIFEST)
        present = {entry.name for entry in path.iterdir()}
        if MANIFEST not in present:
            raise ValueError("it is missing")
        manifest = _read_manifest(path)
        expected = {*manifest.files, MANIFEST}
        needed = {STATE, TENSORS} if manifest.version == 2 else {STATE}
        if manifest.version == 1:
            needed |= {f"{group}.safetensors" for group in manifest.aliases}
        for name in sorted((present ^ expected) | (needed - expected)):
            at.append(name)
            raise ValueError("it is missing" if name in expected else "it is not in the manifest")
        tensors = None
        if manifest.version == 2:
            at.append(TENSORS)
            tensors = _parse(_TENSORS, read_file(path / TENSORS, _MAX_BYTES))
        at.append(STATE)
        return manifest, tensors, json.loads(read_file(path / STATE, _MAX_BYTES))


def _check_files(path: Path, manifest: _Manifest, names: Sequence[str]) -> Headers:
    """Compare files with the manifest; returns the headers of the tensor files."""
    headers: Headers = {}
    with _damage(path) as at:
        for name in names:
            at.append(name)
            is_tensors = name.endswith(".safetensors")
            check_file(path / name, None if is_tensors else _MAX_BYTES)
            expected, size = manifest.files[name], (path / name).stat().st_size
            if size != expected.bytes:
                raise ValueError(f"it has {size} bytes, {expected.bytes} were written")
            if sha256(path / name) != expected.sha256:
                raise ValueError("its sha256 is not that of what was written")
            if is_tensors:
                headers[name] = shards.read_header(path / name)
    return headers


def load_newest(root: Path, ranks: _Ranks | None = None) -> Checkpoint | None:
    """The newest complete checkpoint; its ``damaged`` has a message for each skipped one. None if
    there are no checkpoints. Changes nothing on the disk.

    Raises:
        UserError: there are checkpoints, but none is complete.
    """
    ranks = _Ranks() if ranks is None else ranks
    damaged: list[str] = []
    for path in ranks.main(lambda: list(_steps(root).values())):
        try:
            checkpoint = load(path, ranks)
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


def resume(root: Path, world: World = _ALONE) -> Checkpoint | None:
    """:func:`recover` the folder, :func:`load_newest`, and rename damaged checkpoints to
    `damaged-step_...`, so that they are not lost but do not count as kept. All processes of a run
    call this at its start and get the same checkpoint."""
    ranks = _Ranks(world)
    ranks.main(lambda: recover(root))
    checkpoint = load_newest(root, ranks)
    if checkpoint is not None:
        step = checkpoint.step
        ranks.main(lambda: _set_aside(root, step))
    return checkpoint


def _set_aside(root: Path, newest: int) -> None:
    """Rename the checkpoints of later steps."""
    for step, path in _steps(root).items():
        if step > newest:
            aside = path.with_name(f"damaged-{path.name}")
            if aside.exists():
                remove_folder(aside)
            path.rename(aside)


def best(root: Path) -> Path | None:
    """The checkpoint with the lowest validation loss (the newest of equals); None if no readable
    manifest has one."""
    losses: dict[Path, float] = {}
    for path in _steps(root).values():
        try:
            loss = _read_manifest(path).val_loss
        except (OSError, ValueError):
            continue  # a damaged checkpoint is never the best; loading reports it
        if loss is not None:
            losses[path] = loss
    return min(losses, key=losses.__getitem__, default=None)


def prune(root: Path, keep_last: int, keep_best: bool) -> None:
    """Delete all but the ``keep_last`` newest checkpoints and, if ``keep_best``, the best."""
    kept = [best(root)] if keep_best else []
    for path in list(_steps(root).values())[keep_last:]:
        if path not in kept:
            remove_folder(path)
