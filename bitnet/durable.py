"""Files and folders that appear complete or not at all, whenever a crash comes.

The recipe for a folder: write everything under a name nobody reads (`.tmp-<name>`, in the same
parent, since a rename is atomic only within a filesystem), fsync each file and the folder, rename,
fsync the parent. The fsyncs before the rename ensure that a power cut cannot leave the new name on
incomplete contents. The fsync after it puts the new name itself on the disk. Removing a folder
renames it first, so that half a folder never carries the name of a complete one.

Checkpoints (checkpoint.py) and model folders (export/folder.py) are written this way, and their
tensors by :func:`save_tensors`.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitnet.schema import check_file, user_input


def sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(path: Path) -> None:
    """Do ``mkdir -p`` so that the new entries survive a power cut."""
    missing = takewhile(lambda folder: not folder.is_dir(), (path, *path.parents))
    for folder in reversed(list(missing)):
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all, replacing any file there. Raises the errors
    of :func:`new_file`."""
    with new_file(path) as aside:
        aside.write_bytes(data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write. When the block ends, it replaces the file at ``path``.
    Missing folders are created.

    Raises:
        UserError: ``path`` is a folder, or something else that is not a file.
        OSError: the disk is full, the folder is read-only, ...; and whatever the block raises. The
            old file is then untouched.
    """
    if os.path.lexists(path):
        check_file(path)
    _make_folder(path.parent)
    aside = path.with_name(f".tmp-{path.name}")
    try:
        yield aside
        fsync(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def check_output(option: str, path: Path) -> None:
    """Raise UserError, naming the option, if a file cannot be written. Called before the work whose
    results the file will hold. Creates its folder."""
    with user_input(f"{option}: cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:64]}-"):
            pass
        if os.path.lexists(path):  # a cycle of links does not "exist"
            check_file(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write files into. When the block ends, it replaces ``path``.

    Python has no call that swaps two folders, so replacing an existing folder takes two renames:
    the old one to `.old-<name>`, the new one to its place. If the process is killed between the
    two, ``path`` is missing and the old folder is complete under the other name; :func:`recover`
    renames it back.

    Raises:
        UserError: ``path`` cannot be a folder.
        OSError: and whatever the block raises; ``path`` is then untouched.
    """
    with user_input(str(path)):  # it may be a cycle of links
        path = path.resolve()  # a link to a folder stays a link: its target is replaced
    aside, old = path.with_name(f".tmp-{path.name}"), path.with_name(f".old-{path.name}")
    _make_folder(path.parent)
    if aside.exists():
        shutil.rmtree(aside)
    try:
        aside.mkdir()
        yield aside
        mode = aside.stat().st_mode & 0o666  # files of safetensors are readable by the owner only
        for file in aside.iterdir():
            file.chmod(mode)
            fsync(file)
        fsync(aside)
        if path.exists():
            if old.exists():
                shutil.rmtree(old)
            path.rename(old)
        aside.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync(path.parent)
    if old.exists():
        shutil.rmtree(old)


def recover(parent: Path) -> None:
    """Clean up after a crash: finish or undo what :func:`new_folder` and :func:`remove_folder`
    began in ``parent``. Only the one process that writes there may call it, never a reader."""
    for old in sorted(parent.glob(".old-*")):
        path = parent / old.name.removeprefix(".old-")
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)
    for aside in sorted(parent.glob(".tmp-*")):
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def remove_folder(path: Path) -> None:
    """Delete a folder; a crash leaves it complete or gone (and a `.tmp-` for :func:`recover`)."""
    aside = path.with_name(f".tmp-{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    shutil.rmtree(aside)


def find_aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Find tied weights: name -> an earlier name of the same object, or of the same view of the
    same memory."""
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        key: object = id(tensor)
        if type(tensor) in (Tensor, nn.Parameter) and tensor.numel():  # subclasses hide memory
            key = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if (earlier := first.setdefault(key, name)) != name:
            aliases[name] = earlier
    return aliases


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> dict[str, str]:
    """Write a safetensors file. The format cannot hold shared or strided memory.

    A tied weight (the same view of the same memory as an earlier tensor) is stored once and
    returned as an alias. Other views become contiguous copies.

    Arguments:
        tensors: any shapes (0-d and empty too), dtypes that safetensors supports, any device.
        metadata: texts for the file's header.
    Returns:
        alias -> stored name.
    Raises:
        OSError: with an errno, for example of a full disk; safetensors' own error hides it.
    """
    stored: dict[str, Tensor] = {}
    aliases = find_aliases(tensors)
    storages: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        if name in aliases:
            continue
        contiguous = tensor.detach().contiguous()
        storage = (contiguous.device, contiguous.untyped_storage().data_ptr())
        stored[name] = contiguous.clone() if storage in storages else contiguous
        storages.add(storage)
    try:
        save_file(stored, path, metadata)
    except SafetensorError as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
    return aliases


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a safetensors file by name, reading each when its turn comes.

    safetensors maps the file into memory. Tensors inside a mapping are not aligned (the last bit of
    a BLAS result may depend on alignment). They keep a deleted file's blocks on the disk, and the
    process gets SIGBUS if the file shrinks. So each tensor is copied. Pages that were read count as
    the process's memory while the mapping exists. So each tensor has its own mapping.

    Raises:
        SafetensorError, OSError: not a safetensors file, unreadable.
    """
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    for name in names:
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(name).clone()
        yield name, tensor
